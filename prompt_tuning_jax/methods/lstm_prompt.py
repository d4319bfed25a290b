"""P-tuning's prompt encoder with a bidirectional LSTM (Liu et al. 2021, arXiv 2103.10385; PEFT's `p_tuning`, LSTM).

    P' = W_2 ReLU(W_1 H + b_1) + b_2,    H [P, 2h] = BiLSTM(P)

The LSTM runs over the positions, forwards and backwards, so each position of P' depends on all positions of P. After
training, P' is computed once and is the prompt: the networks are no longer needed.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from prompt_tuning_jax.methods.linear import draw_linear
from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.methods.prompt_tuning import check_length
from prompt_tuning_jax.prompts.initializers import SAMPLED_VOCABULARY, Initializer, start_prompt
from prompt_tuning_jax.settings import Count
from prompt_tuning_jax.t5.config import T5Config

DIRECTIONS = ("forwards", "backwards")


@dataclasses.dataclass(frozen=True, init=False)
class LSTMPrompt(Method):
    """Trains P, a bidirectional LSTM over its positions, and two linear layers; the networks start as torch's.

    Each gate has one bias. Torch adds two biases, which always have the same gradient.

    Attributes:
      length: number of prompt positions, P.
      hidden_size: width of the LSTM in each direction, h; the hidden linear layer is twice as wide. PEFT's example has
        128.
      lstm_layers: number of layers of the LSTM. PEFT's default is 2.
      initializer: how P starts; see `prompts.initializers`. PEFT draws it standard normal.
    """

    length: Count
    hidden_size: Count
    lstm_layers: Count
    initializer: Initializer

    def __init__(
        self,
        length: Count = 20,
        hidden_size: Count = 128,
        lstm_layers: Count = 2,
        init: Initializer = SAMPLED_VOCABULARY,
    ):
        object.__setattr__(self, "length", length)
        object.__setattr__(self, "hidden_size", hidden_size)
        object.__setattr__(self, "lstm_layers", lstm_layers)
        object.__setattr__(self, "initializer", init)

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        of_prompt, of_up, of_down, *of_layers = jax.random.split(key, 3 + self.lstm_layers)
        prompt = start_prompt(self.initializer, of_prompt, self.length, model)
        width, both = prompt.shape[1], 2 * self.hidden_size
        up, up_bias = draw_linear(of_up, both, both)
        down, down_bias = draw_linear(of_down, both, width)
        trained = {"prompt": prompt, "up": up, "up_bias": up_bias, "down": down, "down_bias": down_bias}
        for layer, of_layer in enumerate(of_layers):
            inputs = both if layer else width
            for direction, of_direction in zip(DIRECTIONS, jax.random.split(of_layer), strict=True):
                trained |= _draw_lstm(of_direction, _name(layer, direction), inputs, self.hidden_size)
        return trained

    def apply(self, trained: Params, frozen: Params) -> Injection:
        x = trained["prompt"]
        for layer in range(self.lstm_layers):
            each = [run_lstm(trained, _name(layer, direction), x, direction) for direction in DIRECTIONS]
            x = jnp.concatenate(each, axis=1)
        x = jax.nn.relu(x @ trained["up"] + trained["up_bias"])
        return Injection(prompt=x @ trained["down"] + trained["down_bias"])

    def check(self, config: T5Config, input_length: int) -> None:
        check_length(self.length, input_length)
        super().check(config, input_length)


def _name(layer: int, direction: str) -> str:
    return f"lstm_{layer}_{direction}"


def _draw_lstm(key: jax.Array, name: str, inputs: int, hidden: int) -> Params:
    """Returns the parameters of one direction of a layer, drawn as torch's: uniform within hidden ** -0.5 of 0."""
    bound = hidden**-0.5
    shapes = {"input": (inputs, 4 * hidden), "hidden": (hidden, 4 * hidden), "bias": (4 * hidden,)}
    return {
        f"{name}_{part}": jax.random.uniform(own, shape, jnp.float32, -bound, bound)
        for own, (part, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)
    }


def run_lstm(trained: Params, name: str, x: Float[Array, "P inputs"], direction: str) -> Float[Array, "P h"]:
    """Returns the outputs of one direction of a layer, whose state starts at zero; torch's order of gates, i f g o."""
    of_hidden = trained[f"{name}_hidden"]
    of_inputs = x @ trained[f"{name}_input"] + trained[f"{name}_bias"]

    def step(state: tuple[jax.Array, jax.Array], of_input: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        output, cell = state
        i, f, g, o = jnp.split(of_input + output @ of_hidden, 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        output = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (output, cell), output

    start = jnp.zeros(len(of_hidden), of_inputs.dtype)
    return jax.lax.scan(step, (start, start), of_inputs, reverse=direction == "backwards")[1]
