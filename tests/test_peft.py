"""Tests PEFT's prompt folders: they are read as `peft` reads them, `peft` loads ours, and damaged ones are refused."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from fixtures.models import prompted, random_model, random_tokens, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.base import load_base
from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.prompts.files import read_prompt, write_prompt
from prompt_tuning_jax.prompts.peft import is_adapter, read_adapter, write_adapter
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.decoding import greedy
from prompt_tuning_jax.t5.network import Transformer

# peft 0.21 needs a name that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# No two dimensions are equal, and the stacks differ in depth: a transposed or misplaced matrix cannot fit.
CONFIG = T5Config(61, 24, 3, 2, 3, 40, head_dim=7)
WIDTH, VOCABULARY = CONFIG.emb_dim, CONFIG.vocab_size
LENGTH = 5


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """Returns the folder of a T5 1.1 with random weights and a matrix of its own for the logits."""
    folder = tmp_path_factory.mktemp("base") / "model"
    # Cross-attention is three times as strong, so that answers depend on inputs and prompt, and some of them end.
    params = jax.device_get(random_model(CONFIG)[1])
    stronger = {path: 3 * value for path, value in params.items() if "encoder_decoder_attention/out" in path}
    huggingface.write(folder, CONFIG, params | stronger)
    return folder


@pytest.fixture(scope="module")
def our_params(base_folder):
    return tree(load_base(str(base_folder), CONFIG).params)


def their_base(base_folder):
    """Returns a new model for each call, because PEFT changes the model that it is given."""
    import transformers

    model = transformers.T5ForConditionalGeneration.from_pretrained(base_folder).eval()
    assert model.lm_head.weight is not model.shared.weight  # transformers 5 ties the logits unless the model is T5 1.1
    return model


def some_tokens(rows=8, width=20, seed=0):
    """Returns padded inputs of 1 to `width` tokens, and decoder inputs."""
    rng = np.random.default_rng(seed)
    return random_tokens(rng, rng.integers(1, width + 1, rows), width, VOCABULARY), random_tokens(
        rng, [6] * rows, 6, VOCABULARY
    )


def torch_inputs(inputs):
    import torch

    inputs = torch.tensor(np.asarray(inputs, np.int64))
    return {"input_ids": inputs, "attention_mask": (inputs > 0).long()}


def their_logits(model, inputs, decoder_inputs):
    import torch

    with torch.no_grad():
        decoder_inputs = torch.tensor(np.asarray(decoder_inputs, np.int64))
        return model(**torch_inputs(inputs), decoder_input_ids=decoder_inputs).logits.numpy()


@jax.jit
def our_logits(params, prompt, inputs, decoder_inputs):
    model = prompted(CONFIG)
    return model.apply({"params": params}, inputs, decoder_inputs, decoder_inputs, enable_dropout=False, prompt=prompt)


def their_answers(model, inputs, length=12):
    answers = model.generate(
        **torch_inputs(inputs),
        do_sample=False,
        num_beams=1,
        max_new_tokens=length,
        use_cache=False,  # their cache has a slot for each encoder layer, and the decoder has one layer more
    ).numpy()[:, 1:]
    return np.pad(answers, ((0, 0), (0, length - answers.shape[1])))


def our_answers(params, prompt, inputs, length=12):
    run = jax.jit(lambda params, prompt: greedy(Transformer(CONFIG), params, inputs, length, prompt=prompt)[0])
    return np.asarray(run(params, prompt))


def random_prompt(length=LENGTH, width=WIDTH, seed=0):
    return np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)


@pytest.fixture(scope="module", params=[None, 1], ids=["default", "encoder-only"])
def trained(request, peft, base_folder, tmp_path_factory):
    """Returns a prompt that PEFT trained and saved: (model, folder, number of rows in its file, losses)."""
    import torch

    torch.manual_seed(0)
    setting = {} if request.param is None else {"num_transformer_submodules": request.param}
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH, **setting)
    model = peft.get_peft_model(their_base(base_folder), config).eval()  # no dropout
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs, labels = some_tokens(rows=16, seed=1)
    labels = torch.tensor(np.asarray(labels, np.int64))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(**torch_inputs(inputs), labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    model.save_pretrained(folder)
    return model, folder, LENGTH * (request.param or 2), losses


def test_prompt_that_peft_trained_gives_its_logits(trained, our_params):
    model, folder, rows, losses = trained
    assert losses[-1] < losses[0] - 0.1
    written = load_file(folder / "adapter_model.safetensors")
    assert {name: array.shape for name, array in written.items()} == {"prompt_embeddings": (rows, WIDTH)}
    prompt = read_adapter(folder)
    assert (prompt.shape, prompt.dtype) == ((LENGTH, WIDTH), np.float32)
    np.testing.assert_array_equal(prompt, written["prompt_embeddings"][:LENGTH])
    inputs, decoder_inputs = some_tokens()
    expected = their_logits(model, inputs, decoder_inputs)
    found = our_logits(our_params, prompt, inputs, decoder_inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    without = their_logits(model.get_base_model(), inputs, decoder_inputs)
    assert np.abs(expected - without).max() > 0.1  # the prompt matters


@pytest.mark.parametrize("trained", [None], indirect=True)
def test_peft_reads_the_first_half_alone(peft, base_folder, trained, tmp_path):
    """So do we: PEFT saves rows for a second stack, but neither its forward pass nor a gradient uses them."""
    model, folder, rows, _ = trained
    assert rows == 2 * LENGTH  # the default
    gradient = model.prompt_encoder["default"].embedding.weight.grad.numpy()
    assert np.abs(gradient[:LENGTH]).min() > 0
    assert not gradient[LENGTH:].any()
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    logits = []
    for second_half in (0, 1e6):
        embeddings = np.array(load_file(folder / "adapter_model.safetensors")["prompt_embeddings"])
        embeddings[LENGTH:] = second_half
        save_file({"prompt_embeddings": embeddings}, tmp_path / "adapter_model.safetensors")
        loaded = peft.PeftModel.from_pretrained(their_base(base_folder), tmp_path)
        logits.append(their_logits(loaded, *some_tokens()))
        np.testing.assert_array_equal(read_adapter(tmp_path), embeddings[:LENGTH])
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("length", [1, LENGTH, 20])
def test_peft_generates_our_answers_from_our_folder(peft, base_folder, our_params, tmp_path, length):
    """64 inputs of 1 to 20 tokens have the same logits, and exactly the same greedy answers."""
    prompt = random_prompt(length)
    write_adapter(tmp_path / "adapter", prompt, str(base_folder))
    model = peft.PeftModel.from_pretrained(their_base(base_folder), tmp_path / "adapter")
    inputs, decoder_inputs = some_tokens(rows=64)
    assert len(set(np.sum(np.asarray(inputs) > 0, axis=1))) > 16
    expected = their_logits(model, inputs, decoder_inputs)
    found = our_logits(our_params, prompt, inputs, decoder_inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    answers = their_answers(model, inputs)
    np.testing.assert_array_equal(our_answers(our_params, prompt, inputs), answers)
    assert 0 < np.sum(np.any(answers == 1, axis=1)) < 64  # some end, some do not
    assert len(np.unique(answers, axis=0)) > 12
    assert np.sum(np.any(answers != their_answers(model.get_base_model(), inputs), axis=1)) > 32  # the prompt matters


def test_adapter_finds_its_base(peft, base_folder, tmp_path):
    """The folder names the model that the prompt was trained on, so PEFT needs only the folder's path."""
    write_adapter(tmp_path / "adapter", random_prompt(), str(base_folder))
    model = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
    expected = peft.PeftModel.from_pretrained(their_base(base_folder), tmp_path / "adapter")
    np.testing.assert_array_equal(their_logits(model, *some_tokens()), their_logits(expected, *some_tokens()))


def test_config_is_one_that_peft_writes(peft, trained, tmp_path):
    """Every field that we write has the value that PEFT's own file has, or one that we chose."""
    _, folder, rows, _ = trained
    write_adapter(tmp_path / "adapter", read_adapter(folder), "google/t5-v1_1-base")
    ours = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    theirs = json.loads((folder / "adapter_config.json").read_text())
    assert theirs["num_transformer_submodules"] == rows // LENGTH  # never null in a file that PEFT wrote
    chosen = {"base_model_name_or_path": "google/t5-v1_1-base", "num_transformer_submodules": 1}
    assert ours == {name: theirs[name] for name in ours} | chosen
    loaded = peft.PeftConfig.from_pretrained(tmp_path / "adapter").to_dict()
    assert {name: loaded[name] for name in ours} == ours
    assert (loaded["inference_mode"], loaded["prompt_tuning_init"]) == (True, "RANDOM")  # no tokenizer is fetched


@pytest.mark.parametrize("name", ["sst2", "mrpc", "rte"])
def test_released_prompts_go_to_peft_and_back(peft, data_dir, tmp_path, name):
    """The values stay bit for bit the same, also as PEFT's own reader sees them."""
    prompt = read_prompt(data_dir / "t5" / "released_prompts" / f"{name}.npy")
    assert (prompt.shape, prompt.dtype) == ((100, 768), np.float32)
    write_adapter(tmp_path / "adapter", prompt, "google/t5-base-lm-adapt")
    found = read_adapter(tmp_path / "adapter")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), prompt.view(np.uint32))
    theirs = peft.utils.load_peft_weights(str(tmp_path / "adapter"), device="cpu")["prompt_embeddings"].numpy()
    np.testing.assert_array_equal(theirs.view(np.uint32), prompt.view(np.uint32))
    write_prompt(tmp_path / "back.npy", found)
    original = np.load(data_dir / "t5" / "released_prompts" / f"{name}.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "back.npy").view(np.uint32), original.view(np.uint32))


def test_prompt_of_peft_goes_to_npy_and_back(peft, trained, tmp_path):
    _, folder, _, _ = trained
    write_prompt(tmp_path / "p.npy", read_adapter(folder))
    write_adapter(tmp_path / "adapter", read_prompt(tmp_path / "p.npy"))
    expected = peft.utils.load_peft_weights(str(folder), device="cpu")["prompt_embeddings"].numpy()[:LENGTH]
    found = peft.utils.load_peft_weights(str(tmp_path / "adapter"), device="cpu")["prompt_embeddings"].numpy()
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_are_read_as_float32(tmp_path, dtype):
    values = random_prompt().astype(dtype)
    damage(tmp_path, weights=save({"prompt_embeddings": values}))
    found = read_adapter(tmp_path)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values.astype(np.float32))


def test_folder_is_written_whole(tmp_path):
    """Missing parent folders are created, an earlier prompt is replaced, and no other file is left."""
    folder = tmp_path / "new" / "adapter"
    for length in (3, 4):
        write_adapter(folder, random_prompt(length))
        assert read_adapter(folder).shape == (length, WIDTH)
    assert is_adapter(folder)
    assert not is_adapter(folder.parent)
    assert not is_adapter(folder / "adapter_config.json")
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    (tmp_path / "other").touch()
    for path in (folder, *folder.iterdir()):  # the permissions follow the umask
        assert path.stat().st_mode & 0o444 == (tmp_path / "other").stat().st_mode & 0o444


def test_failed_writes_leave_what_was_there(tmp_path, monkeypatch):
    write_adapter(tmp_path / "adapter", random_prompt(3))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    for name in ("adapter", "another"):
        with pytest.raises(OSError, match="No space left"):
            write_adapter(tmp_path / name, random_prompt(4))
    assert read_adapter(tmp_path / "adapter").shape == (3, WIDTH)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("name", ["README.md", "checkpoint-500", "precious"])
def test_folders_of_others_are_not_overwritten(tmp_path, name):
    """The folder of a training run of PEFT has an adapter and checkpoints in it."""
    write_adapter(tmp_path / "run", random_prompt(3))
    (tmp_path / "run" / name).mkdir()
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "run", tmp_path / "file"):
        with pytest.raises(ValueError, match=f"{path} is there already") as error:
            write_adapter(path, random_prompt(4))
        assert "\n" not in str(error.value)
    assert (tmp_path / "run" / name).is_dir()
    assert (tmp_path / "file").read_text() == "precious"


def test_reading_and_writing_need_no_torch(tmp_path):
    """A host that serves prompts needs neither torch nor PEFT."""
    write_adapter(tmp_path / "adapter", random_prompt())
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'peft', 'transformers', 'jax']));"  # None: not found
        "from prompt_tuning_jax.prompts import peft; "
        "peft.write_adapter(sys.argv[2], peft.read_adapter(sys.argv[1]))"
    )
    again = tmp_path / "again"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "adapter"), str(again)], check=True, timeout=120)
    np.testing.assert_array_equal(read_adapter(again), random_prompt())


# The files that PEFT writes for a T5, with its prompt [2P, D]. The tests below damage them.
WHOLE_CONFIG = {
    "auto_mapping": None,
    "base_model_name_or_path": "google/t5-v1_1-base",
    "inference_mode": True,
    "modules_to_save": None,
    "num_attention_heads": 3,
    "num_layers": 2,
    "num_transformer_submodules": 2,
    "num_virtual_tokens": LENGTH,
    "peft_type": "PROMPT_TUNING",
    "peft_version": "0.21.0",
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "revision": None,
    "task_type": "SEQ_2_SEQ_LM",
    "token_dim": WIDTH,
    "tokenizer_kwargs": None,
    "tokenizer_name_or_path": None,
}
BOTH_STACKS = random_prompt(2 * LENGTH)
WHOLE_WEIGHTS = save({"prompt_embeddings": BOTH_STACKS}, metadata={"format": "pt"})
WHOLE_TEXT = json.dumps(WHOLE_CONFIG, indent=2, sort_keys=True).encode()
ENCODER_ONLY = {"num_transformer_submodules": 1}


def damage(folder, config=ENCODER_ONLY, weights=WHOLE_WEIGHTS):
    """Writes a folder whose config has some changed fields (dict) or other bytes, with the given weights or none."""
    text = config if isinstance(config, bytes) else json.dumps(WHOLE_CONFIG | config).encode()
    (folder / "adapter_config.json").write_bytes(text)
    (folder / "adapter_model.safetensors").unlink(missing_ok=True)
    if weights is not None:
        (folder / "adapter_model.safetensors").write_bytes(weights)


def refused(folder):
    """Returns the single line that a user sees."""
    with pytest.raises(SettingError) as error:
        read_adapter(folder)
    assert error.value.setting == "prompt_file"
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize("trained", [None], indirect=True)
def test_whole_files_are_those_that_peft_writes(peft, trained):
    """The files that are damaged below are equal to those that PEFT writes."""
    _, folder, _, _ = trained
    theirs = json.loads((folder / "adapter_config.json").read_text())
    assert theirs["peft_version"] == peft.__version__
    same = ("base_model_name_or_path", "peft_version")
    assert theirs | {name: WHOLE_CONFIG[name] for name in same} == WHOLE_CONFIG
    header = (folder / "adapter_model.safetensors").read_bytes()[: -BOTH_STACKS.nbytes]
    assert header == WHOLE_WEIGHTS[: -BOTH_STACKS.nbytes]


def test_two_stacks_give_the_encoders_half(tmp_path):
    for config in (WHOLE_TEXT, {"num_transformer_submodules": None}):  # null: PEFT sets it to 2
        damage(tmp_path, config)
        np.testing.assert_array_equal(read_adapter(tmp_path), BOTH_STACKS[:LENGTH])


def test_absent_parts_are_refused(tmp_path):
    assert "no adapter_config.json" in refused(tmp_path)
    assert "no adapter_config.json" in refused(tmp_path / "absent")
    damage(tmp_path, weights=None)
    assert "no adapter_model.safetensors or adapter_model.bin in" in refused(tmp_path)
    (tmp_path / "adapter_model.safetensors").mkdir()
    assert "no adapter_model.safetensors" in refused(tmp_path)


ADAPTERS = "LORA ADALORA IA3 PREFIX_TUNING P_TUNING MULTITASK_PROMPT_TUNING CPT".split()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters_are_refused_by_name(tmp_path, kind):
    damage(tmp_path, {"peft_type": kind}, save({"prompt_embeddings": random_prompt()}))
    assert f"is of a {kind!r} adapter, not 'PROMPT_TUNING'" in refused(tmp_path)


def test_a_lora_that_peft_wrote_is_refused(peft, base_folder, tmp_path):
    model = peft.get_peft_model(their_base(base_folder), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2))
    model.save_pretrained(tmp_path)
    assert is_adapter(tmp_path)
    assert "is of a 'LORA' adapter" in refused(tmp_path)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"task_type": "CAUSAL_LM"}, "a prompt for 'CAUSAL_LM', not 'SEQ_2_SEQ_LM'"),
        ({"peft_type": None}, "a None adapter"),
        ({"peft_type": ["a\nb"] * 99}, "adapter, not 'PROMPT_TUNING'"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens None, not a positive number"),
        ({"num_virtual_tokens": "5"}, "num_virtual_tokens '5', not a positive number"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens True, not a positive number"),
        ({"num_virtual_tokens": -5}, "num_virtual_tokens -5, not a positive number"),
        ({"token_dim": 24.0}, "token_dim 24.0, not a positive number"),
        ({"num_transformer_submodules": 0}, "num_transformer_submodules 0, not a positive number"),
        ({"num_virtual_tokens": 6}, "holds [5, 24], not [6, 24]"),
        ({"num_virtual_tokens": 10**40}, "holds [5, 24], not [1000"),
        ({"num_transformer_submodules": 2}, "holds [5, 24], not [10, 24]"),
        ({"num_transformer_submodules": None}, "holds [5, 24], not [10, 24]"),
        ({"token_dim": 25}, "holds [5, 24], not [5, 25]"),
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"\xff\x00", "cannot be read"),
        (b"[]", "holds []"),
        (b"null", "holds None"),
        (b'"' + b"x" * 10_000 + b'"', "holds 'xxx"),
    ],
)
def test_configs_that_fit_no_prompt_are_refused(tmp_path, config, found):
    if isinstance(config, dict):
        config = ENCODER_ONLY | config
    damage(tmp_path, config, save({"prompt_embeddings": random_prompt()}))
    message = refused(tmp_path)
    assert found in message
    assert len(message) < 600


def poisoned(value):
    prompt = random_prompt()
    prompt[-1, -1] = value
    return prompt


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"prompt_embeddings": random_prompt(2 * LENGTH)}, "holds [10, 24], not [5, 24]"),
        ({"prompt_embeddings": random_prompt(LENGTH, 30)}, "holds [5, 30], not [5, 24]"),
        ({"prompt_embeddings": random_prompt(WIDTH, LENGTH)}, "holds [24, 5], not [5, 24]"),
        ({"prompt_embeddings": random_prompt()[None]}, "holds [1, 5, 24], not [5, 24]"),
        ({"prompt_embeddings": np.ones((), np.float32)}, "holds [], not [5, 24]"),
        ({"prompt_embeddings": np.ones((LENGTH, WIDTH), np.int32)}, "is I32, expected F64"),
        ({"prompt_embeddings": np.ones((LENGTH, WIDTH), np.complex64)}, "is C64, expected F64"),
        ({"prompt_embeddings": np.ones((LENGTH, WIDTH), ml_dtypes.float8_e4m3fn)}, "is F8_E4M3, expected"),
        ({"prompt_embeddings": poisoned(np.nan)}, "NaN or infinity"),
        ({"prompt_embeddings": poisoned(-np.inf)}, "NaN or infinity"),
        ({"prompt_embeddings": np.full((LENGTH, WIDTH), 1e300)}, "NaN or infinity"),
        ({}, "lacks prompt_embeddings (it holds [])"),
        ({"prompt\nembeddings": random_prompt()}, "lacks prompt_embeddings (it holds ['prompt\\nembeddings'])"),
        ({"prompt_embeddings": random_prompt(), "shared.weight": random_prompt()}, "holds more than prompt_embeddings"),
    ],
)
def test_weights_that_are_no_prompt_are_refused(tmp_path, tensors, found):
    damage(tmp_path, weights=save(tensors))
    assert found in refused(tmp_path)


def test_an_embedding_table_that_peft_saved_along_is_refused(peft, base_folder, tmp_path):
    """Such a table belongs to another base model than the one that the folder names."""
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH)
    peft.get_peft_model(their_base(base_folder), config).save_pretrained(tmp_path, save_embedding_layers=True)
    assert "holds more than prompt_embeddings" in refused(tmp_path)


class Exploit:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_weights_run_no_code(tmp_path):
    torch = pytest.importorskip("torch")
    harm = tmp_path / "harm"
    damage(tmp_path, weights=None)
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Exploit(harm)))
    assert "adapter_model.bin cannot be read (it is of torch.save's format before PyTorch 1.6" in refused(tmp_path)
    torch.save({"prompt_embeddings": Exploit(harm)}, tmp_path / "adapter_model.bin")
    assert "adapter_model.bin cannot be read (it asks for 'io.open', which no state dict needs)" in refused(tmp_path)
    damage(tmp_path, weights=pickle.dumps(Exploit(harm)))
    refused(tmp_path)
    damage(tmp_path, WHOLE_TEXT)  # ignored beside a safetensors file, as in PEFT
    read_adapter(tmp_path)
    assert not harm.exists()


def test_weights_that_peft_saves_with_torch_are_those_of_its_safetensors(trained, tmp_path):
    model, folder, _, _ = trained
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file() and not (tmp_path / "adapter_model.safetensors").exists()
    np.testing.assert_array_equal(read_adapter(tmp_path), read_adapter(folder))


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"prompt_embeddings": np.ones((LENGTH + 1, WIDTH), np.float32)}, f"holds [{LENGTH + 1}, {WIDTH}], not "),
        ({"prompt_embeddings": np.ones((LENGTH, WIDTH), np.int32)}, "is int32, expected"),
        ({"prompt_embeddings": poisoned(np.nan)}, "holds NaN or infinity"),
    ],
)
def test_weights_of_torch_that_are_no_prompt_are_refused(tmp_path, tensors, found):
    torch = pytest.importorskip("torch")
    damage(tmp_path, weights=None)
    torch.save({name: torch.tensor(array) for name, array in tensors.items()}, tmp_path / "adapter_model.bin")
    assert found in (message := refused(tmp_path)) and str(tmp_path / "adapter_model.bin") in message


def read_or_refuse(folder):
    """Returns the prompt, after checking its shape and dtype, or None if it is refused in one line."""
    try:
        prompt = read_adapter(folder)
    except ValueError:
        refused(folder)
        return None
    assert (prompt.shape, prompt.dtype) == ((LENGTH, WIDTH), np.float32)
    assert np.isfinite(prompt).all()
    return prompt


FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
HEADER = len(WHOLE_WEIGHTS) - BOTH_STACKS.nbytes


def length_prefixed(header):
    return len(header).to_bytes(8, "little") + header


@FUZZ
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_random_configs_are_refused(tmp_path, content):
    damage(tmp_path, content)
    refused(tmp_path)


@FUZZ
@given(content=st.binary(max_size=200) | st.binary(max_size=200).map(length_prefixed))
def test_random_weights_are_refused(tmp_path, content):
    damage(tmp_path, WHOLE_TEXT, content)
    refused(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(fields=st.dictionaries(st.sampled_from(sorted(WHOLE_CONFIG)), JSON, max_size=3))
def test_random_fields_are_refused_or_harmless(tmp_path, fields):
    damage(tmp_path, fields | {"num_transformer_submodules": 2})
    prompt = read_or_refuse(tmp_path)
    assert prompt is None or np.array_equal(prompt, BOTH_STACKS[:LENGTH])


@FUZZ
@given(
    name=st.just("prompt_embeddings") | st.text(max_size=9),
    dtype=st.sampled_from("BOOL U8 I8 F8_E4M3 F8_E5M2 F4 I16 F16 BF16 F32 F64 C64 I64 F128".split()) | JSON,
    shape=st.lists(st.integers(0, 2**64), max_size=3) | st.sampled_from([[10, 24], [24, 10], [240], [5, 24]]),
    offsets=st.lists(st.integers(0, 2**64), max_size=3) | st.sampled_from([[0, 960], [0, 480], [0, 1920]]),
)
def test_random_headers_are_refused_or_harmless(tmp_path, name, dtype, shape, offsets):
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    damage(tmp_path, WHOLE_TEXT, length_prefixed(json.dumps(header).encode()) + BOTH_STACKS.tobytes())
    read_or_refuse(tmp_path)


def test_truncated_configs_are_refused(tmp_path):
    for length in range(len(WHOLE_TEXT)):
        damage(tmp_path, WHOLE_TEXT[:length])
        refused(tmp_path)


def test_truncated_and_lengthened_weights_are_refused(tmp_path):
    for length in range(len(WHOLE_WEIGHTS)):
        damage(tmp_path, WHOLE_TEXT, WHOLE_WEIGHTS[:length])
        refused(tmp_path)
    damage(tmp_path, WHOLE_TEXT, WHOLE_WEIGHTS + b"\0")
    refused(tmp_path)


def test_flipped_bits_in_configs_are_refused_or_harmless(tmp_path):
    """Each flipped bit gives either one line or exactly the right prompt."""
    survived = 0
    for place in range(8 * len(WHOLE_TEXT)):
        damage(tmp_path, flipped(WHOLE_TEXT, place))
        prompt = read_or_refuse(tmp_path)
        if prompt is not None:
            survived += 1
            np.testing.assert_array_equal(prompt, BOTH_STACKS[:LENGTH])
    assert survived  # flips in fields that do not affect the prompt


def test_flipped_bits_in_headers_are_refused_or_harmless(tmp_path):
    for place in range(8 * HEADER):
        damage(tmp_path, WHOLE_TEXT, flipped(WHOLE_WEIGHTS, place))
        prompt = read_or_refuse(tmp_path)
        assert prompt is None or np.array_equal(prompt, BOTH_STACKS[:LENGTH])


@FUZZ
@given(places=st.lists(st.integers(0, 8 * len(WHOLE_WEIGHTS) - 1), min_size=1, max_size=9))
def test_flipped_bits_in_weights_are_refused_or_another_prompt(tmp_path, places):
    """A format without a checksum cannot detect a wrong number, but NaN and infinity are detected."""
    content = WHOLE_WEIGHTS
    for place in places:
        content = flipped(content, place)
    damage(tmp_path, WHOLE_TEXT, content)
    read_or_refuse(tmp_path)


def flipped(content, place):
    damaged = bytearray(content)
    damaged[place // 8] ^= 1 << place % 8
    return bytes(damaged)
