"""What the command lines share that read flags and no gin: one-line errors, and the flags of a base and its prompts."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from prompt_tuning_jax.gin_files import user_errors
from prompt_tuning_jax.inference.folder import PromptFolder
from prompt_tuning_jax.inference.predictor import Predictor
from prompt_tuning_jax.inference.requests import Decoding

# What a run names by a macro is a flag here.
FLAGS = {
    "INITIAL_CHECKPOINT_PATH": "--base",
    "PROMPT_FILE": "--prompts",
    "CLASS_LABELS": "--labels",
    "VOCABULARY": "--vocabulary",
    "BASE_DTYPE": "--dtype",
}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def __init__(self, module: str, description: str | None):
        super().__init__(
            f"python -m {module}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists what there is")


@contextlib.contextmanager
def flag_errors(names: Mapping[str, str] | None = None) -> Iterator[None]:
    """`user_errors`, macros called by their flags; and whoever reads stdout may have had enough.

    Args:
      names: where a flag is not that of `FLAGS`.
    """
    with user_errors():
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except ValueError as error:
            raise ValueError(as_flags(str(error), names)) from None


def as_flags(message: str, names: Mapping[str, str] | None = None) -> str:
    """A message in which macros are called by their flags."""
    for name, flag in (FLAGS | dict(names or {})).items():
        message = message.replace(name, flag)
    return message


def add_model_flags(parser: Parser) -> None:
    """The flags of whatever answers with a base and prompts."""
    parser.add_argument("--base", default="nano", help="a base of any format, by its path; the embedded one by default")
    parser.add_argument("--prompts", help="a folder of prompts (NAME.npy, run folders, PEFT adapters), or one prompt")
    parser.add_argument("--vocabulary", help="a SentencePiece model or 'bytes', where none lies beside the base")
    parser.add_argument("--dtype", default="auto", help="of the base in memory: auto, float32, bfloat16, int8")
    parser.add_argument("--input_length", type=int, default=512, help="tokens; longer inputs are cut, and flagged")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="of an answer, its end of sequence included")
    parser.add_argument("--batch_size", type=int, default=32, help="rows of the largest batch")
    parser.add_argument("--beams", type=int, default=4, help='for "beam"')


def load_predictor(
    arguments: argparse.Namespace, decoding: Decoding | None = None, prompt: str | None = None
) -> tuple[Predictor, PromptFolder | None]:
    """The predictor that `add_model_flags` describe, and the folder that its prompts are from."""
    folder = PromptFolder(arguments.prompts) if arguments.prompts else None
    names = ("vocabulary", "dtype", "input_length", "max_new_tokens", "batch_size")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    decoding = decoding or Decoding(beams=arguments.beams)
    return Predictor.load(arguments.base, folder, prompt=prompt, decoding=decoding, **options), folder


def say_broken(broken: Mapping[str, str]) -> None:
    """Says on stderr which prompts are left out, and why."""
    for name, message in broken.items():
        print(f"prompt {name} is left out: {message}", file=sys.stderr)
