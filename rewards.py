"""Rewards of generated reports in the signature of TRL's reward functions: the public name of `metrics.rewards`."""

from .metrics.rewards import (
    REWARDS,
    Agreement,
    Cider,
    FindingF1,
    RadEvalReward,
    RewardFunction,
    bleu_4,
    completion_texts,
    invented_comparisons,
    rouge_l,
)

__all__ = [
    "REWARDS",
    "Agreement",
    "Cider",
    "FindingF1",
    "RadEvalReward",
    "RewardFunction",
    "bleu_4",
    "completion_texts",
    "invented_comparisons",
    "rouge_l",
]
