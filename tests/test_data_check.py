"""What a run says of its data at its start: unknown tokens, targets that do not come back, shared inputs and labels."""

import json

import numpy as np
import pytest
from tiny import LENGTHS

import prompt_tuning_jax as pt
from prompt_tuning_jax.batches import dataset as dataset_module
from prompt_tuning_jax.batches.build import build_missing
from prompt_tuning_jax.batches.cache import TaskRequest
from prompt_tuning_jax.batches.data import dataset_of, files
from prompt_tuning_jax.batches.dataset import DatasetConfig, shared_inputs
from prompt_tuning_jax.checkpoints.base import EMBEDDED
from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.sweeps import vectorized
from prompt_tuning_jax.tasks import data_check
from prompt_tuning_jax.tokenizers.vocabulary import BESIDE, UNK, Vocabulary
from prompt_tuning_jax.training import evaluation

WORDS = Vocabulary(EMBEDDED["nano"] / BESIDE)


def row(inputs, targets="good"):
    return {"inputs": inputs, "targets": targets}


def said(data, split="train", lengths=LENGTHS, batch_size=1, **options):
    """The lines of `batches` and the batches themselves."""
    lines = []
    config = dataset_of(data, split, batch_size=batch_size, lengths=lengths, **options)
    batches = config.batches(WORDS, say=lines.append)
    return lines, batches


def test_rows_without_a_fault_have_nothing_said_of_them():
    assert said([row("a good film"), row("a dull film", "bad")])[0] == []


def test_unknown_tokens_of_inputs_and_targets_are_counted():
    """MRPC's label has an underscore, which the embedded base's tokenizer does not know."""
    rows = [row("a film", "not_equivalent"), row("a {film}", "equivalent"), row("a film", "not_equivalent")]
    lines, _ = said(rows, lengths={"inputs": 32, "targets": 16}, labels=["not_equivalent", "equivalent"])
    ids = {name: [WORDS.encode(row[name]) for row in rows] for name in ("inputs", "targets")}
    shares = {name: 100 * sum(one.count(UNK) for one in ids[name]) / sum(map(len, ids[name])) for name in ids}
    assert UNK in WORDS.encode("a {film}") and UNK not in WORDS.encode("a film")
    assert lines == [
        f"rows train: unknown tokens are {shares['inputs']:.2g}% of inputs (in 1 of 3 rows) and "
        f"{shares['targets']:.2g}% of targets (in 2 of 3 rows)",
        "rows train: targets of 2 of 3 rows do not decode to themselves: 'not_equivalent' becomes 'not ⁇ equivalent'",
    ]


def test_targets_that_do_not_decode_to_themselves_are_shown():
    lines, _ = said([row("a", "two  blanks"), row("b", "one blank"), row("c", "ﬁne")])
    (line,) = [line for line in lines if "decode" in line]
    assert line.startswith("rows train: targets of 2 of 3 rows do not decode to themselves: ")
    assert "'two  blanks' becomes 'two blanks'" in line and "'ﬁne' becomes 'fine'" in line


def test_targets_without_a_label_are_not_unknown():
    check = data_check.DataCheck(WORDS)
    tokens = data_check.Tokens(np.array([UNK, 1, 5, 1]), np.array([2, 2]))
    check.add(data_check.Tokens(np.array([5, 1, 5, 1]), np.array([2, 2])), tokens, ["<unk>", None])
    assert [*check.lines()] == []


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The rows of a benchmark's own files: SeqIO's task in the cache."""
    tmp_path = tmp_path_factory.mktemp("mrpc")
    folder = tmp_path / "MRPC"
    folder.mkdir()
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    for split, rows in {"train": [(0, "a b"), (1, "c d"), (0, "{e"), (0, "f")], "dev": [(1, "c d"), (1, "g")]}.items():
        lines = [header, *(f"{label}\t1\t2\t{text}\t{text}" for label, text in rows)]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    options = {"data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    lengths = {"inputs": 64, "targets": 16}
    for split in ("train", "validation"):
        request = TaskRequest("glue_mrpc_v200", WORDS.path, lengths, options["data_dir"])
        build_missing(request, split, tmp_path / "cache", False)
    return lambda split: DatasetConfig("glue_mrpc_v200", split, 2, lengths, **options)


def test_a_cached_split_and_a_slice_of_it_are_checked(cached):
    lines = []
    cached("train").batches(WORDS, say=lines.append)
    assert (
        "glue_mrpc_v200 train: targets of 3 of 4 rows do not decode to themselves: "
        + ("'not_equivalent' becomes 'not ⁇ equivalent'")
        in lines
    )
    assert any("of inputs (in 1 of 4 rows) and " in line and "of targets (in 3 of 4 rows)" in line for line in lines)
    lines.clear()
    cached("train[1:3]").batches(WORDS, say=lines.append)
    assert any("targets of 1 of 2 rows do not decode to themselves" in line for line in lines)
    lines.clear()
    cached("validation").eval_batches(WORDS, say=lines.append)
    assert lines == []


def test_inputs_that_training_has_too_are_counted(cached):
    train, validation = cached("train").batches(WORDS, say=None), cached("validation").eval_batches(WORDS, say=None)
    assert [*shared_inputs(train, validation)] == ["glue_mrpc_v200: inputs of 1 of 2 rows are those of a training row"]
    several = {"one": [row("a"), row("b")], "two": [row("c"), row("d")]}
    mixed = dataset_of(several, "train", batch_size=4, lengths=LENGTHS).batches(WORDS, say=None)
    other = {"one": [row("x"), row("c"), row("d")], "two": [row("y")]}
    tasks = dataset_of(other, "validation", batch_size=4, lengths=LENGTHS).eval_batches(WORDS, say=None)
    assert [*shared_inputs(mixed, tasks)] == ["one: inputs of 2 of 3 rows are those of a training row"]


def test_of_many_rows_a_sample_is_looked_at_and_that_is_said(monkeypatch):
    assert data_check.blocks(9) == [slice(0, 9)]
    parts = data_check.blocks(1_000_000)
    assert sum(part.stop - part.start for part in parts) == data_check.SAMPLE
    assert parts[0].start == 0 and parts[-1].stop == 1_000_000
    assert all(one.stop <= other.start for one, other in zip(parts, parts[1:], strict=False))
    monkeypatch.setattr(data_check, "BLOCK", 2)
    monkeypatch.setattr(dataset_module, "blocks", lambda count, most=4: data_check.blocks(count, 4))
    monkeypatch.setattr(dataset_module, "MOST_INPUTS", 4)
    rows = [row(f"film {n}", "a_b" if n < 2 else "good") for n in range(20)]
    lines, train = said(rows)
    assert lines[-1].startswith("rows train: targets of 2 of 4 rows do not decode to themselves: 'a_b' becomes ")
    assert lines[-1].endswith("; they are a sample of 20")
    same = dataset_of(rows, "validation", batch_size=4, lengths=LENGTHS).eval_batches(WORDS, say=None)
    assert [*shared_inputs(train, same)] == ["rows: inputs of at least 4 of 4 rows are those of a training row"]


def test_labels_that_share_their_tokens_under_the_limit_are_refused():
    labels = ["not_equivalent", "not_duplicate", "equivalent"]
    one, other = map(WORDS.encode, labels[:2])
    assert one[:2] == other[:2] and one[:3] != other[:3]
    rows = [row("a", label) for label in labels]
    with pytest.raises(SettingError) as error:
        said(rows, lengths={"inputs": 8, "targets": 3}, labels=labels)
    longest = max(len(WORDS.encode(label)) + 1 for label in labels)
    assert str(error.value) == (
        "the labels 'not_equivalent' and 'not_duplicate' are the same in the first 3 tokens of targets, end of "
        f"sequence included: set `lengths` to at least {longest} for 'targets', which holds every label"
    )
    assert error.value.setting == "task_feature_lengths"
    with pytest.raises(SettingError, match="'not_equivalent' and 'not_duplicate'"):
        config = dataset_of(rows, "validation", batch_size=1, lengths={"inputs": 8, "targets": 3}, labels=labels)
        config.eval_batches(WORDS, say=None)
    lines, _ = said(rows, lengths={"inputs": 8, "targets": 4}, labels=labels)
    assert (
        "rows train: no answer is generated as 'not_equivalent', 'not_duplicate': the length of targets truncates it"
        in lines
    )
    lines, _ = said(rows, lengths={"inputs": 8, "targets": longest}, labels=labels)
    assert not any("no answer" in line or "truncate" in line for line in lines)


@pytest.mark.parametrize("name", ["inputs", "targets"])
def test_a_length_that_leaves_the_end_of_sequence_alone_is_refused(name):
    with pytest.raises(SettingError) as error:
        said([row("a film", "good")], lengths={"inputs": 8, "targets": 8} | {name: 1})
    assert error.value.setting == "task_feature_lengths" and name in str(error.value)


def test_fewer_rows_than_a_batch_are_named():
    assert said([row("a film")], batch_size=16)[0] == [
        "rows train: has 1 row, fewer than a batch of 16: each batch is of 1 row"
    ]
    assert said([row("a film"), row("b")], batch_size=3)[0] == [
        "rows train: has 2 rows, fewer than a batch of 3: each batch is of 2 rows"
    ]
    assert said([row("a film"), row("b")], batch_size=2)[0] == []


def test_quotes_in_tsv_files_are_named(tmp_path):
    (tmp_path / "rows.tsv").write_text('inputs\ttargets\n"a film"\tgood\n"a" or "b\tbad\na plot\tgood\n')
    (tmp_path / "rows.jsonl").write_text(json.dumps(row('"a film"')) + "\n")
    lines, batches = said(files({"train": tmp_path / "rows.tsv"}))
    assert batches.examples.fields[0]["inputs_pretokenized"] == '"a film"'
    assert lines[0] == (
        f"{tmp_path / 'rows.tsv'}: inputs stands in quotes in 1 of 3 rows; quotes in a TSV file are part of the text: "
        "leave them out if they are not meant"
    )
    assert not any("quotes" in line for line in said(files({"train": tmp_path / "rows.jsonl"}))[0])


def test_a_run_says_it_once_at_its_start(model):
    rows = [row(f"a film {n}", "good" if n % 2 else "bad") for n in range(4)]
    options = {"steps": 2, "batch_size": 2, "eval_every": 1, "labels": ["bad", "good"], "progress": False}
    with pytest.warns(UserWarning) as caught:
        pt.train(model, pt.PromptTuning(2), rows, [row("a plot", "good"), *rows[:3]], **options)
    lines = [str(warning.message) for warning in caught]
    assert lines.count("rows: inputs of 3 of 4 rows are those of a training row") == 1
    assert len(set(lines)) == len(lines)


def test_runs_in_one_program_say_the_same_once():
    lines = []
    say = vectorized.without_repeats(lines.append)
    for line in ("a", "b", "a", "b", "c"):
        say(line)
    assert lines == ["a", "b", "c"]


def test_one_of_several_processes_says_it(monkeypatch, capsys):
    say = evaluation.data_warnings()
    assert say is not None
    say("a line")
    assert capsys.readouterr().err == "a line\n"
    monkeypatch.setattr(evaluation, "is_writer", lambda: False)
    assert evaluation.data_warnings() is None
