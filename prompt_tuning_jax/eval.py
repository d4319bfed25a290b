"""Scores a prompt, or a base without one: `python -m prompt_tuning_jax.eval --gin_file=... --gin.PROMPT_FILE=...`.

With `--submission=DIR` it writes what the GLUE and SuperGLUE servers take, for EVAL_SPLIT "test", and scores nothing.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gin

from prompt_tuning_jax.compilation import keep_compiled_programs
from prompt_tuning_jax.gin_files import parse, user_errors
from prompt_tuning_jax.training import score
from prompt_tuning_jax.training.run_folder import check_writable, write_text


def main() -> None:
    keep_compiled_programs()
    with user_errors():
        flags = parse(sys.argv[1:], flags=("submission",))
        if flags.get("submission") is True:
            raise ValueError("--submission has no folder: expected --submission=DIR")
        print(json.dumps(evaluate(flags.get("submission")), indent=1))


def evaluate(submission: str | None = None) -> dict[str, Any]:
    """What gin has been told to evaluate; also left in MODEL_DIR, where that is set."""
    folder = gin.query_parameter("%MODEL_DIR")
    if folder is not None:
        check_writable(Path(folder))
    result = gin.get_configurable(score.evaluate_prompt)(submission=submission)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text(Path(folder, "summary.json"), json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
