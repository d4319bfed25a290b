"""What `eval --submission` writes, against the formats of the GLUE and SuperGLUE servers written out here."""

import functools
import json
import sys

import gin
import jax
import numpy as np
import pytest
import sentencepiece

from prompt_tuning_jax import eval as command
from prompt_tuning_jax.batches.cache import CachedExamples
from prompt_tuning_jax.batches.examples import describe
from prompt_tuning_jax.tasks.review_grammar import unlabelled
from prompt_tuning_jax.tokenizers.vocabulary import EOS, PAD, UNK
from prompt_tuning_jax.training.evaluation import postprocess
from prompt_tuning_jax.training.submission import FILES, server_file, start_submission, write_file

# From gluebenchmark.com and super.gluebenchmark.com (FAQ, and the sample submissions): for each test set its file, the
# number of its examples, and what an answer of ours is to the server.
NLI = {"entailment": "entailment", "not_entailment": "not_entailment"}
NLI_3 = {word: word for word in ("entailment", "neutral", "contradiction")}
GLUE = {
    "glue_cola_v200": ("CoLA.tsv", 1_063, {"unacceptable": "0", "acceptable": "1"}),
    "glue_sst2_v200": ("SST-2.tsv", 1_821, {"negative": "0", "positive": "1"}),
    "glue_mrpc_v200": ("MRPC.tsv", 1_725, {"not_equivalent": "0", "equivalent": "1"}),
    "glue_qqp_v200": ("QQP.tsv", 390_965, {"not_duplicate": "0", "duplicate": "1"}),
    "glue_stsb_v200": ("STS-B.tsv", 1_379, {"3.8": "3.800", "7": "5.000", "-0.4": "0.000"}),
    "glue_mnli_matched_v200": ("MNLI-m.tsv", 9_796, NLI_3),
    "glue_mnli_mismatched_v200": ("MNLI-mm.tsv", 9_847, NLI_3),
    "glue_qnli_v200": ("QNLI.tsv", 5_463, NLI),
    "glue_rte_v200": ("RTE.tsv", 3_000, NLI),
    "glue_wnli_v200": ("WNLI.tsv", 146, {"not_entailment": "0", "entailment": "1"}),
    "glue_ax_v200": ("AX.tsv", 1_104, NLI_3),
}
SUPER_GLUE = {
    "super_glue_boolq_v102": ("BoolQ.jsonl", 3_245, {"False": "false", "True": "true"}),
    "super_glue_cb_v102": ("CB.jsonl", 250, NLI_3),
    "super_glue_copa_v102": ("COPA.jsonl", 500, {"choice1": 0, "choice2": 1}),
    "super_glue_rte_v102": ("RTE.jsonl", 3_000, NLI),
    "super_glue_wic_v102": ("WiC.jsonl", 1_400, {"False": "false", "True": "true"}),
    "super_glue_wsc_v102_simple_eval": ("WSC.jsonl", 146, {"Ann": "False", "the Bob": "True"}),
    "super_glue_axb_v102": ("AX-b.jsonl", 1_104, NLI),
    "super_glue_axg_v102": ("AX-g.jsonl", 356, NLI),
}


@pytest.fixture
def write(tmp_path):
    """Writes the file of a registered task for answers to rows with these numbers, and returns its text."""

    def run(task, texts, numbers, **fields):
        examples = make_split(tmp_path, task, [{**row, **fields} for row in numbers])
        file = server_file(task, "test")
        assert file is not None
        write_file(tmp_path, file, task, examples, postprocess(examples, texts))
        return (tmp_path / file.name).read_text()

    return run


@functools.cache
def registered(task):
    import seqio

    from prompt_tuning_jax.tasks import glue, super_glue  # noqa: F401

    return seqio.TaskRegistry.get(task)


def make_split(folder, task, fields):
    """A cache of unlabelled rows with the task's own postprocessor."""
    (folder / "cache").mkdir(exist_ok=True)
    for name in ("inputs", "targets"):
        np.save(folder / "cache" / f"{name}.npy", np.ones(len(fields), np.int32))
        np.save(folder / "cache" / f"{name}_ends.npy", np.arange(len(fields)) + 1)
    lines = [json.dumps({"targets_pretokenized": "<unk>", "answers": []} | row) for row in fields]
    (folder / "cache" / "fields.jsonl").write_text("".join(f"{line}\n" for line in lines))
    spec = {"examples": len(fields), "postprocessor": describe(registered(task).postprocessor), "metrics": []}
    (folder / "cache" / "task.json").write_text(json.dumps(spec))
    return CachedExamples(folder / "cache")


@pytest.mark.parametrize("task", GLUE)
def test_glue_takes_two_columns(write, task):
    """Tab-separated with a header, the examples in the order of their index."""
    _, _, words = GLUE[task]
    texts = [*words] * 2
    order = [*range(len(texts))][::-1]
    lines = write(task, texts, [{"idx": place} for place in order]).splitlines()
    assert lines[0] == "index\tprediction"
    expected = {place: words[text] for place, text in zip(order, texts, strict=True)}
    assert lines[1:] == [f"{place}\t{expected[place]}" for place in range(len(texts))]


@pytest.mark.parametrize("task", SUPER_GLUE)
def test_super_glue_takes_a_json_object_a_line(write, task):
    """{"idx": number, "label": ...}: strings for truth values, capitals for WSC alone, a number for COPA."""
    _, _, words = SUPER_GLUE[task]
    texts = [*words] * 2
    order = [*range(len(texts))][::-1]
    wsc = {"label": -1, "targets_pretokenized": "Bob"} if "wsc" in task else {}
    lines = write(task, texts, [{"idx": place} for place in order], **wsc).splitlines()
    expected = {place: words[text] for place, text in zip(order, texts, strict=True)}
    assert [json.loads(line) for line in lines] == [
        {"idx": place, "label": expected[place]} for place in range(len(texts))
    ]


def test_multirc_is_nested(write):
    """A passage a line, with its questions, with their answers."""
    numbers = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (7, 2, 0), (7, 2, 1)]
    fields = [dict(zip(("idx/paragraph", "idx/question", "idx/answer"), row, strict=True)) for row in numbers]
    found = write("super_glue_multirc_v102", ["True", "False", "True", "False", "False"], fields)
    assert [json.loads(line) for line in found.splitlines()] == [
        {
            "idx": 0,
            "passage": {
                "questions": [
                    {"idx": 0, "answers": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]},
                    {"idx": 1, "answers": [{"idx": 0, "label": 1}]},
                ]
            },
        },
        {"idx": 7, "passage": {"questions": [{"idx": 2, "answers": [{"idx": 0, "label": 0}, {"idx": 1, "label": 0}]}]}},
    ]


def test_record_is_text_by_query(write):
    fields = [
        {"idx/passage": 0, "idx/query": 5},
        {"idx/passage": 0, "idx/query": 2},
        {"idx/passage": 1, "idx/query": 9},
    ]
    found = write("super_glue_record_v102", ["Denver", "Zoë “Z”", "-1"], fields)
    assert [json.loads(line) for line in found.splitlines()] == [
        {"idx": 2, "label": "Zoë “Z”"}, {"idx": 5, "label": "Denver"}, {"idx": 9, "label": "-1"},
    ]  # fmt: skip


def test_what_is_no_label_becomes_the_commonest(write, capsys):
    numbers = [{"idx": place} for place in range(6)]
    found = write("super_glue_cb_v102", ["neutral", "maybe", "contradiction", "maybe", "contradiction", ""], numbers)
    labels = [json.loads(line)["label"] for line in found.splitlines()]
    assert labels == ["neutral", *["contradiction"] * 5]
    warned = capsys.readouterr().err
    assert "CB.jsonl: 3 of 6 answers are no label ('maybe' 2 times, '' 1 times), written as contradiction" in warned
    assert "CB.jsonl: 6 rows, but the server expects the 250 of its test set" in warned
    found = write("glue_stsb_v200", ["four"] * 6, numbers)
    assert found == "index\tprediction\n" + "".join(f"{place}\t0.000\n" for place in range(6))


def test_every_test_set_is_known():
    """With its length: a file that is cut short is refused by the server."""
    names = {name: rows for name, rows, _ in (GLUE | SUPER_GLUE).values()}
    names |= {"MultiRC.jsonl": 9_693, "ReCoRD.jsonl": 10_000}
    assert {file.name: file.rows for file in FILES.values()} == names
    for task, (name, _, _) in (GLUE | SUPER_GLUE).items():
        assert server_file(task, "test").name == name


@pytest.mark.parametrize(
    "task, split, name",
    [
        ("taskless_glue_sst2_v002_examples", "test", "SST-2.tsv"),
        ("mt5_task_index_super_glue_wsc_v102_simple_eval_examples", "test", "WSC.jsonl"),
        ("byt5_super_glue_rte_v102", "test", "RTE.jsonl"),
        ("glue_rte_v002", "test", "RTE.tsv"),
        ("glue_mnli_v200", "test_matched", "MNLI-m.tsv"),
        ("taskless_glue_mnli_v200_examples", "test_mismatched", "MNLI-mm.tsv"),
        ("glue_mnli_v200", "train", None),
        ("glue_mrpc_from_qqp_v200", "validation", None),
        ("demo_reviews", "validation", None),
        ("dpr_v001_simple", "test", None),
        ("my_glue_sst2_v200", "test", None),
    ],
)
def test_a_task_has_its_file_in_any_wording(task, split, name):
    file = server_file(task, split)
    assert (file and file.name) == name


class OneField:
    """A split whose examples keep these fields."""

    def __init__(self, **fields):
        self.examples = type("Examples", (), {"fields": [fields]})


def test_what_no_server_takes_is_refused_and_left_out_of_a_suite(tmp_path, capsys):
    start = getattr(start_submission, "__wrapped__", start_submission)
    boolq, dpr = {"super_glue_boolq_v102": OneField(idx=0)}, {"dpr_v001_simple": OneField()}
    with pytest.raises(ValueError, match="no server takes test of dpr_v001_simple: set `name` to tasks"):
        start(str(tmp_path / "a"), dpr, "test")
    assert [*start(str(tmp_path / "a"), boolq | dpr, "test")] == ["super_glue_boolq_v102"]
    assert capsys.readouterr().err == "no server takes dpr_v001_simple: left out\n"
    with pytest.raises(ValueError, match=r"2 tasks would write BoolQ\.jsonl: set `name` to tasks"):
        start(str(tmp_path / "a"), boolq | {"taskless_super_glue_boolq_v102": OneField(idx=0)}, "test")
    with pytest.raises(
        ValueError, match=r"the examples of super_glue_boolq_v102 have no field idx, .* BoolQ\.jsonl needs: set `name`"
    ):
        start(str(tmp_path / "b"), {"super_glue_boolq_v102": OneField()}, "test")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to .*file .*: set --submission to a folder"):
        start(str(tmp_path / "file"), boolq, "test")
    assert not (tmp_path / "b").exists()


PASSAGE = "Ann met Bob in Denver. Bob was late."
TEST_ROWS = {
    "BoolQ": [{"question": "is it", "passage": PASSAGE, "idx": place} for place in range(3)],
    "CB": [{"premise": PASSAGE, "hypothesis": "Ann was late", "idx": 0}],
    "COPA": [{"premise": "a", "choice1": "b", "choice2": "c", "question": "cause", "idx": 0}],
    "MultiRC": [
        {
            "idx": passage,
            "version": 1.1,
            "passage": {
                "text": PASSAGE,
                "questions": [
                    {
                        "idx": 3 * passage,
                        "question": "who",
                        "answers": [{"idx": 0, "text": "Bob"}, {"idx": 1, "text": "Ann"}],
                    }
                ],
            },
        }
        for passage in range(2)
    ],
    "ReCoRD": [
        {
            "idx": 4,
            "source": "here",
            "passage": {"text": PASSAGE, "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}]},
            "qas": [{"idx": number, "query": "@placeholder was late"} for number in (8, 9)],
        }
    ],
    "RTE": [{"premise": PASSAGE, "hypothesis": "Ann was late", "idx": 0}],
    "WiC": [
        {
            "word": "late",
            "sentence1": "late",
            "sentence2": "too late",
            "start1": 0,
            "end1": 4,
            "start2": 4,
            "end2": 8,
            "idx": 0,
            "version": 1.1,
        }
    ],
    "WSC": [
        {
            "text": "Ann met Bob when he sat .",
            "target": {"span1_index": 2, "span1_text": "Bob", "span2_index": 4, "span2_text": "he"},
            "idx": 0,
        }
    ],
}


TRAINING = tuple(f"--gin.{name}=" for name in ("BATCH_SIZE", "TRAIN_STEPS", "EVAL_PERIOD", "LOG_PERIOD"))


@pytest.fixture
def eval_command(tiny, monkeypatch):
    """Runs `eval` on the tiny base in this process, with its caches in the tests' folder."""
    before = jax.config.jax_compilation_cache_dir
    for name, value in tiny.environment.items():
        monkeypatch.setenv(name, value)

    def run(*flags, **macros):
        gin.clear_config()
        lengths = {"inputs": 24, "targets": 8}
        settings = {"TASK_FEATURE_LENGTHS": lengths, "PROMPT_FILE": None, "EVAL_SPLIT": "test", "EVAL_BATCH_SIZE": 4}
        arguments = tiny.arguments("runs/eval.gin", **settings | macros)
        kept = [argument for argument in arguments if not argument.startswith(TRAINING)]
        monkeypatch.setattr(sys, "argv", ["eval", *kept, *flags])
        command.main()

    yield run
    gin.clear_config()
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def words(tiny, tmp_path):
    """A vocabulary of the tiny base's size that can write every label of SuperGLUE."""
    labels = ["choice1", "choice2", "entailment", "not_entailment", "neutral", "contradiction", "false", "true"]
    prefix = tmp_path / "suite"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*unlabelled(400), *labels * 20]), model_prefix=str(prefix), vocab_size=300,
        pad_id=PAD, eos_id=EOS, unk_id=UNK, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return f"{prefix}.model"


def test_the_suite_in_one_command(eval_command, words, tmp_path, capfd):
    """Every file of SuperGLUE from test rows in SuperGLUE's own format; nothing is scored."""
    for folder, rows in TEST_ROWS.items():
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    eval_command(
        f"--submission={tmp_path / 'out'}",
        MIXTURE_OR_TASK_NAME="super_glue_v102_examples_proportional",
        DATA_DIR=str(tmp_path / "data"),
        VOCABULARY=words,
    )
    found = json.loads(capfd.readouterr().out)
    assert "generation" not in json.dumps(found)
    files = {
        path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in (tmp_path / "out").iterdir()
    }
    assert {*files} == {f"{folder}.jsonl" for folder in TEST_ROWS}
    numbers = {name: [row["idx"] for row in rows] for name, rows in files.items()}
    assert numbers == {
        "BoolQ.jsonl": [0, 1, 2], "CB.jsonl": [0], "COPA.jsonl": [0], "MultiRC.jsonl": [0, 1], "ReCoRD.jsonl": [8, 9],
        "RTE.jsonl": [0], "WiC.jsonl": [0], "WSC.jsonl": [0],
    }  # fmt: skip
    questions = files["MultiRC.jsonl"][1]["passage"]["questions"]
    assert [(q["idx"], [answer["idx"] for answer in q["answers"]]) for q in questions] == [(3, [0, 1])]
    counted = {row["file"].rsplit("/", 1)[1]: row["rows"] for row in found["submission"]}
    assert counted == {name: len(rows) for name, rows in files.items()} | {"MultiRC.jsonl": 4}


def test_what_cannot_be_submitted_is_one_line(eval_command, tmp_path, capfd):
    for flag, message in (
        ("--submission", "--submission has no folder: expected --submission=DIR"),
        (f"--submission={tmp_path / 'out'}", "no server takes validation of demo_reviews"),
    ):
        with pytest.raises(SystemExit) as stop:
            eval_command(flag, EVAL_SPLIT="validation")
        lines = capfd.readouterr().err.splitlines()
        assert stop.value.code == 2 and message in lines[-1]
    assert not (tmp_path / "out").exists()
