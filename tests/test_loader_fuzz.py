"""Files damaged at random: one line, or the arrays that the file still holds; never others, never another exception.

Each kind of file is damaged by random bytes, truncation, flipped bits and changed characters. What may come of it:
  whole   the arrays as they were: the file has no weights in it, or a checksum;
  bytes   no more bytes of the arrays changed than bytes of the file: weights lie in it as they are;
  values  no more arrays changed than bytes of the file: weights lie in it compressed, without a checksum.
"""

import functools
import json
import resource
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import tensorstore
from fixtures.models import random_model
from flax.serialization import msgpack_restore, msgpack_serialize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prompt_tuning_jax.array_files.t5x import INDEX
from prompt_tuning_jax.checkpoints import huggingface, t5x
from prompt_tuning_jax.checkpoints.base import load_base, open_model
from prompt_tuning_jax.prompts.files import IN_T5X, read_prompt, write_prompt
from prompt_tuning_jax.t5.config import T5Config

CONFIG = T5Config(31, 12, 3, 1, 1, 20, head_dim=5)
PROMPT_LENGTH = 7
SECONDS, MEGABYTES = 30, 1_000  # far above what a sound file needs, far below what a damaged shape may ask for


def params() -> dict[str, np.ndarray]:
    return jax.device_get(random_model(CONFIG, PROMPT_LENGTH)[1])


def with_small_arrays_in_the_index(folder: Path) -> None:
    """As T5X writes by default."""
    index = msgpack_restore((folder / INDEX).read_bytes())
    for name, value in params().items():
        if value.size > 80:
            continue
        *parents, leaf = name.split("/")
        functools.reduce(lambda node, part: node[part], parents, index["optimizer"]["target"])[leaf] = value
        shutil.rmtree(folder / f"target.{name.replace('/', '.')}")
    (folder / INDEX).write_bytes(msgpack_serialize(index))


def with_gzip(folder: Path) -> None:
    """As T5X writes large arrays, in several chunks."""
    for path in folder.glob("target.*"):
        store = {"driver": "file", "path": f"{path}/"}
        values = tensorstore.open({"driver": "zarr", "kvstore": store}).result().read().result()
        chunks = [-(-size // 2) for size in values.shape]
        metadata = {"shape": values.shape, "chunks": chunks, "compressor": {"id": "gzip", "level": 1}}
        spec = {"driver": "zarr", "kvstore": store, "dtype": "float32", "metadata": metadata}
        tensorstore.open(spec, create=True, delete_existing=True).result().write(values).result()


def make(folder: Path) -> None:
    """Every layout, with the same parameters; the prompt is one of them, where the layout has a place for it."""
    huggingface.write(folder / "whole", CONFIG, params())
    huggingface.write(folder / "shards", CONFIG, params(), shard_bytes=4_000)
    t5x.write(folder / "legacy", params())
    shutil.copytree(folder / "legacy", folder / "inline")
    with_small_arrays_in_the_index(folder / "inline")
    shutil.copytree(folder / "legacy", folder / "gzip")
    with_gzip(folder / "gzip")
    t5x.write_orbax(folder / "orbax", params())
    write_prompt(folder / "npy" / "prompt.npy", params()[IN_T5X[0]])


class Target(NamedTuple):
    """A kind of file, and what may come of damage to it."""

    layout: str
    pattern: str
    outcome: str


KERNEL = "target.encoder.layers_0.mlp.wi_0.kernel"
PROMPT = f"target.{IN_T5X[0].replace('/', '.')}"
TARGETS = {
    "config": Target("whole", "config.json", "whole"),
    "safetensors": Target("whole", "model.safetensors", "bytes"),
    "shard": Target("shards", "model-00002-of-*.safetensors", "bytes"),
    "index of shards": Target("shards", "model.safetensors.index.json", "whole"),
    "index": Target("legacy", INDEX, "whole"),
    "index with arrays": Target("inline", INDEX, "bytes"),
    "array's header": Target("legacy", f"{KERNEL}/.zarray", "whole"),
    "array's chunk": Target("legacy", f"{KERNEL}/0.0", "bytes"),
    "array's header in gzip": Target("gzip", f"{KERNEL}/.zarray", "whole"),
    "array's chunk in gzip": Target("gzip", f"{KERNEL}/1.0", "whole"),
    "prompt's chunk": Target("legacy", f"{PROMPT}/0.0", "bytes"),
    "metadata": Target("orbax", "state/_METADATA", "whole"),
    "manifest": Target("orbax", "state/manifest.ocdbt", "whole"),
    "manifest of a process": Target("orbax", "state/ocdbt.process_0/manifest.ocdbt", "whole"),
    "database": Target("orbax", "state/**/d/*", "values"),
    "npy": Target("npy", "prompt.npy", "bytes"),
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    make(folder)
    return folder


@st.composite
def damages(draw):
    """From a file's bytes to damaged ones and how many it changed; None where the file was cut or replaced."""
    kind = draw(st.sampled_from(["random", "truncated", "flipped", "flipped", "changed", "changed", "zeroed"]))
    place = st.floats(0, 1, exclude_max=True)
    if kind == "random":
        content = draw(st.binary(max_size=300))
        return lambda _: (content, None)
    if kind == "truncated":
        share = draw(place)
        return lambda content: (content[: int(share * len(content))], None)
    places = draw(st.lists(place, min_size=1, max_size=3))
    if kind == "flipped":
        bits = [draw(st.integers(0, 7)) for _ in places]
        new = [lambda old, bit=bit: old ^ (1 << bit) for bit in bits]
    elif kind == "changed":  # to what turns one sound text into another
        characters = draw(st.lists(st.sampled_from(b'0123456789"{}[],:. <>F/_i'), min_size=len(places)))
        new = [lambda _, character=character: character for character in characters]
    else:
        new = [lambda _: 0 for _ in places]

    def damage(content):
        damaged = bytearray(content)
        for share, change in zip(places, new, strict=False):
            damaged[int(share * len(content))] = change(damaged[int(share * len(content))])
        changed = sum(a != b for a, b in zip(content, damaged, strict=True))
        return bytes(damaged), changed

    return damage


def one_line(call):
    """What `call` gives, or None where it refuses."""
    try:
        return call()
    except ValueError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 1_500
        return None


def attempts(folder: Path) -> list[dict[str, np.ndarray]]:
    """What comes of the folder: as a base of the size that it has, and as a prompt. Refusals are left out."""
    found = []
    if folder.name != "npy":
        loaded = one_line(lambda: load_base(str(folder), CONFIG, None))
        if loaded is not None:
            found.append({name: np.asarray(value) for name, value in loaded.params.items()})
        if loaded is None and (model := one_line(lambda: open_model(str(folder)))):
            # What is opened is read, or refused, whatever it is: a larger array than the file may not be asked for.
            for array in model.arrays.values():
                one_line(lambda array=array: np.asarray(array))
    prompt = one_line(lambda: read_prompt(folder / "prompt.npy" if folder.name == "npy" else folder))
    if prompt is not None:
        found.append({IN_T5X[0]: prompt})
    return found


@pytest.mark.parametrize("name", TARGETS)
@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
@given(damage=damages(), which=st.integers(0, 99))
def test_damage_is_refused_or_harmless(layouts, name, damage, which):
    target = TARGETS[name]
    folder = layouts / target.layout
    files = sorted(folder.glob(target.pattern))
    path = files[which % len(files)]
    content = path.read_bytes()
    damaged, changed = damage(content)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    path.write_bytes(damaged)
    try:
        found = attempts(folder)
    finally:
        path.write_bytes(content)
    assert time.monotonic() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024 * MEGABYTES
    expected = params()
    for arrays in found:
        assert arrays.keys() in (expected.keys() - {IN_T5X[0]}, {IN_T5X[0]})
        different_bytes = different_arrays = 0
        for key, array in arrays.items():
            assert (array.shape, array.dtype) == (expected[key].shape, np.float32), key
            different = np.frombuffer(array.tobytes(), np.uint8) != np.frombuffer(expected[key].tobytes(), np.uint8)
            different_bytes += different.sum()
            different_arrays += different.any()
        if target.outcome == "bytes" and changed is not None:
            assert different_bytes <= changed
        elif target.outcome == "values" and changed is not None:
            assert different_arrays <= changed
        else:  # a file that was cut or replaced is never good for other weights
            assert different_bytes == 0, (damaged[:500], changed)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Checkpoints with a prompt alone: files so short that they can be tried bit by bit."""
    folder = tmp_path_factory.mktemp("small")
    prompt = {IN_T5X[0]: np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)}
    t5x.write(folder / "legacy", prompt)
    shutil.copytree(folder / "legacy", folder / "gzip")
    with_gzip(folder / "gzip")
    t5x.write_orbax(folder / "orbax", prompt)
    write_prompt(folder / "expected.npy", prompt[IN_T5X[0]])
    return folder


BIT_BY_BIT = ["legacy/checkpoint", f"legacy/{PROMPT}/.zarray", f"gzip/{PROMPT}/.zarray", "orbax/state/_METADATA"]
BIT_BY_BIT += ["orbax/state/manifest.ocdbt", f"gzip/{PROMPT}/0.0", f"gzip/{PROMPT}/1.1"]


@pytest.mark.parametrize("file", BIT_BY_BIT)
def test_bits_of_what_says_where_the_weights_are(small, file):
    """None of them, flipped, makes another prompt: not in shape, name, chunks, type or byte order."""
    path, expected = small / file, np.load(small / "expected.npy")
    folder = small / file.partition("/")[0]
    content = path.read_bytes()
    assert len(content) < 2_500
    refusals = 0
    for place in range(len(content)):
        # Every bit of the array's own header; of the other files, one of each byte.
        for bit in range(8) if ".zarray" in file else (place % 8,):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            found = one_line(lambda: read_prompt(folder))
            refusals += found is None
            assert found is None or found.tobytes() == expected.tobytes(), (damaged, place, bit)
    path.write_bytes(content)
    assert refusals > 0.1 * len(content)
    np.testing.assert_array_equal(read_prompt(folder), expected)


def test_sound_files_are_read(layouts):
    """What the test above compares with, and that it does read something."""
    for layout in {target.layout for target in TARGETS.values()}:
        found = attempts(layouts / layout)
        assert len(found) == (1 if layout in ("whole", "shards", "npy") else 2), layout
        for arrays in found:
            for name, array in arrays.items():
                np.testing.assert_array_equal(array, params()[name])
    for target in TARGETS.values():
        assert list((layouts / target.layout).glob(target.pattern)), target


NUMBERS = ["vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers"]


@pytest.mark.parametrize("field", [*NUMBERS, "relative_attention_num_buckets", "relative_attention_max_distance"])
@given(value=st.integers(-(10**12), 10**12) | st.integers(1, 40) | st.floats() | st.booleans() | st.text(max_size=5))
def test_no_other_size_is_taken(layouts, field, value):
    """Whatever a configuration says in place of a size: refused, and at once."""
    path = layouts / "whole" / "config.json"
    text = path.read_text()
    sizes = json.loads(text)
    path.write_text(json.dumps(sizes | {field: value}))
    try:
        found = one_line(lambda: load_base(str(path.parent), CONFIG))
    finally:
        path.write_text(text)
    assert (found is not None) == (type(value) is int and value == sizes[field])
