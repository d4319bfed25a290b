"""Has hand-made rows with the features of TFDS's data sets, for tests of tasks whose data is not available.

The official tasks' texts in fixtures/official_golden_texts.json were made from the first row of each set.
"""

import numpy as np
import seqio
import tensorflow as tf

PAIR = {"sentence1": "S one.", "sentence2": "S two."}
NLI = {"hypothesis": "H.", "premise": "P."}


def _labelled(fields, *labels, dtype=np.int64):
    return [fields | {"label": dtype(label), "idx": np.int32(i)} for i, label in enumerate(labels)]


MNLI = _labelled(NLI, 1, 0, 2)
WSC_TEXT = "Mark told Pete many lies about himself , which Pete included . He was angry."
WSC = {"text": WSC_TEXT, "span2_index": np.int32(12), "span2_text": "He"}
QUESTION = {"question": "When did Rome fall?", "id": "q1", "title": "Rome"}
MRQA = {
    "qid": "q1",
    "subset": "DROP",
    "question": "When did Rome fall?",
    "context": "Rome fell (in 476). [PAR] x",
    "answers": ["476"],
}
C4 = [{"text": f"It was film {i} of the year , and the plot was as dull as the cast ." * 3} for i in range(6)]

ROWS = {
    "glue/cola": _labelled({"sentence": "A b c."}, 1, 0, 1, 0),
    "glue/sst2": _labelled({"sentence": "a fine film . "}, 1, 0),
    "glue/mrpc": _labelled(PAIR, 1, 0),
    "glue/qqp": _labelled({"question1": "Q one?", "question2": "Q two?"}, 1, 0),
    "glue/stsb": _labelled(PAIR, 3.75, 0.0, 5.0, 1.2, dtype=np.float32),
    "glue/mnli": MNLI,
    "glue/mnli_matched": MNLI,
    "glue/mnli_mismatched": MNLI,
    "glue/ax": _labelled(NLI, -1, -1),
    "glue/qnli": _labelled({"question": "Q?", "sentence": "S."}, 0, 1),
    "glue/rte": _labelled(PAIR, 0, 1),
    "glue/wnli": _labelled(PAIR, 0, 1),
    "super_glue/boolq": _labelled({"passage": "Title -- Text.", "question": "is it so"}, 1, 0),
    "super_glue/cb": _labelled(NLI, 2, 0, 1),
    "super_glue/copa": _labelled({"choice1": "C1.", "choice2": "C2.", "premise": "P.", "question": "cause"}, 0, 1),
    "super_glue/multirc": [
        {
            "paragraph": "<b>Sent 1: </b>Para.<br><b>Sent 2: </b>More.",
            "question": "Q?",
            "answer": "A",
            "label": np.int64(label),
            "idx": {"paragraph": np.int32(0), "question": np.int32(i // 2), "answer": np.int32(i)},
        }
        for i, label in enumerate((1, 0, 1))
    ],
    "super_glue/record": [
        {
            "query": "X did @placeholder .",
            "entities": ["Ann", "Bob"],
            "passage": "Pass one.\n@highlight\nHi one\n@highlight\nHi two",
            "answers": answers,
            "idx": {"passage": np.int32(0), "query": np.int32(i)},
        }
        for i, answers in enumerate((["Ann", "Bob"], ["Bob"]))
    ],
    "super_glue/rte": _labelled(NLI, 0, 1),
    "super_glue/axb": _labelled({"sentence1": "P.", "sentence2": "H."}, 0, 1),
    "super_glue/axg": _labelled(NLI, 0, 1),
    "super_glue/wic": [
        row | {"start1": np.int32(0), "end1": np.int32(1), "start2": np.int32(0), "end2": np.int32(1)}
        for row in _labelled(PAIR | {"word": "place"}, 0, 1)
    ],
    "super_glue/wsc.fixed": [
        WSC | {"span1_text": "Mark", "span1_index": np.int32(0), "label": np.int64(1), "idx": np.int32(0)},
        WSC | {"span1_text": "Pete", "span1_index": np.int32(2), "label": np.int64(0), "idx": np.int32(1)},
    ],
    "definite_pronoun_resolution": [
        {
            "sentence": "The bee landed on the flower because it had pollen.",
            "pronoun": "it",
            "candidates": ["The bee", "the flower"],
            "label": np.int64(label),
        }
        for label in (1, 0)
    ],
    "squad/v1.1": [
        QUESTION | {"context": "Rome fell (in 476).", "answers": {"text": ["476"], "answer_start": [np.int32(14)]}},
        QUESTION
        | {
            "context": "Rome fell (in 476).",
            "answers": {"text": ["476", "in 476"], "answer_start": [np.int32(14)] * 2},
        },
    ],
    "mrqa": [MRQA, MRQA | {"qid": "q2", "answers": ["Rome", "476"]}],
    "xsum": [{"document": "Doc.", "summary": "Sum."}, {"document": "Doc two.", "summary": "A film."}],
    "cnn_dailymail": [
        {"article": "Art.", "highlights": "Hi.", "id": "1", "publisher": "cnn"},
        {"article": "Art two.", "highlights": "A film.", "id": "2", "publisher": "cnn"},
    ],
    "c4/en": C4,
    "anli": [row | {"context": "C.", "hypothesis": "H.", "uid": "u"} for row in ({"label": np.int64(0)},)],
    "snli": [NLI | {"label": np.int64(0)}],
    "doc_nli": [NLI | {"label": np.int64(0)}],
    "aeslc": [{"email_body": "Body.", "subject_line": "Subj."}],
    "imdb_reviews/plain_text": [{"text": "Great<br />film.", "label": np.int64(1)}],
}


def rows(tfds_name: str) -> list[dict]:
    """Returns the rows of a TFDS set, such as "glue/sst2:2.0.0"; all sets of MRQA share rows, and so do ANLI's."""
    name = tfds_name.partition(":")[0]
    return ROWS[name if name in ROWS else name.partition("/")[0]]


def dataset(rows: list[dict]) -> tf.data.Dataset:
    """Returns the rows as TFDS does: a list becomes a vector of its own length."""

    def column(values):
        if isinstance(values[0], dict):
            return {name: column([value[name] for value in values]) for name in values[0]}
        return tf.ragged.constant(values) if isinstance(values[0], list) else tf.constant(values)

    return tf.data.Dataset.from_tensor_slices({name: column([row[name] for row in rows]) for name in rows[0]})


def use(monkeypatch, count: int | None = None) -> list[str]:
    """Makes TFDS return the first `count` of these rows for every split.

    Returns:
      A list to which the name of each set is added when it is read.
    """
    asked: list[str] = []

    def get_dataset(self, split, shuffle=True, seed=None, shard_info=None, *, num_epochs=1):
        asked.append(self.tfds_dataset.name)
        return dataset(rows(self.tfds_dataset.name)[:count])

    monkeypatch.setattr(seqio.TfdsDataSource, "get_dataset", get_dataset)
    return asked
