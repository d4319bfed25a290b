"""Text generation and pre-training text: summaries scored by ROUGE, sentence pairs without a label, plain text."""

import json

import pytest
import seqio
from task_rows import examples, register, texts
from tiny import make_tiny

from prompt_tuning_jax.tokenizers.vocabulary import EOS, Vocabulary

register("summarization", "spot", "text")

# Each task, what stands before its document, and its fields as TFDS names them.
SUMMARIES = {
    "xsum_v110_examples": ("summarize:", "document", "summary"),
    "cnn_dailymail_v310_examples": ("summarize:", "article", "highlights"),
    "spot_aeslc_v100": ("aeslc summarize:", "email_body", "subject_line"),
    "spot_billsum_v300": ("billsum summarize:", "text", "summary"),
    "spot_cnn_dailymail_v320": ("cnn_dailymail summarize:", "article", "highlights"),
    "spot_gigaword_v120": ("gigaword summarize:", "document", "summary"),
    "spot_multi_news_v100": ("multi_news summarize:", "document", "summary"),
    "spot_newsroom_v100": ("newsroom summarize:", "text", "summary"),
    "spot_samsum_v100": ("samsum summarize:", "dialogue", "summary"),
}


def write(folder, name, rows):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("task", SUMMARIES)
def test_a_document_is_summarised_as_it_is(tmp_path, task):
    """Line breaks and runs of blanks stay: T5's vocabulary folds them, its text format does not."""
    prefix, document, summary = SUMMARIES[task]
    write(tmp_path, "train.jsonl", [{document: "One  (two).\nThree.", summary: "Some .\nMore .", "id": "x"}])
    assert texts(task, "train", tmp_path) == [{"inputs": f"{prefix} One  (two).\nThree.", "targets": "Some .\nMore ."}]


@pytest.mark.parametrize("task", SUMMARIES)
def test_a_summary_is_scored_by_rouge(task):
    pytest.importorskip("rouge_score")
    registered = seqio.TaskRegistry.get(task)
    (metric,) = registered.metric_fns
    gold = [registered.postprocess_fn(text, example={}, is_target=True) for text in ("a b c .", "d e f .")]
    assert metric(gold, gold) == dict.fromkeys(("rouge1", "rouge2", "rougeLsum"), 100.0)
    assert metric(gold, ["x", "y"]) == dict.fromkeys(("rouge1", "rouge2", "rougeLsum"), 0.0)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"document": "d"}, "train.jsonl, line 1: no field 'summary'; expected document, summary"),
        ({"document": "", "summary": "s"}, "train.jsonl, line 1: an empty or missing text"),
    ],
)
def test_a_bad_row_of_a_summary_is_named(tmp_path, row, message):
    write(tmp_path, "train.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        texts("xsum_v110_examples", "train", tmp_path)


def test_billsum_has_no_validation_split():
    assert set(seqio.TaskRegistry.get("spot_billsum_v300").splits) == {"train", "test", "ca_test"}


def test_white_space_of_sentence_pairs_is_folded(tmp_path):
    write(tmp_path, "snli/train.jsonl", [{"hypothesis": " A\tman \n sleeps", "premise": "B  C", "label": 2}])
    assert texts("spot_snli_v110", "train", tmp_path) == [
        {"inputs": "snli hypothesis: A man sleeps premise: B C", "targets": "contradiction"}
    ]


def test_a_label_outside_the_set_is_refused(tmp_path):
    write(tmp_path, "doc_nli/train.jsonl", [{"hypothesis": "h", "premise": "p", "label": 2}])
    with pytest.raises(ValueError, match=r"train.jsonl, line 1: label 2, expected 0 .. 1"):
        texts("spot_doc_nli_v100", "train", tmp_path)


def test_a_pair_is_scored_by_its_label():
    task = seqio.TaskRegistry.get("spot_snli_v110")
    (metric,) = task.metric_fns
    targets = [task.postprocess_fn(text, example={}, is_target=True) for text in ("entailment", "neutral", "<unk>")]
    assert targets == [0, 1, -1]
    answers = [task.postprocess_fn(text, example={}, is_target=False) for text in ("entailment", "yes", "<unk>")]
    assert metric(targets, answers) == {"accuracy": pytest.approx(100 / 3)}


@pytest.mark.parametrize("name", ["text_span_corruption", "text_prefix_lm"])
def test_plain_text_keeps_documents_apart(tmp_path_factory, tmp_path, name):
    """A document a line; unlike C4's, short ones are not joined: no example holds words of two."""
    tiny = make_tiny(tmp_path_factory)
    words = Vocabulary(tiny.vocabulary)
    documents = [f"{word} " * 8 for word in ("plot", "score", "film", "scene")]
    (tmp_path / "a.txt").write_text("\n".join(documents) + "\n")
    lengths = {"inputs": 24, "targets": 24}
    found = examples(name, "train", tmp_path, tiny.vocabulary, lengths)
    first_sentinel = words.size - 100
    kinds = [{*words.encode(document)} for document in documents]
    for example in found:
        tokens = {*example["inputs"], *example["targets"]} - {EOS}
        tokens = {token for token in tokens if token < first_sentinel}
        assert sum(tokens <= kind for kind in kinds) >= 1
    assert len(found) >= len(documents)
