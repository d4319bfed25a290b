"""Defines `T5Config`, the hyper-parameters of a T5 1.1 model."""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.settings import Count, Natural, OneOf, Share, Str, Switch, Texts, check_values, shown

REMAT_POLICIES = ("none", "minimal", "full")
SIZE = ("vocab_size", "emb_dim", "num_heads", "num_encoder_layers", "num_decoder_layers", "mlp_dim")
NUMERICS = ("dropout_rate", "dtype", "remat_policy", "attention")  # fields that the files of a base model never set
FROM_FILES: Any = None
DTYPES = ("float32", "bfloat16", "float16")
IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}  # the fields for token ids, with T5's values
# Fields that change what the model computes, and that no parameter's name or shape shows; with T5 1.1's own values.
NOT_IN_SHAPES: dict[str, Any] = {
    "mlp_activations": ("gelu", "linear"),
    "relative_attention_max_distance": 128,
    "scale_decoder_outputs": None,
    **IDS,
}
ATTENTIONS = ("auto", "products", "cudnn", "xla")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Holds a model's size, its numerics and its special token ids.

    Fields have the names of T5X's `network.T5Config`, and the ids those of Hugging Face's `T5Config`. The fields in
    `SIZE` may be left out if the base model's files give them; see `checkpoints.base.with_size`.

    Attributes:
      vocab_size: rows of the embedding table, V (padded: 32,128 for T5's 32,100 ids).
      emb_dim: d_model, D.
      mlp_dim: d_ff, F.
      dropout_rate: applied wherever T5 has dropout; all positions of a row share one mask.
      pad_token_id: pads rows; padding is never attended to, and is never a target.
      eos_token_id: ends inputs and targets, and stops generation.
      decoder_start_token_id: the decoder's first input, in front of the targets.
      dtype: dtype of the activations, or its name; "auto" is bfloat16 on accelerators and float32 on CPU. Softmax,
        RMSNorm, logits and loss are computed in float32 for every dtype.
      relative_bias_per_layer: whether each layer of both stacks has its own table of relative position biases (umT5,
        and T5X's scalable_t5); False for one table per stack.
      scale_decoder_outputs: whether the decoder's output is multiplied by D^-0.5 before the logits. None for T5X's
        rule: only if the logits are computed with the embedding table. In transformers 5 the two are independent.
      remat_policy: which results of a layer the forward pass keeps for the backward pass, by T5X's names: "none" keeps
        all that the backward pass reads, "minimal" keeps the matmuls with weights, "full" keeps only the layer's
        input. The rest is recomputed.
      attention: how the encoder's layers attend. "products" is `kernels.attend`, which writes out the matmuls. "cudnn"
        is cuDNN's fused attention on a GPU, which needs bfloat16. "xla" calls the same function of JAX
        (`jax.nn.dot_product_attention`) without cuDNN. "auto" is "cudnn" where that is known to be right and faster
        (bfloat16, head_dim a multiple of 8 and at most 128, one NVIDIA GPU of compute capability 8 or more; how JAX
        shards it over several GPUs was never tried), and else "products". Rows with masked keys before visible ones,
        odd numbers of positions, and layers with a learned prefix always use "products".
    """

    vocab_size: Count = FROM_FILES
    emb_dim: Count = FROM_FILES
    num_heads: Count = FROM_FILES
    num_encoder_layers: Natural = FROM_FILES
    num_decoder_layers: Natural = FROM_FILES
    mlp_dim: Count = FROM_FILES
    head_dim: Count = 64
    mlp_activations: Texts = NOT_IN_SHAPES["mlp_activations"]
    dropout_rate: Share = 0.0
    logits_via_embedding: Switch = False
    relative_attention_num_buckets: Count = 32
    relative_attention_max_distance: Count = NOT_IN_SHAPES["relative_attention_max_distance"]
    pad_token_id: Natural = IDS["pad_token_id"]
    eos_token_id: Natural = IDS["eos_token_id"]
    decoder_start_token_id: Natural = IDS["decoder_start_token_id"]
    relative_bias_per_layer: Switch = False
    scale_decoder_outputs: Switch | None = None
    dtype: Any = jnp.float32
    remat_policy: Annotated[Str, OneOf(REMAT_POLICIES)] = "none"
    attention: Annotated[Str, OneOf(ATTENTIONS)] = "products"

    def __post_init__(self):
        check_values(
            T5Config, {name: value for name, value in vars(self).items() if not (name in SIZE and value is FROM_FILES)}
        )
        dtype = self.dtype
        if isinstance(dtype, str) and dtype == "auto":
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        try:
            dtype = jnp.dtype(dtype).type if isinstance(dtype, str) else dtype
            known = jnp.dtype(dtype).name in DTYPES
        except TypeError:
            known = False
        if not known or dtype is None:  # NumPy reads None as float64
            raise SettingError(
                Setting("activation_dtype"),
                f" is {shown(self.dtype)}, expected one of 'auto', {', '.join(map(repr, DTYPES))}",
            )
        # gin gives lists and dtype names, but jit needs hashable values.
        object.__setattr__(self, "dtype", dtype)
        if self.attention == "auto" and self.has_size:
            takes = jnp.dtype(dtype) == jnp.bfloat16 and self.head_dim % 8 == 0 and self.head_dim <= 128
            fused = takes and has_cudnn_attention()
            object.__setattr__(self, "attention", "cudnn" if fused else "products")
        # One name for one function, which T5X's configurations of UL2 call "swish".
        activations = tuple("silu" if name == "swish" else name for name in self.mlp_activations)
        object.__setattr__(self, "mlp_activations", activations)
        if self.scale_decoder_outputs == self.logits_via_embedding:  # as T5X's rule; equal models have equal fields
            object.__setattr__(self, "scale_decoder_outputs", None)

    @property
    def scales_logits(self) -> bool:
        """Whether the decoder's output is multiplied by D^-0.5 before the logits."""
        return self.logits_via_embedding if self.scale_decoder_outputs is None else self.scale_decoder_outputs

    @property
    def has_size(self) -> bool:
        """Whether all fields in `SIZE` are set."""
        return all(getattr(self, name) is not FROM_FILES for name in SIZE)


def has_cudnn_attention() -> bool:
    """Returns whether there is one device, and cuDNN's fused attention runs on it: an NVIDIA GPU, Ampere or later."""
    if jax.default_backend() != "gpu" or jax.device_count() > 1:
        return False
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))  # "9.0"; "gfx90a" for an AMD GPU
    return capability.partition(".")[0].isdigit() and int(capability.partition(".")[0]) >= 8
