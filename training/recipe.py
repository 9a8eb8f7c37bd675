"""Recipes: a training run as a YAML file, checked field by field, with overrides from the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..runtime.yaml_files import parse_yaml, read_yaml
from .arguments import StageArguments
from .fields import LARGEST, Bounds, Section, build, describe_fields, need, option, typed, unknown_key
from .stages import DEFAULT_STAGES, STAGES, stage_of


@dataclass
class StudiesRecipe(Section):
    """Which studies are trained on."""

    place = "studies"
    bounds: ClassVar[dict[str, Bounds]] = {"shuffle_buffer": {"least": 1}}

    source: str = field(metadata={"help": "A source of `otdrg.studies.load_studies`: prepared, phantom, r2gen..."})
    options: dict[str, Any] = option({}, "The source's own options, such as annotation and images.")
    cleaning: Literal["none", "r2gen_iu", "r2gen_mimic"] = option(
        "none", "How reports are cleaned before they are learned and scored; R2Gen's cleaners, or not at all."
    )
    sections: Literal["findings", "impression", "findings+impression"] = option(
        "findings",
        "Sections that make up the report; both are below headings, and the model returns them apart. Always findings "
        "for source prepared, whose reports are made.",
    )
    streaming: bool = option(False, "Read training studies from the shards of source prepared as they are needed.")
    shuffle_buffer: int = option(256, "Streamed studies among which the next one is drawn.")
    limit: dict[str, int] = option(
        {}, "Maximum number of studies of a split, from its start: {train: 200, validation: 50}."
    )

    def __post_init__(self):
        super().__post_init__()
        self.expect(not self.streaming or self.source == "prepared", "source", "prepared, to be streamed")
        self.expect(not self.streaming or set(self.options) == {"folder"}, "options", "folder, and no other")
        made = "findings for source prepared: its reports were made by otdrg prepare --sections"
        self.expect(self.sections == "findings" or self.source != "prepared", "sections", made)
        for split, count in self.limit.items():
            need(split in ("train", "validation", "test"), "studies.limit", split, "train, validation or test")
            need(0 < count <= LARGEST, f"studies.limit.{split}", count, "a positive number of studies")

    @property
    def hub_dataset(self) -> str | None:
        """Id of the dataset on the Hub that the studies are read from; None for other sources and folders."""
        name = self.options.get("dataset") if self.source == "hub" else None
        return None if name is None or os.path.isdir(name) else name


@dataclass
class LabelsRecipe(Section):
    """Where finding states come from: the CSV for the studies it names, else the labeler, else the studies' own."""

    place = "labels"

    csv: str | None = option(None, "CSV of states in chexpert-labeler's form, joined to the studies by id.")
    labeler: str | None = option(None, "A labeler of `otdrg.labelers.load_labeler` that reads the reports: rules.")
    options: dict[str, Any] = option({}, "The labeler's own options.")


@dataclass
class ModelRecipe(Section):
    """What the first stage starts from. Later stages read the folder of the stage before."""

    place = "model"
    bounds: ClassVar[dict[str, Bounds]] = {"vocab_size": {"least": 270}}

    preset: str = option("tiny", "An OTDRGConfig preset: tiny (from scratch), small or paper (pretrained backbones).")
    vision: str | None = option(None, "Vision backbone, a Hub id, folder or timm name; the preset's without it.")
    text: str | None = option(
        None,
        "LLM, a Hub id, folder or GGUF file, or scratch: the preset's text_config with random weights, beside a "
        "pretrained vision encoder or none; the preset's LLM without it.",
    )
    label_text_encoder: str | None = option(
        None, "Text encoder of the label features, a Hub id or folder, in place of the LLM's own embeddings."
    )
    overrides: dict[str, Any] = option({}, "OTDRGConfig fields that differ from the preset's.")
    tokenizer: Literal["bpe", "words"] = option(
        "bpe",
        "Tokenizer that is trained on the reports when there is no pretrained LLM: bytes merged to vocab_size tokens, "
        "or the words that occur at least twice, for cleaned reports.",
    )
    vocab_size: int = option(512, "Size of that tokenizer if it is bpe.")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "Type of frozen backbone weights and of the published model; trained weights are kept in float32."
    )
    quantization: Literal["4bit", "8bit"] | dict[str, Any] | None = option(
        None,
        "Hold the LLM's frozen weights in 4 or 8 bits (bitsandbytes) while the report stage trains LoRA on them: "
        "4bit, 8bit, or fields of BitsAndBytesConfig.",
    )


@dataclass
class Recipe(Section):
    """A training run. The section of a stage is an attribute by the stage's name: `recipe.report`."""

    bounds: ClassVar[dict[str, Bounds]] = {
        "seed": {"least": 0, "most": 2**32 - 1},
        "cpu_threads": {"least": 1, "most": 1024},
    }

    output_dir: str = field(metadata={"help": "Folder of the run: a folder for each stage, and the published model."})
    studies: StudiesRecipe = field(metadata={"help": "Which studies are trained on."})
    seed: int = option(42, "Seed of weights, batches and controls.")
    cpu_threads: int | None = option(
        None, "Threads of each process on CPU; without it the cores are divided among the processes."
    )
    feature_cache: str | None = option(
        None, "Folder of frozen encoders' features, which runs may share; features in output_dir without it."
    )
    report_to: list[str] = option(
        [], "Where log lines also go besides the run's folder, by transformers' names: tensorboard, trackio."
    )
    stages: list[str] = option(
        list(DEFAULT_STAGES), f"Stages to run, of {', '.join(STAGES)}; each starts from the folder of the one before."
    )
    labels: LabelsRecipe = field(default_factory=LabelsRecipe, metadata={"help": "Where finding states come from."})
    model: ModelRecipe = field(default_factory=ModelRecipe, metadata={"help": "What the first stage starts from."})
    sections: dict[str, StageArguments] = option({}, "The section of each stage, by its name.")

    def __post_init__(self):
        super().__post_init__()
        for name in STAGES:
            self.sections.setdefault(name, stage_of(name).arguments())
        for name in ("output_dir", "feature_cache"):
            value = getattr(self, name)
            self.expect(value is None or (value.strip() != "" and "\0" not in value), name, "the path of a folder")
            self.expect(value is None or not os.path.isfile(value), name, "a folder, and this is a file")
        self.expect(bool(self.stages), "stages", f"some of {', '.join(STAGES)}")
        for stage in self.stages:
            need(stage in STAGES, "stages", stage, f"one of {', '.join(STAGES)}")
        in_order = [stage for stage in STAGES if stage in self.stages]
        self.expect(self.stages == in_order, "stages", f"each once and in this order: {', '.join(STAGES)}")

    def __getattr__(self, name: str) -> StageArguments:
        sections = self.__dict__.get("sections", {})
        if name not in sections:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return sections[name]

    @property
    def features_folder(self) -> Path:
        """Where features of frozen encoders are kept."""
        return Path(self.feature_cache or os.path.join(self.output_dir, "features"))

    @property
    def gives_indication(self) -> bool:
        """Whether the model reads the studies' indications: the LLM, or the label predictor."""
        return self.report.indication or self.model.overrides.get("indication_reader", "report") != "report"

    @property
    def prompts_indication(self) -> bool:
        """Whether the LLM's prompt has the studies' indications."""
        return self.gives_indication and self.model.overrides.get("indication_reader") != "predictor"

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a dictionary that [`load_recipe`] reads back.

        Of `TrainingArguments`' fields it has those with a default of ours and those that were changed, so that another
        version of transformers, with other fields or defaults, still reads it.
        """
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "sections"}
        plain = {name: asdict(value) if isinstance(value, Section) else value for name, value in values.items()}
        return {**plain, **{name: section.written() for name, section in self.sections.items()}}

    def to_yaml(self) -> str:
        """[`to_dict`] as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    `${NAME}` in a string stands for an environment variable, `${NAME:-other}` for it or, where it is unset, `other`.
    A variable of a field that an override replaces is not read.

    Args:
        path: YAML file.
        overrides: `section.field=value`, the value in YAML: `report.max_steps=20`, `stages=[report]`. Another
            `studies.source` drops the `studies.options` of the file, which belong to its own source.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key (with the nearest allowed one), a value of the wrong type or out of range,
            or an environment variable that is not set.
    """
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"recipe {path} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"recipe {path} is not a YAML text file") from None
    except ValueError as error:
        raise ValueError(f"recipe {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} is not a mapping: expected keys such as output_dir, studies, report")
    try:
        # The source comes first, because another one drops the options of the file's.
        for override in sorted(overrides, key=lambda text: not text.startswith("studies.source=")):
            _apply(override, values)
        return recipe_from(_expand(values, ()))
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from None


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """A recipe from a mapping as YAML has it; errors as of [`load_recipe`]."""
    own = {name: value for name, value in values.items() if name not in STAGES}
    if "sections" in own:
        raise unknown_key("sections", "", STAGES, {})
    known = {item.name for item in fields(Recipe)} | set(STAGES)
    for key in own:
        if key not in known:
            raise unknown_key(str(key), "", known, {})
    sections = {name: _section(name, values.get(name)) for name in STAGES}
    recipe = build(Recipe, own)
    recipe.sections.update(sections)
    return recipe


def _section(name: str, values: Any) -> StageArguments:
    """The section of a stage; its fields are those of its dataclass."""
    arguments = stage_of(name).arguments
    values = {} if values is None else values
    arguments.check_given(values)
    (section,) = _parser(arguments).parse_dict(typed(arguments, values, (name,)))
    return section


@lru_cache
def _parser(arguments: type[StageArguments]) -> HfArgumentParser:
    return HfArgumentParser(arguments)


def fields_text() -> str:
    """Every field of a recipe that OTDRG adds, with its default and its help, by section."""
    stages = ", ".join(STAGES)
    lines = [
        "Every field that OTDRG adds to a recipe, with its default. The section of a stage also takes every field of",
        "transformers' TrainingArguments by its own name, such as report.gradient_accumulation_steps, except for those",
        "that the run sets itself.",
        *describe_fields(Recipe, "", without=("sections",)),
        *("", f"The following fields belong to every stage: STAGE is one of {stages}."),
        *describe_fields(StageArguments, "STAGE", TrainingArguments),
    ]
    for name in STAGES:
        lines += describe_fields(stage_of(name).arguments, name, StageArguments)
    return "\n".join(lines)


def find_run(model: str | os.PathLike) -> Path | None:
    """The folder of a model's run, which has a `recipe.yaml`: the model's folder or the one above; else None."""
    folder = Path(model).absolute()
    return next((run for run in (folder, folder.parent) if folder.is_dir() and (run / "recipe.yaml").is_file()), None)


def published_recipe(model: str) -> Recipe | None:
    """The recipe by which a model, given as in [`load_published`], was trained; None where there is none."""
    run = find_run(model)
    return None if run is None else load_recipe(run / "recipe.yaml")


_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}")


def _expand(value: Any, where: tuple[str, ...]) -> Any:
    """A value with environment variables in place of `${NAME}`; `where` has the names of its sections and its own."""
    if isinstance(value, dict):
        return {key: _expand(item, (*where, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, where) for item in value]
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match) -> str:
        name, default = match.groups()
        if os.environ.get(name):
            return os.environ[name]
        if default is None:
            raise ValueError(f"{'.'.join(where)}={value!r}: the environment variable {name} is not set")
        return default

    return _VARIABLE.sub(replacement, value)


def _apply(override: str, values: dict) -> None:
    """Set the field that an override names; changes `values`."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: expected section.field=value, such as report.max_steps=20")
    *parents, last = path = tuple(key.split("."))
    value = parse_yaml(text, f"override {override!r}")
    target = values
    for depth, parent in enumerate(parents):
        target[parent] = target = {} if target.get(parent) is None else target[parent]
        if not isinstance(target, dict):
            raise ValueError(f"override {override!r}: {'.'.join(path[: depth + 1])} is not a section")
    if path == ("studies", "source") and value != target.get("source"):
        target.pop("options", None)
    # A mapping is merged into a mapping that is there; any other value replaces what is there.
    if isinstance(value, dict) and isinstance(target.get(last), dict):
        target[last] = {**target[last], **value}
    else:
        target[last] = value


__all__ = [
    "LabelsRecipe",
    "ModelRecipe",
    "Recipe",
    "StudiesRecipe",
    "fields_text",
    "find_run",
    "load_recipe",
    "published_recipe",
    "recipe_from",
]
