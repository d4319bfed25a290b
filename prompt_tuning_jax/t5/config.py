"""The hyper-parameters of a T5 1.1 model, and the named sizes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

REMAT_POLICIES = ("none", "minimal", "full")
ATTENTIONS = ("auto", "products", "cudnn", "xla")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Size and numerics of a model, and the ids that it is run with. Field names are those of T5X's
    `network.T5Config`, and those of Hugging Face's `T5Config` for the ids.

    Attributes:
      vocab_size: rows of the embedding table, V (padded: 32,128 for T5's 32,100 ids).
      emb_dim: d_model, D.
      mlp_dim: d_ff, F.
      dropout_rate: applied wherever T5 has dropout; one mask for all positions of a row.
      pad_token_id: fills rows up; it is never attended to, and never a target.
      eos_token_id: ends inputs and targets, and stops generation.
      decoder_start_token_id: the decoder's first input, in front of the targets.
      dtype: of the activations, also by name; "auto" is bfloat16 on accelerators and float32 on CPU. Softmax, RMSNorm,
        logits and loss are float32 whatever it is.
      relative_bias_per_layer: whether each layer of both stacks has its own table of relative positions (umT5, and
        T5X's scalable_t5); False for one table per stack.
      scale_decoder_outputs: whether the decoder's output is multiplied by D^-0.5 before the logits. None for T5X's
        rule: only if the logits go through the embedding table. transformers 5 has the two independently.
      remat_policy: what of a layer the forward pass keeps for the backward pass, by T5X's names: "none" keeps all that
        it reads, "minimal" the products with weights, "full" the layer's input alone; the rest is computed again.
      attention: of the encoder's layers: "products", written out in `kernels.attend`; "cudnn", that library's fused
        attention on a GPU, which wants bfloat16; "xla", the same function of JAX without the library; or "auto",
        cuDNN's where it is known to be right and faster (bfloat16, one NVIDIA GPU of compute capability 8 or more: how
        JAX divides it over several was never tried), products elsewhere. Rows with hidden keys before visible ones, odd
        numbers of positions, and layers with a learned prefix take products whatever it is.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_dim: int
    head_dim: int = 64
    mlp_activations: Sequence[str] = ("gelu", "linear")
    dropout_rate: float = 0.0
    logits_via_embedding: bool = False
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0
    relative_bias_per_layer: bool = False
    scale_decoder_outputs: bool | None = None
    dtype: Any = jnp.float32
    remat_policy: str = "none"
    attention: str = "products"

    def __post_init__(self):
        for name, known in (("remat_policy", REMAT_POLICIES), ("attention", ATTENTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"T5Config.{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        dtype = self.dtype
        if isinstance(dtype, str):
            if dtype == "auto":
                dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
            dtype = jnp.dtype(dtype).type
        # gin gives lists and names; jit wants hashable values.
        object.__setattr__(self, "dtype", dtype)
        if self.attention == "auto":
            takes = jnp.dtype(dtype) == jnp.bfloat16 and self.head_dim % 8 == 0 and self.head_dim <= 128
            fused = takes and has_cudnn_attention()
            object.__setattr__(self, "attention", "cudnn" if fused else "products")
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        if self.scale_decoder_outputs == self.logits_via_embedding:  # T5X's rule, said at length
            object.__setattr__(self, "scale_decoder_outputs", None)

    @property
    def scales_logits(self) -> bool:
        """Whether the decoder's output is multiplied by D^-0.5 before the logits."""
        return self.logits_via_embedding if self.scale_decoder_outputs is None else self.scale_decoder_outputs


def has_cudnn_attention() -> bool:
    """Whether the one device is one that cuDNN's fused attention runs on: NVIDIA's, Ampere or later."""
    if jax.default_backend() != "gpu" or jax.device_count() > 1:
        return False
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))  # "9.0"; of an AMD GPU "gfx90a"
    return capability.partition(".")[0].isdigit() and int(capability.partition(".")[0]) >= 8
