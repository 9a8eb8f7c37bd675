"""The commands: one module for each, with its arguments and output."""
