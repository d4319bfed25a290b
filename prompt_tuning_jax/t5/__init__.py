"""T5 1.1 in Flax Linen, parameter for parameter T5X's minimal T5."""
