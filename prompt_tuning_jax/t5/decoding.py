"""Greedy decoding: the encoder once, its keys and values once, then one token a step until every row has ended."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from prompt_tuning_jax.t5.network import Transformer

EOS = 1


def greedy(
    model: Transformer,
    params: Any,
    inputs: Int[Array, "B T"],
    max_length: int,
    prompt: Float[Array, "P D"] | Float[Array, "B P D"] | None = None,
) -> tuple[Int[Array, "B U"], Float[Array, " B"]]:
    """The most likely next token, again and again.

    Args:
      params: of the model, without the "params" level.
      inputs: tokens, 0 is padding.
      max_length: U, the number of tokens a row gets, end of sequence included.
      prompt: see `Transformer.encode`.

    Returns:
      Tokens int32, 0 after a row's end of sequence (id 1), and the sum of the log-probabilities of each row's tokens.
    """
    batch = inputs.shape[0]
    variables = {"params": params}
    encoded = model.apply(variables, inputs, enable_dropout=False, prompt=prompt, method="encode")
    keys = model.apply(variables, encoded, method="project_encoded")

    def logits_of(token: Int[Array, "B Q"], cache: Any) -> tuple[Any, Any]:
        return model.apply(
            variables | cache,
            keys,
            inputs,
            token,
            token,
            enable_dropout=False,
            decode=True,
            max_decode_length=max_length,
            mutable=["cache"],
            method="decode",
        )

    start = jnp.zeros((batch, max_length), jnp.int32)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: logits_of(start, {})[1]))

    def step(carry):
        index, token, tokens, score, ended, cache = carry
        logits, cache = logits_of(token[:, None], cache)
        log_probs = jax.nn.log_softmax(logits[:, 0])
        token = jnp.where(ended, 0, jnp.argmax(log_probs, axis=-1).astype(jnp.int32))
        score = score + jnp.where(ended, 0.0, jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0])
        tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, None], index, axis=1)
        return index + 1, token, tokens, score, ended | (token == EOS), cache

    def unfinished(carry):
        index, _, _, _, ended, _ = carry
        return (index < max_length) & ~jnp.all(ended)

    first = (0, jnp.zeros(batch, jnp.int32), start, jnp.zeros(batch), jnp.zeros(batch, bool), empty)
    _, _, tokens, score, _, _ = lax.while_loop(unfinished, step, first)
    return tokens, score
