"""Trains and evaluates: the loss, the optimisers, the training step, the loop, and the files of a run."""
