"""`otdrg push`: publish a trained model on the Hub, with its card, and its demo as a Space."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from ..runtime.output_lock import OutputLock
from ..runtime.printable import show
from ..runtime.vllm_server import serve_arguments
from .arguments import check_folder

DESCRIPTION = """\
Publish a trained model in one commit: weights (safetensors, LoRA merged), the code that loads them, processor,
generation configuration, a model card with the measured results, metrics and licence. transformers then loads it by its
id, without this package. Log in with `hf auth login` or HF_TOKEN.
"""
EPILOG = """\
Examples:
  otdrg push runs/quickstart org/otdrg --dry-run --output to_be_pushed
  otdrg push runs/quickstart org/otdrg --private --space org/otdrg-demo
  otdrg push runs/iu_xray_small org/otdrg --adapter --text-backbone HuggingFaceTB/SmolLM2-135M-Instruct
"""


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Add the arguments of the command. `arguments`, those on the command line, are not used."""
    parser.add_argument("source", metavar="RUN", help="folder of a run or of a model")
    parser.add_argument("repo", metavar="ORG/NAME", help="the repository, created if missing")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, created if missing (default: main)")
    parser.add_argument("--message", default="Upload model", help="commit message (default: %(default)s)")
    form = parser.add_argument_group("weights")
    kind = form.add_mutually_exclusive_group()
    kind.add_argument(
        "--adapter", action="store_true", help="only trained tensors; backbones are loaded from their own repositories"
    )
    kind.add_argument(
        "--merge",
        action="store_true",
        help="also the LLM as a plain causal LM (language_model) and the modules between the backbones "
        "(projector.safetensors), for engines that serve LLMs",
    )
    form.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the stored weights of a complete model (default: the model's); rounding changes scores slightly",
    )
    for part, gguf in (("vision", ""), ("text", "; for a GGUF file ORG/NAME/FILE.gguf")):
        form.add_argument(
            f"--{part}-backbone", metavar="ORG/NAME", help=f"Hub id of an adapter's {part} backbone{gguf}"
        )
    card = parser.add_argument_group("card")
    card.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="folder written by otdrg evaluate; repeatable (default: those in the run's folder)",
    )
    card.add_argument("--license", metavar="NAME", help="licence of the weights, as the Hub names it")
    parser.add_argument("--space", metavar="ORG/NAME", help="also push the demo, as a Space of this name")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes without pushing")
    parser.add_argument("--output", type=Path, metavar="DIR", help="also write the pushed files to this folder")


def run(options: argparse.Namespace) -> None:
    """Assemble the folder, list its files, and push it unless it is a dry run."""
    from huggingface_hub.utils import validate_repo_id

    for name in filter(None, (options.repo, options.space)):
        validate_repo_id(name)
        if "/" not in name:
            raise ValueError(f"{name} has no owner: expected ORG/NAME")
    if options.space and options.revision not in (None, "main"):
        raise ValueError(f"--space shows the branch main, not --revision {options.revision}: leave out one of them")
    given = {part: getattr(options, f"{part}_backbone") for part in ("vision", "text")}
    backbones = {part: reference for part, reference in given.items() if reference is not None}
    if backbones and not options.adapter:
        raise ValueError(f"--{next(iter(backbones))}-backbone without --adapter: expected both or neither")
    if options.dtype and options.adapter:
        raise ValueError("--dtype with --adapter: expected one of them, an adapter keeps the types of its tensors")
    if not Path(options.source).is_dir():
        raise ValueError(f"{options.source} is not a folder: expected the folder of a run or a model")
    if options.output is None:
        with tempfile.TemporaryDirectory() as folder:
            _push(options, Path(folder), backbones)
        return
    check_folder("--output", options.output)
    with OutputLock(options.output):
        if options.output.exists() and any(options.output.iterdir()):
            raise ValueError(f"--output {options.output} is not empty: expected a new folder")
        options.output.mkdir(exist_ok=True)
        _push(options, options.output, backbones)
        show(f"kept: {options.output}", file=sys.stderr)


def _push(options: argparse.Namespace, folder: Path, backbones: dict[str, str]) -> None:
    # Not at the top: importing torch and transformers takes seconds.
    from ..hub_card.push import assemble_adapter, assemble_full, pin_backbones, upload_model, upload_space
    from ..hub_card.space_files import space_files

    served = None
    if options.adapter:
        assemble_adapter(options.source, options.repo, folder, backbones, options.evaluation, options.license)
    else:
        served = assemble_full(
            options.source,
            options.repo,
            folder,
            options.evaluation,
            options.license,
            options.merge,
            options.dtype,
        )
    if options.adapter and not options.dry_run:
        pin_backbones(folder)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*")}
    _list(options.repo, {name: size for name, size in files.items() if (folder / name).is_file()})
    if options.space:
        contents = space_files(options.repo)
        sizes = {n: len(c) if isinstance(c, bytes) else Path(c).stat().st_size for n, c in contents.items()}
        _list(f"spaces/{options.space}", sizes)
    if options.dry_run:
        show("nothing was pushed (--dry-run)" + "; the backbones on the Hub were not checked" * options.adapter)
    else:
        address = upload_model(folder, options.repo, options.private, options.revision, options.message)
        show(f"pushed: {address}")
        if options.space:
            show(f"pushed: {upload_space(options.repo, options.space, options.private)}")
            if options.private:
                show(f"to read {options.repo}, the Space needs a secret HF_TOKEN in its settings")

    if served is not None:
        place = "language_model" if options.output is None else folder / "language_model"
        show(f"its LLM for otdrg generate --engine vllm: vllm {shlex.join(serve_arguments(place, served))}")


def _list(repo: str, sizes: dict[str, int]) -> None:
    show(repo)
    for name, size in sorted(sizes.items()):
        show(f"  {size:>15,}  {name}")
    show(f"  {sum(sizes.values()):>15,}  bytes in {len(sizes)} files\n")
