"""The loss against its definition, and Adafactor against T5X's own trajectories."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_tuning_jax.t5.log_likelihood import token_log_probs
from prompt_tuning_jax.training.loss import cross_entropy
from prompt_tuning_jax.training.optimizer import adafactor, clipped_adamw, warmup_cosine, warmup_linear


def log_softmax(logits):
    logits = logits.astype(np.float64)
    high = logits.max(axis=-1, keepdims=True)
    return logits - high - np.log(np.exp(logits - high).sum(axis=-1, keepdims=True))


@given(
    lengths=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    z_loss=st.sampled_from([0.0, 1e-4, 0.1]),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_cross_entropy_is_its_definition(lengths, z_loss, scale, seed):
    """The sum over target tokens of -log p, plus z_loss times the squared logarithm of the softmax normaliser."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (3, 4, 7)).astype(np.float32)
    targets = np.where(np.arange(4) < np.array(lengths)[:, None], rng.integers(1, 7, (3, 4)), 0).astype(np.int32)
    log_probs = log_softmax(logits)
    loss = extra = correct = 0.0
    for row in range(3):
        for place in range(lengths[row]):
            token = targets[row, place]
            normaliser = logits[row, place, token] - log_probs[row, place, token]
            extra += z_loss * normaliser**2
            loss += z_loss * normaliser**2 - log_probs[row, place, token]
            correct += logits[row, place].argmax() == token
    sums = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), 0, z_loss)
    np.testing.assert_allclose(sums.loss, loss, rtol=2e-6, atol=1e-5)
    np.testing.assert_allclose(sums.z_loss, extra, rtol=2e-6)
    assert (sums.tokens, sums.correct) == (sum(lengths), correct)

    expected = np.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0] * (targets > 0)
    found = token_log_probs(jnp.asarray(logits), jnp.asarray(targets), 0)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-5)


def test_padding_has_no_gradient():
    """Nothing is learned from what the model says after a target's end."""
    logits = jax.random.normal(jax.random.key(0), (2, 4, 5))
    targets = jnp.array([[3, 1, 0, 0], [1, 0, 0, 0]])
    gradient = jax.grad(lambda logits: cross_entropy(logits, targets, 0).loss)(logits)
    np.testing.assert_array_equal(np.abs(gradient).max(axis=-1) > 0, targets > 0)


def trajectory(optimizer, parameter, gradients):
    state = optimizer.init(parameter)

    @jax.jit
    def step(parameter, state, gradient):
        updates, state = optimizer.update(gradient, state, parameter)
        return optax.apply_updates(parameter, updates), state

    for gradient in gradients:
        parameter, state = step(parameter, state, gradient)
        yield np.asarray(parameter)


@pytest.mark.parametrize("start", [0, 1_100_000])
@pytest.mark.parametrize("rules", ["heuristic", "upstream_rules"])
def test_adafactor_is_t5x(t5x_adafactor, rules, start):
    """The paper's settings, from a fresh optimiser and from the LM-adapted base's step, where the second moment
    averages over a million steps that were never made. T5X's factoring rules and its heuristic agree on a prompt."""
    found = trajectory(
        adafactor(0.3, start_step=start), jnp.asarray(t5x_adafactor["p20x32:init"]), t5x_adafactor["p20x32:grads"]
    )
    for ours, theirs in zip(found, t5x_adafactor[f"p20x32:{rules}:start{start}:traj"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


def test_updates_of_a_late_start_have_the_size_of_the_learning_rate(t5x_adafactor):
    """From step 1,100,000 every early update is clipped to a root mean square of exactly the learning rate."""
    start = jnp.asarray(t5x_adafactor["p20x32:init"])
    optimizer = adafactor(0.3, start_step=1_100_000, weight_decay=0.0)
    before = np.asarray(start)
    for after in trajectory(optimizer, start, t5x_adafactor["p20x32:grads"]):
        np.testing.assert_allclose(np.sqrt(np.mean((after - before) ** 2)), 0.3, rtol=1e-5)
        before = after


def test_weight_decay_is_not_scaled_by_the_learning_rate():
    """T5X takes the share off as it is; a gradient of 0 shows it alone."""
    parameter = jnp.full((3, 4), 2.0)
    (after,) = trajectory(adafactor(0.3, weight_decay=0.01), parameter, [jnp.zeros((3, 4))])
    np.testing.assert_allclose(after, 2.0 * 0.99, rtol=1e-6)


def test_large_matrices_keep_factored_moments():
    """Two dimensions of 128 and more: the definition (Shazeer and Stern 2018, algorithm 4), with parameter scaling as
    in pre-training, written out in float64."""
    rng = np.random.default_rng(0)
    parameter = rng.normal(0, 0.05, (128, 130))
    gradients = rng.normal(0, 1, (4, 128, 130)) * rng.uniform(0.1, 2, (128, 1))
    optimizer = adafactor(0.01, weight_decay=0.0, parameter_scale=True)
    state = optimizer.init(jnp.asarray(parameter, jnp.float32))
    assert max(leaf.size for leaf in jax.tree.leaves(state)) == 130

    rows, columns = np.zeros(128), np.zeros(130)
    found = trajectory(optimizer, jnp.asarray(parameter, jnp.float32), jnp.asarray(gradients, jnp.float32))
    for step, (gradient, ours) in enumerate(zip(gradients, found, strict=True), start=1):
        decay = 1 - step**-0.8
        rows = decay * rows + (1 - decay) * np.mean(gradient**2, axis=1)
        columns = decay * columns + (1 - decay) * np.mean(gradient**2, axis=0)
        update = gradient / np.sqrt(np.outer(rows, columns) / rows.mean())
        update /= max(1.0, np.sqrt(np.mean(update**2)))
        parameter = parameter - 0.01 * max(1e-3, np.sqrt(np.mean(parameter**2))) * update
        np.testing.assert_allclose(ours, parameter, rtol=0, atol=1e-6 * np.abs(parameter).max())


def test_schedule_rises_and_falls():
    schedule = warmup_cosine(0.01, 1_000, warmup=0.1, floor=0.2)
    assert float(schedule(0)) == 0
    assert float(schedule(50)) == pytest.approx(0.005, rel=1e-6)
    assert float(schedule(100)) == pytest.approx(0.01, rel=1e-6)
    assert float(schedule(550)) == pytest.approx(0.006, rel=1e-5)
    assert float(schedule(1_000)) == pytest.approx(0.002, rel=1e-6)
    assert float(warmup_cosine(0.01, 1)(1)) > 0  # a run of one step


def test_warmup_linear_is_transformers_schedule():
    """The rise as a number of steps and as a share; its end is 0, and stays there."""
    expected = [0, 0.15, 0.3, 0.45, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0, 0]
    for warmup in (4, 0.4):
        found = [float(warmup_linear(0.6, 10, warmup)(step)) for step in range(12)]
        np.testing.assert_allclose(found, expected, atol=1e-7)
    found = [float(warmup_linear(0.6, 6)(step)) for step in range(8)]
    np.testing.assert_allclose(found, [0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0, 0], atol=1e-7)


def test_clipped_adamw_is_torchs():
    """AdamW after clip_grad_norm_, with gradients on both sides of the limit."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in {"a": (3, 4), "b": (5,)}.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    torchs = torch.optim.AdamW(theirs.values(), lr=0.3, weight_decay=1e-2)
    ours, optimizer = jax.tree.map(jnp.asarray, start), clipped_adamw(0.3, weight_decay=1e-2, clip_norm=1.0)
    state = optimizer.init(ours)
    for size in (0.01, 3.0, 0.1, 1.0):
        gradients = {name: (size * rng.normal(size=value.shape)).astype(np.float32) for name, value in start.items()}
        for name, value in gradients.items():
            theirs[name].grad = torch.tensor(value)
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        torchs.step()
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradients), state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value.detach().numpy(), atol=1e-5)
