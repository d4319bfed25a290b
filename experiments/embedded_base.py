"""The text and the vocabulary of the embedded base (prompt_tuning_jax/bases/nano).

    python -m experiments.embedded_base --imdb=imdb_train.jsonl.xz --unlabelled=imdb_unsup.txt.xz \
        --articles=enwiki.txt.xz --out=runs/embedded_base

writes OUT/text/*.txt, a document a line, and OUT/spiece.model. The base is then made by the two commands that it
prints. The last HOLDOUT labelled reviews are left out, so that `imdb_reviews_v100` keeps train[-2500:] as a validation set
that the base never saw.

Each piece of a labelled review ends (or, one in five, begins) with what review sites print beside it: the rating in
words, drawn from a few wordings. Sentences of the demo's grammar are in the text too, never with their labels.
"""

import argparse
import json
import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from prompt_tuning_jax.tasks.review_grammar import unlabelled
from prompt_tuning_jax.tasks.vocabularies import EOS, PAD, UNK

HOLDOUT = 2_500
PIECES = 8_192
RATINGS = {
    1: ("awful", "terrible", "worst"),
    2: ("terrible", "very bad", "horrible"),
    3: ("bad", "poor", "weak"),
    4: ("poor", "disappointing", "weak"),
    7: ("good", "nice", "solid"),
    8: ("great", "very good", "strong"),
    9: ("excellent", "wonderful", "superb"),
    10: ("perfect", "best", "brilliant"),
}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 7: "seven", 8: "eight", 9: "nine", 10: "ten"}


def wording(rating: int, rng: random.Random) -> str:
    """The rating as a review site prints it."""
    kind = "positive" if rating > 5 else "negative"
    return rng.choice(
        (
            f"rating: {rng.choice(RATINGS[rating])}",
            f"{NUMBERS[rating]} out of ten",
            f"verdict: {kind}",
            f"a {kind} review",
            f"overall: {kind}",
        )
    )


def pieces(text: str, rng: random.Random) -> Iterator[str]:
    """Runs of whole sentences: often one, sometimes enough for sixty words."""
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", re.sub(r"<br\s*/?>", " ", text)) if s]
    while sentences:
        words, taken, target = 0, [], rng.choice((6, 15, 30, 60))
        while sentences and (not taken or words + len(sentences[0].split()) <= target):
            words += len(sentences[0].split())
            taken.append(sentences.pop(0))
        yield " ".join(" ".join(taken).split())


def rated_reviews(path: Path, rng: random.Random) -> Iterator[str]:
    """Pieces of the labelled reviews, each with its review's rating."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(0).shuffle(rows)  # the order in which the task imdb_reviews_v100 reads them
    for row in rows[:-HOLDOUT]:
        for piece in pieces(row["text"], rng):
            rating = wording(row["rating"], rng)
            yield f"{rating}. {piece}" if rng.random() < 0.2 else f"{piece} {rating}."


def plain(path: Path, rng: random.Random, limit: int) -> Iterator[str]:
    """Pieces of the lines of a text file, the first `limit` lines of three words or more."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if limit and len(line.split()) >= 3:
                limit -= 1
                yield from pieces(line, rng)


def write_text(out: Path, imdb: Path, unlabelled_reviews: Path, articles: Path) -> None:
    """Writes everything in one shuffled file, so that any stretch of it holds all kinds."""
    rng = random.Random(0)
    lines = [
        *rated_reviews(imdb, rng),
        *plain(unlabelled_reviews, rng, 12_000),
        *plain(articles, rng, 60_000),
        *unlabelled(30_000),
    ]
    rng.shuffle(lines)
    (out / "text").mkdir(parents=True, exist_ok=True)
    (out / "text" / "base.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{out / 'text' / 'base.txt'}: {len(lines)} lines, {sum(len(line.split()) for line in lines)} words")


def write_vocabulary(out: Path) -> None:
    """A case-folding unigram vocabulary with T5's special ids."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(out / "text" / "base.txt"),
        model_prefix=str(out / "spiece"),
        vocab_size=PIECES,
        input_sentence_size=200_000,
        shuffle_input_sentence=True,
        normalization_rule_name="nmt_nfkc_cf",
        character_coverage=0.9995,
        pad_id=PAD,
        eos_id=EOS,
        unk_id=UNK,
        bos_id=-1,
        num_threads=2,
        minloglevel=2,
    )
    (out / "spiece.vocab").unlink()
    print(f"{out / 'spiece.model'}: {PIECES} pieces")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("imdb", "unlabelled", "articles", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    write_text(args.out, args.imdb, args.unlabelled, args.articles)
    write_vocabulary(args.out)


if __name__ == "__main__":
    main()
