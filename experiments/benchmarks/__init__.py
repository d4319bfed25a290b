"""Measures speed and memory; each module is a command that prints JSON."""
