"""`otdrg push`: a trained model on the Hub, with its card, and its demo as a Space."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from ..runtime.output_lock import OutputLock
from ..runtime.printable import show

DESCRIPTION = """\
Publish a trained model: weights (safetensors, LoRA merged), the code that loads them, processor, generation
configuration, a model card with what was measured, metrics and licence, in one commit. transformers then loads it by
its name, with nothing of ours installed. You are whom `hf auth login` or HF_TOKEN says.
"""
EPILOG = """\
Examples:
  otdrg push runs/quickstart org/otdrg --dry-run --output to_be_pushed
  otdrg push runs/quickstart org/otdrg --private --space org/otdrg-demo
  otdrg push runs/iu_xray_small org/otdrg --adapter --text-backbone HuggingFaceTB/SmolLM2-135M-Instruct
"""


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """The command's arguments; `arguments`, what was typed, does not change them."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="RUN", help="folder of a run or of a model")
    parser.add_argument("repo", metavar="ORG/NAME", help="the repository, made where it is not there")
    parser.add_argument("--private", action="store_true", help="a new repository is seen by its owners only")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made where it is not there (default: main)")
    parser.add_argument("--message", default="Upload model", help="of the commit (default: %(default)s)")
    form = parser.add_argument_group("weights")
    kind = form.add_mutually_exclusive_group()
    kind.add_argument(
        "--adapter", action="store_true", help="what was trained only; the backbones are loaded from where they are"
    )
    kind.add_argument(
        "--merge",
        action="store_true",
        help="beside the whole model the LLM as a plain one (language_model) and what lies between the backbones "
        "(projector.safetensors), for engines that serve LLMs",
    )
    for part, of_gguf in (("vision", ""), ("text", "; of a GGUF file ORG/NAME/FILE.gguf")):
        form.add_argument(
            f"--{part}-backbone", metavar="ORG/NAME", help=f"where an adapter's {part} backbone is on the Hub{of_gguf}"
        )
    card = parser.add_argument_group("card")
    card.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="folder that otdrg evaluate wrote; repeatable (default: those in the run's folder)",
    )
    card.add_argument("--license", metavar="NAME", help="of the weights, by the Hub's names")
    parser.add_argument("--space", metavar="ORG/NAME", help="push the demo, too, as a Space of this name")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, and push nothing")
    parser.add_argument("--output", type=Path, metavar="DIR", help="keep what is pushed in this folder, too")


def run(options: argparse.Namespace) -> None:
    """Put the folder together, list it, and push it unless it is a dry run."""
    from huggingface_hub.utils import validate_repo_id

    for name in filter(None, (options.repo, options.space)):
        validate_repo_id(name)
        if "/" not in name:
            raise ValueError(f"{name} has no owner: expected ORG/NAME, which the card and the Space refer to")
    if options.space and options.revision not in (None, "main"):
        raise ValueError(f"--space shows what is on main, not on --revision {options.revision}: leave out one of them")
    given = {part: getattr(options, f"{part}_backbone") for part in ("vision", "text")}
    backbones = {part: reference for part, reference in given.items() if reference is not None}
    if backbones and not options.adapter:
        raise ValueError(f"--{next(iter(backbones))}-backbone is given without --adapter, which alone refers to it")
    if not Path(options.source).is_dir():
        raise ValueError(f"{options.source} is no folder: expected one of a run or a model")
    if options.output is None:
        with tempfile.TemporaryDirectory() as folder:
            _push(options, Path(folder), backbones)
        return
    with OutputLock(options.output):
        if options.output.exists() and any(options.output.iterdir()):
            raise ValueError(f"--output {options.output} is not empty: expected a new folder")
        options.output.mkdir(exist_ok=True)
        _push(options, options.output, backbones)
        show(f"kept: {options.output}", file=sys.stderr)


def _push(options: argparse.Namespace, folder: Path, backbones: dict[str, str]) -> None:
    # Not at the top, because torch and transformers take seconds to import.
    from ..hub_card.push import assemble_adapter, assemble_full, pin_backbones, upload_model, upload_space
    from ..hub_card.space_files import space_files

    if options.adapter:
        assemble_adapter(options.source, options.repo, folder, backbones, options.evaluation, options.license)
    else:
        assemble_full(options.source, options.repo, folder, options.evaluation, options.license, options.merge)
    if options.adapter and not options.dry_run:
        pin_backbones(folder)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*")}
    _list(options.repo, {name: size for name, size in files.items() if (folder / name).is_file()})
    if options.space:
        contents = space_files(options.repo)
        sizes = {n: len(c) if isinstance(c, bytes) else Path(c).stat().st_size for n, c in contents.items()}
        _list(f"spaces/{options.space}", sizes)
    if options.dry_run:
        unchecked = " whether the backbones on the Hub are those of the adapter was not checked" * options.adapter
        show(f"nothing was pushed (--dry-run){';' if unchecked else ''}{unchecked}")
    else:
        address = upload_model(folder, options.repo, options.private, options.revision, options.message)
        show(f"pushed: {address}")
        if options.space:
            show(f"pushed: {upload_space(options.repo, options.space, options.private)}")
            if options.private:
                show(f"the Space reads {options.repo} once its settings have a secret HF_TOKEN that may")


def _list(repo: str, sizes: dict[str, int]) -> None:
    show(repo)
    for name, size in sorted(sizes.items()):
        show(f"  {size:>15,}  {name}")
    show(f"  {sum(sizes.values()):>15,}  bytes in {len(sizes)} files\n")


__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]
