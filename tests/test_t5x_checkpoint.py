"""Tests T5X checkpoints in both layouts: arrays against tensorstore, errors about each kind of damage, and `gs://`."""

import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import urllib.parse
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from fixtures.models import random_model

from prompt_tuning_jax.array_files.stored import ArrayError
from prompt_tuning_jax.array_files.t5x import INDEX, is_t5x, open_t5x
from prompt_tuning_jax.checkpoints import t5x
from prompt_tuning_jax.checkpoints.base import expected_shapes, load_base, open_model
from prompt_tuning_jax.prompts.files import IN_T5X, read_prompt
from prompt_tuning_jax.t5.config import T5Config

TINY = T5Config(
    32128, 4, 2, 2, 2, 8, head_dim=2, relative_attention_num_buckets=4, relative_attention_max_distance=8
)  # fmt: skip
SMALL = T5Config(61, 24, 3, 2, 3, 40, head_dim=7)
LAYOUTS = {
    "tiny": "t5x_tiny_checkpoint",  # small arrays in the index, the others in zarr folders
    "legacy": "t5x_runs/legacy/checkpoint_9",  # all in zarr folders
    "orbax": "t5x_runs/orbax/checkpoint_9",  # an OCDBT database, in two levels of folders
}
LARGE = "decoder/logits_dense/kernel"  # in tiny it has chunks of 4,096 columns
PROMPT = "encoder/prompt/prompt/prompt"


@pytest.fixture(params=LAYOUTS)
def layout(request) -> str:
    return request.param


@pytest.fixture
def checkpoint(data_dir: Path, layout: str) -> Path:
    return data_dir / "t5" / LAYOUTS[layout]


def copied(source: Path, target: Path) -> Path:
    """Copies a checkpoint, so that the copy can be damaged."""
    shutil.copytree(source, target, copy_function=shutil.copy)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755)
    return target


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return copied(checkpoint, tmp_path / "checkpoint_9")


def database(state: Path) -> tensorstore.KvStore:
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{state}/"}).result()


def by_tensorstore(folder: Path) -> dict[str, np.ndarray]:
    """Returns every parameter in zarr folders or in a database by path, read with tensorstore."""
    if (folder / INDEX).is_file():
        stores = {path.name: {"driver": "file", "path": f"{path}/"} for path in folder.glob("target.*")}
    else:
        spec = {"driver": "ocdbt", "base": f"file://{folder}/state/"}
        keys = {key.decode().partition("/")[0] for key in database(folder / "state").list().result()}
        stores = {key: {**spec, "path": f"{key}/"} for key in keys if key.startswith("target.")}
    opened = {name: tensorstore.open({"driver": "zarr", "kvstore": store}) for name, store in stores.items()}
    return {
        name.removeprefix("target.").replace(".", "/"): future.result().read().result()
        for name, future in opened.items()
    }


@functools.cache
def whole(folder: Path) -> dict[str, np.ndarray]:
    """Returns every parameter of an undamaged checkpoint.

    The arrays in tiny's index are taken from the legacy run, whose base model was tiny.
    """
    arrays = by_tensorstore(folder)
    if folder.name == LAYOUTS["tiny"]:
        arrays |= {
            name: array
            for name, array in by_tensorstore(folder.parent / LAYOUTS["legacy"]).items()
            if name not in (*arrays, PROMPT)
        }
    return arrays


def same(found, expected) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


def refused(call, *expected: str) -> str:
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in expected:
        assert part in message, message
    return message


# Undamaged checkpoints.


def test_every_array_is_what_tensorstore_reads(checkpoint: Path, layout: str):
    model = open_model(str(checkpoint))
    expected = whole(checkpoint)
    shapes = expected_shapes(TINY) | ({} if layout == "tiny" else {PROMPT: (100, 4)})
    assert {name: array.shape for name, array in expected.items()} == shapes
    assert {name: array.shape for name, array in model.arrays.items()} == shapes
    for name, array in expected.items():
        assert model.arrays[name].dtype == array.dtype == np.float32
        same(model.arrays[name], array)


def test_the_size_is_told_from_the_shapes(checkpoint: Path):
    """The largest distance of relative positions is in no file; it is T5's default."""
    fields = vars(TINY) | {"relative_attention_max_distance": 128}
    assert open_model(str(checkpoint)).config == T5Config(**fields)


def test_is_a_base(checkpoint: Path):
    """All three layouts give the same base model, without the prompt."""
    base = load_base(str(checkpoint), TINY)
    assert base.params.keys() == expected_shapes(TINY).keys()
    for name, array in base.params.items():
        same(array, whole(checkpoint)[name])
    assert (
        base.fingerprint
        == load_base(
            str(checkpoint.parents[checkpoint.parts[::-1].index("t5") - 1] / LAYOUTS["tiny"]), TINY
        ).fingerprint
    )


def test_prompts_are_read_out_of_checkpoints(data_dir: Path):
    runs = data_dir / "t5" / "t5x_runs"
    found = read_prompt(runs / "legacy" / "checkpoint_9")
    same(found, np.load(runs / "legacy" / "numpy_checkpoints" / "checkpoint_9" / "encoder.prompt.prompt.prompt"))
    same(read_prompt(runs / "orbax" / "checkpoint_9"), by_tensorstore(runs / "orbax" / "checkpoint_9")[PROMPT])
    assert np.abs(found).max() > 0.1
    refused(lambda: read_prompt(data_dir / "t5" / LAYOUTS["tiny"]), "no prompt among its parameters", "`prompt`")


def test_a_folder_of_checkpoints_hints_at_the_last(data_dir: Path, tmp_path: Path):
    for run in ("legacy", "orbax"):
        folder = data_dir / "t5" / "t5x_runs" / run
        refused(lambda folder=folder: open_model(str(folder)), f"did you mean {folder}/checkpoint_9?")
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint_{step}").mkdir()
    (tmp_path / "checkpoint_1000.tmp").mkdir()
    refused(lambda: open_model(str(tmp_path)), "did you mean", "checkpoint_100?")


def test_another_size_is_refused(checkpoint: Path):
    other = T5Config(**vars(TINY) | {"emb_dim": 8, "mlp_dim": 16})
    refused(lambda: load_base(str(checkpoint), other), "emb_dim 4, not 8", "mlp_dim 8, not 16")


def test_the_state_in_a_checkpoint_is_the_same_checkpoint(data_dir: Path):
    """The path may also be that of Orbax's own folder, `state/`."""
    folder = data_dir / "t5" / LAYOUTS["orbax"]
    for name, array in open_t5x(folder / "state").items():
        same(array, whole(folder)[name])


# Checkpoints that this project writes.


def bfloat16_params() -> dict[str, np.ndarray]:
    return {name: np.asarray(value).astype(ml_dtypes.bfloat16) for name, value in random_model(SMALL, 5)[1].items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("write", [t5x.write, t5x.write_orbax])
def test_written_checkpoints_are_what_tensorstore_reads(tmp_path: Path, write, dtype: str):
    params = bfloat16_params() if dtype == "bfloat16" else jax.device_get(random_model(SMALL, 5)[1])
    # Chunks of zeros must be written correctly, too.
    params["encoder/encoder_norm/scale"] = np.zeros_like(params["encoder/encoder_norm/scale"])
    write(tmp_path / "checkpoint_0", params)
    model = open_model(str(tmp_path / "checkpoint_0"))
    assert model.config == SMALL
    for arrays in (by_tensorstore(tmp_path / "checkpoint_0"), model.arrays):
        assert arrays.keys() == params.keys()
        for name, value in params.items():
            same(arrays[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_0"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbax_restores_what_is_written(tmp_path: Path, dtype: str):
    params = bfloat16_params() if dtype == "bfloat16" else jax.device_get(random_model(SMALL)[1])
    t5x.write_orbax(tmp_path / "checkpoint_0", params)
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "checkpoint_0" / "state")["target"]
    for name, value in params.items():
        same(functools.reduce(lambda tree, part: tree[part], name.split("/"), found), value)


@pytest.mark.parametrize("ocdbt", [False, True])
def test_layouts_that_orbax_alone_writes(tmp_path: Path, ocdbt: bool):
    """Orbax itself saves a tree under `target`; without OCDBT it writes zarr folders."""
    params = bfloat16_params()
    tree = {}
    for name, value in params.items():
        *parents, leaf = name.split("/")
        functools.reduce(lambda node, part: node.setdefault(part, {}), parents, tree)[leaf] = value
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "checkpoint_7" / "state", {"target": tree, "state": {"step": np.int32(7)}})
    found = open_model(str(tmp_path / "checkpoint_7")).arrays
    assert found.keys() == params.keys()
    for name, value in params.items():
        same(found[name], value)


def test_bfloat16_as_t5x_writes_it(tmp_path: Path, data_dir: Path):
    """Writes the tiny checkpoint in bfloat16, with gzip and with the large table in chunks."""
    folder = copied(data_dir / "t5" / LAYOUTS["tiny"], tmp_path / "checkpoint_1")
    expected = {}
    for path in folder.glob("target.*"):
        old = json.loads((path / ".zarray").read_text())
        store = {"driver": "file", "path": f"{path}/"}
        values = tensorstore.open({"driver": "zarr", "kvstore": store}).result().read().result()
        values = expected[path.name.removeprefix("target.").replace(".", "/")] = values.astype(ml_dtypes.bfloat16)
        metadata = {part: old[part] for part in ("shape", "chunks", "compressor")}
        spec = {"driver": "zarr", "kvstore": store, "dtype": "bfloat16", "metadata": metadata}
        tensorstore.open(spec, create=True, delete_existing=True).result().write(values).result()
    found = open_model(str(folder)).arrays
    for name, values in expected.items():
        assert found[name].dtype == ml_dtypes.bfloat16
        same(found[name], values)
    base = load_base(str(folder), TINY, None)
    assert {name: array.dtype for name, array in base.params.items()} == {
        name: array.dtype for name, array in found.items()
    }


# Damaged checkpoints.


def read_all(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in open_model(str(folder)).arrays.items()}


def both_refuse(folder: Path, name: str) -> None:
    """Checks that reading the checkpoint as a base model and as a prompt both raise an error that names the array."""
    if name in IN_T5X:
        refused(lambda: read_prompt(folder), name, "`prompt`")
    else:
        refused(lambda: load_base(str(folder), TINY), name, "`where`")
    refused(lambda: read_all(folder), name)


class Zarr:
    """Reads and changes the files of one array in zarr folders."""

    def __init__(self, folder: Path, name: str):
        self.folder = folder / f"target.{name.replace('/', '.')}"

    def chunks(self):
        return sorted(path.name for path in self.folder.iterdir() if path.name != ".zarray")

    def read(self, key):
        return (self.folder / key).read_bytes()

    def write(self, key, value):
        (self.folder / key).write_bytes(value)

    def delete(self, key):
        (self.folder / key).unlink()

    def delete_all(self):
        shutil.rmtree(self.folder)


class Ocdbt:
    """Reads and changes the entries of one array in a database, with the same methods as `Zarr`."""

    def __init__(self, folder: Path, name: str):
        self.store, self.prefix = database(folder / "state"), f"target.{name.replace('/', '.')}/"

    def keys(self):
        keys = [key.decode() for key in self.store.list().result()]
        return [key for key in keys if key.startswith(self.prefix)]

    def chunks(self):
        return sorted(key.removeprefix(self.prefix) for key in self.keys() if not key.endswith(".zarray"))

    def read(self, key):
        return self.store[self.prefix + key]

    def write(self, key, value):
        self.store[self.prefix + key] = value

    def delete(self, key):
        del self.store[self.prefix + key]

    def delete_all(self):
        for key in self.keys():
            del self.store[key]


def access(layout: str, folder: Path, name: str) -> Zarr | Ocdbt:
    return (Ocdbt if layout == "orbax" else Zarr)(folder, name)


def change_metadata(array: Zarr | Ocdbt, change) -> None:
    metadata = json.loads(array.read(".zarray"))
    array.write(".zarray", json.dumps(metadata | change(metadata)).encode())


def another_shape(array: Zarr | Ocdbt) -> None:
    change_metadata(array, lambda old: {"shape": [*old["shape"][:-1], old["shape"][-1] - 1]})


def a_larger_shape(array: Zarr | Ocdbt) -> None:
    """In tiny, the number of chunks stays the same, so the added values would be read as zeros."""
    change_metadata(array, lambda old: {"shape": [*old["shape"][:-1], old["shape"][-1] + 1]})


def an_enormous_shape(array: Zarr | Ocdbt) -> None:
    change_metadata(array, lambda old: {"shape": [size * 10**9 for size in old["shape"]]})


def an_enormous_chunk(array: Zarr | Ocdbt) -> None:
    change_metadata(array, lambda old: {"chunks": [size * 10**6 for size in old["chunks"]]})


def an_enormous_array(array: Zarr | Ocdbt) -> None:
    """The array is one chunk: tensorstore would run out of memory and end the process."""
    change_metadata(array, lambda old: dict.fromkeys(("shape", "chunks"), [size * 10**6 for size in old["shape"]]))


def another_separator(array: Zarr | Ocdbt) -> None:
    """No chunk has the expected name any more: all values would be read as zeros."""
    change_metadata(array, lambda old: {"dimension_separator": "/"})


def another_byte_order(array: Zarr | Ocdbt) -> None:
    change_metadata(array, lambda old: {"dtype": ">f4"})


def columns_first(array: Zarr | Ocdbt) -> None:
    change_metadata(array, lambda old: {"order": "F"})


def another_dtype(array: Zarr | Ocdbt) -> None:
    change_metadata(array, lambda old: {"dtype": "<i4"})


def a_truncated_chunk(array: Zarr | Ocdbt) -> None:
    last = array.chunks()[-1]
    content = array.read(last)
    array.write(last, content[: len(content) // 2])


def a_lost_chunk(array: Zarr | Ocdbt) -> None:
    array.delete(array.chunks()[-1])


def a_lost_header(array: Zarr | Ocdbt) -> None:
    array.delete(".zarray")


def a_lost_array(array: Zarr | Ocdbt) -> None:
    array.delete_all()


DAMAGES = [
    another_shape,
    a_larger_shape,
    an_enormous_shape,
    an_enormous_chunk,
    an_enormous_array,
    another_separator,
    another_byte_order,
    columns_first,
    another_dtype,
    a_truncated_chunk,
    a_lost_chunk,
    a_lost_header,
    a_lost_array,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_array_is_named(copy: Path, layout: str, damage):
    damage(access(layout, copy, LARGE))
    both_refuse(copy, LARGE)


@pytest.mark.parametrize("layout", ["legacy"], indirect=True)
@pytest.mark.parametrize("file", ["checkpoint", "{array}/.zarray", "{array}/0.0"])
def test_only_regular_files_are_opened(copy: Path, layout: str, file: str):
    """Reading a named pipe would block forever; /dev/zero would give a chunk of zeros."""
    path = copy / file.format(array=access(layout, copy, PROMPT).folder.name)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        path.unlink()
        make(path)
        with pytest.raises(ValueError, match=f"{path.name} is no regular file|no prompt file in"):
            read_prompt(copy)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("layout", ["legacy", "orbax"], indirect=True)
def test_a_damaged_prompt_is_named(copy: Path, layout: str, damage):
    damage(access(layout, copy, PROMPT))
    refused(lambda: read_prompt(copy), PROMPT, "`prompt`")


@pytest.mark.parametrize("damage", [a_truncated_chunk, a_lost_chunk, a_lost_array, another_shape])
@pytest.mark.parametrize("layout", ["legacy", "orbax"], indirect=True)
def test_whichever_array_is_damaged_it_is_named(checkpoint: Path, copy: Path, layout: str, damage):
    for name in whole(checkpoint):
        array = access(layout, copy, name)
        kept = {key: array.read(key) for key in (".zarray", *array.chunks())}
        damage(array)
        refused(lambda: read_all(copy), name)
        if isinstance(array, Zarr):
            array.folder.mkdir(exist_ok=True)
        for key, value in kept.items():
            array.write(key, value)
    assert read_all(copy).keys() == whole(checkpoint).keys()  # after the repair, it is complete again


@pytest.mark.parametrize("layout", ["legacy", "orbax"], indirect=True)
def test_a_chunk_cut_anywhere_is_refused_or_whole(checkpoint: Path, copy: Path, layout: str):
    """The last bytes of a compressed chunk are at most a checksum: without them the values may still be right."""
    array = access(layout, copy, PROMPT)
    (chunk,) = array.chunks()
    content = array.read(chunk)
    whole_yet = 0
    for length in [*range(0, len(content) - 16, 61), *range(len(content) - 16, len(content))]:
        array.write(chunk, content[:length])
        try:
            found = read_prompt(copy)
        except ValueError as error:
            assert PROMPT in str(error) and "\n" not in str(error)
        else:
            same(found, whole(checkpoint)[PROMPT])
            whole_yet += 1
    assert whole_yet <= 12


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("layout", ["orbax"], indirect=True)
def test_each_truncated_file_of_a_database_is_found(checkpoint: Path, copy: Path, part: float):
    """A file whose damage is not found has no data of the parameters."""
    files = [path for path in copy.rglob("*") if path.parent.name == "d" or path.name == "manifest.ocdbt"]
    assert len(files) > 10
    refusals = []
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: int(part * len(content))])
        try:
            found = read_all(copy)
        except ValueError as error:
            assert "\n" not in str(error)
            refusals.append(path)
        else:
            assert found.keys() == whole(checkpoint).keys()
            for name, array in found.items():
                same(array, whole(checkpoint)[name])
        path.write_bytes(content)
    # The other files belong to earlier versions, which the last version no longer needs.
    needed = {copy / "state" / "manifest.ocdbt", *(copy / "state" / "d").iterdir(), max(files, key=os.path.getsize)}
    assert needed <= set(refusals)


@pytest.mark.parametrize("layout", ["orbax"], indirect=True)
def test_a_database_without_its_manifest_or_metadata(copy: Path):
    (copy / "state" / "manifest.ocdbt").rename(copy / "manifest")
    refused(lambda: load_base(str(copy), TINY), "decoder/decoder_norm/scale", "`where`")
    (copy / "manifest").rename(copy / "state" / "manifest.ocdbt")
    (copy / "state" / "_METADATA").unlink()
    refused(lambda: load_base(str(copy), TINY), "state/_METADATA names no parameters", "`where`")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
@pytest.mark.parametrize("layout", ["tiny", "legacy"], indirect=True)
def test_a_truncated_index_is_refused(copy: Path, keep: int):
    index = copy / INDEX
    index.write_bytes(index.read_bytes()[:keep])
    refused(lambda: open_model(str(copy)), "index of a T5X checkpoint", "`where`")


@pytest.mark.parametrize("layout", ["legacy"], indirect=True)
def test_an_index_that_points_at_another_array_is_refused(copy: Path):
    """Both arrays have the same shape, and their paths differ in one bit: layer 0 would get the kernel of layer 1."""
    index = (copy / INDEX).read_bytes()
    path = b"target.encoder.layers_0.mlp.wi_0.kernel"
    assert index.count(path) == 1
    (copy / INDEX).write_bytes(index.replace(path, path.replace(b"layers_0", b"layers_1")))
    refused(lambda: load_base(str(copy), TINY), "encoder/layers_0/mlp/wi_0/kernel", "layers_1")


@pytest.mark.parametrize("layout", ["legacy"], indirect=True)
def test_an_index_may_say_where_it_was_first_written(checkpoint: Path, copy: Path):
    """Only the last part of each path in the index is used."""
    path = "target.encoder.layers_0.mlp.wi_0.kernel/"
    index = (copy / INDEX).read_bytes()
    for first in ("/a/b/", "gs:/"):
        told = (first + path).encode()
        old = bytes([0xD9, len(path)]) + path.encode()  # msgpack's string of up to 255 bytes
        assert index.count(old) == 1
        (copy / INDEX).write_bytes(index.replace(old, bytes([0xD9, len(told)]) + told))
        name = "encoder/layers_0/mlp/wi_0/kernel"
        same(open_t5x(copy)[name], whole(checkpoint)[name])


def test_nothing_is_read_of_another_size(checkpoint: Path, monkeypatch):
    """The shapes alone are enough to refuse it, so that a checkpoint of 40 GB is refused at once."""
    reads = []
    real = tensorstore.TensorStore.read

    def counted(array, *args, **kwargs):
        reads.append(array)
        return real(array, *args, **kwargs)

    monkeypatch.setattr(tensorstore.TensorStore, "read", counted)
    refused(lambda: load_base(str(checkpoint), T5Config(**vars(TINY) | {"num_heads": 4, "head_dim": 1})), "num_heads")
    assert not reads
    load_base(str(checkpoint), TINY)
    assert len(reads) == len([name for name in by_tensorstore(checkpoint) if name != PROMPT])


def test_other_folders_are_no_checkpoint(tmp_path: Path):
    assert not is_t5x(tmp_path)
    assert not is_t5x(tmp_path / "absent")
    with pytest.raises(ArrayError, match="no T5X checkpoint"):
        open_t5x(tmp_path)
    with pytest.raises(ArrayError, match="cannot be opened"):
        open_t5x("nowhere://x/y")


# Checkpoints by URL, on a mock of Google Cloud Storage.


class Storage(http.server.BaseHTTPRequestHandler):
    """Serves the requests of tensorstore to the JSON interface: lists by prefix, and reads of objects and ranges."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet: otherwise each answer waits 40 ms for an acknowledgement
    root: Path  # has one folder per bucket
    unavailable = "never"  # a pattern of the paths that get a 503
    log: list[str]

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.log.append(self.path)
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        _, bucket, name = re.fullmatch(r"(/storage/v1/b/([^/]+)/o(?:/(.*))?)", url.path).groups()
        folder = self.root / bucket
        if re.search(self.unavailable, urllib.parse.unquote(self.path)):
            return self.answer(503, b"")
        if not folder.is_dir():
            return self.answer(404, b'{"error": {"code": 404, "message": "The specified bucket does not exist."}}')
        if name is None:
            names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            items = [{"name": name} for name in names if name.startswith(query.get("prefix", ""))]
            return self.answer(200, json.dumps({"kind": "storage#objects", "items": items}).encode())
        path = folder / urllib.parse.unquote(name)
        if not path.is_file():
            return self.answer(404, b"No such object")
        content = path.read_bytes()
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(part[1]), int(part[2] or len(content) - 1)
            end = min(end, len(content) - 1)
            return self.answer(206, content[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(content)}"})
        if part := re.fullmatch(r"bytes=-(\d+)", self.headers.get("Range", "")):
            start = max(0, len(content) - int(part[1]))
            full = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.answer(206, content[start:], {"Content-Range": full})
        return self.answer(200, content)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(content), "x-goog-generation": 1, **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


@contextlib.contextmanager
def storage(root: Path, unavailable: str = "^$"):
    handler = type("Handler", (Storage,), {"root": root, "unavailable": unavailable, "log": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.log
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def buckets(data_dir: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("buckets")
    for layout in ("tiny", "orbax"):
        shutil.copytree(data_dir / "t5" / LAYOUTS[layout], root / "bucket" / layout / "checkpoint_9")
    return root


def in_a_process(url: str, code: str, folder: Path) -> str:
    """Runs code in a process of its own, because tensorstore reads the storage's address once per process.

    The process has no credentials, because public buckets need none.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOOGLE_", "GCE_"))}
    environment |= {"TENSORSTORE_GCS_HTTP_URL": url, "HOME": str(folder), "JAX_PLATFORMS": "cpu"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent.parent), "GCE_METADATA_ROOT": "127.0.0.1:9"}
    head = """
        import time
        import numpy as np
        from prompt_tuning_jax.array_files import t5x
        from prompt_tuning_jax.checkpoints.base import load_base, open_model
        from prompt_tuning_jax.prompts.files import read_prompt
        from prompt_tuning_jax.t5.config import T5Config

        def said(call):
            start = time.monotonic()
            try:
                call()
            except ValueError as error:
                print(str(error))
            else:
                print("nothing")
            print(time.monotonic() - start)
    """
    script = textwrap.dedent(head) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_checkpoints_are_read_by_url(data_dir: Path, buckets: Path, tmp_path: Path):
    code = f"""
        config = {TINY!r}
        config = T5Config(**vars(config))
        for layout in ("tiny", "orbax"):
            base = load_base(f"gs://bucket/{{layout}}/checkpoint_9", config)
            assert base.path == f"gs://bucket/{{layout}}/checkpoint_9", base.path
            np.savez(f"{{layout}}.npz", fingerprint=base.fingerprint, **base.params)
        np.save("prompt.npy", read_prompt("gs://bucket/orbax/checkpoint_9"))
        said(lambda: read_prompt("gs://bucket/tiny/checkpoint_9"))
    """
    code = code.replace(repr(TINY), repr(TINY).replace("<class 'jax.numpy.float32'>", "'float32'"))
    with storage(buckets) as (url, log):
        told = in_a_process(url, code, tmp_path)
    assert "gs://bucket/tiny/checkpoint_9 has no prompt among its parameters" in told
    for layout in ("tiny", "orbax"):
        expected = load_base(str(data_dir / "t5" / LAYOUTS[layout]), TINY)
        with np.load(tmp_path / f"{layout}.npz") as found:
            assert found["fingerprint"] == expected.fingerprint
            assert set(found.files) - {"fingerprint"} == expected.params.keys()
            for name, value in expected.params.items():
                same(found[name], value)
    same(np.load(tmp_path / "prompt.npy"), read_prompt(data_dir / "t5" / LAYOUTS["orbax"]))
    assert len(log) > 100


def test_absent_urls_are_one_line_at_once(buckets: Path, tmp_path: Path):
    code = """
        said(lambda: open_model("gs://bucket/absent/checkpoint_9"))
        said(lambda: open_model("gs://no-such-bucket/tiny/checkpoint_9"))
        said(lambda: read_prompt("gs://bucket/absent/checkpoint_9"))
        said(lambda: open_model("gs://B/x"))
        said(lambda: open_model("nowhere://bucket/x"))
    """
    with storage(buckets) as (url, _):
        lines = in_a_process(url, code, tmp_path).splitlines()
    assert len(lines) == 10, lines
    model, bucket, prompt, name, scheme = lines[::2]
    assert model.startswith("gs://bucket/absent/checkpoint_9 is no base model")
    assert bucket.startswith("gs://no-such-bucket/tiny/checkpoint_9 ")
    assert prompt.startswith("gs://bucket/absent/checkpoint_9 is no T5X checkpoint") and "`prompt`" in prompt
    assert name.startswith("gs://B/x cannot be opened")
    assert scheme.startswith("nowhere://bucket/x cannot be opened")
    for line in (model, bucket, name, scheme):
        assert "`where`" in line
    assert max(map(float, lines[1::2])) < 10


@pytest.mark.parametrize("unavailable", ["alt=media", "o\\?", "kernel/0.0"])
def test_a_storage_that_fails_is_given_up(buckets: Path, tmp_path: Path, unavailable: str):
    """The storage fails at the first request, at the list, or at the arrays.

    The number of retries is that of NETWORK, here one. By itself, tensorstore would retry for 15 minutes.
    """
    code = """
        import tensorstore as ts
        t5x.NETWORK = ts.Context({"gcs_request_retries": {"max_retries": 1, "initial_delay": "10ms"}})
        config = T5Config(32128, 4, 2, 2, 2, 8, head_dim=2, relative_attention_num_buckets=4)
        said(lambda: load_base("gs://bucket/tiny/checkpoint_9", config))
    """
    with storage(buckets, unavailable) as (url, _):
        message, seconds = in_a_process(url, code, tmp_path).splitlines()
    assert "cannot be" in message and "`where`" in message, message
    assert float(seconds) < 20
