"""`python -m otdrg`, for `accelerate launch -m otdrg`."""

import sys

from otdrg.cli import main

sys.exit(main())
