"""`python many_trainings.py JSON`: runs `train` once for each list of arguments, one after another in this process.

A test starts several of these as the processes of a distributed program, so that JAX is imported and the processes are
connected only once for all trainings.
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
