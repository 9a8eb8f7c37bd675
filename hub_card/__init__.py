"""The Hub: a model's card, its Space and how they get there."""
