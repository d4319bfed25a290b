"""Defines the flags for a base model and its prompts that `infer` and `serve` share, and loads their predictor."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from prompt_tuning_jax.command_line import Parser
from prompt_tuning_jax.errors import error_text
from prompt_tuning_jax.flags import as_flag
from prompt_tuning_jax.inference.folder import PromptFolder
from prompt_tuning_jax.inference.predictor import Predictor
from prompt_tuning_jax.inference.requests import Decoding


def add_model_flags(parser: Parser) -> None:
    """Adds the flags for a base model, its prompts, and the sizes of its batches and answers."""
    parser.add_argument(
        "--base", default="nano", help="a base of any format, by path or hub id; the embedded one by default"
    )
    parser.add_argument("--prompts", help="a folder of prompts (NAME.npy, run folders, PEFT adapters), or one prompt")
    parser.add_argument("--vocabulary", help="spiece.model, tokenizer.json or 'bytes', if none lies beside the base")
    parser.add_argument("--dtype", default="auto", help="of the base in memory: auto, float32, bfloat16, int8")
    parser.add_numbers(
        Predictor.__init__,
        input_length="tokens; longer inputs are truncated, and flagged",
        max_new_tokens="of an answer, its end of sequence included",
        batch_size="rows of the largest batch",
    )
    parser.add_numbers(Decoding, beams='for "beam"')


def load_predictor(
    arguments: argparse.Namespace, decoding: Decoding | None = None, prompt: str | None = None
) -> tuple[Predictor, PromptFolder | None]:
    """Returns the predictor that the flags describe, and the folder of its prompts if there is one."""
    folder = PromptFolder(arguments.prompts) if arguments.prompts else None
    names = ("vocabulary", "dtype", "input_length", "max_new_tokens", "batch_size")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    decoding = decoding or Decoding(beams=arguments.beams)
    predictor = Predictor.load(arguments.base, folder, prompt=prompt, decoding=decoding, **options)
    for remark in folder.remarks.values() if folder else ():
        print(remark, file=sys.stderr)
    return predictor, folder


def print_broken(broken: Mapping[str, Exception]) -> None:
    """Prints to stderr which prompts are left out, and why."""
    for name, error in broken.items():
        print(f"prompt {name} is left out: {in_flags(error)}", file=sys.stderr)


def in_flags(error: Exception) -> str:
    """Returns an error's message with settings written as flags."""
    return error_text(error, as_flag)
