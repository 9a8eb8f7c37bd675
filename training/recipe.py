"""Recipes: a training run as a YAML file, checked field by field, with overrides from the command line.

Long, because every option of training is declared, documented and checked here.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import types
import typing
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from ..runtime.yaml_files import parse_yaml, read_yaml
from .selection import SelectionExpression

#: Bound of integers whose field has none of its own: what counts steps, studies and tokens in 32 bits.
_MOST = 2**31 - 1


def _option(default: Any, help: str, **bounds: float):
    """A field; of a number `bounds` are some of `least`, `above`, `most` and `below`."""
    return field(default=default, metadata={"help": help, **bounds})


def _need(condition: bool, where: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{where}={value!r}: expected {expected}")


@dataclass
class Section:
    """A section of a recipe; its numbers are finite and within the bounds of their fields.

    Attributes:
        place: what the section is called in errors.
    """

    place: ClassVar[str] = ""

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                _need(_is_within(value, item.metadata), self._name(item.name), value, _bounds_text(value, item))

    def _name(self, field_name: str) -> str:
        return f"{self.place}.{field_name}" if self.place else field_name


def _is_within(value: float, bounds: typing.Mapping[str, float]) -> bool:
    return (
        (isinstance(value, int) or math.isfinite(value))
        and value >= bounds.get("least", -math.inf)
        and value > bounds.get("above", -math.inf)
        and value <= bounds.get("most", _MOST if isinstance(value, int) else math.inf)
        and value < bounds.get("below", math.inf)
    )


def _bounds_text(value: float, item: Field) -> str:
    """What a number of this field must be."""
    bounds = item.metadata
    least, above, below = (bounds.get(name) for name in ("least", "above", "below"))
    most = bounds.get("most", _MOST if isinstance(value, int) and value > _MOST else None)
    optional = ", or null" if item.default is None else ""
    if isinstance(value, int) and least == 1:
        return "a positive integer" + ("" if most is None else f" of at most {most}") + optional
    parts = [
        None if least is None else f"of at least {least}",
        None if above is None else f"above {above}",
        None if most is None else f"of at most {most}",
        None if below is None else f"below {below}",
    ]
    told = " and ".join(part for part in parts if part)
    return ("a number " + told if told else "a finite number") + optional


@dataclass
class StudiesRecipe(Section):
    """Which studies are trained on."""

    place = "studies"

    source: str = field(metadata={"help": "A source of `otdrg.studies.load_studies`: prepared, phantom, r2gen..."})
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "The source's own options, such as annotation and images."}
    )
    cleaning: Literal["none", "r2gen_iu", "r2gen_mimic"] = _option(
        "none", "How reports are cleaned before they are learned and scored; R2Gen's cleaners, or not at all."
    )
    sections: Literal["findings", "impression", "findings+impression"] = _option(
        "findings", "What the report is made of; of source prepared, whose reports are made, always findings here."
    )
    streaming: bool = _option(False, "Read training studies from the shards of source prepared as they are needed.")
    shuffle_buffer: int = _option(256, "Streamed studies among which the next one is drawn.", least=1)
    limit: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Most studies kept of a split, from its start: {train: 200, validation: 50}."},
    )

    def __post_init__(self):
        _need(self.shuffle_buffer > 0, "studies.shuffle_buffer", self.shuffle_buffer, "a positive number of studies")
        super().__post_init__()
        _need(
            not self.streaming or self.source == "prepared", "studies.source", self.source, "prepared, to be streamed"
        )
        _need(
            not self.streaming or set(self.options) == {"folder"},
            "studies.options",
            self.options,
            "folder, and no other",
        )
        _need(
            self.sections == "findings" or self.source != "prepared",
            "studies.sections",
            self.sections,
            "none of source prepared: its reports were made by otdrg prepare --sections",
        )
        for split, count in self.limit.items():
            _need(split in ("train", "validation", "test"), "studies.limit", split, "train, validation or test")
            _need(0 < count <= _MOST, f"studies.limit.{split}", count, "a positive number of studies")


@dataclass
class LabelsRecipe(Section):
    """Where the finding states come from: the CSV for the studies it names, else the labeler, else the studies' own."""

    place = "labels"

    csv: str | None = _option(None, "CSV of states in chexpert-labeler's form, joined to the studies by id.")
    labeler: str | None = _option(None, "A labeler of `otdrg.labelers.load_labeler` that reads the reports: rules.")
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "The labeler's own options."})


@dataclass
class ModelRecipe(Section):
    """What the first stage starts from. Later stages read the folder of the stage before."""

    place = "model"

    preset: str = _option("tiny", "An OTDRGConfig preset: tiny (from scratch), small or paper (pretrained backbones).")
    vision: str | None = _option(None, "Vision backbone, a Hub id, folder or timm name; the preset's without it.")
    text: str | None = _option(None, "LLM, a Hub id, folder or GGUF file; the preset's without it.")
    label_text_encoder: str | None = _option(
        None, "Text encoder of the label features, a Hub id or folder, in place of the LLM's own embeddings."
    )
    overrides: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "OTDRGConfig fields that differ from the preset's."}
    )
    vocab_size: int = _option(
        512,
        "Size of the tokenizer that is trained on the reports when there is no backbone.",
        least=270,
    )
    dtype: Literal["float32", "bfloat16"] = _option(
        "float32", "Type of frozen backbone weights and of the published model; what is trained is kept in float32."
    )
    quantization: Literal["4bit", "8bit"] | None = _option(
        None, "Hold the LLM's frozen weights in 4 or 8 bits (bitsandbytes) while the report stage trains LoRA on them."
    )


@dataclass
class StageRecipe(Section):
    """What every stage has."""

    epochs: float = _option(1.0, "Passes over the training studies.", above=0)
    max_steps: int = _option(-1, "Optimizer steps after which the stage ends; -1 leaves that to epochs.")
    batch_size: int = _option(8, "Studies in a batch on each device.", least=1)
    eval_batch_size: int | None = _option(None, "Studies in a batch of evaluation; batch_size without it.", least=1)
    gradient_accumulation: int = _option(1, "Batches whose gradients make one optimizer step.", least=1)
    learning_rate: float = _option(1e-4, "Peak learning rate of AdamW.", above=0)
    vision_learning_rate: float | None = _option(
        None, "Peak learning rate of a trained vision encoder or its adapters; learning_rate without it.", above=0
    )
    schedule: Literal["cosine", "linear", "constant"] = _option("cosine", "Course of the learning rate after warm-up.")
    warmup_ratio: float = _option(
        0.0, "Share of the steps over which the learning rate rises from 0.", least=0, below=1
    )
    weight_decay: float = _option(0.01, "Weight decay, of weight matrices only.", least=0)
    max_grad_norm: float = _option(1.0, "Gradients are scaled down to this norm.", least=0)
    vision: Literal["frozen", "lora", "full"] = _option(
        "frozen", "How the vision encoder is trained; lora as model.overrides.vision_lora says."
    )
    cache_features: bool = _option(
        True, "Encode each view once and keep its features in feature_cache, where the vision encoder is frozen."
    )
    bf16: bool = _option(False, "Train under bfloat16 autocast.")
    gradient_checkpointing: bool = _option(
        False, "Keep few activations and compute the others anew in the backward pass: less memory, more time."
    )
    compile: bool = _option(False, "Compile the model with torch.compile (inductor), which takes minutes once.")
    logging_steps: int = _option(10, "Steps between log lines.", least=1)
    eval_strategy: Literal["no", "steps", "epoch"] = _option("epoch", "When validation is evaluated during training.")
    eval_steps: int | None = _option(None, "Steps between evaluations, for eval_strategy steps.", least=1)
    save_strategy: Literal["no", "steps", "epoch"] = _option("epoch", "When a checkpoint is written.")
    save_steps: int = _option(500, "Steps between checkpoints, for save_strategy steps.", least=1)
    save_total_limit: int | None = _option(2, "Checkpoints kept; older ones are deleted.", least=1)
    workers: int = _option(0, "Processes that load studies beside the training process.", least=0)

    def __post_init__(self):
        super().__post_init__()
        _need(
            self.max_steps == -1 or self.max_steps > 0,
            self._name("max_steps"),
            self.max_steps,
            "a positive integer, or -1",
        )
        _need(
            self.vision_learning_rate is None or self.vision != "frozen",
            self._name("vision_learning_rate"),
            self.vision_learning_rate,
            f"null while {self.place}.vision is frozen",
        )


@dataclass
class IRCPRecipe(StageRecipe):
    """The stage that pre-trains the vision encoder by contrast (3.2.2)."""

    place = "ircp"

    vision: Literal["frozen", "lora", "full"] = _option(
        "full", "How the vision encoder, which is what this stage trains, is trained: full, or lora."
    )
    cache_features: bool = _option(False, "Features of an encoder that is trained change: always false.")
    sigma: float = _option(0.1, "Standard deviation of the noise that makes an anchor's positive.", least=0)
    noise: Literal["normalized", "raw"] = _option(
        "normalized", "Add the noise to the pooled encoder feature scaled to length 1, or to it as it is (the paper)."
    )
    similarity: Literal["cosine", "euclidean"] = _option(
        "cosine", "Of projected features: their cosine, or their Euclidean distance, negated."
    )
    temperature: float = _option(0.5, "By which similarities are divided.", above=0)
    projection_size: int = _option(128, "Width of the features that are compared, behind the projection head.", least=1)
    report_weight: float = _option(
        0.0, "Weight of the loss that contrasts views with reports; 0 leaves it out.", least=0
    )
    max_report_tokens: int = _option(120, "Tokens of a report that are read for that loss.", least=1)
    probe_studies: int = _option(
        2000,
        "Most training and most validation studies encoded before and after for the figures; 0 leaves them out.",
        least=0,
    )

    def __post_init__(self):
        super().__post_init__()
        _need(
            self.vision != "frozen", "ircp.vision", self.vision, "full or lora: the encoder is what this stage trains"
        )
        _need(
            not self.cache_features,
            "ircp.cache_features",
            self.cache_features,
            "false: features of the encoder that this stage trains change",
        )
        _need(self.batch_size > 1, "ircp.batch_size", self.batch_size, "at least 2: negatives are the batch's others")


@dataclass
class PredictorRecipe(StageRecipe):
    """The stage that trains the label predictor (3.4).

    Where the predictor has an encoder of its own (`model.overrides.predictor_encoder`), `vision` is about that one,
    which starts as a copy of the report's.
    """

    place = "predictor"

    logit_adjustment: float = _option(
        0.0,
        "tau of Menon et al. (2021): tau times the log of how often training has each state is added to the logits "
        "wherever the predictor learns, so that rare states are not learned to be unlikely.",
        least=0,
    )
    fit_thresholds: bool = _option(False, "Fit a threshold for each finding on validation, into the configuration.")


@dataclass
class GenerationRecipe(Section):
    """How reports are decoded."""

    place = "report.generation"

    num_beams: int = _option(3, "Beams; 1 is greedy search.", least=1)
    max_new_tokens: int = _option(120, "Most tokens of a generated report.", least=1)
    length_penalty: float = _option(
        1.0, "Exponent of the length by which beams are compared; below 0 it favours short reports."
    )
    repetition_penalty: float = _option(1.0, "Above 1 also punishes the words of the prompt's own label text.", above=0)
    no_repeat_ngram_size: int = _option(0, "Length of word runs that may not come twice; 0 allows all.", least=0)


@dataclass
class EvaluationRecipe(Section):
    """The table of generated reports at the end of the report stage."""

    place = "report.evaluation"

    split: Literal["validation", "test", "none"] = _option("validation", "Split that is scored; none skips the table.")
    limit: int | None = _option(None, "Most studies scored, from the split's start.", least=1)
    controls: list[str] = field(
        default_factory=lambda: ["shuffled", "retrieval", "constant", "true_states"],
        metadata={
            "help": "Rows beside the model's own: shuffled, retrieval, constant, true_states. Retrieval encodes the "
            "training views once, unless they are cached."
        },
    )
    labeler: str = _option("rules", "Labeler that reads the states out of generated and true reports.")
    metrics: list[str] = field(
        default_factory=lambda: ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider"],
        metadata={"help": "Metrics of `otdrg.metrics.nlg_scores`."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name in self.controls:
            allowed = ("shuffled", "retrieval", "constant", "true_states")
            _need(name in allowed, "report.evaluation.controls", name, f"one of {', '.join(allowed)}")


@dataclass
class SelectionRecipe(Section):
    """Evaluations during the report stage: reports are generated and scored, and the best checkpoint is kept."""

    place = "report.selection"

    expression: str = _option(
        "0.5 * bleu_4 + 0.5 * cider",
        "What the best checkpoint has most of: + - * / over scores, such as bleu_4, cider or macro_f1_13, which is "
        "short for macro_f1_13_uncertain_negative.",
    )
    limit: int | None = _option(
        None, "Most validation studies reports are generated for, from the split's start.", least=1
    )
    num_beams: int = _option(1, "Beams of these evaluations; 1 is greedy search.", least=1)
    patience: int | None = _option(
        None, "Evaluations without a new best after which the stage ends; null: never.", least=1
    )

    def __post_init__(self):
        super().__post_init__()
        try:
            SelectionExpression(self.expression)
        except ValueError as error:
            raise ValueError(f"report.selection.expression={error}") from None


@dataclass
class ReportRecipe(StageRecipe):
    """The stage that trains FIOT and the LLM (3.3, 3.5)."""

    place = "report"

    text: Literal["frozen", "lora", "full"] = _option("lora", "How the LLM is trained.")
    predictor: Literal["frozen", "full"] = _option(
        "frozen", "Whether the label predictor goes on learning; it must when an encoder it shares is trained."
    )
    max_report_tokens: int = _option(120, "Tokens of a training report that are kept.", least=1)
    indication: bool = _option(False, "Put the studies' indication into the prompt.")
    ot_weight_warmup: float = _option(
        0.0, "Share of the steps over which lambda rises from 0 to model's ot_weight.", least=0, most=1
    )
    ot_epsilon_start: float | None = _option(
        None, "Epsilon at the first step, annealed to the model's ot_epsilon.", above=0
    )
    ot_epsilon_annealing: float = _option(
        0.5, "Share of the steps over which epsilon is annealed, geometrically.", least=0, most=1
    )
    group_by_length: bool = _option(False, "Make batches of reports that are about equally long: less padding.")
    generation: GenerationRecipe = field(
        default_factory=GenerationRecipe, metadata={"help": "How reports are decoded."}
    )
    selection: SelectionRecipe = field(
        default_factory=SelectionRecipe, metadata={"help": "Which checkpoint is kept, by reports of validation."}
    )
    evaluation: EvaluationRecipe = field(
        default_factory=EvaluationRecipe, metadata={"help": "The table of generated reports."}
    )

    def __post_init__(self):
        super().__post_init__()
        _need(
            self.eval_strategy == "no" or self.save_strategy != "no",
            "report.save_strategy",
            self.save_strategy,
            "steps or epoch, so that there is a best checkpoint to keep (or report.eval_strategy no)",
        )
        _need(
            self.eval_strategy == "no" or self.save_total_limit is None or self.save_total_limit > 1,
            "report.save_total_limit",
            self.save_total_limit,
            "at least 2, or null: the best checkpoint and the last one",
        )
        _need(
            self.selection.patience is None or self.eval_strategy != "no",
            "report.selection.patience",
            self.selection.patience,
            "null while report.eval_strategy is no",
        )


#: The stages there are, in the order in which they run, and the module of each.
STAGES: dict[str, str] = {"ircp": "ircp", "predictor": "predictor", "report": "report"}
#: Those of a recipe that does not say: without pre-training, the encoder is taken as it is given.
DEFAULT_STAGES: tuple[str, ...] = ("predictor", "report")


@dataclass
class Recipe(Section):
    """A training run."""

    output_dir: str = field(metadata={"help": "Folder of the run: a folder a stage, and the published model."})
    studies: StudiesRecipe = field(metadata={"help": "Which studies are trained on."})
    seed: int = _option(42, "Seed of weights, batches and controls.", least=0, most=2**32 - 1)
    cpu_threads: int | None = _option(
        None, "Threads of each process on CPU; the cores' share of each without it.", least=1, most=1024
    )
    feature_cache: str | None = _option(
        None, "Folder of frozen encoders' features, which runs may share; features in output_dir without it."
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Where log lines go besides the run's folder, as transformers names it: tensorboard, trackio."
        },
    )
    stages: list[str] = field(
        default_factory=lambda: list(DEFAULT_STAGES),
        metadata={"help": "Stages to run, of ircp, predictor and report; each reads the folder of the one before."},
    )
    labels: LabelsRecipe = field(default_factory=LabelsRecipe, metadata={"help": "Where finding states come from."})
    model: ModelRecipe = field(default_factory=ModelRecipe, metadata={"help": "What the first stage starts from."})
    ircp: IRCPRecipe = field(default_factory=IRCPRecipe, metadata={"help": "Contrastive pre-training (3.2.2)."})
    predictor: PredictorRecipe = field(default_factory=PredictorRecipe, metadata={"help": "Label predictor (3.4)."})
    report: ReportRecipe = field(default_factory=ReportRecipe, metadata={"help": "FIOT and the LLM (3.3, 3.5)."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("output_dir", "feature_cache"):
            value = getattr(self, name)
            _need(value is None or (bool(value.strip()) and "\0" not in value), name, value, "the path of a folder")
        _need(not os.path.isfile(self.output_dir), "output_dir", self.output_dir, "a folder, and this is a file")
        _need(
            self.model.quantization is None or self.report.text != "full",
            "report.text",
            self.report.text,
            f"lora or frozen where model.quantization is {self.model.quantization}",
        )
        _need(
            self.feature_cache is None or not os.path.isfile(self.feature_cache),
            "feature_cache",
            self.feature_cache,
            "a folder, and this is a file",
        )
        _need(bool(self.stages), "stages", self.stages, f"some of {', '.join(STAGES)}")
        for stage in self.stages:
            _need(stage in STAGES, "stages", stage, f"one of {', '.join(STAGES)}")
        _need(
            self.stages == [stage for stage in STAGES if stage in self.stages],
            "stages",
            self.stages,
            f"each once and in this order: {', '.join(STAGES)}",
        )
        _need(
            not (self.report.group_by_length and self.studies.streaming),
            "report.group_by_length",
            True,
            "false while studies.streaming is true (their order is the shards')",
        )
        shared = self.model.overrides.get("predictor_encoder", "shared") == "shared"
        _need(
            self.report.vision == "frozen" or self.report.predictor == "full" or not shared,
            "report.predictor",
            self.report.predictor,
            f"full where report.vision is {self.report.vision} (the encoder would move away under the predictor), or "
            "model.overrides.predictor_encoder own",
        )

    @property
    def features_folder(self) -> Path:
        """Where features of frozen encoders are kept."""
        return Path(self.feature_cache or os.path.join(self.output_dir, "features"))

    def to_yaml(self) -> str:
        """The recipe as resolved, every field written out; `load_recipe` reads it back."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | os.PathLike, overrides: list[str] = ()) -> Recipe:
    """Read a recipe and lay overrides over it.

    `${NAME}` in a string stands for an environment variable, `${NAME:-other}` for it or, where it is unset, `other`.

    Args:
        path: YAML file.
        overrides: `section.field=value`, the value in YAML: `report.max_steps=20`, `stages=[report]`.

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
        raise ValueError(f"recipe {path} is not a mapping: expected keys such as {', '.join(_field_names(Recipe))}")
    try:
        recipe_values = _expand(values, ())
        for override in overrides:
            _apply(override, recipe_values)
        return _build(Recipe, recipe_values, ())
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from None


def published_recipe(model: str) -> Recipe | None:
    """The recipe by which a model was trained, as it lies in its run's folder; None where there is none.

    Args:
        model: as in [`load_published`]; of a run's folder `model` or `adapter`, the run's recipe.
    """
    folder = Path(model).absolute()
    run = folder.parent if folder.name in ("model", "adapter") else folder
    return load_recipe(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else None


_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}")


def _expand(value: Any, where: tuple[str, ...]) -> Any:
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
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: expected section.field=value, such as report.max_steps=20")
    *parents, last = path = tuple(key.split("."))
    value = _expand(parse_yaml(text, f"override {override!r}"), path)
    target = values
    for depth, parent in enumerate(parents):
        target[parent] = target = {} if target.get(parent) is None else target[parent]
        if not isinstance(target, dict):
            raise ValueError(f"override {override!r}: {'.'.join(path[: depth + 1])} is not a section")
    # A section given as a mapping is laid over what is there, a field takes the place of what is there.
    if isinstance(value, dict) and isinstance(target.get(last), dict):
        target[last] = {**target[last], **value}
    else:
        target[last] = value


def _field_names(cls: type) -> list[str]:
    return [item.name for item in fields(cls)]


def _build(cls: type, values: Any, where: tuple[str, ...]) -> Any:
    place = ".".join(where)
    if not isinstance(values, dict):
        raise ValueError(f"{place}={values!r}: expected a section with keys {', '.join(_field_names(cls))}")
    known: dict[str, Field] = {item.name: item for item in fields(cls)}
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
            raise ValueError(
                f"unknown key {key!r} {f'in {place}' if place else 'at the top'}: did you mean {nearest!r}?"
            )
    for name, item in known.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{'.'.join((*where, name))} is missing: {item.metadata['help']}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: convert(value, hints[name], (*where, name)) for name, value in values.items()})


_KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if item is type(None) else _describe(item) for item in arguments)
    if origin is list:
        return f"a list of {_describe(arguments[0]).removeprefix('a ')}s, such as [a, b]"
    return _KINDS.get(kind, "a mapping")


def convert(value: Any, kind: Any, where: tuple[str, ...]) -> Any:
    """A value as a field of this type holds it.

    Args:
        value: as YAML has it.
        kind: the field's type.
        where: the names of its sections and its own.

    Raises:
        ValueError: it is of another type; the message names the field and the value.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    wrong = ValueError(f"{'.'.join(where)}={value!r}: expected {_describe(kind)}")
    if is_dataclass(kind):
        return _build(kind, {} if value is None else value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        try:
            return convert(value, next(item for item in arguments if item is not type(None)), where)
        except ValueError:
            raise wrong from None
    if origin is Literal:
        # YAML reads the bare word `no` as false.
        value = {False: "no"}.get(value, value) if isinstance(value, bool) and "no" in arguments else value
        if value not in arguments:
            raise wrong
        return value
    if origin is list:
        if not isinstance(value, list):
            raise wrong
        return [convert(item, arguments[0], where) for item in value]
    if origin is dict:
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise wrong
        return {key: convert(item, arguments[1], (*where, key)) for key, item in value.items()}
    if kind is Any:
        return _plain(value, where)
    if kind is float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise wrong
        try:
            return float(value)
        except OverflowError:
            raise wrong from None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise wrong
    return value


def _plain(value: Any, where: tuple[str, ...]) -> Any:
    """A value of a mapping whose fields are declared elsewhere: what JSON can hold, and no number but finite ones."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"{'.'.join(where)}={value!r}: expected a mapping whose keys are strings")
        return {key: _plain(item, (*where, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{'.'.join(where)}={value!r}: expected a finite number")
    if value is not None and not isinstance(value, (str, int, float)):
        raise ValueError(f"{'.'.join(where)}={value!r}: expected a string, a number, true, false, a list or a mapping")
    return value
