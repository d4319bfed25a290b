"""Reads the rows, texts and tokenised examples of a registered task from the files of a data folder."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks import sources
from prompt_tuning_jax.tasks.derived import parts_of
from prompt_tuning_jax.tasks.seqio_tokenizer import seqio_vocabulary


def dataset(name: str, split: str, data_dir: Path) -> tf.data.Dataset:
    """Returns the texts of a task, not tokenised."""
    sources.set_data_dir(str(data_dir))
    try:
        task = parts_of(name)
        rows = task.source.get_dataset(split, shuffle=False)
        for step in task.text_format:
            rows = step(rows)
        return rows
    finally:
        sources.set_data_dir(None)


def texts(name: str, split: str, data_dir: Path, count: int = -1) -> list[dict[str, Any]]:
    return [*map(plain, dataset(name, split, data_dir).take(count).as_numpy_iterator())]


def examples(
    name: str, split: str, data_dir: Path, vocabulary: Path, lengths: dict[str, int] | None = None, **options
) -> list[dict[str, Any]]:
    """Returns a task's examples, tokenised with `vocabulary` and not truncated."""
    task = in_vocabulary(name, vocabulary)
    sources.set_data_dir(str(data_dir))
    try:
        options = {"shuffle": False, "seed": 0, "trim_output_features": False} | options
        return list(task.get_dataset(lengths, split, **options).as_numpy_iterator())
    finally:
        sources.set_data_dir(None)


def in_vocabulary(name: str, path: Path) -> seqio.Task:
    task = seqio.TaskRegistry.get(name)
    features = {
        key: feature
        if isinstance(feature.vocabulary, seqio.PassThroughVocabulary)
        else dataclasses.replace(feature, vocabulary=seqio_vocabulary(str(path)))
        for key, feature in task.output_features.items()
    }
    return seqio.Task(
        task.name,
        source=task.source,
        preprocessors=task.preprocessors,
        output_features=features,
        postprocess_fn=task.postprocessor,
        metric_fns=task.metric_fns,
    )


def plain(value: Any) -> Any:
    """Converts bytes to texts and arrays to lists, at any depth."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value.decode() if isinstance(value, bytes) else value


def register(*modules: str) -> None:
    for module in modules:
        importlib.import_module(f"prompt_tuning_jax.tasks.{module}")
