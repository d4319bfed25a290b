"""Files of models and runs: base models in and out, training state."""
