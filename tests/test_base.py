"""The frozen base: refused where it does not fit, and known by its fingerprint."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fixtures.models import random_model
from hypothesis import given
from hypothesis import strategies as st

import prompt_tuning_jax as pt
from prompt_tuning_jax.array_files.stored import StoredArray
from prompt_tuning_jax.checkpoints import base, huggingface, t5x
from prompt_tuning_jax.checkpoints.inspection import inspect_base
from prompt_tuning_jax.inference.bank import PromptBank
from prompt_tuning_jax.parallel.partitioner import logical_axes
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.network import Transformer

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


BFLOAT16 = {name: np.asarray(value).astype(ml_dtypes.bfloat16) for name, value in random_model(CONFIG)[1].items()}


@pytest.mark.parametrize("asked", [None, "auto", "float32", "bfloat16", jnp.float32, jnp.bfloat16, np.dtype("float32")])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "mixed"])
def test_a_base_is_held_as_asked_and_has_one_fingerprint(tmp_path, stored, asked):
    """That of the file's values, in whatever dtype they are held; "auto" is float32 on this CPU, None the file's own,
    but for float16, which is too narrow for T5."""
    wide = {name: np.asarray(value) for name, value in random_model(CONFIG)[1].items()}
    values = {
        "float32": lambda name: wide[name],
        "bfloat16": lambda name: BFLOAT16[name],
        "float16": lambda name: wide[name].astype(np.float16),
        "mixed": lambda name: wide[name] if name.endswith("scale") else BFLOAT16[name],
    }[stored]
    params = {name: values(name) for name in wide}
    huggingface.write(tmp_path / "model", CONFIG, params)
    found = base.load_base(str(tmp_path / "model"), CONFIG, asked)
    for name, value in params.items():
        own = value.dtype if asked is None else jnp.dtype("float32" if asked == "auto" else asked)
        own = np.dtype(np.float32) if own == np.float16 else own
        assert found.params[name].dtype == own, name
        np.testing.assert_array_equal(np.asarray(found.params[name]), value.astype(np.float32).astype(own))
    assert found.fingerprint == base.fingerprint({name: jnp.asarray(value) for name, value in params.items()})
    assert found.fingerprint == base.load_base(str(tmp_path / "model"), CONFIG).fingerprint


def test_auto_holds_a_base_that_is_only_read_in_bfloat16_on_an_accelerator(folder, monkeypatch):
    monkeypatch.setattr(base, "auto_dtype", lambda **_: "bfloat16")
    params = base.load_base(str(folder), CONFIG, "auto").params
    assert {value.dtype for value in params.values()} == {jnp.bfloat16.dtype}


@pytest.mark.parametrize("asked", ["float16", "int4", "bf16", "", 16])
def test_another_dtype_is_refused(folder, asked):
    refused(lambda: base.load_base(str(folder), CONFIG, asked), "`dtype`", "'auto', 'float32', 'bfloat16'")


def test_a_base_is_the_same_in_every_layout(folder, tmp_path):
    params = random_model(CONFIG)[1]
    t5x.write(tmp_path / "t5x", params)
    t5x.write_orbax(tmp_path / "orbax", params)
    expected = base.load_base(str(folder), CONFIG)
    for layout in ("t5x", "orbax"):
        assert base.load_base(str(tmp_path / layout), CONFIG).fingerprint == expected.fingerprint


@pytest.mark.parametrize("layout", ["huggingface", "t5x", "orbax"])
def test_only_a_base_of_the_right_size_is_read_and_each_array_once(tmp_path, monkeypatch, layout):
    params = random_model(CONFIG, 3)[1]
    path = tmp_path / "model"
    if layout == "huggingface":
        huggingface.write(path, CONFIG, params)
    else:
        (t5x.write if layout == "t5x" else t5x.write_orbax)(path, params)
    reads = []
    real = StoredArray.__array__
    monkeypatch.setattr(
        StoredArray, "__array__", lambda self, *args, **options: reads.append(self) or real(self, *args, **options)
    )
    refused(lambda: base.load_base(str(path), OTHER_SIZE), "num_heads 3, not 2")
    refused(lambda: base.load_base(str(path), T5Config(**vars(CONFIG) | {"relative_attention_num_buckets": 16})), "16")
    base.open_model(str(path))
    assert reads == []
    base.load_base(str(path), CONFIG)
    assert len(reads) == len(base.expected_shapes(CONFIG))  # and not the prompt


def test_integers_are_no_base(tmp_path):
    params = {name: np.asarray(value) for name, value in random_model(CONFIG)[1].items()}
    name = "encoder/encoder_norm/scale"
    t5x.write(tmp_path / "t5x", params | {name: np.ones(12, np.int32)})
    refused(lambda: base.load_base(str(tmp_path / "t5x"), CONFIG), name, "int32", "`where`")


def test_a_url_is_no_path():
    assert base.resolve("gs://bucket/folder") == "gs://bucket/folder"
    assert base.default_vocabulary("gs://bucket/folder") is None


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
        "`where`",
        "models/*.gin",
    )


def test_absent_bases_are_refused(tmp_path):
    refused(lambda: base.load_base(str(tmp_path / "none"), CONFIG), str(tmp_path / "none"), "`where`")
    refused(lambda: base.load_base("nanno", CONFIG), "nanno", "nano")
    refused(lambda: base.load_base(str(tmp_path), CONFIG), str(tmp_path), "config.json", "`where`")


def test_base_without_weights_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    refused(lambda: base.load_base(str(tmp_path), CONFIG), "model.safetensors", "`where`")


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


def changed_arrays() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields (what was done, all arrays) for two bit flips, swaps of rows and of tensors, and transpositions."""
    rng = np.random.default_rng(0)
    names = list(SMALL)
    sizes = [array.size for array in SMALL.values()]

    def flipped(*flips):
        arrays = {name: array.copy() for name, array in SMALL.items()}
        for name, entry, bit in flips:
            width = 8 * arrays[name].itemsize
            arrays[name].view(f"u{width // 8}").reshape(-1)[entry] ^= 1 << bit % width
        return arrays

    for number in range(300):  # any two bits
        flips = set()
        while len(flips) < 2:
            name = names[rng.choice(len(names), p=np.array(sizes) / sum(sizes))]
            bits = 8 * SMALL[name].itemsize
            flips.add((name, int(rng.integers(SMALL[name].size)), int(rng.integers(bits))))
        yield f"flips {number} {sorted(flips)}", flipped(*flips)
    for one, other in itertools.combinations(range(8), 2):  # two signs, as 512 of them once cancelled
        yield f"signs {one} {other}", flipped(("square", one, 31), ("square", 8 * other, 31), ("norm", other, 31))
    for bit in range(32):  # the same bit of two tensors, at the same place
        yield f"bit {bit}", flipped(("square", 3, bit), ("other", 3, bit))
    for name in ("table", "half"):
        for one, other in itertools.combinations(range(len(SMALL[name])), 2):
            rows = SMALL[name].copy()
            rows[[one, other]] = rows[[other, one]]
            yield f"rows {name} {one} {other}", SMALL | {name: rows}
    for one, other in itertools.combinations(names, 2):
        yield f"tensors {one} {other}", SMALL | {one: SMALL[other], other: SMALL[one]}
    for name in ("square", "other"):
        yield f"transposed {name}", SMALL | {name: np.ascontiguousarray(SMALL[name].T)}


SMALL = {
    "table": np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32),
    "square": np.random.default_rng(2).normal(size=(8, 8)).astype(np.float32),
    "other": np.random.default_rng(3).normal(size=(8, 8)).astype(np.float32),
    "norm": np.ones(8, np.float32),
    "half": np.random.default_rng(4).normal(size=(16, 4)).astype(ml_dtypes.bfloat16),
}


def test_fingerprint_changes_with_two_bits_and_with_permutations():
    """Each of 612 changes of a small base model has a fingerprint of its own."""
    own = base.fingerprint({name: jnp.asarray(array) for name, array in SMALL.items()})
    seen = {own: "nothing"}
    for what, arrays in changed_arrays():
        found = base.fingerprint({name: jnp.asarray(array) for name, array in arrays.items()})
        assert found not in seen, f"{what} has the fingerprint of {seen[found]}"
        seen[found] = what
    assert len(seen) == 1 + 300 + 28 + 32 + 2 * 120 + 10 + 2


def test_fingerprint_changes_where_rows_of_a_large_table_are_swapped():
    """512 rows apart in bfloat16, where sums with odd weights did not see it."""
    table = np.random.default_rng(0).normal(size=(4096, 32)).astype(ml_dtypes.bfloat16)
    seen = {base.fingerprint({"table": jnp.asarray(table)})}
    for one, other in ((1000, 1512), (3000, 3512), (0, 4095), (1024, 2048)):
        rows = table.copy()
        rows[[one, other]] = rows[[other, one]]
        seen.add(base.fingerprint({"table": jnp.asarray(rows)}))
    assert len(seen) == 5


def test_the_fingerprint_of_nano_is_pinned():
    assert inspect_base("nano", fingerprint=True).facts["fingerprint"] == "d78aa9ae865fc70a"


@pytest.mark.parametrize("shape", [(16,), (32, 16), (512, 64)])
@pytest.mark.parametrize("factor", [-1, 0.125, 0.5, 1.5, 2, 4])
def test_fingerprint_changes_where_a_whole_tensor_is_scaled(shape, factor):
    """1/8 is what folding the attention's scale into a query kernel of 64 dimensions a head does."""
    values = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    assert base.fingerprint({"a": values * factor}) != base.fingerprint({"a": values})


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


# Another value of each field: of one that the names and shapes of the parameters show; of one that changes what is
# computed with the same parameters; and of one that changes how it is computed.
SHOWN = {
    **{"vocab_size": 32, "emb_dim": 15, "num_heads": 2, "num_encoder_layers": 2, "num_decoder_layers": 2},
    **{"mlp_dim": 21, "head_dim": 6, "logits_via_embedding": True, "relative_attention_num_buckets": 16},
    "relative_bias_per_layer": True,
}
NOT_SHOWN = {
    **{"mlp_activations": ("relu", "linear"), "relative_attention_max_distance": 127, "scale_decoder_outputs": True},
    **{"pad_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 2},
}
COMPUTED = {"dropout_rate": 0.1, "dtype": "bfloat16", "remat_policy": "full", "attention": "xla"}


def test_what_changes_the_mathematics_changes_the_fingerprint_and_nothing_else_does():
    """Every field of T5Config is in one of the three groups. The fields in SHOWN change the parameters' shapes."""
    params, shapes = random_model(CONFIG)[1], base.expected_shapes(CONFIG)
    own = base.fingerprint(params, CONFIG)
    seen = {own}
    for name, value in NOT_SHOWN.items():
        seen.add(base.fingerprint(params, dataclasses.replace(CONFIG, **{name: value})))
    assert len(seen) == 1 + len(NOT_SHOWN)
    for name, value in COMPUTED.items():
        assert base.fingerprint(params, dataclasses.replace(CONFIG, **{name: value})) == own, name
    for name, value in SHOWN.items():
        assert base.expected_shapes(dataclasses.replace(CONFIG, **{name: value})) != shapes, name
    assert {*SHOWN, *NOT_SHOWN, *COMPUTED} == {field.name for field in dataclasses.fields(T5Config)}


def test_a_models_parameters_are_traced_once(monkeypatch):
    """Its dtype, dropout and the like change no shape and no axis."""
    traced, init = [], Transformer.init
    monkeypatch.setattr(Transformer, "init", lambda *given, **named: traced.append(given) or init(*given, **named))
    config = dataclasses.replace(CONFIG, vocab_size=37)  # which no other test has
    shapes, axes = base.expected_shapes(config), logical_axes(config)
    for name, value in COMPUTED.items():
        other = dataclasses.replace(config, **{name: value})
        assert (base.expected_shapes(other), logical_axes(other)) == (shapes, axes)
    assert len(traced) == 1
    assert base.expected_shapes(CONFIG) != shapes


OTHERS = [
    {"mlp_activations": ("relu", "linear")},
    {"relative_attention_max_distance": 1},
    {"mlp_activations": ("swish", "linear"), "relative_attention_max_distance": 64},  # T5X's name for silu
]


def test_the_fingerprint_of_a_base_is_that_of_what_it_computes_in_every_layout(tmp_path):
    """No file of T5X says the activations or the distance: those that the model runs with count."""
    params, seen = random_model(CONFIG)[1], set()
    t5x.write(tmp_path / "t5x", params)
    for number, fields in enumerate([{}, *OTHERS]):
        config = dataclasses.replace(CONFIG, **fields)
        huggingface.write(tmp_path / f"{number}", config, params)
        found = base.load_base(str(tmp_path / f"{number}"), config).fingerprint
        assert found == base.load_base(str(tmp_path / "t5x"), config).fingerprint
        assert found == base.load_base(str(tmp_path / "t5x"), dataclasses.replace(config, dropout_rate=0.5)).fingerprint
        seen.add(found)
    assert len(seen) == 1 + len(OTHERS)


@pytest.mark.parametrize(
    "fields", [{"feed_forward_proj": "gated-relu"}, {"relative_attention_max_distance": 1}, {"eos_token_id": 2}]
)
def test_the_same_weights_beside_another_configuration_are_another_base(tiny, tmp_path, fields):
    """transformers computes other scores with them, so a prompt of the one is none of the other."""
    shutil.copytree(tiny.base, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    model, other = pt.load(str(tiny.base)), pt.load(str(tmp_path / "base"))
    assert other.fingerprint != model.fingerprint
    assert inspect_base(str(tmp_path / "base"), fingerprint=True).facts["fingerprint"] == other.fingerprint
    bank = PromptBank(model.config.emb_dim, other.fingerprint)
    with pytest.raises(ValueError, match=f"trained on a base of fingerprint {model.fingerprint}, this one is"):
        bank.add("sst2", np.zeros((2, model.config.emb_dim), np.float32), model.fingerprint)


def test_fingerprint_is_pinned():
    """Summaries of old runs name their base by it."""
    params = {"w": jnp.asarray([[1.0, -2.5], [0.0, 3.25]]), "v": jnp.asarray([7.0])}
    assert base.fingerprint(params) == base.fingerprint(params, CONFIG) == "4805c71e8d12f8ca"
    other = dataclasses.replace(CONFIG, mlp_activations=("relu",), relative_attention_max_distance=64, eos_token_id=2)
    assert base.fingerprint(params, other) == "4fbbb1460cfc3bea"
