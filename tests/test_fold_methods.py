"""Methods that end as one prompt: their formulas, their gradients, what they train and what they draw."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, random_params

from experiments.sizes import SIZES
from prompt_tuning_jax.checkpoints.base import expected_shapes
from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.methods.low_rank_prompt import LowRankPrompt
from prompt_tuning_jax.methods.lstm_prompt import LSTMPrompt
from prompt_tuning_jax.methods.mlp_prompt import MLPPrompt
from prompt_tuning_jax.methods.scale_shift_prompt import ScaleShiftPrompt
from prompt_tuning_jax.methods.shapes import ShapeModel, start_shapes
from prompt_tuning_jax.methods.super_pos import SuperPos
from prompt_tuning_jax.methods.ulpt import ULPT
from prompt_tuning_jax.t5.quantized import TABLE, embedding_table, quantized

# What peft asks of transformers, which has another name for it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PARAMS = {path: jnp.asarray(value) for path, value in random_params(0).items()}
WIDTH, LENGTH = CONFIG.emb_dim, 5
MODEL = ShapeModel(CONFIG, PARAMS)
BASE = ShapeModel(SIZES["base"], {TABLE: jnp.zeros((1, 768))})


def of_low_rank(p, method):
    return np.array([[sum(p["a"][i, k] * p["b"][k, j] for k in range(3)) for j in range(WIDTH)] for i in range(LENGTH)])


def of_ulpt(p, method):
    """Equation by equation, with R drawn as Xavier uniform from NumPy's own generator."""
    limit = np.sqrt(6 / (3 + WIDTH))
    r = np.random.RandomState(4).uniform(-limit, limit, (3, WIDTH)).astype(np.float32).astype(np.float64)
    prompt = np.empty((LENGTH, WIDTH))
    for i in range(LENGTH):
        for j in range(WIDTH):
            prompt[i, j] = sum(p["z"][i, k] * r[k, j] for k in range(3)) * p["scale"][j] + p["shift"][j]
    return prompt


def of_super_pos(p, method):
    """p_i = (E + dE_i) w_i, with E and dE_i as [D, m]."""
    e = np.asarray(PARAMS[TABLE], np.float64)[method.token_ids()].T
    return np.stack([(e + p["change"][i].T) @ p["weights"][i] for i in range(LENGTH)])


def of_scale_shift(p, method):
    return np.stack([row * p["scale"] + p["shift"] for row in p["prompt"]])


@functools.cache
def peft_encoder(kind, **settings):
    """PEFT's network in double precision."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.set_num_threads(1)
    sizes = {"num_virtual_tokens": LENGTH, "token_dim": WIDTH, "num_layers": 1, "num_attention_heads": 2}
    common = {"peft_type": "P_TUNING", "task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 1}
    config = peft.PromptEncoderConfig(encoder_reparameterization_type=kind, **common, **sizes, **settings)
    return peft.PromptEncoder(config).double()


def run_peft(encoder, weights):
    import torch

    encoder.load_state_dict({name: torch.tensor(np.ascontiguousarray(value)) for name, value in weights.items()})
    with torch.no_grad():
        return encoder(torch.arange(LENGTH)[None])[0].numpy()


def of_mlp(p, method):
    weights = {"embedding.weight": p["prompt"]}
    for place, name in enumerate(("first", "second", "third")):
        weights |= {f"mlp_head.{2 * place}.weight": p[name].T, f"mlp_head.{2 * place}.bias": p[f"{name}_bias"]}
    return run_peft(peft_encoder("MLP", encoder_hidden_size=6), weights)


def of_lstm(p, method):
    weights = {"embedding.weight": p["prompt"]}
    for place, name in ((0, "up"), (2, "down")):
        weights |= {f"mlp_head.{place}.weight": p[name].T, f"mlp_head.{place}.bias": p[f"{name}_bias"]}
    for layer in range(method.lstm_layers):
        for direction, ending in (("forwards", ""), ("backwards", "_reverse")):
            ours, end = f"lstm_{layer}_{direction}", f"l{layer}{ending}"
            weights[f"lstm_head.weight_ih_{end}"] = p[f"{ours}_input"].T
            weights[f"lstm_head.weight_hh_{end}"] = p[f"{ours}_hidden"].T
            weights[f"lstm_head.bias_ih_{end}"] = p[f"{ours}_bias"]
            weights[f"lstm_head.bias_hh_{end}"] = np.zeros_like(p[f"{ours}_bias"])
    return run_peft(peft_encoder("LSTM", encoder_hidden_size=6, encoder_num_layers=method.lstm_layers), weights)


LSTM_PARTS = {f"{way}_{part}" for way in ("forwards", "backwards") for part in ("input", "hidden", "bias")}
LINEAR_PARTS = {"up", "up_bias", "down", "down_bias"}
# Each method with its oracle and the names of what it trains.
CASES = {
    "LowRankPrompt": (LowRankPrompt(LENGTH, 3), of_low_rank, {"a", "b"}),
    "ULPT": (ULPT(LENGTH, 3, projection_seed=4), of_ulpt, {"z", "scale", "shift"}),
    "SuperPos": (SuperPos(LENGTH, 7, population=300, token_seed=2), of_super_pos, {"weights", "change"}),
    "ScaleShiftPrompt": (ScaleShiftPrompt(LENGTH), of_scale_shift, {"prompt", "scale", "shift"}),
    "MLPPrompt": (
        MLPPrompt(LENGTH, 6),
        of_mlp,
        {"prompt", *(f"{layer}{bias}" for layer in ("first", "second", "third") for bias in ("", "_bias"))},
    ),
    "LSTMPrompt": (
        LSTMPrompt(LENGTH, 6, 2),
        of_lstm,
        {"prompt", *LINEAR_PARTS, *(f"lstm_{layer}_{part}" for layer in (0, 1) for part in LSTM_PARTS)},
    ),
    "LSTMPrompt of one layer": (
        LSTMPrompt(LENGTH, 6, 1),
        of_lstm,
        {"prompt", *LINEAR_PARTS, *(f"lstm_0_{part}" for part in LSTM_PARTS)},
    ),
}
CASE = pytest.mark.parametrize("name", CASES)


def trained_by(method, seed=2):
    """Trainable parameters away from their start, where a wrong formula would not show."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(value, jnp.float32) + 0.3 * rng.normal(size=value.shape).astype(np.float32)
        for name, value in method.init(jax.random.key(1), MODEL).items()
    }


def doubles(trained):
    return {name: np.asarray(value, np.float64) for name, value in trained.items()}


@CASE
def test_the_formula(name):
    method, oracle, _ = CASES[name]
    trained = trained_by(method)
    found = method.apply(trained, PARAMS)
    expected = oracle(doubles(trained), method)
    assert found.prompt.shape == (LENGTH, WIDTH) and found.layer_prompts is None and not found.parameters
    np.testing.assert_allclose(found.prompt, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@CASE
def test_the_gradient_is_that_of_the_formula_and_reaches_all_that_is_trained(name):
    """Against central differences of the oracle in double precision, along a random direction of each parameter."""
    method, oracle, names = CASES[name]
    trained, rng = trained_by(method), np.random.default_rng(3)
    assert trained.keys() == names
    of_prompt = rng.normal(size=(LENGTH, WIDTH))
    found = jax.jit(jax.grad(lambda trained: jnp.sum(method.apply(trained, PARAMS).prompt * of_prompt)))(trained)
    for part in names:
        direction = rng.normal(size=trained[part].shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = doubles(trained)
            moved[part] = moved[part] + step * direction
            ends.append(np.sum(oracle(moved, method) * of_prompt))
        expected = (ends[0] - ends[1]) / 2e-5
        size = np.linalg.norm(found[part]) * np.linalg.norm(direction)
        assert size > 0
        assert np.sum(found[part] * direction) == pytest.approx(expected, abs=2e-6 * size), part


def test_the_number_of_trained_parameters_is_the_formulas():
    config = SIZES["base"]
    p, d, v = 100, 768, {path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in expected_shapes(config).items()}
    assert config.emb_dim == d

    def count(method):
        return sum(value.size for value in start_shapes(method, config, v)[0].values())

    assert count(LowRankPrompt(p, 10)) == 10 * (p + d)
    assert count(ULPT(p, 64)) == 64 * p + 2 * d
    assert count(SuperPos(10, 128)) == 10 * 128 * (d + 1)
    assert count(ScaleShiftPrompt(p)) == p * d + 2 * d
    assert count(MLPPrompt(20, 128)) == 20 * d + (d * 128 + 128) + (128 * 128 + 128) + (128 * d + d)
    gates = 4 * 128
    layers = 2 * (d * gates + 128 * gates + gates) + 2 * (2 * 128 * gates + 128 * gates + gates)
    linear = (256 * 256 + 256) + (256 * d + d)
    assert count(LSTMPrompt(20, 128)) == 20 * d + layers + linear


@pytest.mark.parametrize("kind, method", [("MLP", MLPPrompt(LENGTH, 6)), ("LSTM", LSTMPrompt(LENGTH, 6))])
def test_p_tuning_trains_what_peft_trains(kind, method):
    """As many numbers, but for the LSTM's second biases; and what is drawn is drawn from the same ranges."""
    theirs = dict(peft_encoder(kind, encoder_hidden_size=6).named_parameters())
    ours = method.init(jax.random.key(0), MODEL)
    counted = sum(value.numel() for name, value in theirs.items() if "bias_hh" not in name)
    assert sum(value.size for value in ours.values()) == counted
    bounds = {
        "lstm": 6**-0.5,
        "up": 12**-0.5,
        "down": 12**-0.5,
        "first": WIDTH**-0.5,
        "second": 6**-0.5,
        "third": 6**-0.5,
    }
    for name, value in ours.items():
        if name != "prompt":
            bound = bounds[name.partition("_")[0]]
            assert 0.5 * bound < np.abs(value).max() <= bound, name


def test_a_low_rank_prompt_starts_as_the_authors_factors():
    """Uniform over [-0.5, 0.5), both of them."""
    trained = LowRankPrompt(400, 200).init(jax.random.key(0), BASE)
    for value in trained.values():
        assert -0.5 <= value.min() < -0.49 and 0.49 < value.max() < 0.5 and abs(value.mean()) < 0.01


def test_a_low_rank_prompt_has_its_rank():
    prompt = LowRankPrompt(12, 3).apply(trained_by(LowRankPrompt(12, 3)), {}).prompt
    assert np.linalg.matrix_rank(np.asarray(prompt, np.float64), tol=1e-4) == 3


def test_ulpts_projection_depends_on_its_seed_alone():
    one, other = (ULPT(LENGTH, 3, projection_seed=seed) for seed in (0, 1))
    trained = one.init(jax.random.key(0), MODEL)
    again = one.init(jax.random.key(9), MODEL)  # another seed of the run
    assert not np.array_equal(trained["z"], again["z"])
    np.testing.assert_array_equal(one.projection(WIDTH), ULPT(9, 3).projection(WIDTH))
    assert not np.array_equal(one.apply(trained, {}).prompt, other.apply(trained, {}).prompt)
    # The first number of the Mersenne twister at seed 0 is 0.5488...: the numbers may change with no version.
    assert one.projection(WIDTH)[0, 0] == pytest.approx((2 * 0.5488135039273248 - 1) * (6 / (3 + WIDTH)) ** 0.5)


def test_ulpts_projection_is_xavier_uniform_and_z_is_standard_normal():
    method = ULPT(200, 64)
    limit = (6 / (64 + 768)) ** 0.5
    projection = method.projection(768)
    assert projection.shape == (64, 768) and projection.dtype == np.float32
    assert -limit <= projection.min() < -0.999 * limit and 0.999 * limit < projection.max() <= limit
    assert projection.std() == pytest.approx(limit / 3**0.5, rel=0.01)
    trained = method.init(jax.random.key(0), BASE)
    assert trained["z"].std() == pytest.approx(1, rel=0.03) and abs(trained["z"].mean()) < 0.03
    assert (trained["scale"] == 1).all() and (trained["shift"] == 0).all()


def test_super_pos_starts_as_superposed_embeddings():
    """dE is 0, and a position has about the scale of an embedding."""
    method = SuperPos(200, 64, population=300)
    trained = method.init(jax.random.key(0), MODEL)
    assert not trained["change"].any()
    embeddings = np.asarray(PARAMS[TABLE])[method.token_ids()]
    prompt = np.asarray(method.apply(trained, PARAMS).prompt)
    np.testing.assert_allclose(prompt, np.asarray(trained["weights"]) @ embeddings, atol=1e-5)
    assert np.std(prompt) == pytest.approx(np.std(embeddings), rel=0.1)


def test_super_pos_draws_distinct_words():
    """No special token; each of the population is drawn if all are wanted; another seed draws others."""
    assert sorted(SuperPos(3, 297, population=300).token_ids()) == [*range(3, 300)]
    ids = SuperPos(3, 128).token_ids()
    assert len(set(ids)) == 128 and ids.min() >= 3 and 4_500 < ids.max() < 5_000
    np.testing.assert_array_equal(ids, SuperPos(10, 128).token_ids())
    assert set(ids) != set(SuperPos(3, 128, token_seed=1).token_ids())


@pytest.mark.parametrize(
    ("size", "sentinels", "words"),
    [(400, 100, 300), (310, 0, 310), (259, 11, 248)],
    ids=["sentinels", "padding", "bytes"],
)
def test_super_pos_takes_no_sentinel_and_no_padding(size, sentinels, words):
    model = ShapeModel(CONFIG, PARAMS, types.SimpleNamespace(size=size, sentinels=sentinels))
    SuperPos(3, 7, population=words).init(jax.random.key(0), model)
    with pytest.raises(
        SettingError, match=f"`population` is {words + 1}, expected at most {words}: the ids from"
    ) as error:
        SuperPos(3, 7, population=words + 1).init(jax.random.key(0), model)
    assert error.value.setting == "population"


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_super_pos_reads_a_base_of_any_dtype(dtype):
    table = quantized(TABLE, PARAMS[TABLE]) if dtype == "int8" else {TABLE: PARAMS[TABLE].astype(jnp.bfloat16)}
    method = SuperPos(3, 7, population=300)
    found = method.embeddings(table)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, embedding_table(table)[method.token_ids()].astype(jnp.float32))


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        (LowRankPrompt(20, 17), "rank", r"`rank` is 17, expected .* 1 to 16, the smaller side of a prompt of \[20,"),
        (LowRankPrompt(5, 6), "rank", r"`rank` is 6, expected .* 1 to 5, the smaller side of a prompt of \[5, 16\]"),
        (LowRankPrompt(5, 0), "rank", "`rank` is 0, expected"),
        (LowRankPrompt(0, 1), "prompt_length", "`length` is 0, expected a whole number from 1 to"),
        (ULPT(20, 17), "rank", "`rank` is 17, expected a whole number from 1 to 16, the model's d_model"),
        (ULPT(0, 2), "prompt_length", "`length` is 0, expected a whole number from 1 to"),
        (ULPT(5, 2, -1), "projection_seed", "`projection_seed` is -1, expected a whole number from 0 to 4294967295"),
        (SuperPos(5, 298, 300), "tokens", "`tokens` is 298, expected a whole number from 1 to 297, the tokens among"),
        (SuperPos(5, 0, 300), "tokens", "`tokens` is 0, expected"),
        (SuperPos(5, 1, 3), "population", "`population` is 3, expected more than the 3 special tokens"),
        (SuperPos(5), "population", "`population` is 5000, expected a whole number from 1 to 400, the rows of"),
        (SuperPos(0, 7, 300), "prompt_length", "`length` is 0, expected a whole number from 1 to"),
        (SuperPos(5, 7, 300, 2**32), "token_seed", "`token_seed` is 4294967296, expected"),
        (ScaleShiftPrompt(0), "prompt_length", "`length` is 0, expected a whole number from 1 to"),
        (MLPPrompt(5, 0), "hidden_size", "`hidden_size` is 0, expected a whole number of at least 1"),
        (MLPPrompt(0), "prompt_length", "`length` is 0, expected a whole number from 1 to"),
        (LSTMPrompt(5, True), "hidden_size", "`hidden_size` is True, expected a whole number of at least 1"),
        (LSTMPrompt(5, 6, 0), "lstm_layers", "`lstm_layers` is 0, expected a whole number of at least 1"),
        (LSTMPrompt(0), "prompt_length", "`length` is 0, expected a whole number from 1 to"),
    ],
)  # fmt: skip
def test_impossible_fields_are_refused(method, setting, message):
    with pytest.raises(SettingError, match=message) as refused:
        method.check(CONFIG, 32)
    assert refused.value.setting == setting and "\n" not in str(refused.value)


def test_possible_fields_are_taken():
    for method, _, _ in CASES.values():
        method.check(CONFIG, 32)
