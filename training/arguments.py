"""The section of a stage: `transformers.TrainingArguments`, and the few fields that every stage adds to it."""

from __future__ import annotations

import copy
import difflib
import inspect
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import SchedulerType

from ..metrics.fluency import METEOR_NEEDS_JAVA
from ..metrics.registry import higher_is_better, score_names
from ..runtime.devices import has_accelerator
from ..runtime.processes import device_arguments
from .fields import COUNT, NOT_NEGATIVE, POSITIVE, Bounds, Section, check_bounds, option

#: Fields of TrainingArguments that a run sets itself, and what to use in their place or why there is nothing.
_SET_BY_THE_RUN = {
    "output_dir": "use the run's own output_dir, at the top of the recipe",
    "resume_from_checkpoint": "use --resume",
    "do_train": "use stages",
    "do_eval": "use eval_strategy",
    "do_predict": "use report.evaluation",
    "remove_unused_columns": "the collator reads the studies' columns",
    "label_names": "each stage has its own",
    "prediction_loss_only": "each stage has its own",
    "label_smoothing_factor": "the losses are the paper's",
    "average_tokens_across_devices": "the loss of a step is the mean over the tokens of all processes",
    "batch_eval_metrics": "metrics are computed over the whole split",
    "eval_do_concat_batches": "metrics are computed over the whole split",
    "hub_strategy": "only the finished model is uploaded, because checkpoint folders hold reports",
    "hub_token": "use the environment variable HF_TOKEN, because recipes are stored and published",
    "hub_always_push": "only the finished model is uploaded",
    "save_only_model": "a checkpoint without its optimizer cannot be resumed",
}

#: Fields of every section that do not change what is learned, and beginnings of such fields.
_OBSERVING = (
    "per_device_eval_batch_size",
    "cache_features",
    "report_to",
    "run_name",
    "project",
    "push_to_hub",
    "disable_tqdm",
    "gradient_checkpointing",
    "activation_checkpointing",
    "skip_memory_metrics",
    "ddp_timeout",
)
_OBSERVING_PREFIXES = ("logging_", "log_", "eval_", "save_", "hub_", "trackio_", "torch_compile")


@dataclass
class StageArguments(TrainingArguments):
    """What every stage has: all fields of `TrainingArguments`, some with another default, and five of our own.

    An instance holds the fields as the recipe gives them. [`prepare`] completes a copy for a Trainer.

    Attributes:
        place: name of the section in errors.
        bounds, renamed: as of [`Section`].
        observing: further fields that change what is logged, kept or computed, and not what is learned.
        after_training: fields that are read when training is over.
    """

    place: ClassVar[str] = ""
    observing: ClassVar[tuple[str, ...]] = ()
    after_training: ClassVar[tuple[str, ...]] = ()
    bounds: ClassVar[dict[str, Bounds]] = {
        "num_train_epochs": POSITIVE,
        "max_steps": {"least": -1},
        "per_device_train_batch_size": COUNT,
        "per_device_eval_batch_size": COUNT,
        "gradient_accumulation_steps": COUNT,
        "learning_rate": POSITIVE,
        "vision_learning_rate": POSITIVE,
        "warmup_steps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "max_grad_norm": NOT_NEGATIVE,
        "adam_beta1": {"least": 0, "below": 1},
        "adam_beta2": {"least": 0, "below": 1},
        "adam_epsilon": POSITIVE,
        "logging_steps": POSITIVE,
        "eval_steps": POSITIVE,
        "eval_delay": NOT_NEGATIVE,
        "eval_accumulation_steps": COUNT,
        "save_steps": POSITIVE,
        "save_total_limit": COUNT,
        "early_stopping_patience": COUNT,
        "dataloader_num_workers": NOT_NEGATIVE,
        "dataloader_prefetch_factor": COUNT,
        "seed": {"least": 0, "most": 2**32 - 1},
        "data_seed": {"least": 0, "most": 2**32 - 1},
    }
    renamed: ClassVar[dict[str, str]] = {
        "epochs": "num_train_epochs",
        "batch_size": "per_device_train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "gradient_accumulation": "gradient_accumulation_steps",
        "schedule": "lr_scheduler_type (constant is now constant_with_warmup)",
        "warmup_ratio": "warmup_steps, which is a share of the steps where it is below 1",
        "workers": "dataloader_num_workers",
        "compile": "torch_compile",
    }

    num_train_epochs: float = option(1.0, "Passes over the training studies.")
    per_device_eval_batch_size: int | None = option(
        None, "Studies in a batch of evaluation on each device; per_device_train_batch_size without it."
    )
    learning_rate: float = option(1e-4, "Peak learning rate.")
    lr_scheduler_type: SchedulerType | str = option("cosine", "Course of the learning rate after warm-up.")
    weight_decay: float = option(0.01, "Weight decay, of weight matrices only.")
    logging_first_step: bool = option(True, "Whether to log the first step too.")
    logging_steps: float = option(10, "Steps between log lines.")
    logging_nan_inf_filter: bool = option(False, "Whether to log the mean in place of a loss that is not finite.")
    eval_strategy: Literal["no", "steps", "epoch"] = option("epoch", "When validation is evaluated during training.")
    save_strategy: Literal["no", "steps", "epoch", "best"] = option("epoch", "When a checkpoint is written.")
    save_total_limit: int | None = option(2, "Checkpoints that are kept; older ones are deleted.")
    train_sampling_strategy: Literal["random", "sequential"] = option("random", "Order of the training studies.")
    restore_callback_states_from_checkpoint: bool = option(
        True, "Whether --resume restores the count of early stopping."
    )
    accelerator_config: dict | str | None = field(
        # Every process reads the stream and takes its share; batches that one process deals out must have one length.
        default_factory=lambda: {"dispatch_batches": False},
        metadata={"help": "Options of accelerate's Accelerator."},
    )
    seed: int | None = option(None, "Seed of this stage; the recipe's seed without it.")
    # HfArgumentParser reads the types of a union in this order.
    report_to: None | str | list[str] = option(  # noqa: RUF036
        None, "Where log lines also go; the recipe's report_to without it."
    )
    vision: Literal["frozen", "lora", "full"] = option(
        "frozen", "How the vision encoder is trained; lora uses model.overrides.vision_lora."
    )
    vision_learning_rate: float | None = option(
        None, "Peak learning rate of a trained vision encoder or its adapters; learning_rate without it."
    )
    cache_features: bool = option(
        True, "Encode each view once and keep its features in feature_cache while the vision encoder is frozen."
    )
    early_stopping_patience: int | None = option(
        None, "Evaluations without a better metric_for_best_model after which the stage ends; null: never."
    )

    def __post_init__(self):
        """Check the fields by themselves; [`prepare`] calls `TrainingArguments.__post_init__`."""
        check_bounds(self)
        place, evaluates = self.place, self.eval_strategy != "no"
        selects = evaluates and self.load_best_model_at_end
        self.expect(self.max_steps != 0, "max_steps", "a positive integer, or -1")
        trains_vision = self.vision_learning_rate is None or self.vision != "frozen"
        self.expect(trains_vision, "vision_learning_rate", f"null while {place}.vision is frozen")
        stops_late = self.early_stopping_patience is None or evaluates
        self.expect(stops_late, "early_stopping_patience", f"null while {place}.eval_strategy is no")
        saves = not selects or self.save_strategy != "no"
        self.expect(saves, "save_strategy", f"steps or epoch while {place}.load_best_model_at_end is true")
        keeps_best = not selects or self.save_total_limit != 1
        self.expect(keeps_best, "save_total_limit", "at least 2, or null: the best checkpoint and the last one")
        has_repository = not self.push_to_hub or self.hub_model_id is not None
        self.expect(has_repository, "hub_model_id", f"a repository such as org/model while {place}.push_to_hub is true")
        try:
            # `metric_for_best_model` as a weighted sum.
            self.best = WeightedScores.parse(self.metric_for_best_model or "loss")
        except ValueError as error:
            raise ValueError(f"{place}.metric_for_best_model={error}") from None

    #: As in [`Section`], from which this class cannot inherit besides `TrainingArguments`.
    expect = Section.expect

    @classmethod
    def check_given(cls, given: Any) -> None:
        """Refuse the fields that a run sets itself.

        Raises:
            ValueError: names the field and what to use in its place.
        """
        for key in given if isinstance(given, dict) else ():
            if key in _SET_BY_THE_RUN:
                raise ValueError(f"{cls.place}.{key} is set by the run: {_SET_BY_THE_RUN[key]}")

    @property
    def follows_metric(self) -> bool:
        """Whether the learning rate follows `metric_for_best_model`."""
        return SchedulerType(self.lr_scheduler_type) in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)

    def eval_batch(self) -> int:
        """Studies in a batch of evaluation."""
        return self.per_device_eval_batch_size or self.per_device_train_batch_size

    def prepare(self, folder: Path, seed: int, report_to: list[str], evaluates: bool, **fixed) -> StageArguments:
        """A complete copy, for a Trainer.

        Args:
            folder: the stage's.
            seed, report_to: the recipe's, for a stage that has none of its own.
            evaluates: whether there is a split to evaluate on.
            fixed: fields that the stage sets itself.

        Raises:
            ValueError: transformers refuses the fields, or this machine cannot do what they ask for.
        """
        arguments = copy.copy(self)
        evaluates = evaluates and self.eval_strategy != "no"
        selects = evaluates and self.load_best_model_at_end
        patience = self.early_stopping_patience if evaluates else None
        reads_metric = selects or patience or (evaluates and (self.follows_metric or self.save_strategy == "best"))
        metric = self.best.trainer_name if reads_metric else None
        if metric is not None and "meteor" in self.best.weights and shutil.which("java") is None:
            raise ValueError(f"{self.place}.metric_for_best_model={self.best.text!r}: {METEOR_NEEDS_JAVA}")
        given = self.greater_is_better
        values: dict[str, Any] = {
            "output_dir": str(folder),
            "seed": seed if self.seed is None else self.seed,
            "report_to": report_to if self.report_to is None else self.report_to,
            "per_device_eval_batch_size": self.eval_batch(),
            "eval_strategy": self.eval_strategy if evaluates else "no",
            "run_name": self.run_name or f"{folder.parent.name}-{folder.name}",
            "project": self.project if self.project != "huggingface" else folder.parent.name,
            "early_stopping_patience": patience,
            "metric_for_best_model": metric,
            "greater_is_better": self.best.higher_is_better if given is None else given,
            # Set after `__post_init__`, which requires save_steps to match eval_steps; `SaveOnEvaluation` saves at
            # every evaluation instead. The Hub gets the finished model only, see `_upload` in run.py.
            "load_best_model_at_end": False,
            "push_to_hub": False,
            "remove_unused_columns": False,
            **device_arguments(self.use_cpu, bool(self.deepspeed)),
            **fixed,
        }
        if not has_accelerator():
            values["dataloader_pin_memory"] = False
        if hasattr(self, "activation_checkpointing") and self.activation_checkpointing is None:
            # The new name of gradient_checkpointing; passing the old one warns.
            values["activation_checkpointing"] = self.gradient_checkpointing
        for name, value in values.items():
            setattr(arguments, name, value)
        try:
            TrainingArguments.__post_init__(arguments)
        except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
            raise ValueError(f"{self.place}: {' '.join(str(error).split())}") from error
        arguments.load_best_model_at_end = selects
        if self.follows_metric and arguments.greater_is_better:
            # Without a mode, these schedules take lower values for better ones.
            arguments.lr_scheduler_kwargs = {"mode": "max", **(arguments.lr_scheduler_kwargs or {})}
        return arguments

    def to_dict(self) -> dict[str, Any]:
        """All fields ready for JSON, as trackers log them."""
        values = super().to_dict()
        return {name: asdict(value) if isinstance(value, Section) else value for name, value in values.items()}

    @classmethod
    def only_observes(cls, name: str) -> bool:
        """Whether a field changes what is logged, kept or computed, and not what is learned."""
        return name in (*_OBSERVING, *cls.observing) or name.startswith(_OBSERVING_PREFIXES)

    def written(self) -> dict[str, Any]:
        """The fields that `recipe.yaml` keeps: our own, those with a default of ours, and all that were changed."""
        own_classes = type(self).__mro__[: type(self).__mro__.index(TrainingArguments)]
        ours = {name for cls in own_classes for name in inspect.get_annotations(cls)}
        kept = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in _SET_BY_THE_RUN or not item.init:
                continue
            default = item.default if item.default_factory is MISSING else item.default_factory()
            if item.name in ours or value != default:
                kept[item.name] = asdict(value) if isinstance(value, Section) else value
        return kept


def check_report_to(place: str, names: str | list[str] | None) -> None:
    """Check that the trackers of the field `place` are known and installed; raises `ValueError`."""
    available = get_available_reporting_integrations()
    # A Trainer does not accept Flyte's callback by its name.
    known = sorted(set(INTEGRATION_TO_CALLBACK) - {"flyte"})
    for name in [names] if isinstance(names, str) else names or ():
        if name in ("none", "all"):
            continue
        if name not in known:
            raise ValueError(f"{place}={name!r}: expected some of {', '.join(known)}")
        if name not in available:
            raise ValueError(f"{place}={name!r}: the package {name} is not installed")


# --- `metric_for_best_model` as a weighted sum of scores -------------------------------------------------------------


_NUMBER = r"\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?"
#: A sign, a weight and the name of a score; sign and weight may be left out.
_TERM = re.compile(rf"\s*([-+])?\s*(?:({_NUMBER})\s*\*\s*)?([A-Za-z]\w*)\s*")

#: Figures that are better when they are lower, besides the losses, and those of which neither is better.
_LOWER_IS_BETTER = ("macro_ece", "ot_marginal_error", "alignment", "uniformity")
_WITHOUT_DIRECTION = ("plan_entropy", "epsilon_to_cost")


def _direction(score: str) -> int:
    """1 for a score that is better when it is higher, -1 when it is lower, 0 for neither."""
    if score in _WITHOUT_DIRECTION:
        return 0
    is_lower_better = score in _LOWER_IS_BETTER or score.endswith("loss")
    return -1 if is_lower_better or (score in score_names() and not higher_is_better(score)) else 1


@dataclass(frozen=True)
class WeightedScores:
    """A weighted sum of scores, such as `bleu_4 + 0.5 * macro_f1_13`, or one score by its name.

    Attributes:
        text: the sum as it was written.
        weights: of each score, by name.
    """

    text: str
    weights: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> WeightedScores:
        """Read a sum; a score may bear the prefix `eval_` of transformers' logs.

        Raises:
            ValueError: it is not a weighted sum of scores.
        """
        weights: dict[str, float] = {}
        position = 0
        while position < len(text) or not weights:
            term = _TERM.match(text, position)
            if term is None or (weights and term[1] is None) or not _is_finite(term[2]):
                raise ValueError(f"{text!r}: expected a weighted sum of scores, such as bleu_4 + 0.5 * macro_f1_13")
            name = term[3].removeprefix("eval_")
            weights[name] = weights.get(name, 0.0) + (-1 if term[1] == "-" else 1) * float(term[2] or 1)
            position = term.end()
        return cls(text, weights)

    @property
    def trainer_name(self) -> str:
        """What the Trainer calls it: the score's own name, or `selection` for a sum."""
        return next(iter(self.weights)) if tuple(self.weights.values()) == (1.0,) else "selection"

    @property
    def higher_is_better(self) -> bool | None:
        """Whether a higher sum is better; None if that is not known of its scores."""
        rising, falling = self._terms()
        return bool(rising) if rising or falling else None

    def _terms(self) -> tuple[list[str], list[str]]:
        """The scores whose terms are higher for a better model, and those whose terms are lower."""
        signs = {name: weight * _direction(name) for name, weight in self.weights.items()}
        return [name for name in signs if signs[name] > 0], [name for name in signs if signs[name] < 0]

    def check(self, known: Collection[str]) -> None:
        """Check that all scores are `known`, and that a better model changes all terms in one direction.

        Raises:
            ValueError: names the nearest known score, or the scores whose terms work against each other.
        """
        for name in self.weights:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise ValueError(f"{self.text!r}: unknown score {name!r}, did you mean {nearest!r}?")
        rising, falling = self._terms()
        if rising and falling:
            raise ValueError(
                f"{self.text!r}: a better model has a higher term of {', '.join(rising)} and a lower one of "
                f"{', '.join(falling)}, expected another sign of one of them"
            )

    def __call__(self, scores: Mapping[str, float | None]) -> float:
        """The sum.

        Raises:
            ValueError: a score is missing or undefined.
        """
        for name in self.weights:
            if scores.get(name) is None:
                raise ValueError(f"metric_for_best_model={self.text!r}: this evaluation has no score {name!r}")
        return sum(weight * scores[name] for name, weight in self.weights.items())


def _is_finite(number: str | None) -> bool:
    return number is None or float(number) < float("inf")


__all__ = ["StageArguments", "WeightedScores", "check_report_to"]
