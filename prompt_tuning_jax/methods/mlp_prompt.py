"""P-tuning's prompt encoder with a multilayer perceptron (Liu et al. 2021, arXiv 2103.10385; PEFT's `p_tuning`, MLP).

    P'_i = W_3 ReLU(W_2 ReLU(W_1 P_i + b_1) + b_2) + b_3

All positions share one network. After training, P' is computed once and is the prompt: the network is no longer needed.
"""

import dataclasses

import jax

from prompt_tuning_jax.methods.linear import draw_linear
from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.methods.prompt_tuning import check_length
from prompt_tuning_jax.prompts.initializers import SAMPLED_VOCABULARY, Initializer, start_prompt
from prompt_tuning_jax.settings import Count
from prompt_tuning_jax.t5.config import T5Config


@dataclasses.dataclass(frozen=True, init=False)
class MLPPrompt(Method):
    """Trains P and a network of three linear layers, which start as torch's.

    The model gets only the network's output, unlike with `ResidualPrompt`, which adds the output to P.

    Attributes:
      length: number of prompt positions, P.
      hidden_size: width of the two hidden layers. PEFT's example has 128.
      initializer: how P starts; see `prompts.initializers`. PEFT draws it standard normal.
    """

    length: Count
    hidden_size: Count
    initializer: Initializer

    def __init__(self, length: Count = 20, hidden_size: Count = 128, init: Initializer = SAMPLED_VOCABULARY):
        object.__setattr__(self, "length", length)
        object.__setattr__(self, "hidden_size", hidden_size)
        object.__setattr__(self, "initializer", init)

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        of_prompt, of_first, of_second, of_third = jax.random.split(key, 4)
        prompt = start_prompt(self.initializer, of_prompt, self.length, model)
        width = prompt.shape[1]
        first, first_bias = draw_linear(of_first, width, self.hidden_size)
        second, second_bias = draw_linear(of_second, self.hidden_size, self.hidden_size)
        third, third_bias = draw_linear(of_third, self.hidden_size, width)
        return {
            "prompt": prompt,
            "first": first,
            "first_bias": first_bias,
            "second": second,
            "second_bias": second_bias,
            "third": third,
            "third_bias": third_bias,
        }

    def apply(self, trained: Params, frozen: Params) -> Injection:
        x = jax.nn.relu(trained["prompt"] @ trained["first"] + trained["first_bias"])
        x = jax.nn.relu(x @ trained["second"] + trained["second_bias"])
        return Injection(prompt=x @ trained["third"] + trained["third_bias"])

    def check(self, config: T5Config, input_length: int) -> None:
        check_length(self.length, input_length)
        super().check(config, input_length)
