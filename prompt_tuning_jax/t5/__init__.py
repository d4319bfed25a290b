"""Implements T5 1.1 in Flax Linen, with the parameter names and shapes of T5X's minimal T5."""
