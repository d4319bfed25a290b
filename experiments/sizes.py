"""The sizes on the figures' x-axis, and their numbers of parameters."""

import dataclasses

from prompt_tuning_jax.t5.config import SIZES, T5Config

# Their bases have the embedded vocabulary: gin_configs/models/nano.gin, micro.gin, mini.gin.
LADDER = ("nano", "micro", "mini")
LADDER_VOCABULARY = 8_320

CONFIGS = {
    size: dataclasses.replace(config, vocab_size=LADDER_VOCABULARY) if size in LADDER else config
    for size, config in SIZES.items()
}


def number_of_parameters(config: T5Config) -> int:
    """The parameters of a T5 1.1 without a prompt."""
    width, joined = config.emb_dim, config.num_heads * config.head_dim
    attention = 4 * width * joined  # query, key, value, out
    mlp = (len(config.mlp_activations) + 1) * width * config.mlp_dim  # wi_0, wi_1, wo
    encoder_layer = attention + mlp + 2 * width  # and a scale before each block
    decoder_layer = 2 * attention + mlp + 3 * width
    tables = 1 if config.logits_via_embedding else 2
    buckets = 2 * config.relative_attention_num_buckets * config.num_heads
    layers = config.num_encoder_layers * encoder_layer + config.num_decoder_layers * decoder_layer
    return tables * config.vocab_size * width + layers + 2 * width + buckets


PARAMETERS = {size: number_of_parameters(config) for size, config in CONFIGS.items()}
