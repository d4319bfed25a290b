"""Runs any of the commands: `prompt-tuning train --gin_file=...`, or `python -m prompt_tuning_jax train ...`."""

import importlib
import sys

from prompt_tuning_jax.errors import near_misses

COMMANDS = {
    "train": "trains a prompt, an adapter or a model",
    "eval": "scores one, or the base model alone",
    "infer": "answers rows with many prompts",
    "serve": "answers rows over HTTP",
    "sweep": "runs a grid of trainings and evaluations",
    "convert": "writes models and prompts in other formats",
    "neighbors": "shows the words that are nearest to a prompt",
    "tasks": "lists and shows tasks",
    "demo": "trains and asks a first prompt",
}


def main() -> None:
    """Runs the command that the first argument names, and passes it the other arguments."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--help":
        print("prompt-tuning COMMAND ..., and prompt-tuning COMMAND --help for more:\n")
        print("\n".join(f"  {command:<10} {about}" for command, about in COMMANDS.items()))
        return
    if name not in COMMANDS:
        print(f"error: no command {name}; {near_misses(name, COMMANDS, few=len(COMMANDS))}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
    module = "tasks.__main__" if name == "tasks" else name
    importlib.import_module(f"prompt_tuning_jax.{module}").main()


if __name__ == "__main__":
    main()
