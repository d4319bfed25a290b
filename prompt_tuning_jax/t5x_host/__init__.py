"""Trains this project's prompts with T5X: what T5X's trainer, checkpoints and partitioner need.

It can be imported only if T5X is installed, which is not on PyPI; nothing else in the package imports it. A module that
extends a file of T5X (github.com/google-research/t5x, `t5x/`) has that file's name in its docstring;
`gin_configs/t5x` puts the modules together.
"""
