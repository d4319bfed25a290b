"""Turns rows into `inputs` and `targets`: T5's text formats, span corruption and prefix language modelling."""

import re
from collections.abc import Sequence

import numpy as np
import seqio
import tensorflow as tf

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.tasks import sources
from prompt_tuning_jax.tasks.postprocessors import UNLABELLED
from prompt_tuning_jax.tokenizers.vocabulary import EXTRA_IDS


def label_text(benchmark: str, labels: Sequence[str], columns: Sequence[str] | None = None):
    """Returns T5's format for classification: "sst2 sentence: ..." and the label's name, or `UNLABELLED` for -1.

    Args:
      benchmark: the name in front of the inputs.
      labels: the labels' names, in order.
      columns: the fields to write, in order; None for all fields in alphabetical order.
    """

    @seqio.map_over_dataset
    def to_text(row):
        names = columns or sorted(name for name in row if name not in ("label", "idx"))
        unlabelled = row["label"] < 0
        index = tf.maximum(tf.cast(row["label"], tf.int32), 0)
        target = tf.where(unlabelled, UNLABELLED, tf.gather(list(labels), index))
        return {"inputs": _written(benchmark, row, names), "targets": target} | _numbers(row)

    return to_text


def score_text(benchmark: str, columns: Sequence[str]):
    """Returns T5's format for similarity (STS-B): the score rounded to 0.2, "3.8", or `UNLABELLED` if negative."""

    @seqio.map_over_dataset
    def to_text(row):
        rounded = tf.strings.as_string(tf.round(row["label"] * 5) / 5, precision=1)
        target = tf.where(row["label"] < 0, UNLABELLED, rounded)
        return {"inputs": _written(benchmark, row, columns), "targets": target} | _numbers(row)

    return to_text


def record_text(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Applies T5's format for ReCoRD: one example per answer, or one with the target `UNLABELLED` if there are none.

    The points of the summary, each after a line "@highlight", become sentences of the passage. The field "answers"
    keeps all answers.
    """

    def to_texts(row):
        passage = tf.strings.regex_replace(row["passage"], "([.?!\"'])\n@highlight\n", r"\1 ")
        passage = tf.strings.regex_replace(passage, "\n@highlight\n", ". ")
        entities = tf.strings.reduce_join(row["entities"], separator=", ")
        row = row | {"entities": entities, "passage": passage}
        answers = row["answers"]
        targets = tf.cond(tf.size(answers) > 0, lambda: answers, lambda: tf.constant([UNLABELLED]))
        example = {"inputs": _written("record", row, ("query", "entities", "passage")), "answers": answers}
        count = tf.size(targets)
        repeated = {
            name: tf.repeat(value[tf.newaxis], count, axis=0) for name, value in (example | _numbers(row)).items()
        }
        return repeated | {"targets": targets}

    return dataset.map(to_texts, num_parallel_calls=tf.data.AUTOTUNE).unbatch()


def wsc_text(correct_only: bool):
    """Returns T5's format for WSC as generation: inputs have the pronoun between asterisks, targets the candidate.

    Args:
      correct_only: whether to keep only rows whose candidate is the pronoun's referent, for training.
    """

    @seqio.map_over_dataset
    def to_text(row):
        arguments = [row["text"], row["span2_index"], row["span2_text"]]
        marked = tf.ensure_shape(tf.numpy_function(_marked, arguments, tf.string), ())
        target, label = tf.ensure_shape(row["span1_text"], ()), tf.cast(row["label"], tf.int32)
        return {"inputs": tf.strings.join(["wsc:", marked], " "), "targets": target, "label": label} | _numbers(row)

    def preprocess(dataset: tf.data.Dataset):
        return to_text(dataset.filter(lambda row: row["label"] > 0) if correct_only else dataset)

    return preprocess


def mark_pronoun(text: str, index: int, pronoun: str) -> str:
    """Replaces word `index` of `text`, which is split at spaces, by `*pronoun*`.

    In two sentences of SuperGLUE, the pronoun has a comma or its index is off by one. (T5 has these two sentences in
    its code.) So this takes the word nearest to `index` that begins with the pronoun, and puts a space before its rest.

    Raises:
      ValueError: no word begins with the pronoun.
    """
    words = text.split(" ")
    found = [candidate for candidate, word in enumerate(words) if re.match(rf"{re.escape(pronoun)}(?!\w)", word)]
    if not found:
        raise SettingError(f"WSC: no {pronoun!r} in {text!r}; set ", Setting("data_dir"), " to a sound copy")
    nearest = min(found, key=lambda candidate: abs(candidate - index))
    rest = words[nearest].removeprefix(pronoun)
    words[nearest : nearest + 1] = [f"*{pronoun}*", *([rest] if rest else [])]
    return " ".join(words).rstrip(" ") if rest else " ".join(words)  # as in T5's code for that sentence


@sources.remembered()
def _marked(text: bytes, index: np.integer, pronoun: bytes) -> bytes:
    return mark_pronoun(text.decode("utf-8"), int(index), pronoun.decode("utf-8")).encode("utf-8")


@seqio.map_over_dataset
def pronoun_text(row):
    """Applies T5's format for Definite Pronoun Resolution: that of WSC, with the pronoun's referent as the target."""
    pattern = tf.strings.join([" (", row["pronoun"], ")([ .,])"])
    marked = tf.strings.regex_replace(row["sentence"], pattern, r" *\1*\2", replace_global=False)
    return {"inputs": tf.strings.join(["wsc:", marked], " "), "targets": tf.gather(row["candidates"], row["label"])}


@seqio.map_over_dataset
def strip_markup(example):
    """Removes MultiRC's HTML from `inputs`: <br> becomes a space, <b> and </b> are deleted."""
    text = tf.strings.regex_replace(example["inputs"], "<br>", " ")
    return example | {"inputs": tf.strings.regex_replace(text, "</?b>", "")}


def _written(benchmark: str, row, names: Sequence[str]) -> tf.Tensor:
    """Returns text such as "sst2 sentence: ...": the benchmark's name, then the name and the text of each field."""
    parts = [benchmark]
    for name in names:
        parts += [f"{name}:", row[name]]
    return tf.strings.join(parts, separator=" ")


def _numbers(row) -> dict[str, tf.Tensor]:
    """Returns a row's index as "idx", or its indices as "idx/paragraph" and so on, for metrics and submissions."""
    numbers = row["idx"]
    return (
        {f"idx/{name}": number for name, number in numbers.items()} if isinstance(numbers, dict) else {"idx": numbers}
    )


@seqio.map_over_dataset
def remove_first_word(example):
    """Removes the task's name from the start of `inputs`, as in the `taskless_` formats of the paper's runs."""
    return example | {"inputs": tf.strings.regex_replace(example["inputs"], r"^[^ ]* ", "")}


def sentinel_ids(vocabulary: seqio.Vocabulary, needed: int = 1) -> Sequence[int]:
    """Returns the ids of <extra_id_0>, <extra_id_1> and so on.

    These are the vocabulary's `sentinel_ids` if it has that attribute, and otherwise the last ids, counted down.

    Raises:
      ValueError: there are fewer than `needed` sentinels.
    """
    top = vocabulary.vocab_size - 1
    found = getattr(vocabulary, "sentinel_ids", range(top, top - EXTRA_IDS, -1))
    if len(found) < needed:
        raise SettingError(
            f"the tokenizer has {len(found)} sentinels (<extra_id_0> ...), and the task needs {needed}: set ",
            Setting("mixture_or_task_name"),
            " to another task, or ",
            Setting("vocabulary"),
        )
    return found


def prepend_sentinel(field: str, index: int):
    """Puts `<extra_id_index>` before the tokens of `field`, to mark the task's number or the start of each answer."""

    def preprocess(dataset: tf.data.Dataset, output_features) -> tf.data.Dataset:
        sentinel = sentinel_ids(output_features[field].vocabulary, index + 1)[index]
        return dataset.map(lambda example: example | {field: tf.concat([[sentinel], example[field]], axis=0)})

    return preprocess


def split_documents(length_of):
    """Returns a preprocessor that splits tokenised documents into parts of about equal length.

    Each part has at most `length_of(sequence_length)` tokens.
    """

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
    """Returns the largest number of tokens whose corrupted inputs fit in `inputs_length`.

    The corrupted inputs include the sentinels and the end of sequence.
    """
    tokens = 2
    while True:
        noise, spans = _noise_counts(tokens + 1, density, mean_span)
        if tokens + 1 - noise + spans + 1 > inputs_length:
            return tokens
        tokens += 1


def _noise_counts(length: int, density: float, mean_span: float, sentinels: int = EXTRA_IDS) -> tuple[int, int]:
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), length - noise, sentinels)


def _segment(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the lengths of `parts` non-empty parts of `total`. All such splits are equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupt_spans(
    tokens: np.ndarray,
    rng: np.random.Generator,
    sentinels: Sequence[int],
    density: float = 0.15,
    mean_span: float = 3.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Applies T5's span corruption to one example: kept and noise spans alternate, starting with a kept span.

    Args:
      tokens: int32 [n], n >= 2.
      rng: draws the spans' lengths.
      sentinels: the ids of `<extra_id_0>`, `<extra_id_1>` and so on. They limit the number of spans, which is also at
        most 100.
      density: the fraction of tokens in noise spans.
      mean_span: the mean length of a noise span.

    Returns:
      The inputs, in which each noise span is replaced by its sentinel, and the targets, in which each noise span is
      preceded by its sentinel.
    """
    noise, spans = _noise_counts(len(tokens), density, mean_span, min(len(sentinels), EXTRA_IDS))
    noise_lengths = _segment(noise, spans, rng)
    kept_lengths = _segment(len(tokens) - noise, spans, rng)
    pieces = np.split(tokens, np.cumsum(np.stack([kept_lengths, noise_lengths], axis=1).reshape(-1))[:-1])
    marks = [np.array([sentinel], tokens.dtype) for sentinel in sentinels[:spans]]
    inputs = [part for kept, mark in zip(pieces[0::2], marks, strict=True) for part in (kept, mark)]
    targets = [part for mark, lost in zip(marks, pieces[1::2], strict=True) for part in (mark, lost)]
    return np.concatenate(inputs), np.concatenate(targets)


def split_prefix(
    tokens: np.ndarray, rng: np.random.Generator, max_inputs: int, max_targets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits one example at a random position into inputs and targets, for prefix language modelling.

    The position is uniform among those for which both sides fit. Each side has at least one token.
    """
    low, high = max(1, len(tokens) - max_targets), min(len(tokens) - 1, max_inputs)
    cut = int(rng.integers(low, high + 1)) if high > low else max(low, 1)
    return tokens[:cut], tokens[cut : cut + max_targets]


def _noised(name: str, noise):
    """Returns a SeqIO preprocessor that makes inputs and targets with `noise`, with one seed per example.

    `noise` is called as `noise(tokens, rng, sequence_length, output_features) -> (inputs, targets)`.
    """

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
    """Returns a preprocessor for span corruption of `targets` (T5, section 3.1.4), with the vocabulary's sentinels."""

    def noise(tokens, rng, sequence_length, output_features):
        del sequence_length
        return corrupt_spans(tokens, rng, sentinel_ids(output_features["inputs"].vocabulary), density, mean_span)

    return _noised("span_corruption", noise)


def prefix_lm():
    """Returns a preprocessor for LM adaptation (section 2.2): given a prefix, predict the tokens after it."""

    def noise(tokens, rng, sequence_length, output_features):
        del output_features
        return split_prefix(tokens, rng, sequence_length["inputs"] - 1, sequence_length["targets"] - 1)

    return _noised("prefix_lm", noise)


def _padded(text: tf.Tensor) -> tf.Tensor:
    """Puts spaces around punctuation, then folds runs of white space into one space (T5 `_pad_punctuation`)."""
    return _folded(tf.strings.regex_replace(text, r"([[:punct:]])", r" \1 "))


def _folded(text: tf.Tensor) -> tf.Tensor:
    return tf.strings.regex_replace(text, r"\s+", " ")


def question_text(name: str | None = None):
    """Returns T5's format for reading comprehension: "question: ... context: ...", and the first answer.

    Rows are those of SQuAD, with answers under "text", or of MRQA, with an id "qid" that becomes "idx". The example
    keeps question, context and answers, with the same spaces around punctuation as in the inputs, because T5 compares
    answers in this form.

    Args:
      name: a task's name to put in front of the inputs, as SPoT does; None for none.
    """

    @seqio.map_over_dataset
    def to_text(row):
        answers = _padded(row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"])
        question, context = _padded(row["question"]), _padded(row["context"])
        ids = {"id": row["id"]} if "id" in row else {"idx": row["qid"], "answer": answers[0]}
        parts = [*([name] if name else []), "question:", question, "context:", context]
        return ids | {
            "inputs": _folded(tf.strings.join(parts, separator=" ")),
            "targets": answers[0],
            "question": question,
            "context": context,
            "answers": answers,
        }

    return to_text


def summary_text(prefix: str, document: str, summary: str):
    """Returns a format with `prefix` and the document as inputs and the summary as targets.

    Args:
      prefix: the text in front of the document, such as "summarize:".
      document, summary: the names of the row's fields.
    """

    @seqio.map_over_dataset
    def to_text(row):
        return {"inputs": tf.strings.join([prefix, row[document]], separator=" "), "targets": row[summary]}

    return to_text


def _label_name(label: tf.Tensor, labels: Sequence[str]) -> tf.Tensor:
    """Returns the label's name, or `UNLABELLED` if the label is negative."""
    if label.dtype == tf.string:  # some TFDS data sets have labels as text
        label = tf.strings.to_number(label, tf.int32)
    label = tf.cast(label, tf.int32)
    return tf.where(label < 0, UNLABELLED, tf.gather(list(labels), tf.maximum(label, 0)))


def pair_text(name: str, first: str, second: str, labels: Sequence[str]):
    """Returns SPoT's format for sentence pairs: "NAME hypothesis: ... premise: ...", with folded white space."""

    @seqio.map_over_dataset
    def to_text(row):
        parts = [name, f"{first}:", row[first], f"{second}:", row[second]]
        return {
            "inputs": _folded(tf.strings.join(parts, separator=" ")),
            "targets": _label_name(row["label"], labels),
        }

    return to_text


def plain_text(labels: Sequence[str]):
    """Returns a format with the unchanged review as inputs and its label's name as targets (recycling's IMDB)."""

    @seqio.map_over_dataset
    def to_text(row):
        return {"inputs": row["text"], "targets": _label_name(row["label"], labels)}

    return to_text


def every_choice(choices: Sequence[str], *, together: bool = False):
    """Returns a preprocessor that makes one example per choice (T5 `rank_classification`).

    The new examples have `inputs`, `targets`, `is_correct` (whether the choice is the answer) and `idx` (the index of
    the original example, and the index of the choice).

    Args:
      choices: the possible answers.
      together: whether to keep all choices in one example, as vectors, for losses over the choices.
    """

    def preprocess(dataset: tf.data.Dataset) -> tf.data.Dataset:
        def expand(number, example):
            indices = tf.range(len(choices))
            return {
                "idx": tf.stack([tf.fill([len(choices)], tf.cast(number, tf.int32)), indices], axis=1),
                "inputs": tf.fill([len(choices)], example["inputs"]),
                "targets": tf.constant(list(choices)),
                "is_correct": tf.constant(list(choices)) == example["targets"],
            }

        dataset = dataset.enumerate().map(expand, num_parallel_calls=tf.data.AUTOTUNE)
        return dataset if together else dataset.unbatch()

    return preprocess


def record_choices(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Makes one example per entity of a passage, in the form of `every_choice`, for rank classification of ReCoRD.

    Several entities of a passage may be correct.
    """

    def choices(number, row):
        def mark(index, example):
            return {
                "idx": tf.cast(tf.stack([number, index]), tf.int32),
                "inputs": example["inputs"],
                "targets": example["targets"],
                "is_correct": tf.reduce_any(example["targets"] == row["answers"]),
            }

        one = tf.data.Dataset.from_tensors(row | {"answers": row["entities"]})
        return record_text(one).enumerate().map(mark)

    return dataset.enumerate().flat_map(choices)


@seqio.map_over_dataset
def choices_last(example):
    """Puts the tokens of all choices into [T, C], padded with 0. T is first: SeqIO truncates the first axis."""
    return example | {name: tf.transpose(example[name].to_tensor()) for name in ("inputs", "targets")}


def concatenate_documents(length_of, documents: int = 128):
    """Returns a preprocessor that joins groups of tokenised documents and splits each group into parts of equal length.

    A group has `documents` documents, and a part `length_of(sequence_length)` tokens. As in T5's span corruption
    (`reduce_concat_tokens`), there is no marker between documents. Only the last part of each group is shorter.
    """

    def preprocess(dataset: tf.data.Dataset, sequence_length) -> tf.data.Dataset:
        limit = length_of(sequence_length)

        def pieces(group):
            tokens = group.flat_values
            whole, rest = tf.size(tokens) // limit, tf.size(tokens) % limit
            lengths = tf.concat([tf.fill([whole], limit), [rest]], axis=0)
            return tf.data.Dataset.from_tensor_slices(tf.RaggedTensor.from_row_lengths(tokens, lengths))

        groups = dataset.map(lambda example: example["targets"]).ragged_batch(documents)
        dataset = groups.flat_map(pieces).filter(lambda piece: tf.size(piece) >= 4)
        return dataset.map(lambda piece: {"targets": piece})

    return preprocess


def text_infilling(density: float = 0.15, mean_span: float = 3.0):
    """Returns BART's text infilling with one sentinel per span: span corruption's inputs, the whole text as targets."""

    def noise(tokens, rng, sequence_length, output_features):
        del sequence_length
        sentinels = sentinel_ids(output_features["inputs"].vocabulary)
        return corrupt_spans(tokens, rng, sentinels, density, mean_span)[0], tokens

    return _noised("text_infilling", noise)


def token_deletion(density: float = 0.15):
    """Returns BART's token deletion: inputs lose each token independently, and targets are the whole text."""

    def noise(tokens, rng, sequence_length, output_features):
        del sequence_length, output_features
        return tokens[rng.random(len(tokens)) >= density], tokens

    return _noised("token_deletion", noise)


def prefix_and_random_label(labels: Sequence[str]):
    """Returns a preprocessor with a random prefix as inputs and a random label as targets (recycling's control)."""

    def noise(tokens, rng, sequence_length, output_features):
        del sequence_length
        prefix, _ = split_prefix(tokens, rng, len(tokens), len(tokens))
        label = labels[rng.integers(len(labels))]
        return prefix, np.array(output_features["targets"].vocabulary.encode(label), np.int32)

    return _noised("prefix_and_random_label", noise)
