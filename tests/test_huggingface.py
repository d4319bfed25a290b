"""Hugging Face folders: read like `transformers` reads them, written so that it reads them, refused when damaged."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fixtures.models import random_model, random_tokens, tree
from safetensors.numpy import load_file, save_file

from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.decoding import greedy
from prompt_tuning_jax.t5.network import Transformer

# No two dimensions alike, and stacks of different depth: a transposed or misplaced matrix cannot fit.
CONFIG = T5Config(61, 24, 3, 2, 3, 40, head_dim=7)


@pytest.fixture(scope="module")
def transformers():
    os.environ["HF_HUB_OFFLINE"] = "1"
    pytest.importorskip("torch").set_num_threads(1)
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def theirs(transformers):
    """Their T5 1.1 with every weight random, layer norms too."""
    import torch

    config = transformers.T5Config(
        vocab_size=CONFIG.vocab_size,
        d_model=CONFIG.emb_dim,
        d_kv=CONFIG.head_dim,
        d_ff=CONFIG.mlp_dim,
        num_layers=CONFIG.num_encoder_layers,
        num_decoder_layers=CONFIG.num_decoder_layers,
        num_heads=CONFIG.num_heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    # transformers 5 ties lm_head to the embedding whatever the config says; T5 1.1 has a matrix of its own.
    model.lm_head.weight = torch.nn.Parameter(torch.empty(CONFIG.vocab_size, CONFIG.emb_dim))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:  # matrices that keep a vector's size: larger ones blow rounding up
                spread = weight.shape[1] ** -0.5 * (CONFIG.head_dim**-0.5 if ".q." in name else 1)
                weight.normal_(0, spread, generator=generator)
        model.lm_head.weight[1] *= 2  # so that some answers end
    return model


@pytest.fixture(scope="module")
def their_folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def our_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours") / "model"
    huggingface.write(folder, CONFIG, jax.device_get(random_model(CONFIG)[1]))
    return folder


def their_logits(model, inputs, decoder_inputs):
    import torch

    with torch.no_grad():
        return model(
            input_ids=torch.tensor(np.asarray(inputs, np.int64)),
            attention_mask=torch.tensor(np.asarray(inputs > 0, np.int64)),
            decoder_input_ids=torch.tensor(np.asarray(decoder_inputs, np.int64)),
        ).logits.numpy()


def our_logits(config, params, inputs, decoder_inputs):
    model = Transformer(config)
    run = jax.jit(lambda params, *tokens: model.apply({"params": tree(params)}, *tokens, enable_dropout=False))
    return run(params, inputs, decoder_inputs, decoder_inputs)


def some_tokens(rows=4):
    """Padded inputs, and decoder inputs."""
    rng = np.random.default_rng(0)
    return random_tokens(rng, rng.integers(1, 10, rows), 9, 61), random_tokens(rng, [6] * rows, 6, 61)


def test_logits_are_theirs(theirs, their_folder):
    config, params = huggingface.read_config(their_folder), huggingface.read(their_folder)
    assert config == CONFIG
    expected = their_logits(theirs, *some_tokens())
    found = our_logits(config, params, *some_tokens())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_greedy_answers_are_theirs(theirs, their_folder):
    import torch

    params = tree(huggingface.read(their_folder))
    inputs, _ = some_tokens(rows=16)
    tokens, _ = jax.jit(lambda params: greedy(Transformer(CONFIG), params, inputs, 16))(params)
    expected = theirs.generate(
        input_ids=torch.tensor(np.asarray(inputs, np.int64)),
        attention_mask=torch.tensor(np.asarray(inputs > 0, np.int64)),
        do_sample=False,
        num_beams=1,
        max_new_tokens=16,
        use_cache=False,  # their cache has a place for each encoder layer, and the decoder has one more
    ).numpy()[:, 1:]
    expected = np.pad(expected, ((0, 0), (0, 16 - expected.shape[1])))
    np.testing.assert_array_equal(tokens, expected)
    assert 0 < np.sum(np.any(expected == 1, axis=1)) < 16  # some end, some do not


def test_config_that_transformers_5_writes(their_folder):
    """It says "tie_word_embeddings": true of T5 1.1, too; taken at its word, the logits would be of another model."""
    written = json.loads((their_folder / "config.json").read_text())
    assert not huggingface.read_config(their_folder).logits_via_embedding
    if "scale_decoder_outputs" in written:
        assert written["tie_word_embeddings"]


@pytest.mark.parametrize(("tied", "activations"), [(False, ("gelu", "linear")), (True, ("relu",))])
def test_they_read_what_we_write(transformers, tmp_path, tied, activations):
    """T5 1.1, and the first T5 with its tied logits and plain feed-forward."""
    config = T5Config(61, 24, 3, 2, 3, 40, head_dim=7, logits_via_embedding=tied, mlp_activations=activations)
    params = jax.device_get(random_model(config)[1])
    huggingface.write(tmp_path / "model", config, params)
    model, report = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(report.values()), report
    expected = their_logits(model.eval(), *some_tokens())
    found = our_logits(config, params, *some_tokens())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_round_trip_is_bit_identical(our_folder):
    params = jax.device_get(random_model(CONFIG)[1])
    assert huggingface.read_config(our_folder) == CONFIG
    found = huggingface.read(our_folder)
    assert found.keys() == params.keys()
    for path, value in params.items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_bfloat16_stays_bfloat16(tmp_path):
    """Half the bytes on disk and in memory, and no bit of them rounded again."""
    params = {path: np.asarray(value.astype(jnp.bfloat16)) for path, value in random_model(CONFIG)[1].items()}
    for values in (params, {path: value.astype(np.float32) for path, value in params.items()}):
        huggingface.write(tmp_path / "model", CONFIG, values, dtype="bfloat16")
        found = huggingface.read(tmp_path / "model")
        for path, value in params.items():
            assert found[path].dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(found[path].view(np.uint16), value.view(np.uint16), err_msg=path)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_prompt_is_left_out_and_vocabulary_goes_along(tmp_path):
    """What the base's folder holds is a base; a folder that is there already is replaced, whole."""
    (tmp_path / "words.model").write_bytes(b"any bytes")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    params = jax.device_get(random_model(CONFIG, 5)[1])
    huggingface.write(tmp_path / "model", CONFIG, params, vocabulary=tmp_path / "words.model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "spiece.model",
    }
    assert (tmp_path / "model" / "spiece.model").read_bytes() == b"any bytes"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "words.model"}
    assert "encoder/prompt/prompt" not in huggingface.read(tmp_path / "model")


@pytest.fixture
def copied(our_folder, tmp_path):
    """A whole folder, to be damaged."""
    for file in our_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def refused(call, folder, *expected):
    with pytest.raises(ValueError, match=str(folder)) as error:
        call(folder)
    message = str(error.value)
    assert "\n" not in message
    for part in expected:
        assert part in message
    return message


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.5, 0.999])
def test_truncated_weights_are_refused(copied, share):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(huggingface.read, copied, "model.safetensors", "INITIAL_CHECKPOINT_PATH")


def test_absent_weights_are_refused(copied):
    (copied / "model.safetensors").unlink()
    refused(huggingface.read, copied, "model.safetensors", "INITIAL_CHECKPOINT_PATH")


def test_missing_tensors_are_named(copied):
    tensors = load_file(copied / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copied / "model.safetensors")
    refused(huggingface.read, copied, "lacks lm_head.weight")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", '"T5"', "{}", '{"model_type": "bert", "hidden_size": 24}', "\xff\x00"],
)
def test_a_config_of_something_else_is_refused(copied, text):
    (copied / "config.json").write_bytes(text.encode("latin-1"))
    refused(huggingface.read_config, copied, "config.json", "INITIAL_CHECKPOINT_PATH")
    refused(huggingface.read, copied, "config.json")


def test_an_absent_config_is_refused(tmp_path):
    refused(huggingface.read_config, tmp_path, "config.json")
