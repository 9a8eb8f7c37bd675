"""`otdrg demo`: try a model in a browser on this machine."""

from __future__ import annotations

import argparse
import os
import threading
from importlib.util import find_spec

from ..runtime.interruptions import terminations
from .arguments import add_address, add_device, check_address, check_device, check_least, placement

DESCRIPTION = """\
Try a model in a browser: upload a study, watch its report being written, change the states of the findings and write
the report again, and see heatmaps and contradictions. Reports are decoded greedily, because beam search cannot be
streamed. Without --server-name, only this machine can open the page (127.0.0.1). Nothing is fetched from elsewhere, and
no upload is kept. For research only, not for clinical use.
"""
EPILOG = """\
Example:
  otdrg demo runs/quickstart

From another machine, open http://127.0.0.1:7860 there after:
  ssh -N -L 7860:127.0.0.1:7860 user@machine

For everyone in the network, without a password, at this machine's address or host name:
  otdrg demo runs/quickstart --server-name 0.0.0.0
Requests under other host names are refused; OTDRG_ALLOWED_HOSTS=demo.example.org,other.example.org allows these.
"""


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Add the arguments of the command. `arguments`, those on the command line, are not used."""
    parser.add_argument("model", metavar="MODEL", help="folder of a run or a model, or a Hub id")
    add_address(parser, 7860)
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="maximum number of tokens of a report (default: the model's)"
    )
    parser.add_argument(
        "--bank", metavar="FOLDER", help="report bank of otdrg bank, for reports chosen among candidates"
    )
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    """Show the page until Ctrl-C."""
    for library in ("gradio", "matplotlib"):
        if find_spec(library) is None:
            raise ImportError(f"the demo needs {library}: pip install 'otdrg[demo]'")
    check_least(options, max_new_tokens=1)
    check_device(options)
    check_address(options)  # before a large model is loaded
    from ..hub_card.space.temporary import upload_folder

    with terminations(), upload_folder() as uploads:
        # Gradio reads these variables on import.
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        from ..bank_otdrg import ReportBank
        from ..hub_card.space.interface import build_demo
        from ..hub_card.space.serving import serve
        from ..inference.loading import load_pipeline

        pipe, bank = load_pipeline(options.model, **placement(options)), None
        if options.bank is not None:
            bank = ReportBank.load(options.bank)
            bank.check(pipe.model, pipe.processor)
        demo = build_demo(pipe, options.model, options.max_new_tokens, bank)
        print(f"{serve(demo, options.server_name, options.port, block=False)}\nPress Ctrl-C to stop.", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()
        finally:
            demo.close(verbose=False)
