"""The frozen base: refused where it does not fit, and known by its fingerprint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.models import random_model
from hypothesis import given
from hypothesis import strategies as st

from prompt_tuning_jax.checkpoints import base, huggingface
from prompt_tuning_jax.t5.config import T5Config

CONFIG = T5Config(31, 12, 3, 1, 1, 20, head_dim=5)
OTHER_SIZE = T5Config(31, 12, 2, 1, 1, 24, head_dim=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    huggingface.write(path, CONFIG, jax.device_get(random_model(CONFIG)[1]))
    return path


def refused(call, *expected):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_base_is_what_the_folder_holds(folder):
    found = base.load_base(str(folder), CONFIG)
    params = random_model(CONFIG)[1]
    assert found.path == str(folder)
    assert found.params.keys() == params.keys()
    for path, value in params.items():
        assert found.params[path].dtype == jnp.float32
        np.testing.assert_array_equal(found.params[path], value)
    assert found.fingerprint == base.fingerprint(params)
    assert {value.dtype for value in base.load_base(str(folder), CONFIG, jnp.bfloat16).params.values()} == {
        jnp.bfloat16.dtype
    }


def test_base_may_be_named_from_anywhere(folder, monkeypatch):
    """A run's folder says where its base is, wherever the run was started."""
    monkeypatch.chdir(folder.parent)
    assert base.load_base("model", CONFIG).path == str(folder)


def test_base_of_another_size_is_refused(folder):
    """Each difference is named, in one line, before anything is read."""
    refused(
        lambda: base.load_base(str(folder), OTHER_SIZE),
        str(folder),
        "num_heads 3, not 2",
        "mlp_dim 20, not 24",
        "INITIAL_CHECKPOINT_PATH",
        "models/*.gin",
    )


def test_absent_bases_are_refused(tmp_path):
    refused(lambda: base.load_base(str(tmp_path / "none"), CONFIG), str(tmp_path / "none"), "INITIAL_CHECKPOINT_PATH")
    refused(lambda: base.load_base("nanno", CONFIG), "nanno", "nano")
    refused(lambda: base.load_base(str(tmp_path), CONFIG), str(tmp_path), "config.json", "INITIAL_CHECKPOINT_PATH")


def test_base_without_weights_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    refused(lambda: base.load_base(str(tmp_path), CONFIG), "model.safetensors", "INITIAL_CHECKPOINT_PATH")


def test_tensors_that_do_not_fit_are_named():
    """Missing, of another shape, and superfluous ones; no more than three are written out."""
    shapes = base.expected_shapes(CONFIG)
    base.check_shapes(shapes, CONFIG, "there")
    missing = dict(shapes)
    del missing["encoder/encoder_norm/scale"]
    refused(lambda: base.check_shapes(missing, CONFIG, "there"), "there", "encoder/encoder_norm/scale is missing")
    refused(
        lambda: base.check_shapes(shapes | {"token_embedder/embedding": (12, 31)}, CONFIG, "there"),
        "token_embedder/embedding is [12, 31], not [31, 12]",
    )
    refused(
        lambda: base.check_shapes(shapes | {"encoder/layers_9/mlp/wo/kernel": (20, 12)}, CONFIG, "there"),
        "encoder/layers_9/mlp/wo/kernel is not part of the model",
    )
    refused(lambda: base.check_shapes({}, CONFIG, "there"), f"and {len(shapes) - 3} more")


def test_random_bases_differ_by_seed():
    config = T5Config(31, 12, 3, 0, 1, 20, head_dim=5)
    first, other = base.random_base(config, 1), base.random_base(config, 2)
    assert first.fingerprint != other.fingerprint
    assert {path: value.shape for path, value in first.params.items()} == base.expected_shapes(config)


def test_vocabulary_lies_beside_the_base(folder, tmp_path):
    assert base.default_vocabulary(None) is None
    assert base.default_vocabulary(str(folder)) is None
    (tmp_path / "spiece.model").touch()
    assert base.default_vocabulary(str(tmp_path)) == str(tmp_path / "spiece.model")


PARAMS = {
    "a": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32),
    "b": jnp.asarray(np.random.default_rng(1).normal(size=5), jnp.float32),
}


@given(name=st.sampled_from("ab"), place=st.integers(0, 11), bit=st.integers(0, 31))
def test_fingerprint_changes_with_any_bit(name, place, bit):
    bits = np.array(PARAMS[name]).view(np.uint32)
    bits.reshape(-1)[place % bits.size] ^= np.uint32(1 << bit)
    assert base.fingerprint(PARAMS | {name: jnp.asarray(bits.view(np.float32))}) != base.fingerprint(PARAMS)


@given(first=st.integers(0, 11), second=st.integers(0, 11))
def test_fingerprint_changes_where_two_values_change_places(first, second):
    swapped = np.array(PARAMS["a"]).reshape(-1)
    swapped[[first, second]] = swapped[[second, first]]
    same = base.fingerprint(PARAMS | {"a": jnp.asarray(swapped.reshape(3, 4))}) == base.fingerprint(PARAMS)
    assert same == (first == second)


def test_fingerprint_changes_with_names_and_shapes():
    a, b = PARAMS["a"], PARAMS["b"]
    different = [{"a": a, "b": b}, {"a": a, "c": b}, {"a": a}, {"a": b, "b": a}, {"a": a.reshape(4, 3), "b": b}, {}]
    assert len({base.fingerprint(params) for params in different}) == len(different)


def test_fingerprint_knows_no_order_and_no_dtype():
    """A file in bfloat16 is the same base whether it is held in bfloat16 or in float32."""
    expected = base.fingerprint(PARAMS)
    assert base.fingerprint(dict(reversed(PARAMS.items()))) == expected
    half = {name: value.astype(jnp.bfloat16) for name, value in PARAMS.items()}
    whole = {name: value.astype(jnp.float32) for name, value in half.items()}
    assert base.fingerprint(half) == base.fingerprint(whole) != expected


def test_fingerprint_is_pinned():
    """Summaries of old runs name their base by it."""
    params = {"w": jnp.asarray([[1.0, -2.5], [0.0, 3.25]]), "v": jnp.asarray([7.0])}
    assert base.fingerprint(params) == "f82dff02735eeb3a"
