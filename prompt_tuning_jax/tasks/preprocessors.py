"""From a row to `inputs` and `targets`: T5's text formats, span corruption and prefix language modelling."""

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
    """T5's format for classification: "sst2 sentence: ... ", and the label's name, `UNLABELLED` where it is -1.

    Args:
      columns: the fields to write, in order; None for all, in alphabetical order.
    """

    @seqio.map_over_dataset
    def to_text(row):
        names = columns or sorted(name for name in row if name not in ("label", "idx"))
        unlabelled = row["label"] < 0
        place = tf.maximum(tf.cast(row["label"], tf.int32), 0)
        target = tf.where(unlabelled, UNLABELLED, tf.gather(list(labels), place))
        return {"inputs": _written(benchmark, row, names), "targets": target} | _numbers(row)

    return to_text


def score_text(benchmark: str, columns: Sequence[str]):
    """T5's format for similarity (STS-B): the score to the nearest 0.2, "3.8"; `UNLABELLED` where it is below 0."""

    @seqio.map_over_dataset
    def to_text(row):
        rounded = tf.strings.as_string(tf.round(row["label"] * 5) / 5, precision=1)
        target = tf.where(row["label"] < 0, UNLABELLED, rounded)
        return {"inputs": _written(benchmark, row, columns), "targets": target} | _numbers(row)

    return to_text


def record_text(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """T5's format for ReCoRD: an example for each answer, or one with the target `UNLABELLED` where there is none.

    The summary's points, each after a line "@highlight", become sentences of the passage. All answers stay in the field
    "answers".
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
    """T5's format for WSC as generation: the pronoun between asterisks, and what it is said to stand for.

    Args:
      correct_only: leave out the rows where it does not stand for that, to train on.
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
    """`text` with `*pronoun*` for its word `index`, words being what lies between blanks.

    Two sentences of SuperGLUE have a comma on the pronoun or its place off by one (T5 writes those two out): the word
    nearest to `index` that begins with the pronoun is taken, and what follows it set off by a blank.

    Raises:
      ValueError: no word begins with the pronoun.
    """
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if re.match(rf"{re.escape(pronoun)}(?!\w)", word)]
    if not places:
        raise SettingError(f"WSC: no {pronoun!r} in {text!r}; set ", Setting("data_dir"), " to a sound copy")
    place = min(places, key=lambda place: abs(place - index))
    rest = words[place].removeprefix(pronoun)
    words[place : place + 1] = [f"*{pronoun}*", *([rest] if rest else [])]
    return " ".join(words).rstrip(" ") if rest else " ".join(words)  # T5's own of that one has no blank at its end


@sources.remembered()
def _marked(text: bytes, index: np.integer, pronoun: bytes) -> bytes:
    return mark_pronoun(text.decode("utf-8"), int(index), pronoun.decode("utf-8")).encode("utf-8")


@seqio.map_over_dataset
def pronoun_text(row):
    """T5's format for Definite Pronoun Resolution: WSC's, with the candidate that the pronoun stands for."""
    pattern = tf.strings.join([" (", row["pronoun"], ")([ .,])"])
    marked = tf.strings.regex_replace(row["sentence"], pattern, r" *\1*\2", replace_global=False)
    return {"inputs": tf.strings.join(["wsc:", marked], " "), "targets": tf.gather(row["candidates"], row["label"])}


@seqio.map_over_dataset
def strip_markup(example):
    """Drops MultiRC's HTML from `inputs`: a blank for <br>, nothing for <b> and </b>."""
    text = tf.strings.regex_replace(example["inputs"], "<br>", " ")
    return example | {"inputs": tf.strings.regex_replace(text, "</?b>", "")}


def _written(benchmark: str, row, names: Sequence[str]) -> tf.Tensor:
    """ "sst2 sentence: ... ": a benchmark's name, then each field after its name."""
    parts = [benchmark]
    for name in names:
        parts += [f"{name}:", row[name]]
    return tf.strings.join(parts, separator=" ")


def _numbers(row) -> dict[str, tf.Tensor]:
    """A row's number, "idx", or numbers, "idx/paragraph" and so on, for metrics and submissions."""
    numbers = row["idx"]
    return (
        {f"idx/{name}": number for name, number in numbers.items()} if isinstance(numbers, dict) else {"idx": numbers}
    )


@seqio.map_over_dataset
def remove_first_word(example):
    """Drops the task's name from the front of `inputs`: the `taskless_` formats of the paper's runs."""
    return example | {"inputs": tf.strings.regex_replace(example["inputs"], r"^[^ ]* ", "")}


def sentinel_ids(vocabulary: seqio.Vocabulary, needed: int = 1) -> Sequence[int]:
    """Returns the ids of <extra_id_0>, <extra_id_1> and so on: the last ids, counted down, unless the tokenizer has
    them elsewhere.

    Raises:
      ValueError: there are fewer than `needed`.
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
    """Puts `<extra_id_index>` before the tokens of `field`: the task's number, or a label that begins every answer."""

    def preprocess(dataset: tf.data.Dataset, output_features) -> tf.data.Dataset:
        sentinel = sentinel_ids(output_features[field].vocabulary, index + 1)[index]
        return dataset.map(lambda example: example | {field: tf.concat([[sentinel], example[field]], axis=0)})

    return preprocess


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


def _noise_counts(length: int, density: float, mean_span: float, sentinels: int = EXTRA_IDS) -> tuple[int, int]:
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), length - noise, sentinels)


def _segment(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of `parts` non-empty pieces of `total`, every split as likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupt_spans(
    tokens: np.ndarray,
    rng: np.random.Generator,
    sentinels: Sequence[int],
    density: float = 0.15,
    mean_span: float = 3.0,
) -> tuple[np.ndarray, np.ndarray]:
    """T5's span corruption of one example: kept and noise spans alternate, a kept one first.

    Args:
      tokens: int32 [n], n >= 2.
      sentinels: the ids of `<extra_id_0>`, `<extra_id_1>` and so on. There are at most as many spans, and at most 100.

    Returns:
      Inputs with each noise span replaced by its sentinel, and targets with each noise span after its sentinel.
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
    """Span corruption of `targets` (T5, section 3.1.4), with the vocabulary's sentinels."""

    def noise(tokens, rng, sequence_length, output_features):
        del sequence_length
        return corrupt_spans(tokens, rng, sentinel_ids(output_features["inputs"].vocabulary), density, mean_span)

    return _noised("span_corruption", noise)


def prefix_lm():
    """LM adaptation (section 2.2): given a prefix, predict what follows."""

    def noise(tokens, rng, sequence_length, output_features):
        del output_features
        return split_prefix(tokens, rng, sequence_length["inputs"] - 1, sequence_length["targets"] - 1)

    return _noised("prefix_lm", noise)


def _padded(text: tf.Tensor) -> tf.Tensor:
    """Punctuation set apart by blanks, then runs of white space folded to one (T5 `_pad_punctuation`)."""
    return _folded(tf.strings.regex_replace(text, r"([[:punct:]])", r" \1 "))


def _folded(text: tf.Tensor) -> tf.Tensor:
    return tf.strings.regex_replace(text, r"\s+", " ")


def question_text(name: str | None = None):
    """T5's format for reading comprehension: "question: ... context: ...", and the first of the answers.

    Rows are SQuAD's, whose answers are under "text", or MRQA's, whose id is "qid" and becomes "idx". Question, context
    and answers stay, padded as the model reads them: that is how T5 compares them.

    Args:
      name: put in front, as SPoT does.
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
    """ "summarize: " and the text as it is; `document` and `summary` name the row's fields."""

    @seqio.map_over_dataset
    def to_text(row):
        return {"inputs": tf.strings.join([prefix, row[document]], separator=" "), "targets": row[summary]}

    return to_text


def _label_name(label: tf.Tensor, labels: Sequence[str]) -> tf.Tensor:
    """The label's name, `UNLABELLED` where it is -1."""
    if label.dtype == tf.string:  # of some TFDS sets
        label = tf.strings.to_number(label, tf.int32)
    label = tf.cast(label, tf.int32)
    return tf.where(label < 0, UNLABELLED, tf.gather(list(labels), tf.maximum(label, 0)))


def pair_text(name: str, first: str, second: str, labels: Sequence[str]):
    """SPoT's format for sentence pairs: "NAME hypothesis: ... premise: ...", white space folded."""

    @seqio.map_over_dataset
    def to_text(row):
        parts = [name, f"{first}:", row[first], f"{second}:", row[second]]
        return {
            "inputs": _folded(tf.strings.join(parts, separator=" ")),
            "targets": _label_name(row["label"], labels),
        }

    return to_text


def plain_text(labels: Sequence[str]):
    """A review as it is, and its label's name (the recycling tasks' IMDB)."""

    @seqio.map_over_dataset
    def to_text(row):
        return {"inputs": row["text"], "targets": _label_name(row["label"], labels)}

    return to_text


def every_choice(choices: Sequence[str], *, together: bool = False):
    """An example for each of `choices`, of which `is_correct` tells the right one (T5 `rank_classification`).

    Args:
      together: all choices of an example as one example of vectors, for losses over the choices.

    Returns:
      A preprocessor to `inputs`, `targets`, `is_correct` and `idx`: the example's number and the choice's.
    """

    def preprocess(dataset: tf.data.Dataset) -> tf.data.Dataset:
        def expand(number, example):
            places = tf.range(len(choices))
            return {
                "idx": tf.stack([tf.fill([len(choices)], tf.cast(number, tf.int32)), places], axis=1),
                "inputs": tf.fill([len(choices)], example["inputs"]),
                "targets": tf.constant(list(choices)),
                "is_correct": tf.constant(list(choices)) == example["targets"],
            }

        dataset = dataset.enumerate().map(expand, num_parallel_calls=tf.data.AUTOTUNE)
        return dataset if together else dataset.unbatch()

    return preprocess


def record_choices(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """ReCoRD for rank classification: an example for each entity of a passage, as `every_choice` makes them.

    Several of them may be right.
    """

    def choices(number, row):
        def mark(place, example):
            return {
                "idx": tf.cast(tf.stack([number, place]), tf.int32),
                "inputs": example["inputs"],
                "targets": example["targets"],
                "is_correct": tf.reduce_any(example["targets"] == row["answers"]),
            }

        one = tf.data.Dataset.from_tensors(row | {"answers": row["entities"]})
        return record_text(one).enumerate().map(mark)

    return dataset.enumerate().flat_map(choices)


@seqio.map_over_dataset
def choices_last(example):
    """All choices' tokens as [T, C], padded with 0: it is the first axis that SeqIO cuts to TASK_FEATURE_LENGTHS."""
    return example | {name: tf.transpose(example[name].to_tensor()) for name in ("inputs", "targets")}


def concatenate_documents(length_of, documents: int = 128):
    """Joins `documents` tokenised documents at a time and cuts them into pieces of `length_of(sequence_length)` tokens.

    As T5's span corruption does (`reduce_concat_tokens`): no marker between documents; only the last piece of each
    group is shorter.
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
    """BART's text infilling with a sentinel a span: the inputs of span corruption, and the whole text as targets."""

    def noise(tokens, rng, sequence_length, output_features):
        del sequence_length
        sentinels = sentinel_ids(output_features["inputs"].vocabulary)
        return corrupt_spans(tokens, rng, sentinels, density, mean_span)[0], tokens

    return _noised("text_infilling", noise)


def token_deletion(density: float = 0.15):
    """BART's token deletion: each token is left out of the inputs on its own, and the whole text is the targets."""

    def noise(tokens, rng, sequence_length, output_features):
        del sequence_length, output_features
        return tokens[rng.random(len(tokens)) >= density], tokens

    return _noised("token_deletion", noise)


def prefix_and_random_label(labels: Sequence[str]):
    """A prefix of any length as inputs, and one of `labels` by chance as targets (the recycling paper's control)."""

    def noise(tokens, rng, sequence_length, output_features):
        del sequence_length
        prefix, _ = split_prefix(tokens, rng, len(tokens), len(tokens))
        label = labels[rng.integers(len(labels))]
        return prefix, np.array(output_features["targets"].vocabulary.encode(label), np.int32)

    return _noised("prefix_and_random_label", noise)
