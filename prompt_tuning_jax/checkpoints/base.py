"""The frozen base: found by path, checked against the size asked for, known by its fingerprint."""

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, UInt32

from prompt_tuning_jax.checkpoints import huggingface, t5x
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.network import Transformer

EMBEDDED = {"nano": Path(__file__).parent.parent / "bases" / "nano"}

Params = dict[str, jax.Array]


class Base(NamedTuple):
    """A base model in memory.

    Attributes:
      path: where it was read; None for random weights.
      params: by path, "encoder/layers_0/mlp/wi_0/kernel".
      fingerprint: of the values; the same for float32 and bfloat16 copies of a bfloat16 file.
    """

    path: str | None
    params: Params
    fingerprint: str


def resolve(path: str) -> Path:
    """The folder of a base: the name of an embedded one, or a path.

    Raises:
      ValueError: there is no such folder.
    """
    folder = EMBEDDED.get(path, Path(path))
    if not folder.is_dir():
        raise ValueError(
            f"no base model at {path}; expected a folder or one of {', '.join(EMBEDDED)}: set INITIAL_CHECKPOINT_PATH"
        )
    return folder


def default_vocabulary(path: str | None) -> str | None:
    """The SentencePiece model that lies in the base's folder, if one does."""
    found = path and resolve(path) / huggingface.VOCABULARY
    return str(found) if found and found.is_file() else None


def load_base(path: str, config: T5Config, dtype=jnp.float32) -> Base:
    """Reads a base and checks every tensor against `config`.

    Raises:
      ValueError: no base is there, it is not whole, or its size is another.
    """
    folder = resolve(path)
    if t5x.is_checkpoint(folder):
        found = t5x.read(folder)
    elif (folder / huggingface.CONFIG).is_file():
        check_size(huggingface.read_config(folder), config, folder)
        found = huggingface.read(folder)
    else:
        raise ValueError(
            f"{folder} is no base model: it has neither {huggingface.CONFIG} (Hugging Face) nor {t5x.INDEX} (T5X). "
            "Set INITIAL_CHECKPOINT_PATH"
        )
    check_shapes({name: array.shape for name, array in found.items()}, config, folder)
    params = {name: jnp.asarray(array, dtype) for name, array in found.items()}
    return Base(os.path.abspath(folder), params, fingerprint(params))


def random_base(config: T5Config, seed: int) -> Base:
    """Random weights, for pre-training."""
    tokens = jnp.ones((1, 2), jnp.int32)
    init = jax.jit(lambda key: Transformer(config).init(key, tokens, tokens, tokens, enable_dropout=False)["params"])
    params = flatten_dict(init(jax.random.key(seed)), sep="/")
    return Base(None, params, fingerprint(params))


def expected_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape, by shape evaluation alone."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    init = functools.partial(Transformer(config).init, enable_dropout=False)
    tree = jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens)["params"]
    return {name: tuple(leaf.shape) for name, leaf in flatten_dict(tree, sep="/").items()}


def check_size(found: T5Config, expected: T5Config, where: str | os.PathLike) -> None:
    """Raises ValueError where the file's size is not the one configured."""
    fields = ("vocab_size", "emb_dim", "num_heads", "num_encoder_layers", "num_decoder_layers", "mlp_dim", "head_dim")
    odd = [
        f"{f} {getattr(found, f)}, not {getattr(expected, f)}"
        for f in fields
        if getattr(found, f) != getattr(expected, f)
    ]
    if odd:
        raise ValueError(
            f"{where} is another size than configured ({'; '.join(odd)}): use the models/*.gin of its size, "
            "or set INITIAL_CHECKPOINT_PATH"
        )


def check_shapes(found: Mapping[str, tuple[int, ...]], config: T5Config, where: str | os.PathLike) -> None:
    """Raises ValueError naming each tensor that is missing, superfluous or of another shape."""
    expected = expected_shapes(config)
    odd = [f"{name} is missing" for name in expected if name not in found]
    odd += [f"{name} is not part of the model" for name in found if name not in expected]
    odd += [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ValueError(f"{where} does not fit the model: {'; '.join(odd[:3])}{more}: set INITIAL_CHECKPOINT_PATH")


@jax.jit
def _checksum(array: Array) -> UInt32[Array, "2"]:
    """Two sums over the float32 bit patterns, one weighted by place: integer, so the order of adding cannot matter."""
    bits = jax.lax.bitcast_convert_type(array.astype(jnp.float32).reshape(-1), jnp.uint32)
    place = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1)
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * (place | 1), dtype=jnp.uint32)])


def fingerprint(params: Mapping[str, jax.Array]) -> str:
    """16 hexadecimal digits that change with any parameter's name, shape or value; computed where the arrays lie."""
    digest = hashlib.sha256()
    for name in sorted(params):
        sums = np.asarray(_checksum(params[name]))
        digest.update(f"{name} {params[name].shape} {sums[0]} {sums[1]}\n".encode())
    return digest.hexdigest()[:16]
