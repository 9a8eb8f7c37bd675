"""What a run's folder and its evaluations say, as it may be shown to everyone.

Everything that is published of these files is read here, and what nobody outside should see is taken out on reading:
of paths only the last name is left, and reports of the dataset, which some licences do not let pass, are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from ..configuration_otdrg import OTDRGConfig
from ..files_otdrg import interpret, read_json
from ..inference.loading import published_folder
from ..runtime.yaml_files import read_yaml
from ..training.run_folder import read_results, read_sittings

EVALUATION = "evaluation.json"
#: What `dataset` says in an evaluation on the studies of the run's own recipe.
OWN_DATASET = "the model's own recipe"

#: Keys under which evaluations hold reports of the dataset.
_REPORTS = ("constants", "constant")
#: A path in a text: of this machine, from its root, a drive or a home. A URL's begins behind "://".
_PATH = re.compile(r"""(?:(?<=[\s=('"`\[,])|^)(?:file://)?(?:~|[A-Za-z]:|\\)?[/\\][^\s'"`,;)\]]+""")
_WHOLE_PATH = re.compile(r"([\w.\-]+=)?((?:file://)?(?:~|[A-Za-z]:|\\)?[/\\].*)", re.DOTALL)


@dataclass
class RunFiles:
    """What is known of a model.

    Args:
        name: of the run's folder, or the model's.
        config: the model's `config.json`.
        recipe: as resolved; None of a model without a run.
        sittings: of `run.json`, in order; empty without it.
        results: of `results.json`, by stage; empty without it.
        evaluations: of `evaluation.json` files, and behind them the report stage's own, in the same form.
        folder: where recipe, `run.json` and `results.json` are.
    """

    name: str
    config: dict[str, Any]
    recipe: dict[str, Any] | None = None
    sittings: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None


def read_run(run: Path, evaluations: Sequence[Path] = ()) -> RunFiles:
    """What lies in the folder of a run, or of a model, without paths and reports.

    Args:
        run: the folder; of a run's folder `model` or `adapter`, the run's files are read.
        evaluations: folders or files that `otdrg evaluate` wrote; without any, those that lie where it puts them of
            itself, `evaluation-SPLIT` in the folder of the run or the model.

    Raises:
        ValueError: no model, a file that is not what its name says, or two evaluations that nothing tells apart.
        OSError: an evaluation that does not exist.
    """
    run = Path(run).absolute()
    model = published_folder(run)
    config = _read(model / "config.json")
    if config.get("model_type") != OTDRGConfig.model_type:
        raise ValueError(f"{model / 'config.json'}: model_type is {config.get('model_type')!r}, expected 'otdrg'")
    if model.name in ("model", "adapter") and (model.parent / "recipe.yaml").is_file():
        run = model.parent
    paths = [_evaluation_file(Path(path)) for path in evaluations]
    if not paths:
        paths = [
            path for folder in dict.fromkeys((run, model)) for path in sorted(folder.glob(f"evaluation-*/{EVALUATION}"))
        ]
    recipe = _read(run / "recipe.yaml")
    known = [str(run), str(Path.cwd()), str(Path.home()), *(str(path.absolute().parent) for path in paths)]
    known += [text for text in _texts(recipe) if _WHOLE_PATH.fullmatch(text)]
    roots = sorted({root for root in known if len(root) > 1}, key=len, reverse=True)

    def shown(content: Any) -> Any:
        return _shown(content, roots)

    sittings, results = read_sittings(run / "run.json"), read_results(run)
    files = RunFiles(
        name=run.name,
        config=interpret(model / "config.json", shown, config),
        recipe=interpret(run / "recipe.yaml", shown, recipe) or None,
        sittings=interpret(run / "run.json", shown, sittings),
        results=interpret(run / "results.json", shown, results),
        folder=run,
    )
    found = {
        path: interpret(path, shown, _read_evaluation(path)) for path in dict.fromkeys(path.resolve() for path in paths)
    }
    told: dict[tuple, Path] = {}
    for path, evaluation in found.items():
        same = told.setdefault(interpret(path, identity, evaluation), path)
        if same != path:
            raise ValueError(f"{same} and {path}: nothing tells these evaluations apart, expected one of them")
    own = interpret(run / "results.json", own_evaluation, files)
    files.evaluations = list(found.values())
    # With one of the same by `otdrg evaluate`, which has intervals, there is nothing it would add.
    if own is not None and interpret(run / "results.json", identity, own) not in told:
        files.evaluations.append(own)
    return files


def published_metrics(run: Path, evaluations: Sequence[Path] = ()) -> dict[str, Any]:
    """All that was measured, and how it came about, ready for JSON, as it may be uploaded: `recipe`, `sittings` of
    run.json, `results` by stage, `evaluations`.

    Paths are names, and reports of the dataset are not among it. Arguments and errors as of [`read_run`].
    """
    files = read_run(run, evaluations)
    return {
        "recipe": files.recipe,
        "sittings": files.sittings,
        "results": files.results,
        "evaluations": files.evaluations,
    }


def published_recipe(files: RunFiles) -> str | None:
    """The resolved recipe as YAML, paths as names; None of a model without a run."""
    if files.recipe is None:
        return None
    return yaml.safe_dump(files.recipe, sort_keys=False, allow_unicode=True)


def identity(evaluation: dict[str, Any]) -> tuple:
    """What tells evaluations apart in a card: dataset, split, studies, how reports were generated and scored."""
    generation = evaluation["generation"]
    names = ("dataset", "split", "studies", "protocol", "tokenizer", "reference_tokens", "cleaning", "labeler")
    decoding = (generation.get(name) for name in ("num_beams", "max_new_tokens", "indication"))
    options = json.dumps(evaluation.get("labeler_options") or {}, sort_keys=True)
    return (*(evaluation.get(name) for name in names), *decoding, options)


def own_evaluation(files: RunFiles) -> dict[str, Any] | None:
    """The report stage's evaluation in the form of `otdrg evaluate`'s."""
    found = files.results.get("report", {}).get("evaluation")
    if found is None:
        return None
    recipe = files.recipe or {}
    report = recipe.get("report", {})
    generation = {name: report.get("generation", {}).get(name) for name in ("num_beams", "max_new_tokens")}
    return {
        "dataset": OWN_DATASET,
        "zero_shot": False,
        "training_from": "split train of the dataset",
        "cleaning": recipe.get("studies", {}).get("cleaning"),
        "protocol": "full",
        "generation": {**generation, "indication": report.get("indication", False)},
        **found,
    }


# --- reading ---------------------------------------------------------------------------------------------------------


def _evaluation_file(path: Path) -> Path:
    file = path / EVALUATION if path.is_dir() else path
    if not file.is_file():
        raise OSError(
            f"evaluation {path} does not exist: expected a folder that otdrg evaluate wrote, or its {EVALUATION}"
        )
    return file


def _read_evaluation(path: Path) -> dict[str, Any]:
    found = _read(path)
    missing = [name for name in ("split", "studies", "labeler", "rows", "protocol", "generation") if name not in found]
    if missing or "model" not in found["rows"]:
        lacks = missing[0] if missing else "the model's row"
        raise ValueError(f"{path} is not what otdrg evaluate writes: it lacks {lacks}")
    return found


def _read(path: Path) -> dict[str, Any]:
    """A YAML or JSON file; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        content = read_yaml(path) if path.suffix == ".yaml" else read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mapping: expected what a run writes")
    return content


# --- what is not shown -----------------------------------------------------------------------------------------------


def _shown(content: Any, roots: Sequence[str]) -> Any:
    if isinstance(content, dict):
        # Warnings name studies behind their counts.
        content = {name: _counts(value) if name == "warnings" else value for name, value in content.items()}
        return {
            name: _shown(value, roots)
            for name, value in content.items()
            if name not in _REPORTS or not _holds_text(value)
        }
    if isinstance(content, list):
        return [_shown(value, roots) for value in content]
    return _without_paths(content, roots) if isinstance(content, str) else content


def _holds_text(content: Any) -> bool:
    return isinstance(content, str) or (
        isinstance(content, dict) and all(isinstance(text, str) for text in content.values())
    )


def _counts(warnings: Iterable[str]) -> list[str]:
    return [warning.partition(";")[0] for warning in warnings]


def _without_paths(text: str, roots: Sequence[str]) -> str:
    whole = _WHOLE_PATH.fullmatch(text)
    if whole and "\n" not in text:
        return (whole[1] or "") + _name(whole[2])
    for root in roots:
        # With what lies in it: the name of the innermost file or folder is left.
        text = re.sub(rf"{re.escape(root)}(?![^\s/\\'\"`,;)\]])[^\s'\"`,;)\]]*", lambda found: _name(found[0]), text)
    return _PATH.sub(lambda found: _name(found[0]), text)


def _name(path: str) -> str:
    flavour = PureWindowsPath if "\\" in path else PurePosixPath
    return flavour(path).name or "/"


def _texts(content: Any) -> Iterable[str]:
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for value in content:
            yield from _texts(value)
    elif isinstance(content, str):
        yield content


__all__ = [
    "EVALUATION",
    "OWN_DATASET",
    "RunFiles",
    "identity",
    "own_evaluation",
    "published_metrics",
    "published_recipe",
    "read_run",
]
