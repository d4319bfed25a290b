"""Evaluates a model on a split: generated answers, ranked labels, and the loss with right and with shuffled inputs."""

import collections
import inspect
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.batches.cache import to_stderr
from prompt_tuning_jax.batches.dataset import Say
from prompt_tuning_jax.batches.examples import Examples
from prompt_tuning_jax.batches.loader import Batches
from prompt_tuning_jax.errors import prefixed
from prompt_tuning_jax.inference.engine import check_finite, engine_of
from prompt_tuning_jax.inference.labels import label_table, written_labels
from prompt_tuning_jax.methods.method import Injection, Params
from prompt_tuning_jax.parallel.one_device import ONE_DEVICE, OneDevice
from prompt_tuning_jax.parallel.partitioner import Partitioner
from prompt_tuning_jax.parallel.processes import is_writer
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.tasks import metrics, postprocessors
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary
from prompt_tuning_jax.training.step import batch_loss


class Predictions(NamedTuple):
    """Holds the model's answers to all rows of a split, and the targets, in the order of the rows.

    Attributes:
      texts: the answers as text; for a task whose metrics take scores, the log-probability of each row's targets.
      answers, targets: the postprocessed answers and targets, which the metrics compare.
    """

    texts: Sequence[str] | Sequence[float]
    answers: list[Any]
    targets: list[Any]

    def metrics(self, examples: Examples) -> dict[str, float]:
        """Returns the task's metrics by name."""
        return {
            name: value for metric in examples.metrics for name, value in metric(self.targets, self.answers).items()
        }

    def no_label(self) -> collections.Counter[str]:
        """Returns how often each invalid answer was given: a text that is none of the task's labels.

        For some tasks, a valid answer is a number or a referent instead of a label.
        """
        pairs = zip(self.texts, self.answers, strict=True)
        return collections.Counter(
            text for text, answer in pairs if isinstance(text, str) and postprocessors.is_no_label(answer)
        )

    def samples(self, examples: Examples, count: int) -> dict[str, list[dict[str, str]]]:
        """Returns up to `count` random examples with "right" answers, and as many with "wrong" answers.

        The seed is fixed, so the choice is the same each time. Each example has "inputs", "targets" and "prediction".
        Both lists are empty for a task whose metrics take scores.
        """
        rows = [*zip(self.texts, self.answers, self.targets, examples.fields, strict=True)]
        random.Random(0).shuffle(rows)
        found: dict[str, list[dict[str, str]]] = {"right": [], "wrong": []}
        for text, answer, target, fields in rows:
            group = found["right" if is_right(target, answer) else "wrong"]
            if len(group) < count and isinstance(text, str):
                given = {name: str(fields.get(f"{name}_pretokenized")) for name in ("inputs", "targets")}
                group.append(given | {"prediction": text})
        return found


def postprocess(examples: Examples, texts: Sequence[str] | Sequence[float]) -> Predictions:
    """Returns the postprocessed answers and targets of all rows of a split.

    Args:
      examples: the split.
      texts: the answer or the score of each row, in the order of the split.
    """
    answers, targets = [], []
    by_score = takes_scores(examples)
    for row, text, fields in zip(examples.rows, texts, examples.fields, strict=True):
        if by_score:  # T5's rank classification may divide a score by the number of target tokens
            fields = fields | {"targets": examples.targets[row]}
        answers.append(examples.postprocess(text, example=fields, is_target=False))
        targets.append(examples.postprocess(fields["targets_pretokenized"], example=fields, is_target=True))
    return Predictions(texts, answers, targets)


def is_right(target: Any, answer: Any) -> bool:
    """Returns whether a postprocessed answer matches its target.

    If the target is a list, as for a question, the answer must match one of its texts after SQuAD's normalisation.
    """
    if isinstance(target, dict):
        target, answer = target["value"], answer["value"]
    if isinstance(target, list):
        return metrics.normalized(answer) in map(metrics.normalized, target)
    return target == answer and not postprocessors.is_no_label(answer)


def takes_scores(examples: Examples) -> bool:
    """Returns whether the task has a metric of scores, as in SeqIO: its second parameter is called `scores`.

    Such a metric compares the log-probabilities of the targets, and no text is generated.
    """
    return any([*inspect.signature(metric).parameters][1:2] == ["scores"] for metric in examples.metrics)


def check_labels(tasks: Mapping[str, Batches], vocabulary: Vocabulary) -> None:
    """Raises ValueError if a task has two labels that are the same text as the vocabulary writes them."""
    for name, batches in tasks.items():
        try:
            written_labels(postprocessors.answers(batches.examples.postprocess) or (), vocabulary)
        except ValueError as error:
            raise prefixed(f"{name}: ", error) from None


def data_warnings() -> Say | None:
    """Returns a function that writes a line about the data to stderr; None in all processes but process 0."""
    return to_stderr if is_writer() else None


class Evaluator:
    """Evaluates injections into one base model. Each program is compiled once per shape of a batch."""

    def __init__(self, size: T5Config, tokenizer: Vocabulary, partitioner: Partitioner | OneDevice = ONE_DEVICE):
        """Compiles nothing yet.

        Args:
          size: the base model's configuration.
          tokenizer: decodes the answers and encodes the labels.
          partitioner: shards the rows of each batch over its mesh. Every process must have read all rows, and gets all
            answers.
        """
        model = Transformer(size)
        self._tokenizer, self._partitioner, self._engine = tokenizer, partitioner, engine_of(size, partitioner)

        def losses(injection: Injection, frozen: Params, inputs, targets):
            true = batch_loss(model, injection, frozen, inputs, targets)
            # Each row gets the inputs of the previous row. The loss grows by what the decoder took from its own inputs.
            other = batch_loss(model, injection, frozen, jnp.roll(inputs, 1, axis=0), targets)
            return true, other

        self._losses = partitioner.jit(losses, out_shardings=partitioner.replicated)

    def _shard(self, *arrays: np.ndarray) -> Sequence[Any]:
        """Places a batch's arrays on the mesh, and returns them."""
        return self._partitioner.shard_rows(arrays, len(arrays[0]))

    def answers(self, injection: Injection, frozen: Params, batches: Batches) -> list[str]:
        """Returns the greedy answer to each row of the split, in order.

        Some vocabularies change a text, for example to lower case. An answer that is a label as the vocabulary writes
        it is therefore replaced by the task's label.
        """
        written = written_labels(postprocessors.answers(batches.examples.postprocess) or (), self._tokenizer)

        def answer(batch) -> list[str]:
            (inputs,) = self._shard(batch.inputs)
            tokens, scores = self._engine.greedy(injection, frozen, inputs, None, batches.lengths["targets"])
            check_finite(scores, batch.ids)
            texts = map(self._tokenizer.decode, np.asarray(tokens))
            return [written.get(text, text) for text in texts]

        return batches.in_order(answer)

    def ranked(self, injection: Injection, frozen: Params, batches: Batches) -> list[str] | None:
        """Returns the label with the highest log-probability for each row of the split, in order.

        Returns None if the task's answers are not a closed set.
        """
        labels = postprocessors.answers(batches.examples.postprocess)
        if labels is None:
            return None
        table = label_table(labels, self._tokenizer)[None]

        def best(batch) -> list[str]:
            (inputs,) = self._shard(batch.inputs)
            scores = np.asarray(self._engine.rank(injection, frozen, inputs, None, table))
            check_finite(scores, batch.ids)
            return [labels[index] for index in scores.argmax(axis=1)]

        return batches.in_order(best)

    def likelihoods(self, injection: Injection, frozen: Params, batches: Batches) -> list[float]:
        """Returns the log-probability of each row's targets, end of sequence included, in nats."""

        def likelihood(batch) -> list[float]:
            scores = np.asarray(self._engine.score(injection, frozen, *self._shard(batch.inputs, batch.targets)))
            check_finite(scores, batch.ids)
            return scores.tolist()

        return batches.in_order(likelihood)

    def predictions(self, injection: Injection, frozen: Params, batches: Batches) -> Predictions:
        """Returns the answers to the split: log-probabilities if the task's metrics take scores, otherwise texts."""
        examples = batches.examples
        predict = self.likelihoods if takes_scores(examples) else self.answers
        return postprocess(examples, predict(injection, frozen, batches))

    def metrics(
        self, injection: Injection, frozen: Params, batches: Batches
    ) -> tuple[dict[str, float], dict[str, int]]:
        """Returns the metrics of the task's answers, and the five most frequent invalid answers with their counts."""
        found = self.predictions(injection, frozen, batches)
        return found.metrics(batches.examples), dict(found.no_label().most_common(5))

    def rank_metrics(self, injection: Injection, frozen: Params, batches: Batches) -> dict[str, float] | None:
        """Returns the metrics of the labels with the highest log-probabilities; None if the task has no labels."""
        texts = self.ranked(injection, frozen, batches)
        return None if texts is None else postprocess(batches.examples, texts).metrics(batches.examples)

    def losses(self, injection: Injection, frozen: Params, batches: Batches, limit: int) -> dict[str, float]:
        """Returns the loss on the first `limit` batches, and how much of it depends on the encoder.

        Returns:
          "loss", in nats per target token; "encoder_use", the increase of this loss if each row gets another row's
          inputs, which is 0 for a model that ignores its encoder; and "token_accuracy", in per cent.
        """
        sums = np.zeros(4)
        for number in range(min(limit, len(batches))):
            batch = batches[number]
            true, other = self._losses(injection, frozen, *self._shard(batch.inputs, batch.targets))
            found = np.array([true.loss, other.loss, true.tokens, true.correct], np.float64)
            check_finite(found[None], batch.ids[:1])
            sums += found
        loss, other, tokens, correct = sums
        return {
            "loss": loss / tokens,
            "encoder_use": (other - loss) / tokens,
            "token_accuracy": 100.0 * correct / tokens,
        }
