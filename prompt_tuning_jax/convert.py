"""Converts models and prompts: `python -m prompt_tuning_jax.convert SOURCE TARGET --to=FORMAT`.

Models: --to=huggingface, t5x, orbax. Prompts: --to=npy, peft, t5x. Formats of SOURCE are recognised.
"""

import argparse
import sys
from typing import NoReturn

from prompt_tuning_jax.checkpoints.conversion import MODEL_FORMATS, PROMPT_FORMATS, convert
from prompt_tuning_jax.gin_files import user_errors

# What a run names by a macro has another name here.
NAMES = {"INITIAL_CHECKPOINT_PATH": "SOURCE", "PROMPT_FILE": "SOURCE", "set VOCABULARY": "set --vocabulary"}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, as every command line here does."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; expected SOURCE TARGET --to=FORMAT [--base=BASE] [--vocabulary=FILE]")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
      ValueError: it is not one of this command's.
    """
    parser = Parser("python -m prompt_tuning_jax.convert", description=__doc__, allow_abbrev=False)
    parser.add_argument("source", metavar="SOURCE", help="a model or prompt of any format; the embedded base is 'nano'")
    parser.add_argument("target", metavar="TARGET", help="where nothing is yet")
    formats = sorted({*MODEL_FORMATS, *PROMPT_FORMATS})
    parser.add_argument("--to", required=True, choices=formats)
    parser.add_argument("--base", help="the base a prompt was trained on, by path, or by name for --to=peft")
    parser.add_argument("--vocabulary", help="a SentencePiece model to put beside a model that has none")
    return parser.parse_args(argv)


def main() -> None:
    with user_errors():
        arguments = vars(parse(sys.argv[1:]))
        try:
            print(convert(**arguments))
        except ValueError as error:
            message = str(error)
            for name, here in NAMES.items():
                message = message.replace(name, here)
            raise ValueError(message) from None


if __name__ == "__main__":
    main()
