"""`python many_trainings.py JSON`: runs `train` once for each list of arguments, one after another in this process.

What a test starts several of, to be the processes of one program: JAX is imported, and the processes meet, once.
"""

import importlib
import json
import sys

import gin

train = importlib.import_module("prompt_tuning_jax.train")

if __name__ == "__main__":
    for number, arguments in enumerate(json.loads(sys.argv[1])):
        gin.clear_config()
        sys.argv = ["train", *arguments]
        train.main()
        if not number:
            train.start_processes = lambda flags: None
