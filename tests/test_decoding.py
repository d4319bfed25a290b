"""Greedy decoding against T5X's and against the plain definition, and what is true of all decoders: a row with its own
prompt is what it is alone, and no work is done twice."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.decoders import DECODERS, compiled, compiled_forward, with_likelier_end
from fixtures.models import apart, parameters, prompted, random_model, random_tokens, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning_jax.methods.prompt_tuning import PROMPT
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.decoding import greedy
from prompt_tuning_jax.t5.log_likelihood import choice_scores
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.tokenizers.vocabulary import EOS

CONFIGS = [
    T5Config(11, 8, 2, 1, 2, 12, head_dim=3),
    T5Config(7, 6, 1, 2, 1, 9, head_dim=4, logits_via_embedding=True),
    T5Config(19, 10, 3, 1, 1, 7, head_dim=2, relative_attention_num_buckets=4, relative_attention_max_distance=6),
]


def test_greedy_tokens_and_scores_are_t5x(t5x, tiny_config):
    """T5X's greedy search keeps no scores, so those of the same sequences in its beam search, worst to best, stand in:
    its scores are divided by ((5 + length) / 6) ** 0.6."""
    model, params = Transformer(tiny_config), with_likelier_end(parameters(t5x))
    tokens, scores = compiled(greedy, model, 10)(params, jnp.asarray(t5x["short:encoder_input_tokens"]))
    np.testing.assert_array_equal(tokens, t5x["short:greedy:tokens"][:, -1])
    compared = 0
    for row, score in enumerate(scores):
        for beam, expected in zip(t5x["short:beam4:tokens"][row], t5x["short:beam4:scores"][row], strict=True):
            if np.array_equal(beam, tokens[row]):
                length = np.sum(beam > 0)
                np.testing.assert_allclose(score, expected * ((5 + length) / 6) ** 0.6, rtol=1e-6)
                compared += 1
    assert compared == 3  # the fourth row's greedy answer is none of its four beams


def test_greedy_tokens_are_the_official_ones(official, tiny_config):
    params = parameters(official) | {"decoder/logits_dense/kernel": jnp.asarray(official["decode:logits_dense"])}
    np.testing.assert_array_equal(
        params["decoder/logits_dense/kernel"],
        with_likelier_end(parameters(official))["decoder/logits_dense/kernel"],
    )
    inputs = jnp.asarray(official["encoder_input_tokens"])
    tokens, _ = compiled(greedy, Transformer(tiny_config), 10)(params, inputs)
    np.testing.assert_array_equal(tokens, official["greedy:tokens"][:, -1])
    hosted, _ = greedy(prompted(tiny_config), tree(params), inputs, 10)
    np.testing.assert_array_equal(hosted, official["greedy:tokens"][:, -1])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("prompt_length", [0, 3])
def test_greedy_is_the_most_likely_next_token_again_and_again(config, prompt_length):
    """Against a full forward pass over all that came before, for each token: the cache changes nothing but the time."""
    model, params = random_model(config, prompt_length)
    # Off by rounding alone: the cached pass sums in another order, on logits of up to about 10.
    close = 1e-5

    @settings(max_examples=10)
    @given(lengths=st.tuples(*[st.integers(1, 5)] * 4), own=st.booleans(), seed=st.integers(0, 2**32 - 1))
    def check(lengths, own, seed):
        rng = np.random.default_rng(seed)
        inputs = random_tokens(rng, lengths, 5, config.vocab_size)
        prompt = None
        if prompt_length and not own:
            prompt = jnp.asarray(rng.normal(size=(4, prompt_length, config.emb_dim)), jnp.float32)
        scaled = {path: value * rng.uniform(0.5, 1.5) for path, value in params.items()}
        tokens, scores = compiled(greedy, model, 6)(scaled, inputs, prompt)
        # Position u of the logits depends on the tokens before u alone, so one pass gives every step's logits.
        log_probs = np.asarray(compiled_forward(model)(scaled, inputs, tokens, prompt))
        tokens, total = np.asarray(tokens), np.zeros(4)
        for row, taken in enumerate(tokens):
            ended = False
            for place, token in enumerate(taken):
                if ended:
                    assert token == 0
                    continue
                here = log_probs[row, place]
                assert here[token] >= here.max() - close
                total[row] += here[token]
                ended = token == EOS
        np.testing.assert_allclose(scores, total, rtol=1e-5, atol=1e-5)

    check()


@pytest.mark.parametrize("name", ["greedy", "sample"])
def test_score_is_the_log_likelihood_of_the_answer(t5x, tiny_config, name):
    model, params = Transformer(tiny_config), with_likelier_end(parameters(t5x))
    inputs = jnp.asarray(t5x["short:encoder_input_tokens"])
    tokens, scores = compiled(DECODERS[name], model, 10)(params, inputs)
    log_probs = np.asarray(compiled_forward(model)(params, inputs, tokens))
    picked = np.take_along_axis(log_probs, np.asarray(tokens)[..., None], axis=2)[..., 0]
    before = np.cumsum(np.asarray(tokens) == EOS, axis=1) - (np.asarray(tokens) == EOS)
    np.testing.assert_allclose(scores, np.sum(picked, axis=1, where=before == 0), rtol=2e-6)


@pytest.mark.parametrize("name", DECODERS)
def test_rows_with_prompts_of_their_own_are_what_each_is_alone(name):
    """In one batch, the shorter prompts padded in front and masked; one row has none at all."""
    config = T5Config(13, 10, 2, 2, 2, 9, head_dim=4)
    model, params = random_model(config, 4)
    params = with_likelier_end(params)
    lengths, rng = (4, 2, 2, 0), np.random.default_rng(0)
    mask = np.arange(4) >= 4 - np.array(lengths)[:, None]
    run, answers = compiled(DECODERS[name], model, 6), set()
    bare = {path: value for path, value in params.items() if path != PROMPT}
    for _ in range(8):
        inputs = random_tokens(rng, (5, 3, 5, 4), 5, config.vocab_size)
        # What stands in the padding is nobody's business.
        prompt = jnp.asarray(rng.normal(size=(4, 4, config.emb_dim)), jnp.float32)
        tokens, scores = run(params, inputs, prompt, jnp.asarray(mask))
        for row, length in enumerate(lengths):
            own = prompt[row, 4 - length :] if length else None
            expected, expected_scores = run(bare, inputs[row : row + 1], own)
            np.testing.assert_array_equal(tokens[row], expected[0])
            # Sums over up to nine more positions, in another order.
            np.testing.assert_allclose(scores[row], expected_scores[0], rtol=1e-5, atol=1e-5)
            answers.add(np.asarray(tokens[row]).tobytes())
    assert len(answers) > 8


def decoder_calls(decoder, model, params, inputs, max_length):
    """How often the decoder runs to decode a batch, counted while it runs."""
    calls = []

    def count(following, args, kwargs, context):
        if context.module.name == "decoder" and context.method_name == "__call__":
            jax.debug.callback(lambda: calls.append(1))
        return following(*args, **kwargs)

    with nn.intercept_methods(count):
        jax.block_until_ready(jax.jit(lambda params: decoder(model, tree(params), inputs, max_length))(params))
    jax.effects_barrier()
    return len(calls)


def test_decoding_stops_when_every_row_has_ended(t5x, tiny_config):
    """A label of two tokens costs two steps, whatever the length that is allowed."""
    model, params = Transformer(tiny_config), with_likelier_end(parameters(t5x))
    inputs = jnp.asarray(t5x["short:encoder_input_tokens"])
    assert np.sum(t5x["short:greedy:tokens"] > 0, axis=-1).max() == 4
    assert decoder_calls(greedy, model, params, inputs, 10) == 4

    # All logits 0 is a tie that the first id wins: padding, again and again, and no row ever ends.
    never = params | {path: value * 0 for path, value in params.items() if "logits_dense" in path}
    assert decoder_calls(greedy, model, never, inputs, 10) == 10


def inner(eqn):
    """The programs inside an instruction."""
    for value in eqn.params.values():
        for part in value if isinstance(value, (tuple, list)) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def products(jaxpr):
    """The shapes of both operands of every matmul in a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(var.aval.shape for var in eqn.invars)
        for part in inner(eqn):
            yield from products(part)


def loops(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("while", "scan"):
            yield from inner(eqn)
        else:
            for part in inner(eqn):
                yield from loops(part)


def score_choices(model, params, inputs, max_length, **prompts):
    return choice_scores(model, params, inputs, jnp.ones((1, 5, max_length), jnp.int32), **prompts)


@pytest.mark.parametrize("decoder", [*DECODERS.values(), score_choices])
def test_cross_attention_keys_are_computed_once(decoder):
    """No matmul inside the loop reads the encoder's output: its keys and values are there already, and there
    once a row, not once a beam."""
    config = T5Config(11, 10, 3, 2, 2, 9, head_dim=4)
    batch, inputs, prompt, joined = 2, 13, 6, 12
    model, params = random_model(config, prompt)
    encoded = (batch, prompt + inputs, config.emb_dim)

    def run(params, inputs):
        params, prompt = apart(params)
        return decoder(model, params, inputs, 7, prompt=prompt)

    program = jax.make_jaxpr(run)(params, jnp.ones((batch, inputs), jnp.int32)).jaxpr
    into_heads = (encoded, (config.emb_dim, joined))
    # Query, key and value in each encoder layer; key and value for each decoder layer.
    assert list(products(program)).count(into_heads) == 3 * 2 + 2 * 2

    inside = [shapes for loop in loops(program) for shapes in products(loop)]
    reading = [(a, b) for shapes in inside for a, b in [shapes, shapes[::-1]] if b[-2:] == (prompt + inputs, 4)]
    keys, each = (batch, 3, prompt + inputs, 4), {greedy: 1, score_choices: 7}
    queries = each.get(decoder, 4 if decoder is DECODERS["beams"] else 1)
    assert [b for _, b in reading] == [keys] * 4
    sizes = [np.prod(a) for a, _ in reading]
    asking, weighing = batch * 3 * queries * 4, batch * 3 * queries * (prompt + inputs)
    assert sorted(sizes) == [asking] * 2 + [weighing] * 2
    # And nothing else in the loop is as long as the encoder's output.
    assert sum(any(prompt + inputs in shape for shape in shapes) for shapes in inside) == 4
