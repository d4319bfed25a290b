"""The likelihood of given answers, against one forward pass an answer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.decoders import compiled_forward
from fixtures.models import apart, parameters, random_model, random_tokens, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning_jax.methods.prompt_tuning import PROMPT
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.log_likelihood import choice_scores
from prompt_tuning_jax.t5.network import Transformer

CONFIG = T5Config(11, 8, 2, 1, 2, 12, head_dim=3)


@functools.cache
def compiled_scores(model):
    def run(params, inputs, choices, prompt=None, prompt_mask=None, count=None):
        """With the prompt among `params` if no other is given."""
        params, own = apart(params)
        prompts = {"prompt": own if prompt is None else prompt, "prompt_mask": prompt_mask}
        return choice_scores(model, params, inputs, choices, count, **prompts)

    return jax.jit(run)


def log_likelihoods(model, params, inputs, choices, prompt=None):
    """By definition, [B, C]: a pass over inputs and choice for every pair."""
    columns = []
    for choice in np.broadcast_to(choices, (len(inputs), *choices.shape[1:])).swapaxes(0, 1):
        log_probs = np.asarray(compiled_forward(model)(params, inputs, jnp.asarray(choice), prompt), np.float64)
        picked = np.take_along_axis(log_probs, choice[..., None], axis=2)[..., 0]
        columns.append(np.sum(picked, axis=1, where=choice > 0))
    return np.stack(columns, axis=1)


def test_scores_are_t5x(t5x, tiny_config):
    """T5X's log-likelihood of each row's own target, here the second of two choices."""
    targets = t5x["short:decoder_target_tokens"]
    choices = jnp.asarray(np.stack([np.roll(targets, 1, axis=0), targets], axis=1))
    inputs = jnp.asarray(t5x["short:encoder_input_tokens"])
    scores = compiled_scores(Transformer(tiny_config))(parameters(t5x), inputs, choices)
    np.testing.assert_allclose(scores[:, 1], t5x["short:scores_sequence_loglik"], rtol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("prompt_length", [0, 3])
def test_scores_are_those_of_a_pass_over_each_choice(shared, prompt_length):
    model, params = random_model(CONFIG, prompt_length)

    @settings(max_examples=10)
    @given(count=st.integers(0, 4) | st.none(), own=st.booleans(), seed=st.integers(0, 2**32 - 1))
    def check(count, own, seed):
        rng = np.random.default_rng(seed)
        inputs = random_tokens(rng, rng.integers(1, 6, 3), 5, CONFIG.vocab_size)
        rows = 1 if shared else 3
        choices = random_tokens(rng, rng.integers(1, 5, rows * 4), 4, CONFIG.vocab_size).reshape(rows, 4, 4)
        prompt = None
        if prompt_length and not own:
            prompt = jnp.asarray(rng.normal(size=(3, prompt_length, CONFIG.emb_dim)), jnp.float32)
        given_count = None if count is None else jnp.int32(count)
        scores = compiled_scores(model)(params, inputs, choices, prompt, None, given_count)
        expected = log_likelihoods(model, params, inputs, np.asarray(choices), prompt)
        scored = 4 if count is None else count
        np.testing.assert_allclose(scores[:, :scored], expected[:, :scored], rtol=1e-5, atol=1e-5)
        assert np.all(np.isneginf(scores[:, scored:]))

    check()


def test_rows_with_prompts_of_their_own_are_what_each_is_alone():
    model, params = random_model(CONFIG, 4)
    rng = np.random.default_rng(0)
    inputs, lengths = random_tokens(rng, (5, 3, 4), 5, CONFIG.vocab_size), (4, 1, 0)
    choices = random_tokens(rng, (2, 4, 1), 4, CONFIG.vocab_size)[None]
    prompt = jnp.asarray(rng.normal(size=(3, 4, CONFIG.emb_dim)), jnp.float32)
    mask = jnp.asarray(np.arange(4) >= 4 - np.array(lengths)[:, None])
    scores = compiled_scores(model)(params, inputs, choices, prompt, mask)
    for row, length in enumerate(lengths):
        alone = {path: value for path, value in params.items() if path != PROMPT}
        own = prompt[row, 4 - length :] if length else None
        expected = compiled_scores(model)(alone, inputs[row : row + 1], choices, own)
        np.testing.assert_allclose(scores[row], expected[0], rtol=1e-5, atol=1e-5)


def test_a_choice_without_tokens_is_none():
    """Rows of fewer choices than others are padded so, and no padding may win."""
    model, params = random_model(CONFIG)
    choices = jnp.asarray([[[3, 1], [0, 0]], [[4, 1], [5, 1]]], jnp.int32)
    scores = compiled_scores(model)(params, jnp.ones((2, 3), jnp.int32), choices)
    np.testing.assert_array_equal(np.isneginf(scores), [[False, True], [False, False]])


def test_no_count_compiles_anew_and_no_choice_takes_memory():
    """Memory beside arguments and results is that of one choice, whatever their number."""
    config = T5Config(4096, 8, 1, 1, 1, 8, head_dim=8)
    model, params = random_model(config)
    inputs = jnp.ones((2, 3), jnp.int32)
    run = jax.jit(
        lambda params, inputs, choices, count: choice_scores(model, tree(params), inputs, choices, count=count)
    )
    for count in (1, 2, 5):
        run(params, inputs, jnp.ones((1, 5, 4), jnp.int32), jnp.int32(count))
    assert run._cache_size() == 1

    def temporary(choices):
        lowered = run.lower(params, inputs, jnp.ones((1, choices, 4), jnp.int32), jnp.int32(1))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    one_choice = 2 * 4 * config.vocab_size * 4
    assert temporary(100) - temporary(1) < one_choice
