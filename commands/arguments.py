"""Arguments that several commands share, and their checks."""

from __future__ import annotations

import argparse
import errno
import os
import re
import socket
from pathlib import Path
from typing import Any

from ..labelers import LABELERS
from ..metrics.protocols import PROTOCOLS, R2GENGPT_TOKENS
from ..metrics.registry import metric_choices
from ..runtime.shared_work import launched_processes
from ..runtime.vllm_server import vllm_program

SPLITS = ("train", "validation", "test")
#: Types of weights that a model can be run with.
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("4bit", "8bit")
#: What can run the LLM.
ENGINES = ("transformers", "vllm")
#: Options that choose the device and the type of the weights.
PLACEMENT = ("device", "dtype", "quantization")


def add_device(parser, whose: str = "the model") -> None:
    """Where and in which type a model runs ([`check_device`] checks it)."""
    group = parser.add_argument_group(f"device of {whose}")
    group.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, mps ... (default: the accelerator if there is one; each of several processes its own)",
    )
    group.add_argument(
        "--dtype",
        metavar="TYPE",
        help=f"type of the weights: {', '.join(DTYPES)} (default: bfloat16 on an accelerator; on a CPU as saved)",
    )
    group.add_argument(
        "--quantization",
        metavar="KIND",
        help=f"quantize the LLM's linear layers by bitsandbytes: {' or '.join(QUANTIZATIONS)} (default: not)",
    )


def check_device(options: argparse.Namespace) -> None:
    """Raise a `ValueError` for an unknown type of weights."""
    for name, known in (("dtype", DTYPES), ("quantization", QUANTIZATIONS)):
        value = getattr(options, name)
        if value is not None and value not in known:
            raise ValueError(f"--{name} is {value!r}: expected one of {', '.join(known)}")


def placement(options: argparse.Namespace) -> dict[str, str | None]:
    """The arguments of [`load_published`] for the device."""
    return {name: getattr(options, name) for name in PLACEMENT}


def add_address(parser, port: int) -> None:
    """Where a server listens ([`check_address`] checks it); `port` is the default."""
    parser.add_argument(
        "--server-name",
        default="127.0.0.1",
        metavar="NAME",
        help="address to listen on (default: 127.0.0.1, this machine only; 0.0.0.0: all its addresses)",
    )
    parser.add_argument("--port", type=int, default=port, metavar="N", help=f"port to listen on (default: {port})")


def check_address(options: argparse.Namespace) -> None:
    """Raise an error if a server cannot listen on the address."""
    server_name, port = options.server_name, options.port
    if not 1 <= port <= 65535:
        raise ValueError(f"--port is {port}: expected 1 to 65535")
    try:
        socket.getaddrinfo(server_name, port, socket.AF_INET)
        socket.create_server((server_name, port)).close()
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(f"--server-name {server_name!r} is not an IPv4 address: expected this machine's") from error
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise OSError(f"--server-name {server_name!r} is not an address of this machine") from error
        raise OSError(f"--port {port} cannot be used ({os.strerror(error.errno)}): expected a free one") from error


def add_engine(parser) -> None:
    """What runs the LLM ([`check_engine`] checks it)."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="what runs the LLM: transformers, or vLLM in an environment of its own, which is faster for many studies "
        "or candidates (default: transformers)",
    )
    parser.add_argument(
        "--engine-url",
        metavar="URL",
        help="vLLM server that runs the model's LLM (default: one is started with the program that OTDRG_VLLM names, "
        "or vllm on PATH)",
    )


def check_engine(options: argparse.Namespace) -> None:
    """Raise a `ValueError` for an engine that cannot do what is asked, or that is not there."""
    url = options.engine_url
    if options.engine != "vllm":
        if url is not None:
            raise ValueError("--engine-url needs --engine vllm: expected both or neither")
        return
    lacking = {"num_beams": "beam search", "guidance_scale": "state guidance"}
    for name, what in lacking.items():
        value = getattr(options, name)
        if value is not None and value != 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}: expected 1, --engine vllm has no {what}")
    if options.quantization is not None:
        raise ValueError("--quantization and --engine vllm were both given: expected one, vLLM holds the LLM's weights")
    if url is None:
        if launched_processes() > 1:
            raise ValueError("--engine vllm in several processes needs --engine-url, a server for all of them")
        vllm_program()
    elif not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
        raise ValueError(f"--engine-url is {url!r}: expected an address such as http://127.0.0.1:8000")


def add_resamples(parser, flag: str = "--resamples") -> None:
    """The number of bootstrap resamples."""
    allowed = ", 0 for no intervals" if flag == "--bootstrap" else ""
    parser.add_argument(
        flag, type=int, default=1000, metavar="N", help=f"bootstrap resamples for intervals{allowed} (default: 1000)"
    )


def add_metrics(parser, default: str, labeler: str | None) -> None:
    """Add metrics, the labeler with its options, and the protocol of true reports ([`reference_tokens`] reads it).

    `default` names the default metrics in the help, `labeler` is the default of `--labeler`.
    """
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=metric_choices(),
        metavar="METRIC",
        help=f"some of {', '.join(metric_choices())} (default: {default})",
    )
    parser.add_argument("--labeler", choices=LABELERS, default=labeler, help="reads finding states (default: rules)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="option of the labeler; repeatable"
    )
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, default="full", help="r2gengpt truncates the true reports (default: full)"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="tokenizer that truncates, for r2gengpt: Hub id or folder")
    parser.add_argument(
        "--reference-tokens",
        type=int,
        metavar="N",
        help="tokens of a true report, for r2gengpt (default: 60 for r2gen_iu, 100 for r2gen_mimic)",
    )


def reference_tokens(options: argparse.Namespace, cleaning: str) -> int | None:
    """The number of tokens to which the protocol cuts true reports, None for `full`; raises for wrong options."""
    if options.protocol == "full":
        for name in ("tokenizer", "reference_tokens"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs --protocol r2gengpt: expected both or neither")
        return None
    if options.tokenizer is None:
        raise ValueError("--protocol r2gengpt truncates by a tokenizer: expected --tokenizer, a Hub id or a folder")
    tokens = R2GENGPT_TOKENS.get(cleaning) if options.reference_tokens is None else options.reference_tokens
    if tokens is None:
        raise ValueError("--protocol r2gengpt: expected --reference-tokens, 60 for IU X-Ray or 100 for MIMIC-CXR")
    return tokens


def add_guidance(parser) -> None:
    """The scale of state guidance ([`check_guidance`] checks it)."""
    parser.add_argument(
        "--guidance-scale",
        type=float,
        metavar="S",
        help="2, for example, makes reports state more of the positive findings, at twice the cost (default: model's)",
    )


def add_consensus(parser) -> None:
    """Consensus decoding ([`check_consensus`] checks it)."""
    parser.add_argument(
        "--candidates",
        type=int,
        metavar="N",
        help="sample N reports and write the one that agrees most with likely reports and the states; 1 switches this "
        "off, 0 chooses among the reports of --bank (default: the model's, 32 with --bank)",
    )
    parser.add_argument(
        "--bank",
        metavar="FOLDER",
        help="report bank of otdrg bank: training reports that likely reports are taken from",
    )
    parser.add_argument(
        "--retrieved",
        action=argparse.BooleanOptionalAction,
        help="whether reports of --bank are candidates as well (default: yes)",
    )
    parser.add_argument(
        "--agreement-weight",
        type=float,
        metavar="L",
        help="subtracted from a candidate's score for each finding that disagrees with the states (default: 0.08)",
    )


def check_consensus(options: argparse.Namespace) -> None:
    """Raise a `ValueError` for options of consensus decoding that do not fit together."""
    check_least(options, candidates=0)
    if options.bank is None and (options.candidates == 0 or options.retrieved is not None):
        name = "--candidates 0" if options.candidates == 0 else "--retrieved"
        raise ValueError(f"{name} needs --bank: expected both")
    weight = options.agreement_weight
    if weight is not None and not 0 <= weight < float("inf"):
        raise ValueError(f"--agreement-weight is {weight:g}: expected a number of at least 0")
    if options.candidates == 1 and options.bank is not None:
        raise ValueError("--candidates 1 and --bank were both given: expected one, or more candidates")
    if options.candidates == 1 and weight is not None:
        raise ValueError("--candidates 1 and --agreement-weight were both given: expected one, or more candidates")
    given = {"candidates": options.candidates not in (None, 1), "bank": options.bank, "agreement_weight": weight}
    asked = [f"--{name.replace('_', '-')}" for name, value in given.items() if value not in (None, False)]
    for name in ("num_beams", "guidance_scale") if asked else ():
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} and {asked[0]} were both given: expected one of them")


def check_guidance(options: argparse.Namespace) -> None:
    """Raise a `ValueError` if the scale of state guidance is below 1 or not finite."""
    scale = options.guidance_scale
    if scale is not None and not 1 <= scale < float("inf"):
        raise ValueError(f"--guidance-scale is {scale:g}: expected a number of at least 1")


def check_folder(flag: str, folder: Path | None) -> None:
    """Raise a `ValueError` if an output folder is a file; None is allowed."""
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} {folder}: this is a file, expected a folder")


def check_least(options: argparse.Namespace, **least: int) -> None:
    """Raise a `ValueError` if an option is below its minimum; None is allowed."""
    for name, number in least.items():
        value: Any = getattr(options, name)
        if value is not None and value < number:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: expected {number} or more")
