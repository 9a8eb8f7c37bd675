"""`otdrg prepare`: convert a source of studies to a dataset on disk."""

from __future__ import annotations

import argparse
import inspect
import types
import typing
from dataclasses import MISSING, Field, fields

from huggingface_hub.utils import validate_repo_id

from ..runtime.printable import show
from ..studies import SOURCES, open_source, source_class
from ..studies.build import BuildOptions, build_share, build_studies_dataset, merge_shares
from ..studies.publish import push_studies
from ..studies.shards import Share

DESCRIPTION = "Convert a source of studies to a dataset with splits that load_from_disk and load_dataset read."
EPILOG = "Example: otdrg prepare csv --table reports.csv --images images --output studies"


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Add a subcommand for each source; only the one in `arguments` is imported and gets its options."""
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", title="sources", required=True)
    for name, (_, _, summary) in SOURCES.items():
        is_typed = arguments[:1] == [name]
        cls = source_class(name) if is_typed else None
        source = sources.add_parser(
            name,
            help=summary,
            description=_description(cls, summary) if is_typed else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"Example: otdrg prepare {name} {cls.example or _required(cls)}" if is_typed else None,
        )
        if is_typed:
            _add_options(source.add_argument_group("options of the source"), cls)
            _add_options(source.add_argument_group("options of the build"), BuildOptions)
        output = source.add_argument_group("output")
        output.add_argument("--output", required=is_typed, metavar="DIR", help="Folder of the dataset.")
        output.add_argument("--resume", action="store_true", help="Continue an interrupted build.")
        output.add_argument(
            "--overwrite", action="store_true", help="Replace a dataset or, without --resume, an interrupted build."
        )
        tasks = output.add_mutually_exclusive_group()
        tasks.add_argument(
            "--shard",
            metavar="I/N",
            help="Prepare only share I of N of the files, from 1/N to N/N, as one task of a cluster. The same command "
            "continues an interrupted share.",
        )
        tasks.add_argument("--merge", action="store_true", help="Make the dataset of all shares prepared by --shard.")
        output.add_argument("--push-to-hub", metavar="ORG/NAME", help="Also upload the dataset as a private one.")
        output.add_argument("--public", action="store_true", help="Make the uploaded dataset public.")


def run(options: argparse.Namespace) -> None:
    """Build the dataset, print its counts, and upload it if requested."""
    given = vars(options)
    names = [option.name for option in fields(source_class(options.source))]
    source = open_source(options.source, **{name: given[name] for name in names})
    build = BuildOptions(**{option.name: given[option.name] for option in fields(BuildOptions)})
    if options.public and not options.push_to_hub:
        raise ValueError("--public is given without --push-to-hub: expected the name of a dataset on the Hub")
    if options.overwrite and (options.shard is not None or options.merge):
        raise ValueError(
            "--overwrite cannot be used with --shard or --merge: to start again, delete the dataset and "
            f"{options.output}.partial"
        )
    if options.push_to_hub and options.shard is not None:
        raise ValueError("--push-to-hub uploads a whole dataset: expected it with --merge, not with --shard")
    if options.push_to_hub:
        # Checked now, because the build may take hours.
        validate_repo_id(options.push_to_hub)
    if options.shard is not None:
        show(str(build_share(source, options.output, Share.parse(options.shard), build)))
        return
    if options.merge:
        report = merge_shares(source, options.output, build)
    else:
        report = build_studies_dataset(
            source, options.output, build, resume=options.resume, overwrite=options.overwrite
        )
    show(str(report))
    if options.push_to_hub:
        show(f"pushed: {push_studies(report.folder, options.push_to_hub, public=options.public)}")


def _add_options(group, cls: type) -> None:
    """Add the fields of a dataclass; `HfArgumentParser` would do so, but preparing studies needs no transformers."""
    hints = typing.get_type_hints(cls)
    for option in fields(cls):
        _add_option(group, option, hints[option.name])


def _add_option(group, option: Field, hint: typing.Any) -> None:
    default = option.default if option.default_factory is MISSING else option.default_factory()
    flag = f"--{option.name.replace('_', '-')}"
    if hint is bool:
        group.add_argument(flag, action="store_true", help=option.metadata["help"])
        return
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    settings: dict[str, typing.Any] = {"metavar": option.metadata["metavar"], "type": hint}
    if typing.get_origin(hint) is typing.Literal:
        settings = {"choices": typing.get_args(hint)}
    elif typing.get_origin(hint) is list:
        settings |= {"nargs": "+", "type": typing.get_args(hint)[0]}
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    suffix = "" if default in (None, "", [], MISSING) else f" (default: {shown})"
    group.add_argument(
        flag,
        required=default is MISSING,
        default=None if default is MISSING else default,
        help=(option.metadata["help"] + suffix).replace("%", "%%"),
        **settings,
    )


def _description(cls: type, summary: str) -> str:
    """What a source reads, and how: the docstring of its class describes files and columns."""
    return f"Make a dataset of studies from {summary}.\n\n{inspect.cleandoc(cls.__doc__ or '')}".strip()


def _required(cls: type) -> str:
    """Example options of a source that has no example: its required options."""
    required = [option for option in fields(cls) if option.default is option.default_factory is MISSING]
    options = (f"--{option.name.replace('_', '-')} {option.metadata['metavar'] or 'VALUE'}" for option in required)
    return " ".join([*options, "--output studies"])
