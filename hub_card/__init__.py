"""Publishing on the Hub: a model's card, its Space, and their upload."""
