"""`otdrg prepare`: a source of studies becomes a dataset on disk."""

from __future__ import annotations

import argparse
import types
import typing
from dataclasses import MISSING, Field, fields

from huggingface_hub.utils import validate_repo_id

from ..runtime.printable import show
from ..studies import SOURCES, open_source, source_class
from ..studies.build import BuildOptions, build_studies_dataset
from ..studies.publish import push_studies

DESCRIPTION = "Make a dataset of studies, in splits, that load_from_disk and load_dataset read, from a source."
EPILOG = "Example: otdrg prepare csv --table reports.csv --images images --output studies"

_EXAMPLES = {
    "phantom": "--train 2000 --views frontal lateral --output phantoms",
    "r2gen": "--annotation annotation.json --images images --output iu_xray",
    "open-i": "--reports NLMCXR_reports.tgz --images NLMCXR_png --output iu_xray",
    "mimic-cxr": "--root mimic-cxr --images mimic-cxr-jpg --shorter-side 512 --num-proc 8 --output mimic_cxr",
    "csv": "--table reports.csv --images images --output studies",
    "dicom": "--folder archive --output studies",
    "hub": "--dataset org/name --column findings=report --output studies",
}


def add_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """The command's arguments: a subcommand a source, with the source's options and those of the build.

    Args:
        parser: of the command.
        arguments: what was typed behind it. Only the source that is named there is imported and has options.
    """
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", title="sources", required=True)
    for name, (_, _, summary) in SOURCES.items():
        source = sources.add_parser(
            name,
            help=summary,
            description=f"Make a dataset of studies from {summary}.",
            epilog=f"Example: otdrg prepare {name} {_EXAMPLES[name]}",
        )
        if arguments[:1] != [name]:
            continue
        _add_options(source.add_argument_group(f"options of {name}"), source_class(name))
        build = source.add_argument_group("options of the build")
        build.add_argument("--output", required=True, metavar="DIR", help="Folder of the dataset.")
        _add_options(build, BuildOptions)
        build.add_argument("--resume", action="store_true", help="Go on with an interrupted build.")
        build.add_argument("--overwrite", action="store_true", help="Replace a dataset or an interrupted build.")
        build.add_argument("--push-to-hub", metavar="ORG/NAME", help="Upload the dataset as a private one, too.")
        build.add_argument("--public", action="store_true", help="Make the uploaded dataset public.")


def run(options: argparse.Namespace) -> None:
    """Build the dataset, print its table, and push it if asked to."""
    given = vars(options)
    names = [option.name for option in fields(source_class(options.source))]
    source = open_source(options.source, **{name: given[name] for name in names})
    build = BuildOptions(**{option.name: given[option.name] for option in fields(BuildOptions)})
    if options.public and not options.push_to_hub:
        raise ValueError("--public is given without --push-to-hub: expected the name of a dataset on the Hub")
    if options.push_to_hub:
        # Hours before it is used.
        validate_repo_id(options.push_to_hub)
    report = build_studies_dataset(source, options.output, build, resume=options.resume, overwrite=options.overwrite)
    show(str(report))
    if options.push_to_hub:
        show(f"pushed: {push_studies(report.folder, options.push_to_hub, public=options.public)}")


def _add_options(group: argparse._ArgumentGroup, cls: type) -> None:
    hints = typing.get_type_hints(cls)
    for option in fields(cls):
        _add_option(group, option, hints[option.name])


def _add_option(group: argparse._ArgumentGroup, option: Field, hint: typing.Any) -> None:
    """One argument of a field: its type, default and help are the field's."""
    default = option.default if option.default_factory is MISSING else option.default_factory()
    flag = f"--{option.name.replace('_', '-')}"
    if hint is bool:
        group.add_argument(flag, action="store_true", help=option.metadata["help"])
        return
    settings: dict[str, typing.Any] = {"metavar": option.metadata["metavar"]}
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        settings.update(choices=typing.get_args(hint), metavar=None)
    elif typing.get_origin(hint) is list:
        settings.update(nargs="+", type=typing.get_args(hint)[0])
    else:
        settings.update(type=hint)
    told = "" if default in (None, "", [], MISSING) else f" (default: {_shown(default)})"
    group.add_argument(
        flag,
        required=default is MISSING,
        default=None if default is MISSING else default,
        help=(option.metadata["help"] + told).replace("%", "%%"),
        **settings,
    )


def _shown(value: typing.Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]
