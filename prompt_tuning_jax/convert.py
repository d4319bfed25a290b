"""Converts models and prompts: `python -m prompt_tuning_jax.convert SOURCE TARGET --to=FORMAT`.

Models: --to=huggingface, t5x, orbax. Prompts: --to=npy, peft, t5x. The format of SOURCE is detected.

`python -m prompt_tuning_jax.convert --inspect SOURCE` describes a base model, and says whether and why it would be
refused.
"""

import argparse
import sys

from prompt_tuning_jax.checkpoints.conversion import MODEL_FORMATS, PROMPT_FORMATS, convert
from prompt_tuning_jax.checkpoints.inspection import inspect_base
from prompt_tuning_jax.command_line import Parser
from prompt_tuning_jax.errors import error_text, renamed
from prompt_tuning_jax.flags import as_flag, flag_errors

NAMES = {"source": "SOURCE", "target": "TARGET"}


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the parsed command line.

    Raises:
      ValueError: an argument is unknown, missing or invalid.
    """
    parser = Parser("prompt_tuning_jax.convert", __doc__)
    source = "a model or prompt of any format; a model also by its hub id; the embedded base is 'nano'"
    parser.add_argument("source", metavar="SOURCE", help=source)
    parser.add_argument("target", metavar="TARGET", nargs="?", help="where nothing is yet")
    formats = sorted({*MODEL_FORMATS, *PROMPT_FORMATS})
    parser.add_argument("--to", choices=formats)
    parser.add_argument("--base", help="the base a prompt was trained on, by path or hub id; --to=peft names it")
    parser.add_argument(
        "--vocabulary", help="a tokenizer (spiece.model, tokenizer.json or 'bytes') for a model without"
    )
    parser.add_argument("--inspect", action="store_true", help="print what a base model is; nothing is converted")
    parser.add_argument("--fingerprint", action="store_true", help="with --inspect: read all parameters, and print it")
    arguments = parser.parse_args(argv)
    if arguments.inspect:
        for name in ("target", "to", "base", "vocabulary"):
            if getattr(arguments, name) is not None:
                parser.error(f"{NAMES.get(name, as_flag(name))} is given with --inspect, which takes SOURCE alone")
    elif arguments.fingerprint:
        parser.error("--fingerprint is given without --inspect")
    else:
        missing = [NAMES.get(name, as_flag(name)) for name in ("target", "to") if getattr(arguments, name) is None]
        if missing:
            parser.error(f"the following arguments are required: {', '.join(missing)}")
    return arguments


def main() -> None:
    with flag_errors(NAMES):
        arguments = parse(sys.argv[1:])
        if arguments.inspect:
            return print_inspection(arguments.source, arguments.fingerprint)
        names = ("source", "target", "to", "base", "vocabulary")
        print(convert(**{name: getattr(arguments, name) for name in names}))


def print_inspection(source: str, fingerprint: bool) -> None:
    """Prints a description of a base model: one line per fact, and one line per reason why it would be refused.

    Raises:
      ValueError: there is no base model.
    """
    with renamed(initial_checkpoint_path="source"):
        facts, refused = inspect_base(source, fingerprint=fingerprint)
    spell = lambda name: "SOURCE" if name == "initial_checkpoint_path" else as_flag(name)  # noqa: E731
    reasons = [error_text(error, spell) for error in refused]
    lines = [*facts.items(), *(("refused", reason) for reason in reasons or ["no reason found"])]
    for name, text in lines:
        print(f"{name:<12} {' '.join(text.split())}")


if __name__ == "__main__":
    main()
