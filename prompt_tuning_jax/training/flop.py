"""Computes the floating-point operations (FLOP) of a training step's matmuls."""

from typing import NamedTuple

from prompt_tuning_jax.t5.config import T5Config

# Peak FLOP/s of dense matmuls in bfloat16, by JAX's name of the device: NVIDIA's data sheets, and
# https://cloud.google.com/tpu/docs/v4, v5e, v5p and v6e.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


class StepShape(NamedTuple):
    """Holds the shape of a step's batch and prompt.

    Attributes:
      batch: the number of rows, B.
      inputs: the number of input positions, T.
      targets: the number of target positions, U.
      prompt: the number of prompt positions, P; 0 without a prompt.
    """

    batch: int
    inputs: int
    targets: int
    prompt: int


def step_flop(config: T5Config, shape: StepShape, *, trains_model: bool) -> int:
    """Returns the floating-point operations of one step's matmuls, two for each multiplication and its addition.

    With S = P + T, J = heads * head_dim and n feed-forward branches (2 in T5 1.1), the forward matmuls of a row have
    these numbers of multiplications:

        encoder layer   4 S D J (query, key, value, out)   + 2 S S J (scores, mix)   + (n + 1) S D F
        decoder layer   4 U D J                            + 2 U U J                 + (n + 1) U D F
                        2 U D J (query, out) + 2 S D J (key, value) + 2 U S J (scores, mix) of the cross-attention
        logits          U D V

    In the backward pass, a matmul with weights needs another matmul of its size for the gradient of its input, and one
    more for the gradient of its weights if they are trained. A matmul of two activations needs two. Prompt tuning
    trains no weights, and values that do not depend on the prompt need no gradient. In the first decoder layer these
    are the self-attention and the query of the cross-attention, whose scores then need a gradient only for the keys.

    The matmuls of a method's own parameters are not counted, nor what a remat policy computes again. So FLOP per second
    over `PEAKS` is the MFU of PaLM (Chowdhery et al. 2022, appendix B), with this formula for the FLOP.

    Args:
      trains_model: whether weights of the model are trained; all of them are then counted as trained.
    """
    _, inputs, targets, prompt = shape
    encoded = prompt + inputs
    wide = config.num_heads * config.head_dim
    square = config.emb_dim * wide  # parameters of one attention matrix
    feed_forward = (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim

    attended = config.num_encoder_layers * 2 * encoded * encoded * wide
    weighed = config.num_encoder_layers * encoded * (4 * square + feed_forward)
    attended += config.num_decoder_layers * 2 * targets * (targets + encoded) * wide
    weighed += config.num_decoder_layers * (targets * (6 * square + feed_forward) + encoded * 2 * square)
    weighed += targets * config.emb_dim * config.vocab_size

    backward = weighed + 2 * attended
    if trains_model:
        backward += weighed
    else:
        backward -= targets * 4 * square + 4 * targets * targets * wide  # self-attention of the first decoder layer
        backward -= targets * square + targets * encoded * wide  # the query of its cross-attention
    return 2 * shape.batch * (weighed + attended + backward)
