"""pytorch_model.bin and flax_model.msgpack: the arrays of safetensors, read in parts, and refused when damaged."""

import io
import json
import pickle
import resource
import shutil
import sys
import time
import zipfile

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import pytest
from fixtures.models import random_model
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

import prompt_tuning_jax as pt
from prompt_tuning_jax import convert
from prompt_tuning_jax.array_files.flax_files import open_flax
from prompt_tuning_jax.array_files.state_dict import read_state_dict
from prompt_tuning_jax.array_files.stored import ArrayError
from prompt_tuning_jax.array_files.torch_files import MOST_PICKLED, open_torch
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.base import load_base
from prompt_tuning_jax.t5.config import T5Config

# No two dimensions alike, and stacks of different depth: a transposed or misplaced matrix cannot fit.
CONFIG = T5Config(61, 24, 3, 2, 3, 40, head_dim=7)
BIN, MSGPACK = "pytorch_model.bin", "flax_model.msgpack"
DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float64": np.float64,
}


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


def as_torch(array):
    """The tensor of the same bits: PyTorch takes no bfloat16 from NumPy."""
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.tensor(array.view(np.uint16)).view(torch.bfloat16)
    return torch.tensor(array)


def flax_tree(tensors):
    """Tensors by their names in PyTorch as the paths of transformers' FlaxT5, with its kernels of [in, out]."""
    paths = {}
    for name, value in tensors.items():
        *parents, module, _ = name.split(".")
        leaf = "kernel"
        if module in ("shared", "relative_attention_bias"):
            leaf = "embedding"
        elif "layer_norm" in module:
            leaf = "weight"
        paths["/".join([*parents, module, leaf])] = np.ascontiguousarray(value.T) if leaf == "kernel" else value
    return paths


def write_bin(folder, tensors, shards=1):
    import torch

    names = [[*tensors][part::shards] for part in range(shards)]
    files = [BIN] if shards == 1 else [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    for file, part in zip(files, names, strict=True):
        torch.save({name: as_torch(tensors[name]) for name in part}, folder / file)
    if shards > 1:
        write_index(folder / f"{BIN}.index.json", files, names)


def write_msgpack(folder, tensors, shards=1):
    paths = flax_tree(tensors)
    names = [[*paths][part::shards] for part in range(shards)]
    files = [MSGPACK] if shards == 1 else [f"flax_model-{i + 1:05}-of-{shards:05}.msgpack" for i in range(shards)]
    for file, part in zip(files, names, strict=True):
        tree = unflatten_dict({name: paths[name] for name in part}, sep="/")
        (folder / file).write_bytes(flax.serialization.to_bytes(tree))
    if shards > 1:
        write_index(folder / f"{MSGPACK}.index.json", files, names)


def write_index(path, files, names):
    weight_map = {name: file for file, part in zip(files, names, strict=True) for name in part}
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


WRITERS = {BIN: write_bin, MSGPACK: write_msgpack}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model in safetensors."""
    folder = tmp_path_factory.mktemp("original") / "model"
    huggingface.write(folder, CONFIG, jax.device_get(random_model(CONFIG)[1]))
    return folder


@pytest.fixture(scope="module")
def tensors(original):
    return load_file(original / "model.safetensors")


@pytest.fixture
def folder(original, tmp_path):
    """A model's folder without weights."""
    (tmp_path / "model").mkdir()
    shutil.copy(original / "config.json", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(params=WRITERS)
def file(request, torch, folder, tensors):
    """The file of weights of a model, in each format."""
    WRITERS[request.param](folder, tensors)
    return folder / request.param


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        array = np.asarray(array)
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert np.asarray(found[name]).tobytes() == array.tobytes(), name


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_array_is_that_of_safetensors(torch, original, tensors, folder, tmp_path, kind, dtype, shards):
    """Whole and in part."""
    cast = {name: array.astype(DTYPES[dtype]) for name, array in tensors.items()}
    params = {name: value.astype(DTYPES[dtype]) for name, value in jax.device_get(random_model(CONFIG)[1]).items()}
    huggingface.write(tmp_path / "expected", CONFIG, params)
    WRITERS[kind](folder, cast, shards)
    found, expected = huggingface.open_folder(folder)[1], huggingface.open_folder(tmp_path / "expected")[1]
    assert_same(found, expected)
    for name, array in expected.items():
        rows = slice(1, 3)
        for part in (rows, slice(None)), (slice(None), rows), (rows, rows):
            index = part[: len(array.shape)]
            np.testing.assert_array_equal(found[name][index], np.asarray(array)[index])


def test_a_module_that_torch_saves(torch, tmp_path):
    """Its state dict is an OrderedDict with attributes; with keep_vars it holds parameters."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    expected = {name: value.numpy() for name, value in module.state_dict().items()}
    for protocol in (2, 4):
        for state in (module.state_dict(), module.state_dict(keep_vars=True), dict(module.state_dict())):
            torch.save(state, tmp_path / BIN, pickle_protocol=protocol)
            assert_same(open_torch(tmp_path), expected)


def test_tensors_that_share_a_storage_or_are_strided(torch, tmp_path):
    whole = torch.arange(4 * 6 * 5, dtype=torch.float32).reshape(4, 6, 5)
    tensors = {
        "whole": whole,
        "again": whole,
        "part": whole[1:3],
        "column": whole[:, 2, 1:4],
        "steps": whole[::2, 1::3, ::2],
        "transposed": whole.permute(2, 0, 1),
        "diagonal": whole[0].as_strided((3,), (6,), 2),
        "window": whole.as_strided((3, 4), (1, 2), 7),
        "long": whole[1:2, 2:4, :3].as_strided((1, 2, 3), (2**62, 5, 1)),
        "scalar": whole[1, 2, 3],
    }
    torch.save(tensors, tmp_path / BIN)
    with zipfile.ZipFile(tmp_path / BIN) as archive:
        assert len([name for name in archive.namelist() if "/data/" in name]) == 1
    found = open_torch(tmp_path)
    assert found["again"] is found["whole"]
    assert_same(found, {name: tensor.numpy() for name, tensor in tensors.items()})
    inner = (slice(1, 3), slice(0, 2), slice(1, 3))
    np.testing.assert_array_equal(found["transposed"][inner], tensors["transposed"].numpy()[inner])
    np.testing.assert_array_equal(found["transposed"].T, tensors["transposed"].numpy().T)
    np.testing.assert_array_equal(found["window"][inner[:2]], tensors["window"].numpy()[inner[:2]])


@pytest.mark.parametrize("gap", [2**14, 20])
def test_blocks_of_entries_that_are_not_adjacent(torch, tmp_path, monkeypatch, gap):
    """A part of large rows is read some rows at a time, or each row by itself."""
    monkeypatch.setattr("prompt_tuning_jax.array_files.strided.BLOCK_BYTES", 200)
    monkeypatch.setattr("prompt_tuning_jax.array_files.strided.GAP_BYTES", gap)
    matrix = torch.arange(23 * 17, dtype=torch.float32).reshape(23, 17)
    torch.save({"matrix": matrix, "transposed": matrix.T}, tmp_path / BIN)
    found = open_torch(tmp_path)
    for name, expected in (("matrix", matrix.numpy()), ("transposed", matrix.numpy().T)):
        np.testing.assert_array_equal(found[name], expected)
        np.testing.assert_array_equal(found[name][3:20, 5:9], expected[3:20, 5:9])


def test_arrays_in_chunks(tmp_path, monkeypatch):
    """As Flax writes those of more than 2^30 bytes; rows go on from one chunk to the next."""
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)
    array, small = np.arange(13 * 11, dtype=np.float32).reshape(13, 11), np.ones((5, 5), np.float32)
    content = flax.serialization.to_bytes({"a": {"kernel": array}, "b": small})
    assert content.count(b"__msgpack_chunked_array__") == 1
    (tmp_path / MSGPACK).write_bytes(content)
    found = open_flax(tmp_path)
    assert_same(found, {"a/kernel": array, "b": small})
    np.testing.assert_array_equal(found["a/kernel"][4:9, 2:], array[4:9, 2:])


def test_safetensors_win_then_pytorch(torch, original, tensors, folder):
    """What is not read may be anything."""
    write_msgpack(folder, tensors)
    expected = huggingface.open_folder(original)[1]
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"without an index")
    assert_same(huggingface.open_folder(folder)[1], expected)
    (folder / MSGPACK).write_bytes(b"nothing")
    write_bin(folder, tensors, shards=2)
    assert_same(huggingface.open_folder(folder)[1], expected)
    for file in folder.glob("pytorch_model*"):
        file.write_bytes(b"nothing")
    shutil.copy(original / "model.safetensors", folder)
    assert_same(huggingface.open_folder(folder)[1], expected)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_base_model_that_loads_and_converts(torch, tiny, tmp_path, monkeypatch, capfd, kind):
    shutil.copytree(tiny.base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    WRITERS[kind](tmp_path / "base", load_file(tiny.base / "model.safetensors"))
    assert pt.load(str(tmp_path / "base")).fingerprint == pt.load(str(tiny.base)).fingerprint
    arguments = ["convert", str(tmp_path / "base"), str(tmp_path / "converted"), "--to=huggingface"]
    monkeypatch.setattr(sys, "argv", arguments)
    convert.main()
    assert capfd.readouterr().out.count("\n") == 1
    for name in ("model.safetensors", "config.json", "spiece.model"):
        assert (tmp_path / "converted" / name).read_bytes() == (tiny.base / name).read_bytes()


# What is refused.


@pytest.fixture
def refused(folder, tmp_path, monkeypatch, capfd):
    """The one line that the command `convert` says of the folder; nothing is written."""

    def run(*expected):
        with pytest.raises(ValueError) as error:
            load_base(str(folder), CONFIG)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600 and "`where`" in str(error.value)
        monkeypatch.setattr(sys, "argv", ["convert", str(folder), str(tmp_path / "target"), "--to=t5x"])
        with pytest.raises(SystemExit) as stop:
            convert.main()
        out, err = capfd.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
        assert not list(tmp_path.glob("target*"))
        for part in (str(folder), "SOURCE", *expected):
            assert part in err, err

    return run


def repacked(path, compression=zipfile.ZIP_STORED, **members):
    """Writes the archive anew with other members, named without their folder; None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(contents)).partition("/")[0]
    contents |= {f"{root}/{name}": content for name, content in members.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            if content is not None:
                archive.writestr(name, content, compression if name.split("/", 1)[1] in members else None)


def member(path, name):
    with zipfile.ZipFile(path) as archive:
        return next(archive.read(found) for found in archive.namelist() if found.partition("/")[2] == name)


class Exploit:
    """Unpickling this calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_pickle_that_would_run_code(torch, folder, tensors, refused, tmp_path):
    harm = tmp_path / "harm"
    for protocol in range(2, 6):
        write_bin(folder, tensors)
        repacked(folder / BIN, **{"data.pkl": pickle.dumps(Exploit(open, str(harm), "w"), protocol)})
        refused(f"{BIN} cannot be read (it asks for '", "open', which no state dict needs)")
    assert not harm.exists()


GLOBALS = ["os.system", "builtins.eval", "torch.load", "torch._utils._rebuild_tensor", "torch.storage.UntypedStorage"]


@pytest.mark.parametrize("name", GLOBALS)
def test_a_name_that_no_state_dict_needs(torch, folder, tensors, refused, name):
    write_bin(folder, tensors)
    module, _, attribute = name.rpartition(".")
    repacked(folder / BIN, **{"data.pkl": b"\x80\x02c%s\n%s\n." % (module.encode(), attribute.encode())})
    refused(f"it asks for {name!r}, which no state dict needs")


NESTED = b"\x80\x02}" + b")" + b"2\x86" * 60 + b"K\x01s."  # DUP and TUPLE2: 2^60 empty tuples to hash
NESTED_BY_MEMO = b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * 60 + b"K\x01s."


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x02K\x01.", "it holds a value of type int, not a state dict"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "'a' is of type int, not a tensor"),
        (b"\x80\x02}", "cannot be read (pickle exhausted before seeing STOP)"),
        (b"", "cannot be read (pickle exhausted before seeing STOP)"),
        (b"\x80\x02s.", "it is damaged"),
        (b"\x80\x02cos\nsystem\n(S'false'\ntR.", "'os.system'"),
        (b"\x80\x02(ios\nsystem\n.", "the opcode INST"),
        (b"\x80\x02\x82\x01.", "the opcode EXT1"),
        (b"\x80\x04\x96" + b"\xff" * 8 + b".", "cannot be read ("),  # a bytearray of 2^64 bytes
        (b"\x80\x02}r\xff\xff\xff\xff.", None),  # an index of 2^32 for Python's array of values to be used again
        (NESTED, "the opcode DUP"),
        (NESTED_BY_MEMO, "a key of a dict is of type tuple, not a name"),
        (bytes(MOST_PICKLED + 1), f"its data.pkl has {MOST_PICKLED + 1:,} bytes"),
    ],
)
def test_pickles_of_other_kinds(torch, folder, tensors, refused, content, said):
    """Some of them would take all memory, or years."""
    write_bin(folder, tensors)
    repacked(folder / BIN, **{"data.pkl": content})
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    refused(*([] if said is None else [said]))
    assert time.monotonic() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "calls torch._utils._rebuild_tensor_v2 with other arguments"),
        (b"ctorch._utils\n_rebuild_parameter\n}\x88}\x87R", "calls torch._utils._rebuild_parameter with other"),
        (b"ccollections\nOrderedDict\n}\x85R", "calls collections.OrderedDict with other arguments"),
        (b"ctorch\nFloatStorage\n)R", "calls torch.FloatStorage with other arguments"),
        (b"ctorch\nFloatStorage\nQ", "a storage is expected"),
        (b"X\x07\x00\x00\x00storageQ", "a storage is expected"),
        (b"K\x07)R", "calls something that is no name"),
        (b"ctorch\nFloatStorage\n}b", "sets attributes of something that is no dict"),
        (b"ccollections\nOrderedDict\nN}X\x01\x00\x00\x00aK\x01s\x86b", "sets attributes of something that is no dict"),
    ],
)
def test_names_that_are_called_otherwise(call, said):
    """Classes of the pickle are texts here: nothing is called, and no attribute of a class can be set."""
    with pytest.raises(ValueError, match=said):
        read_state_dict(io.BytesIO(b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s."))


@pytest.mark.parametrize("share", [0, 0.0005, 0.5, 0.9, 0.9999])
def test_truncated_files(file, refused, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    refused(f"{file} cannot be read (")


def test_a_file_that_is_truncated_after_it_was_opened(file, folder):
    arrays = huggingface.open_folder(folder)[1]
    file.write_bytes(file.read_bytes()[:200])
    refusals = 0
    for name in ("token_embedder/embedding", "decoder/logits_dense/kernel"):
        try:
            np.asarray(arrays[name])
        except ArrayError as error:
            refusals += 1
            assert f"{file} cannot be read (it is truncated)" in str(error)
    assert refusals == 2


def test_a_wrong_shape(torch, folder, tensors, refused):
    for kind, write in WRITERS.items():
        write(folder, tensors | {"shared.weight": tensors["shared.weight"][:-1]})
        refused("token_embedder/embedding is [60, 24], not [61, 24]")
        (folder / kind).unlink()


def test_integers_and_other_values(torch, folder, tensors, refused):
    write_bin(folder, tensors)
    state = torch.load(folder / BIN, weights_only=True)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        torch.save(state | {"shared.weight": torch.ones((61, 24), dtype=dtype)}, folder / BIN)
        refused(f"shared.weight of {folder / BIN} is {str(dtype).removeprefix('torch.')}, expected float32, float16")
    torch.save(state | {"shared.weight": torch.ones((61, 24), dtype=torch.complex64)}, folder / BIN)
    refused("it asks for 'torch.ComplexFloatStorage'")
    torch.save(state | {"step": 3}, folder / BIN)
    refused("'step' is of type int, not a tensor")
    torch.save(state | {"more": state}, folder / BIN)
    refused("'more' is of type dict, not a tensor")
    torch.save(state | {"shared.weight": torch.ones(0, 24)}, folder / BIN)
    refused(f"shared.weight of {folder / BIN} is [0, 24], which is empty")
    torch.save(state | {"shared.weight": torch.zeros(1, 1).expand(10**6, 10**6)}, folder / BIN)
    refused("shared.weight", "too short with 1 entries")


def test_storages_that_do_not_fit(torch, folder, tensors, refused):
    write_bin(folder, tensors)
    content = member(folder / BIN, "data/0")
    for wrong in (content[:-4], content + bytes(4), b""):
        repacked(folder / BIN, **{"data/0": wrong})
        refused("its storage '0' has", f"{len(wrong):,} bytes, not")
    repacked(folder / BIN, **{"data/0": None})
    refused("it has no storage '0'")
    write_bin(folder, tensors)
    matrix = torch.ones(3, 4)
    torch.save({"a": matrix}, folder / BIN)
    changed = member(folder / BIN, "data.pkl").replace(b"K\x03K\x04\x86", b"K\x03K\x05\x86")
    assert changed != member(folder / BIN, "data.pkl")
    repacked(folder / BIN, **{"data.pkl": changed})
    refused(f"a of {folder / BIN} cannot be read (it is [3, 5], and its storage '0' too short with 12 entries)")


def test_archives_of_other_kinds(torch, folder, tensors, refused):
    write_bin(folder, tensors)
    whole = (folder / BIN).read_bytes()
    pickled, entries = member(folder / BIN, "data.pkl"), member(folder / BIN, "data/0")
    for name, content in {"data.pkl": pickled, "data/0": entries, "byteorder": b"little" * 2}.items():
        repacked(folder / BIN, zipfile.ZIP_DEFLATED, **{name: content})
        refused(name, "is compressed, which torch.save never does")
        (folder / BIN).write_bytes(whole)
    repacked(folder / BIN, byteorder=b"big")
    refused("its byte order is 'big', expected 'little'")
    repacked(folder / BIN, byteorder=None)  # as before PyTorch 2.1
    assert len(huggingface.open_folder(folder)[1]) == len(tensors)
    repacked(folder / BIN, **{"data.pkl": None})
    refused("expected one data.pkl in the archive, found 0")
    torch.save(torch.load(io.BytesIO(whole)), folder / BIN, _use_new_zipfile_serialization=False)
    refused(f"{folder / BIN} cannot be read (it is of torch.save's format before PyTorch 1.6")


def test_shards_that_are_missing_or_lack_a_tensor(torch, folder, tensors, refused):
    for kind, write in WRITERS.items():
        write(folder, tensors, shards=2)
        stem, suffix = kind.split(".")
        second = folder / f"{stem}-00002-of-00002.{suffix}"
        content = second.read_bytes()
        second.unlink()
        refused(str(second))
        shutil.copy(folder / f"{stem}-00001-of-00002.{suffix}", second)
        refused(f"{second} lacks ", f"{kind}.index.json says it has")
        second.write_bytes(content)
        (folder / f"{kind}.index.json").write_text("{}")
        refused(f"{kind}.index.json is not an index of shards")
        (folder / f"{kind}.index.json").unlink()
        refused("has no weights: expected model.safetensors, pytorch_model.bin, flax_model.msgpack")


def packed(array=b"\x93\x91\x01\xa7float32\xc4\x04\x00\x00\x80\x3f"):
    """A map with one extension of type 1."""
    return b"\x81\xa1a\xc7" + bytes([len(array)]) + b"\x01" + array


CHUNKS = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}, "chunks": {"0": np.ones(6, np.float32)}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is truncated"),
        (b"\x07", "it holds a value of type int, not a tree of arrays"),
        (b"\xc1", "it has the byte 0xc1"),
        (b"\x81\x80\x07", "a key of a map is no text"),
        (b"\x81\xa1a\xdc\x00\x01\xa1b", "'a' is a value of type list, not an array"),
        (b"\x81\xa1a\x07", "'a' is a value of type int, not an array"),
        (b"\x81\x07\x07", "a key of a map is no text"),
        (b"\x82\xa1a\x80\xa1a\x80", "a map has the key 'a' twice"),
        (b"\x81\xa1a" * 2_000, "nested deeper than 32 levels"),
        (b"\xdf\xff\xff\xff\xff", "it is truncated"),
        (b"\xdd\xff\xff\xff\xff", "a list of 4,294,967,295 values"),
        (b"\x81\xdb\xff\xff\xff\xff", "a name of 4,294,967,295 bytes"),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "it is truncated"),
        (b"\x81\xa1a\xd4\x05\x00", "an extension of type 5"),
        (packed() + b"\x00", "more bytes follow the tree"),
        (packed(b"\x93\x91\x02\xa7float32\xc4\x04\x00\x00\x80\x3f"), "an array is [2] of float32, and has 4 bytes"),
        (packed(b"\x93\x91\xff\xa7float32\xc4\x00"), "an array has an invalid shape"),
        (packed(b"\x93\x91\x01\xa5int32\xc4\x04\x00\x00\x80\x3f"), "is 'int32', expected float32, float16"),
        (packed(b"\x92\x91\x01\xa7float32"), "an array is not as Flax writes it"),
        (packed(b"\x93\x91\x01\xa7float32\x07"), "an array is not as Flax writes it"),
        ({"a": CHUNKS | {"shape": {"0": 2, "1": 2}}}, "an array in chunks is [2, 2], and its chunks have 6 entries"),
        ({"a": CHUNKS | {"shape": {"0": 2, "2": 3}}}, "lacks its shape or one of its chunks"),
        ({"a": CHUNKS | {"chunks": {}}}, "the chunks of an array are not arrays of one dtype"),
        ({"a": CHUNKS | {"chunks": {"0": np.ones((2, 3), np.float32)}}}, "an array in chunks is [2, 3]"),
        ({"a": {"b": np.ones(1, np.float32)}, "a/b": np.ones(1, np.float32)}, "'a/b' is there twice"),
        ({"a": {"kernel": np.ones((1, 1))}, "a/weight": np.ones((1, 1))}, "a/weight under two names"),
    ],
)
def test_msgpack_of_other_kinds(folder, refused, content, said):
    if isinstance(content, dict):
        content = flax.serialization.msgpack_serialize(content)
    (folder / MSGPACK).write_bytes(content)
    refused(said)


def test_the_smallest_msgpack_is_read(tmp_path):
    """Those above are damaged, and not what is never read."""
    (tmp_path / MSGPACK).write_bytes(packed())
    assert_same(open_flax(tmp_path), {"a": np.ones(1, np.float32)})
    (tmp_path / MSGPACK).write_bytes(flax.serialization.msgpack_serialize({"a": CHUNKS}))
    assert_same(open_flax(tmp_path), {"a": np.ones((2, 3), np.float32)})


def outcome(open_file, folder):
    """The arrays, read; None where they are refused with one line."""
    try:
        return {name: np.asarray(array) for name, array in open_file(folder).items()}
    except ArrayError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 1_000
        return None


SMALL = {"shared.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.b.weight": np.ones((2, 2), np.float32)}


@pytest.mark.parametrize(("kind", "open_file"), [(BIN, open_torch), (MSGPACK, open_flax)])
def test_damaged_bytes_are_refused_or_change_no_other_entry(torch, tmp_path, kind, open_file):
    """One to three bytes of the file; most of them are not entries."""
    WRITERS[kind](tmp_path, SMALL)
    content = (tmp_path / kind).read_bytes()
    expected = outcome(open_file, tmp_path)
    assert expected is not None
    rng, refusals = np.random.default_rng(0), 0
    for _ in range(400):
        damaged = bytearray(content)
        places = rng.integers(0, len(content), rng.integers(1, 4))
        for place in places:
            damaged[place] = rng.integers(0, 256)
        (tmp_path / kind).write_bytes(damaged)
        found = outcome(open_file, tmp_path)
        refusals += found is None
        if found is not None and kind == BIN:  # names and shapes have a checksum in the archive
            assert found.keys() == expected.keys()
            different = sum(
                np.sum(np.frombuffer(found[name].tobytes(), np.uint8) != np.frombuffer(array.tobytes(), np.uint8))
                for name, array in expected.items()
            )
            assert different <= len(places)
    assert 20 < refusals < 400


def test_a_flipped_bit_of_a_header_shifts_no_storage(torch, tmp_path):
    """The header before a storage says where the storage begins, and has no checksum."""
    tensors = {"a": torch.arange(200.0), "b": torch.arange(300.0) + 1000}
    torch.save(tensors, tmp_path / BIN)
    content = (tmp_path / BIN).read_bytes()
    with zipfile.ZipFile(tmp_path / BIN) as archive:
        headers = [found.header_offset for found in archive.infolist() if "/data/" in found.filename]
    refusals = 0
    for place in (header + byte for header in headers for byte in range(30)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            (tmp_path / BIN).write_bytes(damaged)
            found = outcome(open_torch, tmp_path)
            refusals += found is None
            assert found is None or all(found[name].tobytes() == tensors[name].numpy().tobytes() for name in tensors)
    assert refusals >= 2 * 8 * 8  # signature and lengths of two headers


def test_damaged_pickles_are_refused_or_data(torch, tmp_path):
    """With the checksum of the damaged bytes, so that it is the pickle that is read."""
    write_bin(tmp_path, SMALL)
    content = member(tmp_path / BIN, "data.pkl")
    rng, refusals = np.random.default_rng(0), 0
    for _ in range(400):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            other = content[rng.integers(0, len(content))]  # an opcode or a character that has a meaning
            damaged[place] = other if rng.integers(2) else rng.integers(0, 256)
        repacked(tmp_path / BIN, **{"data.pkl": bytes(damaged)})
        refusals += outcome(open_torch, tmp_path) is None
    assert 100 < refusals < 400
