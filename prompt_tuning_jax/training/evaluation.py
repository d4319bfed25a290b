"""What a model makes of a split: decoded answers, label scores, and the loss with and without the right inputs."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from prompt_tuning_jax.batches.loader import Batches
from prompt_tuning_jax.t5.decoding import greedy
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.training.loss import token_log_probs
from prompt_tuning_jax.training.step import Params, batch_loss, merge, shift_right


class Evaluator:
    """Evaluates one model; compiled once a shape, for any parameters."""

    def __init__(self, model: Transformer, decode: Callable[[Sequence[int]], str]):
        """`decode` turns token ids into text."""
        self._decode = decode

        @jax.jit
        def losses(trainable: Params, frozen: Params, inputs, targets):
            params = merge(trainable, frozen)
            true = batch_loss(model, params, inputs, targets)
            # Every row with the inputs of the row before: what is lost is what the encoder had to say.
            other = batch_loss(model, params, jnp.roll(inputs, 1, axis=0), targets)
            return true, other

        def tokens(trainable: Params, frozen: Params, inputs, length: int):
            return greedy(model, merge(trainable, frozen), inputs, length)[0]

        self._losses = losses
        self._tokens = jax.jit(tokens, static_argnums=3)
        self._label_scores = jax.jit(
            lambda trainable, frozen, inputs, labels: label_scores(model, merge(trainable, frozen), inputs, labels)
        )

    def answers(self, trainable: Params, frozen: Params, batches: Batches) -> list[str]:
        """The greedy answer to each row of the split, in order."""
        texts = [""] * len(batches.examples)
        for number in range(len(batches)):
            batch = batches[number]
            tokens = np.asarray(self._tokens(trainable, frozen, batch.inputs, batches.lengths["targets"]))
            for at, row in zip(batch.ids, tokens, strict=True):
                if at >= 0:
                    texts[at] = self._decode(row)
        return texts

    def metrics(self, trainable: Params, frozen: Params, batches: Batches) -> tuple[dict[str, float], dict[str, int]]:
        """The task's metrics of the greedy answers, and the commonest answers that are no label."""
        texts = self.answers(trainable, frozen, batches)
        labels = batches.examples.labels
        odd: dict[str, int] = {}
        if labels:
            for text in texts:
                if text not in labels:
                    odd[text] = odd.get(text, 0) + 1
        return batches.examples.score(texts), dict(sorted(odd.items(), key=lambda item: -item[1])[:5])

    def rank_metrics(
        self, trainable: Params, frozen: Params, batches: Batches, labels: Sequence[str], encode: Callable
    ) -> dict[str, float]:
        """The task's metrics where the answer is the label of the highest score."""
        rows = [[*encode(label), 1] for label in labels]
        table = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for row, ids in zip(table, rows, strict=True):
            row[: len(ids)] = ids
        texts = [""] * len(batches.examples)
        for number in range(len(batches)):
            batch = batches[number]
            best = np.asarray(self._label_scores(trainable, frozen, batch.inputs, table)).argmax(axis=1)
            for at, label in zip(batch.ids, best, strict=True):
                if at >= 0:
                    texts[at] = labels[label]
        return batches.examples.score(texts)

    def losses(self, trainable: Params, frozen: Params, batches: Batches, limit: int) -> dict[str, float]:
        """Nats a target token over the first `limit` batches: the loss, and `encoder_use`, by how much it grows when
        each row is given another row's inputs. A model that ignores its encoder has an `encoder_use` of 0."""
        sums = np.zeros(4)
        for number in range(min(limit, len(batches))):
            batch = batches[number]
            true, other = self._losses(trainable, frozen, batch.inputs, batch.targets)
            sums += np.array([true.loss, other.loss, true.tokens, true.correct], np.float64)
        loss, other, tokens, correct = sums
        return {
            "loss": loss / tokens,
            "encoder_use": (other - loss) / tokens,
            "token_accuracy": 100.0 * correct / tokens,
        }


def label_scores(
    model: Transformer, params: dict, inputs: Int[Array, "B T"], labels: Int[Array, "C L"]
) -> Float[Array, "B C"]:
    """The log-probability of each label's tokens, end of sequence included, for each input; one pass of the encoder."""
    variables = {"params": params}
    encoded = model.apply(variables, inputs, enable_dropout=False, method="encode")
    keys = model.apply(variables, encoded, method="project_encoded")

    def score(label: Int[Array, " L"]) -> Float[Array, " B"]:
        targets = jnp.broadcast_to(label, (inputs.shape[0], label.shape[0]))
        logits = model.apply(
            variables, keys, inputs, shift_right(targets), targets, enable_dropout=False, method="decode"
        )
        return jnp.sum(token_log_probs(logits, targets), axis=1)

    return jax.lax.map(score, labels).T
