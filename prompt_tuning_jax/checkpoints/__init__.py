"""Reads and writes base models, tuned parameters and training states."""
