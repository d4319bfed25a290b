"""Generates answers, one token per step until every row has ended: greedily, by beam search or by sampling.

All three encode once, project the encoder's output to keys and values once, and extend a cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer

from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.network import Transformer

COLDEST = 1e-4  # a lower temperature counts as 0, as in T5X

Cache = Any
Step = Callable[[Int[Array, " B"], Cache], tuple[Float[Array, "B V"], Cache]]


def encode_once(model: Transformer, params: Any, inputs: Int[Array, "B T"], **prompts: Any) -> Callable[..., Any]:
    """Encodes `inputs`, and returns `Transformer.decode` with all of its arguments set but the decoder's tokens.

    Args:
      params: the model's parameters, without the "params" level.
      inputs: token ids, padded with the model's padding id.
      prompts: `prompt`, `layer_prompts`, `prompt_mask` and `layers_replace`, as `Transformer.encode` takes them.

    Returns:
      `decode(tokens [B, Q], cache={}, **options)`.
    """
    variables = {"params": params}
    encoded = model.apply(variables, inputs, enable_dropout=False, **prompts, method="encode")
    keys = model.apply(variables, encoded, method="project_encoded")

    def decode(tokens: Int[Array, "B Q"], cache: Cache = None, **options) -> Any:
        options |= {"enable_dropout": False, "prompt_mask": prompts.get("prompt_mask"), "method": "decode"}
        return model.apply(variables | (cache or {}), keys, inputs, tokens, tokens, **options)

    return decode


def greedy(
    model: Transformer,
    params: Any,
    inputs: Int[Array, "B T"],
    max_length: int,
    **prompts: Any,
) -> tuple[Int[Array, "B U"], Float[Array, " B"]]:
    """Generates the most likely token at each step.

    Args:
      model, params, inputs, prompts: see `encode_once`.
      max_length: the largest number of tokens per row, U, end of sequence included.

    Returns:
      The tokens, int32, with padding after a row's end of sequence; and each row's summed log-probability of them.
    """
    step, cache = _begin(encode_once(model, params, inputs, **prompts), inputs.shape[0], max_length)
    shape = (inputs.shape[0], max_length)
    return _one_by_one(model.config, step, cache, shape, lambda log_probs, _: jnp.argmax(log_probs, axis=-1))


def sample(
    model: Transformer,
    params: Any,
    inputs: Int[Array, "B T"],
    max_length: int,
    seeds: Integer[Array, " B"],
    temperature: Float[Array, " B"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    **prompts: Any,
) -> tuple[Int[Array, "B U"], Float[Array, " B"]]:
    """Samples tokens, with settings per row. All settings are traced: another value does not recompile.

    Args:
      model, params, inputs, max_length, prompts: see `greedy`.
      seeds: a row's draws depend only on its own seed, not on the batch or on the row's index in it.
      temperature: divides the logits; 0 is greedy.
      top_k: draw from the `top_k` most likely tokens; 0 for all.
      top_p: of these tokens, draw from the fewest most likely ones whose probabilities, at that temperature and among
        these tokens, add up to `top_p`; 1 for all, and 0 as well, as in T5X. With both settings, a token that is as
        likely as the last one kept is kept, too.

    Returns:
      As `greedy`. The log-probabilities are the model's own: at temperature 1, over all tokens.
    """
    keys = jax.vmap(jax.random.key)(seeds.astype(jnp.uint32))
    cold = temperature < COLDEST

    def choose(log_probs: Float[Array, "B V"], index: Int[Array, ""]) -> Int[Array, " B"]:
        def draw(key: Array) -> Float[Array, " V"]:
            return jax.random.gumbel(jax.random.fold_in(key, index), log_probs.shape[1:])

        heated = log_probs / jnp.where(cold, 1.0, temperature)[:, None]
        # The Gumbel-max trick: the argmax of logits plus Gumbel noise is a draw from their softmax.
        noisy = jnp.where(likeliest(heated, top_k, top_p), heated + jax.vmap(draw)(keys), -jnp.inf)
        return jnp.argmax(jnp.where(cold[:, None], log_probs, noisy), axis=-1)

    step, cache = _begin(encode_once(model, params, inputs, **prompts), inputs.shape[0], max_length)
    return _one_by_one(model.config, step, cache, (inputs.shape[0], max_length), choose)


class Beams(NamedTuple):
    """Holds the state of a beam search with K beams per row, the best first. A score of -inf marks an empty slot."""

    index: Int[Array, ""]
    token: Int[Array, "B K"]
    live: Int[Array, "B K U"]
    live_scores: Float[Array, "B K"]
    ended: Int[Array, "B K U"]
    ended_scores: Float[Array, "B K"]
    cache: Cache


def beam_search(
    model: Transformer,
    params: Any,
    inputs: Int[Array, "B T"],
    max_length: int,
    *,
    beams: int = 4,
    length_penalty: float = 0.6,
    **prompts: Any,
) -> tuple[Int[Array, "B K U"], Float[Array, "B K"]]:
    """Generates with T5X's beam search (decoding.py).

    Args:
      model, params, inputs, max_length, prompts: see `greedy`.
      beams: the number of live beams per row in each step, and of answers per row, K.
      length_penalty: exponent of the length penalty, at least 0: an answer's score is its log-probability divided by
        ((5 + length) / 6) ** length_penalty.

    Returns:
      The tokens, int32, with padding after an end of sequence; and the scores. The best answer is first. If a row has
      fewer than K finished answers, its other slots have padding and a score of -inf (T5X: -1e7). If it has none, it
      gets its live beams and their log-probabilities.
    """
    batch, shape = inputs.shape[0], (inputs.shape[0], beams, max_length)
    pad, end, start = model.config.pad_token_id, model.config.eos_token_id, model.config.decoder_start_token_id
    step, cache = _begin(encode_once(model, params, inputs, **prompts), batch, max_length)
    # Vmapped over beams: the beams of a row share its encoder keys and values, which are not repeated.
    axes = jax.tree.map(lambda x: 1 if x.ndim else None, cache)
    step = jax.vmap(step, in_axes=(1, axes), out_axes=(1, axes))

    def penalty(length: Int[Array, ""] | int) -> Float[Array, ""]:
        return ((5.0 + jnp.float32(length)) / 6.0) ** length_penalty

    def extend(state: Beams) -> Beams:
        log_probs, cache = step(state.token, state.cache)
        totals = (state.live_scores[:, :, None] + log_probs).reshape(batch, -1)
        # 2 K candidates leave K live ones, because each of the K beams gives at most one candidate that ends.
        scores, indices = lax.top_k(totals, 2 * beams)
        parent, token = indices // log_probs.shape[-1], (indices % log_probs.shape[-1]).astype(jnp.int32)
        tokens = _pick(state.live, parent).at[:, :, state.index].set(token)

        new = jnp.where(token == end, scores / penalty(state.index + 1), -jnp.inf)
        ended_scores, best = lax.top_k(jnp.concatenate([state.ended_scores, new], axis=1), beams)
        ended = _pick(jnp.concatenate([state.ended, tokens], axis=1), best)

        live_scores, best = lax.top_k(jnp.where(token == end, -jnp.inf, scores), beams)
        parent = _pick(parent, best)
        cache = jax.tree.map(lambda x: _pick(x, parent) if x.ndim else x, cache)
        return Beams(state.index + 1, _pick(token, best), _pick(tokens, best), live_scores, ended, ended_scores, cache)

    def unfinished(state: Beams) -> Bool[Array, ""]:
        # A row is finished when no live beam can still beat its worst answer. T5X's bound: the length penalty of an
        # answer that is one token longer than `max_length`.
        hope = state.live_scores[:, 0] / penalty(max_length + 1)
        return (state.index < max_length) & ~jnp.all(state.ended_scores[:, -1] > hope)

    nothing, empty = jnp.full((batch, beams), -jnp.inf), jnp.full(shape, pad, jnp.int32)
    begin = jnp.full((batch, beams), start, jnp.int32)
    cache = jax.tree.map(lambda x: jnp.repeat(x[:, None], beams, axis=1) if x.ndim else x, cache)
    # All beams start with the same token, so only the first may count.
    first = Beams(jnp.int32(0), begin, empty, nothing.at[:, 0].set(0.0), empty, nothing, cache)
    last = lax.while_loop(unfinished, extend, first)
    answered = last.ended_scores[:, :1] > -jnp.inf
    scores = jnp.where(answered, last.ended_scores, last.live_scores)
    return jnp.where(answered[..., None], last.ended, last.live), scores


def likeliest(logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]) -> Bool[Array, "B V"]:
    """Returns True for the tokens that `sample` may draw."""
    wanted = jnp.where(top_k > 0, top_k.astype(jnp.float32), jnp.inf)
    among = _largest_until(logits, jnp.ones_like(logits), wanted)
    shares = jax.nn.softmax(jnp.where(among, logits, -jnp.inf))
    return among & _largest_until(logits, shares, jnp.where((top_p > 0) & (top_p < 1), top_p, jnp.inf))


def _largest_until(
    logits: Float[Array, "B V"], weights: Float[Array, "B V"], wanted: Float[Array, " B"]
) -> Bool[Array, "B V"]:
    """Returns True for the fewest largest logits whose weights add up to `wanted`, ties included; else for all.

    The smallest logit to keep is found bit by bit, from the highest bit: 32 sums are faster than sorting a vocabulary.
    """
    bits = lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits < sign, bits | sign, ~bits)  # as unsigned integers, these sort like the logits

    def add_bit(bit_index: Int[Array, ""], bar: Integer[Array, " B"]) -> Integer[Array, " B"]:
        higher = bar | (sign >> bit_index.astype(jnp.uint32))
        enough = jnp.sum(weights * (order >= higher[:, None]), axis=1) >= wanted
        return jnp.where(enough, higher, bar)

    lowest = jnp.zeros(logits.shape[0], jnp.uint32)
    bar = lax.cond(jnp.any(wanted < jnp.inf), lambda: lax.fori_loop(0, 32, add_bit, lowest), lambda: lowest)
    return order >= bar[:, None]


def _begin(decode: Callable[..., Any], batch: int, max_length: int) -> tuple[Step, Cache]:
    """Returns `(step, cache)`: a function that decodes one token, and an empty cache.

    `step` maps each row's last token and a cache to the log-probabilities of the next token and the new cache.
    """

    def extend(tokens: Int[Array, "B Q"], cache: Cache) -> tuple[Float[Array, "B Q V"], Cache]:
        return decode(tokens, cache, decode=True, max_decode_length=max_length, mutable=["cache"])

    def step(token: Int[Array, " B"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        logits, cache = extend(token[:, None], cache)
        return jax.nn.log_softmax(logits[:, 0]), cache

    all_tokens = jnp.zeros((batch, max_length), jnp.int32)
    return step, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: extend(all_tokens, {})[1]))


def _one_by_one(
    config: T5Config, step: Step, cache: Cache, shape: tuple[int, int], choose: Callable[[Array, Array], Array]
) -> tuple[Int[Array, "B U"], Float[Array, " B"]]:
    """Generates the tokens, of `shape` [B, U], that `choose(log_probs [B, V], index)` picks.

    Returns:
      The tokens, and each row's summed log-probability of them.
    """

    def extend(carry):
        index, token, tokens, score, ended, cache = carry
        log_probs, cache = step(token, cache)
        token = jnp.where(ended, config.pad_token_id, choose(log_probs, index).astype(jnp.int32))
        score = score + jnp.where(ended, 0.0, jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0])
        tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, None], index, axis=1)
        return index + 1, token, tokens, score, ended | (token == config.eos_token_id), cache

    def unfinished(carry):
        index, _, _, _, ended, _ = carry
        return (index < shape[1]) & ~jnp.all(ended)

    start = jnp.full(shape[0], config.decoder_start_token_id, jnp.int32)
    empty = jnp.full(shape, config.pad_token_id, jnp.int32)
    first = (jnp.int32(0), start, empty, jnp.zeros(shape[0]), jnp.zeros(shape[0], bool), cache)
    _, _, tokens, score, _, _ = lax.while_loop(unfinished, extend, first)
    return tokens, score


def _pick(x: Array, beams: Int[Array, "B N"]) -> Array:
    """Returns `x[b, beams[b, n]]` for each row b, [B, N, ...], where `x` is [B, M, ...]."""
    return jnp.take_along_axis(x, beams.reshape(*beams.shape, *[1] * (x.ndim - 2)), axis=1)
