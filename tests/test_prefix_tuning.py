"""Prefix tuning: the keys and values of real positions, PEFT's logits, answers and folders, and the decoder's cache."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.models import random_model, random_tokens, tree
from fixtures.peft_models import our_logits, some_tokens, their_base, their_logits, torch_tokens, write_bases
from safetensors.numpy import load_file, save_file

from prompt_tuning_jax.checkpoints.prefixes import FILE, read_prefix, write_prefix
from prompt_tuning_jax.checkpoints.tuned import injection_of
from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.methods.prefix_tuning import PrefixTuning
from prompt_tuning_jax.methods.shapes import ShapeModel
from prompt_tuning_jax.t5.adapters import check_parameters
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.decoding import beam_search, greedy, sample
from prompt_tuning_jax.t5.log_likelihood import shift_right
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.tokenizers.vocabulary import EOS

# What peft 0.21 asks of transformers 5, which has other names for it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning"),
]

# No two dimensions alike. T5's decoder has an odd number of layers here, and an even one there: PEFT treats them apart.
ODD = T5Config(61, 24, 3, 2, 3, 40, head_dim=7)
EVEN = dataclasses.replace(ODD, num_decoder_layers=2, mlp_activations=("relu",), logits_via_embedding=True)
CONFIGS = {"odd": ODD, "even": EVEN}
LENGTH = 4


def random_prefix(config, *, stacks=("encoder", "decoder"), length=LENGTH, seed=0):
    """What the method gives, by path."""
    trained = PrefixTuning(length, stacks).init(jax.random.key(seed), ShapeModel(config, random_model(config)[1]))
    return PrefixTuning(length, stacks).apply(trained, {}).parameters


@pytest.mark.parametrize(("dtype", "per_layer"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_the_keys_and_values_of_positions_in_front_are_a_prefix(dtype, per_layer):
    """A prefix that holds what a prompt's positions, or the answer's first tokens, make of themselves in each layer
    does what they do: in the same relative positions, beside padding, in both stacks."""
    config = dataclasses.replace(ODD, dtype=dtype, num_encoder_layers=3, relative_bias_per_layer=per_layer)
    model, params = random_model(config)
    rng = np.random.default_rng(1)
    inputs, targets = random_tokens(rng, [5], 8, 61), random_tokens(rng, [6], 6, 61)
    prompt = jnp.asarray(rng.normal(size=(LENGTH, config.emb_dim)), jnp.float32)

    @jax.jit
    def whole(params):
        variables = {"params": tree(params)}
        options = {"enable_dropout": False, "mutable": ["intermediates"]}
        options["capture_intermediates"] = lambda module, name: module.name in ("key", "value")
        encoded, first = model.apply(variables, inputs, prompt=prompt, method="encode", **options)
        logits, second = model.apply(variables, encoded, inputs, targets, targets, method="decode", **options)
        return encoded, logits, first["intermediates"], second["intermediates"]

    encoded, logits, of_encoder, of_decoder = whole(params)
    prefix = {}
    for stack, attention, made in (("encoder", "attention", of_encoder), ("decoder", "self_attention", of_decoder)):
        for name in ("key", "value"):
            layers = [made[stack][f"layers_{i}"][attention][name]["__call__"][0] for i in range(3)]
            heads = jnp.stack([layer[0, :LENGTH].reshape(LENGTH, 3, 7) for layer in layers]).swapaxes(1, 2)
            prefix[f"{stack}/prefix_{name}"] = heads.astype(jnp.float32)
    check_parameters(prefix, params)

    @jax.jit
    def with_prefix(params):
        variables = {"params": tree(params)}
        found = model.apply(variables, inputs, enable_dropout=False, method="encode")
        rest = targets[:, LENGTH:]
        return found, model.apply(variables, encoded, inputs, rest, rest, enable_dropout=False, method="decode")

    found, rest = with_prefix({**params, **prefix})
    tolerance = 1e-5 if dtype == "float32" else 0.02  # other positions in a block are other sums, in 8 bits
    scale = np.abs(np.asarray(logits)).max()
    np.testing.assert_allclose(
        np.asarray(found[:, :5], np.float32), np.asarray(encoded[:, LENGTH : LENGTH + 5], np.float32), atol=tolerance
    )
    np.testing.assert_allclose(rest, logits[:, LENGTH:], rtol=0, atol=tolerance * scale)
    without, _ = with_prefix(params)
    assert np.abs(np.asarray(without[:, :5] - found[:, :5], np.float32)).max() > 0.1


@pytest.mark.parametrize("stacks", [("encoder", "decoder"), ("decoder",)], ids=["both", "decoder"])
def test_the_cache_answers_as_teacher_forcing_does(stacks):
    """Greedily, with beams, and at random: every token's log-probability is that of one pass over the answer."""
    config, (inputs, _) = ODD, some_tokens(ODD, rows=4)
    params = {**random_model(config)[1], **random_prefix(config, stacks=stacks)}
    params["decoder/logits_dense/kernel"] = params["decoder/logits_dense/kernel"].at[:, EOS].multiply(2.0)
    model, size = Transformer(config), 6

    @jax.jit
    def answers(params):
        own = tree(params)
        settings = (jnp.arange(4), jnp.full(4, 1.5), jnp.zeros(4, jnp.int32), jnp.ones(4))
        return (
            greedy(model, own, inputs, size),
            sample(model, own, inputs, size, *settings),
            beam_search(model, own, inputs, size, beams=3, length_penalty=0.0),
        )

    @jax.jit
    def forced(params, targets):
        return model.apply({"params": tree(params)}, inputs, shift_right(targets, 0), targets, enable_dropout=False)

    (best, best_scores), drawn, (beams, beam_scores) = answers(params)
    for tokens, scores in ((best, best_scores), drawn, (beams[:, 0], beam_scores[:, 0])):
        log_probs = np.asarray(jax.nn.log_softmax(forced(params, tokens)))
        picked = np.take_along_axis(log_probs, np.asarray(tokens)[..., None], axis=2)[..., 0]
        over = np.cumsum(tokens == EOS, axis=1) - (tokens == EOS) > 0  # a drawn token may be 0, too
        expected = np.where(over, 0, picked).sum(axis=1)
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    choices = jnp.argmax(forced(params, best), axis=-1)
    np.testing.assert_array_equal(jnp.where(best > 0, choices, 0), best)
    assert not np.array_equal(best, drawn[0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the two base models, which both sides load."""
    return write_bases(CONFIGS, tmp_path_factory.mktemp("bases"))


def their_prefix(peft, base, config, **options):
    """A PEFT model with a prefix as PEFT starts it."""
    import torch

    torch.manual_seed(0)
    sizes = {"token_dim": 21, "num_attention_heads": 3, "num_layers": config.num_decoder_layers}
    settings = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH, **(sizes | options))
    return peft.get_peft_model(their_base(base), settings).eval()


PROJECTED = {"prefix_projection": True, "encoder_hidden_size": 9}


@pytest.mark.parametrize(
    ("size", "options"),
    [("odd", {}), ("even", {}), ("even", {"num_layers": 5}), ("odd", PROJECTED)],
    ids=["odd", "even", "more pairs", "projected"],
)
def test_a_prefix_of_peft_gives_its_logits(peft, folders, tmp_path, size, options):
    config, tokens = CONFIGS[size], some_tokens(ODD)
    model = their_prefix(peft, folders[size], config, **options)
    model.save_pretrained(tmp_path)
    expected = their_logits(model, *tokens)
    parameters = injection_of(tmp_path, config).parameters
    model.save_pretrained(tmp_path / "torch", safe_serialization=False)
    for path, value in injection_of(tmp_path / "torch", config).parameters.items():
        np.testing.assert_array_equal(parameters[path], value)
    base = random_model(config)[1]
    check_parameters(parameters, base)
    np.testing.assert_allclose(our_logits(config, {**base, **parameters}, *tokens), expected, rtol=0, atol=1e-5)
    assert np.abs(expected - their_logits(their_base(folders[size]), *tokens)).max() > 0.1
    if size == "even" and not options:  # PEFT reads one pair for both layers, and never the other
        np.testing.assert_array_equal(parameters["decoder/prefix_key"][0], parameters["decoder/prefix_key"][1])


@pytest.mark.parametrize("size", CONFIGS)
def test_peft_gives_our_logits_and_answers_from_our_folder(peft, folders, tmp_path, size):
    config, tokens = CONFIGS[size], some_tokens(ODD)
    base, parameters = random_model(config)[1], random_prefix(config, stacks=("decoder",))
    write_prefix(tmp_path / "adapter", Injection(parameters=parameters), config)
    model = peft.PeftModel.from_pretrained(their_base(folders[size]), tmp_path / "adapter").eval()
    params = {**base, **parameters}
    np.testing.assert_allclose(their_logits(model, *tokens), our_logits(config, params, *tokens), rtol=0, atol=1e-5)
    back = read_prefix(tmp_path / "adapter", config).parameters
    assert back.keys() == parameters.keys()
    for path, value in parameters.items():
        np.testing.assert_array_equal(back[path], value)

    found = jax.jit(lambda params: greedy(Transformer(config), tree(params), tokens[0], 7)[0])(params)
    chosen = np.zeros((len(tokens[0]), 8), np.int32)  # a start token and what follows it, each by a pass of PEFT's
    for place in range(7):
        best = their_logits(model, tokens[0], chosen[:, : place + 1])[:, -1].argmax(axis=-1)
        chosen[:, place + 1] = np.where((chosen == EOS).any(axis=1), 0, best)
    np.testing.assert_array_equal(found, chosen[:, 1:])


def test_gradients_are_those_of_torch(peft, folders, tmp_path):
    import torch

    tokens = some_tokens(ODD, rows=5)
    model = their_prefix(peft, folders["odd"], ODD)
    model.save_pretrained(tmp_path)
    weights = np.random.default_rng(0).normal(size=(5, 5, ODD.vocab_size)).astype(np.float32)
    (model(**torch_tokens(*tokens)).logits * torch.tensor(weights)).sum().backward()
    theirs = model.prompt_encoder["default"].embedding.weight.grad.numpy().reshape(LENGTH, 3, 2, 21)
    base, parameters = random_model(ODD)[1], injection_of(tmp_path, ODD).parameters
    ours = jax.grad(lambda own: jnp.sum(our_logits(ODD, {**base, **own}, *tokens) * weights))(dict(parameters))
    for layer in range(3):
        for at, name in enumerate(("key", "value")):
            expected = theirs[:, 2 * layer % 3, at].reshape(LENGTH, 3, 7).swapaxes(0, 1)
            found = ours[f"decoder/prefix_{name}"][layer]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_peft_runs_no_t5_with_one_submodule(peft, folders):
    """Which is why such a folder is refused."""
    model = their_prefix(peft, folders["odd"], ODD, num_transformer_submodules=1)
    with pytest.raises(RuntimeError):
        their_logits(model, *some_tokens(ODD))


def test_a_prefix_that_peft_does_not_know_is_our_own_file(tmp_path):
    parameters = random_prefix(ODD)
    write_prefix(tmp_path / "prefix", Injection(parameters=parameters), ODD)
    assert [path.name for path in (tmp_path / "prefix").iterdir()] == [FILE]
    back = injection_of(tmp_path / "prefix", ODD).parameters
    assert back.keys() == parameters.keys() and len(back) == 4
    assert all(np.array_equal(back[path], value) for path, value in parameters.items())
    write_prefix(tmp_path / "prefix", Injection(parameters=parameters), ODD)  # an earlier one is replaced
    (tmp_path / "prefix" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"is there already and holds more than {FILE}"):
        write_prefix(tmp_path / "prefix", Injection(parameters=parameters), ODD)
    for more in ({"encoder/layers_0/attention/query/lora_a": jnp.zeros((24, 2))}, {}):
        prompt = None if more else jnp.zeros((2, 24))
        with pytest.raises(
            ValueError, match="a prefix and (encoder/layers_0.*|a prompt), which cannot be saved together"
        ):
            write_prefix(tmp_path / "other", Injection(prompt, parameters={**parameters, **more}), ODD)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"token_dim": 24}, "token_dim 24 and num_attention_heads 3, and the keys of this model are 3 x 7 = 21 wide"),
        ({"num_attention_heads": 7}, "num_attention_heads 7"),
        ({"num_transformer_submodules": 1}, "num_transformer_submodules 1, with which PEFT runs no T5"),
        ({"num_layers": 2}, "num_layers 2, and the model's decoder has 3"),
        ({"num_layers": None}, "num_layers None, not a positive number"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens True, not a positive number"),
        ({"num_virtual_tokens": 5}, "not prompt_embeddings [5, 210] as adapter_config.json says"),
        ({"task_type": "CAUSAL_LM"}, "is of a 'PREFIX_TUNING' adapter for 'CAUSAL_LM'"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save' ['lm_head'], which this project does not have"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_folders_that_do_not_fit_are_refused(tmp_path, fields, found):
    write_prefix(tmp_path, Injection(parameters=random_prefix(ODD, stacks="decoder")), ODD)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(SettingError) as error:
        injection_of(tmp_path, ODD)
    assert found in str(error.value) and "\n" not in str(error.value) and error.value.setting == "prompt_file"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"encoder/prefix_key": None}, "holds 'encoder/prefix_value' without the other half of it"),
        ({"encoder/prefix_kye": np.zeros((2, 3, 4, 7), np.float32)}, "holds 'encoder/prefix_kye' without"),
        ({"encoder/prefix_key": np.zeros((2, 3, 3, 7), np.float32)}, "without the other half of it"),
        ({"decoder/prefix_value": np.full((3, 3, 4, 7), np.nan, np.float32)}, f"{FILE} holds NaN or infinity"),
        (
            {f"encoder/prefix_{name}": np.zeros((2, 4, 3, 7), np.float32) for name in ("key", "value")},
            "[2, 4, 3, 7], and the model takes [2, 3, P, 7] there",
        ),
    ],
)
def test_own_files_that_do_not_fit_are_refused(tmp_path, change, found):
    write_prefix(tmp_path, Injection(parameters=random_prefix(ODD)), ODD)
    tensors = {path: value for path, value in (load_file(tmp_path / FILE) | change).items() if value is not None}
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(SettingError) as error:
        injection_of(tmp_path, ODD)
    assert found in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        ({"decoder/prefix_key": (3, 3, 4, 7)}, "gives decoder/prefix_key without prefix_value beside it"),
        (
            {"decoder/prefix_key": (3, 3, 4, 7), "decoder/prefix_value": (3, 3, 5, 7)},
            "[3, 3, 5, 7], expected [3, 3, 4, 7]",
        ),
        ({"encoder/prefix_key": (3, 3, 4, 7), "encoder/prefix_value": (3, 3, 4, 7)}, "expected [2, 3, 4, 7]"),
        ({"decoder/layers_0/prefix_key": (4, 21)}, "which the model does not read"),
    ],
)
def test_parameters_that_the_model_would_not_read_are_refused(parameters, found):
    with pytest.raises(ValueError) as error:
        check_parameters({path: jnp.zeros(shape) for path, shape in parameters.items()}, random_model(ODD)[1])
    assert found in str(error.value)


def test_the_fields_of_the_method():
    assert PrefixTuning(4, "decoder") == PrefixTuning(4, ["decoder"]) and hash(PrefixTuning(4, "decoder"))
    assert PrefixTuning(4, ("decoder", "encoder")) == PrefixTuning(4)
    for method, setting, found in (
        (PrefixTuning(0), "prompt_length", "is 0, expected a whole number from 1 to"),
        (PrefixTuning(4, ()), "stacks", "`stacks` is (), expected encoder or decoder, or both of them"),
        (PrefixTuning(4, ("encoder", "cross")), "stacks", "is ('encoder', 'cross'), expected"),
    ):
        with pytest.raises(SettingError) as error:
            method.check(ODD, 16)
        assert found in str(error.value) and error.value.setting == setting
    shapes = {path: value.shape for path, value in random_prefix(ODD).items()}
    assert shapes["encoder/prefix_key"] == shapes["encoder/prefix_value"] == (2, 3, 4, 7)
    assert shapes["decoder/prefix_key"] == shapes["decoder/prefix_value"] == (3, 3, 4, 7)
