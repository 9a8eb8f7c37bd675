"""Ablations: tables over many runs."""
