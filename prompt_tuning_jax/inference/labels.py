"""A closed set of answers, as tokens and as a vocabulary writes them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.tasks.vocabularies import Vocabulary


def written_labels(labels: Sequence[str], vocabulary: Vocabulary) -> dict[str, str]:
    """Each label by how the vocabulary writes it: one that folds case can never answer "True", only "true".

    Raises:
      ValueError: two labels are written alike.
    """
    written: dict[str, str] = {}
    for label in labels:
        text = vocabulary.written(label)
        if text in written:
            raise SettingError(
                f"the labels {written[text]!r} and {label!r} are both {text!r} in the vocabulary {vocabulary.path}: "
                "set ",
                Setting("initial_checkpoint_path"),
                " or ",
                Setting("vocabulary"),
                " to one that tells them apart",
            )
        written[text] = label
    return written


def label_table(labels: Sequence[str], vocabulary: Vocabulary) -> Int[np.ndarray, "C L"]:
    """The token ids of each label, end of sequence included, then padding: the choices of `scoring.choice_scores`."""
    rows = [[*vocabulary.encode(label), vocabulary.eos_id] for label in labels]
    table = np.full((len(rows), max(map(len, rows))), vocabulary.pad_id, np.int32)
    for row, ids in zip(table, rows, strict=True):
        row[: len(ids)] = ids
    return table
