"""Makes the text and the vocabulary of the embedded base model (prompt_tuning_jax/bases/nano).

    python -m experiments.embedded_base --imdb=imdb_train.jsonl.xz --unlabelled=imdb_unsup.txt.xz \
        --articles=enwiki.txt.xz --out=runs/embedded_base

This writes OUT/text/base.txt for span corruption and OUT/text_lm/base.txt for LM adaptation, with one document per
line, and OUT/spiece.model. It prints the two commands that train the base model. After them,

    python -m experiments.embedded_base --out=runs/embedded_base --pack

puts the base model and its card into the package. The last HOLDOUT labelled reviews are left out, so that train[-2500:]
of `imdb_reviews_v100` is a validation set that the base model never saw.

Labelled reviews are split into parts. Each part ends (or begins, in one of five cases) with the rating in words, in one
of a few wordings that review sites use. The text for LM adaptation has highlights of reviews, followed by the rating;
in half of the cases, the rating is the answer to a question in front: "verdict? <highlight> positive". Both texts have
sentences of the demo's grammar, always without labels.
"""

import argparse
import json
import lzma
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from prompt_tuning_jax.checkpoints.base import EMBEDDED, load_base
from prompt_tuning_jax.checkpoints.huggingface import read_config
from prompt_tuning_jax.tasks.review_grammar import unlabelled
from prompt_tuning_jax.tokenizers.vocabulary import EOS, PAD, UNK

BASE = EMBEDDED["nano"]
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

CARD = """\
# The embedded base: nano

A T5 1.1 with d_model 128, d_ff 256, 2 heads of 64 and 4+4 layers, and an 8,192-piece case-folding SentencePiece
vocabulary, both made by this project, so that a first prompt can be tuned and the tests run with nothing to download.
It is far too small to be useful otherwise.

- Parameters: {parameters:,}, stored in bfloat16 in Hugging Face's layout.
- Fingerprint: `{fingerprint}`.
- Made by `experiments/embedded_base.py`, then `span.gin`, then `lm.gin`: beside this file, what the two runs recorded
  as their configuration; in the source tree, `gin_configs/bases/nano_span.gin` and `nano_lm.gin`.

## Text

Span corruption reads {lines:,} lines, {words:,} words, shuffled:

- IMDB movie reviews (Maas et al. 2011): the labelled training reviews except the last 2,500 in the task's order, cut
  into runs of sentences, each with its review's rating in words as review sites print it (`verdict: positive`, `nine
  out of ten`, `rating: superb`); and 12,000 unlabelled reviews.
- English Wikipedia: 60,000 paragraphs (CC BY-SA 3.0).
- 30,000 sentences of the demo's grammar without labels, none of them in the demo's splits.

LM adaptation reads {lm_lines:,} lines, {lm_words:,} words: of each of the same labelled reviews what a review site
shows at a glance (a run of sentences, its two most telling short sentences, and some telling words, chosen by word
counts over these reviews) with the review's rating after it, half of the time as the answer to a question before it
(`verdict? ... positive`, `would you recommend it? ... no`); and a little of the rest. Its targets are short, so that
what is left to say is often the rating: at this size the decoder does not learn sentiment from running text alone.

So the base has been shown the sentiment of IMDB's training reviews, though not of `train[-2500:]` of
`imdb_reviews_v100`. It has seen neither a label of the demo nor anything of SST-2.

## Training

Loss in nats a target token on held-out lines. `encoder_use` is by how much it grows when each row is given another
row's inputs: 0 for a model that ignores its encoder.

### Span corruption (15%, mean span 3)

{span}

### LM adaptation (prefix LM)

{lm}
"""


def wording(rating: int, rng: random.Random) -> str:
    """Returns the rating in words, in a random wording of review sites."""
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


def question_and_answer(rating: int, rng: random.Random) -> tuple[str, str]:
    """Returns a random question of a review form, and the answer that the rating gives."""
    kind = "positive" if rating > 5 else "negative"
    return rng.choice(
        (
            ("rating?", rng.choice(RATINGS[rating])),
            ("points out of ten?", NUMBERS[rating]),
            ("verdict?", kind),
            ("would you recommend it?", "yes" if rating > 5 else "no"),
        )
    )


def split_into_parts(text: str, rng: random.Random, words: tuple[int, ...] = (6, 15, 30, 60)) -> Iterator[str]:
    """Splits a text into parts of whole sentences, each of at least one; a part's length is drawn from `words`."""
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", re.sub(r"<br\s*/?>", " ", text)) if s]
    while sentences:
        length, taken, target = 0, [], rng.choice(words)
        while sentences and (not taken or length + len(sentences[0].split()) <= target):
            length += len(sentences[0].split())
            taken.append(sentences.pop(0))
        yield " ".join(" ".join(taken).split())


def labelled_reviews(path: Path) -> list[dict]:
    """Returns the labelled reviews in the order of the task imdb_reviews_v100, without the held-out ones."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(0).shuffle(rows)
    return rows[:-HOLDOUT]


def rated_parts(rows: list[dict], rng: random.Random) -> Iterator[str]:
    """Yields parts of the reviews, each with its review's rating."""
    for row in rows:
        for part in split_into_parts(row["text"], rng):
            rating = wording(row["rating"], rng)
            yield f"{rating}. {part}" if rng.random() < 0.2 else f"{part} {rating}."


def rated_highlights(rows: list[dict], rng: random.Random) -> Iterator[str]:
    """Yields highlights of the reviews with the rating at the end, in half of the cases as the answer to a question.

    The highlights of a review are some consecutive sentences, its two most telling short sentences, and a few of its
    most telling words. A word is telling if its log-odds between positive and negative reviews are far from 0, in
    either direction; the rating is always the review's own.
    """
    counts = [Counter(), Counter()]
    for row in rows:
        counts[row["rating"] > 5].update(set(_words(row["text"])))
    telling = {
        word: math.log((counts[1][word] + 5) / (counts[0][word] + 5))
        for word in counts[0] | counts[1]
        if counts[0][word] + counts[1][word] >= 40
    }
    for row in rows:
        text = " ".join(row["text"].split())
        short = [s for s in re.split(r"(?<=[.!?])\s+", text) if 4 <= len(s.split()) <= 25]
        short.sort(key=lambda s: -abs(sum(telling.get(word, 0.0) for word in set(_words(s)))))
        words = sorted(sorted(set(_words(text))), key=lambda word: -abs(telling.get(word, 0.0)))[:8]
        few = rng.sample(words, min(len(words), rng.randint(2, 5)))
        for shown in (rng.choice([*split_into_parts(text, rng, (15, 30, 45))]), *short[:2], ", ".join(few)):
            if rng.random() < 0.5:
                question, answer = question_and_answer(row["rating"], rng)
                yield f"{question} {shown} {answer}"
            else:
                yield f"{shown} {wording(row['rating'], rng)}."


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def unlabelled_parts(path: Path, rng: random.Random, limit: int) -> Iterator[str]:
    """Yields parts of the first `limit` lines of a text file that have three words or more."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if limit and len(line.split()) >= 3:
                limit -= 1
                yield from split_into_parts(line, rng)


def write_text(out: Path, imdb: Path, unlabelled_reviews: Path, articles: Path) -> None:
    """Writes the texts for both parts of training, each as one shuffled file that mixes all kinds of text."""
    rows = labelled_reviews(imdb)
    for folder, rated, reviews, paragraphs, generated in (
        ("text", rated_parts, 12_000, 60_000, 30_000),
        ("text_lm", rated_highlights, 1_000, 3_000, 3_000),
    ):
        rng = random.Random(0)
        lines = [
            *rated(rows, rng),
            *unlabelled_parts(unlabelled_reviews, rng, reviews),
            *unlabelled_parts(articles, rng, paragraphs),
            *unlabelled(generated),
        ]
        rng.shuffle(lines)
        (out / folder).mkdir(parents=True, exist_ok=True)
        (out / folder / "base.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{out / folder / 'base.txt'}: {len(lines)} lines, {sum(len(line.split()) for line in lines)} words")


def write_vocabulary(out: Path) -> None:
    """Trains and writes a case-folding unigram vocabulary with T5's special ids."""
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


def pack(out: Path) -> None:
    """Copies the trained base model and the gin files that made it into the package, and writes its card."""
    shutil.copytree(out / "lm" / "best" / "model", BASE, dirs_exist_ok=True)
    runs = {}
    for name in ("span", "lm"):
        shutil.copyfile(out / name / "config.gin", BASE / f"{name}.gin")
        summary = json.loads((out / name / "summary.json").read_text())
        records = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        rows = [
            f"| {r['step']:,} | {r['loss']:.3f} | {r['encoder_use']:.3f} | {r['token_accuracy']:.1f}% |"
            for r in records
            if r["split"] == "eval"
        ]
        runs[name] = (
            f"{summary['steps']:,} steps, {summary['examples_seen']:,} examples, {summary['seconds'] / 60:.0f} minutes "
            "on 2 CPU cores shared with other work.\n\n"
            "| step | loss | encoder_use | token accuracy |\n|---|---|---|---|\n" + "\n".join(rows)
        )
    base = load_base("nano", read_config(BASE))
    text = (out / "text" / "base.txt").read_text(encoding="utf-8")
    lm_text = (out / "text_lm" / "base.txt").read_text(encoding="utf-8")
    card = CARD.format(
        parameters=sum(int(x.size) for x in base.params.values()),
        fingerprint=base.fingerprint,
        lines=text.count("\n"),
        words=len(text.split()),
        lm_lines=lm_text.count("\n"),
        lm_words=len(lm_text.split()),
        **runs,
    )
    (BASE / "README.md").write_text(card, encoding="utf-8")
    size = sum(path.stat().st_size for path in BASE.iterdir())
    print(f"{BASE}: {size:,} bytes, fingerprint {base.fingerprint}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pack", action="store_true", help="put the trained base into the package")
    for name in ("imdb", "unlabelled", "articles"):
        parser.add_argument(f"--{name}", type=Path)
    args = parser.parse_args()
    if args.pack:
        pack(args.out)
        return
    write_text(args.out, args.imdb, args.unlabelled, args.articles)
    write_vocabulary(args.out)
    train = "python -m prompt_tuning_jax.train --gin_file=bases/nano_"
    words = f"--gin.VOCABULARY=\"'{args.out}/spiece.model'\""
    print(f"{train}span.gin --gin.MODEL_DIR=\"'{args.out}/span'\" --gin.DATA_DIR=\"'{args.out}/text'\" {words}")
    print(
        f"{train}lm.gin --gin.MODEL_DIR=\"'{args.out}/lm'\" --gin.DATA_DIR=\"'{args.out}/text_lm'\" {words} "
        f"--gin.INITIAL_CHECKPOINT_PATH=\"'{args.out}/span/best/model'\""
    )


if __name__ == "__main__":
    main()
