"""Loads a base model by its name or path alone: size, parameters, tokenizer and fingerprint."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from prompt_tuning_jax.checkpoints.base import Params, load_base, open_model, open_vocabulary, resolve, with_ids
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.quantized import embedding_table
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Holds a base model in memory, which is only read.

    Attributes:
      path: the model's folder or URL, or its id on the hub with the commit, "google/flan-t5-base@COMMIT"; None for
        random weights.
      config: the model's size, and the numerics that it runs with.
      parameters: the parameters by path, such as "encoder/layers_0/mlp/wi_0/kernel". An int8 model also has scales; see
        `t5.quantized`.
      tokenizer: the model's own tokenizer, or the one that the user chose.
      fingerprint: 16 hexadecimal digits that change with the file's values and with what the model computes with them,
        but not with the dtype in memory.
      gather: returns the embedding table in floats from the parameters, which may be sharded over a mesh.
    """

    path: str | None
    config: T5Config
    parameters: Mapping[str, jax.Array]
    tokenizer: Vocabulary
    fingerprint: str
    gather: Callable[[Mapping[str, jax.Array]], Any] = embedding_table

    @functools.cached_property
    def embeddings(self) -> Float[Array, "V D"]:
        """The embedding table, in floats."""
        return self.gather(self.parameters)

    def __repr__(self) -> str:
        cfg, count = self.config, sum(array.size for array in self.parameters.values())
        layers = f"{cfg.num_encoder_layers}+{cfg.num_decoder_layers}"
        dtypes = " and ".join(sorted({str(array.dtype) for array in self.parameters.values()}))
        return (
            f"Model({self.path}: T5 with d_model {cfg.emb_dim}, {layers} layers, {cfg.vocab_size:,} table rows, "
            f"{count:,} parameters in {dtypes}, fingerprint {self.fingerprint})"
        )


def load(where: str, dtype: Any = "auto", vocabulary: str | None = None) -> Model:
    """Loads a base model.

    Args:
      where: "nano", the embedded model; the path or `gs://` URL of a folder, in Hugging Face's layout or T5X's; an id
        on the Hugging Face hub, such as "google/flan-t5-base" or "google/flan-t5-base@REVISION"; or "t5x:NAME", a
        checkpoint that T5X publishes, such as "t5x:t5_1_1_lm100k_base".
      dtype: the dtype of the parameters in memory: "float32", "bfloat16", "int8", None for the file's own, or "auto",
        which is float32 on a CPU and bfloat16 on an accelerator.
      vocabulary: a SentencePiece `.model` file, a `tokenizer.json`, or "bytes" for ByT5; None for the tokenizer beside
        the model.

    Raises:
      ValueError: there is no model, a part of it is missing or damaged, or its tokenizer is missing or does not fit it.

    >>> load("nano").config.emb_dim
    128
    """
    location = resolve(where)
    found = open_model(location).config
    if found is None:
        raise SettingError(
            f"{where} lacks parameters from which the model's size is read: set ",
            Setting("initial_checkpoint_path"),
            " to a whole checkpoint",
        )
    config = dataclasses.replace(found, dtype="auto", attention="auto")
    tokenizer = open_vocabulary(vocabulary, location, config)
    config = with_ids(config, tokenizer)
    base = load_base(location, config, dtype)
    parameters: Params = base.params
    return Model(base.path, config, parameters, tokenizer, base.fingerprint)
