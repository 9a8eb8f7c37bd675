"""`accelerate launch` in a process that ends with its parent: `python -m otdrg.experiments.launch ARGUMENTS`."""

from __future__ import annotations

import os
import runpy

from ..runtime.interruptions import PARENT, end_with_parent

if __name__ == "__main__":
    end_with_parent()
    # The processes that it starts end with it in turn.
    os.environ[PARENT] = str(os.getpid())
    runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
