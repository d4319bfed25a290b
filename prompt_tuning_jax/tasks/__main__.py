"""Lists tasks, or shows how a task turns its rows into inputs and targets.

python -m prompt_tuning_jax.tasks [TEXT]        lists tasks and mixtures with TEXT in their names, by module
python -m prompt_tuning_jax.tasks show NAME     shows rows before and after each preprocessor, lengths and labels
"""

import argparse
import collections
import contextlib
import functools
import inspect
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.command_line import Parser, one_line_errors
from prompt_tuning_jax.errors import SettingError, error_text
from prompt_tuning_jax.settings import Count, Natural
from prompt_tuning_jax.tasks import data_check

# TensorFlow reads these when it is imported, which happens only after the command line is parsed.
os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}

EMBEDDED = Path(__file__).parent.parent / "bases" / "nano" / "spiece.model"
MOST = 100_000  # how many rows are read for the statistics
TRAIN = "train"  # other splits should not have the inputs of this split
FLAGS = {
    "mixture_or_task_name": "NAME",
    "mixture_or_task_module": "--module",
    "task_feature_lengths": "--targets_length",
}
WIDTH = 160  # how many characters of a text are shown


def main() -> None:
    arguments = sys.argv[1:]
    with one_line_errors(lambda error: error_text(error, _as_flag)):
        run(arguments)


def _as_flag(name: str) -> str:
    return FLAGS.get(name, f"--{name}")


def run(arguments: list[str]) -> None:
    """Runs the command line and prints its output."""
    try:
        if arguments[:1] == ["show"]:
            lines = show(_show_parser().parse_args(arguments[1:]))
        else:
            parser = Parser("prompt_tuning_jax.tasks", __doc__)
            parser.add_argument("text", nargs="?", default="", help="a part of their names")
            parser.add_argument("--module", help="a module of your own that registers tasks")
            options = parser.parse_args(arguments)
            lines = listing(options.text, options.module)
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_parser() -> argparse.ArgumentParser:
    parser = Parser("prompt_tuning_jax.tasks show", "Shows what a task makes of its rows.")
    parser.add_argument("name")
    parser.add_argument(
        "--vocabulary",
        default=str(EMBEDDED),
        help="spiece.model, tokenizer.json or 'bytes'; the embedded base's",
    )
    parser.add_argument("--data_dir", help="the benchmark's own files; TFDS without it")
    parser.add_argument("--split", help="the task's first without it")
    parser.add_number("inputs_length", Count, 512, "tokens; longer inputs are truncated")
    parser.add_number("targets_length", Count, 64, "tokens; longer targets are truncated")
    parser.add_number("rows", Natural, 3, "how many are shown")
    parser.add_argument("--module", help="a module of your own that registers tasks")
    return parser


def listing(text: str, module: str | None) -> Iterator[str]:
    """Yields lines that list the tasks and mixtures with `text` in their names.

    Names that differ only in their prefix or suffix share a line.

    Raises:
      ValueError: there are no such tasks, or the module does not exist.
    """
    with _quiet():
        from prompt_tuning_jax.tasks import TASK_MODULES, find, module_for

        for one in (*TASK_MODULES, *([module] if module else [])):
            find.import_module(one)
    groups: dict[str, dict[tuple[str, str], list[tuple[str, str, str]]]] = {}
    for name in sorted(find.names()):
        parts = re.fullmatch(r"(mt5_|byt5_|)(taskless_|task_index_|)(.+?)(_examples|)", name)
        if parts and text in name:
            model, wording, stem, suffix = parts.groups()
            group = groups.setdefault(module_for(name) or module or "", {})
            group.setdefault((stem, _facts(name)), []).append((model, wording, suffix))
    if not groups:
        raise ValueError(f"no task has {text!r} in its name; python -m prompt_tuning_jax.tasks lists all")
    for number, (one, tasks) in enumerate(sorted(groups.items())):
        yield f"{chr(10) if number else ''}{one}"
        for (stem, facts), variants in tasks.items():
            models, wordings, suffixes = (list(dict.fromkeys(parts)) for parts in zip(*variants, strict=True))
            if len(variants) == len(models) * len(wordings) * len(suffixes):
                yield f"  {_choice(models)}{_choice(wordings)}{stem}{_choice(suffixes)}"
            else:
                yield from (f"  {model}{wording}{stem}{suffix}" for model, wording, suffix in variants)
            yield f"      {facts}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discards what TensorFlow's libraries write to stderr when they are loaded. Python's exceptions still pass."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _choice(parts: Sequence[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    there = "|".join(part for part in parts if part)
    return f"[{there}]" if "" in parts else f"({there})"


def _facts(name: str) -> str:
    """Returns a line with a task's metrics, splits and labels, or with a mixture's tasks and rates."""
    import seqio

    provider = seqio.get_mixture_or_task(name)
    if isinstance(provider, seqio.Mixture):
        stems = [re.sub(r"^(mt5_|byt5_)?(taskless_|task_index_)?|_examples$", "", task) for task, _ in _rates(provider)]
        rates = [rate for _, rate in _rates(provider)]
        return "mixture of " + ", ".join(f"{stem} {rate:g}" for stem, rate in zip(stems, rates, strict=True))
    parts = [
        "metrics " + (", ".join(_function_name(metric) for metric in provider.metric_fns) or "none"),
        "splits " + ", ".join(provider.splits),
    ]
    labels = _labels(provider)
    return "; ".join([*parts, f"labels {', '.join(labels)}"] if labels else parts)


def _rates(mixture: Any) -> list[tuple[str, float]]:
    return [(task.name, float(mixture.get_rate(task))) for task in mixture.tasks]


def _labels(task: Any) -> tuple[str, ...] | None:
    from prompt_tuning_jax.tasks import postprocessors

    return postprocessors.answers(task.postprocessor) if task.postprocessor else None


def _function_name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def show(options: argparse.Namespace) -> Iterator[str]:
    """Yields lines with rows before and after each preprocessor, token counts, and the distribution of the targets.

    Raises:
      ValueError: the task, split, vocabulary or data does not exist.
    """
    from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary

    words = Vocabulary(options.vocabulary)
    lengths = {"inputs": options.inputs_length, "targets": options.targets_length}
    with _quiet():
        import seqio

        from prompt_tuning_jax.tasks import find, sources
    sources.set_data_dir(options.data_dir)
    provider = find.find(options.name, [options.module] if options.module else [])
    if isinstance(provider, seqio.Mixture):
        yield f"{provider.name}, a mixture; show one of its tasks:"
        yield from (f"  {name}  rate {rate:g}" for name, rate in _rates(provider))
        return
    task = find.with_vocabulary(provider, options.vocabulary)
    split = options.split or next(iter(task.splits))
    if split not in task.splits:
        raise ValueError(f"{task.name} has no split {split!r}, only {', '.join(task.splits)}: set --split")
    yield f"{task.name}, {split}; {_facts(task.name)}"
    yield f"module {find.module_for(task.name) or options.module}, vocabulary {options.vocabulary}"
    with sources.source_errors():
        for number, (step, rows) in enumerate(_stages(task, split, lengths, options.rows)):
            yield f"{chr(10) if step is None else ''}{'source' if step is None else f'{number}. {step}'}"
            for row in rows:
                yield "\n".join(f"  {name}: {_shown(value, words)}" for name, value in row.items()) + "\n"
        yield from _statistics(task, split, lengths, words)


def _stages(
    task: Any, split: str, lengths: dict[str, int], count: int
) -> Iterator[tuple[str | None, list[dict[str, Any]]]]:
    """Yields the source's first rows, with None, and then each preprocessor's name with its first rows."""
    import seqio

    dataset = task.source.get_dataset(split, shuffle=False)
    yield None, _first(dataset, count)
    for step in task.preprocessors:
        if isinstance(step, seqio.CacheDatasetPlaceholder):
            continue
        given = {"sequence_length": lengths, "output_features": task.output_features}
        wanted = inspect.signature(step).parameters
        with seqio.map_seed_manager(0):
            dataset = step(dataset, **{name: value for name, value in given.items() if name in wanted})
        yield _step_name(step), _first(dataset, count)


def _step_name(step: Any) -> str:
    """Returns a preprocessor's name, after the name of the function that made it if there is one."""
    while isinstance(step, functools.partial):
        step = step.func
    name = getattr(step, "__qualname__", type(step).__name__)
    return name.replace(".<locals>.", ": ")


def _first(dataset: Any, count: int) -> list[dict[str, Any]]:
    return [*itertools.islice(dataset.as_numpy_iterator(), count)]


def _shown(value: Any, words: Any) -> str:
    """Returns a field's value as text; tokens are shown as ids and as subwords."""
    import tensorflow as tf

    if isinstance(value, tf.RaggedTensor | tf.compat.v1.ragged.RaggedTensorValue):
        value = value.to_list()
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind == "i":
        pieces = " ".join(words.piece(token) for token in value[:40].tolist())
        return f"{len(value)} ids {_truncate(value.tolist())}\n    {_truncate(pieces)}"
    return _truncate(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return value


def _truncate(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}... ({len(text)} characters)"


def _statistics(task: Any, split: str, lengths: dict[str, int], words: Any) -> Iterator[str]:
    sizes: dict[str, list[np.ndarray]] = {name: [] for name in lengths}
    targets: collections.Counter[str] = collections.Counter()
    check, hashes = data_check.DataCheck(words), []
    for tokens, texts in _tokenized(task, split, lengths):
        for name in lengths:
            sizes[name].append(tokens[name].lengths)
        targets.update(text for text in texts if text is not None)
        check.add(tokens["inputs"], tokens["targets"], texts)
        hashes += data_check.row_hashes(tokens["inputs"])
    if not hashes:
        raise ValueError(f"{split} of {task.name} has no examples: set --split")
    count = len(hashes)
    yield f"{count:,} examples{' counted, there may be more' if count == MOST else ''}"
    yield f"\n{'tokens':10}{'mean':>8}{'50%':>8}{'90%':>8}{'99%':>8}{'most':>8}   truncated to"
    for name, length in lengths.items():
        found = np.concatenate(sizes[name])
        percentiles = "".join(f"{value:8.0f}" for value in np.percentile(found, (50, 90, 99, 100)))
        over = int((found > length).sum())
        yield f"{name:10}{found.mean():8.1f}{percentiles}   {length}: {over:,} ({100 * over / count:.2f}%)"
    labels = _labels(task)
    lines = [*check.lines(), *_label_lines(labels or (), lengths, words)]
    if split != TRAIN and TRAIN in task.splits:
        lines += _shared_lines(task, hashes, lengths)
    yield "\ndata check"
    yield from (f"  {line}" for line in lines or ["nothing found"])
    yield from _distribution(targets, labels, words)


def _tokenized(
    task: Any, split: str, lengths: dict[str, int]
) -> Iterator[tuple[dict[str, data_check.Tokens], list[str | None]]]:
    """Yields the tokens, and the targets as text, of the first `MOST` rows, in batches of 1024 rows."""
    from prompt_tuning_jax.tasks import find

    dataset = task.get_dataset(
        lengths if find.makes_lengths(task) else None, split, shuffle=False, seed=0, trim_output_features=False
    )
    for batch in dataset.take(MOST).ragged_batch(1024):
        tokens = {
            name: data_check.Tokens(batch[name].flat_values.numpy(), batch[name].row_lengths().numpy())
            for name in lengths
        }
        texts: list[str | None] = [None] * len(tokens["inputs"].lengths)
        if "targets_pretokenized" in batch and batch["targets_pretokenized"].shape.rank == 1:
            texts = [text.decode("utf-8", "replace") for text in batch["targets_pretokenized"].numpy()]
        yield tokens, texts


def _label_lines(labels: Iterable[str], lengths: dict[str, int], words: Any) -> Iterator[str]:
    """Yields a line if the length of targets truncates labels. A run refuses labels that become equal by this."""
    try:
        truncated = data_check.check_trimmed_labels(labels, words, lengths)
    except SettingError as error:
        yield error_text(error, _as_flag)
        return
    if truncated:
        yield data_check.truncated_labels_warning(truncated)


def _shared_lines(task: Any, hashes: list[int], lengths: dict[str, int]) -> Iterator[str]:
    """Yields a line with the number of rows whose inputs are also those of a training row, if there are any."""
    from prompt_tuning_jax.tasks import sources

    known: set[int] = set()
    try:
        with sources.source_errors():
            for tokens, _ in _tokenized(task, TRAIN, lengths):
                known.update(data_check.row_hashes(tokens["inputs"]))
    except ValueError as error:  # the file of the training split may be missing, which is no error elsewhere
        yield f"the inputs are not compared with those of {TRAIN}: {error_text(error, _as_flag)}"
        return
    if both := sum(one in known for one in hashes):
        yield data_check.shared_inputs_warning(both, len(hashes))


def _distribution(targets: collections.Counter[str], labels: Iterable[str] | None, words: Any) -> Iterator[str]:
    """Yields lines with the frequency of each label, or of the commonest targets if there are no labels."""
    total = targets.total()
    if not total:
        return
    if labels is None:
        yield f"\n{len(targets):,} different targets, the commonest:"
        rows = targets.most_common(5)
    else:
        yield "\nlabels"
        others = [(text, count) for text, count in targets.most_common() if text not in set(labels)]
        rows = [*((label, targets[label]) for label in labels), *others[:5]]
    for text, count in rows:
        written = words.written(text)
        differs = "" if written == text else f"; in this vocabulary {_truncate(written)}"
        yield f"  {_truncate(text)}  {count:,} ({100 * count / total:.1f}%){differs}"


if __name__ == "__main__":
    main()
