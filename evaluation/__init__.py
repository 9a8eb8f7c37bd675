"""Evaluation: tables with baselines and controls, faithfulness, localisation, embedding, scores of files."""
