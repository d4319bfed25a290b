"""T5X's checkpoints: the size of the model in one, and models written as T5X restores them, in either layout."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from jax.typing import ArrayLike

from prompt_tuning_jax.arrays import t5x
from prompt_tuning_jax.arrays.stored import StoredArray
from prompt_tuning_jax.arrays.whole_folder import whole_folder
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.tasks.vocabularies import write_vocabulary

Arrays = Mapping[str, ArrayLike | StoredArray]


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> T5Config | None:
    """The size of the model with parameters of these shapes; None where too much of it is missing to say.

    No file of T5X says the greatest distance of its relative positions; T5's 128 is taken.
    """
    try:
        vocab_size, emb_dim = shapes["token_embedder/embedding"]
        num_heads, buckets = shapes["encoder/relpos_bias/rel_embedding"]
        branches = [name for name in shapes if re.fullmatch(r"encoder/layers_0/mlp/wi(_\d)?/kernel", name)]
        return T5Config(
            vocab_size=vocab_size,
            emb_dim=emb_dim,
            num_heads=num_heads,
            num_encoder_layers=_layers("encoder", shapes),
            num_decoder_layers=_layers("decoder", shapes),
            mlp_dim=shapes[branches[0]][1],
            head_dim=shapes["encoder/layers_0/attention/query/kernel"][1] // num_heads,
            mlp_activations=("relu",) if len(branches) == 1 else ("gelu", "linear"),
            logits_via_embedding="decoder/logits_dense/kernel" not in shapes,
            relative_attention_num_buckets=buckets,
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return None


def _layers(stack: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return 1 + max(int(found[1]) for name in shapes if (found := re.match(rf"{stack}/layers_(\d+)/", name)))


def write(folder: str | os.PathLike, params: Arrays, vocabulary: str | os.PathLike | None = None) -> None:
    """Writes a checkpoint in T5X's own layout, whole or not at all, an array in memory at a time.

    Args:
      folder: T5X wants it to be named `checkpoint_<step>`.
      params: by path.
      vocabulary: to put beside it, as `write_vocabulary` takes it.
    """
    _write(t5x.write_legacy, folder, params, vocabulary)


def write_orbax(folder: str | os.PathLike, params: Arrays, vocabulary: str | os.PathLike | None = None) -> None:
    """Writes a checkpoint in the layout that T5X writes through Orbax; all of it is in host memory meanwhile.

    Arguments as of `write`.
    """
    _write(t5x.write_orbax, folder, params, vocabulary)


def _write(write_arrays: Callable[[Path, Arrays], None], folder, params: Arrays, vocabulary) -> None:
    with whole_folder(folder) as partial:
        write_arrays(partial, params)
        if vocabulary:
            write_vocabulary(vocabulary, partial)
