"""Scores given answers by their log-probability under a model."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from prompt_tuning_jax.t5.decoding import encode_once
from prompt_tuning_jax.t5.network import Transformer


def shift_right(targets: Int[Array, "B U"], start: int) -> Int[Array, "B U"]:
    """Returns the decoder's inputs: `start`, the model's `decoder_start_token_id`, then all targets but the last."""
    return jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=start)


def token_log_probs(logits: Float[Array, "B U V"], targets: Int[Array, "B U"], pad: int) -> Float[Array, "B U"]:
    """Returns the log-probability of each target token; 0 where the target is `pad`, the model's padding id."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(targets != pad, picked - jax.nn.logsumexp(logits, axis=-1), 0.0)


def target_scores(
    model: Transformer, params: Any, inputs: Int[Array, "B T"], targets: Int[Array, "B U"], **prompts: Any
) -> Float[Array, " B"]:
    """Returns the log-probability of each row's targets; for `prompts` see `decoding.encode_once`."""
    shifted = shift_right(targets, model.config.decoder_start_token_id)
    logits = model.apply({"params": params}, inputs, shifted, targets, enable_dropout=False, **prompts)
    return jnp.sum(token_log_probs(logits, targets, model.config.pad_token_id), axis=1)


def choice_scores(
    model: Transformer,
    params: Any,
    inputs: Int[Array, "B T"],
    choices: Int[Array, "#B C L"],
    count: Int[Array, ""] | None = None,
    **prompts: Any,
) -> Float[Array, "B C"]:
    """Returns the log-likelihood of each choice given each input: encodes once, then scores choice by choice.

    Args:
      model, params, inputs, prompts: see `decoding.encode_once`.
      choices: token ids, end of sequence included, with padding after it; the same for all rows, or per row.
      count: how many choices are scored; None for all C. It is traced, so one executable can score 3 or 4 choices.

    Returns:
      Nats, float32; -inf for choices with an index of `count` or more, and for choices without a token.
    """
    decode = encode_once(model, params, inputs, **prompts)
    pad, start = model.config.pad_token_id, model.config.decoder_start_token_id
    targets = jnp.broadcast_to(choices, (inputs.shape[0], *choices.shape[1:]))

    def score(index: Int[Array, ""], scores: Float[Array, "B C"]) -> Float[Array, "B C"]:
        choice = lax.dynamic_index_in_dim(targets, index, axis=1, keepdims=False)
        total = jnp.sum(token_log_probs(decode(shift_right(choice, start)), choice, pad), axis=1)
        return scores.at[:, index].set(jnp.where(jnp.any(choice != pad, axis=1), total, -jnp.inf))

    nothing = jnp.full(targets.shape[:2], -jnp.inf)
    return lax.fori_loop(0, targets.shape[1] if count is None else count, score, nothing)
