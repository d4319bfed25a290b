"""Training: loss, optimiser, one step for every use, and the loop around it."""
