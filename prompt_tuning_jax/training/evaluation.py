"""What a model makes of a split: decoded answers, label scores, and the loss with and without the right inputs."""

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


class Judged(NamedTuple):
    """The rows of a split as its metrics compare them, in order.

    Attributes:
      texts: what was answered; log-likelihoods for a task whose metrics take scores.
      answers, targets: what the task's postprocessor made of the answers and of the targets.
    """

    texts: Sequence[str] | Sequence[float]
    answers: list[Any]
    targets: list[Any]

    def metrics(self, examples: Examples) -> dict[str, float]:
        """The task's metrics by name."""
        return {
            name: value for metric in examples.metrics for name, value in metric(self.targets, self.answers).items()
        }

    def no_label(self) -> collections.Counter[str]:
        """How often each answer that is no label (number, referent) was given."""
        pairs = zip(self.texts, self.answers, strict=True)
        return collections.Counter(
            text for text, answer in pairs if isinstance(text, str) and postprocessors.is_no_label(answer)
        )

    def samples(self, examples: Examples, count: int) -> dict[str, list[dict[str, str]]]:
        """Up to `count` examples each of "right" and "wrong" answers, drawn by chance, the same each time.

        Each has its "inputs", "targets" and "prediction". There are none of a task whose metrics take scores.
        """
        rows = [*zip(self.texts, self.answers, self.targets, examples.fields, strict=True)]
        random.Random(0).shuffle(rows)
        found: dict[str, list[dict[str, str]]] = {"right": [], "wrong": []}
        for text, answer, target, fields in rows:
            place = found["right" if is_right(target, answer) else "wrong"]
            if len(place) < count and isinstance(text, str):
                given = {name: str(fields.get(f"{name}_pretokenized")) for name in ("inputs", "targets")}
                place.append(given | {"prediction": text})
        return found


def judge(examples: Examples, texts: Sequence[str] | Sequence[float]) -> Judged:
    """What the task's postprocessor makes of the answers to the rows of a split."""
    answers, targets = [], []
    by_score = takes_scores(examples)
    for row, text, fields in zip(examples.rows, texts, examples.fields, strict=True):
        if by_score:  # T5's rank classification may divide by the length of the target
            fields = fields | {"targets": examples.targets[row]}
        answers.append(examples.postprocess(text, example=fields, is_target=False))
        targets.append(examples.postprocess(fields["targets_pretokenized"], example=fields, is_target=True))
    return Judged(texts, answers, targets)


def is_right(target: Any, answer: Any) -> bool:
    """Whether an answer is what was asked for; to a question, any of its answers as SQuAD compares them."""
    if isinstance(target, dict):
        target, answer = target["value"], answer["value"]
    if isinstance(target, list):
        return metrics.normalized(answer) in map(metrics.normalized, target)
    return target == answer and not postprocessors.is_no_label(answer)


def takes_scores(examples: Examples) -> bool:
    """Whether the task's metrics compare log-likelihoods of the targets: their second argument is called `scores`."""
    return any([*inspect.signature(metric).parameters][1:2] == ["scores"] for metric in examples.metrics)


def check_labels(tasks: Mapping[str, Batches], vocabulary: Vocabulary) -> None:
    """Raises ValueError where a task has two labels that the vocabulary cannot tell apart."""
    for name, batches in tasks.items():
        try:
            written_labels(postprocessors.answers(batches.examples.postprocess) or (), vocabulary)
        except ValueError as error:
            raise prefixed(f"{name}: ", error) from None


def data_warnings() -> Say | None:
    """Returns what writes a line about the data on stderr; None in all processes but one."""
    return to_stderr if is_writer() else None


class Evaluator:
    """Evaluates what a method gives one model; compiled once per shape."""

    def __init__(self, size: T5Config, tokenizer: Vocabulary, partitioner: Partitioner | OneDevice = ONE_DEVICE):
        """The devices of the partitioner's mesh share the rows of a batch; each process, which has read all of them,
        gets all answers."""
        model = Transformer(size)
        self._tokenizer, self._partitioner, self._engine = tokenizer, partitioner, engine_of(size, partitioner)

        def losses(injection: Injection, frozen: Params, inputs, targets):
            true = batch_loss(model, injection, frozen, inputs, targets)
            # Every row with the inputs of the row before: what is lost is what the encoder had to say.
            other = batch_loss(model, injection, frozen, jnp.roll(inputs, 1, axis=0), targets)
            return true, other

        self._losses = partitioner.jit(losses, out_shardings=partitioner.replicated)

    def _placed(self, *arrays: np.ndarray) -> Sequence[Any]:
        """Returns a batch's arrays on the mesh."""
        return self._partitioner.spread(arrays, len(arrays[0]))

    def answers(self, injection: Injection, frozen: Params, batches: Batches) -> list[str]:
        """Returns the greedy answer to each row of the split, in order; one that is a label, as the task writes it."""
        written = written_labels(postprocessors.answers(batches.examples.postprocess) or (), self._tokenizer)

        def answer(batch) -> list[str]:
            (inputs,) = self._placed(batch.inputs)
            tokens, scores = self._engine.greedy(injection, frozen, inputs, None, batches.lengths["targets"])
            check_finite(scores, batch.ids)
            texts = map(self._tokenizer.decode, np.asarray(tokens))
            return [written.get(text, text) for text in texts]

        return batches.in_order(answer)

    def ranked(self, injection: Injection, frozen: Params, batches: Batches) -> list[str] | None:
        """Returns the best-scored label for each row of the split, in order; None if the answers are no closed set."""
        labels = postprocessors.answers(batches.examples.postprocess)
        if labels is None:
            return None
        table = label_table(labels, self._tokenizer)[None]

        def best(batch) -> list[str]:
            (inputs,) = self._placed(batch.inputs)
            scores = np.asarray(self._engine.rank(injection, frozen, inputs, None, table))
            check_finite(scores, batch.ids)
            return [labels[index] for index in scores.argmax(axis=1)]

        return batches.in_order(best)

    def likelihoods(self, injection: Injection, frozen: Params, batches: Batches) -> list[float]:
        """Returns the log-probability of each row's own targets, end of sequence included, in nats."""

        def likelihood(batch) -> list[float]:
            scores = np.asarray(self._engine.score(injection, frozen, *self._placed(batch.inputs, batch.targets)))
            check_finite(scores, batch.ids)
            return scores.tolist()

        return batches.in_order(likelihood)

    def predictions(self, injection: Injection, frozen: Params, batches: Batches) -> Judged:
        """Returns the answers to the split, generated, or scored if the task's metrics take scores."""
        examples = batches.examples
        predict = self.likelihoods if takes_scores(examples) else self.answers
        return judge(examples, predict(injection, frozen, batches))

    def metrics(
        self, injection: Injection, frozen: Params, batches: Batches
    ) -> tuple[dict[str, float], dict[str, int]]:
        """Returns the task's metrics of the greedy answers, and the commonest answers that are no label."""
        found = self.predictions(injection, frozen, batches)
        return found.metrics(batches.examples), dict(found.no_label().most_common(5))

    def rank_metrics(self, injection: Injection, frozen: Params, batches: Batches) -> dict[str, float] | None:
        """Returns the task's metrics if the answer is the label of the highest score; None if it has no labels."""
        texts = self.ranked(injection, frozen, batches)
        return None if texts is None else judge(batches.examples, texts).metrics(batches.examples)

    def losses(self, injection: Injection, frozen: Params, batches: Batches, limit: int) -> dict[str, float]:
        """Returns nats per target token over the first `limit` batches: the loss, and `encoder_use`, by how much it
        grows when each row is given another row's inputs. A model that ignores its encoder has an `encoder_use` of 0.
        """
        sums = np.zeros(4)
        for number in range(min(limit, len(batches))):
            batch = batches[number]
            true, other = self._losses(injection, frozen, *self._placed(batch.inputs, batch.targets))
            found = np.array([true.loss, other.loss, true.tokens, true.correct], np.float64)
            check_finite(found[None], batch.ids[:1])
            sums += found
        loss, other, tokens, correct = sums
        return {
            "loss": loss / tokens,
            "encoder_use": (other - loss) / tokens,
            "token_accuracy": 100.0 * correct / tokens,
        }
