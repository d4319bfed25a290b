"""Reads and writes T5 and related models in Hugging Face's layout: a folder with `config.json` and weights.

The weights are `model.safetensors`, `pytorch_model.bin` or `flax_model.msgpack`, or shards of one of these; the first
format that the folder has is read.

Hugging Face's matrices are [out, in]; ours and T5X's are [in, out]. Its relative position table is [buckets, heads];
ours is [heads, buckets].
"""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from prompt_tuning_jax.array_files.atomic_folder import atomic_folder
from prompt_tuning_jax.array_files.flax_files import open_flax
from prompt_tuning_jax.array_files.safetensors import open_safetensors, write_safetensors
from prompt_tuning_jax.array_files.stored import ArrayError, Index, StoredArray, first_line
from prompt_tuning_jax.array_files.torch_files import open_torch
from prompt_tuning_jax.checkpoints.hub import CONFIG, first_weights
from prompt_tuning_jax.checkpoints.hub import WEIGHTS as FORMATS
from prompt_tuning_jax.regular_files import regular
from prompt_tuning_jax.t5.adapters import is_prefix
from prompt_tuning_jax.t5.config import IDS, T5Config
from prompt_tuning_jax.tokenizers.vocabulary import write_vocabulary

WEIGHTS, TORCH, FLAX = FORMATS
EPSILON = 1e-6

# The supported values of model_type, and what the unsupported ones are.
MODEL_TYPES = ("t5", "mt5", "umt5")
OTHER_NETWORKS = {
    "longt5": "LongT5, whose encoder attends to a part of the inputs at a time",
    "t5gemma": "T5Gemma, which is made of Gemma's layers",
    "t5gemma2": "T5Gemma 2, which is made of Gemma's layers",
    "switch_transformers": "Switch Transformers, a mixture of experts",
    "pix2struct": "Pix2Struct, which reads images",
    "pop2piano": "Pop2Piano, which reads sound",
    "udop": "UDOP, which reads pages of documents",
    "bart": "BART, which has learned absolute positions",
    "mbart": "mBART, which has learned absolute positions",
    "pegasus": "PEGASUS, which has absolute positions",
}
# Fields that change what the network computes, with the values that change nothing.
ONLY = {
    "is_encoder_decoder": (True,),
    "is_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization_config": (),
}
# Fields of config.json and generation_config.json that change which tokens are generated, whether by greedy decoding,
# beam search or sampling; with the values that change nothing. The names are those of transformers' GenerationConfig.
GENERATED = {
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": ([],),
    "force_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "repetition_penalty": (1, 1.0),
    "encoder_repetition_penalty": (1, 1.0),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1, 1.0),
    "watermarking_config": (),
}
GENERATION = "generation_config.json"
ACTIVATIONS = {
    "relu": ("relu",),
    "gated-gelu": ("gelu", "linear"),  # for this name transformers uses its "gelu_new", which is Flax's gelu
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
}
# Tensors that only some files have: copies of the shared table, and a table that no version has ever read.
TABLE, TABLE_COPIES = "shared.weight", ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
LOGITS = "lm_head.weight"
BLOCK_BYTES = 2**24  # read at a time from each of two tables that are compared
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
# By the last part of a parameter's path in Flax: whether the tensor in PyTorch is the transposed array.
FLAX_LEAVES = {"kernel": True, "embedding": False, "weight": False}


def names(config: T5Config) -> dict[str, tuple[str, bool]]:
    """Returns for each parameter's path Hugging Face's name, and whether Hugging Face's tensor is transposed."""
    table = {"token_embedder/embedding": ("shared.weight", False)}
    if not config.logits_via_embedding:
        table["decoder/logits_dense/kernel"] = ("lm_head.weight", True)
    branches = ["wi"] if len(config.mlp_activations) == 1 else [f"wi_{i}" for i in range(len(config.mlp_activations))]
    for stack, layers in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        for i in range(layers if config.relative_bias_per_layer else 1):
            ours = f"{stack}/layers_{i}" if config.relative_bias_per_layer else stack
            theirs = f"{stack}.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight"
            table[f"{ours}/relpos_bias/rel_embedding"] = (theirs, True)
        table[f"{stack}/{stack}_norm/scale"] = (f"{stack}.final_layer_norm.weight", False)
        for i in range(layers):
            ours, theirs = f"{stack}/layers_{i}", f"{stack}.block.{i}.layer"
            if stack == "encoder":
                norm = f"{ours}/pre_attention_layer_norm"
                table |= _attention_names(f"{ours}/attention", norm, f"{theirs}.0", "SelfAttention")
                table |= _mlp_names(ours, f"{theirs}.1", branches)
            else:
                norm = f"{ours}/pre_self_attention_layer_norm"
                table |= _attention_names(f"{ours}/self_attention", norm, f"{theirs}.0", "SelfAttention")
                norm = f"{ours}/pre_cross_attention_layer_norm"
                table |= _attention_names(f"{ours}/encoder_decoder_attention", norm, f"{theirs}.1", "EncDecAttention")
                table |= _mlp_names(ours, f"{theirs}.2", branches)
    return table


def _attention_names(ours: str, norm: str, theirs: str, name: str) -> dict[str, tuple[str, bool]]:
    parts = {"query": "q", "key": "k", "value": "v", "out": "o"}
    kernels = {f"{ours}/{part}/kernel": (f"{theirs}.{name}.{parts[part]}.weight", True) for part in parts}
    return {f"{norm}/scale": (f"{theirs}.layer_norm.weight", False)} | kernels


def _mlp_names(layer: str, theirs: str, branches: Sequence[str]) -> dict[str, tuple[str, bool]]:
    parts = (*branches, "wo")
    kernels = {f"{layer}/mlp/{part}/kernel": (f"{theirs}.DenseReluDense.{part}.weight", True) for part in parts}
    return {f"{layer}/pre_mlp_layer_norm/scale": (f"{theirs}.layer_norm.weight", False)} | kernels


def read_config(folder: str | os.PathLike) -> T5Config:
    """Returns the model's size from `config.json`; `open_folder` also reads what only the tensors show.

    Raises:
      ArrayError: the file is damaged, or is not the configuration of a T5 that is supported.
    """
    path = Path(folder, CONFIG)
    try:
        found = json.loads(regular(path).read_text(encoding="utf-8"))
        _check_kind(found)
        mt5, umt5 = (found.get("model_type") == name for name in ("mt5", "umt5"))
        feed_forward = found.get("feed_forward_proj", "gated-gelu" if mt5 or umt5 else "relu")
        if feed_forward not in ACTIVATIONS:
            raise ValueError(f"feed_forward_proj is {feed_forward!r:.60}, expected one of {', '.join(ACTIVATIONS)}")
        if found.get("layer_norm_epsilon", EPSILON) != EPSILON:
            raise ValueError(f"layer_norm_epsilon is {found['layer_norm_epsilon']}, expected {EPSILON}")
        # transformers 5 writes "tie_word_embeddings": true for every model. "scale_decoder_outputs" tells T5 1.0, whose
        # logits are tied, from T5 1.1. For mT5, whose logits are never tied, transformers writes no such field.
        tied = not mt5 and found.get("scale_decoder_outputs", found.get("tie_word_embeddings", True))
        if not isinstance(tied, bool):
            raise ValueError(f"tie_word_embeddings is {tied!r:.60}, expected true or false")
        _check_activation(found, feed_forward)
        layers = _size(found, "num_layers", at_most=1_000)
        return T5Config(
            vocab_size=_size(found, "vocab_size"),
            emb_dim=_size(found, "d_model"),
            num_heads=_size(found, "num_heads"),
            num_encoder_layers=layers,
            num_decoder_layers=_size(found, "num_decoder_layers", layers, at_most=1_000),
            mlp_dim=_size(found, "d_ff"),
            head_dim=_size(found, "d_kv"),
            mlp_activations=ACTIVATIONS[feed_forward],
            logits_via_embedding=tied,
            relative_attention_num_buckets=_size(found, "relative_attention_num_buckets", 32),
            relative_attention_max_distance=_size(found, "relative_attention_max_distance", 128),
            relative_bias_per_layer=umt5,
            **_ids(found, _read_generation(Path(folder, GENERATION)), path),
        )
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArrayError(f"{path} is not the configuration of a T5 ({first_line(error)})") from None


def _check_kind(found: Mapping[str, Any]) -> None:
    """Raises ValueError if the configuration is for an unsupported network, or has a field that is not supported."""
    kind = found.get("model_type", "t5")
    if "chronos_config" in found:
        raise ValueError("it is Chronos, a T5 of numbers without a text tokenizer, which is not supported")
    if kind not in MODEL_TYPES:
        why = f": it is {OTHER_NETWORKS[kind]}" if isinstance(kind, str) and kind in OTHER_NETWORKS else ""
        raise ValueError(f"model_type {kind!r:.60} is not supported{why}; expected {', '.join(MODEL_TYPES)}")
    _check_values(found, ONLY | GENERATED)


def _check_values(found: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ValueError if a field is set to a value that is not in `only`."""
    for field, harmless in only.items():
        value = found.get(field)
        if value is not None and not any(type(value) is type(one) and value == one for one in harmless):
            expected = " or ".join(json.dumps(one) for one in harmless) or "null"
            raise ValueError(f"{field} is {json.dumps(value):.60}, which is not supported; expected {expected}")


def _check_activation(found: Mapping[str, Any], feed_forward: str) -> None:
    """Raises ValueError if a field that transformers derives from feed_forward_proj contradicts it."""
    gate, _, function = feed_forward.rpartition("-")
    derived = {
        "is_gated_act": (gate == "gated",),
        "dense_act_fn": ("gelu_new", "gelu") if function == "gelu" else (function,),
    }
    for field, right in derived.items():
        if field in found and found[field] not in right:
            raise ValueError(f"{field} is {found[field]!r:.60}, and feed_forward_proj {feed_forward!r}")


def _read_generation(path: Path) -> dict[str, Any]:
    """Returns the fields of generation_config.json; {} if there is no such file.

    Raises:
      ValueError: it is not a JSON object, has a field that changes which tokens are generated, or has several ids of
        the end of sequence.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        _check_values(found, GENERATED)
        ends = found.get("eos_token_id")
        if isinstance(ends, list) and len(ends) != 1:
            raise ValueError(f"eos_token_id is {ends!r:.60}, expected one id")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {first_line(error)}") from None
    return found


def _ids(found: Mapping[str, Any], others: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Returns the model's special ids: from config.json (`found`), else generation_config.json (`others`), else T5's.

    If the two files differ, config.json's id is used and a warning is logged: transformers trains with config.json's
    id, but its `generate` uses generation_config.json's.
    """
    ids = {}
    for name, default in IDS.items():
        both = [fields[name] for fields in (found, others) if fields.get(name) is not None]
        value, other = (_one(both[0]), _one(both[-1])) if both else (None, None)
        if value != other:
            _warn_once(f"{path} has {name} {value!r:.60}, and {GENERATION} {other!r:.60}: {path.name}'s is used")
        if value is None and name == "decoder_start_token_id":
            value = ids["pad_token_id"]  # as in T5, where both are 0
        value = default if value is None else value
        rows = _size(found, "vocab_size")
        if type(value) is not int or not 0 <= value < rows:
            raise ValueError(f"{name} is {value!r:.60}, expected one id below the vocab_size of {rows}")
        ids[name] = value
    if ids["pad_token_id"] == ids["eos_token_id"]:
        raise ValueError(f"pad_token_id and eos_token_id are both {ids['eos_token_id']}: padding would end every text")
    return ids


def _one(value: Any) -> Any:
    """Returns the only item of a list of one item; returns any other value unchanged."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


@functools.lru_cache(1024)
def _warn_once(line: str) -> None:
    """Logs a warning once per process, because a process reads a configuration several times."""
    logging.warning(line)


def _size(config: dict, name: str, default: int | None = None, at_most: int = 2**31) -> int:
    size = default if config.get(name) is None else config[name]
    if type(size) is not int or not 1 <= size <= at_most:  # True is an int, too
        raise ValueError(f"{name} is {size!r:.60}, expected a number of 1 to {at_most}")
    return size


def open_folder(folder: str | os.PathLike) -> tuple[T5Config, dict[str, StoredArray]]:
    """Returns the model's size, and every parameter by its path, in the file's dtype.

    No array is read yet, except the embedding table and the logits' matrix if they must be compared; see `_with_head`.

    Raises:
      ArrayError: a file is missing or truncated, or tensors are missing or unexpected; the message names them.
    """
    folder = Path(folder)
    config = read_config(folder)
    found = _open_tensors(folder)
    copy = next((name for name in TABLE_COPIES if name in found), None)
    if TABLE not in found and copy:  # MADLAD-400 has only the decoder's copy
        found[TABLE] = found[copy]
    config = _with_head(config, folder, found)
    table = names(config)
    expected = {theirs for theirs, _ in table.values()}
    problems = [f"{name} is missing" for name in sorted(expected - set(found))]
    problems += [f"{name} is not part of the model" for name in sorted(set(found) - expected - _ignored(config))]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ArrayError(f"{folder} does not fit its {CONFIG}: {'; '.join(problems[:3])}{more}")
    copies = {name: found[name] for name in TABLE_COPIES if name in found and found[name] is not found[TABLE]}
    if copies:
        found[TABLE] = _comparing_copies(found[TABLE], copies, folder)
    return config, {
        ours: found[theirs].T if transposed else found[theirs] for ours, (theirs, transposed) in table.items()
    }


def _open_tensors(folder: Path) -> dict[str, StoredArray]:
    """Opens the weights of the folder: safetensors if it has them, else PyTorch's, else Flax's."""
    first = first_weights([path.name for path in folder.iterdir() if path.is_file()])
    if first is None:
        raise ArrayError(f"{folder} has no weights: expected {', '.join(FORMATS)}, or shards of one of these")
    if first.startswith(TORCH):
        return open_torch(folder, TORCH)
    if first.startswith(FLAX):
        return _as_in_torch(open_flax(folder, FLAX), folder)
    return open_safetensors(folder)


def _as_in_torch(arrays: Mapping[str, StoredArray], folder: Path) -> dict[str, StoredArray]:
    """Returns the arrays of transformers' FlaxT5 with the names and layout of its T5 in PyTorch."""
    found = {}
    for path, array in arrays.items():
        *parents, leaf = path.split("/")
        name = ".".join([*parents, "weight" if leaf in FLAX_LEAVES else leaf])
        if name in found:
            raise ArrayError(f"{folder} has {path} under two names")
        found[name] = array.T if FLAX_LEAVES.get(leaf) else array
    return found


def _with_head(config: T5Config, folder: Path, found: Mapping[str, StoredArray]) -> T5Config:
    """Returns `config` with the logits that transformers 5 computes, which config.json alone does not show.

    transformers 5 writes "tie_word_embeddings": true for every model. The logits are tied if the file has no matrix for
    them, or one that equals the embedding table. A separate field says whether they are scaled.
    """
    if LOGITS in found and TABLE in found:
        if not config.logits_via_embedding or _equal(found[LOGITS], found[TABLE]):
            return config
        return dataclasses.replace(config, logits_via_embedding=False, scale_decoder_outputs=True)
    tied = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("tie_word_embeddings")
    if LOGITS not in found and tied is True and not config.logits_via_embedding:
        return dataclasses.replace(config, logits_via_embedding=True, scale_decoder_outputs=False)
    return config


def _equal(matrix: StoredArray, other: StoredArray) -> bool:
    """Returns whether two matrices are equal. Reads both in blocks of rows, up to the first block that differs."""
    if matrix.shape != other.shape:
        return False
    count, *_ = matrix.shape
    rows = max(1, BLOCK_BYTES * count // matrix.nbytes)
    blocks = [(slice(row, min(row + rows, count)), slice(None)) for row in range(0, count, rows)]
    return all(np.array_equal(matrix[block], other[block]) for block in blocks)


def _ignored(config: T5Config) -> set[str]:
    return {*TABLE_COPIES, UNUSED, *((LOGITS,) if config.logits_via_embedding else ())}


def _comparing_copies(table: StoredArray, copies: Mapping[str, StoredArray], folder: Path) -> StoredArray:
    """Returns the shared table. Reading it also reads its copies, and raises ArrayError if a copy has other values."""

    def read(index: Index) -> np.ndarray:
        array = table[index]
        for name, copy in sorted(copies.items()):
            if not np.array_equal(array, copy[index]):
                raise ArrayError(f"{name} of {folder} is not {TABLE} over again, as {CONFIG} has it")
        return array

    return StoredArray(table.shape, table.dtype, read)


def write(
    folder: str | os.PathLike,
    config: T5Config,
    params: Mapping[str, ArrayLike | StoredArray],
    vocabulary: str | os.PathLike | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that `transformers` and this project load; the folder appears whole or not at all.

    At most one shard is in memory at a time.

    Args:
      params: the parameters by path; a soft prompt among them is not written.
      vocabulary: the vocabulary to write beside the weights, as `write_vocabulary` takes it.
      dtype: "float32" or "bfloat16"; None for each array's own.
      shard_bytes: the largest size of a shard; a larger tensor gets a shard of its own.

    Raises:
      ValueError: Hugging Face's T5 does not have the model's feed-forward, or `params` has a learned prefix.
    """
    for path in filter(is_prefix, params):
        raise ValueError(f"{path} is a learned prefix, which Hugging Face's T5 has no place for: save it by itself")
    feed_forward = {activations: name for name, activations in ACTIVATIONS.items()}.get(tuple(config.mlp_activations))
    if feed_forward is None:
        raise ValueError(f"Hugging Face's T5 has no feed-forward of {config.mlp_activations}, only {list(ACTIVATIONS)}")
    table = names(config)
    tensors = {theirs: _as_written(params[ours], dtype, transposed) for ours, (theirs, transposed) in table.items()}
    kinds = {tensor.dtype.name for tensor in tensors.values()}
    text = {
        "architectures": [
            "UMT5ForConditionalGeneration" if config.relative_bias_per_layer else "T5ForConditionalGeneration"
        ],
        "model_type": "umt5" if config.relative_bias_per_layer else "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": feed_forward,
        **_head_fields(config),
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "layer_norm_epsilon": EPSILON,
        "dropout_rate": 0.1,
        **{name: getattr(config, name) for name in IDS},
        "is_encoder_decoder": True,
        "dtype": kinds.pop() if len(kinds) == 1 else "float32",
    }
    with atomic_folder(folder) as partial:
        write_safetensors(partial, tensors, shard_bytes)
        (partial / CONFIG).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
        if vocabulary:
            write_vocabulary(vocabulary, partial)


def _head_fields(config: T5Config) -> dict[str, bool]:
    if config.scale_decoder_outputs is None:
        return {"tie_word_embeddings": config.logits_via_embedding}
    return {"tie_word_embeddings": True, "scale_decoder_outputs": config.scale_decoder_outputs}


def _as_written(value: ArrayLike | StoredArray, dtype: str | None, transposed: bool) -> StoredArray:
    """Returns `value` in the dtype and layout of the file; it is copied to the host only when it is written."""
    kind = np.dtype(dtype or value.dtype)
    stored = StoredArray(tuple(value.shape), kind, lambda index: np.asarray(value)[index].astype(kind, copy=False))
    return stored.T if transposed else stored
