"""Combines several prompts of one task by majority vote; one batch runs every example with every prompt (section 6)."""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from prompt_tuning_jax.batches.loader import Batch, Batches
from prompt_tuning_jax.inference.bank import PromptBank, batch_of
from prompt_tuning_jax.inference.engine import check_finite, engine_of
from prompt_tuning_jax.inference.labels import label_table, written_labels
from prompt_tuning_jax.methods.method import Injection, Params
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.tasks import postprocessors
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary


class Votes(NamedTuple):
    """Holds the votes: the answer of each of N prompts to each of the n examples of a split, in order.

    Attributes:
      texts: N lists of n answers.
      scores: the log-probability of each answer.
    """

    texts: list[list[str]]
    scores: Float[np.ndarray, "N n"]

    def majority(self) -> list[str]:
        """Returns the majority vote for each example; see `vote`."""
        return [vote(*answers) for answers in zip(zip(*self.texts, strict=True), self.scores.T, strict=True)]


def vote(texts: Sequence[str], scores: Sequence[float] | Float[np.ndarray, " N"]) -> str:
    """Returns the most frequent text; if several are equally frequent, the one with the largest sum of scores."""
    counts, sums = collections.Counter(texts), collections.defaultdict(float)
    for text, score in zip(texts, scores, strict=True):
        sums[text] += float(score)
    return max(counts, key=lambda text: (counts[text], sums[text]))


class Ensemble:
    """Answers every example with N prompts of one base model: B examples run as one batch of N x B rows."""

    def __init__(self, size: T5Config, tokenizer: Vocabulary, prompts: Sequence[Float[np.ndarray, "P D"]]):
        """Keeps the prompts; compiles nothing yet.

        Args:
          size: the configuration of the base model.
          prompts: prompts, which may have different lengths.
        """
        self._tokenizer, self._engine = tokenizer, engine_of(size)
        bank = PromptBank(size.emb_dim)
        for number, prompt in enumerate(prompts):
            bank.add(str(number), prompt)
        self._prompts = [bank.find(str(number)) for number in range(len(prompts))]

    def _replicated(self, inputs: Int[np.ndarray, "B T"]) -> tuple[Injection, Int[np.ndarray, "NB T"], Any]:
        """Returns each prompt with each row of inputs, as the injection, inputs and mask of an engine's programs."""
        prompts = [prompt for prompt in self._prompts for _ in range(len(inputs))]
        injection, mask, _ = batch_of(prompts, len(prompts))
        return injection, np.tile(inputs, (len(self._prompts), 1)), mask

    def _by_prompt(self, answers: Any) -> Any:
        """Reshapes arrays [N B, ...] to [N, B, ...]: by prompt, then by example."""
        return jax.tree.map(lambda x: np.asarray(x).reshape(len(self._prompts), -1, *x.shape[1:]), answers)

    def generated(self, frozen: Params, batches: Batches) -> Votes:
        """Returns the greedy answers; an answer that is a label is spelled as the task spells it."""
        written = written_labels(postprocessors.answers(batches.examples.postprocess) or (), self._tokenizer)

        def answer(batch: Batch) -> tuple[Sequence[Sequence[str]], Float[np.ndarray, "N B"]]:
            injection, inputs, mask = self._replicated(batch.inputs)
            found = self._engine.greedy(injection, frozen, inputs, mask, batches.lengths["targets"])
            tokens, scores = self._by_prompt(found)
            texts = [[self._tokenizer.decode(row) for row in rows] for rows in tokens]
            return [[written.get(text, text) for text in row] for row in texts], scores

        return _collect_votes(batches, answer)

    def ranked(self, frozen: Params, batches: Batches) -> Votes | None:
        """Returns the labels with the highest scores; None for a task that has no fixed set of labels."""
        labels = postprocessors.answers(batches.examples.postprocess)
        if labels is None:
            return None
        table = label_table(labels, self._tokenizer)[None]

        def answer(batch: Batch) -> tuple[Sequence[Sequence[str]], Float[np.ndarray, "N B"]]:
            injection, inputs, mask = self._replicated(batch.inputs)
            scores = self._by_prompt(self._engine.rank(injection, frozen, inputs, mask, table))
            best = scores.argmax(axis=2)
            return [[labels[index] for index in row] for row in best], scores.max(axis=2)

        return _collect_votes(batches, answer)


def _collect_votes(batches: Batches, answer: Callable[[Batch], tuple[Any, Any]]) -> Votes:
    def by_row(batch: Batch) -> list[tuple[Any, Any]]:
        texts, scores = answer(batch)
        check_finite(scores.T, batch.ids)
        return [*zip(zip(*texts, strict=True), scores.T, strict=True)]

    rows = batches.in_order(by_row)
    texts = [[*column] for column in zip(*(texts for texts, _ in rows), strict=True)]
    return Votes(texts, np.stack([scores for _, scores in rows], axis=1))
