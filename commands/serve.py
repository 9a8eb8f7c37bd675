"""`otdrg serve`: an HTTP server with OpenAI's chat completions API."""

from __future__ import annotations

import argparse
import os
import re
import socket
from importlib.util import find_spec
from pathlib import Path

from ..runtime.interruptions import terminations
from .arguments import (
    add_address,
    add_consensus,
    add_device,
    add_guidance,
    check_address,
    check_consensus,
    check_device,
    check_guidance,
    check_least,
    placement,
)

DESCRIPTION = """\
Serve a model by OpenAI's API: POST /v1/chat/completions takes the views of one study as images in data URLs and, as
text, the indication. With "stream": true the report arrives word by word, unless it is chosen among beams or
candidates. Without --server-name, only this machine can ask (127.0.0.1). Images and reports are kept in memory only,
and not logged. For research only, not for clinical use.
"""
EPILOG = """\
Examples:
  otdrg serve runs/quickstart
  otdrg serve checkpoints/otdrg-iu-xray --candidates 1 --port 8001
  otdrg serve runs/quickstart --candidates 32 --bank bank --batch-size 1

For other machines, at this machine's address or host name, with the API key that clients must send:
  OTDRG_API_KEY=... otdrg serve runs/quickstart --server-name 0.0.0.0
Requests under other host names are refused; OTDRG_ALLOWED_HOSTS=reports.example.org,other.example.org allows these.
"""


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Add the arguments of the command. `arguments`, those on the command line, are not used."""
    parser.add_argument("model", metavar="MODEL", help="folder of a run or a model, or a Hub id")
    parser.add_argument("--name", help="name of the model in requests (default: the name of its folder, or its Hub id)")
    add_address(parser, 8000)
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="web page that may ask, such as https://viewer.example.org (default: none); repeatable",
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--queue",
        type=int,
        default=32,
        metavar="N",
        help="requests that are read, wait or are answered at once; others get status 503 (default: 32)",
    )
    load.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="waiting studies that are written together (default: 8)",
    )
    load.add_argument("--max-images", type=int, default=4, metavar="N", help="most views of a study (default: 4)")
    conditions = parser.add_argument_group("how reports are written")
    conditions.add_argument(
        "--num-beams", type=int, metavar="N", help="beams; 1 is greedy search (default: the model's, or 1)"
    )
    conditions.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="maximum number of tokens of a report (default: the model's)"
    )
    add_guidance(conditions)
    add_consensus(conditions)
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    for library in ("fastapi", "uvicorn"):
        if find_spec(library) is None:
            raise ImportError(f"the server needs {library}: pip install 'otdrg[serve]'")
    check_least(options, num_beams=1, max_new_tokens=1, batch_size=1, queue=1, max_images=1)
    check_guidance(options)
    check_consensus(options)
    check_device(options)
    for origin in options.allow_origin:
        if not re.fullmatch(r"https?://[^/\s*]+", origin):
            raise ValueError(f"--allow-origin is {origin!r}: expected a page's origin, such as https://example.org")
    check_address(options)  # before a large model is loaded

    from transformers.utils import logging

    logging.set_verbosity_error()
    from ..inference.loading import asked_decoder, decoding, load_pipeline
    from ..runtime.hosts import Hosts
    from ..serving.app import build_app
    from ..serving.gate import KEY_VARIABLE, Limits
    from ..serving.writer import ReportWriter

    pipe = load_pipeline(options.model, **placement(options))
    decoder = asked_decoder(pipe.model, pipe.processor, vars(options))
    beams = options.num_beams or pipe.model.generation_config.num_beams or 1
    asked = beams, options.max_new_tokens, options.batch_size, options.guidance_scale
    arguments = decoding(pipe.model, *asked, decoder)
    if decoder is None:
        arguments["candidates"] = 1
    else:
        arguments = {"max_new_tokens": arguments["max_new_tokens"], "consensus": decoder}
    writer = ReportWriter(pipe, arguments, options.batch_size)
    name = options.name or _name(options.model)
    limits = Limits(requests=options.queue, images=options.max_images)
    key = os.environ.get(KEY_VARIABLE) or None
    app = build_app(writer, name, Hosts(options.server_name), limits, key, options.allow_origin)
    try:
        _serve(app, options, name)
    finally:
        writer.close()


def _name(model: str) -> str:
    """The name of a model's folder or of the run that holds it, or its Hub id without a revision."""
    if not Path(model).is_dir():
        return model.partition("@")[0]
    folder = Path(model).resolve()
    # In the container, the model is /model, whose parent has no name.
    return (folder.parent.name if folder.name == "model" else "") or folder.name


def _serve(app, options: argparse.Namespace, name: str) -> None:
    import uvicorn

    # Requests in progress may end; the second Ctrl-C does not wait for them.
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=30)
    # It listens from here on, so that the line below is true.
    with socket.create_server((options.server_name, options.port)) as listening, terminations():
        host, port = listening.getsockname()[:2]
        print(f"http://{host}:{port}/v1 serves {name}\nPress Ctrl-C to stop.", flush=True)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            print()
