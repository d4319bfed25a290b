"""Runs grids of trials: defines their settings, groups the trials that share an executable, and launches them."""
