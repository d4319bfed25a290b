"""A base held as int8: what stands in memory, how near it is to the base in floats, and that prompts train on it."""

import dataclasses
import functools
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from prompt_tuning_jax.batches.loader import Batch
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.base import fingerprint, load_base, open_model, open_vocabulary
from prompt_tuning_jax.checkpoints.model import Model
from prompt_tuning_jax.gin_files import parse
from prompt_tuning_jax.inference.predictor import Predictor
from prompt_tuning_jax.methods.ia3 import IA3
from prompt_tuning_jax.methods.lora import LoRA
from prompt_tuning_jax.methods.method import Injection, Method
from prompt_tuning_jax.methods.model_tuning import ModelTuning
from prompt_tuning_jax.methods.per_layer_prompt import PerLayerPrompt
from prompt_tuning_jax.methods.prefix_tuning import PrefixTuning
from prompt_tuning_jax.methods.prompt_tuning import PROMPT, PromptTuning
from prompt_tuning_jax.methods.residual_prompt import ResidualPrompt
from prompt_tuning_jax.methods.shapes import ShapeModel, check_not_int8
from prompt_tuning_jax.methods.super_pos import SuperPos
from prompt_tuning_jax.prompts.files import read_prompt, write_prompt
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.kernels import quantized_matmul
from prompt_tuning_jax.t5.log_likelihood import shift_right
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.t5.quantized import TABLE, embedding_table, output_axis, quantized, scale_path
from prompt_tuning_jax.training.memory_plan import plan, start_shapes
from prompt_tuning_jax.training.run import Run, TrainConfig
from prompt_tuning_jax.training.step import TrainState, make_train_step

NANO = open_model("nano").config
TEXTS = [
    "sentence: a joy from the first scene to the last, and the actors know it",
    "sentence: two hours that i will never get back",
    "review: It was made with little money and much love. The plot has holes, but who cares?",
    "The committee will meet again on Tuesday to discuss the budget of the city's schools.",
]
ANSWERS = ["positive", "negative", "good", "the council"]


def nbytes(params):
    return sum(value.nbytes for value in params.values())


def floats(params):
    """The matrices that an int8 base stands for."""
    found = {}
    for path, value in params.items():
        if (scale := params.get(scale_path(path))) is not None:
            found[path] = value.astype(jnp.float32) * jnp.expand_dims(scale, 1 if path == TABLE else 0)
        elif not path.endswith("_scale"):
            found[path] = value
    return found


@functools.cache
def nano(dtype):
    return load_base("nano", NANO, dtype)


@functools.cache
def batch():
    words = open_vocabulary(None, "nano", NANO)

    def rows(texts):
        ids = [[*words.encode(text), 1] for text in texts]
        return np.array([row + [0] * (max(map(len, ids)) - len(row)) for row in ids], np.int32)

    return rows(TEXTS), rows(ANSWERS)


def logits(config, params, inputs, targets, **more):
    return jax.jit(functools.partial(Transformer(config).apply, enable_dropout=False))(
        {"params": unflatten_dict(params, sep="/")}, inputs, shift_right(jnp.asarray(targets), 0), targets, **more
    )


def cosine(one, other):
    one, other = (np.asarray(x, np.float64).ravel() for x in (one, other))
    return one @ other / np.sqrt((one @ one) * (other @ other))


def random_model(config):
    tokens = jnp.ones((1, 2), jnp.int32)
    tree = Transformer(config).init(jax.random.key(1), tokens, tokens, tokens, enable_dropout=False)["params"]
    return flatten_dict(tree, sep="/")


@pytest.fixture(params=[False, True], ids=["own", "tied"])
def tiny(request, tiny_config, tmp_path):
    """A size, and a folder with a base of it; its logits through the embedding table or not."""
    config = T5Config(**vars(tiny_config) | {"logits_via_embedding": request.param})
    huggingface.write(tmp_path / "base", config, random_model(config))
    return config, str(tmp_path / "base")


@pytest.mark.parametrize("path", ["decoder/logits_dense/kernel", TABLE])
def test_an_entry_is_within_half_a_scale_of_its_own_value(path):
    """And so are outputs that are all zero, or of very different sizes; the largest entries are exact."""
    matrix = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    matrix = matrix * np.logspace(-30, 30, 30).astype(np.float32)
    matrix[:, 3], matrix[:, 4] = 0, 1e-40
    found = quantized(path, jnp.asarray(matrix if output_axis(path) == 1 else matrix.T))
    values, scale = np.asarray(found[path], np.float64), np.asarray(found[scale_path(path)])
    assert found[path].dtype == jnp.int8 and scale.dtype == np.float32 and scale.shape == (30,)
    values = values if output_axis(path) == 1 else values.T
    assert np.abs(values).max() == 127 and (values[:, 3] == 0).all()
    # A quotient near half of two integers may be rounded to float32 across it.
    assert (np.abs(values * scale - matrix) <= scale * (0.5 + 1e-5)).all()
    assert (np.abs(values).max(0)[np.abs(matrix).max(0) > 1e-30] == 127).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_and_its_gradient_are_those_of_the_matrix(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 5, 24)).astype(dtype)
    found = quantized("a/kernel", jax.random.normal(keys[1], (24, 40)))
    kernel, scale = found["a/kernel"], found["a/kernel_scale"]
    whole = np.asarray(kernel, np.float64) * np.asarray(scale)
    gradient = jax.random.normal(keys[2], (2, 5, 40)).astype(dtype)
    value, pull = jax.vjp(lambda x: quantized_matmul(x, kernel, scale, dtype), x)
    (of_x,) = pull(gradient)
    assert value.dtype == of_x.dtype == dtype
    wanted, wanted_of_x = np.asarray(x, np.float64) @ whole, np.asarray(gradient, np.float64) @ whole.T
    # float32: of the sum. bfloat16: the result's own half of a last place, and that of the scaled gradient before it.
    within = 1e-6 if dtype == jnp.float32 else 2**-8
    for ours, exact in ((value, wanted), (of_x, wanted_of_x)):
        assert np.abs(np.asarray(ours, np.float64) - exact).max() <= within * np.abs(exact).max()


def test_the_model_is_that_of_the_matrices(tiny):
    """Logits and the prompt's gradient, against the same network with the dequantised matrices in floats."""
    config, folder = tiny
    base = load_base(folder, config, "int8")
    rng = np.random.default_rng(0)
    inputs, targets = (rng.integers(2, config.vocab_size, shape, np.int32) for shape in ((3, 9), (3, 4)))
    prompt = jnp.asarray(rng.normal(size=(5, config.emb_dim)), jnp.float32)

    def loss(prompt, params):
        return jnp.sum(logits(config, params, inputs, targets, prompt=prompt) ** 2)

    (found, of_found), (wanted, of_wanted) = (
        jax.value_and_grad(loss)(prompt, params) for params in (base.params, floats(base.params))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert np.abs(of_found - of_wanted).max() <= 1e-4 * np.abs(of_wanted).max()  # 4 layers of float32 sums


def test_what_stands_in_memory(tiny):
    config, folder = tiny
    base, whole = load_base(folder, config, "int8"), load_base(folder, config)
    matrices = [path for path, value in whole.params.items() if path.endswith("/kernel") or path == TABLE]
    assert set(base.params) == set(whole.params) | {scale_path(path) for path in matrices}
    for path, value in whole.params.items():
        if path in matrices:
            assert base.params[path].dtype == jnp.int8 and base.params[path].shape == value.shape
            scale = base.params[scale_path(path)]
            assert scale.dtype == jnp.float32 and scale.shape == (value.shape[0 if path == TABLE else 1],)
        else:
            np.testing.assert_array_equal(base.params[path], value)


def test_a_base_has_one_fingerprint():
    """That of the file: a prompt's base is known whatever dtype it is held in, and another base is another."""
    assert nano("int8").fingerprint == nano("bfloat16").fingerprint == nano("float32").fingerprint
    assert fingerprint(nano("int8").params) != nano("int8").fingerprint  # of what stands in memory


def test_bytes_and_logits_of_the_embedded_base():
    """Real weights and real text, with the bounds that an int8 base is to keep."""
    assert nbytes(nano("int8").params) <= 0.55 * nbytes(nano("bfloat16").params)
    found, wanted = (logits(NANO, nano(dtype).params, *batch()) for dtype in ("int8", "float32"))
    assert found.dtype == jnp.float32
    assert cosine(found, wanted) >= 0.999
    of_bfloat16 = T5Config(**vars(NANO) | {"dtype": "bfloat16"})
    assert cosine(logits(of_bfloat16, nano("int8").params, *batch()), wanted) >= 0.999


def test_the_embedding_table_in_floats():
    table, whole = embedding_table(nano("int8").params), nano("float32").params[TABLE]
    assert table.dtype == jnp.float32 and table.shape == whole.shape
    assert (np.abs(table - whole) <= 0.5 * np.abs(whole).max(1, keepdims=True) / 127 * (1 + 1e-5)).all()
    assert embedding_table(nano("float32").params) is whole


def words_100_on(key, length, model):
    """The same prompt for a base model in any dtype."""
    return embedding_table(nano("float32").params)[100 : 100 + length]


@pytest.mark.parametrize(
    ("method", "rate"),
    [
        (PromptTuning(8, words_100_on), 0.1),
        (ResidualPrompt(8, 16, words_100_on), 0.1),
        (SuperPos(8, 32), 0.1),  # reads rows of the table in every step
        (PerLayerPrompt(8, words_100_on), 0.1),
        (PrefixTuning(8), 0.1),
        (LoRA(4), 0.01),
        (IA3(), 0.1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Method) else None,
)
def test_every_method_but_model_tuning_trains_on_it(method, rate):
    """The loss falls, the first gradient is nearly that of floats, and the base is what it was."""
    optimizer = optax.adam(rate)
    step = make_train_step(Transformer(NANO), method, optimizer)
    inputs, targets = batch()
    losses, first = {}, {}
    for dtype in ("int8", "float32"):
        params, before = nano(dtype).params, fingerprint(nano(dtype).params)
        trained = method.init(jax.random.key(0), ShapeModel(NANO, params))
        key = jax.random.key_data(jax.random.key(0))
        state = TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), key)
        losses[dtype] = []
        for number in range(8):
            state, metrics = step(state, params, Batch(inputs, targets, np.arange(len(inputs))))
            losses[dtype].append(float(metrics.sums.loss))
            if not number:
                moments: Any = state.opt_state
                first[dtype] = np.concatenate([np.ravel(x) for x in moments[0].mu.values()])  # gradients times 1 - b1
        assert fingerprint(params) == before
    assert losses["int8"][-1] < 0.8 * losses["int8"][0]
    assert losses["int8"][0] == pytest.approx(losses["float32"][0], rel=0.02)
    assert cosine(first["int8"], first["float32"]) > 0.99


def test_one_prompt_file_for_every_dtype(tmp_path):
    """A prompt file says nothing of dtypes, and rows of a predictor are answered with it."""
    prompt = np.asarray(nano("float32").params[TABLE][100:108], np.float32)
    write_prompt(tmp_path / "words.npy", prompt)
    np.testing.assert_array_equal(read_prompt(tmp_path / "words.npy"), prompt)
    rows = [{"prompt": "words", "inputs": text, "labels": ["positive", "negative"]} for text in TEXTS]
    answers = {
        dtype: [*Predictor.load("nano", tmp_path, dtype=dtype, input_length=32, batch_size=4).predict(rows)]
        for dtype in ("int8", "float32")
    }
    found, wanted = ([answer["scores"]["positive"] for answer in answers[dtype]] for dtype in ("int8", "float32"))
    np.testing.assert_allclose(found, wanted, rtol=0.05)
    assert found != wanted


def test_sharing_a_pass_keeps_one_kernel():
    """Mapped over runs, the product has the kernel once: one product of all their rows."""
    x = jnp.ones((3, 4, 8))
    mapped = jax.vmap(lambda x: quantized_matmul(x, jnp.ones((8, 6), jnp.int8), jnp.ones(6), jnp.float32))
    shapes = [str(equation) for equation in jax.make_jaxpr(mapped)(x).eqns]
    assert "f32[8,6]" in str(shapes) and "3,8,6" not in str(shapes)
    np.testing.assert_array_equal(mapped(x), jnp.full((3, 4, 6), 8.0))


def test_only_a_prompt_is_trained_on_it(tiny):
    config, folder = tiny
    params = load_base(folder, config, "int8").params
    check_not_int8({PROMPT: None}, params)
    check_not_int8({"encoder/layers_0/attention/query/lora_a": None}, params)
    check_not_int8(params, load_base(folder, config).params)
    with pytest.raises(ValueError, match=r"encoder/encoder_norm/scale is .* int8.*: set `dtype` to 'float32'") as e:
        check_not_int8({PROMPT: None, "encoder/encoder_norm/scale": None}, params)
    assert "\n" not in str(e.value)


def run_of(tmp_path):
    """The demo's run on the embedded base as int8, as `train` makes it."""
    macros = [f"--gin.MODEL_DIR='{tmp_path}/run'", "--gin.BASE_DTYPE='int8'", "--gin.PROMPT_LENGTH=4"]
    with gin.unlock_config():
        gin.clear_config()
        parse(["--gin_file=runs/demo.gin", *macros])
        return gin.get_configurable(TrainConfig)()


def test_a_prompt_starts_from_the_words_of_it(tmp_path):
    """Class labels: the mean of the rows that their pieces have in floats."""
    config = run_of(tmp_path)
    words = open_vocabulary(None, "nano", NANO)
    model = Model("nano", NANO, nano("int8").params, words, nano("int8").fingerprint)
    prompt = config.method.init(jax.random.key(0), model)[PROMPT]
    table = embedding_table(nano("int8").params)
    for row, label in zip(prompt, ("negative", "positive"), strict=False):
        np.testing.assert_allclose(row, table[np.array(words.encode(label))].mean(0), rtol=1e-6)
    assert prompt.dtype == jnp.float32


@dataclasses.dataclass(frozen=True)
class ScaledQuery(Method):
    """Replaces a matrix of the base model, and trains none of its parameters."""

    def init(self, key, model):
        return {"factor": jnp.ones(())}

    def apply(self, trained, frozen):
        path = "encoder/layers_0/attention/query/kernel"
        return Injection(parameters={path: trained["factor"] * frozen[path]})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (ModelTuning(), "is to be trained, but the base model is int8, which is only read: set `dtype` to 'float32'"),
        (ModelTuning((".*layer_norm/scale",)), "scale is to be trained, but the base model is int8"),
        (ScaledQuery(), "ScaledQuery replaces encoder/layers_0/.*/kernel, but the base model is int8"),
    ],
    ids=["model", "norms", "replaced"],
)
def test_a_run_that_changes_the_base_is_refused_before_it_begins(tmp_path, method, message):
    config = dataclasses.replace(run_of(tmp_path), method=method)
    words = open_vocabulary(None, "nano", NANO)
    with pytest.raises(ValueError, match=message) as error:
        Run(config, config.open_folder(), Model("nano", NANO, nano("int8").params, words, nano("int8").fingerprint))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=message):
        plan(config)


def test_its_memory_is_planned(tmp_path):
    """The bytes of the frozen half are those of the base that is loaded."""
    state, frozen = start_shapes(run_of(tmp_path))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in frozen.values()) == nbytes(nano("int8").params)
    assert {path: leaf.shape for path, leaf in frozen.items()} == {
        path: value.shape for path, value in nano("int8").params.items()
    }
    assert set(state.trainable) == {PROMPT}


def test_another_name_for_it_is_refused():
    with pytest.raises(ValueError, match="`dtype` is 'int4', expected 'auto', 'float32', 'bfloat16', 'int8' or None"):
        load_base("nano", NANO, "int4")
