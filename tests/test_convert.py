"""`convert`: every format to every other bit for bit, and one line, exit code 2 and nothing left where it cannot be."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from fixtures.models import random_model
from safetensors.numpy import load_file, save_file
from tiny import train_vocabulary

from prompt_tuning_jax import convert
from prompt_tuning_jax.array_files.t5x import open_t5x
from prompt_tuning_jax.checkpoints import huggingface, t5x
from prompt_tuning_jax.checkpoints.base import load_base, open_model
from prompt_tuning_jax.checkpoints.conversion import MODEL_FORMATS, PROMPT_FORMATS
from prompt_tuning_jax.prompts.files import OFFICIAL_NAME, read_prompt, write_prompt
from prompt_tuning_jax.prompts.peft import write_adapter
from prompt_tuning_jax.t5.config import T5Config

# No two dimensions alike, and stacks of different depth: a transposed or misplaced matrix cannot fit.
CONFIG = T5Config(400, 24, 3, 2, 3, 40, head_dim=7)
TINY = T5Config(
    32128, 4, 2, 2, 2, 8, head_dim=2, relative_attention_num_buckets=4, relative_attention_max_distance=8
)  # fmt: skip
PROMPT = np.random.default_rng(0).normal(size=(5, CONFIG.emb_dim)).astype(np.float32)


def params_of(dtype, config=CONFIG):
    return {name: np.asarray(value).astype(dtype) for name, value in jax.device_get(random_model(config)[1]).items()}


DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def vocabulary() -> bytes:
    return train_vocabulary()


@pytest.fixture
def model(request, vocabulary, tmp_path) -> Path:
    """A Hugging Face folder, with a vocabulary; float32, unless a test says otherwise."""
    (tmp_path / "words").write_bytes(vocabulary)
    huggingface.write(
        tmp_path / "model", CONFIG, params_of(DTYPES[getattr(request, "param", "float32")]), tmp_path / "words"
    )
    return tmp_path / "model"


@pytest.fixture
def run(monkeypatch, capfd):
    """The command line, which must do what it is told; returns the line that it says."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        convert.main()
        out, err = capfd.readouterr()
        assert err == ""
        assert out.count("\n") == 1
        return out.strip()

    return run


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(monkeypatch, capfd, tmp_path):
    """The command line, which must refuse, and change nothing; returns the one line that it says why."""

    def run(*arguments):
        before = everything(tmp_path)
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            convert.main()
        out, err = capfd.readouterr()
        assert stop.value.code == 2
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert everything(tmp_path) == before
        assert "INITIAL_CHECKPOINT_PATH" not in err and "PROMPT_FILE" not in err
        return err.removeprefix("error: ").rstrip()

    return run


# Models.


@pytest.mark.parametrize("model", DTYPES, indirect=True)
@pytest.mark.parametrize("through", ["t5x", "orbax", "huggingface"])
def test_there_and_back_is_bit_identical(run, model, tmp_path, through):
    """Every file, the vocabulary too, in the dtype it had."""
    run(model, tmp_path / "there", f"--to={through}")
    run(tmp_path / "there", tmp_path / "back", "--to=huggingface")
    assert everything(tmp_path / "back") == everything(model)
    assert set(everything(model)) == {"config.json", "model.safetensors", "spiece.model"}


@pytest.mark.parametrize("model", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("first", MODEL_FORMATS)
@pytest.mark.parametrize("second", MODEL_FORMATS)
def test_any_format_becomes_any_other(run, model, vocabulary, tmp_path, first, second):
    expected = {name: np.asarray(array) for name, array in open_model(str(model)).arrays.items()}
    line = run(model, tmp_path / "first", "--to", first)
    assert line.startswith(f"{tmp_path / 'first'}: {len(expected)} arrays, ")
    run(tmp_path / "first", tmp_path / "second", "--to", second)
    found = open_model(str(tmp_path / "second"))
    assert found.config == CONFIG
    assert found.arrays.keys() == expected.keys()
    for name, value in expected.items():
        assert found.arrays[name].dtype == value.dtype
        assert np.asarray(found.arrays[name]).tobytes() == value.tobytes(), name
    assert (tmp_path / "second" / "spiece.model").read_bytes() == vocabulary


def test_parameters_there_and_back(run, tmp_path):
    """From JAX's arrays to Hugging Face and to T5X's layout, and back into a base on the device."""
    params = random_model(CONFIG)[1]
    huggingface.write(tmp_path / "model", CONFIG, params)
    run(tmp_path / "model", tmp_path / "checkpoint_0", "--to=t5x")
    for folder in ("model", "checkpoint_0"):
        base = load_base(str(tmp_path / folder), CONFIG)
        for name, value in params.items():
            assert np.asarray(base.params[name]).tobytes() == np.asarray(value).tobytes()


def test_a_tied_model_of_plain_relu(run, tmp_path):
    """The first T5."""
    config = T5Config(400, 24, 3, 2, 3, 40, head_dim=7, logits_via_embedding=True, mlp_activations=("relu",))
    huggingface.write(tmp_path / "model", config, params_of(np.float32, config))
    run(tmp_path / "model", tmp_path / "there", "--to=t5x")
    run(tmp_path / "there", tmp_path / "back", "--to=huggingface")
    assert everything(tmp_path / "back") == everything(tmp_path / "model")


@pytest.mark.parametrize(
    "layout", ["t5x_tiny_checkpoint", "t5x_runs/legacy/checkpoint_9", "t5x_runs/orbax/checkpoint_9"]
)
def test_t5x_becomes_hugging_face(run, data_dir, tmp_path, layout):
    """What T5X wrote, its prompt left out; `transformers` would load it."""
    source = data_dir / "t5" / layout
    line = run(source, tmp_path / "model", "--to=huggingface", f"--vocabulary={data_dir / 't5' / 'spiece.model'}")
    assert line.endswith("relative_attention_max_distance, which no T5X checkpoint says, was taken for T5's 128")
    config = T5Config(**vars(TINY) | {"relative_attention_max_distance": 128})
    found, expected = load_base(str(tmp_path / "model"), config), load_base(str(source), config)
    assert found.fingerprint == expected.fingerprint
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert tensors.keys() == {theirs for theirs, _ in huggingface.names(config).values()}
    kernel = np.asarray(open_t5x(source)["encoder/layers_1/mlp/wi_0/kernel"])
    np.testing.assert_array_equal(tensors["encoder.block.1.layer.1.DenseReluDense.wi_0.weight"], kernel.T)
    assert (tmp_path / "model" / "spiece.model").read_bytes() == (data_dir / "t5" / "spiece.model").read_bytes()


@pytest.mark.parametrize("to", ["t5x", "orbax"])
def test_a_prompt_in_a_checkpoint_stays_in_one(run, data_dir, tmp_path, to):
    source = data_dir / "t5" / "t5x_runs" / "legacy" / "checkpoint_9"
    run(source, tmp_path / "checkpoint_9", f"--to={to}")
    np.testing.assert_array_equal(read_prompt(tmp_path / "checkpoint_9"), read_prompt(source))


def test_the_embedded_base_by_its_name(run, tmp_path):
    run("nano", tmp_path / "checkpoint_0", "--to=t5x")
    arrays = open_model("nano").arrays
    for name, array in open_t5x(tmp_path / "checkpoint_0").items():
        assert np.asarray(array).tobytes() == np.asarray(arrays[name]).tobytes()
    assert (tmp_path / "checkpoint_0" / "spiece.model").stat().st_size > 1000


def test_a_tuned_model_in_its_runs_folder(run, refused, tmp_path):
    """`best/model` of a run; the run's folder itself says where that is."""
    huggingface.write(tmp_path / "run" / "best" / "model", CONFIG, params_of(np.float32))
    tuned = tmp_path / "run" / "best" / "model"
    message = refused(tmp_path / "run", tmp_path / "checkpoint_0", "--to=t5x")
    assert f"did you mean {tuned}?" in message and "SOURCE" in message
    run(tuned, tmp_path / "checkpoint_0", "--to=t5x")
    run(tmp_path / "checkpoint_0", tmp_path / "back", "--to=huggingface")
    assert everything(tmp_path / "back") == everything(tuned)


def test_a_model_without_a_vocabulary_says_so(run, tmp_path):
    huggingface.write(tmp_path / "model", CONFIG, params_of(np.float32))
    line = run(tmp_path / "model", tmp_path / "checkpoint_0", "--to=t5x")
    assert line.endswith(f"no tokenizer lies beside {tmp_path / 'model'}; --vocabulary=FILE puts one there")


def test_a_target_in_folders_that_are_not_there_yet(run, model, tmp_path):
    run(model, tmp_path / "new" / "folders" / "checkpoint_0", "--to=t5x")
    assert sorted(path.name for path in (tmp_path / "new" / "folders").iterdir()) == ["checkpoint_0"]


# Prompts.


def written(folder: Path, form: str) -> Path:
    if form == "npy":
        write_prompt(folder / "prompt.npy", PROMPT)
        return folder / "prompt.npy"
    if form == "peft":
        write_adapter(folder / "adapter", PROMPT, "a/base")
        return folder / "adapter"
    write_prompt(folder / "prompts" / OFFICIAL_NAME, PROMPT)
    return folder / "prompts"


@pytest.mark.parametrize("first", PROMPT_FORMATS)
@pytest.mark.parametrize("second", PROMPT_FORMATS)
def test_prompts_become_any_other(run, tmp_path, first, second):
    """And back, byte for byte in npy's case."""
    source = written(tmp_path, first)
    line = run(source, tmp_path / "there", f"--to={second}")
    assert line == f"{tmp_path / 'there'}: a prompt, float32 [5, 24]"
    found = {
        "npy": lambda: np.load(tmp_path / "there"),
        "peft": lambda: load_file(tmp_path / "there" / "adapter_model.safetensors")["prompt_embeddings"],
        "t5x": lambda: np.load(tmp_path / "there" / OFFICIAL_NAME),
    }[second]()
    assert found.dtype == np.float32 and found.tobytes() == PROMPT.tobytes()
    run(tmp_path / "there", tmp_path / "back.npy", "--to=npy")
    write_prompt(tmp_path / "expected.npy", PROMPT)
    assert (tmp_path / "back.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


@pytest.mark.parametrize("to", ["npy", "peft"])
@pytest.mark.parametrize("layout", ["legacy", "orbax"])
def test_a_prompt_out_of_a_t5x_checkpoint(run, data_dir, tmp_path, layout, to):
    runs = data_dir / "t5" / "t5x_runs"
    run(runs / layout / "checkpoint_9", tmp_path / "prompt", f"--to={to}")
    found = read_prompt(tmp_path / "prompt")
    assert found.shape == (100, 4)
    assert found.tobytes() == read_prompt(runs / layout / "checkpoint_9").tobytes()
    if layout == "legacy":
        np.testing.assert_array_equal(found, np.load(runs / "legacy/numpy_checkpoints/checkpoint_9" / OFFICIAL_NAME))


def test_released_prompts_as_adapters(run, data_dir, tmp_path):
    source = data_dir / "t5" / "released_prompts" / "sst2.npy"
    run(source, tmp_path / "adapter", "--to=peft", "--base=google/t5-base-lm-adapt")
    run(tmp_path / "adapter", tmp_path / "back.npy", "--to=npy")
    np.testing.assert_array_equal(np.load(tmp_path / "back.npy"), np.load(source))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "google/t5-base-lm-adapt"


def test_a_base_of_the_prompts_width_is_checked(run, refused, model, tmp_path):
    source = written(tmp_path, "npy")
    run(source, tmp_path / "adapter", "--to=peft", f"--base={model}")
    message = refused(source, tmp_path / "other", "--to=peft", "--base=nano")
    assert "is [5, 24], but nano has d_model 128: set --base" in message
    (model / "config.json").write_text("{}")
    assert "--base" in refused(source, tmp_path / "other", "--to=peft", f"--base={model}")


# Refusals.


@pytest.mark.parametrize("to", [*MODEL_FORMATS, "npy", "peft"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_target_that_is_there_already(refused, model, tmp_path, to, kind):
    target = tmp_path / "target"
    {"file": target.touch, "folder": target.mkdir, "link": lambda: target.symlink_to("nowhere")}[kind]()
    source = model if to in MODEL_FORMATS else written(tmp_path, "npy")
    assert refused(source, target, f"--to={to}") == (
        f"{target} is there already: set TARGET to a new path, or delete it"
    )


def test_a_misspelt_command_line(refused, model, tmp_path):
    target = tmp_path / "target"
    assert "'pytorch'" in refused(model, target, "--to=pytorch")
    for arguments in ([], [model], [model, target], [model, "--to=t5x"], [model, target, "third", "--to=t5x"]):
        message = refused(*arguments)
        assert "--help lists what there is" in message
    assert "--too" in refused(model, target, "--to=t5x", "--too=1")
    assert "--help lists what there is" in refused(model, target, "--t=t5x")  # nothing is abbreviated


def test_a_prompt_is_no_model_and_a_model_no_prompt(refused, model, tmp_path, data_dir):
    target = tmp_path / "target"
    for form in PROMPT_FORMATS:
        source = written(tmp_path, form)
        for to in ("huggingface", "orbax"):
            message = refused(source, target, f"--to={to}")
            assert message == f"{source} is a prompt, which cannot become '{to}': set --to=npy|peft|t5x"
    for to in ("npy", "peft"):
        message = refused(model, target, f"--to={to}")
        assert message == f"{model} is a model, which cannot become '{to}': set --to=t5x|huggingface|orbax"
        message = refused(data_dir / "t5" / "t5x_tiny_checkpoint", target, f"--to={to}")
        assert "has no prompt among its parameters" in message and "SOURCE" in message


@pytest.mark.parametrize("to", ["huggingface", "npy", "peft", "t5x", "orbax"])
def test_a_source_that_is_not_there(refused, tmp_path, to):
    message = refused(tmp_path / "absent", tmp_path / "target", f"--to={to}")
    assert str(tmp_path / "absent") in message and "SOURCE" in message
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path / "empty", tmp_path / "target", f"--to={to}")
    assert str(tmp_path / "empty") in message and "SOURCE" in message


def test_a_vocabulary_that_is_not_there(refused, model, tmp_path):
    message = refused(model, tmp_path / "target", "--to=t5x", f"--vocabulary={tmp_path / 'absent'}")
    assert message.startswith(f"no vocabulary at {tmp_path / 'absent'} (") and "set --vocabulary" in message
    (tmp_path / "text").write_bytes(b"any bytes")
    message = refused(model, tmp_path / "target", "--to=t5x", f"--vocabulary={tmp_path / 'text'}")
    assert message.startswith(f"{tmp_path / 'text'} is not a SentencePiece model: set --vocabulary")


@pytest.mark.parametrize("to", MODEL_FORMATS)
def test_truncated_sources(refused, model, tmp_path, to):
    """Refused when opened, or half way through: of nothing a half is left."""
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "SOURCE" in refused(model, tmp_path / "new" / "target", f"--to={to}")
    t5x.write(tmp_path / "checkpoint_0", params_of(np.float32))
    chunk = tmp_path / "checkpoint_0" / "target.decoder.logits_dense.kernel" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    message = refused(tmp_path / "checkpoint_0", tmp_path / "new" / "target", f"--to={to}")
    assert "decoder/logits_dense/kernel" in message and message.endswith(": set SOURCE to a whole one")


@pytest.mark.parametrize("to", MODEL_FORMATS)
def test_sources_that_lack_arrays(refused, tmp_path, to):
    """By the shapes alone: the rest may be as sound as it likes."""
    params = params_of(np.float32)
    del params["decoder/layers_1/mlp/wo/kernel"]
    t5x.write(tmp_path / "checkpoint_0", params)
    message = refused(tmp_path / "checkpoint_0", tmp_path / "target", f"--to={to}")
    assert "decoder/layers_1/mlp/wo/kernel is missing" in message and "SOURCE" in message
    t5x.write(tmp_path / "checkpoint_1", {"encoder/encoder_norm/scale": np.ones(4, np.float32)})
    assert "SOURCE" in refused(tmp_path / "checkpoint_1", tmp_path / "target", f"--to={to}")


@pytest.mark.parametrize("to", PROMPT_FORMATS)
def test_truncated_prompts(refused, tmp_path, to):
    for form, file in (("npy", "."), ("peft", "adapter_model.safetensors"), ("t5x", OFFICIAL_NAME)):
        source = written(tmp_path, form)
        path = source / file if source.is_dir() else source
        path.write_bytes(path.read_bytes()[:-1])
        message = refused(source, tmp_path / "new" / "target", f"--to={to}")
        assert str(path) in message and "SOURCE" in message


def test_weights_that_are_no_floats(refused, model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors["shared.weight"] = tensors["shared.weight"].astype(np.int8)
    save_file(tensors, model / "model.safetensors")
    message = refused(model, tmp_path / "target", "--to=t5x")
    assert "shared.weight" in message and "I8" in message and "SOURCE" in message


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("to", [*MODEL_FORMATS, *(f"prompt {to}" for to in PROMPT_FORMATS)])
def test_a_full_disk(refused, model, tmp_path, monkeypatch, to):
    """Full at the last byte: what was written is taken away, the folders around it too."""
    source = model if to in MODEL_FORMATS else written(tmp_path, "npy")

    def full(*_, **__):
        raise FULL

    # The last thing that each format writes.
    if to in ("huggingface", "t5x", "orbax"):
        monkeypatch.setattr(shutil, "copyfile", full)
    else:
        monkeypatch.setattr(os, "replace", full)
        monkeypatch.setattr(Path, "rename", full)
    message = refused(source, tmp_path / "new" / "folder" / "target", f"--to={to.removeprefix('prompt ')}")
    assert message == (
        f"{tmp_path / 'new' / 'folder' / 'target'} cannot be written (No space left on device): "
        "set TARGET to a place with room"
    )


@pytest.mark.parametrize("to", ["huggingface", "t5x", *(f"prompt {to}" for to in PROMPT_FORMATS)])
def test_a_file_that_cannot_grow(model, tmp_path, to):
    """A limit on the size of files, which every library meets where it writes; Orbax's grumble beside the line."""
    source = model if to in MODEL_FORMATS else written(tmp_path, "npy")
    target = tmp_path / "new" / "target"
    before = everything(tmp_path)
    limit = 10_000 if to in MODEL_FORMATS else 400
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    code += "from prompt_tuning_jax import convert; convert.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, source, target, f"--to={to.removeprefix('prompt ')}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {target} cannot be written ("), done.stderr
    assert done.stderr.endswith("): set TARGET to a place with room\n") and done.stderr.count("\n") == 1
    assert everything(tmp_path) == before


def test_a_disk_with_too_little_room_is_met_before_writing(refused, model, tmp_path, monkeypatch):
    total = sum(value.nbytes for value in params_of(np.float32).values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=total - 1))
    message = refused(model, tmp_path / "new" / "target", "--to=orbax")
    assert message.startswith(f"{tmp_path / 'new' / 'target'} takes {total:,} bytes, and {tmp_path} has {total - 1:,}")
    assert message.endswith("set TARGET to a place with room")


def test_a_target_inside_a_file(refused, model, tmp_path):
    (tmp_path / "file").touch()
    for source, to in ((model, "t5x"), (model, "huggingface"), (written(tmp_path, "npy"), "npy")):
        assert "TARGET" in refused(source, tmp_path / "file" / "target", f"--to={to}")


def test_it_runs_without_tensorflow(model, tmp_path):
    """As the module that users call."""
    code = "import sys; sys.argv = ['convert', *sys.argv[1:]]; from prompt_tuning_jax import convert; convert.main(); "
    code += "assert not {'tensorflow', 'seqio', 'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, model, tmp_path / "checkpoint_0", "--to=t5x"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
