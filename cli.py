"""The `otdrg` command. Training is `accelerate launch train_hf.py`."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command; errors of the user's end in one line and exit status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser(arguments)
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    try:
        options.run(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"otdrg {options.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"otdrg {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


#: Commands that live in rooms of their own, and what they do. A room is entered when its command is typed.
_ROOMS = {
    "prepare": ("studies.command", "make a dataset of studies from radiographs and reports"),
    "label": ("labelers.command", "read the states of 14 findings out of reports"),
    "score": ("metrics.command", "score the reports of any system, and test two systems against each other"),
    "evaluate": ("training.evaluation_command", "score a model's reports beside baselines and controls"),
    "localise": ("training.localisation_command", "judge a model's heatmaps on phantoms, beside chance"),
    "embed": ("training.embedding_command", "picture image features before and after alignment, by finding"),
    "ablate": ("training.ablation_command", "train the paper's ablations of a recipe and table them"),
    "demo": ("hub_card.demo_command", "try a model in a browser on this machine"),
}


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="otdrg",
        description="Radiology report generation from chest radiographs.",
        epilog="Training: accelerate launch train_hf.py recipes/phantom_tiny.yaml",
    )
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    for name, (module, summary) in _ROOMS.items():
        room = import_module(f".{module}", __package__) if arguments[:1] == [name] else None
        told = {"description": room.DESCRIPTION, "epilog": room.EPILOG} if room else {}
        subparser = commands.add_parser(name, help=summary, **told)
        if room:
            room.add_arguments(subparser, arguments[1:])
            subparser.set_defaults(run=room.run)
    generate = commands.add_parser(
        "generate",
        help="write the reports of studies",
        description="Write the report of each study, with the state of the 14 findings the model saw in it.",
        epilog="Example: otdrg generate runs/quickstart --study frontal.png lateral.png --findings edema=positive",
    )
    generate.add_argument("model", help="folder of a run or a model, or a Hub id")
    generate.add_argument(
        "--study", nargs="+", action="append", required=True, metavar="VIEW", help="the views of one study; repeatable"
    )
    generate.add_argument(
        "--findings", nargs="+", default=[], metavar="FINDING=STATE", help="states to write the report from"
    )
    generate.add_argument("--indication", help="why the studies were made")
    generate.add_argument("--heatmap", type=Path, metavar="DIR", help="folder for a picture of each transport plan")
    generate.add_argument("--json", action="store_true", help="one JSON object a study instead of text")
    generate.add_argument("--num-beams", type=int, default=3, help="beams; 1 is greedy search (default: 3)")
    generate.add_argument("--max-new-tokens", type=int, default=120, help="most tokens of a report (default: 120)")
    generate.add_argument("--batch-size", type=int, default=1, help="studies that are read at once (default: 1)")
    generate.set_defaults(run=_generate)
    return parser


def _generate(options: argparse.Namespace) -> None:
    from .findings_otdrg import parse_findings
    from .processing_otdrg import read_view

    findings = {}
    for pair in options.findings:
        name, separator, state = pair.partition("=")
        if not separator:
            raise ValueError(f"--findings {pair}: expected FINDING=STATE, such as edema=positive")
        parse_findings({name: state})
        findings[name] = state
    for view in {view for study in options.study for view in study}:
        read_view(view)  # A wrong file is better told of before a large model is loaded than after.
    pipe = load_pipeline(options.model)
    records = pipe(
        options.study,
        batch_size=options.batch_size,
        findings=findings or None,
        indication=options.indication,
        return_heatmaps=options.heatmap is not None,
        num_beams=options.num_beams,
        max_new_tokens=options.max_new_tokens,
    )
    for position, (study, (record, *_)) in enumerate(zip(options.study, records, strict=True)):
        heatmaps = record.pop("heatmaps", None)
        if heatmaps is not None:
            record["heatmap"] = str(_draw(options.heatmap, position, study, heatmaps, record["findings"], pipe))
        if options.json:
            print(json.dumps({"study": study, **record}, ensure_ascii=False))
        else:
            _print_record(study, record)


def load_pipeline(model: str):
    """The `image-to-text` pipeline of a run's folder, a model's folder or a Hub id.

    Raises:
        ValueError: it is a folder without a model.
    """
    from .pipeline_otdrg import ReportGenerationPipeline
    from .training.published import load_published

    network, processor = load_published(model)
    return ReportGenerationPipeline(model=network, processor=processor, task="image-to-text")


def _draw(folder: Path, position: int, study: list[str], heatmaps, findings, pipe) -> Path:
    from .heatmaps import draw_heatmaps
    from .processing_otdrg import read_view

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{position + 1:04d}_{Path(study[0]).stem}.png"
    draw_heatmaps([read_view(view, pipe.processor.max_image_pixels) for view in study], heatmaps, findings, path)
    return path


def _print_record(study: list[str], record: dict) -> None:
    from .findings_otdrg import FINDING_DISPLAY_NAMES

    print(f"{' + '.join(study)}\n")
    print(f"  {record['generated_text'] or '(the model wrote nothing)'}\n")
    for name, finding in record["findings"].items():
        print(f"  {FINDING_DISPLAY_NAMES[name]:<27} {finding['state']:<12} {finding['probability']:.2f}")
    if "heatmap" in record:
        print(f"\n  heatmap: {record['heatmap']}")
    print()


if __name__ == "__main__":
    sys.exit(main())
