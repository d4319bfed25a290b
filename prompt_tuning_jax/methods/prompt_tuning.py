"""Prompt tuning (Lester et al. 2021): a learned matrix in front of the frozen encoder's input."""

import dataclasses

import jax

from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.prompts.initializers import SAMPLED_VOCABULARY, Initializer, start_prompt
from prompt_tuning_jax.settings import Count, check, whole
from prompt_tuning_jax.t5.config import T5Config

PROMPT = "encoder/prompt/prompt"  # where the prompt lies under T5X, and in a run's checkpoints
MAX_ENCODER_LENGTH = 4_096  # no position table limits a T5, but attention's memory grows with the square


@dataclasses.dataclass(frozen=True, init=False)
class PromptTuning(Method):
    """P itself is trained (section 2; section 3 has the settings).

    Attributes:
      length: positions, P.
      initializer: how the prompt starts; see `prompts.initializers`. The paper's default is the task's class labels.
    """

    length: Count
    initializer: Initializer

    # Written out, because the argument has the name of a method.
    def __init__(self, length: Count = 100, init: Initializer = SAMPLED_VOCABULARY):
        object.__setattr__(self, "length", length)
        object.__setattr__(self, "initializer", init)

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        return {PROMPT: start_prompt(self.initializer, key, self.length, model)}

    def apply(self, trained: Params, frozen: Params) -> Injection:
        return Injection(prompt=trained[PROMPT])

    def check(self, config: T5Config, input_length: int) -> None:
        check_length(self.length, input_length)
        super().check(config, input_length)


def check_length(length: Count, input_length: int) -> None:
    """Raises SettingError if a prompt has no position, or leaves no room for the inputs."""
    room = MAX_ENCODER_LENGTH - input_length
    check("prompt_length", length, whole(1, room, f"the room beside inputs of {input_length} tokens"))
