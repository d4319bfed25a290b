"""One training step: what it trains, what it leaves alone, and that it does the same again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.models import random_model, random_tokens

from prompt_tuning_jax.batches.loader import Batch
from prompt_tuning_jax.methods.method import Injection, Method, merge
from prompt_tuning_jax.methods.model_tuning import ModelTuning, matching
from prompt_tuning_jax.methods.prompt_tuning import PROMPT, PromptTuning
from prompt_tuning_jax.methods.shapes import ShapeModel
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.log_likelihood import shift_right
from prompt_tuning_jax.t5.quantized import TABLE
from prompt_tuning_jax.training.optimizer import adafactor
from prompt_tuning_jax.training.step import (
    CPU_POSITIONS,
    TrainState,
    batch_loss,
    make_train_step,
    micro_batch_size,
    summed_gradients,
)

# Dimensions of parameters that no activation has.
CONFIG = T5Config(29, 24, 3, 1, 1, 40, head_dim=7, dropout_rate=0.2)


@dataclasses.dataclass(frozen=True)
class Everything(Method):
    """Trains the model and a prompt together."""

    def apply(self, trained, frozen):
        parameters = {path: value for path, value in trained.items() if path != PROMPT}
        return Injection(prompt=trained[PROMPT], parameters=parameters)


PROMPT_TUNING, MODEL_TUNING, BOTH = PromptTuning(5), ModelTuning(), Everything()
OPTIMIZER = adafactor(0.3)
STILL = optax.set_to_zero()


def batch(seed=0):
    rng = np.random.default_rng(seed)
    inputs, targets = random_tokens(rng, [6, 4, 1], 6, 29), random_tokens(rng, [3, 2, 1], 3, 29)
    return Batch(np.asarray(inputs), np.asarray(targets), np.arange(3, dtype=np.int32))


def split(method):
    """What a method trains of the random model and its prompt, and the frozen half."""
    params = dict(random_model(CONFIG, 5)[1])
    prompt = params.pop(PROMPT)
    trained = {} if method == MODEL_TUNING else {PROMPT: prompt}
    return (trained, params) if method == PROMPT_TUNING else (trained | params, {})


def start(method, step=0, optimizer=OPTIMIZER):
    """A state of its own, and the frozen half."""
    trainable, frozen = split(method)
    trainable = {path: jnp.array(value, copy=True) for path, value in trainable.items()}
    key = jax.random.key_data(jax.random.key(1))
    return TrainState(jnp.asarray(step, jnp.int32), trainable, optimizer.init(trainable), key), frozen


@functools.cache
def train_step(method, optimizer=OPTIMIZER):
    return make_train_step(random_model(CONFIG, 5)[0], method, optimizer)


def run(method, steps, step):
    state, frozen = start(method)
    metrics = []
    for number in range(steps):
        state, found = step(state, frozen, batch(number))
        metrics.append(jax.device_get(found))
    return jax.device_get(state), metrics


def test_split_and_merge():
    params = {"a/b/c": jnp.ones(1), "a/bc": jnp.zeros(2), "d": jnp.ones(3)}
    model = ShapeModel(CONFIG, params | {TABLE: jnp.ones((29, 24))})
    trainable = ModelTuning(("a/b/.*", "d")).init(jax.random.key(0), model)
    assert trainable == {"a/b/c": params["a/b/c"], "d": params["d"]}
    merged = merge(trainable, {"a/bc": params["a/bc"]})
    assert merged == {"a": {"b": {"c": params["a/b/c"]}, "bc": params["a/bc"]}, "d": params["d"]}
    other = jnp.ones(7)
    assert merge({"a/bc": other}, params)["a"]["bc"] is other


def test_a_pattern_matches_whole_paths():
    """`encoder/prompt` alone trains nothing: better said than trained for hours."""
    params = {PROMPT: jnp.ones(1), "encoder/encoder_norm/scale": jnp.ones(1)}
    with pytest.raises(ValueError, match=r"no parameter's path matches 'encoder/promt/\.\*'; paths are like 'encoder/"):
        matching(params, ["encoder/promt/.*"])
    with pytest.raises(ValueError, match="'prompt'"):
        matching(params, ["encoder/.*", "prompt"])
    assert matching(params, ["encoder/prompt/.*"]) == {PROMPT}


def test_decoder_inputs_are_the_targets_one_later():
    np.testing.assert_array_equal(shift_right(jnp.array([[4, 5, 1], [6, 1, 0]]), 0), [[0, 4, 5], [0, 6, 1]])


def weight_gradients(method):
    """How many matmuls of the step make something of the shape of a weight matrix."""
    state, frozen = start(method)
    shapes = {value.shape for path, value in (frozen | state.trainable).items() if path.endswith("/kernel")}
    written = {f"tensor<{a}x{b}xf32>" for shape in shapes for a, b in (shape, shape[::-1])}
    program = train_step(method).lower(state, frozen, batch()).as_text()
    results = [line.rsplit("->", 1)[1].strip() for line in program.splitlines() if "stablehlo.dot_general" in line]
    return sum(any(result.startswith(shape) for shape in written) for result in results)


def test_frozen_weights_cost_no_gradient():
    """A frozen matrix is multiplied with, forward and back, but its own gradient is nowhere in the program."""
    assert weight_gradients(PROMPT_TUNING) == 0
    kernels = [path for path in random_model(CONFIG, 5)[1] if path.endswith("/kernel")]
    assert weight_gradients(MODEL_TUNING) == weight_gradients(BOTH) == len(kernels) == 19


def test_prompt_tuning_moves_the_prompt_alone():
    state, frozen = start(PROMPT_TUNING)
    before, prompt = jax.device_get(frozen), np.array(state.trainable[PROMPT])
    old = state
    for number in range(3):
        state, metrics = train_step(PROMPT_TUNING)(state, frozen, batch(number))
    assert state.trainable.keys() == {PROMPT}
    assert np.abs(state.trainable[PROMPT] - prompt).min() > 0
    assert metrics.gradient_norm > 0
    for path, value in before.items():
        np.testing.assert_array_equal(frozen[path], value, err_msg=path)
    # The new state is written where the old one was; the frozen half is read again and again, and never copied.
    assert old.trainable[PROMPT].is_deleted()
    assert not any(value.is_deleted() for value in frozen.values())
    # What a checkpoint holds: the prompt, its second moment, and a handful of numbers.
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) < 2 * prompt.nbytes + 100


def test_prompt_tuning_gives_the_same_bits_again():
    """Two runs with dropout, compiled apart, as after a restart."""
    compiled_again = make_train_step(random_model(CONFIG, 5)[0], PROMPT_TUNING, OPTIMIZER)
    first, second = run(PROMPT_TUNING, 2, train_step(PROMPT_TUNING)), run(PROMPT_TUNING, 2, compiled_again)
    assert int(first[0].step) == 2
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", [MODEL_TUNING, BOTH], ids=["model", "model and prompt"])
def test_model_tuning_moves_everything_and_the_same_way_again(method):
    first, second = run(method, 2, train_step(method)), run(method, 2, train_step(method))
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, other)
    for path, value in split(method)[0].items():
        assert not np.array_equal(first[0].trainable[path], value), path


def test_dropout_is_a_function_of_run_and_step():
    """Another mask each step, and the same one when a run comes back to that step."""

    def loss(number, key=1):
        state, frozen = start(PROMPT_TUNING, number, STILL)
        state = state._replace(key=jax.random.key_data(jax.random.key(key)))
        return float(train_step(PROMPT_TUNING, STILL)(state, frozen, batch())[1].sums.loss)

    assert len({loss(0), loss(1), loss(7), loss(0, key=2)}) == 4
    assert loss(7) == loss(7)

    state, frozen = start(PROMPT_TUNING, 0, STILL)  # nothing moves, so only dropout can make a difference
    state, _ = train_step(PROMPT_TUNING, STILL)(state, frozen, batch())
    _, metrics = train_step(PROMPT_TUNING, STILL)(state, frozen, batch())
    assert float(metrics.sums.loss) == loss(1)


@pytest.mark.parametrize("method", [PROMPT_TUNING, MODEL_TUNING, BOTH], ids=["prompt", "model", "model and prompt"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_divided_batch_has_the_gradient_of_the_whole(method, rows):
    """Dropout and all: a row's bits are its own. The model is traced once for all parts."""
    model = random_model(CONFIG, 5)[0]
    trainable, frozen = split(method)
    rng = np.random.default_rng(3)
    inputs, targets = random_tokens(rng, [6, 4, 1, 5, 6, 2], 6, 29), random_tokens(rng, [3, 2, 1, 3, 1, 2], 3, 29)
    traced = []

    def loss(injection, inputs, targets, numbers):
        traced.append(len(inputs))
        sums = batch_loss(model, injection, frozen, inputs, targets, jax.random.key(0), row_numbers=numbers)
        return sums.loss, sums

    injection = method.apply(trainable, frozen)
    whole, sums = summed_gradients(loss, injection, inputs, targets, 6)
    parts, sums_of_parts = summed_gradients(loss, injection, inputs, targets, rows)
    assert traced == [6, rows]
    assert len(jax.tree.leaves(whole)) == len(trainable)
    for (place, gradient), part in zip(jax.tree.leaves_with_path(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(part, gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=str(place))
    np.testing.assert_allclose(sums_of_parts, sums, rtol=1e-6)


@pytest.mark.parametrize(
    ("batch_size", "length", "rows"), [(32, 128, 4), (32, 28, 8), (7, 128, 1), (6, 924, 1), (3, 8, 3)]
)
def test_a_cpu_divides_a_batch_evenly_into_passes_of_at_most_its_positions(batch_size, length, rows):
    assert micro_batch_size((batch_size, length), 100) == rows
    assert rows == 1 or rows * (100 + length) <= CPU_POSITIONS
    assert micro_batch_size((32, length), 100, num_microbatches=2) == 16
