"""Reproduces the paper's figures and tables, and makes the embedded base model; one file for each."""
