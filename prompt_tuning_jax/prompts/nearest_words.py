"""Finds what a prompt's positions are near to (section 7): tokens of the frozen vocabulary, class labels, each other.

Everything is measured by cosine. The paper names no measure but "nearest neighbours"; the measures here are:
  chance: the cosine of a random direction and its nearest token. A position that is no nearer has no near token.
  tightness: the mean cosine over the pairs of a position's k nearest tokens; for chance, those of a random direction.
  overlap: the share of their k nearest tokens that two positions have in common.
  cluster: positions that are connected by overlaps of at least a half.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.prompts.initializers import UNKNOWN, Encode
from prompt_tuning_jax.prompts.similarity import (
    Prompt,
    best_match_similarity,
    cosines,
    mean_vector_similarity,
    unit_blocks,
)


class Lexicon(NamedTuple):
    """Holds vectors with names: the tokens of a vocabulary, and after them the class labels that are not one token.

    Attributes:
      words: the tokens' rows of the base model's embedding table, in its dtype; a view of the table if their ids are
        consecutive.
      others: the vectors of labels with several subwords: the mean of the subwords' embeddings, as in `ClassLabels`.
      names: the names of `words`, then those of `others`.
      labels: the index in `names` of each class label; a label of one subword has the index of that token.
    """

    words: Float[np.ndarray, "W D"]
    others: Float[np.ndarray, "n D"]
    names: list[str]
    labels: dict[str, int]

    def vectors(self, indices: Sequence[int] | Int[np.ndarray, " m"]) -> Float[np.ndarray, "m D"]:
        """Returns the vectors with these indices, in float32."""
        words = len(self.words)
        rows = [self.words[index] if index < words else self.others[index - words] for index in indices]
        return np.array(rows, np.float32).reshape(-1, self.words.shape[1])


class Neighbors(NamedTuple):
    """Holds the lexicon indices of each prompt position's k nearest vectors, nearest first, and their cosines."""

    indices: Int[np.ndarray, "P k"]
    cosines: Float[np.ndarray, "P k"]


def make_lexicon(
    embeddings: Float[np.ndarray, "V D"],
    words: Int[np.ndarray, " words"],
    piece: Callable[[int], str],
    encode: Encode | None = None,
    labels: Sequence[str] = (),
    unknown: int | None = UNKNOWN,
) -> Lexicon:
    """Returns the lexicon of a vocabulary's tokens and of `labels`.

    Args:
      embeddings: the frozen base model's embedding table. It may have more rows than there are ids.
      words: the ids of the vocabulary's ordinary tokens, in order: no special tokens, sentinels or padding rows.
      piece: returns the text of an id.
      encode: returns the ids of a label's subwords.
      unknown: the id of <unk>; None if there is none.

    Raises:
      ValueError: a label is empty or has a subword that the vocabulary does not know.
    """
    names, index_of = (
        [piece(token) for token in words.tolist()],
        {token: index for index, token in enumerate(words.tolist())},
    )
    others, indices = [], {}
    for label in labels:
        ids = list(encode(label)) if encode else []
        if not ids or unknown in ids:
            found = "<unk>" if ids else "nothing"
            raise SettingError(
                f"{label!r} tokenises to {found}: set ",
                Setting("class_labels"),
                " to words that the vocabulary can write",
            )
        if len(ids) == 1 and ids[0] in index_of:
            indices[label] = index_of[ids[0]]
        elif label not in indices:
            indices[label] = len(names)
            names.append(label)
            others.append(embeddings[ids].astype(np.float32).mean(axis=0))
    # A view of the table, not a copy, if the ids are consecutive.
    rows = slice(int(words[0]), int(words[-1]) + 1) if len(words) == words[-1] + 1 - words[0] else words
    embedded_words = embeddings[rows]
    others = np.array(others, np.float32).reshape(-1, embeddings.shape[1])
    return Lexicon(embedded_words, others, names, indices)


def describe(
    prompts: Mapping[str, Prompt], earlier: Mapping[str, Prompt], lexicon: Lexicon, top: int
) -> dict[str, Any]:
    """Returns all measures of some prompts, ready for JSON.

    Args:
      prompts: prompts by name, all with one D; lengths may differ.
      earlier: earlier versions of some of the prompts, by the same names and of the same shapes.
      top: number of neighbours per position, k.
    """
    drawn = random_directions(lexicon.words.shape[1])
    chance = nearest(drawn, lexicon, top)
    by_chance = chance.cosines[:, 0]
    report: dict[str, Any] = {
        "words": len(lexicon.words),
        "top": top,
        "chance": {
            "directions": len(drawn),
            "mean": float(by_chance.mean()),
            "largest": float(by_chance.max()),
            "tightness": float(np.mean(tightness(chance, lexicon))) if top > 1 else None,
        },
        "prompts": {},
    }
    for name, prompt in prompts.items():
        described = _describe(prompt, earlier.get(name), lexicon, top)
        firsts = [position["neighbors"][0]["cosine"] for position in described["positions"]]
        described["nearer_than_chance"] = sum(first > float(by_chance.max()) for first in firsts)
        report["prompts"][name] = described
    if len(prompts) > 1:
        for measure in (mean_vector_similarity, best_match_similarity):
            report[measure.__name__] = [[measure(a, b) for b in prompts.values()] for a in prompts.values()]
    return report


def _describe(prompt: Prompt, before: Prompt | None, lexicon: Lexicon, top: int) -> dict[str, Any]:
    stages = {"now": nearest(prompt, lexicon, top)}
    if before is not None:
        stages = {"before": nearest(before, lexicon, top)} | stages
    now = stages["now"]
    positions: list[dict[str, Any]] = [{"neighbors": named} for named in name_neighbors(now, lexicon)]
    if top > 1:
        for position, tight in zip(positions, tightness(now, lexicon), strict=True):
            position["tightness"] = tight
    if before is not None:
        to_before = np.diagonal(cosines(prompt, before))
        for i, named in enumerate(name_neighbors(stages["before"], lexicon)):
            kept = len(np.intersect1d(now.indices[i], stages["before"].indices[i]))
            positions[i] |= {"before": named, "kept": kept, "cosine_to_before": float(to_before[i])}
    return {
        "length": len(prompt),
        "positions": positions,
        "distinct": len(np.unique(now.indices)),
        "shared": [{"word": lexicon.names[index], "positions": on} for index, on in shared(now.indices).items()],
        "clusters": clusters(overlaps(now.indices)),
        "labels": {
            label: {
                stage: np.flatnonzero((found.indices == index).any(axis=1)).tolist() for stage, found in stages.items()
            }
            for label, index in lexicon.labels.items()
        },
    }


def name_neighbors(found: Neighbors, lexicon: Lexicon) -> list[list[dict[str, Any]]]:
    """Returns the neighbours of each position with name and cosine; a neighbour that is a class label also names it."""
    labels = {index: {"label": label} for label, index in lexicon.labels.items()}
    return [
        [
            {"word": lexicon.names[index], "cosine": cosine} | labels.get(index, {})
            for index, cosine in zip(indices, cosines, strict=True)
        ]
        for indices, cosines in zip(found.indices.tolist(), found.cosines.tolist(), strict=True)
    ]


def nearest(prompt: Prompt, lexicon: Lexicon, k: int = 5) -> Neighbors:
    """Returns the `k` vectors of `lexicon` with the largest cosine to each position; the first ones in a tie."""
    parts = [part for part in (lexicon.words, lexicon.others) if len(part)]
    to_all = np.concatenate([cosines(prompt, part) for part in parts], axis=1)
    indices = np.array([_largest(row, k) for row in to_all])
    return Neighbors(indices, np.take_along_axis(to_all, indices, axis=1))


def random_directions(d_model: int, number: int = 100) -> Float[np.ndarray, "n D"]:
    """Returns random vectors whose directions are uniform over the sphere; the same ones in every call."""
    return np.random.default_rng(0).normal(size=(number, d_model)).astype(np.float32)


def tightness(found: Neighbors, lexicon: Lexicon) -> list[float]:
    """Returns, per position, the mean cosine over the pairs of its neighbours, which must be two or more."""
    k = found.indices.shape[1]
    tight = []
    for indices in found.indices:
        unit = np.concatenate(list(unit_blocks(lexicon.vectors(indices)))).astype(np.float64)
        # The squared norm of a sum of unit vectors is the sum of their squared norms plus twice each pair's cosine.
        tight.append(float(np.square(unit.sum(axis=0)).sum() - np.square(unit).sum()) / (k * (k - 1)))
    return tight


def overlaps(indices: Int[np.ndarray, "P k"]) -> Float[np.ndarray, "P P"]:
    """Returns, for each two positions, the share of their `k` neighbours that both have."""
    distinct, column = np.unique(indices, return_inverse=True)
    has = np.zeros((len(indices), len(distinct)), np.float32)
    np.put_along_axis(has, column.reshape(indices.shape), 1.0, axis=1)
    return has @ has.T / indices.shape[1]


def clusters(overlap: Float[np.ndarray, "P P"], least: float = 0.5) -> list[list[int]]:
    """Returns the groups of two or more positions that are connected by overlaps of at least `least`."""
    linked = (overlap >= least) | np.eye(len(overlap), dtype=bool)
    group = np.arange(len(overlap))
    # Each position takes the lowest group number of the positions it is linked to, until no number changes.
    while ((lowest := np.where(linked, group, len(group)).min(axis=1)) != group).any():
        group = lowest
    members = [np.flatnonzero(group == number).tolist() for number in np.unique(group)]
    return [positions for positions in members if len(positions) > 1]


def shared(indices: Int[np.ndarray, "P k"]) -> dict[int, list[int]]:
    """Returns the positions of each vector that is a neighbour of several; vectors with most positions come first."""
    positions = {int(index): np.flatnonzero((indices == index).any(axis=1)).tolist() for index in np.unique(indices)}
    several = {index: where for index, where in positions.items() if len(where) > 1}
    return dict(sorted(several.items(), key=lambda item: -len(item[1])))


def _largest(row: np.ndarray, k: int) -> np.ndarray:
    """Returns the indices of the `k` largest values, in decreasing order; the first ones in a tie."""
    least = np.partition(row, -k)[-k]
    candidates = np.flatnonzero(row >= least)
    return candidates[np.argsort(-row[candidates], kind="stable")][:k]
