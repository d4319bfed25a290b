"""Scores a prompt, or a base without one: `python -m prompt_tuning_jax.eval --gin_file=... --gin.PROMPT_FILE=...`."""

import json
import sys

import gin

from prompt_tuning_jax.compilation import keep_compiled_programs
from prompt_tuning_jax.gin_files import parse, user_errors
from prompt_tuning_jax.training import score


def main() -> None:
    keep_compiled_programs()
    with user_errors():
        parse(sys.argv[1:])
        print(json.dumps(gin.get_configurable(score.evaluate_prompt)(), indent=1))


if __name__ == "__main__":
    main()
