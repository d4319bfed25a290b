"""Prompt tuning of T5 in JAX and Flax (Lester et al. 2021)."""

__version__ = "0.1.0"
