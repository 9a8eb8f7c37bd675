"""The content of a run's folder and its evaluations, reduced to what may be published.

All published files are read here. Reading reduces paths to file names and leaves out reports of the dataset, which some
licences do not allow to be passed on.
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
from ..runtime.run_record import read_results, read_sittings
from ..runtime.yaml_files import read_yaml

EVALUATION = "evaluation.json"
#: Value of `dataset` in an evaluation on the studies of the run's own recipe.
OWN_DATASET = "the model's own recipe"

#: Keys of evaluations that hold reports of the dataset.
_REPORTS = ("constants", "constant")
#: An absolute path within a text: from the root, a drive or a home folder. The path of a URL follows "://".
_PATH = re.compile(r"""(?:(?<=[\s=('"`\[,])|^)(?:file://)?(?:~|[A-Za-z]:|\\)?[/\\][^\s'"`,;)\]]+""")
_WHOLE_PATH = re.compile(r"([\w.\-]+=)?((?:file://)?(?:~|[A-Za-z]:|\\)?[/\\].*)", re.DOTALL)


@dataclass
class RunFiles:
    """The files of a model, without paths and reports.

    Args:
        name: name of the run's or the model's folder.
        config: the model's `config.json`.
        recipe: the resolved recipe; None for a model without a run.
        sittings: of `run.json`, in order; empty without it.
        results: of `results.json`, by stage; empty without it.
        evaluations: contents of the `evaluation.json` files, then the report stage's own evaluation in the same form.
        folder: folder of recipe, `run.json` and `results.json`.
        model: name of the model's folder.
    """

    name: str
    config: dict[str, Any]
    recipe: dict[str, Any] | None
    sittings: list[dict[str, Any]]
    results: dict[str, Any]
    folder: Path
    model: str
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def metrics(self) -> dict[str, Any]:
        """The content of `metrics.json`: all measured values, and the recipe and runs they come from."""
        return {name: getattr(self, name) for name in ("recipe", "sittings", "results", "evaluations")}

    @property
    def recipe_text(self) -> str | None:
        """The resolved recipe as YAML; None for a model without a run."""
        return None if self.recipe is None else yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True)


def read_run(run: Path, evaluations: Sequence[Path] = ()) -> RunFiles:
    """Read the files of a run or of a model, without paths and reports.

    Args:
        run: folder of a run or a model; for a run's folder `model` or `adapter`, the run's files are read.
        evaluations: folders or files written by `otdrg evaluate`; by default `evaluation-SPLIT` in the folder of the
            run or the model.

    Raises:
        ValueError: there is no model, a file has the wrong content, or two evaluations are the same by [`identity`].
        OSError: an evaluation does not exist.
    """
    run = Path(run).absolute()
    model = published_folder(run)
    config = _read(model / "config.json")
    if config.get("model_type") != OTDRGConfig.model_type:
        raise ValueError(f"{model / 'config.json'}: model_type is {config.get('model_type')!r}, expected 'otdrg'")
    if model.name in ("model", "adapter", "reward") and (model.parent / "recipe.yaml").is_file():
        run = model.parent
    paths = [_evaluation_file(Path(path)) for path in evaluations]
    if not paths:
        paths = [
            path for folder in dict.fromkeys((run, model)) for path in sorted(folder.glob(f"evaluation-*/{EVALUATION}"))
        ]
    recipe = _read(run / "recipe.yaml")
    # A published model states what is known of its run.
    kept = {} if recipe else _read(model / "metrics.json")
    known = [str(run), str(Path.cwd()), str(Path.home()), *(str(path.absolute().parent) for path in paths)]
    known += [text for text in _texts(recipe) if _WHOLE_PATH.fullmatch(text)]
    roots = sorted({root for root in known if len(root) > 1}, key=len, reverse=True)

    def published(path: Path, content: Any) -> Any:
        return interpret(path, _published, content, roots)

    kept = published(model / "metrics.json", kept)
    files = RunFiles(
        name=run.name,
        config=published(model / "config.json", config),
        recipe=published(run / "recipe.yaml", recipe) or kept.get("recipe"),
        sittings=published(run / "run.json", read_sittings(run / "run.json")) or kept.get("sittings", []),
        results=published(run / "results.json", read_results(run)) or kept.get("results", {}),
        folder=run,
        model=model.name,
    )
    found: dict[tuple, Path] = {}
    for path in dict.fromkeys(path.resolve() for path in paths):
        evaluation = published(path, _read_evaluation(path))
        same = found.setdefault(interpret(path, identity, evaluation), path)
        if same != path:
            raise ValueError(f"{same} and {path}: same dataset, split, protocol, decoding and labeler, expected one")
        files.evaluations.append(evaluation)
    # `otdrg evaluate` on the same studies also computes intervals: its result replaces the stage's.
    if "evaluations" in kept:
        source, stated = model / "metrics.json", kept["evaluations"]
    else:
        source, own = run / "results.json", interpret(run / "results.json", own_evaluation, files)
        stated = [] if own is None else [own]
    files.evaluations += [one for one in stated if interpret(source, identity, one) not in found]
    return files


def identity(evaluation: dict[str, Any]) -> tuple:
    """The key of an evaluation in a card: dataset, split, studies, decoding, scoring."""
    generation = evaluation["generation"]
    names = ("dataset", "split", "studies", "protocol", "tokenizer", "reference_tokens", "cleaning", "labeler")
    decoding = (generation.get(name) for name in ("num_beams", "max_new_tokens", "guidance_scale", "indication"))
    consensus = [generation.get(name) for name in ("consensus", "bank")]
    options = json.dumps([evaluation.get("labeler_options") or {}, consensus], sort_keys=True)
    return (*(evaluation.get(name) for name in names), *decoding, options)


def own_evaluation(files: RunFiles) -> dict[str, Any] | None:
    """The evaluation of the stage `reward`, else of the report stage, in the form of `evaluation.json`."""
    stage = "reward" if files.model == "reward" else "report"
    found = files.results.get(stage, {}).get("evaluation")
    if found is None:
        return None
    found = dict(found)
    recipe = files.recipe or {}
    report = recipe.get("report", {})
    names = ("num_beams", "max_new_tokens", "guidance_scale")
    generation = {name: report.get("generation", {}).get(name) for name in names}
    generation |= found.pop("generation", {})
    reader = recipe.get("model", {}).get("overrides", {}).get("indication_reader", "report")
    return {
        "dataset": OWN_DATASET,
        "zero_shot": False,
        "training_from": "split train of the dataset",
        "cleaning": recipe.get("studies", {}).get("cleaning"),
        "protocol": "full",
        "generation": {**generation, "indication": report.get("indication", False) or reader != "report"},
        **found,
    }


# --- reading ---------------------------------------------------------------------------------------------------------


def _evaluation_file(path: Path) -> Path:
    file = path / EVALUATION if path.is_dir() else path
    if not file.is_file():
        raise OSError(
            f"evaluation {path} does not exist: expected a folder written by otdrg evaluate, or its {EVALUATION}"
        )
    return file


def _read_evaluation(path: Path) -> dict[str, Any]:
    found = _read(path)
    missing = [name for name in ("split", "studies", "labeler", "rows", "protocol", "generation") if name not in found]
    if missing or "model" not in found["rows"]:
        raise ValueError(
            f"{path} was not written by otdrg evaluate: {missing[0] if missing else 'rows.model'} is missing"
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    """A YAML or JSON file; empty where there is none."""
    if not path.is_file():
        return {}
    content = read_yaml(path) if path.suffix == ".yaml" else read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mapping: expected a file written by a run")
    return content


# --- redaction ---------------------------------------------------------------------------------------------------


def _published(content: Any, roots: Sequence[str]) -> Any:
    if isinstance(content, dict):
        # Warnings state counts, then the ids of studies.
        content = {name: _counts(value) if name == "warnings" else value for name, value in content.items()}
        return {
            name: _published(value, roots)
            for name, value in content.items()
            if name not in _REPORTS or not _holds_text(value)
        }
    if isinstance(content, list):
        return [_published(value, roots) for value in content]
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
        # The path of a file in a known folder, which may hold spaces, is reduced to its last name.
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
