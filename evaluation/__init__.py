"""What a model is worth: tables, baselines, controls, steering, localisation, embedding."""
