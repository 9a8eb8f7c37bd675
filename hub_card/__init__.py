"""What goes to the Hub beside the weights: the model card, and what it is filled from."""
