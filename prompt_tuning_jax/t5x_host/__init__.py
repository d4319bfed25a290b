"""Trains this project's prompts with T5X: what T5X's trainer, checkpoints and partitioner need.

This package can be imported only if T5X is installed; T5X is not on PyPI. No other module of the project imports this
package. A module that extends a file of T5X (github.com/google-research/t5x, `t5x/`) has that file's name in its
docstring. The gin files in `gin_configs/t5x` put the modules together.
"""
