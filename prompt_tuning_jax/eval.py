"""Evaluates a prompt, or the base model alone: `python -m prompt_tuning_jax.eval --gin_file=... --gin.PROMPT_FILE=...`.

With `--submission=DIR` and EVAL_SPLIT "test", the command writes the files that the GLUE and SuperGLUE servers accept,
and computes no scores. Like `train`, it runs on a mesh of all devices, with one or several processes.
"""

import json
import sys

from prompt_tuning_jax.compilation import keep_compiled_programs
from prompt_tuning_jax.gin_files import configured, parse, user_errors
from prompt_tuning_jax.parallel.processes import FLAGS, PeerWatch, exiting_alone, is_writer, start_processes
from prompt_tuning_jax.training import eval_run


def main() -> None:
    keep_compiled_programs()
    with exiting_alone(), user_errors():
        flags = parse(sys.argv[1:], flags=("submission", *FLAGS), about=__doc__)
        start_processes(flags)
        if flags.get("submission") is True:
            raise ValueError("--submission has no folder: expected --submission=DIR")
        with PeerWatch():
            result = configured(eval_run.evaluate_prompt, "runs/eval.gin")(submission=flags.get("submission"))
    if is_writer():
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
