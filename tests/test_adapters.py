"""Tests LoRA and IA3: PEFT's logits, gradients and folders, merging, and what a training step computes."""

import dataclasses
import json
import pickle
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.models import random_model, shapes_of, tree
from fixtures.peft_models import our_logits, some_tokens, their_base, their_logits, torch_tokens, write_bases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.adapters import adapter_kind, read_adapter, write_adapter
from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.methods.ia3 import IA3
from prompt_tuning_jax.methods.lora import LoRA
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.methods.prefix_tuning import PrefixTuning
from prompt_tuning_jax.methods.targets import matrix_shapes
from prompt_tuning_jax.t5.adapters import check_parameters, merged
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.decoding import greedy
from prompt_tuning_jax.t5.layers import Dense
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.t5.quantized import quantized
from prompt_tuning_jax.training.loss import cross_entropy
from prompt_tuning_jax.training.step import summed_gradients

# peft 0.21 needs a name that transformers 5.23 has renamed.
# transformers 5 says that every T5 is tied, and PEFT warns if the logits' matrix is adapted.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning"),
]

# No two dimensions are equal, and the stacks differ in depth: a transposed or misplaced matrix cannot fit.
GATED = T5Config(61, 24, 3, 2, 3, 40, head_dim=7)
TIED = dataclasses.replace(GATED, mlp_activations=("relu",), logits_via_embedding=True)
CONFIGS = {"t5_1_1": GATED, "t5_1_0": TIED}
ALL = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")
METHODS = {
    "lora": LoRA(),
    "lora-everywhere": LoRA(rank=3, alpha=5, targets=ALL),
    "ia3": IA3(),
    "ia3-everywhere": IA3(ALL, ("o", "wi_0")),
}


class Model(NamedTuple):
    """Holds a base model, as `Method.init` takes it."""

    config: T5Config
    parameters: Mapping[str, Any]
    tokenizer: Any = None
    embeddings: Any = None


def base_model(config):
    return Model(config, random_model(config)[1])


def for_size(method, config):
    """Returns the method with the names of the feed-forward layers of this size."""
    if len(config.mlp_activations) > 1:
        return method
    names = {
        field: tuple({"wi_0": "wi", "wi_1": "wi"}.get(x, x) for x in getattr(method, field))
        for field in ("targets", "feedforward")
        if hasattr(method, field)
    }
    return dataclasses.replace(method, **names)


def random_injection(method, model, seed=0):
    """Returns an injection as after training: no parameter has its initial value."""
    rng = np.random.default_rng(seed)
    trained = {
        path: value + jnp.asarray(rng.normal(0, 0.1, value.shape), jnp.float32)
        for path, value in method.init(jax.random.key(0), model).items()
    }
    return method.apply(trained, model.parameters)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns the folders of two base models, which transformers and this project load."""
    return write_bases(CONFIGS, tmp_path_factory.mktemp("bases"))


def their_adapter(peft, folder, kind, **options):
    """Returns a PEFT model with random adapters."""
    import torch

    make = peft.LoraConfig if kind == "LORA" else peft.IA3Config
    model = peft.get_peft_model(their_base(folder), make(task_type="SEQ_2_SEQ_LM", **options)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


# PEFT's own field names, and our method with the same values.
PAIRS = {
    "lora": ("LORA", {}),
    "lora-everywhere": ("LORA", {"r": 3, "lora_alpha": 5, "target_modules": [*ALL, "wi"], "lora_dropout": 0.1}),
    "ia3": ("IA3", {}),
    "ia3-everywhere": ("IA3", {"target_modules": [*ALL, "wi"], "feedforward_modules": r".*\.(o|wi_0|wi)"}),
}


@pytest.fixture(scope="module", params=[(size, pair) for size in CONFIGS for pair in PAIRS], ids="-".join)
def trained(request, peft, folders, tmp_path_factory):
    """Returns (size, our method, a PEFT model, the model's folder)."""
    size, pair = request.param
    kind, options = PAIRS[pair]
    model = their_adapter(peft, folders[size], kind, **options)
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    model.save_pretrained(folder)
    return size, for_size(METHODS[pair], CONFIGS[size]), model, folder


def test_an_adapter_of_peft_gives_its_logits(trained, folders):
    size, method, model, folder = trained
    config, tokens = CONFIGS[size], some_tokens(GATED)
    base = base_model(config)
    injection = read_adapter(folder, config)
    # Our own method says which matrices are adapted.
    shapes = {path: value.shape for path, value in method.init(jax.random.key(0), base).items()}
    assert {path: value.shape for path, value in injection.parameters.items()} == shapes
    assert all(value.dtype == jnp.float32 for value in injection.parameters.values())
    check_parameters(injection.parameters, base.parameters)
    expected = their_logits(model, *tokens)
    found = our_logits(config, {**base.parameters, **injection.parameters}, *tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    without = their_logits(their_base(folders[size]), *tokens)
    assert np.abs(expected - without).max() > 0.1  # the adapter matters


def test_weights_of_torch_save_are_those_of_safetensors(trained, tmp_path):
    size, _, model, folder = trained
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file() and not (tmp_path / "adapter_model.safetensors").exists()
    expected, found = (read_adapter(one, CONFIGS[size]).parameters for one in (folder, tmp_path))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value)


def test_peft_gives_our_logits_from_our_folder(peft, trained, folders, tmp_path):
    size, method, _, _ = trained
    config, tokens = CONFIGS[size], some_tokens(GATED)
    base = base_model(config)
    injection = random_injection(method, base)
    alpha = getattr(method, "alpha", None)
    found = our_logits(config, {**base.parameters, **injection.parameters}, *tokens)
    for name, setting in (("as it is", None), ("its alpha", alpha)):
        write_adapter(tmp_path / name, injection, config, str(folders[size]), setting)
        model = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / name).eval()
        expected = their_logits(model, *tokens)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        back = read_adapter(tmp_path / name, config).parameters
        assert back.keys() == injection.parameters.keys()
        for path, value in injection.parameters.items():  # multiplying and dividing by 5 / 3 each round once
            np.testing.assert_allclose(back[path], value, rtol=0 if setting in (None, 8.0) else 2e-7)
    settings = json.loads((tmp_path / "its alpha" / "adapter_config.json").read_text())
    assert set(method.targets) <= set(settings["target_modules"])
    assert settings["target_modules"] == sorted(method.targets) or "o" in getattr(method, "feedforward", ())
    assert "alpha" not in vars(method) or (settings["r"], settings["lora_alpha"]) == (method.rank, method.alpha)


@pytest.mark.parametrize("pair", ["lora", "ia3"])
def test_answers_are_those_of_peft(peft, folders, tmp_path, pair):
    """The tokens are equal; the decoder's cache holds adapted keys and values."""
    base, (inputs, _) = base_model(GATED), some_tokens(GATED, rows=16)
    injection = random_injection(METHODS[pair], base)
    write_adapter(tmp_path / "adapter", injection, GATED)
    model = peft.PeftModel.from_pretrained(their_base(folders["t5_1_1"]), tmp_path / "adapter").eval()

    def theirs(model):
        tokens = torch_tokens(inputs, inputs)
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": 8, "use_cache": False}
        answers = model.generate(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], **options)
        return np.pad(answers.numpy()[:, 1:], ((0, 0), (0, 9 - answers.shape[1])))

    params = tree({**base.parameters, **injection.parameters})
    found = jax.jit(lambda params: greedy(Transformer(GATED), params, inputs, 8)[0])(params)
    expected = theirs(model)
    np.testing.assert_array_equal(found, expected)
    assert np.any(expected != theirs(model.get_base_model().__class__.from_pretrained(folders["t5_1_1"]).eval()))


@pytest.mark.parametrize("pair", METHODS)
def test_gradients_are_those_of_torch(peft, folders, tmp_path, pair):
    """The loss is a sum over the logits with random weights; LoRA's alpha is in neither matrix."""
    import torch

    base, tokens = base_model(GATED), some_tokens(GATED)
    method = METHODS[pair]
    rng = np.random.default_rng(3)
    trained = {
        path: value + jnp.asarray(rng.normal(0, 0.1, value.shape), jnp.float32)
        for path, value in method.init(jax.random.key(0), base).items()
    }
    weights = rng.normal(size=(6, 5, GATED.vocab_size)).astype(np.float32)

    def loss(trained):
        params = {**base.parameters, **method.apply(trained, base.parameters).parameters}
        return jnp.sum(our_logits(GATED, params, *tokens) * weights)

    found = jax.grad(loss)(trained)
    injection = method.apply(trained, base.parameters)
    write_adapter(tmp_path / "adapter", injection, GATED, alpha=getattr(method, "alpha", None))
    model = peft.PeftModel.from_pretrained(their_base(folders["t5_1_1"]), tmp_path / "adapter", is_trainable=True)
    (model.eval()(**torch_tokens(*tokens)).logits * torch.tensor(weights)).sum().backward()
    theirs = {name: x.grad.numpy() for name, x in model.named_parameters() if x.requires_grad}
    assert len(theirs) == len(found)
    modules = {theirs.removesuffix(".weight"): ours for ours, (theirs, _) in huggingface.names(GATED).items()}
    suffixes = {"lora_A.default.weight": "lora_a", "lora_B.default.weight": "lora_b"}
    for name, gradient in theirs.items():
        module, _, suffix = name.removeprefix("base_model.model.").partition(
            next(x for x in (".lora_", ".ia3_") if x in name)
        )
        kernel = modules[module].removesuffix("kernel")
        if suffix == "l.default":
            ours = found.get(f"{kernel}input_scale", found.get(f"{kernel}output_scale"))
            gradient = gradient.reshape(-1)
        else:
            ours, gradient = found[kernel + suffixes[f"lora_{suffix}"]], gradient.T
        # Two libraries sum in different orders through five layers.
        np.testing.assert_allclose(ours, gradient, rtol=0, atol=2e-5 * np.abs(gradient).max(), err_msg=name)


@pytest.mark.parametrize("size", CONFIGS)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_changes_before_the_first_step(size, name):
    config, tokens = CONFIGS[size], some_tokens(GATED)
    base, method = base_model(config), for_size(METHODS[name], config)
    trained = method.init(jax.random.key(0), base)
    assert not set(trained) & set(base.parameters)
    assert all(value.dtype == jnp.float32 for value in trained.values())
    parameters = method.apply(trained, base.parameters).parameters
    check_parameters(parameters, base.parameters)
    found = our_logits(config, {**base.parameters, **parameters}, *tokens)
    np.testing.assert_array_equal(found, our_logits(config, dict(base.parameters), *tokens))


def test_lora_starts_as_in_peft(peft, folders):
    """A is uniform over the same interval as in PEFT, with different draws per matrix; B is zero."""
    config = dataclasses.replace(GATED, emb_dim=400, mlp_dim=600)
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes_of(Transformer(config)).items()}
    trained = LoRA(rank=50, targets=ALL).init(jax.random.key(1), Model(config, shapes))
    again = LoRA(rank=50, targets=ALL).init(jax.random.key(1), Model(config, shapes))
    modules = sorted({path.rpartition("/")[0] for path in trained})
    assert len(modules) == 2 * 7 + 3 * 11 and not any("logits" in module for module in modules)
    layer = peft.tuners.lora.layer.Linear(_linear(600, 30), "default", peft.LoraConfig(), r=50, lora_alpha=8)
    theirs = layer.lora_A["default"].weight.detach().numpy()
    assert theirs.shape == (50, 600)
    ours = np.asarray(trained["encoder/layers_0/mlp/wo/lora_a"])
    for sample in (ours, theirs):
        assert np.abs(sample).max() <= 600**-0.5
        np.testing.assert_allclose(np.quantile(sample, [0.1, 0.5, 0.9]) * 600**0.5, [-0.8, 0, 0.8], atol=0.02)
    assert len({float(trained[f"{module}/lora_a"][0, 0]) for module in modules}) == len(modules)
    for path, value in trained.items():
        assert path.endswith("lora_a") or not value.any()
        np.testing.assert_array_equal(value, again[path])


def _linear(inputs, outputs):
    import torch

    return torch.nn.Linear(inputs, outputs, bias=False)


ADAPTER_SHAPES = {"lora_a": (24, 3), "lora_b": (3, 40), "input_scale": (24,), "output_scale": (40,)}


@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "names", [["lora_a", "lora_b"], ["input_scale"], ["output_scale"], list(ADAPTER_SHAPES)], ids="-".join
)
def test_a_layer_computes_its_formula(names, dtype, int8):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 24)), dtype)
    kernel = jnp.asarray(rng.normal(0, 24**-0.5, (24, 40)), jnp.float32)
    params = {"kernel": kernel}
    if int8:
        params = {path.removeprefix("a/"): value for path, value in quantized("a/kernel", kernel).items()}
        kernel = params["kernel"] * params["kernel_scale"]
    adapters = {name: rng.normal(0.5, 0.3, ADAPTER_SHAPES[name]) for name in names}
    params |= {name: jnp.asarray(value, jnp.float32) for name, value in adapters.items()}
    found = Dense(40, ("embed", "mlp"), jnp.dtype(dtype).type).apply({"params": params}, x)
    assert found.dtype == dtype
    exact = {name: np.asarray(value, np.float64) for name, value in {**params, "x": x, "kernel": kernel}.items()}
    scaled = exact["x"] * exact.get("input_scale", 1)
    expected = scaled @ exact["kernel"]
    if "lora_a" in exact:
        expected += scaled @ exact["lora_a"] @ exact["lora_b"]
    expected *= exact.get("output_scale", 1)
    # bfloat16 has 8 bits; x, each matrix, each matmul and their sum are rounded to it.
    within = 2e-6 if dtype == "float32" else 2.0**-6
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=within * np.abs(expected).max())


def test_a_small_scale_is_not_lost_in_bfloat16():
    """1.002 rounds to 1 in bfloat16: if the scale were rounded first, it would do nothing."""
    x = jnp.full((1, 1, 1000), 1.5, jnp.bfloat16)
    params = {"kernel": jnp.eye(1000, 1), "input_scale": jnp.full(1000, 1.003)}
    found = Dense(1, ("embed", "mlp"), jnp.bfloat16).apply({"params": params}, x)
    assert float(found[0, 0, 0]) == 1.5078125  # 1.5045 rounded; 1.5 if the scale had been rounded to 1
    assert float(jnp.asarray(1.003, jnp.bfloat16)) == 1


@pytest.mark.parametrize("size", CONFIGS)
@pytest.mark.parametrize("name", METHODS)
def test_merged_into_the_plain_model(size, name):
    config, tokens = CONFIGS[size], some_tokens(GATED)
    base = base_model(config)
    parameters = random_injection(for_size(METHODS[name], config), base).parameters
    whole = merged(parameters, base.parameters)
    assert whole.keys() == base.parameters.keys()
    changed = {path for path in whole if whole[path] is not base.parameters[path]}
    assert changed == {f"{path.rpartition('/')[0]}/kernel" for path in parameters}
    found = our_logits(config, whole, *tokens)
    expected = our_logits(config, {**base.parameters, **parameters}, *tokens)
    within = np.abs(found - expected).max() / np.abs(expected).max()
    assert within < 1e-6, within


def test_all_adapters_of_a_kernel_and_replaced_parameters_merge():
    rng = np.random.default_rng(0)
    frozen = {"a/kernel": rng.normal(size=(24, 40)), "b/kernel": rng.normal(size=(2, 2)), "c/scale": np.ones(3)}
    frozen = {path: jnp.asarray(value, jnp.bfloat16) for path, value in frozen.items()}
    adapters = {f"a/{name}": jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in ADAPTER_SHAPES.items()}
    replaced = {"b/kernel": jnp.ones((2, 2)), "d/kernel": jnp.zeros((5, 5))}
    whole = merged(adapters | replaced, {path: value for path, value in frozen.items() if path != "b/kernel"})
    assert whole.keys() == {"a/kernel", "b/kernel", "c/scale", "d/kernel"}
    assert whole["c/scale"] is frozen["c/scale"] and all(whole[path] is value for path, value in replaced.items())
    a, b, inputs, outputs = (np.asarray(adapters[f"a/{name}"], np.float64) for name in ADAPTER_SHAPES)
    expected = inputs[:, None] * (np.asarray(frozen["a/kernel"], np.float64) + a @ b) * outputs
    assert whole["a/kernel"].dtype == jnp.float32
    np.testing.assert_allclose(whole["a/kernel"], expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", METHODS)
def test_an_int8_base_model_takes_adapters(name):
    """Its logits are those of the dequantized matrices, and adapters cannot be merged into it."""
    base, tokens = base_model(GATED), some_tokens(GATED)
    small: dict = {}
    for path, value in base.parameters.items():
        small |= quantized(path, value)
    floats = {}
    for path, value in small.items():
        scale = small.get(f"{path}_scale")
        if scale is not None:
            floats[path] = value * (scale[:, None] if path.endswith("embedding") else scale)
        elif not path.endswith(("kernel_scale", "embedding_scale")):
            floats[path] = value
    method = METHODS[name]
    assert {p: v.shape for p, v in method.init(jax.random.key(0), Model(GATED, small)).items()} == {
        p: v.shape for p, v in method.init(jax.random.key(0), base).items()
    }
    parameters = random_injection(method, Model(GATED, small)).parameters
    found = our_logits(GATED, small | dict(parameters), *tokens)
    expected = our_logits(GATED, floats | dict(parameters), *tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(SettingError, match="is int8, expected a base model in floats") as error:
        merged(parameters, small)
    assert error.value.setting == "base_dtype" and "\n" not in str(error.value)


def made_in_a_step(config, trained, apply, frozen, rows):
    """Returns the shapes that the instructions of a compiled gradient compute, also inside fusions and loops.

    Instructions that only pass on a value do not count.
    """
    inputs, targets = jnp.ones((4, 5), jnp.int32), jnp.ones((4, 3), jnp.int32)
    model = Transformer(config)

    def step(trained, frozen):
        def loss_fn(trained, inputs, targets, numbers):
            params = tree({**frozen, **apply(trained)})
            logits = model.apply({"params": params}, inputs, targets, targets, enable_dropout=False)
            sums = cross_entropy(logits, targets, 0, 1e-4)
            return sums.loss, sums

        return summed_gradients(loss_fn, trained, inputs, targets, rows)

    text = jax.jit(step).lower(trained, frozen).compile().as_text()
    passed_on = {"parameter", "get-tuple-element", "bitcast", "tuple", "while", "fusion"}
    if any(value.dtype == jnp.int8 for value in frozen.values()):
        passed_on.add("convert")  # an int8 kernel is converted to floats where it is read
    made = re.findall(r"= (?:f32|bf16|s8)\[([\d,]+)\]\S* ([\w-]+)\(", text)
    return [tuple(map(int, shape.split(","))) for shape, name in made if name not in passed_on]


@pytest.mark.parametrize(
    ("name", "dtype", "remat", "rows"),
    [
        ("lora-everywhere", "float32", "none", 4),
        ("lora-everywhere", "float32", "full", 2),
        ("lora-everywhere", "bfloat16", "minimal", 2),
        ("lora-everywhere", "int8", "none", 2),
        ("ia3", "float32", "none", 2),
        ("ia3", "bfloat16", "none", 4),
        ("prefix", "float32", "full", 2),
        ("prefix", "int8", "none", 4),
    ],
)
def test_a_step_makes_nothing_of_a_kernels_shape(name, dtype, remat, rows):
    """The compiled program, also with micro-batches, has no gradient and no copy of a frozen matrix.

    In a step of model tuning, the same count finds every matrix.
    """
    size = dataclasses.replace(GATED, num_encoder_layers=1, num_decoder_layers=1, remat_policy=remat)
    config = dataclasses.replace(size, dtype="float32" if dtype == "float32" else "bfloat16")
    base = base_model(size)
    frozen: dict = {}
    for path, value in base.parameters.items():
        frozen |= quantized(path, value) if dtype == "int8" else {path: value.astype(dtype)}
    kernels = {value.shape for path, value in base.parameters.items() if path.endswith("/kernel")}
    kernels |= {shape[::-1] for shape in kernels} - {(61, 24)}  # the embedding table's shape
    method = METHODS.get(name) or PrefixTuning(6)
    trained = method.init(jax.random.key(0), base)

    def made(trained, apply):
        return [shape for shape in made_in_a_step(config, trained, apply, frozen, rows) if shape in kernels]

    assert not made(trained, lambda trained: method.apply(trained, frozen).parameters)
    tuned = {path: value for path, value in base.parameters.items() if path.endswith("/kernel")}
    assert dtype == "int8" or len(made(tuned, dict)) >= len(tuned)


def refused(call, setting):
    with pytest.raises(SettingError) as error:
        call()
    assert error.value.setting == setting
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize(
    ("method", "setting", "found"),
    [
        (LoRA(rank=0), "rank", "`rank` is 0, expected a whole number from 1 to 21"),
        (LoRA(rank=22), "rank", "the smaller side of q, which is [24, 21]"),
        (LoRA(rank=25, targets=("wo",)), "rank", "from 1 to 24, the smaller side of wo, which is [40, 24]"),
        (LoRA(rank=True), "rank", "`rank` is True"),
        (LoRA(alpha=0), "alpha", "`alpha` is 0, expected a finite number other than 0"),
        (LoRA(alpha=float("nan")), "alpha", "`alpha` is nan"),
        (LoRA(alpha=float("inf")), "alpha", "`alpha` is inf"),
        (LoRA(targets=()), "targets", "`targets` is empty, expected some of q, k, v, o, wi_0, wi_1, wo"),
        (LoRA(targets="qv"), "targets", "`targets` has 'qv', which is no matrix"),
        (LoRA(targets=("q", "quary")), "targets", "did you mean 'query'"),
        (LoRA(targets=("wi",)), "targets", "did you mean 'wi_1' or 'wi_0'"),
        (LoRA(targets=("logits_dense",)), "targets", "'logits_dense', which is no matrix"),
        (IA3(targets=("k", "valeu")), "targets", "did you mean 'value'"),
        (
            IA3(targets=("k", "v")),
            "feedforward",
            "`feedforward` has 'wo', expected some of k, v, the names in `targets`",
        ),
    ],
)
def test_impossible_fields_are_refused(method, setting, found):
    assert found in refused(lambda: method.check(GATED, 512), setting)


def test_possible_fields_are_not_refused():
    for config in (GATED, TIED):
        for method in METHODS.values():
            for_size(method, config).check(config, 512)
    LoRA(rank=21).check(GATED, 512)
    IA3(("k",), ()).check(GATED, 512)
    assert "wi" in refused(lambda: LoRA(targets=("wi_0",)).check(TIED, 512), "targets")


def test_both_spellings_are_one_method():
    assert LoRA(targets=["value", "query", "q"]) == LoRA()
    assert IA3(("wo", "value", "key")) == IA3()
    assert hash(LoRA()) == hash(LoRA(targets=["query", "value"]))
    found = {path.rpartition("/")[0].rpartition("/")[2] for path in shapes_of(Transformer(GATED)) if "kernel" in path}
    assert len(found - {"logits_dense"}) == len(matrix_shapes(GATED))


@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        ({"encoder/layers_0/attention/query/lora_A": (24, 2)}, "did you mean encoder/layers_0/attention/query/lora_a"),
        ({"encoder/layers_0/attention/query/lora_a": (24, 2)}, "without lora_b beside it"),
        (
            {"encoder/layers_0/attention/querry/kernel": (24, 21)},
            "did you mean encoder/layers_0/attention/query/kernel",
        ),
        ({"encoder/layers_0/attention/query/kernel": (21, 24)}, "of shape [21, 24], expected [24, 21]"),
        ({"encoder/layers_0/attention/key/output_scale": (24,)}, "of shape [24], expected [21]"),
        ({"encoder/encoder_norm/output_scale": (24,)}, "which the model does not read"),
        ({"encoder/layers_0/mlp/wo/lora_a": (40, 2), "encoder/layers_0/mlp/wo/lora_b": (3, 24)}, "expected [2, 24]"),
    ],
)
def test_parameters_that_nothing_reads_are_refused(parameters, found):
    parameters = {path: jnp.zeros(shape) for path, shape in parameters.items()}
    with pytest.raises(ValueError) as error:
        check_parameters(parameters, base_model(GATED).parameters)
    assert found in str(error.value) and "\n" not in str(error.value)


# Folders of adapters: what PEFT computes with each of its options.


ODD_OPTIONS = {
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "target_modules": list(ALL),
        "rank_pattern": {"decoder.*wo": 2, "EncDecAttention.q": 5, "v": 3},
        "alpha_pattern": {"^encoder.*": 3, "block.1.layer.0.SelfAttention.k": 20.5},
    },
    "layers": {"layers_to_transform": [1, 2], "target_modules": ["q", "wo"]},
    "layer": {"layers_to_transform": 1, "layers_pattern": ["block"]},
    "sublayers": {"layers_to_transform": 1, "layers_pattern": "layer"},
    "excluded": {"exclude_modules": ["SelfAttention.q"]},
    "excluded by a pattern": {"exclude_modules": r"decoder\..*"},
    "regex": {"target_modules": r".*decoder.*(SelfAttention|EncDecAttention)\.(q|v)$"},
    "all linear": {"target_modules": "all-linear", "r": 2},
    "logits": {"target_modules": ["lm_head", "q"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "biases": {"bias": "all"},
}


@pytest.mark.parametrize("option", ODD_OPTIONS)
def test_options_of_peft_are_honoured(peft, folders, tmp_path, option):
    model = their_adapter(peft, folders["t5_1_1"], "LORA", **ODD_OPTIONS[option])
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    base, tokens = base_model(GATED), some_tokens(GATED)
    injection = read_adapter(tmp_path / "theirs", GATED)
    count = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert sum(value.size for value in injection.parameters.values()) == count
    expected = their_logits(model, *tokens)
    params = {**base.parameters, **injection.parameters}
    within = {"rtol": 0, "atol": 1e-5}
    np.testing.assert_allclose(our_logits(GATED, params, *tokens), expected, **within)
    # So does the folder that we write, with ranks and modules that differ between layers.
    for alpha in (None, 7):
        write_adapter(tmp_path / "ours", injection, GATED, alpha=alpha)
        again = peft.PeftModel.from_pretrained(their_base(folders["t5_1_1"]), tmp_path / "ours").eval()
        np.testing.assert_allclose(their_logits(again, *tokens), expected, **within)
        assert read_adapter(tmp_path / "ours", GATED).parameters.keys() == injection.parameters.keys()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["k", "v", "wi_1"], "feedforward_modules": []},  # PEFT's default for mT5
        {"target_modules": ["o", "wo"], "feedforward_modules": ["wo"]},
        {"target_modules": ["o", "wo"], "feedforward_modules": ["o"]},  # PEFT matches "wo" with it, too
        {"target_modules": r".*decoder.*\.(k|wo)", "feedforward_modules": r".*wo"},
    ],
)
def test_feedforward_modules_are_those_of_peft(peft, folders, tmp_path, options):
    model = their_adapter(peft, folders["t5_1_1"], "IA3", **options)
    model.save_pretrained(tmp_path / "theirs")
    base, tokens = base_model(GATED), some_tokens(GATED)
    injection = read_adapter(tmp_path / "theirs", GATED)
    expected = their_logits(model, *tokens)
    within = {"rtol": 0, "atol": 1e-5}
    np.testing.assert_allclose(
        our_logits(GATED, {**base.parameters, **injection.parameters}, *tokens), expected, **within
    )
    write_adapter(tmp_path / "ours", injection, GATED)
    again = peft.PeftModel.from_pretrained(their_base(folders["t5_1_1"]), tmp_path / "ours").eval()
    np.testing.assert_allclose(their_logits(again, *tokens), expected, **within)


WHOLE = {"lora": LoRA(rank=2), "ia3": IA3()}


@pytest.fixture
def whole(request, tmp_path):
    """Returns a folder that we wrote, its settings, and its tensors."""
    name = getattr(request, "param", "lora")
    write_adapter(tmp_path / "adapter", random_injection(WHOLE[name], base_model(GATED)), GATED)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    return tmp_path / "adapter", settings, load_file(tmp_path / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"use_dora": True}, "'use_dora' True, which this project does not have"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save' ['lm_head']"),
        ({"trainable_token_indices": [1]}, "'trainable_token_indices' [1]"),
        ({"layer_replication": [[0, 1]]}, "'layer_replication'"),
        ({"target_parameters": ["a"]}, "'target_parameters'"),
        ({"lora_bias": True}, "'lora_bias' True"),
        ({"fan_in_fan_out": True}, "'fan_in_fan_out' True"),
        ({"use_qalora": True}, "'use_qalora' True"),
        ({"of_a_later_version": {"a": 1}}, "'of_a_later_version' {'a': 1}"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights 'pissa', a start that changes the base model's own weights",
        ),
        ({"init_lora_weights": "mica"}, "init_lora_weights 'mica'"),
        ({"init_lora_weights": 1}, "init_lora_weights 1"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING', not 'LORA' or 'IA3'"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type 'PROMPT_TUNING'"),
        ({"peft_type": None}, "peft_type None"),
        ({"task_type": "CAUSAL_LM"}, "task_type 'CAUSAL_LM', not 'SEQ_2_SEQ_LM'"),
        ({"target_modules": None}, "target_modules None, not a list of names"),
        ({"target_modules": ["q", 1]}, "not a list of names"),
        ({"target_modules": ["query"]}, "target_modules ['query'], which matches no matrix of this model"),
        ({"target_modules": "("}, "missing )"),
        ({"target_modules": ["q", "v", "k"]}, "lacks base_model.model.decoder.block.0.layer.0.SelfAttention.k.lora_A"),
        ({"target_modules": ["q"]}, "SelfAttention.v.lora_A.weight': adapter_config.json does not target it"),
        ({"exclude_modules": ["SelfAttention.q"]}, "adapter_config.json does not target it"),
        ({"layers_to_transform": [0]}, "adapter_config.json does not target it"),
        ({"layers_to_transform": "0"}, "layers_to_transform '0', not a list of numbers"),
        ({"layers_pattern": 3}, "layers_pattern 3, not a list of names"),
        ({"r": 3}, "of [2, 24], not [3, 24]"),
        ({"r": 0}, "r or rank_pattern 0, not a positive number"),
        ({"r": True}, "r or rank_pattern True"),
        ({"rank_pattern": {"q": 4}}, "of [2, 24], not [4, 24]"),
        ({"rank_pattern": [4]}, "rank_pattern [4], not a number for each name"),
        ({"rank_pattern": {"(": 4}}, "missing )"),
        ({"lora_alpha": None}, "lora_alpha or alpha_pattern None, not a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha or alpha_pattern nan"),
        ({"lora_alpha": 10**400}, "too large"),
        ({"lora_alpha": 1e60}, "overflows float32 when it is multiplied by LoRA's scale"),
        ({"alpha_pattern": {"v": "8"}}, "alpha_pattern '8', not a number"),
    ],
)
def test_what_we_cannot_honour_is_refused_by_name(whole, fields, found):
    folder, settings, _ = whole
    (folder / "adapter_config.json").write_text(json.dumps(settings | fields))
    message = refused(lambda: read_adapter(folder, GATED), "prompt_file")
    assert found in message and str(folder) in message


@pytest.mark.parametrize("whole", ["ia3"], indirect=True)
@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"feedforward_modules": None}, "feedforward_modules None, not a list of names"),
        ({"feedforward_modules": []}, "of [1, 40], not [24, 1]"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save'"),
        ({"fan_in_fan_out": True}, "'fan_in_fan_out' True"),
        ({"r": 8}, "'r' 8"),
    ],
)
def test_what_we_cannot_honour_of_ia3_is_refused_by_name(whole, fields, found):
    folder, settings, _ = whole
    (folder / "adapter_config.json").write_text(json.dumps(settings | fields))
    assert found in refused(lambda: read_adapter(folder, GATED), "prompt_file")


def test_fields_that_change_nothing_are_read_over(whole):
    folder, settings, _ = whole
    before = read_adapter(folder, GATED).parameters
    harmless = {
        "lora_dropout": 0.3,
        "bias": "lora_only",
        "use_dora": False,
        "modules_to_save": None,
        "revision": "main",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | harmless | {"init_lora_weights": "eva"}))
    for path, value in read_adapter(folder, GATED).parameters.items():
        np.testing.assert_array_equal(value, before[path])


Q = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({Q: None}, f"lacks {Q}"),
        (
            {"base_model.model.shared.weight": np.ones((2, 2), np.float32)},
            "has an unexpected tensor 'base_model.model.shared.weight'",
        ),
        ({Q: np.ones((24, 2), np.float32)}, "of [24, 2], not [2, 24]"),
        ({Q: np.full((2, 24), np.nan, np.float32)}, "NaN or infinity"),
        ({Q: np.ones((2, 24), np.int32)}, "is I32, expected F64"),
    ],
)
def test_weights_that_do_not_fit_are_refused(whole, change, found):
    folder, _, tensors = whole
    tensors = {name: value for name, value in (tensors | change).items() if value is not None}
    save_file(tensors, folder / "adapter_model.safetensors")
    message = refused(lambda: read_adapter(folder, GATED), "prompt_file")
    assert found in message and str(folder) in message


def test_an_adapter_of_another_size_is_refused(whole):
    folder, _, _ = whole
    wider = dataclasses.replace(GATED, emb_dim=32)
    assert "not [2, 32] as this model" in refused(lambda: read_adapter(folder, wider), "prompt_file")
    deeper = dataclasses.replace(GATED, num_encoder_layers=4)
    assert "lacks base_model.model.encoder.block.2" in refused(lambda: read_adapter(folder, deeper), "prompt_file")
    shallower = dataclasses.replace(GATED, num_encoder_layers=1)
    assert "or this model has no such matrix" in refused(lambda: read_adapter(folder, shallower), "prompt_file")


def test_absent_parts_and_pickles_are_refused(whole, tmp_path):
    folder, settings, _ = whole
    assert adapter_kind(folder) == "LORA"
    (folder / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refused(lambda: read_adapter(folder, GATED), "prompt_file")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match="adapter_model.bin cannot be read .it is of torch.save's format before"):
        read_adapter(folder, GATED)
    assert "no adapter_config.json" in refused(lambda: read_adapter(tmp_path, GATED), "prompt_file")
    assert "no adapter_config.json" in refused(lambda: adapter_kind(tmp_path), "prompt_file")


def test_other_floats_are_read_as_float32(whole):
    folder, _, tensors = whole
    save_file({name: value.astype(np.float16) for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    found = read_adapter(folder, GATED).parameters["encoder/layers_0/attention/query/lora_a"]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, tensors[Q].astype(np.float16).T)


def test_folders_are_written_whole_and_those_of_others_are_left_alone(whole):
    folder, settings, tensors = whole
    injection = random_injection(LoRA(rank=4), base_model(GATED))
    write_adapter(folder, injection, GATED)  # replaces an earlier folder of ours
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    (folder / "README.md").touch()
    with pytest.raises(ValueError, match="is there already and holds more than"):
        write_adapter(folder, injection, GATED)
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize(
    ("injection", "found"),
    [
        (Injection(prompt=jnp.ones((2, 24))), "gives a prompt, which a PEFT adapter of LoRA or IA3 cannot hold"),
        (Injection(), "gives nothing, which cannot be saved as one PEFT adapter"),
        (Injection(parameters={"decoder/logits_dense/kernel": jnp.ones((24, 61))}), "save the whole model instead"),
        (
            Injection(
                parameters={
                    "decoder/layers_0/mlp/wo/input_scale": jnp.ones(40),
                    "decoder/layers_0/mlp/wo/output_scale": jnp.ones(24),
                }
            ),
            "gives input_scale, output_scale, which cannot be saved as one PEFT adapter",
        ),
    ],
)
def test_what_peft_has_no_folder_for_is_not_written(tmp_path, injection, found):
    with pytest.raises(ValueError) as error:
        write_adapter(tmp_path / "adapter", injection, GATED)
    assert found in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "adapter").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    "r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform "
    "layers_pattern init_lora_weights peft_type task_type bias use_dora"
).split()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_random_fields_are_refused_in_one_line_or_harmless(whole, fields):
    folder, settings, _ = whole
    (folder / "adapter_config.json").write_text(json.dumps(settings | fields))
    try:
        injection = read_adapter(folder, GATED)
    except SettingError as error:
        assert error.setting == "prompt_file" and "\n" not in str(error)
        return
    check_parameters(injection.parameters, base_model(GATED).parameters)
    assert all(np.isfinite(value).all() for value in injection.parameters.values())
