"""Answers rows of many tasks with one base model: `python -m prompt_tuning_jax.infer --prompts=DIR < rows.jsonl`.

A row is {"prompt": NAME, "inputs": TEXT}. With "labels": [...] these labels are ranked, and "prompt": null uses the
base model without a prompt. The rows come back in order, each with "prediction" and "score", or with "error" if it
cannot be answered. If every row has an error, the exit code is 2. With --text, each line is the inputs of a row with
the prompt --prompt. With --interactive, you type the inputs: ":prompt NAME" switches to another prompt, ":prompts"
lists the prompts, and ":quit" ends the program.
"""

import argparse
import codecs
import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from prompt_tuning_jax.command_line import Parser
from prompt_tuning_jax.compilation import keep_compiled_programs
from prompt_tuning_jax.flags import flag_errors
from prompt_tuning_jax.inference.predictor import WINDOW, Predictor, own_fields
from prompt_tuning_jax.inference.requests import METHODS, Decoding, read_json
from prompt_tuning_jax.model_flags import add_model_flags, load_predictor, print_broken
from prompt_tuning_jax.regular_files import regular

WAIT = 0.02  # seconds that a window waits for more lines once it has one
SAY_EVERY = 10.0  # seconds between lines of progress where stderr is no terminal


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
      ValueError: it is not one of this command's.
    """
    parser = Parser("prompt_tuning_jax.infer", __doc__)
    add_model_flags(parser)
    parser.add_argument("--prompt", help="for rows that name none")
    parser.add_argument("--decode", default="greedy", help=f"{', '.join(METHODS)}; a row's own goes first")
    parser.add_numbers(
        Decoding,
        temperature='for "sample"; 0 is greedy',
        top_k='for "sample": tokens that may be drawn; 0 for all',
        top_p='for "sample": the share of probability; 1 for all',
        seed='for "sample": of the first row; the next has one more',
    )
    parser.add_argument("--labels", help="rank these, with commas between, for rows that bring none")
    parser.add_argument("--text", action="store_true", help="lines are inputs, not JSON")
    parser.add_argument("--interactive", action="store_true", help="answer typed lines")
    parser.add_argument("--input", type=Path, help="a file of rows, in place of stdin")
    parser.add_argument("--output", type=Path, help="a new file of answers, in place of stdout")
    parser.add_argument("--resume", action="store_true", help="go on with an --output that was broken off")
    return parser.parse_args(argv)


def main() -> None:
    keep_compiled_programs()
    with flag_errors():
        run(parse(sys.argv[1:]))


def run(arguments: argparse.Namespace) -> None:
    """Reads, answers, writes."""
    if arguments.resume and not arguments.output:
        raise ValueError("--resume goes on with an --output, and none is given")
    if arguments.output and arguments.output.exists() and not arguments.resume:
        raise ValueError(f"{arguments.output} is there already: set --output to a new file, or give --resume to go on")
    with contextlib.ExitStack() as files:
        lines = sys.stdin.buffer
        if arguments.input:
            if not arguments.input.is_file():
                raise ValueError(f"no file {arguments.input}: set --input to a file of rows")
            lines = files.enter_context(open(arguments.input, "rb"))
        labels = tuple(arguments.labels.split(",")) if arguments.labels is not None else None
        sampling = (arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
        decoding = Decoding(arguments.decode, arguments.beams, *sampling, labels)
        predictor, folder = load_predictor(arguments, decoding, arguments.prompt)
        print_broken(folder.broken if folder else {})
        if arguments.interactive:
            return converse(predictor, arguments.prompt)
        rows = read_rows(lines, arguments.text)
        target: BinaryIO = sys.stdout.buffer
        done: list[dict[str, Any]] = []
        if arguments.output:
            if arguments.resume and arguments.output.exists():
                done = whole_lines(arguments.output)
            skip(rows, done, arguments.output)
            target = files.enter_context(open(arguments.output, "ab"))
        answer_all(predictor, rows, target, done)


def read_rows(lines: Iterable[bytes], text: bool) -> Iterator[tuple[int, Any]]:
    """Each line's number, from 0, and its row; a ValueError for a line that is none. Blank lines are no rows."""
    for number, line in enumerate(lines):
        try:
            line = (line.removeprefix(codecs.BOM_UTF8) if number == 0 else line).decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield number, ValueError(f"line {number + 1} is not UTF-8 (byte {error.start}), expected a row")
            continue
        if not line.strip():
            continue
        if text:
            yield number, {"inputs": line}
            continue
        try:
            yield number, read_json(line)
        except ValueError as error:
            yield (
                number,
                ValueError(f"line {number + 1} is not JSON ({error}), expected a row; lines of text need --text"),
            )


def windows(rows: Iterable[tuple[int, Any]], size: int) -> Iterator[list[tuple[int, Any]]]:
    """The rows in lists: up to `size` of them, but as few as there are where the next ones are not there yet.

    So whoever writes a row and waits gets its answer.
    """
    waiting: queue.Queue = queue.Queue(2 * size)
    end = object()

    def read() -> None:
        try:
            for row in rows:
                waiting.put(row)
            waiting.put(end)
        except Exception as error:
            waiting.put(error)

    threading.Thread(target=read, daemon=True).start()
    ended = False
    while not ended:
        window = [waiting.get()]
        with contextlib.suppress(queue.Empty):
            while len(window) < size and window[-1] is not end and not isinstance(window[-1], Exception):
                window.append(waiting.get(timeout=WAIT))
        last = window[-1]
        ended = last is end or isinstance(last, Exception)
        if ended:
            window.pop()
        if window:
            yield window
        if isinstance(last, Exception):
            raise last


def answer_all(
    predictor: Predictor, rows: Iterable[tuple[int, Any]], target: BinaryIO, done: Sequence[dict[str, Any]] = ()
) -> None:
    """Writes the answers in order, and says on stderr how far it is.

    Args:
      done: the answers that `target` has already.

    Raises:
      ValueError: there are rows, and each of them has an error in place of an answer.
    """
    answered, failed, first = 0, 0, ""

    def count(answers: Sequence[dict[str, Any]]) -> None:
        nonlocal answered, failed, first
        errors = [answer["error"] for answer in answers if "error" in answer]
        answered, failed, first = answered + len(answers), failed + len(errors), first or "".join(errors[:1])

    count(done)
    started = said = time.monotonic()
    with tqdm(disable=None, unit="row") as bar:
        for window in windows(rows, predictor.batch_size * WINDOW):
            answers = predictor.answer_rows(window)
            target.write(b"".join(map(line_of, answers)))
            target.flush()
            count(answers)
            bar.update(len(answers))
            if bar.disable and time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                rate = (answered - len(done)) / (said - started)
                print(f"{answered:,} rows, {rate:,.1f} per second", file=sys.stderr)
    if failed and failed == answered:
        raise ValueError(f"each of {answered:,} rows has an error in place of an answer, the first: {first}")
    if failed:
        print(f"{failed:,} of {answered:,} rows have an error in place of an answer", file=sys.stderr)


def line_of(answer: dict[str, Any]) -> bytes:
    """An answer as a line of JSON; half a surrogate pair, which UTF-8 cannot hold, stays an escape."""
    return (json.dumps(answer, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The answers in a file; a last line that was broken off is cut from it."""
    data = regular(path).read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    try:
        return [json.loads(line) for line in data[:whole].splitlines()]
    except ValueError:
        raise ValueError(f"{path} holds no answers: set --output to a new file") from None


def skip(rows: Iterator[tuple[int, Any]], done: list[dict[str, Any]], path: Path) -> None:
    """Passes over the rows that are answered already.

    Raises:
      ValueError: the answers are to other rows.
    """
    for answer in done:
        _, row = next(rows, (None, None))
        if row is None or any(answer.get(name) != value for name, value in own_fields(row).items()):
            raise ValueError(f"{path} holds the answers to other rows: set --output to a new file")
    if done:
        print(f"{len(done):,} rows are answered already", file=sys.stderr)


def converse(predictor: Predictor, prompt: str | None) -> None:
    """Answers what is typed, with the prompt that was named last."""
    names = [*predictor.bank]
    prompt = prompt or (names[0] if len(names) == 1 else None)
    print(":prompt NAME switches, :prompts lists, :quit leaves; the prompt is", prompt or "none, the base alone")
    while True:
        try:
            line = input(f"{prompt or 'base'}> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, name = line.partition(" ")
        if command in (":quit", ":q"):
            return
        if command == ":prompts":
            print("  ".join(f"{name} [{length}]" for name, length in predictor.bank.lengths.items()) or "none")
        elif command == ":prompt":
            try:
                predictor.bank.find(name.strip() or None)
                prompt = name.strip() or None
            except ValueError as error:
                print(f"error: {error}")
        elif line:
            answer = predictor.answer_rows([(0, {"prompt": prompt, "inputs": line})])[0]
            print(f"error: {answer['error']}" if "error" in answer else shown(answer))


def shown(answer: dict[str, Any]) -> str:
    """An answer as one reads it."""
    if "probabilities" in answer:
        return "  ".join(f"{label} {share:.3f}" for label, share in answer["probabilities"].items())
    return f"{answer['prediction']}   ({answer['score']:.2f}{', inputs cut' if answer.get('cut') else ''})"


if __name__ == "__main__":
    main()
