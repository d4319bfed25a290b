"""Converts models and prompts: `python -m prompt_tuning_jax.convert SOURCE TARGET --to=FORMAT`.

Models: --to=huggingface, t5x, orbax. Prompts: --to=npy, peft, t5x. Formats of SOURCE are recognised.
"""

import argparse
import sys

from prompt_tuning_jax.checkpoints.conversion import MODEL_FORMATS, PROMPT_FORMATS, convert
from prompt_tuning_jax.flags import Parser, flag_errors


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
      ValueError: it is not one of this command's.
    """
    parser = Parser("prompt_tuning_jax.convert", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="a model or prompt of any format; the embedded base is 'nano'")
    parser.add_argument("target", metavar="TARGET", help="where nothing is yet")
    formats = sorted({*MODEL_FORMATS, *PROMPT_FORMATS})
    parser.add_argument("--to", required=True, choices=formats)
    parser.add_argument("--base", help="the base a prompt was trained on, by path, or by name for --to=peft")
    parser.add_argument(
        "--vocabulary", help="a tokenizer (spiece.model, tokenizer.json or 'bytes') for a model without"
    )
    return parser.parse_args(argv)


def main() -> None:
    with flag_errors({"source": "SOURCE", "target": "TARGET"}):
        print(convert(**vars(parse(sys.argv[1:]))))


if __name__ == "__main__":
    main()
