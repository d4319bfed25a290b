"""Compiles the programs that generate and score answers, once per shape, for evaluation, ensembles and prediction.

Each program is called as `program(injection, frozen, inputs, prompt_mask, ...)`. The injection has one prompt for all
rows, or one prompt per row with a mask that hides the padding in front of shorter prompts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.methods.method import Injection, Params, merge
from prompt_tuning_jax.parallel.one_device import ONE_DEVICE, OneDevice
from prompt_tuning_jax.parallel.partitioner import Partitioner
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.decoding import beam_search, greedy, sample
from prompt_tuning_jax.t5.log_likelihood import choice_scores, target_scores
from prompt_tuning_jax.t5.network import Transformer


class Engine:
    """Holds the programs of one model.

    Attributes:
      greedy: `(..., length)`, see `decoding.greedy`; `length` is static, as in `sample` and `beam`.
      sample: `(..., length, seeds=, temperature=, top_k=, top_p=)`, see `decoding.sample`.
      beam: `(..., length)`, see `decoding.beam_search`.
      rank: `(..., choices, count=None)`, see `log_likelihood.choice_scores`.
    """

    def __init__(self, model: Transformer, partitioner: Partitioner | OneDevice = ONE_DEVICE, beams: int = 4):
        """Compiles nothing yet.

        Args:
          partitioner: shards the programs over the mesh of the frozen parameters; every process gets all answers.
          beams: the number of beams of `beam`.
        """

        def program(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
            def run(injection: Injection, frozen: Params, inputs: Any, mask: Any, *more: Any, **named: Any) -> Any:
                params = merge(injection.parameters, frozen)
                return function(model, params, inputs, *more, **injection.prompts, prompt_mask=mask, **named)

            return partitioner.jit(run, out_shardings=partitioner.replicated, **options)

        def beam(*arguments: Any, **prompts: Any) -> Any:
            return beam_search(*arguments, **prompts, beams=beams)

        self.greedy = program(greedy, static_argnums=4)
        self.sample = program(sample, static_argnums=4)
        self.beam = program(beam, static_argnums=4)
        self.rank = program(choice_scores)
        self._score = program(target_scores)

    def forget(self) -> None:
        """Drops all compiled programs, and frees their memory."""
        for program in (self.greedy, self.sample, self.beam, self.rank, self._score):
            program.clear_cache()  # pyright: ignore[reportFunctionMemberAccess]

    def score(self, injection: Injection, frozen: Params, inputs: Any, targets: Any) -> Any:
        """Returns the log-probability of each row's targets; see `log_likelihood.target_scores`."""
        return self._score(injection, frozen, inputs, None, targets)


def check_finite(scores: Any, ids: Any) -> None:
    """Raises SettingError if a row with an example has a score that is not finite.

    Args:
      scores: log-probabilities, [B, ...].
      ids: the index of each row's example in its split, -1 for a row without an example; see `Batch`.
    """
    scores, ids = np.asarray(scores), np.asarray(ids)
    finite = np.isfinite(scores.reshape(len(scores), -1)).all(axis=1)
    broken = ids[~finite & (ids >= 0)].tolist()
    if broken:
        rows = f"row {broken[0]}" + (f" and {len(broken) - 1} others of its batch" if broken[1:] else "")
        raise SettingError(
            f"the logits of {rows} are not finite: the base model, or what was trained on it, is broken: set ",
            Setting("initial_checkpoint_path"),
            " to a sound base model, or ",
            Setting("prompt_file"),
            " to a sound prompt",
        )


def engine_of(size: T5Config, partitioner: Partitioner | OneDevice = ONE_DEVICE, beams: int = 4) -> Engine:
    """Returns the engine for models of this size. Equal arguments give the same engine, with its compiled programs."""
    return _engine_of(dataclasses.replace(size, dropout_rate=0.0), partitioner, beams)


@functools.lru_cache(maxsize=8)
def _engine_of(size: T5Config, partitioner: Partitioner | OneDevice, beams: int) -> Engine:
    return Engine(Transformer(size), partitioner, beams)
