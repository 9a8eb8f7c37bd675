"""The callbacks of a stage: figures of its losses, schedules of the transport, and the log of its course."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..files_otdrg import write_text

logger = logging.getLogger(__name__)

#: Figures of the model's output in every log line: means over the steps since the last line.
FIGURES: tuple[str, ...] = (
    "report_loss",
    "ot_loss",
    "predictor_loss",
    "ot_marginal_error",
    "plan_entropy",
    "epsilon_to_cost",
    "label_spread",
    "contrastive_loss",
    "report_contrastive_loss",
    "alignment",
    "uniformity",
)

#: Label features whose distance to their mean is below this share of their length have collapsed: at 0.025 a decoder
#: trained from scratch wrote the same report whatever the states.
COLLAPSED_SPREAD = 0.05
#: A plan with more than this share of the maximum entropy assigns every token to every label.
UNIFORM_ENTROPY = 0.995


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient is NaN or infinite; the weights are those of the step before."""


class LossCallback(TrainerCallback):
    """Collects the figures of a stage's outputs, and stops a run whose loss or gradient is not finite.

    [`StageTrainer`] passes every output to [`observe`] and adds [`figures`] to its log lines.

    Args:
        names: of the figures.
    """

    def __init__(self, names: Sequence[str] = FIGURES):
        self.names = names
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def observe(self, outputs) -> None:
        """Add the output of one training batch.

        Raises:
            NonFiniteLossError: its loss is NaN or infinite on this or another process.
        """
        for name in self.names:
            value = outputs.get(name)
            if value is not None:
                self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()
                self._counts[name] = self._counts.get(name, 0) + 1
        loss = outputs["loss"].detach()
        if not everywhere(torch.isfinite(loss)):
            losses = [name for name in self.names if name.endswith("_loss") and outputs.get(name) is not None]
            parts = {name: float(outputs[name].detach()) for name in losses}
            values = ", ".join(f"{name} {value:.4g}" for name, value in {"loss": float(loss), **parts}.items())
            raise NonFiniteLossError(f"the loss is not finite ({values})")

    def figures(self) -> dict[str, float]:
        """Means since the last call, over all processes; every process must call it."""
        means = {}
        for name, total in self._sums.items():
            pair = torch.stack((total, torch.full_like(total, self._counts[name])))
            if is_distributed():
                dist.all_reduce(pair)
            means[name] = float(pair[0] / pair[1])
        self._sums, self._counts = {}, {}
        return means

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16:
            # The gradient scaler skips a step whose gradients overflow, and lowers its scale.
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        # Each process checks its own share of sharded weights.
        gradients = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        if gradients and not everywhere(torch.stack([gradient.isfinite().all() for gradient in gradients]).all()):
            raise NonFiniteLossError("a gradient is not finite")


class SinkhornLossCallback(LossCallback):
    """Also schedules lambda and epsilon, and warns when the transport plan or the label features degenerate.

    lambda and epsilon are set on the model (`ot_weight`, `ot_epsilon`). Its configuration has their final values.

    Args:
        ot_weight_warmup: share of the steps over which lambda rises from 0, linearly.
        ot_epsilon_start: epsilon at the first step; None leaves epsilon as it is.
        ot_epsilon_annealing: share of the steps over which epsilon falls geometrically to the configuration's value.
    """

    def __init__(
        self,
        ot_weight_warmup: float = 0.0,
        ot_epsilon_start: float | None = None,
        ot_epsilon_annealing: float = 0.5,
    ):
        super().__init__()
        self.ot_weight_warmup = ot_weight_warmup
        self.ot_epsilon_start = ot_epsilon_start
        self.ot_epsilon_annealing = ot_epsilon_annealing
        self._warned: set[str] = set()

    def ot_weight(self, progress: float, final: float) -> float:
        """lambda after the share `progress` (0 to 1) of the steps."""
        if progress >= self.ot_weight_warmup:
            return final
        return final * progress / self.ot_weight_warmup

    def ot_epsilon(self, progress: float, final: float) -> float:
        """epsilon after the share `progress` of the steps."""
        if self.ot_epsilon_start is None or progress >= self.ot_epsilon_annealing:
            return final
        return self.ot_epsilon_start * (final / self.ot_epsilon_start) ** (progress / self.ot_epsilon_annealing)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        progress = state.global_step / max(state.max_steps, 1)
        model.ot_weight = self.ot_weight(progress, model.config.ot_weight)
        model.ot_epsilon = self.ot_epsilon(progress, model.config.ot_epsilon)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model.ot_weight, model.ot_epsilon = model.config.ot_weight, model.config.ot_epsilon

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if logs.get("label_spread", 1.0) < COLLAPSED_SPREAD:
            self._warn(
                "spread",
                f"step {state.global_step}: the label features have collapsed (label_spread "
                f"{logs['label_spread']:.2g} < {COLLAPSED_SPREAD}); a lower ot_weight, or ot_cost_normalization "
                "unit, helps",
            )
        if logs.get("plan_entropy", 0.0) > UNIFORM_ENTROPY:
            self._warn(
                "entropy",
                f"step {state.global_step}: the transport plan is almost uniform (plan_entropy "
                f"{logs['plan_entropy']:.4f} of 1, epsilon {logs.get('epsilon_to_cost', float('nan')):.2g} of the mean "
                "cost); a lower ot_epsilon sharpens it",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)


def is_distributed() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def everywhere(condition: torch.Tensor) -> bool:
    """Whether a condition holds on every process: one that stops alone would leave the others waiting."""
    if is_distributed():
        condition = condition.to(torch.int32)
        dist.all_reduce(condition, op=dist.ReduceOp.MIN)
    return bool(condition)


#: File in a stage's folder with one JSON object for each log line.
METRICS = "metrics.jsonl"


class SaveOnEvaluation(TrainerCallback):
    """Writes a checkpoint at every evaluation, so that the best one can be loaded at the end."""

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_save = True


class HistoryCallback(TrainerCallback):
    """Writes log lines to `metrics.jsonl` as they come, and draws `curves.png` at the end; main process only.

    A stage that continues from a checkpoint keeps the lines up to it.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_text(Path(args.output_dir) / METRICS, "".join(map(_line, state.log_history)))

    def on_log(self, args, state, control, logs=None, **kwargs):
        path = Path(args.output_dir) / METRICS
        # An evaluation before training is not part of the course.
        if state.is_world_process_zero and path.is_file():
            with path.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            try:
                draw_curves(state.log_history, Path(args.output_dir) / CURVES, Path(args.output_dir).name)
            except ImportError as error:
                logger.info("%s is not drawn: %s", CURVES, error)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


# --- the course of the stage as a picture: one panel for each logged figure ------------------------------------------


CURVES = "curves.png"

#: Endings of logged values that do not describe the course.
_NOT_DRAWN = ("runtime", "per_second", "total_flos", "train_loss", "epoch", "step")
_COLUMNS = 4

#: Steps and values of a figure.
Series = dict[str, tuple[list[int], list[float]]]


def draw_curves(log_history: list[dict[str, Any]], path: Path, title: str) -> list[str]:
    """Write a PNG with a panel for each logged figure against steps: losses first, then metrics, then the rest.

    Args:
        log_history: the Trainer's: records with `step`; the prefix `eval_` marks figures of validation.
        path: the PNG to write; nothing is written if nothing was logged.
        title: the title above the panels.

    Returns:
        The names of the figures drawn, without `eval_`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing curves needs matplotlib: pip install 'otdrg[demo]'") from error

    training, validation = _series(log_history, ""), _series(log_history, "eval_")
    names = sorted({**training, **validation}, key=lambda name: _rank(name, name in training))
    if not names:
        return []
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    width, height = 3.4 * columns, 2.3 * rows + 0.6
    figure = Figure(figsize=(width, height))
    # Margins in inches; an automatic layout takes as long as all the rest.
    margins = {"left": 0.6 / width, "right": 1 - 0.15 / width, "top": 1 - 0.75 / height, "bottom": 0.5 / height}
    figure.subplots_adjust(**margins, wspace=0.26, hspace=0.45)
    lines: dict[str, Any] = {}
    for place, name in enumerate(names):
        panel = figure.add_subplot(rows, columns, place + 1)
        if name in training:
            (lines["training"],) = panel.plot(*training[name], color="#4477aa", linewidth=1.0)
        if name in validation:
            (lines["validation"],) = panel.plot(*validation[name], color="#cc6633", marker="o", markersize=3.5)
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
        panel.set_xlim(0, max(1, log_history[-1]["step"]))
        if place >= len(names) - columns:
            panel.set_xlabel("step", fontsize=8)
    figure.text(0.15 / width, 1 - 0.15 / height, title, fontsize=12, verticalalignment="top")
    figure.legend(lines.values(), lines.keys(), loc="upper right", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    return names


def _series(log_history: list[dict[str, Any]], prefix: str) -> Series:
    """Steps and values of each figure of training ("") or validation ("eval_")."""
    series: Series = {}
    for record in log_history:
        for key, value in record.items():
            name = key.removeprefix("eval_")
            if key == prefix + name and not name.endswith(_NOT_DRAWN) and isinstance(value, (int, float)):
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(float(value))
    return series


def _rank(name: str, is_of_training: bool) -> tuple[int, str]:
    if name == "loss" or name.endswith("_loss"):
        return (0 if name == "loss" else 1), name
    if not is_of_training:
        return 2, name
    return (4 if name in ("grad_norm", "learning_rate") else 3), name


__all__ = [
    "CURVES",
    "HistoryCallback",
    "LossCallback",
    "NonFiniteLossError",
    "SaveOnEvaluation",
    "SinkhornLossCallback",
    "draw_curves",
    "everywhere",
    "is_distributed",
]
