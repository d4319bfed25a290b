"""Defines the model sizes of the experiments, and their numbers of parameters."""

import re
from pathlib import Path

from prompt_tuning_jax.t5.config import T5Config

MODELS = Path(__file__).parents[1] / "gin_configs" / "models"

# The ladder has this project's own sizes below small, with the embedded tokenizer: 8,192 subwords and 100 sentinels,
# padded to a multiple of 128. small to xxl are T5 1.1 (gs://t5-data/pretrained_models/t5.1.1.*).
LADDER = ("pico", "nano", "micro", "mini")
T5_1_1 = ("small", "base", "large", "xl", "xxl")


def read_size(name: str) -> T5Config:
    """Reads a size from its file in gin_configs/models, without gin, which may be missing on a machine with a GPU."""
    common = (MODELS / "t5_1_1.gin").read_text()
    own = (MODELS / (f"{name}.gin" if name in LADDER else f"t5_1_1_{name}.gin")).read_text()
    numbers = dict(re.findall(r"^ *(\w+) = ([\d_]+)\b", common + own, re.MULTILINE))
    vocab_size = int(numbers.pop("VOCAB_SIZE"))
    return T5Config(vocab_size, **{field: int(number) for field, number in numbers.items()})


SIZES = {name: read_size(name) for name in LADDER + T5_1_1}


def number_of_parameters(config: T5Config) -> int:
    """Returns the number of parameters of a T5 1.1 without a prompt."""
    width, joined = config.emb_dim, config.num_heads * config.head_dim
    attention = 4 * width * joined  # query, key, value, out
    mlp = (len(config.mlp_activations) + 1) * width * config.mlp_dim  # wi_0, wi_1, wo
    encoder_layer = attention + mlp + 2 * width  # and a layer norm's scale before each block
    decoder_layer = 2 * attention + mlp + 3 * width
    tables = 1 if config.logits_via_embedding else 2
    buckets = 2 * config.relative_attention_num_buckets * config.num_heads
    layers = config.num_encoder_layers * encoder_layer + config.num_decoder_layers * decoder_layer
    return tables * config.vocab_size * width + layers + 2 * width + buckets


PARAMETERS = {size: number_of_parameters(config) for size, config in SIZES.items()}
