"""Sampling: from the right tokens, with the right frequencies, and each row by its own seed alone."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.decoders import compiled, continuations, unpadded
from fixtures.models import apart, random_model, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import chisquare

from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.decoding import greedy, likeliest, sample
from prompt_tuning_jax.tokenizers.vocabulary import EOS

CONFIG = T5Config(5, 8, 2, 1, 2, 12, head_dim=3)
LENGTH = 3
EVERYTHING = (1.0, 0, 1.0)
fast_likeliest = jax.jit(likeliest)


@functools.cache
def compiled_sample(model, max_length):
    def run(params, inputs, *options):
        params, prompt = apart(params)
        return sample(model, params, inputs, max_length, *options, prompt=prompt)

    return jax.jit(run)


def draw(model, params, inputs, seeds, temperature, top_k, top_p, max_length=LENGTH):
    def by_row(value, dtype):
        return jnp.asarray(np.broadcast_to(value, len(inputs)), dtype)

    tokens, scores = compiled_sample(model, max_length)(
        params,
        jnp.asarray(inputs),
        jnp.asarray(seeds, jnp.uint32),
        by_row(temperature, jnp.float32),
        by_row(top_k, jnp.int32),
        by_row(top_p, jnp.float32),
    )
    return np.asarray(tokens), np.asarray(scores)


def kept(logits, top_k, top_p):
    """Which tokens may be drawn, by definition, of one row; and how close the sums came to `top_p`."""
    logits = np.asarray(logits, np.float64)
    among = np.ones(len(logits), bool)
    if top_k > 0:
        among &= logits >= np.sort(logits)[-min(top_k, len(logits))]
    if not 0 < top_p < 1:
        return among, np.inf
    shares = np.where(among, np.exp(logits - logits.max()), 0.0)
    shares /= shares.sum()
    falling = np.argsort(-shares, kind="stable")
    sums = np.cumsum(shares[falling])
    last = falling[np.argmax(sums >= top_p)] if sums[-1] >= top_p else falling[-1]
    return among & (logits >= logits[last]), np.abs(sums - top_p).min()


LOGITS = st.integers(-40, 8).map(lambda x: x / 4) | st.floats(-1e6, 1e3, width=32, allow_subnormal=False)


@given(
    logits=arrays(np.float32, (3, 7), elements=LOGITS),
    top_k=st.tuples(*[st.integers(0, 9)] * 3),
    top_p=st.tuples(*[st.floats(0, 1, width=32, allow_subnormal=False)] * 3),
)
def test_tokens_kept_are_those_of_the_definition(logits, top_k, top_p):
    """Equal logits and ones far apart; a sum that rounding may put on either side of `top_p` is left out."""
    found = fast_likeliest(logits, jnp.asarray(top_k, jnp.int32), jnp.asarray(top_p, jnp.float32))
    for row in range(3):
        expected, margin = kept(logits[row], top_k[row], top_p[row])
        if margin > 1e-6:
            np.testing.assert_array_equal(found[row], expected)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [EVERYTHING, (1.0, 0, 0.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 2, 1.0), (1.0, 0, 0.7), (1.5, 3, 0.8)],
)
def test_answers_are_as_frequent_as_they_are_likely(temperature, top_k, top_p):
    """Answers of three tokens, thousands of seeds, against the probability of each by full passes over all of them."""
    model, params = random_model(CONFIG)
    draws, inputs = 4000, np.array([[3, 2, 4]], np.int32)
    (continued,) = continuations(model, params, inputs, LENGTH)

    def chances(start):
        heated = continued.table[start] / temperature
        among, margin = kept(heated, top_k, top_p)
        assert margin > 1e-4
        weights = np.where(among, np.exp(heated - heated.max()), 0.0)
        return weights / weights.sum()

    expected = {(): 1.0}
    for _ in range(LENGTH):
        expected = {
            longer: chance * share
            for start, chance in expected.items()
            for longer, share in (
                [(start, 1.0)]
                if start[-1:] == (EOS,)
                else [((*start, token), share) for token, share in enumerate(chances(start))]
            )
        }
    tokens, _ = draw(model, params, np.repeat(inputs, draws, axis=0), np.arange(draws), temperature, top_k, top_p)
    counted = dict.fromkeys(expected, 0)
    for row in tokens:
        counted[unpadded(row)] += 1
    assert all(expected[answer] > 0 for answer, count in counted.items() if count)
    # Too rare for the chi-square distribution: counted as one.
    rare = [answer for answer, chance in expected.items() if chance * draws < 5]
    groups = [[answer] for answer in expected if answer not in rare] + ([rare] if rare else [])
    observed = np.array([sum(counted[answer] for answer in group) for group in groups], float)
    chance = np.array([sum(expected[answer] for answer in group) for group in groups])
    present = chance > 0
    assert present.sum() > 4
    assert chisquare(observed[present], chance[present] / chance.sum() * draws).pvalue > 1e-3


def test_a_row_depends_on_its_own_seed_and_settings_alone():
    """In another order, in a smaller batch, among other rows, and once more: the same answer."""
    model, params = random_model(CONFIG, 2)
    rng = np.random.default_rng(0)
    inputs = np.asarray(random_tokens(rng, rng.integers(1, 5, 40), 4, CONFIG.vocab_size))
    settings = list(itertools.islice(itertools.cycle(itertools.product((0.0, 0.7, 3.0), (0, 3), (0.6, 1.0))), 40))
    temperature, top_k, top_p = map(np.array, zip(*settings, strict=True))
    seeds = rng.integers(0, 2**32, 40, np.uint32)
    tokens, scores = draw(model, params, inputs, seeds, temperature, top_k, top_p, 8)
    for order in (np.arange(40), rng.permutation(40), np.array([17]), np.array([4, 3, 3])):
        again, again_scores = draw(
            model, params, inputs[order], seeds[order], temperature[order], top_k[order], top_p[order], 8
        )
        np.testing.assert_array_equal(again, tokens[order])
        np.testing.assert_allclose(again_scores, scores[order], rtol=1e-5)
    other, _ = draw(model, params, inputs, seeds + 1, temperature, top_k, top_p, 8)
    changed = np.any(other != tokens, axis=1)
    assert not np.any(changed[temperature == 0])
    assert np.mean(changed[temperature > 0]) > 0.7


def test_temperature_zero_is_greedy():
    """Whatever the other settings, beside rows that are drawn; and so is the least of temperatures."""
    model, params = random_model(CONFIG)
    inputs = random_tokens(np.random.default_rng(0), (3, 2, 3, 1), 3, CONFIG.vocab_size)
    expected, expected_scores = compiled(greedy, model, 6)(params, inputs)
    cold = [0, 1, 3]
    tokens, scores = draw(model, params, inputs, np.arange(4), [0.0, 1e-30, 1.0, 0.0], [0, 2, 0, 3], [1, 1, 1, 0.1], 6)
    np.testing.assert_array_equal(tokens[cold], expected[np.array(cold)])
    np.testing.assert_allclose(scores[cold], expected_scores[np.array(cold)], rtol=1e-6)


def test_no_setting_compiles_anew():
    model, params = random_model(CONFIG)
    inputs = np.ones((2, 3), np.int32)
    for number, settings in enumerate(itertools.product((0.0, 0.7), (0, 3), (0.6, 1.0))):
        draw(model, params, inputs, [number, 7], *settings, 5)
    assert compiled_sample(model, 5)._cache_size() == 1
