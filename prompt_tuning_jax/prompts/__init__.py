"""The soft prompt: the learned matrix, how it starts, and its files."""
