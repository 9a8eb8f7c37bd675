"""Ablations: train many runs and tabulate their scores."""
