"""Defines what is trained: one file per method, each a subclass of `method.Method`."""
