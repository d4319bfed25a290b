"""Beam search against T5X's, and against its definition in plain Python over the scores of every beginning there is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.decoders import compiled, continuations, unpadded, with_likelier_end
from fixtures.models import parameters, random_model, random_tokens, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding import decoder_calls

from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.decoding import beam_search
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.tokenizers.vocabulary import EOS

CONFIG = T5Config(5, 8, 2, 1, 2, 12, head_dim=3)
LENGTH = 4


def score(log_likelihood, length, length_penalty):
    return log_likelihood / ((5 + length) / 6) ** length_penalty


def search(scores, beams, length_penalty):
    """Answers with their scores, best first, and after how many steps no beginning can still pass the worst of them."""
    live, ended, steps = [(0.0, ())], [], 0
    while steps < scores.length:
        if len(ended) == beams and ended[-1][0] > score(live[0][0], scores.length + 1, length_penalty):
            break
        steps += 1
        longer = [
            (before + log_prob, (*tokens, token))
            for before, tokens in live
            for token, log_prob in enumerate(scores.table[tokens])
        ]
        longer = sorted(longer, reverse=True)[: 2 * beams]
        new = [(score(total, steps, length_penalty), tokens) for total, tokens in longer if tokens[-1] == EOS]
        ended = sorted(ended + new, reverse=True)[:beams]
        live = [beam for beam in longer if beam[1][-1] != EOS][:beams]
    return ended or live, steps


def check_answers(tokens, scores, expected, continued, length_penalty):
    """Equal scores, rank by rank, and under each the answer that has it: two that rounding cannot tell apart may swap
    places. Off by rounding alone: the cached pass sums in another order, on logits of up to about 10."""
    count = len(expected)
    np.testing.assert_allclose(scores[:count], [found for found, _ in expected], rtol=1e-5, atol=1e-5)
    answers = [unpadded(row) for row in tokens[:count]]
    assert len(set(answers)) == count
    for answer, found, row in zip(answers, scores, tokens, strict=False):
        power = length_penalty if answer[-1] == EOS else 0.0
        own = score(continued.log_likelihood(answer), len(answer), power)
        np.testing.assert_allclose(found, own, rtol=1e-5, atol=1e-5)
        assert not np.any(row[len(answer) :])
    assert np.all(np.isneginf(scores[count:]))
    assert not np.any(tokens[count:])


def test_tokens_and_scores_are_t5x(t5x, tiny_config):
    model, params = Transformer(tiny_config), with_likelier_end(parameters(t5x))
    tokens, scores = compiled(beam_search, model, 10)(params, jnp.asarray(t5x["short:encoder_input_tokens"]))
    np.testing.assert_array_equal(tokens, t5x["short:beam4:tokens"][:, ::-1])
    np.testing.assert_allclose(scores, t5x["short:beam4:scores"][:, ::-1], rtol=1e-6)


@pytest.mark.parametrize(
    ("beams", "length_penalty", "prompt_length"), [(1, 0.6, 0), (2, 0.0, 3), (3, 0.6, 3), (6, 1.5, 0)]
)
def test_beams_are_those_of_the_definition(beams, length_penalty, prompt_length):
    model, params = random_model(CONFIG, prompt_length)
    run = compiled(beam_search, model, LENGTH, beams=beams, length_penalty=length_penalty)

    @settings(max_examples=15)
    @given(
        lengths=st.tuples(*[st.integers(1, 5)] * 3),
        end=st.floats(-3, 3),
        seed=st.integers(0, 2**32 - 1),
    )
    def check(lengths, end, seed):
        rng = np.random.default_rng(seed)
        inputs = random_tokens(rng, lengths, 5, CONFIG.vocab_size)
        scaled = {path: value * rng.uniform(0.5, 1.5) for path, value in params.items()}
        scaled = with_likelier_end(scaled, end)
        tokens, scores = map(np.asarray, run(scaled, inputs))
        for row, continued in enumerate(continuations(model, scaled, inputs, LENGTH)):
            expected, _ = search(continued, beams, length_penalty)
            check_answers(tokens[row], scores[row], expected, continued, length_penalty)

    check()


def test_with_beams_for_every_beginning_the_answers_are_the_best_there_are():
    """1 + 4 + 16 answers of up to three tokens, all found, the best first; the other places are empty."""
    model, params = random_model(CONFIG)
    inputs = random_tokens(np.random.default_rng(1), (5, 2, 4), 5, CONFIG.vocab_size)
    tokens, scores = map(np.asarray, compiled(beam_search, model, 3, beams=50)(params, inputs))
    for row, continued in enumerate(continuations(model, params, inputs, 3)):
        found = [(score(continued.log_likelihood(answer), len(answer), 0.6), answer) for answer in continued.answers()]
        assert len(found) == 21
        check_answers(tokens[row], scores[row], sorted(found, reverse=True), continued, 0.6)


def test_a_row_without_an_end_gives_its_beginnings():
    """And their log-probabilities, which no length divides; rows beside it have ends."""
    model, params = random_model(CONFIG)
    params = with_likelier_end(params, -1.0)
    inputs = random_tokens(np.random.default_rng(0), [5, 2, 4, 1] * 4, 5, CONFIG.vocab_size)
    tokens, scores = map(np.asarray, compiled(beam_search, model, 1, beams=1)(params, inputs))
    ended = set()
    for row, continued in enumerate(continuations(model, params, inputs, 1)):
        expected, _ = search(continued, 1, 0.6)
        check_answers(tokens[row], scores[row], expected, continued, 0.6)
        ended.add(expected[0][1][-1] == EOS)
    assert ended == {True, False}


@pytest.mark.parametrize(("beams", "end", "expected"), [(1, 1.0, LENGTH), (2, -1.0, 3), (2, -4.0, 2)])
def test_search_stops_when_nothing_better_can_come(beams, end, expected):
    """Each row stops where T5X's bound says, and the batch with its last row."""
    model, params = random_model(CONFIG)
    params = with_likelier_end(params, end)
    inputs = random_tokens(np.random.default_rng(0), (5, 2), 5, CONFIG.vocab_size)
    steps = [search(row, beams, 0.6)[1] for row in continuations(model, params, inputs, LENGTH)]
    assert max(steps) == expected
    decoder = functools.partial(beam_search, beams=beams)
    assert decoder_calls(decoder, model, params, inputs, LENGTH) == expected


def test_a_beam_costs_no_copy_of_the_encoder_output():
    """Compiled, the memory that a beam adds is less than one more set of the keys and values it reads."""
    config = T5Config(32, 16, 2, 1, 1, 16, head_dim=8)
    model, params = random_model(config)
    inputs = jnp.ones((2, 400), jnp.int32)

    def temporary(beams):
        run = jax.jit(lambda params, inputs: beam_search(model, tree(params), inputs, 4, beams=beams))
        return run.lower(params, inputs).compile().memory_analysis().temp_size_in_bytes

    keys_and_values = 2 * config.num_decoder_layers * 2 * 400 * 16 * 4
    assert temporary(9) - temporary(1) < 8 * keys_and_values / 4
