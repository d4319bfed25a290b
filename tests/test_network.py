"""Compares the network with T5X's and the official prompt-tuned model, and tests properties that hold for any size."""

import dataclasses
import functools
import math
import types

import flax.errors
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from fixtures.models import OFFICIAL_PROMPT, apart, parameters, prompted, random_model, random_tokens, shapes_of, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.sizes import SIZES
from prompt_tuning_jax.batches.loader import Batch
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.methods.model_tuning import ModelTuning
from prompt_tuning_jax.methods.prompt_tuning import PROMPT, PromptTuning
from prompt_tuning_jax.t5 import network
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.decoding import encode_once
from prompt_tuning_jax.t5.layers import (
    Dense,
    Kept,
    RelativePositionBias,
    RMSNorm,
    draw_kept,
    drop,
    relative_position_bucket,
)
from prompt_tuning_jax.t5.log_likelihood import token_log_probs
from prompt_tuning_jax.t5.network import EncoderLayer, Transformer, prepend_prompt
from prompt_tuning_jax.training.loss import cross_entropy
from prompt_tuning_jax.training.optimizer import adafactor
from prompt_tuning_jax.training.step import TrainState, batch_loss, make_train_step

SMALL = T5Config(
    vocab_size=23, emb_dim=12, num_heads=2, num_encoder_layers=2, num_decoder_layers=1, mlp_dim=16, head_dim=5
)
# Either the prompt is passed to the model, or it is a parameter of the model, as in T5X.
HOSTED = pytest.mark.parametrize("with_prompt", [Transformer, prompted], ids=["given", "hosted"])


def gradients(reference, prefix):
    found = {name.removeprefix(prefix): value for name, value in reference.items() if name.startswith(prefix)}
    return {PROMPT if path == OFFICIAL_PROMPT else path: value for path, value in found.items()}


def logits_of(model, params, reference, prefix=""):
    inputs, decoder_inputs = reference[f"{prefix}encoder_input_tokens"], reference[f"{prefix}decoder_input_tokens"]
    return compiled(model)(params, jnp.asarray(inputs), jnp.asarray(decoder_inputs), None)


def with_its_prompt(model, params, prompt=None):
    """Returns `(variables, prompts)` for `apply`.

    If the prompt is a parameter of the model, it stays in `params`. Otherwise it is an argument: `prompt`, or else the
    one that is taken out of `params`.
    """
    own, found = (tree(params), None) if model.prompt_factory else apart(params)
    return {"params": own}, {"prompt": found if prompt is None else prompt}


def encode(model, params, inputs):
    @jax.jit
    def run(params, inputs):
        variables, prompts = with_its_prompt(model, params)
        return model.apply(variables, inputs, enable_dropout=False, **prompts, method="encode")

    return run(params, jnp.asarray(inputs))


def gradients_of(model, params, inputs, targets):
    def loss(params):
        own = {path: value for path, value in params.items() if path != PROMPT or model.prompt_factory}
        injection = Injection(prompt=None if PROMPT in own else params.get(PROMPT), parameters=own)
        return batch_loss(model, injection, {}, jnp.asarray(inputs), jnp.asarray(targets)).loss

    return jax.jit(jax.value_and_grad(loss))(params)


@functools.cache
def compiled(model):
    """Returns `(params, inputs, decoder_inputs, prompt or None) -> logits`, which is compiled once per shape."""

    @jax.jit
    def run(params, inputs, decoder_inputs, prompt):
        variables, prompts = with_its_prompt(model, params, prompt)
        return model.apply(variables, inputs, decoder_inputs, decoder_inputs, enable_dropout=False, **prompts)

    return run


def test_shapes_in_signatures_are_checked():
    """Without the check, a prompt of another width would fail deep inside the model, or be broadcast."""
    with pytest.raises(jaxtyping.TypeCheckError, match="prompt"):
        prepend_prompt(jnp.zeros((2, 3, 4)), jnp.zeros((5, 6)))


def test_the_initialiser_of_a_parameter_that_is_given_is_not_traced():
    """Flax would trace it for its shape."""

    def refuse(*_):
        raise AssertionError

    given = {"params": {"kernel": jnp.ones((3, 4))}}
    assert Dense(4, ("embed", "mlp"), kernel_init=refuse).apply(given, jnp.ones((2, 3))).tolist() == [[3] * 4] * 2
    with pytest.raises(flax.errors.ScopeParamShapeError, match=r"kernel.*\(3, 5\).*\(3, 4\)"):
        Dense(5, ("embed", "mlp")).apply(given, jnp.ones((2, 3)))
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match="kernel"):
        Dense(4, ("embed", "mlp")).apply({"params": {"bias": 0}}, jnp.ones((2, 3)))


def test_parameter_tree_is_t5x(t5x, tiny_config):
    assert shapes_of(Transformer(tiny_config)) == {path: value.shape for path, value in parameters(t5x).items()}


def test_parameter_tree_with_prompt_is_the_official_one(official, tiny_config):
    assert shapes_of(prompted(tiny_config)) == {path: value.shape for path, value in parameters(official).items()}


def test_encoder_output_is_t5x(t5x, tiny_config):
    inputs = t5x["short:encoder_input_tokens"]
    encoded = encode(Transformer(tiny_config), parameters(t5x), inputs)
    np.testing.assert_allclose(encoded[inputs > 0], t5x["short:encoded"][inputs > 0], rtol=0, atol=5e-6)


def test_logits_are_t5x(t5x, tiny_config):
    logits = logits_of(Transformer(tiny_config), parameters(t5x), t5x, "short:")
    real = t5x["short:decoder_target_tokens"] > 0
    np.testing.assert_allclose(logits[real], t5x["short:logits"][real], rtol=0, atol=5e-6)


def test_bfloat16_logits_are_t5x(t5x, tiny_config):
    """The difference is at most the sum of both errors, and our error is no larger than T5X's.

    bfloat16 has 8 bits, so logits near 3.4 have steps of 1/64, and T5X's logits differ from its float32 ones by up to
    0.046. Our network rounds in other steps, because T5X also computes the softmax in bfloat16.
    """
    config = T5Config(**{**vars(tiny_config), "dtype": "bfloat16"})
    logits = logits_of(Transformer(config), parameters(t5x), t5x, "short:")
    assert logits.dtype == jnp.float32
    real = t5x["short:decoder_target_tokens"] > 0
    ours, theirs, exact = logits[real], t5x["short:logits_bf16"][real], t5x["short:logits"][real]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.07)
    assert np.std(ours - exact) <= np.std(theirs - exact)


def test_loss_and_every_gradient_are_t5x(t5x, tiny_config):
    params = parameters(t5x)
    loss, ours = gradients_of(
        Transformer(tiny_config), params, t5x["short:encoder_input_tokens"], t5x["short:decoder_target_tokens"]
    )
    np.testing.assert_allclose(loss, t5x["short:loss_sum_zloss1e-4"], rtol=1e-6)
    theirs = gradients(t5x, "short:grad:")
    assert theirs.keys() == params.keys()
    for path, expected in theirs.items():
        np.testing.assert_allclose(ours[path], expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=path)


def test_sequence_log_likelihoods_are_t5x(t5x, tiny_config):
    logits = logits_of(Transformer(tiny_config), parameters(t5x), t5x, "short:")
    scores = token_log_probs(logits, jnp.asarray(t5x["short:decoder_target_tokens"]), 0).sum(axis=1)
    np.testing.assert_allclose(scores, t5x["short:scores_sequence_loglik"], rtol=1e-6)


@HOSTED
def test_prompted_model_is_the_official_one(official, tiny_config, with_prompt):
    model, params = with_prompt(tiny_config), parameters(official)
    inputs, targets = official["encoder_input_tokens"], official["decoder_target_tokens"]

    encoded = encode(model, params, inputs)
    seen = np.pad(inputs > 0, ((0, 0), (5, 0)), constant_values=True)
    np.testing.assert_allclose(encoded[seen], official["encoded"][seen], rtol=0, atol=5e-6)

    logits = logits_of(model, params, official)
    real = targets > 0
    np.testing.assert_allclose(logits[real], official["logits"][real], rtol=0, atol=5e-6)
    scores = token_log_probs(logits, jnp.asarray(targets), 0).sum(axis=1)
    np.testing.assert_allclose(scores, official["scores"], rtol=1e-6)

    loss, ours = gradients_of(model, params, inputs, targets)
    np.testing.assert_allclose(loss, official["loss_sum"], rtol=1e-6)
    for path, expected in gradients(official, "grad:").items():
        np.testing.assert_allclose(ours[path], expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=path)


@HOSTED
def test_ten_training_steps_are_the_official_ones(official, tiny_config, with_prompt):
    """Repeats ten steps of T5X's trainer, from optimiser step 0, with a learning rate of 0.3.

    Adafactor divides by the size of gradients, which may be tiny, so rounding errors grow to 1.3e-5 for values up to 3.
    """
    optimizer = adafactor(0.3)
    frozen = parameters(official)
    trainable = {PROMPT: frozen.pop(PROMPT)}
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), jnp.zeros(2, jnp.uint32))
    # In T5X the prompt is one of the model's parameters, and the one that is trained.
    method = PromptTuning(5) if with_prompt is Transformer else ModelTuning((PROMPT,))
    step = make_train_step(with_prompt(tiny_config), method, optimizer)
    inputs, targets = official["encoder_input_tokens"], official["decoder_target_tokens"]
    batch = Batch(inputs, targets, np.arange(len(inputs), dtype=np.int32))
    for loss, prompt in zip(official["train_start0:loss"], official["train_start0:prompt"], strict=True):
        state, metrics = step(state, frozen, batch)
        np.testing.assert_allclose(metrics.sums.loss, loss, rtol=1e-6)
        np.testing.assert_allclose(state.trainable[PROMPT], prompt, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("size", "model_parameters", "prompt_parameters"),
    [
        ("small", 76_961_152, 51_200),
        ("base", 247_577_856, 76_800),
        ("large", 783_150_080, 102_400),
        ("xl", 2_849_757_184, 204_800),
        ("xxl", 11_135_332_352, 409_600),
    ],
)
def test_official_sizes(size, model_parameters, prompt_parameters):
    """Compares the parameter counts with those of T5 1.1's checkpoints and of a prompt of 100, from shapes alone."""
    shapes = shapes_of(prompted(SIZES[size], 100))
    assert math.prod(shapes.pop(PROMPT)) == prompt_parameters
    assert sum(map(math.prod, shapes.values())) == model_parameters


@given(
    lengths=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
    prompt_length=st.sampled_from([0, 3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_padding_never_reaches_the_output(lengths, prompt_length, seed):
    """Two batches that differ only under the padding mask give the same logits, bit for bit."""
    model, params = random_model(SMALL, prompt_length)
    rng = np.random.default_rng(seed)
    inputs = random_tokens(rng, lengths, 6, SMALL.vocab_size)
    decoder_inputs = random_tokens(rng, (4, 4, 4), 4, SMALL.vocab_size)
    # The masked values are the embedding of the padding token, and then the encoder's output for it.
    table = params["token_embedder/embedding"]
    other = params | {"token_embedder/embedding": table.at[0].set(rng.normal(0, 100, table.shape[1]))}
    run = encode_and_decode(model)
    logits, encoded = run(params, params, inputs, decoder_inputs)
    other_logits, other_encoded = run(other, params, inputs, decoder_inputs)
    np.testing.assert_array_equal(logits, other_logits)
    if min(lengths) < 6:
        assert not np.array_equal(encoded, other_encoded)  # the masked values do differ


@functools.cache
def encode_and_decode(model):
    @jax.jit
    def run(encoder_params, decoder_params, inputs, decoder_inputs):
        variables, prompts = with_its_prompt(model, encoder_params)
        encoded = model.apply(variables, inputs, enable_dropout=False, **prompts, method="encode")
        logits = model.apply(
            with_its_prompt(model, decoder_params)[0],
            encoded,
            inputs,
            decoder_inputs,
            decoder_inputs,
            enable_dropout=False,
            method="decode",
        )
        return logits, encoded

    return run


@given(
    lengths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    more=st.sampled_from([1, 4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_more_padding_changes_nothing(lengths, more, seed):
    """The same rows in a longer bucket give equal results up to rounding: sums have more zeros and another order."""
    model, params = random_model(SMALL, 3)
    rng = np.random.default_rng(seed)
    inputs = random_tokens(rng, lengths, 5, SMALL.vocab_size)
    decoder_inputs = random_tokens(rng, (4, 4), 4, SMALL.vocab_size)
    run = compiled(model)
    np.testing.assert_allclose(
        run(params, inputs, decoder_inputs, None),
        run(params, jnp.pad(inputs, ((0, 0), (0, more))), decoder_inputs, None),
        rtol=1e-5,
        atol=1e-5,
    )


@given(
    lengths=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    prompt_length=st.sampled_from([1, 4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_prompt_of_real_tokens_is_those_tokens(lengths, prompt_length, seed):
    """A prompt equal to the embeddings of P tokens has the same effect as these tokens in front of the input."""
    model, params = random_model(SMALL)
    rng = np.random.default_rng(seed)
    inputs = random_tokens(rng, lengths, 5, SMALL.vocab_size)
    decoder_inputs = random_tokens(rng, (4, 4), 4, SMALL.vocab_size)
    words = random_tokens(rng, [prompt_length], prompt_length, SMALL.vocab_size)
    prompt = params["token_embedder/embedding"][words[0]]
    told = jnp.concatenate([jnp.broadcast_to(words, (2, prompt_length)), inputs], axis=1)
    np.testing.assert_allclose(
        compiled(model)(params | {PROMPT: prompt}, inputs, decoder_inputs, None),
        compiled(model)(params, told, decoder_inputs, None),
        rtol=1e-6,
        atol=1e-6,
    )


@given(prompt_length=st.sampled_from([1, 4]), seed=st.integers(0, 2**32 - 1))
def test_a_prompt_a_row_is_that_rows_prompt(prompt_length, seed):
    """In a batch that mixes tasks, each row has the same result as in a batch of its own task."""
    model, params = random_model(SMALL, 4)
    rng = np.random.default_rng(seed)
    inputs = random_tokens(rng, rng.integers(1, 6, 3), 5, SMALL.vocab_size)
    decoder_inputs = random_tokens(rng, (4, 4, 4), 4, SMALL.vocab_size)
    prompts = jnp.asarray(rng.normal(size=(3, prompt_length, SMALL.emb_dim)), jnp.float32)
    run = compiled(model)
    mixed = run(params, inputs, decoder_inputs, prompts)
    for row in range(3):
        alone = run(params, inputs, decoder_inputs, prompts[row])
        np.testing.assert_allclose(mixed[row], alone[row], rtol=1e-6, atol=1e-6)
    assert not np.allclose(mixed[1], run(params, inputs, decoder_inputs, prompts[0])[1], atol=1e-3)


def test_packed_examples_are_as_alone():
    """Two examples in one row, separated by segment ids as in T5X's pre-training, have the results of single rows."""
    model, params = random_model(SMALL)
    rng = np.random.default_rng(0)
    first, second = random_tokens(rng, [4], 4, 23), random_tokens(rng, [3], 3, 23)
    first_targets, second_targets = random_tokens(rng, [2], 2, 23), random_tokens(rng, [3], 3, 23)
    packed = jax.jit(functools.partial(model.apply, enable_dropout=False))(
        {"params": tree(params)},
        jnp.concatenate([first, second, jnp.zeros((1, 2), jnp.int32)], axis=1),
        jnp.concatenate([first_targets, second_targets], axis=1),
        jnp.concatenate([first_targets, second_targets], axis=1),
        jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]]),
        jnp.array([[1, 1, 2, 2, 2]]),
    )
    for inputs, targets, place in ((first, first_targets, slice(0, 2)), (second, second_targets, slice(2, 5))):
        alone = compiled(model)(params, inputs, targets, None)
        np.testing.assert_allclose(packed[:, place], alone, rtol=1e-6, atol=2e-6)


def test_packed_examples_with_a_prompt_are_refused():
    model, params = random_model(SMALL, 3)
    tokens = jnp.ones((1, 4), jnp.int32)
    own, prompt = apart(params)
    layer_prompts = jnp.stack([prompt] * SMALL.num_encoder_layers)
    for found, variables, prompts in (
        (prompted(SMALL, 3), tree(params), {}),
        (model, own, {"prompt": prompt}),
        (model, own, {"layer_prompts": layer_prompts}),
    ):
        with pytest.raises(ValueError, match="pack=False"):
            found.apply({"params": variables}, *[tokens] * 5, enable_dropout=False, **prompts)


def test_a_prompt_that_is_given_is_as_one_of_the_models_own():
    """A prompt that is passed to a model without one is used and not ignored."""
    model, params = random_model(SMALL, 3)
    hosted, bare = prompted(SMALL, 3), {path: value for path, value in params.items() if path != PROMPT}
    rng = np.random.default_rng(0)
    tokens = random_tokens(rng, [5, 3], 5, 23), random_tokens(rng, [4, 4], 4, 23)
    other = jnp.asarray(rng.normal(size=(3, SMALL.emb_dim)), jnp.float32)
    for prompt in (None, other):
        found = compiled(model)(params, *tokens, prompt)
        np.testing.assert_array_equal(compiled(hosted)(params, *tokens, prompt), found)
        assert not np.allclose(found, compiled(model)(bare, *tokens, None), atol=1e-3)


def encode_layer_by_layer(config, params, inputs, prompt, layer_prompts, prompt_mask):
    """Returns the encoder's output [B, P+T, D], computed layer by layer from the formula.

    Let [e; x] be the output of layer l - 1, where e has the P positions of the prompt. Without a prompt, layer l reads
    [p_l; x]. With a prompt, layer l reads [e + p_l; x], and layer 0 reads [prompt + p_0; embedded inputs].
    """
    own = tree(params)
    embedded, length = own["token_embedder"]["embedding"][inputs], layer_prompts.shape[-2]
    shape = (len(inputs), length)
    seen = jnp.ones(shape, bool) if prompt_mask is None else prompt_mask
    mask = jnp.concatenate([seen, inputs > 0], axis=1)[:, None, None, :]
    size = mask.shape[-1]
    bias = RelativePositionBias(config, bidirectional=True).apply({"params": own["encoder"]["relpos_bias"]}, size, size)
    before = (
        jnp.zeros((*shape, config.emb_dim)) if prompt is None else jnp.broadcast_to(prompt, (*shape, config.emb_dim))
    )
    x = jnp.concatenate([before, embedded], axis=1)
    for number in range(config.num_encoder_layers):
        mine = layer_prompts[number] if layer_prompts.ndim == 3 else layer_prompts[:, number]
        x = x.at[:, :length].set(mine) if prompt is None else x.at[:, :length].add(mine)
        nothing_dropped = Kept([None, None], None, [None])
        variables = {"params": own["encoder"][f"layers_{number}"]}
        x = EncoderLayer(config).apply(variables, x, bias, mask, None, nothing_dropped)
    return RMSNorm(config.dtype).apply({"params": own["encoder"]["encoder_norm"]}, x)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per row"])
@pytest.mark.parametrize("added", [False, True], ids=["replace", "add"])
def test_layer_prompts_are_their_formula(added, per_row, masked):
    """Compares the encoder's output and the gradients of all prompts, for rows with padding."""
    config = dataclasses.replace(SMALL, num_encoder_layers=3)
    model, params = random_model(config)
    rng, length = np.random.default_rng(0), 4
    inputs = random_tokens(rng, [5, 2, 3], 5, config.vocab_size)
    rows = (3,) if per_row else ()
    layer_prompts = jnp.asarray(rng.normal(size=(*rows, 3, length, config.emb_dim)), jnp.float32)
    prompt = jnp.asarray(rng.normal(size=(*rows, length, config.emb_dim)), jnp.float32) if added else None
    prompt_mask = jnp.asarray(np.arange(length) >= np.array([[0], [1], [3]])) if masked else None
    seen = np.pad(np.asarray(inputs) > 0, ((0, 0), (length, 0)), constant_values=True)
    if masked:
        seen[:, :length] = prompt_mask
    weights = jnp.asarray(rng.normal(size=(*seen.shape, config.emb_dim)) * seen[..., None], jnp.float32)

    def ours(prompt, layer_prompts):
        prompts = {"prompt": prompt, "layer_prompts": layer_prompts, "prompt_mask": prompt_mask}
        encoded = model.apply({"params": tree(params)}, inputs, enable_dropout=False, **prompts, method="encode")
        return jnp.sum(encoded * weights), encoded

    def by_hand(prompt, layer_prompts):
        encoded = encode_layer_by_layer(config, params, inputs, prompt, layer_prompts, prompt_mask)
        return jnp.sum(encoded * weights), encoded

    (found, wanted) = (
        jax.jit(jax.grad(function, argnums=(0, 1) if added else 1, has_aux=True))(prompt, layer_prompts)
        for function in (ours, by_hand)
    )
    np.testing.assert_allclose(found[1][seen], wanted[1][seen], rtol=0, atol=5e-6)
    for gradient, expected in zip(jax.tree.leaves(found[0]), jax.tree.leaves(wanted[0]), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        each = np.abs(gradient).max(-1)
        if per_row and masked:  # every layer sees the unmasked positions, and no layer sees the others
            visible = prompt_mask if each.ndim == 2 else prompt_mask[:, None]
            np.testing.assert_array_equal(each > 0, np.broadcast_to(visible, each.shape))
        else:
            assert (each > 0).all()


@pytest.mark.parametrize("added", [False, True], ids=["replace", "add"])
def test_layer_prompts_behind_masked_positions_are_the_shorter_ones(added):
    """Compares the logits, because the decoder must not see the masked positions either."""
    model, params = random_model(SMALL)
    rng = np.random.default_rng(1)
    inputs, targets = random_tokens(rng, [5, 2], 5, 23), random_tokens(rng, [4, 3], 4, 23)
    layer_prompts = jnp.asarray(rng.normal(size=(2, 4, SMALL.emb_dim)), jnp.float32)
    prompt = jnp.asarray(rng.normal(size=(4, SMALL.emb_dim)), jnp.float32) if added else None

    @jax.jit
    def run(prompt, layer_prompts, prompt_mask):
        prompts = {"prompt": prompt, "layer_prompts": layer_prompts, "prompt_mask": prompt_mask}
        return model.apply({"params": tree(params)}, inputs, targets, targets, enable_dropout=False, **prompts)

    behind = jnp.broadcast_to(jnp.arange(4) >= 3, (2, 4))
    shorter = run(None if prompt is None else prompt[3:], layer_prompts[:, 3:], None)
    np.testing.assert_allclose(run(prompt, layer_prompts, behind), shorter, rtol=1e-5, atol=1e-5)
    assert not np.allclose(run(prompt, layer_prompts, None), shorter, atol=1e-2)


def test_rows_of_each_kind_of_prompt_share_a_batch():
    """One row has prompts that replace, one has additions, one an ordinary prompt, one none: each as if alone."""
    config = dataclasses.replace(SMALL, num_encoder_layers=3)
    model, params = random_model(config)
    rng, lengths = np.random.default_rng(2), [2, 4, 3, 0]
    inputs, targets = random_tokens(rng, [5, 2, 4, 3], 5, 23), random_tokens(rng, [4, 3, 2, 4], 4, 23)
    prompt, layer_prompts = rng.normal(size=(4, 4, config.emb_dim)), rng.normal(size=(4, 3, 4, config.emb_dim))
    layer_prompts[2:] = 0
    mask = np.arange(4) >= 4 - np.array(lengths)[:, None]

    @jax.jit
    def run(inputs, targets, prompt, layer_prompts, **more):
        return encode_once(model, tree(params), inputs, prompt=prompt, layer_prompts=layer_prompts, **more)(targets)

    arrays = (jnp.asarray(array, jnp.float32) for array in (prompt, layer_prompts))
    found = run(inputs, targets, *arrays, prompt_mask=mask, layers_replace=np.array([True, False, False, False]))
    for row, length in enumerate(lengths):
        own = jnp.asarray(prompt[row, 4 - length :], jnp.float32) if row else None
        per_layer = jnp.asarray(layer_prompts[row, :, 4 - length :], jnp.float32) if row < 2 else None
        alone = run(inputs[row, None], targets[row, None], own if length else None, per_layer)
        np.testing.assert_allclose(found[row, None], alone, rtol=1e-5, atol=1e-5)


def test_layer_prompts_of_zero_beside_a_prompt_add_nothing():
    model, params = random_model(SMALL, 3)
    own, prompt = apart(params)
    rng = np.random.default_rng(0)
    inputs, targets = random_tokens(rng, [5, 2], 5, 23), random_tokens(rng, [4, 3], 4, 23)
    nothing = jnp.zeros((2, 3, SMALL.emb_dim))
    apply = jax.jit(functools.partial(model.apply, enable_dropout=False))
    np.testing.assert_array_equal(
        apply({"params": own}, inputs, targets, targets, prompt=prompt, layer_prompts=nothing),
        compiled(model)(params, inputs, targets, None),
    )


def test_one_dropout_mask_for_all_positions():
    """Equal positions stay equal under dropout in every layer, because the masks are broadcast along the length.

    All positions have the same token and attend to the same (there is no position bias and no causal mask), so only a
    dropout mask that differs between positions could make them different.
    """
    config = T5Config(**{**vars(SMALL), "dropout_rate": 0.3})
    model, params = random_model(config)
    params = {
        path: value * 0 if "rel_embedding" in path or "decoder/layers_0/self_attention/out" in path else value
        for path, value in params.items()
    }
    tokens = jnp.full((3, 6), 5)
    rngs = {"dropout": jax.random.key(1)}
    encoded = model.apply({"params": tree(params)}, tokens, rngs=rngs, method="encode")
    logits = model.apply({"params": tree(params)}, tokens, tokens, tokens, rngs=rngs)
    for output in (encoded, logits):
        np.testing.assert_allclose(output, jnp.broadcast_to(output[:, :1], output.shape), rtol=1e-5, atol=1e-5)
        assert not np.allclose(output[0], output[1], atol=1e-2)  # rows do not share a mask
    assert 0 < np.mean(encoded == 0) < 0.7  # features of the output are dropped, whole columns of them


def masks(config, layers, lengths, rows, seed=0):
    """Returns all of a stack's dropout masks, by what they are of."""
    return draw_kept(lambda name: jax.random.key(seed), config, layers, lengths, jnp.asarray(rows))


@settings(max_examples=20, deadline=None)  # each example compiles three programs
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(1, 3), st.integers(0, 2**31 - 1))
def test_what_a_row_drops_depends_neither_on_padding_nor_on_other_rows(own, encoded, more, batch, seed):
    config = dataclasses.replace(SMALL, dropout_rate=0.3)
    narrow = masks(config, 2, (own, encoded), range(batch), seed)
    wide = masks(config, 2, (own + more, encoded), range(batch), seed)
    alone = masks(config, 2, (own, encoded), [batch - 1], seed)
    for kept, of_wide in zip(narrow.layers, wide.layers, strict=True):
        assert kept.values[0].shape == (batch, SMALL.num_heads, own, 1)
        assert kept.values[1].shape == (batch, SMALL.num_heads, encoded, 1)
        np.testing.assert_array_equal(of_wide.values[0][:, :, :own], kept.values[0])
        np.testing.assert_array_equal(of_wide.values[1], kept.values[1])
    features = [
        jax.tree.leaves((each.input, each.output, [(x.residual, x.hidden) for x in each.layers]))
        for each in (narrow, wide)
    ]
    jax.tree.map(np.testing.assert_array_equal, *features)
    jax.tree.map(lambda one, row: np.testing.assert_array_equal(one[0], row[-1]), alone, narrow)


def test_all_masks_of_a_stack_are_drawn_independently_and_keep_their_share():
    config = dataclasses.replace(SMALL, emb_dim=50, mlp_dim=50, num_heads=5, dropout_rate=0.3)
    drawn = [np.asarray(mask).reshape(100, 50) for mask in jax.tree.leaves(masks(config, 3, (10, 10), range(100)))]
    assert len(drawn) == 2 + 3 * (3 + 1 + 2)
    # 5,000 draws each: the standard deviation of the share kept is 0.0065, of a correlation 0.014.
    assert [mask.mean() for mask in drawn] == pytest.approx([0.7] * len(drawn), abs=0.03)
    correlations = np.corrcoef([mask.ravel() for mask in drawn]) - np.eye(len(drawn))
    assert np.abs(correlations).max() < 0.07
    between_rows = np.corrcoef(np.concatenate(drawn, axis=1)) - np.eye(100)  # of 1,000 draws: 0.032
    assert np.abs(between_rows).max() < 0.16
    features = jnp.arange(1.0, 25.0).reshape(1, 4, 6)
    kept = jnp.array([1, 0, 1, 1, 0, 1], bool)[None, None]
    np.testing.assert_array_equal(drop(features, kept, 0.3), np.where(kept, features / np.float32(0.7), 0))


def test_encoder_and_decoder_draw_other_masks_but_few_times():
    """XLA for CPUs takes long to compile each draw, so their number does not grow with the number of layers."""
    config = dataclasses.replace(SMALL, num_encoder_layers=5, num_decoder_layers=4, dropout_rate=0.3)
    model, params = random_model(config)
    tokens = jnp.full((3, 6), 5)

    def logits(key):
        return model.apply({"params": tree(params)}, tokens, tokens, tokens, rngs={"dropout": key})

    assert str(jax.make_jaxpr(logits)(jax.random.key(0))).count(" random_bits[") == 2
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "draw_kept", lambda *arguments: seen.append(draw_kept(*arguments)) or seen[-1])
        logits(jax.random.key(0))
    of_encoder, of_decoder = (each.layers[0].hidden for each in seen)
    assert of_encoder.shape == of_decoder.shape and (of_encoder != of_decoder).any()


def test_prompt_is_dropped_with_the_input(monkeypatch):
    """The prompt is added before the input's dropout, so the same features of both are dropped."""
    config = T5Config(**{**vars(SMALL), "num_encoder_layers": 0, "dropout_rate": 0.5})
    model, params = random_model(config, 3)
    seen = []

    def spy(*arguments):
        seen.append(drop(*arguments))
        return seen[-1]

    monkeypatch.setattr(network, "drop", spy)
    variables, prompts = with_its_prompt(model, params)
    model.apply(variables, jnp.full((2, 4), 7), **prompts, rngs={"dropout": jax.random.key(0)}, method="encode")
    of_input, of_output = (np.asarray(array) == 0 for array in seen)
    assert of_input.shape == (2, 7, SMALL.emb_dim)
    np.testing.assert_array_equal(of_input, np.broadcast_to(of_input[:, :1], of_input.shape))
    assert 0 < of_input.mean() < 1 and (of_input != of_output).any()


def test_logits_through_the_embedding():
    """T5 1.0 multiplies by the transposed table, after dividing the decoder's output by the square root of d_model."""
    tied = Transformer(T5Config(**{**vars(SMALL), "logits_via_embedding": True}))
    model, params = random_model(SMALL)
    table = params["token_embedder/embedding"]
    rng = np.random.default_rng(0)
    inputs, decoder_inputs = random_tokens(rng, [5, 3], 5, 23), random_tokens(rng, [4, 4], 4, 23)
    kernel = table.T / np.sqrt(SMALL.emb_dim)
    expected = compiled(model)(params | {"decoder/logits_dense/kernel": kernel}, inputs, decoder_inputs, None)
    without = {path: value for path, value in params.items() if path != "decoder/logits_dense/kernel"}
    np.testing.assert_allclose(compiled(tied)(without, inputs, decoder_inputs, None), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (4, 8), (16, 64)])
def test_relative_position_bucket(bidirectional, buckets, max_distance):
    """Compares with the definition in integers, where E of the N buckets are exact.

    Bucket E + k begins at the distance E (max_distance / E) ** (k / (N - E)), and the last bucket has no end.
    """

    def bucket(key_minus_query):
        count, first, distance = buckets, 0, -key_minus_query
        if bidirectional:
            count //= 2
            first, distance = (count, -distance) if distance < 0 else (0, distance)
        distance, exact = max(distance, 0), count // 2
        if distance < exact:
            return first + distance
        far = count - exact
        begun = [k for k in range(far) if distance**far * exact**k >= max_distance**k * exact**far]
        return first + exact + max(begun)

    relative = np.arange(-600, 601, dtype=np.int32)
    found = relative_position_bucket(
        relative, bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance
    )
    assert found.tolist() == [bucket(int(r)) for r in relative]


def loss_and_gradient(config):
    """Returns a function that computes the loss and its gradient by the prompt, and its arguments."""
    model = prompted(config)
    rng = np.random.default_rng(0)
    inputs, targets = random_tokens(rng, [9, 4, 1], 9, 128), random_tokens(rng, [3, 2, 1], 3, 128)
    params = model.init(jax.random.key(0), inputs, targets, targets, enable_dropout=False)["params"]

    def loss(prompt):
        logits = model.apply({"params": params}, inputs, targets, targets, enable_dropout=False, prompt=prompt)
        return cross_entropy(logits, targets, 0).loss

    return jax.jit(jax.value_and_grad(loss)), params["encoder"]["prompt"]["prompt"]


@pytest.mark.parametrize("option", [{"remat_policy": "minimal"}, {"remat_policy": "full"}, {"attention": "xla"}])
def test_options_of_memory_and_speed_change_no_number(option, tiny_config):
    function, prompt = loss_and_gradient(tiny_config)
    loss, gradient = function(prompt)
    found = loss_and_gradient(dataclasses.replace(tiny_config, **option))[0](prompt)
    np.testing.assert_allclose(found[0], loss, rtol=1e-6)
    np.testing.assert_allclose(found[1], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_remat_keeps_less(dtype, tiny_config):
    def kept(policy):
        config = dataclasses.replace(tiny_config, dtype=dtype, remat_policy=policy)
        model, tokens = prompted(config), jnp.ones((8, 32), jnp.int32)
        params = model.init(jax.random.key(0), tokens, tokens, tokens, enable_dropout=False)["params"]

        def residuals(prompt):
            run = functools.partial(model.apply, {"params": params}, tokens, tokens, tokens, enable_dropout=False)
            return jax.tree.leaves(jax.vjp(lambda prompt: run(prompt=prompt), prompt)[1])

        return sum(leaf.size for leaf in jax.eval_shape(residuals, params["encoder"]["prompt"]["prompt"]))

    everything, products, inputs = (kept(policy) for policy in ("none", "minimal", "full"))
    assert inputs < 0.6 * products < 0.6 * everything


def test_options_are_checked(tiny_config):
    with pytest.raises(ValueError, match="remat_policy` is 'all', expected one of 'none', 'minimal', 'full'"):
        dataclasses.replace(tiny_config, remat_policy="all")


@pytest.mark.parametrize(
    "width, segments, fused", [(10, False, True), (9, False, False), (10, True, False)], ids=["even", "odd", "packed"]
)
def test_fused_attention_has_the_encoder_where_lengths_say_what_is_seen(
    width, segments, fused, tiny_config, monkeypatch
):
    calls, original = [], jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: calls.append(k) or original(*a, **k))
    rng = np.random.default_rng(0)
    inputs, targets = random_tokens(rng, [width, 4, 0], width, 128), random_tokens(rng, [3, 2, 1], 3, 128)
    packed = [jnp.ones_like(inputs)] if segments else []
    logits = []
    for attention in ("products", "xla"):
        model = Transformer(dataclasses.replace(tiny_config, attention=attention))
        params = model.init(jax.random.key(0), inputs, targets, targets, enable_dropout=False)
        calls.clear()
        logits.append(model.apply(params, inputs, targets, targets, *packed, enable_dropout=False))
    assert len(calls) == (1 if fused else 0)  # the layers share one tracing
    # A row that is all padding attends to nothing, for which neither kind of attention is defined.
    np.testing.assert_allclose(logits[1][:2], logits[0][:2], rtol=0, atol=1e-5)
    assert np.isfinite(logits[1]).all()


@pytest.mark.parametrize(
    "backend, capability, dtype, expected",
    [
        ("gpu", "9.0", "bfloat16", "cudnn"),
        ("gpu", "8.0", "auto", "cudnn"),
        ("gpu", "12.1", "bfloat16", "cudnn"),
        ("gpu", "9.0", "float32", "products"),
        ("gpu", "7.5", "bfloat16", "products"),
        ("gpu", "gfx90a", "bfloat16", "products"),
        ("tpu", "", "bfloat16", "products"),
        ("cpu", "", "bfloat16", "products"),
    ],
)
def test_attention_is_fused_where_the_device_can(monkeypatch, backend, capability, dtype, expected):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert dataclasses.replace(SIZES["small"], dtype=dtype, attention="auto").attention == expected
    odd = dataclasses.replace(SMALL, dtype=dtype, attention="auto")  # head_dim 5, which no fused kernel supports
    assert odd.attention == "products"
