"""This project's prompts under T5X: what its trainer, checkpoints and partitioner are given.

Importable only where T5X is, which is not on PyPI; nothing else in the package imports it. Each module is named after
the file of T5X (github.com/google-research/t5x, `t5x/`) that it plugs into; `gin_configs/t5x` puts them together.
"""
