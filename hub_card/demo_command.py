"""`otdrg demo`: a model in a browser, on this machine."""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import threading
from importlib.util import find_spec

from ..interruptions import terminations

DESCRIPTION = """\
Try a model in a browser: upload a study, watch its report being written, change the states of the findings and write
it again, see the heatmaps and where the report says otherwise than it was told. Reports are decoded greedily, not by
the model's beams, which cannot be watched. The page is for this machine alone (127.0.0.1); nothing is fetched from
elsewhere, and no upload is kept. Research only, not for clinical use.
"""
EPILOG = """\
Example:
  otdrg demo runs/quickstart

From another machine, through ssh, and then http://127.0.0.1:7860 there:
  ssh -N -L 7860:127.0.0.1:7860 user@machine
"""

_LOOPBACK = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """The command's arguments; `arguments`, what was typed, does not change them."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="folder of a run or a model, or a Hub id")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="of the page (default: 7860)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of a report (default: the model's)")


def run(options: argparse.Namespace) -> None:
    """Show the page until Ctrl-C."""
    for library in ("gradio", "matplotlib"):
        if find_spec(library) is None:
            raise ImportError(f"the demo needs {library}: pip install 'otdrg[demo]'")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {options.max_new_tokens}: expected 1 or more")
    _check_port(options.port)  # before a large model is loaded

    with terminations(), tempfile.TemporaryDirectory(prefix="otdrg-demo-") as uploads:
        # Gradio reads these when it is imported.
        os.environ["GRADIO_TEMP_DIR"] = uploads
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        from ..training.published import load_pipeline
        from .space.interface import build_demo
        from .space.serving import serve

        demo = build_demo(load_pipeline(options.model), options.model, options.max_new_tokens)
        print(f"{serve(demo, _LOOPBACK, options.port, block=False)}\nCtrl-C ends it.", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()
        finally:
            demo.close(verbose=False)


def _check_port(port: int) -> None:
    if not 1 <= port <= 65535:
        raise ValueError(f"--port is {port}: expected 1 to 65535")
    try:
        socket.create_server((_LOOPBACK, port)).close()
    except OSError as error:
        raise OSError(f"--port {port} cannot be used ({os.strerror(error.errno)}): expected a free one") from error
