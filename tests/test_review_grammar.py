"""The generated sentiment task: fixed for ever, balanced, and with held-out words that training never shows."""

import hashlib
import re

import pytest

from prompt_tuning_jax.tasks import review_grammar
from prompt_tuning_jax.tasks.review_grammar import SEEN, SPLIT_SIZES, TEMPLATES, UNSEEN, sentences, unlabelled

PINNED_SHA256 = "5b9bc743ef8dbe1b658c6eb675801ef3ffe89435167dcd1561cbf51d9d8c10dc"
# Function words inside sentiment phrases; they carry no sentiment and may be anywhere.
FUNCTION_WORDS = set(
    "a at away by from got in kept left made me my no of on over piece pile put the time to was".split()
)


def phrases(*polarities):
    return [phrase for words in polarities for place in words.values() for phrase in place]


def stem(word):
    """Coarser than a real stemmer, so that it errs on the side of calling two words related."""
    while (shorter := re.sub(r"(ing|ed|ly|e|s|y)$", "", word)) != word and len(shorter) > 1:
        word = shorter
    return word[:5]


def stems(text):
    return {stem(word) for word in re.findall("[a-z]+", text) if word not in FUNCTION_WORDS}


def found(options, text):
    return [phrase for phrase in options if re.search(rf"\b{phrase}\b", text)]


def all_texts():
    return [sentence.text for split in SPLIT_SIZES for sentence in sentences(split)]


def test_the_texts_are_the_same_on_every_machine():
    lines = "".join(f"{s.label}\t{s.text}\n" for split in SPLIT_SIZES for s in sentences(split))
    assert hashlib.sha256(lines.encode()).hexdigest() == PINNED_SHA256


@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_a_split_is_balanced_shuffled_and_plain(split):
    rows = sentences(split)
    labels = [row.label for row in rows]
    assert len(rows) == SPLIT_SIZES[split]
    assert sum(labels) * 2 == len(labels)
    assert 0.4 < sum(labels[: len(labels) // 5]) / (len(labels) // 5) < 0.6
    for text, _ in rows:
        assert re.fullmatch(r"[a-z]+( [a-z]+| [,?])* \.", text), text
        assert 8 <= len(re.findall("[a-z]+", text)) <= 20, text


def test_no_text_occurs_twice():
    texts = all_texts()
    assert len(set(texts)) == len(texts) == sum(SPLIT_SIZES.values())


def test_word_lists_are_large_and_disjoint():
    for label in (0, 1):
        words = phrases(SEEN[label], UNSEEN[label])
        assert len(set(words)) == len(words) >= 60
    assert not set(phrases(review_grammar.ALL[0])) & set(phrases(review_grammar.ALL[1]))
    assert not stems(" ".join(phrases(*SEEN))) & stems(" ".join(phrases(*UNSEEN)))


def test_a_template_holds_one_to_three_sentiment_words():
    for template in TEMPLATES:
        places = re.findall(r"\{(\w+)\}", template)
        assert 1 <= sum(place in SEEN[0] for place in places) <= 3, template


def test_neutral_material_holds_no_sentiment():
    neutral = " ".join(re.sub(r"\{\w+\}", " ", text) for text in (*TEMPLATES, *phrases(review_grammar.NEUTRAL)))
    assert not stems(neutral) & stems(" ".join(phrases(*SEEN, *UNSEEN)))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_training_shows_no_unseen_word_or_stem(split):
    text = " ".join(sentence.text for sentence in sentences(split))
    assert not stems(text) & stems(" ".join(phrases(*UNSEEN)))


@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_the_words_give_the_label(split):
    words, others = (UNSEEN, SEEN) if split == "unseen_words" else (SEEN, UNSEEN)
    for text, label in sentences(split):
        assert found(phrases(words[label]), text), text
        assert not found(phrases(words[1 - label], *others), text), text


def test_unlabelled_never_gives_a_text_of_a_split():
    texts = list(unlabelled(5000, seed=3))
    assert len(texts) == 5000
    assert not set(texts) & set(all_texts())
    assert texts == list(unlabelled(5000, seed=3)) != list(unlabelled(5000, seed=4))
    text = " ".join(texts)
    assert found(phrases(*SEEN, *UNSEEN), text) == phrases(*SEEN, *UNSEEN)


def test_an_unknown_split_names_the_known_ones():
    with pytest.raises(ValueError, match="'test' is unknown.*train, validation, unseen_words"):
        sentences("test")
