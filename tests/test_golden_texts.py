"""The texts that tasks make, character for character: against the official tasks' and T5's own."""

import hashlib
import json
from pathlib import Path

import mock_rows
import pytest
import seqio
from conftest import FIXTURES
from tiny import LENGTHS

from prompt_tuning_jax.batches.build import find_task
from prompt_tuning_jax.batches.cache import TaskRequest
from prompt_tuning_jax.tasks import sources
from prompt_tuning_jax.tasks.seqio_tokenizer import seqio_vocabulary
from prompt_tuning_jax.tokenizers.vocabulary import EOS

OFFICIAL = json.loads((FIXTURES / "official_golden_texts.json").read_text())
CORE = json.loads((FIXTURES / "official_core_names.json").read_text())["tasks"]
T5 = json.loads((FIXTURES / "t5_texts.json").read_text())
REAL = [(folder, task, split) for folder, tasks in T5.items() for task, splits in tasks.items() for split in splits]


@pytest.fixture(autouse=True)
def tfds_again():
    yield
    sources.set_data_dir(None)


def written(task, dataset):
    """A data set's examples before they are tokenised."""
    for step in task.preprocessors[: task.preprocessors.index(seqio.preprocessors.tokenize)]:
        dataset = step(dataset)
    return dataset


def plain(value):
    return [*map(plain, value)] if hasattr(value, "__len__") and not isinstance(value, bytes) else value.decode()


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_texts_are_those_of_the_official_task(tiny, monkeypatch, name):
    """None of the sixty stands on one of the official mistakes: those lie in postprocessors, metrics and mixtures."""
    mock_rows.use(monkeypatch, count=1)
    task = find_task(TaskRequest(name, str(tiny.vocabulary), LENGTHS))
    split = "validation" if "validation" in task.splits else next(iter(task.splits))
    found = [
        {
            "inputs": plain(example.pop("inputs")),
            "targets": plain(example.pop("targets")),
            "other_keys": sorted(example),
        }
        for example in written(task, task.source.get_dataset(split, shuffle=False)).as_numpy_iterator()
    ]
    assert found == OFFICIAL[name]


def real_folder(data_dir: Path, folder: str, tmp_path: Path) -> Path:
    if folder != "qqp":
        return data_dir / folder
    # GLUE's own, without its header line.
    (tmp_path / "QQP").mkdir()
    rows = (data_dir / "qqp" / "gluetrain_part_23496.tsv").read_bytes()
    (tmp_path / "QQP" / "train.tsv").write_bytes(b"id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n" + rows)
    return tmp_path


# What shared/data/README.md says of rows; a paragraph of MultiRC is a row for each answer.
COUNTS = {
    ("super_glue_boolq_v102", "train"): 9_427,
    ("super_glue_boolq_v102", "validation"): 3_270,
    ("super_glue_cb_v102", "train"): 250,
    ("super_glue_cb_v102", "validation"): 56,
    ("super_glue_copa_v102", "train"): 400,
    ("super_glue_copa_v102", "validation"): 100,
    ("super_glue_multirc_v102", "train"): 27_243,
    ("super_glue_multirc_v102", "validation"): 4_848,
    ("super_glue_rte_v102", "train"): 2_490,
    ("super_glue_rte_v102", "validation"): 277,
    ("super_glue_wsc_v102_simple_train", "train"): 554,
    ("super_glue_wsc_v102_simple_eval", "validation"): 104,
    ("super_glue_wic_v102", "train"): 5_428,
    ("glue_sst2_v200", "train"): 67_349,
    ("glue_mrpc_v200", "train"): 3_668,
    ("glue_cola_v200", "train"): 8_551,
    ("glue_cola_v200", "validation"): 1_043,
    ("glue_stsb_v200", "train"): 5_749,
    ("glue_stsb_v200", "validation"): 1_500,
    ("glue_rte_v200", "train"): 2_490,
    ("glue_rte_v200", "validation"): 277,
    ("glue_qqp_v200", "train"): 23_496,
}


def test_every_count_is_checked():
    assert {(name, split) for _, name, split in REAL} > COUNTS.keys()


@pytest.mark.parametrize("folder, name, split", REAL)
def test_every_real_row_reads_as_t5_wrote_it(data_dir, tiny, tmp_path, monkeypatch, folder, name, split):
    """All of a split at once, by a hash of its inputs and targets as T5's preprocessors made them of TFDS's rows."""
    expected = T5[folder][name][split]
    sources.set_data_dir(str(real_folder(data_dir, folder, tmp_path)))
    task = find_task(TaskRequest(name, str(tiny.vocabulary), LENGTHS))
    rows = task.source.get_dataset(split, shuffle=False)
    if folder != "fewglue" and (name, split) in COUNTS:
        assert int(rows.cardinality()) == COUNTS[name, split]
    digest, count, first = hashlib.sha256(), 0, None
    examples = written(task, rows).map(lambda example: (example["inputs"], example["targets"]))
    for batch in examples.batch(4096):
        for inputs, targets in zip(*(column.numpy() for column in batch), strict=True):
            first = first or (inputs.decode(), targets.decode())
            digest.update(inputs + b"\t" + targets + b"\n")
            count += 1
    assert first[0].startswith(expected["starts"]) and first[0].endswith(expected["ends"])
    assert first[1] == expected["targets"]
    assert (count, digest.hexdigest()) == (expected["examples"], expected["sha256"])


@pytest.mark.parametrize("folder, name", sorted({(folder, name) for folder, name, _ in REAL}))
def test_the_three_wordings_of_real_rows(data_dir, tmp_path, folder, name):
    """`taskless_` is the plain text without its first word, and `task_index_` that after the task's own sentinel."""
    vocabulary = data_dir / "t5" / "spiece.model"
    words = seqio_vocabulary(str(vocabulary))
    sources.set_data_dir(str(real_folder(data_dir, folder, tmp_path)))
    split = min(T5[folder][name], key=lambda split: T5[folder][name][split]["examples"])
    tasks = [
        find_task(TaskRequest(f"{wording}{name}", str(vocabulary), LENGTHS))
        for wording in ("", "taskless_", "task_index_")
    ]
    rows = tasks[0].source.get_dataset(split, shuffle=False).take(40)
    plainly, taskless, numbered = (
        [*task.preprocess_postcache(task.preprocess_precache(rows), None).as_numpy_iterator()] for task in tasks
    )
    number = CORE[f"task_index_{name}"]["number"]
    assert len(plainly) == len(taskless) == len(numbered) > 10
    # By SeqIO, as its tasks do: Python's SentencePiece breaks ties otherwise ("m mm", or "mm m").
    encoded = words.encode_tf([example["inputs_pretokenized"] for example in taskless]).to_list()
    for one, other, third, ids in zip(plainly, taskless, numbered, encoded, strict=True):
        first_word, _, rest = one["inputs_pretokenized"].decode().partition(" ")
        assert first_word.strip(":") in name
        assert other["inputs_pretokenized"].decode() == third["inputs_pretokenized"].decode() == rest
        assert [*other["inputs"]] == [*ids, EOS]
        assert [*third["inputs"]] == [words.vocab_size - 1 - number, *other["inputs"]]
        assert [*one["targets"]] == [*other["targets"]] == [*third["targets"]]
        assert [*one["targets"]] == [*words.encode(one["targets_pretokenized"].decode()), EOS]


@pytest.mark.parametrize("folder, name", [("glue", "glue_rte_v200"), ("super_glue", "super_glue_rte_v102")])
def test_data_dir_may_be_the_folder_that_holds_the_benchmark(data_dir, tiny, folder, name):
    source = find_task(TaskRequest(name, str(tiny.vocabulary), LENGTHS)).source
    found = []
    for root in (data_dir / folder, data_dir):
        sources.set_data_dir(str(root))
        found.append([*source.get_dataset("validation", shuffle=False).as_numpy_iterator()])
    assert len(found[0]) == 277
    assert found[0] == found[1]
