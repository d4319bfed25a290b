"""Tests tasks: T5's text formats, rows from the benchmarks' own files, the noise of pre-training, and vocabularies."""

import importlib
import json
import lzma
import shutil

import numpy as np
import pytest
import seqio
import tensorflow as tf
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import LENGTHS

from prompt_tuning_jax.batches.build import build_split, find_task
from prompt_tuning_jax.batches.cache import TaskRequest
from prompt_tuning_jax.tasks import imdb, module_for, preprocessors, review_grammar, sources
from prompt_tuning_jax.tokenizers.vocabulary import EOS, PAD, UNK, Vocabulary

SENTINEL = 31_999  # <extra_id_0> in the tests of noise, whose tokens are much smaller
SENTINELS = range(SENTINEL, SENTINEL - 100, -1)


@pytest.fixture(scope="module")
def t5(data_dir):
    """Returns the vocabulary of the public T5 1.1 checkpoints, as ours and as SeqIO's."""
    path = str(data_dir / "t5" / "spiece.model")
    return Vocabulary(path), seqio.SentencePieceVocabulary(path, extra_ids=100)


@pytest.fixture(autouse=True)
def tfds_again():
    yield
    sources.set_data_dir(None)


def rows(task, split="train", data_dir=None):
    sources.set_data_dir(data_dir and str(data_dir))
    return list(task.source.get_dataset(split, shuffle=False).as_numpy_iterator())


def find_module(name):
    importlib.import_module(module_for(name))
    return seqio.TaskRegistry.get(name)


def columns(name, data_dir):
    """Returns a whole training split as one batch, because TensorFlow is slow row by row."""
    sources.set_data_dir(str(data_dir))
    dataset = find_module(name).source.get_dataset("train", shuffle=False)
    return next(dataset.batch(100_000).as_numpy_iterator())


def examples(tiny, name, split="train", data_dir=None):
    task = find_task(TaskRequest(name, str(tiny.vocabulary), LENGTHS))
    sources.set_data_dir(data_dir and str(data_dir))
    return list(task.get_dataset(None, split, shuffle=False, trim_output_features=False).as_numpy_iterator())


def pretokenized(example):
    return tuple(example[f"{name}_pretokenized"].decode() for name in ("inputs", "targets"))


SST2 = "sentence\tlabel\na fine film . \t1\nit 's \"dull \t0\n"


@pytest.mark.parametrize("prefix, name", [("sst2 ", "glue_sst2_v200"), ("", "taskless_glue_sst2_v200")])
def test_sst2_reads_as_t5_wrote_it(tiny, tmp_path, prefix, name):
    """The space at the end is in GLUE's file and in T5's inputs; a quote is an ordinary character."""
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_text(SST2)
    found = examples(tiny, name, data_dir=tmp_path)
    assert [pretokenized(example) for example in found] == [
        (f"{prefix}sentence: a fine film . ", "positive"),
        (f"{prefix}sentence: it 's \"dull ", "negative"),
    ]
    assert [example["idx"] for example in found] == [0, 1]
    words = Vocabulary(tiny.vocabulary)
    for example in found:
        for feature, text in zip(("inputs", "targets"), pretokenized(example), strict=True):
            assert list(example[feature]) == [*words.encode(text), EOS]


@pytest.mark.parametrize("label, index", [("negative", 0), ("positive", 1), ("positively", -1), ("", -1)])
def test_an_answer_is_a_label_or_minus_one(tiny, label, index):
    for name in ("glue_sst2_v200", "imdb_reviews_v100", "demo_reviews"):
        assert find_task(TaskRequest(name, str(tiny.vocabulary), LENGTHS)).postprocess_fn(label) == index


def test_sst2_of_glue_is_whole(data_dir):
    found = columns("glue_sst2_v200", data_dir / "glue")
    assert len(found["label"]) == 67_349
    assert list(np.bincount(found["label"])) == [29_780, 37_569]
    # The first row, as in TFDS.
    assert (found["sentence"][0], found["label"][0], found["idx"][0]) == (
        b"hide new secretions from the parental units ", 0, 0,
    )  # fmt: skip


# Two rows of each of GLUE's files in GLUE's own format; the texts of the first row are below.
GLUE_FILES = {
    "cola": ("CoLA/train.tsv", ["gj04\t1\t\tA b c.", "gj04\t0\t*\tC b a."]),
    "sst2": ("SST-2/dev.tsv", ["sentence\tlabel", "a fine film . \t1", "dull \t0"]),
    "mrpc": (
        "MRPC/dev.tsv",
        [
            "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
            '1\t7\t8\tHe " said .\tSaid he .',
            "0\t7\t9\tHe .\tShe .",
        ],
    ),
    "qqp": (
        "QQP/train.tsv",
        ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "5\t1\t2\tQ one?\tQ two?\t1", "6\t3\t4\tQ three?\t\t0"],
    ),
    "stsb": (
        "STS-B/dev.tsv",
        [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            "0\tg\tf\ty\to\ts\ts\tS one.\tS two.\t3.750",
            "1\tg\tf\ty\to\ts\ts\tS one.\tS two.\t0",
        ],
    ),
    "mnli_mismatched": (
        "MNLI/dev_mismatched.tsv",
        [
            "index\tpromptID\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label",
            "0\tp\t(x)\tP.\tH.\tentailment\tneutral",
            "1\tp\t(x)\tP.\tH.\tentailment\tcontradiction",
        ],
    ),
    "qnli": (
        "QNLI/train.tsv",
        ["index\tquestion\tsentence\tlabel", "0\tQ?\tS.\tnot_entailment", "1\tQ?\tS.\tentailment"],
    ),
    "rte": ("RTE/train.tsv", ["index\tsentence1\tsentence2\tlabel", "0\tS one.\tS two.\tentailment"]),
    "wnli": ("WNLI/train.tsv", ["index\tsentence1\tsentence2\tlabel", "0\tS one.\tS two.\t0", "1\tS.\tS.\t1"]),
    "ax": ("diagnostic/diagnostic.tsv", ["index\tsentence1\tsentence2", "0\tP.\tH."]),
}
GLUE_TEXTS = {
    "cola": ("cola sentence: A b c.", "acceptable"),
    "sst2": ("sst2 sentence: a fine film . ", "positive"),
    "mrpc": ('mrpc sentence1: He " said . sentence2: Said he .', "equivalent"),
    "qqp": ("qqp question1: Q one? question2: Q two?", "duplicate"),
    "stsb": ("stsb sentence1: S one. sentence2: S two.", "3.8"),
    "mnli_mismatched": ("mnli hypothesis: H. premise: P.", "neutral"),
    "qnli": ("qnli question: Q? sentence: S.", "not_entailment"),
    "rte": ("rte sentence1: S one. sentence2: S two.", "entailment"),
    "wnli": ("wnli sentence1: S one. sentence2: S two.", "not_entailment"),
    "ax": ("mnli hypothesis: H. premise: P.", "<unk>"),
}


def write(folder, file, *lines):
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def split_of(task, file):
    return next(split for split in task.splits if task.source.list_shards(split) == [file])


@pytest.mark.parametrize("version", ["v002", "v200"])
@pytest.mark.parametrize("name", GLUE_FILES)
def test_glues_own_files(tiny, tmp_path, name, version):
    file, lines = GLUE_FILES[name]
    write(tmp_path, file, *lines)
    task = f"glue_{name}_{version}"
    split = split_of(find_task(TaskRequest(task, str(tiny.vocabulary), LENGTHS)), file)
    found = examples(tiny, task, split, tmp_path)
    assert pretokenized(found[0]) == GLUE_TEXTS[name]
    assert [example["idx"] for example in found] == [*range(len(lines) - (name != "cola"))]


# The test files have no labels, and of CoLA's files only the test file has a header.
TEST_FILES = {
    "cola": ("CoLA/test.tsv", ["index\tsentence", "0\tA b c."]),
    "sst2": ("SST-2/test.tsv", ["index\tsentence", "0\ta fine film . "]),
    "mrpc": ("MRPC/test.tsv", ["index\t#1 ID\t#2 ID\t#1 String\t#2 String", '0\t7\t8\tHe " said .\tSaid he .']),
    "qqp": ("QQP/test.tsv", ["id\tquestion1\tquestion2", "0\tQ one?\tQ two?"]),
    "stsb": ("STS-B/test.tsv", ["index\tgenre\tsentence1\tsentence2", "0\tg\tS one.\tS two."]),
    "mnli_mismatched": ("MNLI/test_mismatched.tsv", ["index\tsentence1\tsentence2", "0\tP.\tH."]),
    "qnli": ("QNLI/test.tsv", ["index\tquestion\tsentence", "0\tQ?\tS."]),
    "rte": ("RTE/test.tsv", ["index\tsentence1\tsentence2", "0\tS one.\tS two."]),
    "wnli": ("WNLI/test.tsv", ["index\tsentence1\tsentence2", "0\tS one.\tS two."]),
}


@pytest.mark.parametrize("name", TEST_FILES)
def test_glues_test_files_have_no_labels(tiny, tmp_path, name):
    file, lines = TEST_FILES[name]
    write(tmp_path / "glue", file, *lines)
    (found,) = examples(tiny, f"glue_{name}_v200", "test", tmp_path)
    assert pretokenized(found) == (GLUE_TEXTS[name][0], "<unk>")


def test_mnli_has_its_splits_of_tfds(tiny, tmp_path):
    task = find_task(TaskRequest("glue_mnli_v200", str(tiny.vocabulary), LENGTHS))
    assert set(task.splits) == {"train"} | {
        f"{split}_{kind}" for split in ("validation", "test") for kind in ("matched", "mismatched")
    }
    write(tmp_path, "MNLI/dev_matched.tsv", "index\tsentence1\tsentence2\tgold_label", "0\tP.\tH.\tentailment")
    for name, split in (("glue_mnli_v200", "validation_matched"), ("glue_mnli_matched_v200", "validation")):
        (found,) = examples(tiny, name, split, tmp_path)
        assert pretokenized(found) == ("mnli hypothesis: H. premise: P.", "entailment")


def test_rows_of_qqp_with_too_few_cells_are_left_out(tiny, tmp_path):
    """As in TFDS, such rows are left out, rows with an empty question stay, and a row's index is that of its line."""
    title, *lines = GLUE_FILES["qqp"][1]
    write(tmp_path, "QQP/train.tsv", title, "4\t1\t2\tQ?\tno more", *lines)
    found = examples(tiny, "glue_qqp_v200", "train", tmp_path)
    assert [(example["idx"], *pretokenized(example)) for example in found] == [
        (1, "qqp question1: Q one? question2: Q two?", "duplicate"),
        (2, "qqp question1: Q three? question2: ", "not_duplicate"),
    ]


@pytest.mark.parametrize("score", [*(round(i / 10, 1) for i in range(51)), 3.333, 4.444, 1.7])
def test_a_score_is_rounded_to_a_fifth(tiny, tmp_path, score):
    """A score half way between two fifths is rounded to the even one, as by T5's tf.round in float32."""
    title = GLUE_FILES["stsb"][1][0]
    write(tmp_path, "STS-B/dev.tsv", title, f"0\tg\tf\ty\to\ts\ts\tS.\tS.\t{score}")
    (found,) = examples(tiny, "glue_stsb_v200", "validation", tmp_path)
    fifths = np.float32(np.round(np.float32(score) * np.float32(5))) / np.float32(5)
    assert pretokenized(found)[1] == f"{fifths:.1f}"


PASSAGE = {
    "text": "Ann met Bob.\n@highlight\nAnn won\n@highlight\nBob lost",
    "entities": [{"start": 8, "end": 10}, {"start": 0, "end": 2}, {"start": 24, "end": 26}],
}
SPANS = {"span1_text": "Pete", "span1_index": 2, "span2_text": "He", "span2_index": 4}
PARAGRAPH = {
    "text": "<b>Sent 1: </b>Para.<br>",
    "questions": [
        {
            "question": "Q?",
            "idx": 3,
            "answers": [{"text": "A", "idx": 5, "label": 0}, {"text": "", "idx": 6, "label": 1}],
        },
        {"question": "R?", "idx": 4, "answers": [{"text": "B", "idx": 7, "label": 1}]},
    ],
}
SUPER_GLUE_LINES = {
    "boolq": ("BoolQ", {"question": "is it so", "passage": "P.", "label": True, "idx": 0}),
    "cb": ("CB", {"premise": "P.", "hypothesis": "H.", "label": "neutral", "idx": 0}),
    "copa": ("COPA", {"premise": "P.", "choice1": "A.", "choice2": "B.", "question": "cause", "label": 1, "idx": 0}),
    "multirc": ("MultiRC", {"idx": 2, "version": 1.1, "passage": PARAGRAPH}),
    "record": (
        "ReCoRD",
        {
            "source": "CNN",
            "idx": 2,
            "passage": PASSAGE,
            "qas": [
                {"query": "@placeholder won", "idx": 9, "answers": [{"text": "Bob"}, {"text": "Ann"}, {"text": "Bob"}]}
            ],
        },
    ),
    "rte": ("RTE", {"premise": "P.", "hypothesis": "H.", "label": "entailment", "idx": 0}),
    "wic": ("WiC", {"word": "w", "sentence1": "A w.", "sentence2": "W.", "start1": 2, "label": False, "idx": 0}),
    "wsc_simple_eval": ("WSC", {"text": "Mark told Pete lies. He lied", "target": SPANS, "label": False, "idx": 0}),
}
RECORD = "record query: @placeholder won entities: Ann, Bob passage: Ann met Bob. Ann won. Bob lost"
SUPER_GLUE_TEXTS = {
    "boolq": [("boolq passage: P. question: is it so", "True")],
    "cb": [("cb hypothesis: H. premise: P.", "neutral")],
    "copa": [("copa choice1: A. choice2: B. premise: P. question: cause", "choice2")],
    "multirc": [
        ("multirc question: Q? answer: A paragraph: Sent 1: Para. ", "False"),
        ("multirc question: Q? answer:  paragraph: Sent 1: Para. ", "True"),
        ("multirc question: R? answer: B paragraph: Sent 1: Para. ", "True"),
    ],
    "record": [(RECORD, "Ann"), (RECORD, "Bob")],
    "rte": [("rte hypothesis: H. premise: P.", "entailment")],
    "wic": [("wic sentence1: A w. sentence2: W. word: w", "False")],
    "wsc_simple_eval": [("wsc: Mark told Pete lies. *He* lied", "Pete")],
}


def super_glue_name(name):
    return f"super_glue_wsc_v102_{name[4:]}" if name.startswith("wsc") else f"super_glue_{name}_v102"


def unlabelled(value):
    if isinstance(value, dict):
        return {name: unlabelled(part) for name, part in value.items() if name not in ("label",)}
    return [*map(unlabelled, value)] if isinstance(value, list) else value


@pytest.mark.parametrize("name", SUPER_GLUE_LINES)
def test_super_glues_own_files(tiny, tmp_path, name):
    folder, line = SUPER_GLUE_LINES[name]
    write(tmp_path, f"{folder}/val.jsonl", json.dumps(line))
    found = examples(tiny, super_glue_name(name), "validation", tmp_path)
    assert [pretokenized(example) for example in found] == SUPER_GLUE_TEXTS[name]
    if name == "multirc":
        ids = [[example[f"idx/{part}"] for part in ("paragraph", "question", "answer")] for example in found]
        assert ids == [[2, 3, 5], [2, 3, 6], [2, 4, 7]]
    elif name == "record":
        assert all([*example["answers"]] == [b"Ann", b"Bob"] for example in found)
        assert {(example["idx/passage"], example["idx/query"]) for example in found} == {(2, 9)}
    else:
        assert [example["idx"] for example in found] == [0]


@pytest.mark.parametrize("name", SUPER_GLUE_LINES)
def test_super_glues_test_files_have_no_labels(tiny, tmp_path, name):
    folder, line = SUPER_GLUE_LINES[name]
    line = unlabelled(line)
    if name == "record":
        del line["qas"][0]["answers"]
    write(tmp_path, f"{folder}/test.jsonl", json.dumps(line))
    found = examples(tiny, super_glue_name(name), "test", tmp_path)
    target = {"wsc_simple_eval": "Pete"}.get(name, "<unk>")
    assert [pretokenized(example) for example in found] == [
        (inputs, target) for inputs, _ in SUPER_GLUE_TEXTS[name][: 1 if name == "record" else None]
    ]


def test_super_glues_diagnostic_files_have_labels(tiny, tmp_path):
    fields = {"label": "not_entailment", "idx": 0}
    write(tmp_path, "AX-b/AX-b.jsonl", json.dumps(fields | {"sentence1": "P.", "sentence2": "H.", "logic": "x"}))
    write(tmp_path, "AX-g/AX-g.jsonl", json.dumps(fields | {"premise": "P.", "hypothesis": "H."}))
    for name in ("axb", "axg"):
        (found,) = examples(tiny, f"super_glue_{name}_v102", "test", tmp_path)
        assert pretokenized(found) == ("rte hypothesis: H. premise: P.", "not_entailment")


def test_wsc_is_trained_on_what_is_true(tiny, tmp_path):
    line = SUPER_GLUE_LINES["wsc_simple_eval"][1]
    true = line | {"label": True, "target": SPANS | {"span1_text": "Mark", "span1_index": 0}, "idx": 1}
    write(tmp_path, "WSC/train.jsonl", json.dumps(line), json.dumps(true))
    (found,) = examples(tiny, "super_glue_wsc_v102_simple_train", "train", tmp_path)
    assert pretokenized(found) == ("wsc: Mark told Pete lies. *He* lied", "Mark")
    assert (found["idx"], found["label"]) == (1, 1)


@pytest.mark.parametrize(
    "span, index, mended",
    [
        ("The cat", 3, "the cat"),
        ("the dog", 0, "The dog"),
        ("the cat.", 3, "the cat"),
        ("Cat\nasleep", 4, "cat asleep"),
        ("the cat", 3, "the cat"),
        ("no such span", 0, "no such span"),
    ],
)
def test_a_span_of_wsc_is_mended(tiny, tmp_path, span, index, mended):
    target = {"span1_text": span, "span1_index": index, "span2_text": "it", "span2_index": 7}
    line = {"text": "The dog bit the cat asleep because it barked .", "target": target, "label": True, "idx": 0}
    write(tmp_path, "WSC/val.jsonl", json.dumps(line))
    (found,) = examples(tiny, "super_glue_wsc_v102_simple_eval", "validation", tmp_path)
    assert pretokenized(found) == ("wsc: The dog bit the cat asleep because *it* barked .", mended)


@pytest.mark.parametrize(
    "text, index, pronoun, marked",
    [
        ("it was it .", 2, "it", "it was *it* ."),
        ('"Good for him," he said. ', 2, "him", '"Good for *him* ," he said.'),
        ("to use it , but its use", 1, "it", "to use *it* , but its use"),
        ("he said  he left", 3, "he", "he said  *he* left"),
    ],
)
def test_a_pronoun_is_marked(text, index, pronoun, marked):
    assert preprocessors.mark_pronoun(text, index, pronoun) == marked


def test_a_pronoun_that_is_not_in_its_text_is_named(tiny, tmp_path):
    line = SUPER_GLUE_LINES["wsc_simple_eval"][1]
    write(tmp_path, "WSC/val.jsonl", json.dumps(line | {"target": SPANS | {"span2_text": "she"}}))
    request = TaskRequest("super_glue_wsc_v102_simple_eval", str(tiny.vocabulary), LENGTHS, str(tmp_path))
    with pytest.raises(ValueError, match="^WSC: no 'she' in 'Mark told Pete lies. He lied'; set `data_dir` to a sound"):
        build_split(request, "validation", tmp_path / "cache" / "validation")


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("boolq", {"label": 1}, "label 1, expected true or false"),
        ("boolq", {"label": None}, "label None, expected true or false"),
        ("boolq", {"question": " "}, "an empty or missing text: ' '"),
        ("cb", {"label": "maybe"}, "label 'maybe', expected entailment, contradiction, neutral"),
        ("copa", {"label": True}, "label True, expected 0 .. 1"),
        ("copa", {"choice2": None}, "an empty or missing text: None"),
        ("rte", {"label": 0}, "label 0, expected entailment, not_entailment"),
        ("multirc", {"passage": {"text": "P."}}, "no field 'questions'; expected question, answer, paragraph, label"),
        ("multirc", {"passage": unlabelled(PARAGRAPH)}, "no field 'label'; expected"),
        ("multirc", {"passage": "P."}, ""),
        ("record", {"passage": {"text": "P.", "entities": []}}, "[], expected a list of at least one text"),
        ("record", {"qas": [{"query": "Q", "idx": 1}]}, "no field 'answers'; expected"),
        ("record", {"qas": [{"query": "Q", "idx": 1, "answers": []}]}, "[], expected a list of at least one text"),
        ("wsc_simple_eval", {"target": SPANS | {"span2_index": "4"}}, "'4', expected a whole number"),
        (
            "wsc_simple_eval",
            {"target": SPANS | {"span1_text": "x", "span1_index": 70}},
            "'x' is not in the text, and its index 70 is not that of a word, expected 0 .. ",
        ),
        ("wsc_simple_eval", {"target": {}}, "no field 'span1_index'; expected"),
    ],
)
def test_a_malformed_line_of_super_glue_is_found_by_file_and_line(tiny, tmp_path, name, change, message):
    folder, line = SUPER_GLUE_LINES[name]
    path = write(tmp_path, f"{folder}/val.jsonl", json.dumps(line), json.dumps(line | change), json.dumps(line))
    with pytest.raises(ValueError) as error:
        examples(tiny, super_glue_name(name), "validation", tmp_path)
    assert str(error.value).startswith(f"{path}, line 2: {message}")


@pytest.mark.parametrize("name, field", [("boolq", "label"), ("rte", "hypothesis"), ("wic", "word"), ("copa", "label")])
def test_a_line_without_a_field_is_found_by_file_and_line(tiny, tmp_path, name, field):
    folder, line = SUPER_GLUE_LINES[name]
    path = write(tmp_path, f"{folder}/train.jsonl", json.dumps({key: line[key] for key in line if key != field}))
    with pytest.raises(ValueError, match=f"^{path}, line 1: no field '{field}'; expected "):
        examples(tiny, super_glue_name(name), "train", tmp_path)


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("cola", "gj04\tA b c.", "line 3: 2 columns, expected 4"),
        ("cola", "gj04\t2\t\tA b c.", "line 3: label '2', expected 0 .. 1"),
        ("cola", "gj04\t1\t\t", "line 3: an empty or missing text: ''"),
        ("mrpc", "1\t7\t8\tHe said .", "line 4: 4 columns, expected 5"),
        ("qqp", "5\t1\t2\tQ?\tQ?\t", "line 4: label '', expected 0 .. 1"),
        ("qqp", "5\t1\t2\tQ?\tQ?\t1\tmore", "line 4: 7 columns, expected 6"),
        ("stsb", "0\tg\tf\ty\to\ts\ts\tS.\tS.\t5.5", "line 4: score '5.5', expected 0 .. 5"),
        ("stsb", "0\tg\tf\ty\to\ts\ts\tS.\tS.\tnan", "line 4: score 'nan', expected 0 .. 5"),
        ("stsb", "0\tg\tf\ty\to\ts\ts\tS.\tS.\thigh", "line 4: score 'high', expected 0 .. 5"),
        ("rte", "1\tS.\tS.\tmaybe", "line 3: label 'maybe', expected entailment, not_entailment"),
        ("mnli_mismatched", "0\tp\t(x)\tP.\tH.\tneutral\t-", "line 4: label '-', expected entailment, neutral, cont"),
    ],
)
def test_a_malformed_row_of_glue_is_found_by_file_and_line(tiny, tmp_path, name, row, message):
    file, lines = GLUE_FILES[name]
    path = write(tmp_path, file, *lines, row)
    task = f"glue_{name}_v200"
    split = split_of(find_task(TaskRequest(task, str(tiny.vocabulary), LENGTHS)), file)
    with pytest.raises(ValueError) as error:
        examples(tiny, task, split, tmp_path)
    assert str(error.value).startswith(f"{path}, {message}")


def test_dpr_is_read_from_tfds_whatever_data_dir(tmp_path, monkeypatch):
    source = find_module("dpr_v001_simple").source
    sources.set_data_dir(str(tmp_path))

    def fails(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(seqio.TfdsDataSource, "get_dataset", fails)
    with pytest.raises(
        ValueError, match="^TFDS cannot give definite_pronoun_resolution:1.1.0 .OSError: no connection.: "
    ):
        source.get_dataset("train")


def test_imdb_is_whole_and_any_slice_holds_both_labels(data_dir):
    labels = columns("imdb_reviews_v100", data_dir / "imdb")["label"]
    assert list(np.bincount(labels)) == [12_500, 12_500]
    for part in (labels[:2_500], labels[-2_500:]):
        assert 0.45 < part.mean() < 0.55


def test_imdb_targets_are_the_labels_names(tiny, tmp_path):
    lines = [json.dumps({"text": f"review {i}", "label": i % 2}) for i in range(6)]
    with lzma.open(tmp_path / "imdb_train.jsonl.xz", "wt") as file:
        file.write("\n".join(lines))
    found = [pretokenized(example) for example in examples(tiny, "imdb_reviews_v100", data_dir=tmp_path)]
    assert sorted(found) == [(f"review {i}", imdb.LABELS[i % 2]) for i in range(6)]
    assert found != sorted(found), "the file has its labels in blocks; a slice of the task should not"


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_a_file_may_be_compressed(tmp_path, suffix):
    import gzip

    opener = {"": open, ".gz": gzip.open, ".xz": lzma.open}[suffix]
    with opener(tmp_path / f"imdb_train.jsonl{suffix}", "wt") as file:
        file.write('{"text": "fine", "label": 1, "idx": 7}\n')
    assert rows(find_module("imdb_reviews_v100"), data_dir=tmp_path) == [{"text": b"fine", "label": 1, "idx": 7}]


def test_rows_are_sharded_and_repeated_as_seqio_asks(tmp_path):
    (tmp_path / "imdb_train.jsonl").write_text("".join(f'{{"text": "{i}", "label": 0}}\n' for i in range(10)))
    sources.set_data_dir(str(tmp_path))
    source = find_module("imdb_reviews_v100").source

    def texts(**options):
        return [row["text"] for row in source.get_dataset("train", **options).as_numpy_iterator()]

    whole = texts(shuffle=False)
    shards = [texts(shuffle=False, shard_info=seqio.ShardInfo(index, 3)) for index in range(3)]
    assert sorted(sum(shards, [])) == sorted(whole)
    assert texts(shuffle=False, num_epochs=2) == whole * 2
    shuffled = texts(shuffle=True, seed=1)
    assert shuffled != whole and sorted(shuffled) == sorted(whole)


@pytest.mark.parametrize("split", review_grammar.SPLIT_SIZES)
def test_the_demos_task_is_the_grammars_sentences(tiny, split):
    expected = [(f"sentence: {row.text}", review_grammar.LABELS[row.label]) for row in review_grammar.sentences(split)]
    assert [pretokenized(example) for example in examples(tiny, "demo_reviews", split)] == expected


@pytest.mark.parametrize("name", ["text_span_corruption", "text_prefix_lm"])
def test_a_text_task_holds_every_document_once(tiny, tmp_path, name):
    """Long documents are split into parts that fit, and short ones are kept: no token of the text is lost."""
    documents = [" ".join(["the plot was dull ."] * n) for n in (1, 2, 5, 30, 3)]
    (tmp_path / "a.txt").write_text("\n".join([*documents[:2], "", "  ", *documents[2:4]]) + "\n")
    with lzma.open(tmp_path / "b.txt.xz", "wt") as file:
        file.write(documents[4])
    task = find_task(TaskRequest(name, str(tiny.vocabulary), LENGTHS))
    lengths = {"inputs": 24, "targets": 12}
    sources.set_data_dir(str(tmp_path))
    found = list(task.get_dataset(lengths, "train", shuffle=False, trim_output_features=False).as_numpy_iterator())
    words = Vocabulary(tiny.vocabulary)
    text = []
    for example in found:
        inputs, targets = example["inputs"], example["targets"]
        assert inputs[-1] == targets[-1] == EOS
        assert len(inputs) <= 24 and len(targets) <= 12
        inputs, targets = list(inputs[:-1]), list(targets[:-1])
        text += splice(inputs, targets, words.size - 1) if name == "text_span_corruption" else inputs + targets
    assert text == [token for document in documents for token in words.encode(document)]


def test_a_part_of_the_text_is_for_validation(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(1_000)))
    task = find_module("text_prefix_lm")
    train, validation = ([row["text"] for row in rows(task, split, tmp_path)] for split in ("train", "validation"))
    assert len(validation) == 5
    assert sorted(train + validation) == sorted(f"line {i}".encode() for i in range(1_000))


def splice(inputs, targets, first):
    """Returns the source of a corrupted example: each sentinel is replaced by the tokens after it in the targets."""
    spans = {}
    for token in targets:
        if token > first - 100:
            spans[token] = current = []
        else:
            current.append(token)
    return [part for token in inputs for part in (spans.pop(token) if token > first - 100 else [token])]


sources_of_noise = st.tuples(st.integers(2, 700), st.integers(0, 2**32 - 1))
densities = st.sampled_from([(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.05, 2.0), (0.8, 1.0)])


@given(sources_of_noise, densities)
def test_corrupted_spans_put_back_give_the_source(source, noise):
    length, seed = source
    density, mean_span = noise
    tokens = np.random.default_rng(seed).integers(3, 1_000, length, np.int32)
    inputs, targets = preprocessors.corrupt_spans(tokens, np.random.default_rng(seed), SENTINELS, density, mean_span)
    assert inputs.dtype == targets.dtype == np.int32
    assert splice(inputs, targets, SENTINEL) == list(tokens)

    lost = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(lost / mean_span), 1), length - lost, 100)
    assert len(targets) == lost + spans
    assert len(inputs) == length - lost + spans
    for part in (inputs, targets):
        places = np.flatnonzero(part > SENTINEL - 100)
        np.testing.assert_array_equal(part[places], SENTINEL - np.arange(spans))
        assert (np.diff(places) > 1).all(), "between two sentinels is a token"
    assert inputs[0] < 1_000 and inputs[-1] == SENTINEL - spans + 1
    assert targets[0] == SENTINEL and targets[-1] < 1_000


def test_spans_have_all_lengths_and_every_place():
    """Four of twelve tokens are dropped, in two spans: all ways to do this occur, and about equally often."""
    tokens = np.arange(3, 15, dtype=np.int32)
    rng = np.random.default_rng(0)
    seen = {}
    for _ in range(4_200):
        inputs, _ = preprocessors.corrupt_spans(tokens, rng, SENTINELS, density=4 / 12, mean_span=2.0)
        seen[tuple(inputs)] = seen.get(tuple(inputs), 0) + 1
    assert len(seen) == 7 * 3  # ways to split eight kept tokens in two, times ways to split four dropped ones
    # Expected: 200 of each. The bounds are six standard deviations.
    assert min(seen.values()) > 120 and max(seen.values()) < 280


def corrupted_length(length, density, mean_span):
    tokens = np.full(length, 3, np.int32)
    inputs, targets = preprocessors.corrupt_spans(tokens, np.random.default_rng(0), SENTINELS, density, mean_span)
    return len(inputs) + 1, len(targets) + 1  # each has an end of sequence


@given(st.integers(3, 3_000), st.sampled_from([(0.15, 3.0), (0.5, 3.0), (0.15, 8.0)]))
def test_the_source_is_as_long_as_fits_the_inputs(inputs_length, noise):
    length = preprocessors.span_corruption_length(inputs_length, *noise)
    assert corrupted_length(length, *noise)[0] == inputs_length
    assert corrupted_length(length + 1, *noise)[0] == inputs_length + 1


def test_t5s_own_lengths():
    """T5's gin files pre-train with inputs of 512 and targets of 114 tokens, made from 568 tokens."""
    assert preprocessors.span_corruption_length(512, 0.15, 3.0) == 568
    assert corrupted_length(568, 0.15, 3.0) == (512, 114)


@given(st.integers(1, 80), st.integers(1, 40), st.integers(0, 2**32 - 1), st.data())
def test_a_prefix_and_its_continuation_are_the_source(max_inputs, max_targets, seed, data):
    assume(max_inputs + max_targets >= 2)
    length = data.draw(st.integers(2, max_inputs + max_targets))
    tokens = np.arange(length, dtype=np.int32)
    inputs, targets = preprocessors.split_prefix(tokens, np.random.default_rng(seed), max_inputs, max_targets)
    np.testing.assert_array_equal(np.concatenate([inputs, targets]), tokens)
    assert 1 <= len(inputs) <= max_inputs and 1 <= len(targets) <= max_targets


def test_a_prefix_may_end_anywhere():
    rng = np.random.default_rng(0)
    cuts = [len(preprocessors.split_prefix(np.arange(20, dtype=np.int32), rng, 16, 12)[0]) for _ in range(900)]
    assert set(cuts) == set(range(8, 17))
    assert max(map(cuts.count, set(cuts))) < 160  # expected: 100 of each


def test_a_pretraining_example_has_noise_of_its_own_and_the_same_each_time(tiny, tmp_path):
    (tmp_path / "a.txt").write_text(("the plot was dull and the score was lovely in the end . " * 2 + "\n") * 20)
    once, again = ([*map(str, examples_of_text(tiny, tmp_path))] for _ in range(2))
    assert once == again
    assert len(set(once)) > 10


def examples_of_text(tiny, folder):
    task = find_task(TaskRequest("text_span_corruption", str(tiny.vocabulary), LENGTHS))
    sources.set_data_dir(str(folder))
    dataset = task.get_dataset({"inputs": 64, "targets": 16}, "train", shuffle=False, seed=0)
    return [example["inputs"] for example in dataset.as_numpy_iterator()]


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=60)


@given(texts)
def test_encoding_is_seqios(t5, text):
    ours, theirs = t5
    assert ours.encode(text) == theirs.encode(text) == list(theirs.encode_tf(text).numpy())
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


@given(st.lists(st.integers(3, 31_999), max_size=20), st.lists(st.integers(3, 31_999), max_size=5))
def test_decoding_is_seqios_up_to_the_end_of_sequence(t5, before, after):
    ours, theirs = t5
    assert ours.decode(np.array([*before, EOS, *after, PAD])) == theirs.decode([*before, EOS, *after])
    assert ours.decode([*before, PAD, PAD]) == theirs.decode(before)


def test_sentinels_are_the_last_ids(t5):
    ours, theirs = t5
    assert ours.size == theirs.vocab_size == 32_100
    for token, text in ((32_099, "<extra_id_0>"), (32_000, "<extra_id_99>")):
        assert ours.decode([token]) == ours.piece(token) == theirs.decode([token]) == text
    for token in (32_100, 32_127):  # ids of padding rows in a model's embedding table
        assert ours.decode([token, *ours.encode("a film")]) == ours.decode([UNK, *ours.encode("a film")])
        assert ours.piece(token) == "<unk>"
    assert ours.decode([*ours.encode("a film"), 32_099, *ours.encode("good"), EOS]) == "a film <extra_id_0> good"


def test_pieces_are_written_as_the_model_has_them(t5):
    ours, _ = t5
    assert [ours.piece(token) for token in (PAD, EOS, UNK, *ours.encode("a film"))] == [
        "<pad>", "</s>", "<unk>", "▁", "a", "▁film",
    ]  # fmt: skip


def test_written_is_what_comes_back(t5, tiny):
    ours, _ = t5
    assert ours.written("True  Story") == "True Story"
    assert Vocabulary(tiny.vocabulary).written("Positive") == "positive"


def test_a_vocabularys_fingerprint_is_its_contents(tiny, tmp_path):
    path = tmp_path / "copy.model"
    shutil.copy(tiny.vocabulary, path)
    assert Vocabulary(path).fingerprint == Vocabulary(tiny.vocabulary).fingerprint
    path.write_bytes(tiny.vocabulary.read_bytes() + b"\x00")
    with pytest.raises(ValueError, match=f"{path} is not a SentencePiece model: set `vocabulary`"):
        Vocabulary(path)


def test_tensorflow_is_told_nothing_of_the_gpu():
    """Protects the tests: TensorFlow takes no memory of an accelerator in a process that also uses JAX."""
    assert not tf.config.get_visible_devices("GPU")
