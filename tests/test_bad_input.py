"""What a user gets when something is wrong: one line that says what was found and what to set, and exit code 2."""

import gzip
import json
import lzma
import re
import shutil
import sys

import gin
import ml_dtypes
import numpy as np
import pytest
import seqio
from cached import load_split
from tiny import CONFIG, LENGTHS, PROMPT_LENGTH, own_caches, random_params

from prompt_tuning_jax.batches.build import build_split
from prompt_tuning_jax.batches.cache import TaskRequest
from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.tasks import glue, imdb, sources, text  # noqa: F401
from prompt_tuning_jax.tasks.review_grammar import sentences
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary
from prompt_tuning_jax.train import main as train_main

TUNE = "runs/prompt_tune.gin"


@pytest.fixture(autouse=True)
def caches(tiny, monkeypatch):
    """Those of the tiny runs, not the user's."""
    with own_caches(tiny, monkeypatch):
        yield


@pytest.fixture
def refused(tiny, tmp_path, monkeypatch, capfd):
    """Runs the command line, which must refuse, and returns the one line that it says why."""

    def run(*files_and_flags, folder=None, **macros):
        files = [argument for argument in files_and_flags if not argument.startswith("--")]
        flags = [argument for argument in files_and_flags if argument.startswith("--")]
        target = folder or tmp_path / "run"
        existed = target.exists()
        gin.clear_config()
        arguments = tiny.arguments(*files, **{"MODEL_DIR": str(target)} | macros)
        monkeypatch.setattr(sys, "argv", ["train", *arguments, *flags])
        with pytest.raises(SystemExit) as stop:
            train_main()
        lines = capfd.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert target.exists() == existed
        news = ("tokenising ", "demo_reviews ")  # what a run says of its data; nothing else is on stderr
        assert [line for line in lines if not line.startswith(news)] == [lines[-1]], lines
        return lines[-1].removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--gin.PROMT_LENGTH=5", "no macro PROMT_LENGTH in these gin files; did you mean PROMPT_LENGTH"),
        (
            "--gin_file=prompts/class_label.gin",
            "no gin file prompts/class_label.gin; did you mean prompts/class_labels",
        ),
        ("--gin.MODEL_DIR=runs/x", "--gin.MODEL_DIR=runs/x: "),
    ],
)
def test_a_misspelt_command_line(refused, flag, message):
    assert refused(flag).startswith(message)


@pytest.mark.parametrize("length", [0, -1, 4065, 5000])
def test_a_prompt_without_a_position_or_without_room(refused, length):
    room = 4096 - LENGTHS["inputs"]
    expected = (
        f"PROMPT_LENGTH is {length}, expected a whole number from 1 to {room}, the room beside inputs of 32 tokens"
    )
    assert refused(PROMPT_LENGTH=length) == expected


@pytest.mark.parametrize(
    "macros, message",
    [
        ({"BATCH_SIZE": 0}, "BATCH_SIZE is 0, expected a whole number of at least 1"),
        ({"TRAIN_STEPS": 0}, "TRAIN_STEPS is 0, expected a whole number of at least 1"),
        ({"EVAL_PERIOD": -5}, "EVAL_PERIOD is -5, expected a whole number of at least 1"),
        ({"TASK_FEATURE_LENGTHS": {"inputs": 32}}, "TASK_FEATURE_LENGTHS has no key 'targets', expected 'inputs' and"),
        ({"TASK_FEATURE_LENGTHS": {"inputs": 0, "targets": 8}}, "TASK_FEATURE_LENGTHS['inputs'] is 0, expected a"),
        ({"TRAIN_SPLIT": "train[:10%]"}, "split 'train[:10%]', expected a name or a slice such as train[:-2000]: set"),
        ({"DATA_DIR": "/no/such"}, "no folder /no/such: set DATA_DIR to the folder that holds the task's files"),
    ],
)  # fmt: skip
def test_a_number_or_a_name_that_cannot_be(refused, macros, message):
    assert refused(**macros).startswith(message)


def test_a_task_that_is_not_there(refused, tiny):
    message = refused(MIXTURE_OR_TASK_NAME="demo_review")
    assert message == "no task 'demo_review'; did you mean 'demo_reviews'? Set MIXTURE_OR_TASK_NAME"
    assert not list((tiny.folder / "cache" / "tasks").glob("demo_review-*"))


def save(path, array):
    with open(path, "wb") as file:
        np.save(file, array)
    return path


def prompt_of(shape, value=0.5, dtype=np.float32):
    return np.full(shape, value, dtype)


@pytest.mark.parametrize(
    "array, message",
    [
        (prompt_of((PROMPT_LENGTH, 24)), "is [5, 24], expected [5, 16]: set PROMPT_LENGTH to its length, and INITIAL_"),
        (prompt_of((7, 16)), "is [7, 16], expected [5, 16]: set PROMPT_LENGTH"),
        (prompt_of((5, 16), np.nan), "holds NaN or infinity; expected a prompt, float32 [prompt length, d_model]"),
        (prompt_of((5, 16), 1, np.int32), "holds int32 [5, 16]; expected a prompt, float32"),
        (prompt_of((80,)), "holds float32 [80]; expected a prompt, float32"),
        (np.zeros((5, 16), "V8"), "holds |V8 [5, 16]; expected a prompt, float32"),
        (np.zeros((5, 16), ml_dtypes.bfloat16), "holds |V2 [5, 16]; expected a prompt, float32"),  # as NumPy stores it
    ],
)  # fmt: skip
def test_a_prompt_of_another_kind(refused, tmp_path, array, message):
    path = save(tmp_path / "prompt.npy", array)
    found = refused("prompts/from_file.gin", TUNE, PROMPT_FILE=str(path))
    assert str(path) in found and message in found


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "absent"])
def test_a_prompt_that_cannot_be_read(refused, tmp_path, damage):
    path = save(tmp_path / "prompt.npy", prompt_of((5, 16)))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "text":
        path.write_text("not an array")
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    message = refused("prompts/from_file.gin", TUNE, PROMPT_FILE=str(path))
    assert str(path) in message and "expected a prompt, float32 [prompt length, d_model]: set PROMPT_FILE" in message


@pytest.mark.parametrize("labels", [["positive", "☃"], ["", "negative"]])
def test_a_class_label_that_the_vocabulary_cannot_write(refused, labels):
    message = refused("prompts/class_labels.gin", TUNE, CLASS_LABELS=labels)
    found = "'☃' tokenises to <unk>" if "☃" in labels else "'' tokenises to nothing"
    assert message == f"{found}: set CLASS_LABELS to words that the tokenizer knows"


def test_a_prompt_text_that_the_vocabulary_cannot_write(refused):
    message = refused("prompts/string.gin", TUNE, PROMPT_TEXT="is it ☃ ?")
    assert message == "'is it ☃ ?' tokenises to <unk>: set PROMPT_TEXT to words that the tokenizer knows"


def test_a_base_of_another_size(refused, tiny, tmp_path):
    """Whether its config.json or only a tensor says so."""
    message = refused("--gin.config.T5Config.emb_dim=24", "--gin.config.T5Config.num_heads=3")
    assert message == (
        f"{tiny.base} has another size than the configuration (emb_dim 16, not 24; num_heads 2, not 3): use the "
        "models/*.gin file of the checkpoint's size, or set INITIAL_CHECKPOINT_PATH to a checkpoint of the configured "
        "size"
    )
    message = refused("--gin_file=models/nano.gin")
    assert "has 400 ids, the model 8320 rows" in message and "Use the models/*.gin of the base's size" in message

    params = random_params(0)
    params["encoder/layers_0/mlp/wo/kernel"] = params["encoder/layers_0/mlp/wo/kernel"][:31]
    huggingface.write(tmp_path / "base", CONFIG, params, tiny.vocabulary)
    message = refused(INITIAL_CHECKPOINT_PATH=str(tmp_path / "base"))
    assert (
        "does not fit the model: encoder/layers_0/mlp/wo/kernel is [31, 16], not [32, 16]: set INITIAL_CHECKPOINT"
        in message
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        ("no folder", "no base model at {base}; expected a folder, an id on the hub or one of nano: set INITIAL"),
        ("no config.json", "{base} is no base model: it has neither config.json (Hugging Face) nor"),
        (
            "no model.safetensors",
            "{base} has no weights: expected model.safetensors, pytorch_model.bin, flax_model.msgpack",
        ),
        ("half of config.json", "{base}/config.json is not the configuration of a T5 ("),
        ("half of model.safetensors", "{base}/model.safetensors cannot be read ("),
        ("half of spiece.model", "{base}/spiece.model is not a SentencePiece model: set VOCABULARY to a .model file"),
        ("no spiece.model", "no vocabulary beside the base {base}: set VOCABULARY to its SentencePiece .model file"),
    ],
)
def test_a_base_that_is_not_whole(refused, tiny, tmp_path, damage, message):
    base = tmp_path / "base"
    shutil.copytree(tiny.base, base)
    how, _, name = damage.rpartition(" ")
    if name == "folder":
        shutil.rmtree(base)
    elif how == "no":
        (base / name).unlink()
    else:
        whole = (base / name).read_bytes()
        (base / name).write_bytes(whole[: len(whole) // 2])
    found = refused(INITIAL_CHECKPOINT_PATH=str(base))
    assert found.startswith(message.format(base=base))
    assert "set INITIAL_CHECKPOINT_PATH" in found or "Set INITIAL_CHECKPOINT_PATH" in found or "set VOCABULARY" in found


def test_an_empty_folder_is_no_base_model(refused, tmp_path):
    (tmp_path / "base").mkdir()
    found = refused(INITIAL_CHECKPOINT_PATH=str(tmp_path / "base"))
    assert found.startswith(f"{tmp_path / 'base'} is no base model: it has neither config.json (Hugging Face) nor")


def test_a_base_that_lacks_a_tensor(refused, tiny, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny.base, tmp_path / "base")
    weights = tmp_path / "base" / huggingface.WEIGHTS
    tensors = load_file(weights)
    del tensors["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    message = refused(INITIAL_CHECKPOINT_PATH=str(tmp_path / "base"))
    assert "encoder" in message and ("lacks" in message or "missing" in message) and str(tmp_path / "base") in message


def test_a_vocabulary_of_another_model(refused, data_dir, tmp_path):
    path = data_dir / "t5" / "spiece.model"
    message = refused(VOCABULARY=str(path))
    assert message.startswith(f"vocabulary {path} has 32100 ids, the model 400 rows")
    assert message.endswith("or set VOCABULARY")
    absent = tmp_path / "absent.model"
    message = refused(VOCABULARY=str(absent))
    assert message.startswith(f"no vocabulary at {absent} (No such file or directory)") and "set VOCABULARY" in message


@pytest.mark.parametrize("place", ["a_file/run", "a_file", "/proc/run"])
def test_a_folder_that_cannot_be_written(refused, tmp_path, place):
    (tmp_path / "a_file").write_text("kept")
    folder = tmp_path / place
    message = refused(folder=folder)
    assert message.startswith(f"cannot write to {folder} (")
    assert message.endswith("): set MODEL_DIR to a folder that can be written")
    assert (tmp_path / "a_file").read_text() == "kept"


def test_a_cache_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "a_file").write_text("kept")
    message = refused(CACHE_DIR=str(tmp_path / "a_file" / "cache"))
    assert message.startswith(f"cannot write to {tmp_path / 'a_file' / 'cache'}/demo_reviews-")
    assert message.endswith("): set CACHE_DIR to a folder that can be written")


@pytest.fixture(scope="module")
def short_run(tiny, tmp_path_factory):
    """A run of 20 steps on a copy of the base, as (folder of both, macros)."""
    root = tmp_path_factory.mktemp("short")
    shutil.copytree(tiny.base, root / "base")
    macros = {"INITIAL_CHECKPOINT_PATH": str(root / "base"), "TRAIN_STEPS": 20, "MODEL_DIR": str(root / "run")}
    done = tiny.run(tiny.arguments(**macros))
    assert done.returncode == 0, done.stderr
    return root, macros


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "events" not in path.name}


def test_a_folder_with_another_configuration(refused, tiny, short_run):
    root, macros = short_run
    before = snapshot(root / "run")
    message = refused(folder=root / "run", **macros | {"LEARNING_RATE": 0.25})
    assert re.fullmatch(
        rf"{re.escape(str(root / 'run'))} holds another run \(optimizer\.\S+ was -?0\.3, is -?0\.25\): "
        r"set another MODEL_DIR, or give --allow_other_config to go on with this one",
        message,
    )
    assert snapshot(root / "run") == before


def test_the_flag_to_go_on_with_another_configuration(tiny, short_run, tmp_path):
    root, macros = short_run
    shutil.copytree(root / "run", tmp_path / "run")
    macros = macros | {"TRAIN_STEPS": 40, "LEARNING_RATE": 0.25, "MODEL_DIR": str(tmp_path / "run")}
    done = tiny.run([*tiny.arguments(**macros), "--allow_other_config"])
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 40
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 20, 30, 40, 40]


def test_a_run_does_not_go_on_with_other_weights(refused, tiny, short_run, tmp_path):
    """The base's folder is the same, what lies in it is not."""
    root, macros = short_run
    before = snapshot(root / "run")
    huggingface.write(root / "base", CONFIG, random_params(1), tiny.vocabulary)
    try:
        message = refused(folder=root / "run", **macros | {"TRAIN_STEPS": 20})
    finally:
        huggingface.write(root / "base", CONFIG, random_params(0), tiny.vocabulary)
    assert message.startswith(f"{root / 'run'} holds another run (base_fingerprint was ")
    assert "set another MODEL_DIR" in message
    assert snapshot(root / "run") == before


@pytest.mark.parametrize("damage", ["truncate data", "truncate manifests", "delete _METADATA"])
def test_a_checkpoint_that_is_not_whole(tiny, short_run, tmp_path, damage):
    root, macros = short_run
    shutil.copytree(root / "run", tmp_path / "run")
    how, what = damage.split()
    pattern = {"data": "d/*", "manifests": "manifest.ocdbt", "_METADATA": "_METADATA"}[what]
    files = list((tmp_path / "run" / "checkpoints" / "20").rglob(pattern))
    assert files
    for path in files:
        if how == "delete":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run = tiny.run_process if damage == "truncate data" else tiny.run  # Orbax can print until the process has ended
    done = run(tiny.arguments(**macros | {"MODEL_DIR": str(tmp_path / "run")}))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("tokenising ", "demo_reviews "))]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: checkpoint 20 in MODEL_DIR cannot be restored (")
    assert lines[0].endswith("): delete its folder, or set another MODEL_DIR")


def tsv(*lines, header="sentence\tlabel"):
    return "\n".join([header, *lines]) + "\n"


GOOD = "a fine film \t1"


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "line 1: no header with the columns sentence, label"),
        (tsv(header="text\tlabel"), "line 1: no header with the columns sentence, label"),
        (tsv(GOOD, "", " "), "line 4: 1 columns, expected 2"),
        (tsv(GOOD, "caf\udce9\t1", GOOD), "line 3: not UTF-8"),
        (tsv(GOOD, "one \r film\t2"), "line 3: label '2', expected 0 .. 1"),
        (tsv(GOOD, GOOD, "no label"), "line 4: 1 columns, expected 2"),
        (tsv(GOOD, "one\t1\tmore"), "line 3: 3 columns, expected 2"),
        (tsv("\t1"), "line 2: an empty or missing text: ''"),
        (tsv("  \t1"), "line 2: an empty or missing text: '  '"),
        (tsv(GOOD, "a film\t2"), "line 3: label '2', expected 0 .. 1"),
        (tsv(GOOD, "a film\tpositive"), "line 3: label 'positive', expected 0 .. 1"),
        (tsv(GOOD, "a film\t"), "line 3: label '', expected 0 .. 1"),
    ],
)
def test_a_malformed_row_of_a_tsv_is_found_by_file_and_line(tmp_path, content, message):
    path = tmp_path / "train.tsv"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as error:
        list(sources.read_tsv(path, {"sentence": sources.text, "label": sources.label(2)}))
    assert str(error.value).startswith(f"{path}, ") and message in str(error.value)


@pytest.mark.parametrize(
    "line, message",
    [
        (" ", "line 2: Expecting value"),
        ('{"text": "a film"', "line 2: Expecting ',' delimiter"),
        ('{"text": "a film"}', "line 2: no field 'label'; expected text, label"),
        ('{"label": 1}', "line 2: no field 'text'; expected text, label"),
        ('{"text": "", "label": 1}', "line 2: an empty or missing text: ''"),
        ('{"text": null, "label": 1}', "line 2: an empty or missing text: None"),
        ('{"text": ["a"], "label": 1}', "line 2: an empty or missing text: ['a']"),
        ('{"text": "a film", "label": -1}', "line 2: label -1, expected 0 .. 1"),
        ('{"text": "a film", "label": true}', "line 2: label True, expected 0 .. 1"),
        ("[1, 2]", "line 2: "),
        ("null", "line 2: "),
        ("3", "line 2: "),
        ("caf\udce9", "line 2: not UTF-8"),
    ],
)
@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_a_malformed_row_of_jsonl_is_found_by_file_and_line(tmp_path, line, message, suffix, opener):
    path = tmp_path / f"imdb_train.jsonl{suffix}"
    with opener(path, "wt", encoding="utf-8", errors="surrogateescape") as file:
        file.write('{"text": "a film", "label": 0}\n' + line + "\n" + '{"text": "a film", "label": 0}\n')
    with pytest.raises(ValueError) as error:
        list(sources.read_jsonl(path, {"text": sources.text, "label": sources.label(2)}))
    assert str(error.value).startswith(f"{path}, {message}")


@pytest.mark.parametrize("suffix, opener", [(".gz", gzip.open), (".xz", lzma.open)])
def test_a_compressed_file_that_lost_its_end_is_named(tmp_path, suffix, opener):
    path = tmp_path / f"imdb_train.jsonl{suffix}"
    with opener(path, "wt") as file:
        file.writelines(
            f'{{"text": "{sentence.text}", "label": {sentence.label}}}\n' for sentence in sentences("train")
        )
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=rf"{path}, after line \d+: cannot be read \(.*\); mend it, or set `data_dir`"):
        list(sources.read_jsonl(path, {"text": sources.text, "label": sources.label(2)}))


def test_a_line_of_plain_text_that_is_no_text_is_named(tiny, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_bytes(b"a fine film with a plot\n" * 20 + b"caf\xe9 \n")
    request = TaskRequest("text_prefix_lm", str(tiny.vocabulary), LENGTHS, str(tmp_path / "data"))
    try:
        with pytest.raises(ValueError, match=f"^{tmp_path / 'data' / 'a.txt'}, line 21: not UTF-8 .* set `data_dir`"):
            build_split(request, "train", tmp_path / "cache" / "train")
    finally:
        sources.set_data_dir(None)
    assert not list((tmp_path / "cache").iterdir())


def test_a_data_set_that_tfds_cannot_give_is_named_with_the_way_around():
    source = sources.FilesOrTfds("no_such_set:1.0.0", {"train": "no_such/train.tsv"}, sources.read_lines)
    with pytest.raises(
        ValueError, match="TFDS cannot give no_such_set:1.0.0 .*: set `data_dir` to the folder with no_such/"
    ):
        source.get_dataset("train")


def test_a_malformed_row_stops_a_run_before_it_begins(refused, tmp_path, tiny):
    (tmp_path / "data" / "SST-2").mkdir(parents=True)
    path = tmp_path / "data" / "SST-2" / "train.tsv"
    path.write_text(tsv(GOOD, GOOD, "a film\tx"))
    (tmp_path / "data" / "SST-2" / "dev.tsv").write_text(tsv(GOOD))
    task = {"MIXTURE_OR_TASK_NAME": "glue_sst2_v200", "DATA_DIR": str(tmp_path / "data")}
    message = refused(**task)
    assert message == f"{path}, line 4: label 'x', expected 0 .. 1; mend it, or set DATA_DIR to a sound copy"
    assert not list((tiny.folder / "cache" / "tasks").glob("glue_sst2_v200-*"))


def test_a_file_without_rows_stops_a_run_before_it_begins(refused, tmp_path):
    (tmp_path / "data" / "SST-2").mkdir(parents=True)
    (tmp_path / "data" / "SST-2" / "train.tsv").write_text(tsv())
    message = refused(MIXTURE_OR_TASK_NAME="glue_sst2_v200", DATA_DIR=str(tmp_path / "data"))
    assert message == f"SST-2/train.tsv under DATA_DIR {tmp_path / 'data'} has no rows"


FILES = {"glue_sst2_v200": "SST-2/train.tsv", "imdb_reviews_v100": "imdb_train.jsonl"}


def test_a_folder_without_the_tasks_files_is_named(tmp_path):
    sources.set_data_dir(str(tmp_path))
    try:
        for name, file in FILES.items():
            with pytest.raises(
                ValueError, match=f"no {file} under `data_dir` {tmp_path}: set `data_dir` to the folder that"
            ):
                seqio.TaskRegistry.get(name).source.get_dataset("train")
        with pytest.raises(ValueError, match=f"no \\*.txt files under `data_dir` {tmp_path}: set it to a folder"):
            seqio.TaskRegistry.get("text_prefix_lm").source.get_dataset("train")
    finally:
        sources.set_data_dir(None)


def test_inputs_that_are_cut_are_counted(tiny, capfd):
    cache = tiny.folder / "cache" / "tasks"
    load_split(tiny.demo, "train", cache)
    words = Vocabulary(tiny.vocabulary)
    lengths = [len(words.encode(f"sentence: {row.text}")) + 1 for row in sentences("train")][:100]
    expected = sum(length > LENGTHS["inputs"] for length in lengths)
    assert 0 < expected < 100
    capfd.readouterr()
    batches = DatasetConfig("demo_reviews", "train[:100]", 10, LENGTHS, cache_dir=str(cache)).batches(words)
    line = f"demo_reviews train[:100]: `lengths` {LENGTHS} truncate inputs of {expected} of 100 examples"
    assert capfd.readouterr().err.splitlines().count(line) == 1
    assert sum(int((batches[n].inputs[:, -1] != 0).sum()) for n in range(10)) >= expected

    short = lengths.index(min(lengths))
    if min(lengths) <= LENGTHS["inputs"]:
        DatasetConfig("demo_reviews", f"train[{short}:{short + 1}]", 1, LENGTHS, cache_dir=str(cache)).batches(words)
        assert "truncate" not in capfd.readouterr().err, "nothing is said where nothing is cut"
