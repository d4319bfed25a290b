"""From a row to `inputs` and `targets`: T5's text formats, span corruption and prefix language modelling."""

from collections.abc import Sequence

import numpy as np
import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks.vocabularies import EXTRA_IDS


def label_text(benchmark: str, labels: Sequence[str]):
    """T5's format for classification: "sst2 sentence: ... " (features in alphabetical order), and the label's name."""

    @seqio.map_over_dataset
    def to_text(row):
        names = sorted(name for name in row if name not in ("label", "idx"))
        parts = [benchmark]
        for name in names:
            parts += [f"{name}:", row[name]]
        unlabelled = row["label"] < 0
        target = tf.where(unlabelled, "<unk>", tf.gather(list(labels), tf.maximum(tf.cast(row["label"], tf.int32), 0)))
        return {"inputs": tf.strings.join(parts, separator=" "), "targets": target, "idx": row["idx"]}

    return to_text


@seqio.map_over_dataset
def remove_first_word(example):
    """Drops the task's name from the front of `inputs`: the `taskless_` formats of the paper's runs."""
    return example | {"inputs": tf.strings.regex_replace(example["inputs"], r"^[^ ]* ", "")}


def split_documents(length_of):
    """Splits tokenised documents into pieces of at most `length_of(sequence_length)` tokens, of about equal length."""

    def preprocess(dataset: tf.data.Dataset, sequence_length) -> tf.data.Dataset:
        limit = length_of(sequence_length)

        def pieces(example):
            tokens = example["targets"]
            count = (tf.size(tokens) + limit - 1) // limit
            size = (tf.size(tokens) + count - 1) // tf.maximum(count, 1)
            return tf.data.Dataset.from_tensor_slices(tokens).batch(tf.cast(tf.maximum(size, 1), tf.int64))

        dataset = dataset.flat_map(pieces).filter(lambda piece: tf.size(piece) >= 4)
        return dataset.map(lambda piece: {"targets": piece})

    return preprocess


def span_corruption_length(inputs_length: int, density: float, mean_span: float) -> int:
    """The most tokens whose corrupted inputs, sentinels and end of sequence included, fit `inputs_length`."""
    tokens = 2
    while True:
        noise, spans = _noise_counts(tokens + 1, density, mean_span)
        if tokens + 1 - noise + spans + 1 > inputs_length:
            return tokens
        tokens += 1


def _noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), length - noise, EXTRA_IDS)


def _segment(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of `parts` non-empty pieces of `total`, every split as likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupt_spans(
    tokens: np.ndarray, rng: np.random.Generator, first_sentinel: int, density: float = 0.15, mean_span: float = 3.0
) -> tuple[np.ndarray, np.ndarray]:
    """T5's span corruption of one example: kept and noise spans alternate, a kept one first.

    Args:
      tokens: int32 [n], n >= 2.
      first_sentinel: `<extra_id_0>`; the following spans count down from it.

    Returns:
      Inputs with each noise span replaced by its sentinel, and targets with each noise span after its sentinel.
    """
    noise, spans = _noise_counts(len(tokens), density, mean_span)
    noise_lengths = _segment(noise, spans, rng)
    kept_lengths = _segment(len(tokens) - noise, spans, rng)
    pieces = np.split(tokens, np.cumsum(np.stack([kept_lengths, noise_lengths], axis=1).reshape(-1))[:-1])
    sentinels = [np.array([first_sentinel - i], tokens.dtype) for i in range(spans)]
    inputs = [part for kept, mark in zip(pieces[0::2], sentinels, strict=True) for part in (kept, mark)]
    targets = [part for mark, lost in zip(sentinels, pieces[1::2], strict=True) for part in (mark, lost)]
    return np.concatenate(inputs), np.concatenate(targets)


def split_prefix(
    tokens: np.ndarray, rng: np.random.Generator, max_inputs: int, max_targets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prefix language modelling of one example: a random cut, before it the inputs, after it the targets.

    The cut is uniform where both sides fit; at least one token lies on either side.
    """
    low, high = max(1, len(tokens) - max_targets), min(len(tokens) - 1, max_inputs)
    cut = int(rng.integers(low, high + 1)) if high > low else max(low, 1)
    return tokens[:cut], tokens[cut : cut + max_targets]


def _noised(name: str, noise):
    """A SeqIO preprocessor that maps `noise(tokens, rng) -> (inputs, targets)` with a seed an example."""

    @seqio.map_over_dataset(num_seeds=1)
    def preprocess(example, sequence_length, output_features, seed):
        def run(tokens, seed):
            rng = np.random.default_rng(np.asarray(seed, np.int64) & 0xFFFFFFFF)
            return noise(tokens, rng, sequence_length, output_features)

        inputs, targets = tf.numpy_function(run, [example["targets"], seed], (tf.int32, tf.int32))
        return {"inputs": tf.ensure_shape(inputs, [None]), "targets": tf.ensure_shape(targets, [None])}

    preprocess.__name__ = name
    return preprocess


def span_corruption(density: float = 0.15, mean_span: float = 3.0):
    """Span corruption of `targets` (T5, section 3.1.4), with sentinels from the top of the vocabulary."""

    def noise(tokens, rng, sequence_length, output_features):
        del sequence_length
        return corrupt_spans(tokens, rng, output_features["inputs"].vocabulary.vocab_size - 1, density, mean_span)

    return _noised("span_corruption", noise)


def prefix_lm():
    """LM adaptation (section 2.2): given a prefix, predict what follows."""

    def noise(tokens, rng, sequence_length, output_features):
        del output_features
        return split_prefix(tokens, rng, sequence_length["inputs"] - 1, sequence_length["targets"] - 1)

    return _noised("prefix_lm", noise)
