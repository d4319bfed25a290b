"""Finds base models by path or hub id, checks their size, reads their parameters and computes their fingerprints."""

import collections
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, UInt32

from prompt_tuning_jax.array_files.stored import ArrayError, StoredArray
from prompt_tuning_jax.array_files.t5x import INDEX, METADATA, STATE, is_t5x, open_t5x
from prompt_tuning_jax.checkpoints import hub, huggingface, t5x
from prompt_tuning_jax.checkpoints.t5x_names import PREFIX, t5x_url
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.prompts.files import IN_T5X
from prompt_tuning_jax.t5.config import FROM_FILES, IDS, NOT_IN_SHAPES, NUMERICS, SIZE, T5Config
from prompt_tuning_jax.t5.network import Transformer, declared_parameters
from prompt_tuning_jax.t5.quantized import quantized
from prompt_tuning_jax.tokenizers.vocabulary import BYTES, Vocabulary, vocabulary_in

MODEL_SETTING = Setting("initial_checkpoint_path")
EMBEDDED = {"nano": Path(__file__).parent.parent / "bases" / "nano"}

TRIM_EVERY = 32 * 2**20  # after so many bytes have been read, freed memory is returned to the system
FLOATS = ("float32", "bfloat16", "float16")

SIZES = (
    *("vocab_size", "emb_dim", "num_heads", "num_encoder_layers", "num_decoder_layers", "mlp_dim", "head_dim"),
    "relative_bias_per_layer",
)
# Fields that Hugging Face's config.json has. Neither the arrays' shapes nor any T5X checkpoint shows them.
CHOICES = ("mlp_activations", "relative_attention_num_buckets", "relative_attention_max_distance")
HEAD = ("scale_decoder_outputs",)  # known only from config.json together with the tensors

Params = dict[str, jax.Array]
ShardingOf = Callable[[str, tuple[int, ...]], Sharding]  # returns the sharding of an array, from its path and shape


class Base(NamedTuple):
    """Holds a base model in memory.

    Attributes:
      path: the folder or URL that it was read from, or its id on the hub with the commit; None for random weights.
      params: the parameters by path, such as "encoder/layers_0/mlp/wi_0/kernel". An int8 model also has scales; see
        `t5.quantized`.
      fingerprint: identifies the file's values and what the model computes with them. It does not depend on the dtype
        in memory, on the layout on disk, or on the mesh.
    """

    path: str | None
    params: Params
    fingerprint: str


class StoredModel(NamedTuple):
    """Holds the arrays of a model on disk, which are not read yet.

    Attributes:
      location: the model's folder or URL.
      config: the model's size, read from the files; None if the files do not show it.
      arrays: the arrays by path. A T5X checkpoint may contain a soft prompt, too; see `prompts.files`.
    """

    location: str
    config: T5Config | None
    arrays: dict[str, StoredArray]


def resolve(path: str) -> str:
    """Returns the folder or URL of a base model.

    For a hub id, the configuration and the tokenizer are downloaded unless they are in the cache. `open_model`
    downloads the parameters.

    Args:
      path: the name of an embedded model; a folder; a URL (`gs://`), returned as it is; "t5x:NAME", see `t5x_names`; or
        a hub id, see `hub`. If a folder has the same name as a hub id, the folder is taken.

    Raises:
      ValueError: there is no such folder, and no such model on the hub.
    """
    if "://" in path:
        return path
    if path.startswith(PREFIX):
        return t5x_url(path)
    folder, why = EMBEDDED.get(path, Path(path)), ""
    if folder.is_dir():
        return os.path.abspath(folder)
    if hub.is_id(path) and not folder.exists():
        try:
            return hub.fetch(path)
        except hub.HubError as error:
            why = f": no folder is there, and {error}"
    raise SettingError(
        f"no base model at {path}{why}; expected a folder, an id on the hub or one of {', '.join(EMBEDDED)}: set ",
        MODEL_SETTING,
    )


def default_vocabulary(path: str | None) -> str | None:
    """Returns the vocabulary in the base model's folder, or the one that its files name; see `vocabulary_in`."""
    return vocabulary_in(resolve(path)) if path else None


def open_model(path: str) -> StoredModel:
    """Opens a base model or a tuned model in Hugging Face's layout or either layout of T5X. No array is read yet.

    Args:
      path: what `resolve` takes. For a hub id, the parameters are downloaded unless they are in the cache.

    Raises:
      ValueError: there is no model, or a part of it is missing or damaged; the message says which.
    """
    location = resolve(path)
    with _naming_model_setting():
        if Path(location, huggingface.CONFIG).is_file():
            huggingface.read_config(location)  # raises before the parameters are downloaded
            hub.fetch_weights(location)
            return StoredModel(location, *huggingface.open_folder(location))
        if is_t5x(location):
            arrays = t5x.from_scalable(open_t5x(location))
            base = {name: array.shape for name, array in arrays.items() if name not in IN_T5X}
            return StoredModel(location, t5x.infer_config(base), arrays)
    raise _no_model(location)


def _no_model(location: str) -> SettingError:
    return SettingError(
        f"{location} is no base model: it has neither {huggingface.CONFIG} (Hugging Face) nor {INDEX} or "
        f"{STATE}{METADATA} (T5X){_nearby_model_hint(location)}: set ",
        MODEL_SETTING,
    )


def check_base_dtype(dtype: Any) -> None:
    """Raises ValueError if `dtype` is not a dtype for the parameters of a base model."""
    if dtype not in ("auto", None, "float32", "bfloat16", "int8", jnp.float32, jnp.bfloat16):
        expected = "'auto', 'float32', 'bfloat16', 'int8' or None for the file's own"
        raise SettingError(Setting("base_dtype"), f" is {dtype!r}, expected {expected}")


def auto_dtype(*, only_read: bool = True) -> str | None:
    """Returns the dtype that "auto" stands for.

    On a CPU it is float32. On an accelerator it is bfloat16, the dtype of its matmuls, for a base model that is only
    read; and None, the file's own, for one that is trained, because bfloat16 would round its initial values.
    """
    if jax.default_backend() == "cpu":
        return "float32"
    return "bfloat16" if only_read else None


def load_base(path: str, config: T5Config, dtype: Any = jnp.float32, sharding_of: ShardingOf | None = None) -> Base:
    """Checks the shape of every array against `config`, then reads a base model into device memory, array by array.

    Args:
      path: what `resolve` takes.
      dtype: the dtype of the parameters. None is the file's own, "auto" is `auto_dtype()`. "int8" quantizes matrices
        (`t5.quantized`) and takes "auto" for the rest: half of bfloat16's memory, but such a model cannot be trained.
      sharding_of: returns each array's sharding; each process then reads only the shards of its own devices. If None,
        all arrays are on the first device.

    Raises:
      ValueError: there is no base model, a part of it is missing or damaged, or its size is not that of `config`.
    """
    check_base_dtype(dtype)
    location = resolve(path)
    has_config = Path(location, huggingface.CONFIG).is_file()
    if has_config:  # before the parameters of a hub id are downloaded
        with _naming_model_setting():
            check_size(huggingface.read_config(location), config, location)
    model = open_model(location)
    arrays = {name: array for name, array in model.arrays.items() if name not in IN_T5X}
    if model.config is not None:
        check_size(model.config, config, model.location, HEAD if has_config else SIZES)
    check_shapes({name: array.shape for name, array in arrays.items()}, config, model.location)
    sums, params, bytes_since_trim = {}, {}, 0
    # The largest first: an array's temporary memory is then never needed while all other arrays are in memory.
    with _naming_model_setting():
        for name in sorted(arrays, key=lambda name: arrays[name].nbytes, reverse=True):
            if arrays[name].dtype.name not in FLOATS:
                raise ArrayError(f"{name} of {model.location} is {arrays[name].dtype}, expected {' or '.join(FLOATS)}")
            # On a CPU, `device_put` may share the memory of what was just read, which nothing else holds or changes.
            # `jnp.asarray` would compile and run a program that copies it.
            array = (
                jax.device_put(np.asarray(arrays[name]))
                if sharding_of is None
                else _read_shards(arrays[name], name, sharding_of)
            )
            # From the file's own values, so that the fingerprint does not depend on the dtype in memory.
            sums[name] = _sums(array)
            if count := int(sums[name][2]):
                counted = f"{count:,} of {math.prod(array.shape):,} values"
                raise ArrayError(f"{name} of {model.location} is not finite: {counted} are NaN or infinity")
            params[name] = _convert_dtype(name, array, dtype, sharding_of)
            bytes_since_trim += arrays[name].nbytes
            if bytes_since_trim > TRIM_EVERY:
                bytes_since_trim = 0
                _trim_heap()
    parameters = {path: value for name in arrays for path, value in params[name].items()}
    return Base(hub.name_of(model.location) or model.location, parameters, _digest(arrays, sums, config))


def _trim_heap() -> None:
    """Returns freed memory to the system: glibc would keep blocks below 32 MB, in total a tenth of a base model."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def _read_shards(stored: StoredArray, name: str, sharding_of: ShardingOf) -> Array:
    """Returns an array on its devices. Each shard on a device of this process is read once."""
    sharding = sharding_of(name, stored.shape)
    devices_of = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(stored.shape).items():
        devices_of[tuple((part.start, part.stop) for part in index or ())].append(device)
    shards = []
    for span, devices in devices_of.items():
        part = stored[tuple(slice(*ends) for ends in span)]
        shards += [jax.device_put(part, device) for device in devices]
    return jax.make_array_from_single_device_arrays(stored.shape, sharding, shards)


def _convert_dtype(name: str, array: Array, base_dtype: Any, sharding_of: ShardingOf | None) -> Params:
    """Returns an array of the file in the dtype that is kept in memory, by path: int8 gives an array and its scales."""
    if base_dtype == "int8":
        convert = functools.partial(quantized, name)
        shapes = jax.eval_shape(convert, array)
        if len(shapes) == 1:  # not a matrix
            return _convert_dtype(name, array, "auto", sharding_of)
        if sharding_of is None:
            return convert(array)
        shardings = {path: sharding_of(path, leaf.shape) for path, leaf in shapes.items()}
        return jax.jit(convert, out_shardings=shardings)(array)
    return {name: array.astype(_parameter_dtype(base_dtype, array.dtype))}  # each shard stays where it is


def _parameter_dtype(base_dtype: Any, stored: np.dtype) -> np.dtype:
    if base_dtype == "auto":
        base_dtype = auto_dtype()
    if base_dtype is None:  # float16 is too narrow for T5
        return jnp.dtype(jnp.float32) if stored == jnp.float16 else stored
    return jnp.dtype(base_dtype)


@contextlib.contextmanager
def _naming_model_setting() -> Iterator[None]:
    """Adds the setting to change to errors about a base model's files."""
    try:
        yield
    except ArrayError as error:
        raise SettingError(f"{error}: set ", MODEL_SETTING, " to a whole checkpoint") from None
    except hub.HubError as error:
        raise SettingError(f"{error}: set ", MODEL_SETTING, " to a base model that can be read") from None


def _nearby_model_hint(location: str) -> str:
    """Returns a hint at the model in a subfolder that was probably meant; "" if there is none."""
    steps = [path for path in Path(location).glob("checkpoint_*") if path.name.removeprefix("checkpoint_").isdigit()]
    if steps:
        return f"; did you mean {max(steps, key=lambda path: int(path.name.removeprefix('checkpoint_')))}?"
    model = Path(location, "best", "model")
    return f"; did you mean {model}?" if model.is_dir() else ""


def random_base(config: T5Config, seed: int, sharding_of: ShardingOf | None = None) -> Base:
    """Returns a model with random weights, for pre-training. The weights are made with their shardings."""

    def init(key: Array) -> Params:
        tokens = jnp.ones((1, 2), jnp.int32)
        params: Any = Transformer(config).init(key, tokens, tokens, tokens, enable_dropout=False)["params"]
        flat: Any = flatten_dict(params, sep="/")
        return flat

    shardings = (
        None
        if sharding_of is None
        else {path: sharding_of(path, shape) for path, shape in expected_shapes(config).items()}
    )
    params = jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
    return Base(None, params, fingerprint(params, config))


def expected_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter by path. Computes no values."""
    return {path: declared.shape for path, declared in declared_parameters(config).items()}


def check_size(
    found: T5Config, expected: T5Config, where: str | os.PathLike, fields: tuple[str, ...] = SIZES + CHOICES
) -> None:
    """Raises ValueError if `fields` of the file's configuration differ from those of the expected one."""
    differences = [
        f"{f} {getattr(found, f)}, not {getattr(expected, f)}"
        for f in fields
        if getattr(found, f) != getattr(expected, f)
    ]
    if differences:
        raise SettingError(
            f"{where} has another size than the configuration ({'; '.join(differences)}): use the models/*.gin file "
            "of the checkpoint's size, or set ",
            MODEL_SETTING,
            " to a checkpoint of the configured size",
        )


def with_size(config: T5Config, path: str | None) -> T5Config:
    """Returns `config`, with the size of the base model's files if `config` has no size.

    Args:
      path: the base model's path; None for random weights, for which `config` must have a size.

    Raises:
      ValueError: the files do not show the size, or a field that `config` sets has another value in the files.
    """
    if config.has_size:
        return config
    missing = [name for name in SIZE if getattr(config, name) is FROM_FILES]
    if not path:
        raise SettingError(
            f"the model's size is unknown (missing: {', '.join(missing)}): set ",
            MODEL_SETTING,
            f" to a base model, use a models/*.gin file, or set T5Config.{missing[0]}",
        )
    model = open_model(path)
    if model.config is None:
        raise SettingError(
            f"{path} lacks parameters from which the model's size is read: set ",
            MODEL_SETTING,
            " to a whole checkpoint",
        )
    defaults = {field.name: field.default for field in dataclasses.fields(T5Config)}
    set_fields = {
        name: value for name, value in vars(config).items() if value != defaults[name] and name not in NUMERICS
    }
    check_size(model.config, dataclasses.replace(model.config, **set_fields), path, tuple(set_fields))
    return dataclasses.replace(model.config, **{name: getattr(config, name) for name in NUMERICS})


def check_vocabulary(vocabulary: Vocabulary, config: T5Config) -> None:
    """Raises ValueError if the vocabulary does not fit the model: its ids must fill the table, except for padding."""
    if not vocabulary.size <= config.vocab_size < vocabulary.size + 1024:
        raise SettingError(
            f"vocabulary {vocabulary.path} has {vocabulary.size} ids, the model {config.vocab_size} rows: they do not "
            "belong together. Use the models/*.gin of the base's size, or set ",
            Setting("vocabulary"),
        )


def open_vocabulary(path: str | None, base: str | None, config: T5Config) -> Vocabulary:
    """Returns the vocabulary at `path`, or else beside the base model, with the ids that the base model's files name.

    Raises:
      ValueError: there is no vocabulary, or its number of ids does not fit the model.
    """
    path = path or default_vocabulary(base)
    if path is None:
        location = resolve(base) if base else None
        if location and not Path(location, huggingface.CONFIG).is_file() and not is_t5x(location):
            raise _no_model(location)
        raise SettingError(
            f"no vocabulary beside the base {base}: set ",
            Setting("vocabulary"),
            f" to its SentencePiece .model file or tokenizer.json, or to {BYTES!r} for ByT5",
        )
    vocabulary = Vocabulary(path, **_ids_in_config(base))
    check_vocabulary(vocabulary, config)
    return vocabulary


def _ids_in_config(base: str | None) -> dict[str, int]:
    """Returns the special ids in a base model's config.json, as arguments of `Vocabulary`; {} for T5X's files."""
    location = base and resolve(base)
    if not location or not Path(location, huggingface.CONFIG).is_file():
        return {}
    with _naming_model_setting():
        config = huggingface.read_config(location)
    return {"pad_id": config.pad_token_id, "eos_id": config.eos_token_id, "start_id": config.decoder_start_token_id}


def with_ids(config: T5Config, vocabulary: Vocabulary) -> T5Config:
    """Returns `config` with the special ids of the base model's vocabulary.

    Args:
      vocabulary: the vocabulary that `open_vocabulary` returned.

    Raises:
      ValueError: an id of `config` is neither T5's default nor the vocabulary's.
    """
    found = {
        "pad_token_id": vocabulary.pad_id,
        "eos_token_id": vocabulary.eos_id,
        "decoder_start_token_id": vocabulary.start_id,
    }
    for name, default in IDS.items():
        if (asked := getattr(config, name)) not in (default, found[name]):
            raise SettingError(
                f"the base model's {name} is {found[name]}, not {asked}: leave T5Config.{name} out, or set ",
                MODEL_SETTING,
            )
    return dataclasses.replace(config, **found)


def check_shapes(found: Mapping[str, tuple[int, ...]], config: T5Config, where: str | os.PathLike) -> None:
    """Raises ValueError if an array is missing, is not part of the model, or has another shape; names up to three."""
    expected = expected_shapes(config)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of the model" for name in found if name not in expected]
    problems += [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise SettingError(f"{where} does not fit the model: {'; '.join(problems[:3])}{more}: set ", MODEL_SETTING)


def _checksum(array: Array) -> UInt32[Array, "3"]:
    """Returns two checksums of an array, and the number of entries that are NaN or infinity.

    A checksum is the sum over hashes of each entry's float32 bit pattern and index. The sums are integer, so they do
    not depend on the order of addition or on the sharding. Sums of the bit patterns themselves would miss changes:
    doubling or negating each of 512 entries adds a multiple of 2^32.
    """
    if jnp.issubdtype(array.dtype, jnp.floating):
        bits = jax.lax.bitcast_convert_type(array.astype(jnp.float32), jnp.uint32)
    else:
        bits = array.astype(jnp.uint32)
    number = jnp.zeros(bits.shape, jnp.uint32)  # index of each entry in row-major order
    for axis, size in enumerate(bits.shape):
        number = number * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    index_hashes = (number * jnp.uint32(0x9E3779B1), number * jnp.uint32(0x85EBCA77) + jnp.uint32(0xC2B2AE3D))
    sums = [jnp.sum(_murmur_hash(bits ^ index_hash), dtype=jnp.uint32) for index_hash in index_hashes]
    return jnp.stack([*sums, jnp.sum(~jnp.isfinite(array), dtype=jnp.uint32)])


def _murmur_hash(number: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Hashes with MurmurHash3's 32-bit finalizer: one to one; each input bit changes about half of the output bits."""
    number = (number ^ (number >> 16)) * jnp.uint32(0x85EBCA6B)
    number = (number ^ (number >> 13)) * jnp.uint32(0xC2B2AE35)
    return number ^ (number >> 16)


@functools.lru_cache
def _compiled_checksum(replicated: NamedSharding | None) -> Callable[[Array], Array]:
    return jax.jit(_checksum, out_shardings=replicated)


def _sums(array: Array) -> np.ndarray:
    """Returns the array's checksum on the host of every process that has a shard of the array."""
    sharding = getattr(array, "sharding", None)
    replicated = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return np.asarray(_compiled_checksum(replicated)(array))


def fingerprint(params: Mapping[str, jax.Array], config: T5Config | None = None) -> str:
    """Returns 16 hexadecimal digits that change with any parameter's name, shape or value.

    The checksums are computed on the devices of the arrays.

    Args:
      config: the model's configuration. Its fields in `NOT_IN_SHAPES` change the fingerprint if they differ from T5
        1.1's; None for the parameters alone.
    """
    return _digest(params, {name: _sums(params[name]) for name in params}, config)


def stored_fingerprint(arrays: Mapping[str, StoredArray], config: T5Config | None) -> str:
    """Returns the fingerprint of a model on disk, reading one array at a time."""
    return _digest(arrays, {name: _sums(jax.device_put(np.asarray(arrays[name]))) for name in arrays}, config)


def _digest(
    params: Mapping[str, jax.Array | StoredArray], sums: Mapping[str, np.ndarray], config: T5Config | None
) -> str:
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(f"{name} {params[name].shape} {sums[name][0]} {sums[name][1]}\n".encode())
    if config is not None:
        for name, value in not_in_shapes(config).items():
            digest.update(f"{name} {json.dumps(value)}\n".encode())
    return digest.hexdigest()[:16]


def not_in_shapes(config: T5Config) -> dict[str, Any]:
    """Returns the fields that change what the model computes, that no shape shows, and that differ from T5 1.1's."""
    return {name: found for name, own in NOT_IN_SHAPES.items() if (found := getattr(config, name)) != own}
