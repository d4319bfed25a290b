"""Compares T5X's own trainer, checkpoints, decoding and command line, with our modules in T5X, with this project's."""

import asyncio
import functools
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

REASON = "T5X cannot be imported: it is not on PyPI; docs/guides/t5x.md says how to install it"
pytest.importorskip("t5x.train", reason=REASON)  # ignores T5X's warnings while it is imported

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import seqio  # noqa: E402
from fixtures.models import apart, prompted, random_model, random_tokens, tree  # noqa: E402
from flax.core import freeze, unfreeze  # noqa: E402
from flax.traverse_util import flatten_dict  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402
from t5x import decoding, models, partitioning, train_state, trainer, utils  # noqa: E402
from t5x.examples.t5 import network as t5x_network  # noqa: E402
from tensorflow.io import gfile  # noqa: E402

from prompt_tuning_jax.batches.loader import Batch  # noqa: E402
from prompt_tuning_jax.checkpoints import t5x as writers  # noqa: E402
from prompt_tuning_jax.checkpoints.base import open_model  # noqa: E402
from prompt_tuning_jax.methods.method import Injection  # noqa: E402
from prompt_tuning_jax.methods.prompt_tuning import PROMPT, PromptTuning  # noqa: E402
from prompt_tuning_jax.prompts.files import OFFICIAL_NAME, read_prompt  # noqa: E402
from prompt_tuning_jax.prompts.initializers import ClassLabels, RandomUniform, SampledVocabulary  # noqa: E402
from prompt_tuning_jax.prompts.module import SoftPrompt  # noqa: E402
from prompt_tuning_jax.t5.config import T5Config  # noqa: E402
from prompt_tuning_jax.t5.decoding import greedy  # noqa: E402
from prompt_tuning_jax.t5.log_likelihood import shift_right, token_log_probs  # noqa: E402
from prompt_tuning_jax.t5.network import Transformer  # noqa: E402
from prompt_tuning_jax.t5x_host import checkpoints, network, prompt_init, tasks  # noqa: E402
from prompt_tuning_jax.t5x_host.optimizers import prompt_only  # noqa: E402
from prompt_tuning_jax.t5x_host.partitioning import prompt_axis_rules  # noqa: E402
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary  # noqa: E402
from prompt_tuning_jax.training.optimizer import adafactor  # noqa: E402
from prompt_tuning_jax.training.step import (  # noqa: E402
    TrainState,
    batch_loss,
    make_train_step,
)

# Deprecated functions of its libraries that T5X's HEAD calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`with mesh:DeprecationWarning"),
]

CONFIG = T5Config(61, 24, 3, 1, 1, 40, head_dim=8)
LENGTH = 5
# The size of the real T5X checkpoint among the data.
TINY = T5Config(
    32128, 4, 2, 2, 2, 8, head_dim=2, relative_attention_num_buckets=4, relative_attention_max_distance=8
)  # fmt: skip
OWN = "encoder/prompt/.*"
OPTIMIZER = adafactor(0.3)


@pytest.fixture(autouse=True)
def loops_are_closed(monkeypatch):
    """Closes the event loops that T5X's checkpointer leaves open, because they would warn in a later test."""
    loops, make = [], asyncio.new_event_loop
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: loops.append(make()) or loops[-1])
    yield
    for loop in loops:
        loop.close()
    if loops:
        asyncio.set_event_loop(None)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Caches compiled programs, because T5X compiles them again for each trainer, restore and process."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    settings = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def compiled_fast():
    """Compiles without optimisations, for tests that compile much and run little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def partitioner():
    rules = partitioning.standard_logical_axis_rules(additional_rules=prompt_axis_rules())
    return partitioning.PjitPartitioner(num_partitions=1, logical_axis_rules=rules)


def hosted(module, vocab_size, optimizer=OPTIMIZER):
    vocabulary = seqio.PassThroughVocabulary(vocab_size)
    return models.EncoderDecoderModel(module, vocabulary, vocabulary, prompt_only(optimizer), z_loss=1e-4)


def batch(seed=0, config=CONFIG):
    """Returns four rows, two of which have padding in both features."""
    rng = np.random.default_rng(seed)
    inputs, targets = (random_tokens(rng, lengths, width, config.vocab_size) for lengths, width in SHAPES)
    return Batch(np.asarray(inputs), np.asarray(targets), np.arange(4, dtype=np.int32))


SHAPES = [([9, 4, 9, 1], 9), ([6, 6, 2, 3], 6)]


def features(rows):
    """Returns the rows as T5X's feature converter gives them."""
    inputs, targets = jnp.asarray(rows.inputs), jnp.asarray(rows.targets)
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": shift_right(targets, 0),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(jnp.int32),
    }


def tokens_of(rows):
    """Returns the rows' inputs, decoder inputs and targets, as a network takes them."""
    inputs, shifted, targets, _ = features(rows).values()
    return inputs, shifted, targets


def apply(module, params, rows):
    """Returns the logits."""
    return jax.jit(functools.partial(module.apply, enable_dropout=False))({"params": tree(params)}, *tokens_of(rows))


def loss_and_gradients(model, params, rows):
    """Returns the loss of T5X's `loss_fn` without dropout, and the gradients by path."""
    loss_fn = jax.value_and_grad(lambda params, rows: model.loss_fn(params, rows, None), has_aux=True)
    (loss, _), gradients = jax.jit(loss_fn)(tree(params), features(rows))
    return loss, flatten_dict(gradients, sep="/")


def state_of(model, params):
    """Returns a state with copies of the parameters, because the trainer donates its state."""
    params = {path: jnp.array(value, copy=True) for path, value in params.items()}
    return train_state.FlaxOptimTrainState.create(model.optimizer_def, freeze({"params": tree(params)}))


def initializer(model, config=CONFIG):
    example = features(batch(config=config))
    return utils.TrainStateInitializer(
        model.optimizer_def,
        model.get_initial_variables,
        input_shapes={name: value.shape for name, value in example.items()},
        input_types={name: value.dtype for name, value in example.items()},
        partitioner=partitioner(),
    )


def train(model, state, axes, batches, microbatches=None):
    """Trains one step per batch with T5X's own trainer, and returns the state and the trainer's summary."""
    rate = utils.create_learning_rate_scheduler(factors="constant", base_learning_rate=0.3)
    arguments = (model, state, partitioner(), [], None, axes, jax.random.PRNGKey(1), rate, microbatches)
    with trainer.Trainer(*arguments) as t5x_trainer:
        summary = t5x_trainer.train(iter(map(features, batches)), len(batches)).result()
        return t5x_trainer.train_state, summary


def flat(state):
    return {path: np.asarray(value) for path, value in flatten_dict(unfreeze(state.params), sep="/").items()}


def changed(before, after):
    return [path for path in before if np.asarray(before[path]).tobytes() != after[path].tobytes()]


@functools.cache
def native_step():
    """Returns the training step of this project's own runs, which pass the prompt to the model."""
    return make_train_step(Transformer(CONFIG), PromptTuning(LENGTH), OPTIMIZER)


def native_start(params):
    frozen = dict(params)
    trainable = {PROMPT: jnp.array(frozen.pop(PROMPT), copy=True)}
    key = jax.random.key_data(jax.random.key(1))
    return TrainState(jnp.zeros((), jnp.int32), trainable, OPTIMIZER.init(trainable), key), frozen


def start_prompt(init, embeddings, vocabulary, seed):
    """Returns the initial prompt of this project's own runs."""
    config = SimpleNamespace(emb_dim=embeddings.shape[1])
    model = SimpleNamespace(config=config, parameters={}, embeddings=embeddings, tokenizer=vocabulary)
    key = jax.random.fold_in(jax.random.key(seed), 1)  # as in training.run
    return PromptTuning(LENGTH, init).init(key, model)[PROMPT]


def native_steps(params, batches):
    """Trains one step per batch with this project's own trainer, and returns the prompt and the losses."""
    (state, frozen), losses = native_start(params), []
    step = native_step()
    for rows in batches:
        state, metrics = step(state, frozen, rows)
        losses.append(float(metrics.sums.loss))
    return np.asarray(state.trainable[PROMPT]), losses


def close(found, expected, within):
    """Checks that arrays are equal up to `within` times the largest absolute value of `expected`."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=within * np.abs(expected).max())


@pytest.mark.parametrize("microbatches", [None, 2])
def test_three_steps_of_t5xs_trainer_change_the_prompt_alone_and_as_ours_do(microbatches):
    module, params = prompted(CONFIG, LENGTH), random_model(CONFIG, LENGTH)[1]
    # Adding a zero update to a frozen parameter could turn -0.0 into +0.0.
    kernel = "encoder/layers_0/mlp/wi_0/kernel"
    params = params | {kernel: params[kernel].at[0, 0].set(-0.0)}
    model, batches = hosted(module, CONFIG.vocab_size), [batch(seed) for seed in range(3)]

    after, summary = train(model, state_of(model, params), initializer(model).train_state_axes, batches, microbatches)
    assert changed(params, flat(after)) == [PROMPT]
    assert int(after.step) == 3

    prompt, losses = native_steps(params, batches)
    # The updates have a root mean square of 0.3, so 1e-5 of the prompt is about 1e-5 of an update.
    close(flat(after)[PROMPT], prompt, 1e-5)
    tokens = sum(int((rows.targets > 0).sum()) for rows in batches)
    np.testing.assert_allclose(summary["loss_per_nonpadding_target_token"].value, sum(losses) / tokens, rtol=1e-6)


def test_frozen_parameters_have_no_optimiser_state():
    made = initializer(hosted(prompted(CONFIG, LENGTH), CONFIG.vocab_size, optax.adam(0.3)))
    shapes = {leaf.shape for leaf in jax.tree.leaves(made.global_train_state_shape.param_states)}
    assert shapes == {(), (LENGTH, CONFIG.emb_dim)}


def test_a_pattern_that_trains_nothing_is_refused():
    module = prompted(CONFIG, LENGTH)
    vocabulary = seqio.PassThroughVocabulary(CONFIG.vocab_size)
    optimizer = prompt_only(OPTIMIZER, ["encoder/promt/.*"])
    with pytest.raises(ValueError, match=r"no parameter's path matches 'encoder/promt/\.\*'"):
        initializer(models.EncoderDecoderModel(module, vocabulary, vocabulary, optimizer))


def test_loss_and_every_gradient_are_those_of_the_native_step(compiled_fast):
    module, params = prompted(CONFIG, LENGTH), random_model(CONFIG, LENGTH)[1]
    rows = batch()

    def native_loss(params):
        own = dict(params)
        injection = Injection(own.pop(PROMPT), parameters=own)
        return batch_loss(Transformer(CONFIG), injection, {}, jnp.asarray(rows.inputs), jnp.asarray(rows.targets)).loss

    loss, gradients = loss_and_gradients(hosted(module, CONFIG.vocab_size), params, rows)
    expected_loss, expected = jax.jit(jax.value_and_grad(native_loss))(params)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert gradients.keys() == expected.keys()
    for path, value in expected.items():
        close(gradients[path], value, 1e-5)


@pytest.mark.parametrize("microbatches", [None, 2])
def test_xla_drops_the_frozen_gradients(microbatches):
    """T5X computes the gradient of every parameter, but its step costs no more than ours, which does not.

    XLA counts the body of a loop once: in a step of two micro-batches, the body has half of the batch.
    """
    module, params = prompted(CONFIG, LENGTH), random_model(CONFIG, LENGTH)[1]
    rows = batch()
    program = native_step().lower(*native_start(params), rows)
    native = program.compile().cost_analysis()["flops"] / (microbatches or 1)

    def t5x_step(patterns):
        vocabulary = seqio.PassThroughVocabulary(CONFIG.vocab_size)
        model = models.EncoderDecoderModel(
            module, vocabulary, vocabulary, prompt_only(OPTIMIZER, patterns), z_loss=1e-4
        )
        made = initializer(model)
        host = partitioner()
        step = host.partition(
            lambda state, rows: trainer.train_with_lr(
                state, rows, 0.3, jax.random.PRNGKey(1), model, microbatches, None, host.data_partition_spec
            )[0],
            in_axis_resources=(made.train_state_axes, host.data_partition_spec),
            out_axis_resources=made.train_state_axes,
        )
        return host.compile(step, made.global_train_state_shape, features(rows)).cost_analysis()["flops"]

    assert t5x_step([OWN]) < 1.05 * native < 1.2 * native < t5x_step([".*"])


def test_decoding_is_ours(compiled_fast):
    module, params = prompted(CONFIG, LENGTH), random_model(CONFIG, LENGTH)[1]
    rows = batch()
    model = hosted(module, CONFIG.vocab_size)
    width = 12
    given = features(rows) | {"decoder_input_tokens": jnp.zeros((4, width), jnp.int32)}
    own, prompt = apart(params)
    expected, _ = greedy(Transformer(CONFIG), own, jnp.asarray(rows.inputs), width, prompt=prompt)
    assert len(np.unique(np.asarray(expected))) > 4

    def to_the_end(tokens):
        ended = np.cumsum(np.asarray(tokens) == 1, axis=1) - (np.asarray(tokens) == 1) > 0
        return np.where(ended, 0, tokens)

    tokens = jax.jit(model.predict_batch)(tree(params), given)
    np.testing.assert_array_equal(to_the_end(tokens), expected)
    sampling = functools.partial(decoding.temperature_sample, topk=1)
    sampler = models.EncoderDecoderModel(
        module, model.input_vocabulary, model.output_vocabulary, model.optimizer_def, decode_fn=sampling
    )
    tokens = jax.jit(functools.partial(sampler.predict_batch, rng=jax.random.PRNGKey(0)))(tree(params), given)
    np.testing.assert_array_equal(to_the_end(tokens), expected)


def test_beams_share_no_cache(compiled_fast):
    """T5X reorders the cache by rows: each of four beams must have the score that `score_batch` gives it."""
    module, params = prompted(CONFIG, LENGTH), random_model(CONFIG, LENGTH)[1]
    model = hosted(module, CONFIG.vocab_size)
    given = features(batch())
    predict = functools.partial(
        model.predict_batch_with_aux, return_all_decodes=True, num_decodes=4, decoder_params={"alpha": 0.0}
    )
    beams, aux = jax.jit(predict)(tree(params), given)
    score = jax.jit(model.score_batch)
    for beam in range(4):
        rows = batch()._replace(targets=np.asarray(beams[:, beam]))
        np.testing.assert_allclose(aux["scores"][:, beam], score(tree(params), features(rows)), rtol=1e-5)


def test_scores_are_ours(compiled_fast):
    module, params = prompted(CONFIG, LENGTH), random_model(CONFIG, LENGTH)[1]
    rows = batch()
    logits = apply(module, params, rows)
    expected = token_log_probs(logits, jnp.asarray(rows.targets), 0).sum(-1)
    scores = jax.jit(hosted(module, CONFIG.vocab_size).score_batch)(tree(params), features(rows))
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_packed_examples_are_refused():
    model = hosted(prompted(CONFIG, LENGTH), CONFIG.vocab_size)
    packed = features(batch()) | {"encoder_segment_ids": np.ones((4, 9), np.int32)}
    shapes = {name: value.shape for name, value in packed.items()}
    with pytest.raises(ValueError, match="set pack=False"):
        model.get_initial_variables(jax.random.PRNGKey(0), shapes, {name: x.dtype for name, x in packed.items()})


# T5X's own network.


def t5x_own(dropout_rate=0.0):
    size = {
        name: getattr(CONFIG, name)
        for name in "vocab_size emb_dim num_heads num_encoder_layers num_decoder_layers head_dim mlp_dim".split()
    }
    config = t5x_network.T5Config(**size, mlp_activations=("gelu", "linear"), dropout_rate=dropout_rate)
    return network.Transformer(config, prompt_factory=functools.partial(SoftPrompt, LENGTH))


def test_t5xs_own_network_with_a_prompt_is_ours(compiled_fast):
    own, module, params = t5x_own(), prompted(CONFIG, LENGTH), random_model(CONFIG, LENGTH)[1]
    rows = batch()
    init = functools.partial(own.init, enable_dropout=False)
    made = jax.eval_shape(init, jax.random.key(0), *tokens_of(rows))
    shapes = {path: value.shape for path, value in flatten_dict(made["params"], sep="/").items()}
    assert shapes == {path: value.shape for path, value in params.items()}

    logits, expected = (apply(network, params, rows) for network in (own, module))
    real = rows.targets > 0  # T5X masks the queries of padded targets as well
    close(np.asarray(logits)[real], np.asarray(expected)[real], 1e-5)

    (loss, gradients), (expected_loss, expected) = (
        loss_and_gradients(hosted(network, CONFIG.vocab_size), params, rows) for network in (own, module)
    )
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    close(gradients[PROMPT], expected[PROMPT], 1e-5)


def test_t5xs_own_network_trains_and_decodes_with_a_prompt(compiled_fast):
    own, module, params = t5x_own(), prompted(CONFIG, LENGTH), random_model(CONFIG, LENGTH)[1]
    batches = [batch(seed) for seed in range(2)]
    model = hosted(own, CONFIG.vocab_size)
    after, _ = train(model, state_of(model, params), initializer(model).train_state_axes, batches)
    assert changed(params, flat(after)) == [PROMPT]
    close(flat(after)[PROMPT], native_steps(params, batches)[0], 1e-5)

    given = features(batches[0])
    tokens = [jax.jit(hosted(net, CONFIG.vocab_size).predict_batch)(tree(params), given) for net in (own, module)]
    np.testing.assert_array_equal(*tokens)


def test_t5xs_own_network_refuses_packed_examples():
    rows = batch()
    with pytest.raises(ValueError, match="set pack=False"):
        t5x_own().init(jax.random.key(0), *tokens_of(rows), jnp.ones((4, 9), jnp.int32))


# Checkpoints. The base model is a real checkpoint of T5X's.


@pytest.fixture
def base(data_dir, tmp_path, compiled_fast):
    """Returns the base model at a path of the form checkpoint_<step>, because T5X reads the step from the name."""
    path = tmp_path / "base" / "checkpoint_3"
    path.parent.mkdir()
    path.symlink_to(data_dir / "t5" / "t5x_tiny_checkpoint")
    return path


def restore(base, model_dir, use_orbax=True, config=TINY, resume=False):
    """Restores as `t5x.train` does with gin_configs/t5x.

    Returns:
      The state, its axes, a function that saves a state, and the model.
    """
    module = prompted(config, LENGTH)
    model = hosted(module, config.vocab_size)
    made = initializer(model, config)
    arguments = {"path": str(base), "mode": "specific", "dtype": "float32"}
    if resume:
        arguments["state_transformation_fns"] = [functools.partial(checkpoints.restore_base, is_resuming=True)]
    else:
        arguments |= {"fallback_to_scratch": True, "state_transformation_fns": [checkpoints.restore_base]}
    model_dir.mkdir(exist_ok=True)
    save = utils.SaveCheckpointConfig(
        period=1, keep=1, state_transformation_fns=[functools.partial(checkpoints.save_prompt, folder=str(model_dir))]
    )
    state, manager = utils.create_checkpoint_manager_and_restore(
        made,
        partitioner(),
        utils.RestoreCheckpointConfig(**arguments),
        str(base),
        jax.random.PRNGKey(0),
        save,
        str(model_dir),
        use_orbax=use_orbax,
    )

    def save_state(state):
        manager.save(state, save.state_transformation_fns)
        manager.wait_until_finished()

    return state, made.train_state_axes, save_state, model


@pytest.mark.parametrize("use_orbax", [True, False], ids=["orbax", "legacy"])
def test_a_public_checkpoint_is_prompt_tuned_saved_and_resumed(base, tmp_path, use_orbax):
    state, axes, save, model = restore(base, tmp_path / "run", use_orbax)
    stored = {name: np.asarray(array) for name, array in open_model(str(base)).arrays.items()}
    begun = flat(state)
    assert begun.keys() == stored.keys() | {PROMPT}
    assert changed(stored, begun) == []
    assert int(state.step) == 3
    scratch = initializer(model, TINY).from_scratch(jax.random.PRNGKey(0))
    np.testing.assert_array_equal(begun[PROMPT], flat(scratch)[PROMPT])
    for found, expected in zip(*map(jax.tree.leaves, (state.param_states, scratch.param_states)), strict=True):
        np.testing.assert_array_equal(found, expected)

    for steps in (1, 2):
        state, _ = train(model, state, axes, [batch(seed, TINY) for seed in range(steps)])
        save(state)
    assert changed(stored, flat(state)) == []
    saved = tmp_path / "run" / "checkpoint_6"
    prompts = {path.name: read_prompt(path) for path in (tmp_path / "run" / "numpy_checkpoints").iterdir()}
    assert prompts.keys() == {"checkpoint_4", "checkpoint_6"}  # T5X itself keeps only the last checkpoint
    assert not (prompts["checkpoint_4"] == prompts["checkpoint_6"]).any()
    np.testing.assert_array_equal(prompts["checkpoint_6"], flat(state)[PROMPT])
    np.testing.assert_array_equal(prompts["checkpoint_6"], np.asarray(open_model(str(saved)).arrays[PROMPT]))
    assert (tmp_path / "run/numpy_checkpoints/checkpoint_6" / OFFICIAL_NAME).read_bytes() == as_npy(state)

    again, *_ = restore(saved, tmp_path / "run", use_orbax, resume=True)
    assert int(again.step) == 6
    for found, expected in zip(*map(jax.tree.leaves, (again.state_dict(), state.state_dict())), strict=True):
        np.testing.assert_array_equal(found, expected)


def as_npy(state):
    file = io.BytesIO()
    np.save(file, flat(state)[PROMPT])
    return file.getvalue()


@pytest.mark.parametrize("layout", ["legacy", "orbax"])
def test_a_run_starts_from_another_runs_checkpoint_without_its_prompt(data_dir, tmp_path, layout, compiled_fast):
    other = data_dir / "t5" / "t5x_runs" / layout / "checkpoint_9"
    state, *_ = restore(other, tmp_path / "run")
    stored = {name: np.asarray(array) for name, array in open_model(str(other)).arrays.items() if "prompt" not in name}
    assert changed(stored, flat(state)) == []
    assert flat(state).keys() == stored.keys() | {PROMPT}
    assert int(state.step) == 9


@pytest.mark.parametrize("write", [writers.write, writers.write_orbax])
def test_t5x_restores_what_this_project_writes(tmp_path, write, compiled_fast):
    params = random_model(CONFIG)[1]
    folder = tmp_path / "checkpoint_0"
    write(folder, params)
    state, *_ = restore(folder, tmp_path / "run", config=CONFIG)
    assert changed(params, flat(state)) == []
    assert int(state.step) == 0


def test_a_base_that_does_not_fit_is_refused(base, tmp_path):
    """The official runs would initialise missing parameters at random."""
    other = T5Config(32128, 4, 2, 3, 2, 8, head_dim=2)
    with pytest.raises(ValueError) as error:
        restore(base, tmp_path / "run", config=other)
    assert re.fullmatch(
        r"the base does not fit the model: encoder/layers_2/attention/key/kernel is missing; .* and \d+ more: "
        "set INITIAL_CHECKPOINT_PATH",
        str(error.value),
    )
    own, file = (
        {"target": {"encoder": {name: {"prompt": np.zeros(shape)}}}, "state": {"step": 0}}
        for name, shape in (("prompt", (5, 4)), ("relpos_bias", (2, 4)))
    )
    own["target"]["encoder"]["relpos_bias"] = {"prompt": np.zeros((2, 32))}
    with pytest.raises(ValueError, match=r"encoder/relpos_bias/prompt is \[2, 4\], not \[2, 32\]: set INITIAL"):
        checkpoints.restore_base(file, own)


def test_a_prompt_is_written_to_an_object_store_too():
    prompt = np.arange(6, dtype=np.float32).reshape(2, 3)
    state = {"state": {"step": np.int32(7)}, "target": {"encoder": {"prompt": {"prompt": prompt}}}}
    for _ in range(2):  # the second time as after a run that ended between writing the prompt and the checkpoint
        assert checkpoints.save_prompt(state, {}, folder="ram://bucket/run") == (state, {})
    path = f"ram://bucket/run/numpy_checkpoints/checkpoint_7/{OFFICIAL_NAME}"
    with gfile.GFile(path, "rb") as file:
        np.testing.assert_array_equal(np.load(io.BytesIO(file.read())), prompt)


# Initial values of a prompt.


def test_a_prompt_starts_as_in_this_projects_own_runs(base, data_dir):
    path = data_dir / "t5" / "spiece.model"
    vocabulary = seqio.SentencePieceVocabulary(str(path), extra_ids=100)
    embeddings = prompt_init.read_embeddings(str(base))
    labels = ClassLabels(["positive", "negative"], population=50)
    for init in (RandomUniform(), SampledVocabulary(), labels):
        bound = functools.partial(
            prompt_init.prompt_init, init=init, initial_checkpoint_path=str(base), vocabulary=vocabulary, seed=4
        )
        expected = start_prompt(init, embeddings, Vocabulary(path), 4)
        drawn = jax.jit(lambda key, bound=bound: bound(key, (LENGTH, 4)))
        np.testing.assert_array_equal(drawn(jax.random.PRNGKey(8)), expected)
        # T5X initialises in a compiled function, in which the table should not be a constant.
        assert len(drawn.lower(jax.random.PRNGKey(8)).as_text()) < embeddings.size


def test_a_prompt_without_a_seed_starts_from_t5xs_key(base):
    bound = functools.partial(
        prompt_init.prompt_init,
        init=SampledVocabulary(),
        initial_checkpoint_path=str(base),
        vocabulary=seqio.PassThroughVocabulary(32128),
        seed=None,
    )
    drawn = [jax.jit(lambda key: bound(key, (LENGTH, 4)))(jax.random.PRNGKey(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_a_label_that_the_vocabulary_cannot_write_is_refused(base, data_dir):
    init = ClassLabels(["\u4e00"])
    vocabulary = seqio.SentencePieceVocabulary(str(data_dir / "t5" / "spiece.model"), extra_ids=100)
    bound = functools.partial(
        prompt_init.prompt_init, init=init, initial_checkpoint_path=str(base), vocabulary=vocabulary, seed=0
    )
    with pytest.raises(ValueError, match="tokenises to <unk>: set CLASS_LABELS"):
        jax.jit(lambda key: bound(key, (LENGTH, 4)))(jax.random.PRNGKey(0))


def test_a_task_that_is_not_there_is_refused(data_dir):
    vocabulary = seqio.SentencePieceVocabulary(str(data_dir / "t5" / "spiece.model"), extra_ids=100)
    with pytest.raises(ValueError, match="no task 'demo_revews'; did you mean 'demo_reviews'"):
        tasks.with_vocabulary("demo_revews", vocabulary)


def test_a_base_without_embeddings_is_refused(tmp_path):
    writers.write(tmp_path / "checkpoint_0", {"encoder/encoder_norm/scale": np.ones(4, np.float32)})
    with pytest.raises(ValueError, match="has no token_embedder/embedding, expected a T5 checkpoint: set INITIAL_CHEC"):
        prompt_init.read_embeddings(str(tmp_path / "checkpoint_0"))


# The command line, in separate processes: it replaces tasks in SeqIO's registry, and gin's settings are global.

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
TINY_GIN = """
from __gin__ import dynamic_registration
from prompt_tuning_jax.t5 import config

include "models/t5_1_1.gin"
include "t5x/t5_1_1_prompt.gin"
config.T5Config:
  emb_dim = 4
  mlp_dim = 8
  num_heads = 2
  head_dim = 2
  num_encoder_layers = 2
  num_decoder_layers = 2
  relative_attention_num_buckets = 4
  relative_attention_max_distance = 8
"""


def python(arguments, folder, cache):
    environment = os.environ | ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": cache}
    command = [sys.executable, *arguments]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    return process.returncode, process.stdout + process.stderr


@pytest.fixture
def command(base, data_dir, tmp_path):
    """Returns a function that makes the command line of a run of three steps on the demo's task."""
    (tmp_path / "tiny.gin").write_text(TINY_GIN)
    macros = {
        "MODEL_DIR": str(tmp_path / "run"),
        "MIXTURE_OR_TASK_NAME": "demo_reviews",
        "TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 4},
        "INITIAL_CHECKPOINT_PATH": str(base),
        "CLASS_LABELS": ["negative", "positive"],
        "PROMPT_LENGTH": LENGTH,
        "BATCH_SIZE": 8,
        "TRAIN_STEPS": 6,
        "EVAL_PERIOD": 2,
        "EVAL_STEPS": 1,
        "SAVE_PERIOD": 2,
        "EVALUATOR_NUM_EXAMPLES": 16,
        "seqio.SentencePieceVocabulary.sentencepiece_model_file": str(data_dir / "t5" / "spiece.model"),
    }

    def make(**changes):
        return [
            *("-m", "t5x.train", f"--gin_search_paths={ROOT / 'gin_configs'}", "--gin_file=tiny.gin"),
            *("--gin_file=prompts/class_labels.gin", "--gin_file=t5x/prompt_finetune.gin"),
            *(f"--gin.{name}={value!r}" for name, value in (macros | changes).items()),
        ]

    return make


def test_t5x_train_from_gin_files(command, base, data_dir, tmp_path, compiled_once):
    code, output = python(command(), tmp_path, compiled_once)
    assert code == 0, output[-4000:]
    run = tmp_path / "run"
    prompts = {path.name: read_prompt(path) for path in (run / "numpy_checkpoints").iterdir()}
    assert prompts.keys() == {"checkpoint_3", "checkpoint_5", "checkpoint_6"}
    embeddings = prompt_init.read_embeddings(str(base))
    vocabulary = Vocabulary(data_dir / "t5" / "spiece.model")
    expected = start_prompt(ClassLabels(["negative", "positive"]), embeddings, vocabulary, 0)
    np.testing.assert_array_equal(prompts["checkpoint_3"], expected)

    saved = {name: np.asarray(array) for name, array in open_model(str(run / "checkpoint_6")).arrays.items()}
    stored = {name: np.asarray(array) for name, array in open_model(str(base)).arrays.items()}
    assert changed(stored, saved) == []
    np.testing.assert_array_equal(saved[PROMPT], prompts["checkpoint_6"])
    # The last of three updates, each with a root mean square of about 0.3.
    assert 0.2 < np.sqrt(np.mean((prompts["checkpoint_6"] - prompts["checkpoint_5"]) ** 2)) < 0.31
    assert '"accuracy"' in (run / "inference_eval" / "demo_reviews-metrics.jsonl").read_text()


PARSE = """
import gin
from t5x import gin_utils
from t5x.train import _DEFAULT_GIN_SEARCH_PATHS, train  # of the main module, as when it is run


def parse(*files):
    gin.clear_config()
    gin_utils.parse_gin_flags([GIN_CONFIGS, *_DEFAULT_GIN_SEARCH_PATHS], files, MACROS)
    return gin.config_str()


# First, and one size alone: T5X's files of the others say `network.Transformer`, of which there are then three.
run = ["prompts/from_file.gin", "t5x/prompt_finetune.gin"]
parse("t5x/examples/t5/t5_1_1/small.gin", "t5x/own_network_prompt.gin", *run)
print("own", gin.query_parameter("t5x.examples.t5.network.T5Config.emb_dim"))
for size in ("small", "base", "large", "xl", "xxl"):
    files = [f"t5x/t5_1_1_{size}_prompt.gin", *run]
    assert parse(*files) == parse(*files[::-1])
    print(size, gin.query_parameter("prompt_tuning_jax.t5.config.T5Config.emb_dim"))
"""


def test_every_size_is_there_and_the_order_of_the_files_does_not_matter(tmp_path, compiled_once):
    macros = {
        "MODEL_DIR": "run",
        "MIXTURE_OR_TASK_NAME": "demo_reviews",
        "TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 8},
        "INITIAL_CHECKPOINT_PATH": "checkpoint_1100000",
        "TRAIN_STEPS": 1_130_000,
        "PROMPT_FILE": "a.npy",
    }
    bindings = [f"{name} = {value!r}" for name, value in macros.items()]
    script = f"GIN_CONFIGS, MACROS = {str(ROOT / 'gin_configs')!r}, {bindings!r}\n" + PARSE
    code, output = python(["-c", script], tmp_path, compiled_once)
    assert code == 0, output[-4000:]
    found = dict(re.findall(r"(?m)^(\w+) (\d+)$", output))
    assert found == {"own": "512", "small": "512", "base": "768", "large": "1024", "xl": "2048", "xxl": "4096"}
