"""Several prompts of one task as one model (section 6): every example once a prompt in one pass, then a vote."""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int

from prompt_tuning_jax.batches.loader import Batch, Batches
from prompt_tuning_jax.inference.bank import PromptBank, Prompts
from prompt_tuning_jax.inference.labels import label_table, written_labels
from prompt_tuning_jax.prompts.module import SoftPrompt
from prompt_tuning_jax.t5.decoding import greedy
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.t5.scoring import choice_scores
from prompt_tuning_jax.tasks import postprocessors
from prompt_tuning_jax.tasks.vocabularies import Vocabulary


class Ballots(NamedTuple):
    """What each of N prompts answers to the n rows of a split, in order.

    Attributes:
      texts: N lists of n answers.
      scores: their log-probabilities.
    """

    texts: list[list[str]]
    scores: Float[np.ndarray, "N n"]

    def elected(self) -> list[str]:
        """The answer to each row that most prompts give."""
        return [vote(*ballot) for ballot in zip(zip(*self.texts, strict=True), self.scores.T, strict=True)]


def vote(texts: Sequence[str], scores: Sequence[float] | Float[np.ndarray, " N"]) -> str:
    """The commonest text; of several as common, the one whose scores add up to most."""
    counts, sums = collections.Counter(texts), collections.defaultdict(float)
    for text, score in zip(texts, scores, strict=True):
        sums[text] += float(score)
    return max(counts, key=lambda text: (counts[text], sums[text]))


class Ensemble:
    """N prompts of one base, which answer every example together: a batch of B examples is one pass of N x B rows."""

    def __init__(self, model: Transformer, vocabulary: Vocabulary, prompts: Sequence[Float[np.ndarray, "P D"]]):
        """Puts the prompts into one array; compiles nothing yet.

        Args:
          model: without a prompt of its own.
          prompts: of any lengths.
        """
        self._vocabulary = vocabulary
        bank = PromptBank(model.config.emb_dim, capacity=len(prompts))
        for number, prompt in enumerate(prompts):
            bank.add(str(number), prompt)
        rows = np.array([bank.row(str(number)) for number in range(len(prompts))], np.int32)
        model = model.clone(prompt_factory=functools.partial(SoftPrompt, length=1))  # its length is never read

        def replicated(program: Callable, params: Any, prompts: Prompts, inputs: Int[Array, "B T"], *more: Any) -> Any:
            prompt, mask = prompts.take(jnp.repeat(rows, inputs.shape[0]))
            whole = program(model, params, jnp.tile(inputs, (len(rows), 1)), *more, prompt=prompt, prompt_mask=mask)
            return jax.tree.map(lambda x: x.reshape(len(rows), -1, *x.shape[1:]), whole)

        self._prompts = bank.prompts
        self._generate = jax.jit(functools.partial(replicated, greedy), static_argnums=3)
        self._rank = jax.jit(functools.partial(replicated, choice_scores))

    def generated(self, params: Mapping[str, jax.Array], batches: Batches) -> Ballots:
        """The greedy answers; one that is a label, as the task writes it."""
        tree = unflatten_dict(dict(params), sep="/")
        written = written_labels(postprocessors.answers(batches.examples.postprocess) or (), self._vocabulary)

        def answer(batch: Batch) -> tuple[Sequence[Sequence[str]], Float[np.ndarray, "N B"]]:
            tokens, scores = jax.device_get(
                self._generate(tree, self._prompts, batch.inputs, batches.lengths["targets"])
            )
            texts = [[self._vocabulary.decode(row) for row in rows] for rows in tokens]
            return [[written.get(text, text) for text in row] for row in texts], scores

        return _collect(batches, answer)

    def ranked(self, params: Mapping[str, jax.Array], batches: Batches) -> Ballots | None:
        """The best-scored labels; None for a task whose answers are no closed set."""
        labels = postprocessors.answers(batches.examples.postprocess)
        if labels is None:
            return None
        tree = unflatten_dict(dict(params), sep="/")
        table = label_table(labels, self._vocabulary)[None]

        def answer(batch: Batch) -> tuple[Sequence[Sequence[str]], Float[np.ndarray, "N B"]]:
            scores = np.asarray(self._rank(tree, self._prompts, batch.inputs, table))
            best = scores.argmax(axis=2)
            return [[labels[place] for place in row] for row in best], scores.max(axis=2)

        return _collect(batches, answer)


def _collect(batches: Batches, answer: Callable[[Batch], tuple[Any, Any]]) -> Ballots:
    def by_row(batch: Batch) -> list[tuple[Any, Any]]:
        texts, scores = answer(batch)
        return [*zip(zip(*texts, strict=True), scores.T, strict=True)]

    rows = batches.in_order(by_row)
    texts = [[*column] for column in zip(*(texts for texts, _ in rows), strict=True)]
    return Ballots(texts, np.stack([scores for _, scores in rows], axis=1))
