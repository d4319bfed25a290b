"""Scoring a finished prompt on a split: by generation, and by ranking the labels where they are a closed set."""

import functools
from typing import Any

import jax.numpy as jnp

from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.checkpoints.base import load_base
from prompt_tuning_jax.prompts.files import read_prompt
from prompt_tuning_jax.prompts.module import SoftPrompt
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.training.evaluation import Evaluator
from prompt_tuning_jax.training.start import open_vocabulary
from prompt_tuning_jax.training.step import PROMPT


def evaluate_prompt(
    *,
    model: Transformer,
    initial_checkpoint_path: str,
    dataset: DatasetConfig,
    prompt_file: str | None = None,
    vocabulary: str | None = None,
    base_dtype: str | None = "auto",
) -> dict[str, Any]:
    """The task's metrics, in per cent.

    Args:
      model: without a `prompt_factory`: the prompt brings its own length.
      prompt_file: a prompt of this base; None for the base as it is.
      vocabulary: None for the one beside the base.
      base_dtype: of the base in memory; see `checkpoints.base.load_base`.

    Returns:
      "generation" and, for a task with labels, "ranking": metrics by name; "no_label": answers that are no label.

    Raises:
      ValueError: something does not fit; the message says what to set.
    """
    words = open_vocabulary(vocabulary, initial_checkpoint_path, model.config)
    prompts = {}
    if prompt_file is not None:
        prompt = read_prompt(prompt_file)
        check_width(prompt_file, prompt.shape, model.config.emb_dim)
        prompts[PROMPT] = jnp.asarray(prompt)
        model = model.clone(prompt_factory=functools.partial(SoftPrompt, length=prompt.shape[0]))
    base = load_base(initial_checkpoint_path, model.config, base_dtype)
    batches = dataset.batches(words)
    evaluator = Evaluator(model, words.decode)
    generation, odd = evaluator.metrics(prompts, base.params, batches)
    result: dict[str, Any] = {
        "task": dataset.mixture_or_task_name,
        "split": dataset.split,
        "examples": len(batches.examples),
        "base_fingerprint": base.fingerprint,
        "prompt": prompt_file,
        "generation": generation,
        "no_label": odd,
    }
    labels = batches.examples.labels
    if labels:
        result["ranking"] = evaluator.rank_metrics(prompts, base.params, batches, labels, words.encode)
    return result


def check_width(path: str, shape: tuple[int, ...], d_model: int) -> None:
    """Raises ValueError where a prompt was trained on another model size."""
    if shape[1] != d_model:
        raise ValueError(
            f"prompt {path} is [{shape[0]}, {shape[1]}], but the base has d_model {d_model}: "
            "it was trained on another model size. Set INITIAL_CHECKPOINT_PATH to the base it was trained on"
        )
