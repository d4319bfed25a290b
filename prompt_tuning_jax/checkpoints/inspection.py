"""Describes a base model from its files, and says why it cannot be loaded. Reads no parameters by default."""

import fnmatch
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prompt_tuning_jax.array_files.stored import ArrayError, StoredArray
from prompt_tuning_jax.checkpoints import hub, huggingface
from prompt_tuning_jax.checkpoints.base import (
    FLOATS,
    check_shapes,
    check_vocabulary,
    expected_shapes,
    open_model,
    open_vocabulary,
    resolve,
    stored_fingerprint,
    with_ids,
)
from prompt_tuning_jax.prompts.files import IN_T5X
from prompt_tuning_jax.t5.config import IDS, T5Config
from prompt_tuning_jax.tokenizers.vocabulary import BYTES, Vocabulary, read_settings, vocabulary_in

Arrays = Mapping[str, StoredArray]


class Inspection(NamedTuple):
    """Holds the description of a base model.

    Attributes:
      facts: texts by name: base, files, family, size, parameters, dtype, ids, tokenizer, head, fingerprint. A fact that
        the files do not show is missing.
      errors: the errors with which the model cannot be loaded; empty if none were found.
    """

    facts: dict[str, str]
    errors: list[ValueError]


def inspect_base(source: str, *, fingerprint: bool = False) -> Inspection:
    """Returns a description of a base model.

    The parameters of a hub id are downloaded only if `fingerprint` is true.

    Args:
      source: what `base.resolve` takes.
      fingerprint: whether to compute the fingerprint, for which all parameters are downloaded and read.

    Raises:
      ValueError: there is no base model.

    >>> inspect_base("nano").facts["family"]
    'T5 1.1'
    """
    location = resolve(source)
    if fingerprint:
        open_model(location)  # downloads the parameters of a hub id, or raises why they cannot be read
    facts = {"base": hub.name_of(location) or location}
    fields, config, arrays, errors = _open(location, facts)
    facts["family"] = family(fields, config)
    facts |= _size(fields, config) | _parameters(fields, config, arrays) | _ids(fields, config)
    try:
        vocabulary = _vocabulary(location, config)
        facts["tokenizer"] = _tokenizer(vocabulary)
        if config is not None:
            check_vocabulary(vocabulary, config)
        if config is not None and not fields:  # T5X's files have no special ids
            config = with_ids(config, vocabulary)
            facts |= _ids(fields, config)
    except ValueError as error:
        errors.append(error)
    if config is not None:
        facts["head"] = _head(config)
    if fingerprint and arrays is not None and not errors:
        facts["fingerprint"] = stored_fingerprint(arrays, config)
    return Inspection(facts, errors)


def _open(
    location: str, facts: dict[str, str]
) -> tuple[dict[str, Any], T5Config | None, Arrays | None, list[ValueError]]:
    """Opens a model, and adds "files" to `facts`.

    Returns:
      The fields of config.json, which are {} for T5X; the size, or None if it cannot be told; the arrays, or None if
      they are not downloaded; and the errors found.
    """
    if not Path(location, huggingface.CONFIG).is_file():
        model = open_model(location)
        arrays = {name: array for name, array in model.arrays.items() if name not in IN_T5X}
        facts["files"] = f"T5X, {len(arrays)} arrays"
        if model.config is None:
            return {}, None, arrays, [ValueError("parameters are missing from which the model's size is read")]
        return {}, model.config, arrays, _array_errors(arrays, model.config, location)
    config, arrays, errors = None, None, []
    downloaded, facts["files"] = _files(location)
    try:
        config = huggingface.read_config(location)
        if downloaded:
            config, arrays = huggingface.open_folder(location)
            errors = _array_errors(arrays, config, location)
    except ArrayError as error:
        errors.append(error)
    return read_settings(Path(location, huggingface.CONFIG)), config, arrays, errors


def _files(location: str) -> tuple[bool, str]:
    """Returns whether the parameters of a Hugging Face folder are downloaded, and a text that names their files."""
    sizes = hub.files(location)
    first = hub.first_weights(sizes)
    if first is None:
        return True, "Hugging Face, without parameters"
    names, text = [first], first
    if first.endswith(hub.INDEX):
        stem, _, suffix = first.removesuffix(hub.INDEX).partition(".")
        names = fnmatch.filter(sizes, f"{stem}-*.{suffix}")
        text = f"{stem}-*.{suffix}, {len(names)} shards"
    downloaded = all(Path(location, name).is_file() for name in (first, *names))
    text += f", {sum(sizes[name] for name in names):,} bytes"
    return downloaded, f"Hugging Face, {text}{'' if downloaded else ', not downloaded'}"


def _array_errors(arrays: Arrays, config: T5Config, location: str) -> list[ValueError]:
    """Returns the errors in the dtypes, names and shapes of a model's arrays."""
    errors: list[ValueError] = []
    unsupported = sorted({array.dtype.name for array in arrays.values()} - {*FLOATS})
    if unsupported:
        errors.append(ValueError(f"the arrays are {' and '.join(unsupported)}, expected {' or '.join(FLOATS)}"))
    try:
        check_shapes({name: array.shape for name, array in arrays.items()}, config, location)
    except ValueError as error:
        errors.append(error)
    return errors


def family(fields: Mapping[str, Any], config: T5Config | None) -> str:
    """Returns the published family that a model belongs to, judging by its size and its config.json.

    Args:
      fields: the fields of config.json; empty for a checkpoint of T5X.
      config: the size; None if it is not the size of a T5 that is supported.
    """
    kind = fields.get("model_type", "t5")
    rows = config.vocab_size if config is not None else fields.get("vocab_size")
    gate = config.mlp_activations[0] if config is not None else ""
    if kind in huggingface.OTHER_NETWORKS:
        return huggingface.OTHER_NETWORKS[kind]
    if "chronos_config" in fields:
        return "Chronos, a T5 of numbers without a text tokenizer"
    if kind == "umt5":
        return "Pile-T5" if rows == 32_128 else "umT5"
    if config is not None and config.relative_bias_per_layer:
        return "as umT5, a relative position table per layer (T5X's scalable_t5)"
    if rows == 256_000:
        return "MADLAD-400"
    if fields.get("tokenizer_class") == "ByT5Tokenizer" or rows == 384:
        return "ByT5"
    if rows == 250_112:
        return "mT5" if kind == "mt5" or not fields else "Aya-101, in mT5's shape"
    if kind not in ("t5", "mt5"):
        return f"unknown: model_type is {kind!r:.60}"
    if gate == "silu":
        return "UL2 or Flan-UL2; UL2 expects a mode token, [NLU], [NLG] or [S2S], before the inputs"
    if gate == "gelu" and config is not None:
        own = "T5 1.1" if rows != 32_128 else "T5 1.1, LM-adapted T5 1.1 or Flan-T5, whose files are alike"
        return f"{own}, but with a tied head" if config.logits_via_embedding else own
    if gate == "relu" and config is not None and len(config.mlp_activations) == 1:
        if rows == 32_100:
            return "CodeT5 or CodeT5+"
        return "T5 1.0, which was also trained on the tasks of GLUE and SuperGLUE"
    return "unknown"


def _size(fields: Mapping[str, Any], config: T5Config | None) -> dict[str, str]:
    if config is None:
        names = ("d_model", "num_layers", "num_decoder_layers", "num_heads", "d_kv", "d_ff", "vocab_size")
        given = ", ".join(f"{name} {fields[name]!r:.20}" for name in names if name in fields)
        return {"size": given} if given else {}
    cfg, activations = config, ", ".join(config.mlp_activations)
    return {
        "size": f"d_model {cfg.emb_dim}, {cfg.num_encoder_layers}+{cfg.num_decoder_layers} layers, {cfg.num_heads} "
        f"heads of {cfg.head_dim}, d_ff {cfg.mlp_dim} ({activations}), {cfg.vocab_size:,} table rows, "
        f"{cfg.relative_attention_num_buckets} position buckets up to {cfg.relative_attention_max_distance}"
    }


def _parameters(fields: Mapping[str, Any], config: T5Config | None, arrays: Arrays | None) -> dict[str, str]:
    facts = {}
    if arrays is not None:
        facts["parameters"] = f"{sum(math.prod(array.shape) for array in arrays.values()):,}"
        facts["dtype"] = " and ".join(sorted({array.dtype.name for array in arrays.values()}))
        return facts
    if config is not None:
        facts["parameters"] = f"{sum(map(math.prod, expected_shapes(config).values())):,}"
    if dtype := fields.get("dtype") or fields.get("torch_dtype"):  # transformers 5's name, and the one before
        facts["dtype"] = f"{dtype} ({huggingface.CONFIG})"
    return facts


def _ids(fields: Mapping[str, Any], config: T5Config | None) -> dict[str, str]:
    found = [fields.get(name, own) if config is None else getattr(config, name) for name, own in IDS.items()]
    named = zip(("pad", "end", "start"), found, strict=True)
    return {"ids": ", ".join(f"{name} {value!r:.20}" for name, value in named)}


def _head(config: T5Config) -> str:
    head = "tied to the embedding table" if config.logits_via_embedding else "a matrix of its own"
    return f"{head}, decoder outputs {'scaled by d_model^-0.5' if config.scales_logits else 'not scaled'}"


def _vocabulary(location: str, config: T5Config | None) -> Vocabulary:
    path = vocabulary_in(location)
    if path is None and config is not None:
        return open_vocabulary(None, location, config)  # raises its error
    if path is None:
        raise ValueError("no tokenizer lies beside the model")
    return Vocabulary(path)


def _tokenizer(vocabulary: Vocabulary) -> str:
    if vocabulary.path == BYTES:
        return f"bytes, {vocabulary.size} ids, {vocabulary.sentinels} sentinels among them"
    kind = "SentencePiece" if vocabulary.path.endswith(".model") else "tokenizers"
    pieces, more = vocabulary.size - vocabulary.extra_ids, "after" if vocabulary.extra_ids else "among"
    return f"{kind} ({Path(vocabulary.path).name}), {pieces:,} tokens, {vocabulary.sentinels} sentinels {more} them"
