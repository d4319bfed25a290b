"""T5 1.1 in Hugging Face's layout: a folder with `config.json` and `model.safetensors`.

Their matrices are [out, in], ours and T5X's [in, out]; the relative position table is [buckets, heads], ours
[heads, buckets].
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from prompt_tuning_jax.t5.config import T5Config

CONFIG, WEIGHTS, VOCABULARY = "config.json", "model.safetensors", "spiece.model"


def names(config: T5Config) -> dict[str, tuple[str, bool]]:
    """For each parameter's path, Hugging Face's name and whether that tensor is transposed."""
    table = {"token_embedder/embedding": ("shared.weight", False)}
    if not config.logits_via_embedding:
        table["decoder/logits_dense/kernel"] = ("lm_head.weight", True)
    attention = {"query": "q", "key": "k", "value": "v", "out": "o"}
    branches = ["wi"] if len(config.mlp_activations) == 1 else [f"wi_{i}" for i in range(len(config.mlp_activations))]

    def add_attention(ours: str, norm: str, theirs: str, name: str) -> None:
        table[f"{norm}/scale"] = (f"{theirs}.layer_norm.weight", False)
        for our_part, their_part in attention.items():
            table[f"{ours}/{our_part}/kernel"] = (f"{theirs}.{name}.{their_part}.weight", True)

    def add_mlp(layer: str, theirs: str) -> None:
        table[f"{layer}/pre_mlp_layer_norm/scale"] = (f"{theirs}.layer_norm.weight", False)
        for part in (*branches, "wo"):
            table[f"{layer}/mlp/{part}/kernel"] = (f"{theirs}.DenseReluDense.{part}.weight", True)

    for stack, layers in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        table[f"{stack}/relpos_bias/rel_embedding"] = (
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            True,
        )
        table[f"{stack}/{stack}_norm/scale"] = (f"{stack}.final_layer_norm.weight", False)
        for i in range(layers):
            ours, theirs = f"{stack}/layers_{i}", f"{stack}.block.{i}.layer"
            if stack == "encoder":
                add_attention(f"{ours}/attention", f"{ours}/pre_attention_layer_norm", f"{theirs}.0", "SelfAttention")
                add_mlp(ours, f"{theirs}.1")
            else:
                norm = f"{ours}/pre_self_attention_layer_norm"
                add_attention(f"{ours}/self_attention", norm, f"{theirs}.0", "SelfAttention")
                norm = f"{ours}/pre_cross_attention_layer_norm"
                add_attention(f"{ours}/encoder_decoder_attention", norm, f"{theirs}.1", "EncDecAttention")
                add_mlp(ours, f"{theirs}.2")
    return table


def read_config(folder: str | os.PathLike) -> T5Config:
    """The model's size from `config.json`.

    Raises:
      ValueError: it is not a T5 configuration.
    """
    path = Path(folder, CONFIG)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        feed_forward = found.get("feed_forward_proj", "relu")
        return T5Config(
            vocab_size=found["vocab_size"],
            emb_dim=found["d_model"],
            num_heads=found["num_heads"],
            num_encoder_layers=found["num_layers"],
            num_decoder_layers=found.get("num_decoder_layers") or found["num_layers"],
            mlp_dim=found["d_ff"],
            head_dim=found["d_kv"],
            mlp_activations=("gelu", "linear") if feed_forward == "gated-gelu" else (feed_forward,),
            # transformers 5 writes "tie_word_embeddings": true whatever the model, and says here which T5 it is.
            logits_via_embedding=found.get("scale_decoder_outputs", found.get("tie_word_embeddings", True)),
            relative_attention_num_buckets=found.get("relative_attention_num_buckets", 32),
            relative_attention_max_distance=found.get("relative_attention_max_distance", 128),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the configuration of a T5 ({error!r}): set INITIAL_CHECKPOINT_PATH") from None


def read(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every parameter by its path, in the file's dtype.

    Raises:
      ValueError: the file is absent, truncated, or lacks a tensor.
    """
    path = Path(folder, WEIGHTS)
    table = names(read_config(folder))
    try:
        with safe_open(path, framework="numpy") as tensors:
            there = set(tensors.keys())
            lacking = [name for name, _ in table.values() if name not in there]
            if lacking:
                raise ValueError(f"{path} lacks {', '.join(lacking[:3])}{' ...' if len(lacking) > 3 else ''}")
            found = {ours: (tensors.get_tensor(theirs), turned) for ours, (theirs, turned) in table.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): set INITIAL_CHECKPOINT_PATH to a whole checkpoint"
        ) from None
    return {ours: np.ascontiguousarray(array.T) if turned else array for ours, (array, turned) in found.items()}


def write(
    folder: str | os.PathLike,
    config: T5Config,
    params: Mapping[str, np.ndarray],
    vocabulary: str | os.PathLike | None = None,
    dtype: str = "float32",
) -> None:
    """Writes a folder that `transformers` and this project load, whole or not at all.

    Args:
      params: by path; a soft prompt is left out.
      vocabulary: a SentencePiece model to put beside the weights.
      dtype: "float32" or "bfloat16".
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {}
    for ours, (theirs, turned) in names(config).items():
        array = np.asarray(params[ours]).astype(kind)
        tensors[theirs] = np.ascontiguousarray(array.T if turned else array)
    save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
    (partial / WEIGHTS).chmod(0o644)  # safetensors makes it readable to its owner alone
    gated = tuple(config.mlp_activations) == ("gelu", "linear")
    text = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": "gated-gelu" if gated else config.mlp_activations[0],
        "tie_word_embeddings": config.logits_via_embedding,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "is_encoder_decoder": True,
        "dtype": dtype,
    }
    (partial / CONFIG).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    if vocabulary:
        shutil.copyfile(vocabulary, partial / VOCABULARY)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
