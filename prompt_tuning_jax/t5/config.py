"""The hyper-parameters of a T5 1.1 model, and the named sizes."""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.settings import Count, Natural, OneOf, Share, Str, Switch, Texts, check_values, shown

REMAT_POLICIES = ("none", "minimal", "full")
SIZE = ("vocab_size", "emb_dim", "num_heads", "num_encoder_layers", "num_decoder_layers", "mlp_dim")
NUMERICS = ("dropout_rate", "dtype", "remat_policy", "attention")  # which no file of a base model says
FROM_FILES: Any = None
DTYPES = ("float32", "bfloat16", "float16")
IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}  # the fields of ids, with T5's own
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
    """Size and numerics of a model, and the ids that it is run with. Field names are those of T5X's
    `network.T5Config`, and those of Hugging Face's `T5Config` for the ids.

    The fields of `SIZE` may be left out where the base model's files say them; see `checkpoints.base.sized`.

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
        if not known or dtype is None:  # which NumPy takes for float64
            raise SettingError(
                Setting("activation_dtype"),
                f" is {shown(self.dtype)}, expected one of 'auto', {', '.join(map(repr, DTYPES))}",
            )
        # gin gives lists and names; jit wants hashable values.
        object.__setattr__(self, "dtype", dtype)
        if self.attention == "auto" and self.has_size:
            takes = jnp.dtype(dtype) == jnp.bfloat16 and self.head_dim % 8 == 0 and self.head_dim <= 128
            fused = takes and has_cudnn_attention()
            object.__setattr__(self, "attention", "cudnn" if fused else "products")
        # One name for one function, which T5X's configurations of UL2 call "swish".
        activations = tuple("silu" if name == "swish" else name for name in self.mlp_activations)
        object.__setattr__(self, "mlp_activations", activations)
        if self.scale_decoder_outputs == self.logits_via_embedding:  # T5X's rule, said at length
            object.__setattr__(self, "scale_decoder_outputs", None)

    @property
    def scales_logits(self) -> bool:
        """Whether the decoder's output is multiplied by D^-0.5 before the logits."""
        return self.logits_via_embedding if self.scale_decoder_outputs is None else self.scale_decoder_outputs

    @property
    def has_size(self) -> bool:
        """Whether no field of `SIZE` is left out."""
        return all(getattr(self, name) is not FROM_FILES for name in SIZE)


def has_cudnn_attention() -> bool:
    """Whether the one device is one that cuDNN's fused attention runs on: NVIDIA's, Ampere or later."""
    if jax.default_backend() != "gpu" or jax.device_count() > 1:
        return False
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))  # "9.0"; of an AMD GPU "gfx90a"
    return capability.partition(".")[0].isdigit() and int(capability.partition(".")[0]) >= 8
