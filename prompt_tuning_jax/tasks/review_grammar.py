"""Generates the demo's sentiment task: short review-like sentences from a small grammar, without a download.

A sentence is a neutral template with one to three sentiment words of one polarity, so only these words determine the
label. About a third of the words occur only in the split `unseen_words`. A model that has memorised the training words
fails on it; a model that knows the language from pre-training does not.
"""

import functools
import re
from collections.abc import Collection, Iterator, Sequence
from random import Random
from typing import NamedTuple, TypeVar

T = TypeVar("T")

LABELS = ("negative", "positive")
SPLIT_SIZES = {"train": 2000, "validation": 500, "unseen_words": 500}

# Words by the slot that they fill in a template. No stem is in both SEEN and UNSEEN: "bored" and "boring" stay
# together.
Words = dict[str, tuple[str, ...]]

NEGATIVE_SEEN: Words = {
    "adjective": (
        "awful", "terrible", "stupid", "boring", "horrible", "ridiculous", "lame", "dull", "pointless", "laughable",
        "pathetic", "predictable", "unfunny", "disappointing", "wooden", "mediocre", "tedious", "dreadful", "lousy",
        "bland", "uninteresting", "incoherent", "forgettable", "pretentious", "unwatchable", "worthless",
    ),
    "adverb": ("poorly", "badly", "horribly", "terribly"),
    "noun": ("waste of time", "mess", "disappointment", "bore", "piece of garbage", "joke"),
    "reaction": ("hated", "disliked", "was bored by", "was disappointed by"),
    "effect": ("wasted my time", "made no sense", "fell flat", "put me to sleep", "bored me"),
}  # fmt: skip
NEGATIVE_UNSEEN: Words = {
    "adjective": (
        "atrocious", "amateurish", "embarrassing", "annoying", "unconvincing", "irritating", "inept", "idiotic",
        "ludicrous", "uninspired", "appalling", "insulting", "contrived", "obnoxious",
    ),
    "adverb": ("miserably", "painfully", "ineptly"),
    "noun": ("stinker", "flop", "disaster", "insult"),
    "reaction": ("cringed at", "was embarrassed by", "was annoyed by"),
    "effect": ("insulted my intelligence", "got on my nerves", "failed miserably"),
}  # fmt: skip
POSITIVE_SEEN: Words = {
    "adjective": (
        "excellent", "wonderful", "amazing", "perfect", "brilliant", "superb", "terrific", "outstanding", "delightful",
        "charming", "beautiful", "fascinating", "refreshing", "remarkable", "magnificent", "lovely", "compelling",
        "flawless", "exceptional", "marvelous", "splendid", "witty", "touching", "satisfying", "powerful",
    ),
    "adverb": ("wonderfully", "beautifully", "brilliantly", "superbly", "perfectly"),
    "noun": ("masterpiece", "delight", "joy", "must see", "favorite"),
    "reaction": ("loved", "enjoyed", "highly recommend", "was delighted by"),
    "effect": ("held my attention", "won me over", "stole the show", "blew me away"),
}  # fmt: skip
POSITIVE_UNSEEN: Words = {
    "adjective": (
        "fantastic", "stunning", "gorgeous", "breathtaking", "captivating", "gripping", "poignant", "incredible",
        "extraordinary", "spectacular", "fabulous", "adorable", "awesome", "stellar",
    ),
    "adverb": ("impeccably", "expertly", "stunningly"),
    "noun": ("gem", "treat", "triumph", "treasure"),
    "reaction": ("adored", "was moved by", "was impressed by"),
    "effect": ("warmed my heart", "kept me hooked", "took my breath away"),
}  # fmt: skip


# Indexed by label.
SEEN = (NEGATIVE_SEEN, POSITIVE_SEEN)
UNSEEN = (NEGATIVE_UNSEEN, POSITIVE_UNSEEN)
ALL = tuple({slot: seen[slot] + unseen[slot] for slot in seen} for seen, unseen in zip(SEEN, UNSEEN, strict=True))

NEUTRAL: Words = {
    "part": (
        "plot", "acting", "second half", "score", "script", "dialogue", "ending", "opening scene", "camera work",
        "editing", "lead actor", "supporting cast", "direction", "pacing", "story", "soundtrack", "first hour",
        "final act", "set design", "wardrobe", "casting", "narration", "car chase", "dinner scene", "voice work",
    ),
    "genre": (
        "comedy", "western", "drama", "thriller", "musical", "mystery", "war film", "documentary", "crime story",
        "road movie", "science fiction film", "horror film", "period piece", "cartoon", "family film",
    ),
    "role": (
        "detective", "teacher", "sheriff", "older sister", "pilot", "doctor", "neighbor", "soldier", "journalist",
        "boxer", "landlord", "lawyer", "king", "mother", "young student",
    ),
    "craft": ("written", "acted", "directed", "shot", "edited", "cast", "staged", "photographed"),
    "when": (
        "last night", "on sunday", "last week", "in the spring", "on tuesday", "after work", "a few days ago",
        "this summer", "over the weekend", "in school",
    ),
    "where": (
        "at home", "at the theater", "on television", "on a plane", "with my brother", "with two friends", "on cable",
        "in a hotel", "on tape", "at my office",
    ),
}  # fmt: skip

# As in SST-2, there is a space before each punctuation mark.
TEMPLATES = (
    "i saw this {genre} {when} and the {part} was {adjective} .",
    "we watched it {where} {when} , and i {reaction} the {part} .",
    "the {part} of this {genre} was {adjective} and the {part} {effect} .",
    "this {genre} about a {role} and a {role} is a {noun} .",
    "a {adjective} {genre} about a {role} , and the {part} is {adjective} .",
    "the actor who played the {role} was {adjective} in this {genre} .",
    "it is a {adverb} {craft} {genre} , and the {part} {effect} .",
    "the {genre} , set in a small town , was {adverb} {craft} .",
    "i watched this {genre} {where} , and the whole thing {effect} .",
    "what more can i say ? the {part} was {adjective} .",
    "the {role} and the {role} meet in a {adjective} {genre} from the seventies .",
    "the {part} was {adjective} , the {part} was {adjective} and i {reaction} the {part} .",
    "my sister said the {genre} was {adjective} , and i found the {part} {adjective} .",
    "the {part} was {adjective} , and this {genre} {effect} .",
    "this {genre} , which i saw {where} , is a {adjective} {noun} .",
    "every scene with the {role} {effect} , and i {reaction} the {part} .",
    "a {noun} of a {genre} , {adverb} {craft} from start to finish .",
    "{when} i rented a {genre} about a {role} and i {reaction} it .",
    "as a {genre} it was {adjective} , and as a story about a {role} it {effect} .",
    "the {part} is {adverb} {craft} , and the scene with the {role} is {adjective} .",
    "we all thought the {role} was {adjective} and the {part} was {adverb} {craft} .",
    "i {reaction} the {part} , i {reaction} the {role} , and it {effect} .",
    "{when} , {where} , i saw a {genre} that was a {noun} .",
    "the {role} has a {adjective} scene with the {role} near the end .",
    "this is the {genre} with the {role} in it , and it is {adjective} .",
    "{where} {when} , the {part} {effect} and the {part} was {adjective} .",
    "for a {genre} made in the eighties , the {part} of this one is {adjective} .",
    "both the {part} and the {part} were {adjective} , and the {genre} was a {noun} .",
)


class Sentence(NamedTuple):
    """Holds one example: lower-case text, and its label as an index into `LABELS`."""

    text: str
    label: int


def sentences(split: str) -> list[Sentence]:
    """Returns the sentences of one split, which are the same on every machine.

    Args:
      split: a key of `SPLIT_SIZES`; `unseen_words` draws from the held-out sentiment words only.

    Returns:
      `SPLIT_SIZES[split]` sentences in a fixed shuffled order, half of them per label. No text occurs twice, in one
      split or in two.

    Raises:
      ValueError: `split` is not one of the splits.
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"split {split!r} is unknown: review_grammar has {', '.join(SPLIT_SIZES)}.")
    return list(_splits()[split])


def unlabelled(count: int, seed: int = 0) -> Iterator[str]:
    """Yields `count` sentences from all words, for pre-training. Texts may repeat, but none is in a split."""
    rng = Random(f"unlabelled {seed}")
    labelled = {sentence.text for split in _splits().values() for sentence in split}
    for _ in range(count):
        yield _new_text(rng, _pick(rng, ALL), labelled)


@functools.cache
def _splits() -> dict[str, tuple[Sentence, ...]]:
    """Returns all splits. They are made together because each must avoid the texts of those before it."""
    taken: set[str] = set()
    splits = {}
    for split, size in SPLIT_SIZES.items():
        rng = Random(split)
        words = UNSEEN if split == "unseen_words" else SEEN
        drawn = []
        for label in (0, 1) * (size // 2):
            text = _new_text(rng, words[label], taken)
            taken.add(text)
            drawn.append(Sentence(text, label))
        splits[split] = tuple(sorted(drawn, key=lambda _: rng.random()))
    return splits


def _new_text(rng: Random, words: Words, taken: Collection[str]) -> str:
    """Draws sentences until one is not in `taken`."""
    while (text := _draw(rng, words)) in taken:
        pass
    return text


def _draw(rng: Random, words: Words) -> str:
    """Fills a random template with `words` and neutral words. No word is used twice for the same kind of slot."""
    left = {slot: list(options) for slot, options in (words | NEUTRAL).items()}
    parts = re.split(r"\{(\w+)\}", _pick(rng, TEMPLATES))
    for index in range(1, len(parts), 2):
        options = left[parts[index]]
        options.remove(word := _pick(rng, options))
        parts[index] = word
    return re.sub(r"\ba (?=[aeiou])", "an ", "".join(parts))


def _pick(rng: Random, options: Sequence[T]) -> T:
    # random() is the only method of Random that is guaranteed to give the same numbers in every Python version.
    return options[int(rng.random() * len(options))]
