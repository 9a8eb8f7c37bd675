"""Training: a recipe, its stages (one module each), and evaluation by generation. The door is `train_hf.py`."""
