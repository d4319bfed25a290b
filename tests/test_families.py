"""Compares each supported family of models with transformers, and tests the table of families in the docs.

A family is a tiny model that `transformers` makes, with random weights and the settings of the family's config.json.
"""

import copy
import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import reference
from fixtures.models import randomise, tree
from safetensors.numpy import load_file, save_file

from prompt_tuning_jax.array_files.stored import StoredArray
from prompt_tuning_jax.array_files.t5x import open_t5x, write_legacy
from prompt_tuning_jax.checkpoints import huggingface, t5x
from prompt_tuning_jax.checkpoints.base import check_shapes, expected_shapes, fingerprint, load_base, open_model
from prompt_tuning_jax.checkpoints.conversion import convert
from prompt_tuning_jax.checkpoints.inspection import inspect_base
from prompt_tuning_jax.checkpoints.tuned import write_adapters
from prompt_tuning_jax.methods.lora import LoRA
from prompt_tuning_jax.methods.prefix_tuning import PrefixTuning
from prompt_tuning_jax.methods.shapes import ShapeModel
from prompt_tuning_jax.parallel.partitioner import logical_axes
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.decoding import greedy
from prompt_tuning_jax.t5.log_likelihood import choice_scores
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.t5.quantized import output_axis, scale_path

ROOT = Path(__file__).parent.parent
# Whether our configuration has special ids. If not, every family is compared with T5's ids.
OWN_IDS = "pad_token_id" in {field.name for field in dataclasses.fields(T5Config)}
VOCAB, WIDTH, LENGTH = 61, 9, 8
PROMPT = np.random.default_rng(1).normal(0, 1, (5, 24)).astype(np.float32)


def only_the_decoders_table(folder: Path) -> None:
    """Keeps the embedding table only under the name of its copy in the decoder."""
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class Family(NamedTuple):
    """Describes a family of models.

    Attributes:
      name: the family's common name.
      differs: how it differs from T5 1.1, for the table.
      fields: fields of its config.json, which replace those of `SIZE`.
      kind: the prefix of its classes in transformers.
      head: "own" if the logits have a matrix of their own, "tied" if they use the embedding table.
      expected: the fields of our configuration that differ from T5 1.1's.
      ids: the ids of padding, end of sequence and decoder start.
      change: changes a saved folder to have what the family's own folders have; does nothing by default.
      listed: whether it is a row of the table in docs/guides/base_models.md.
    """

    name: str
    differs: str
    fields: dict[str, Any]
    kind: str = "T5"
    head: str = "own"
    expected: dict[str, Any] = {}
    ids: tuple[int, int, int] = (0, 1, 0)
    change: Callable[[Path], None] = lambda folder: None
    listed: bool = True


SIZE = {"vocab_size": VOCAB, "d_model": 24, "d_kv": 7, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2}
SIZE |= {"num_heads": 3, "feed_forward_proj": "gated-gelu"}
PLAIN = {"feed_forward_proj": "relu", "tie_word_embeddings": True}  # T5 1.0
TIED_PLAIN = {"mlp_activations": ("relu",), "logits_via_embedding": True}
UNTIED = {"tie_word_embeddings": False}
FAMILIES = [
    Family("T5 1.1, LM-adapted, Flan-T5", "none", UNTIED),
    Family("T5 1.0", "ReLU; logits tied and scaled", PLAIN, head="tied", expected=TIED_PLAIN),
    Family("ByT5", "encoder deeper than decoder; bytes", UNTIED | {"num_layers": 3, "num_decoder_layers": 1}),
    Family("mT5", "vocabulary of 250,112", {}, "MT5"),
    Family("Aya-101", "mT5's shape and vocabulary", UNTIED),
    Family(
        "UL2, Flan-UL2",
        "SiLU; logits tied and scaled; heads of 256",
        {"feed_forward_proj": "gated-silu", "d_kv": 16},
        head="tied",
        expected={"mlp_activations": ("silu", "linear"), "logits_via_embedding": True},
    ),
    Family(
        "MADLAD-400",
        "heads of 128; ids 1, 2, 0; embedding table stored only under the decoder's name",
        UNTIED,
        ids=(1, 2, 0),
        change=only_the_decoders_table,
    ),
    Family("umT5", "a relative position table per layer", UNTIED, "UMT5", expected={"relative_bias_per_layer": True}),
    Family(
        "Pile-T5",
        "as umT5; ids 0, 2, 0",
        UNTIED,
        "UMT5",
        expected={"relative_bias_per_layer": True},
        ids=(0, 2, 0),
    ),
    Family(
        "CodeT5, CodeT5+ 220m and 770m",
        "as T5 1.0; ids 0, 2, 0",
        PLAIN,
        head="tied",
        expected=TIED_PLAIN,
        ids=(0, 2, 0),
    ),
    Family(
        "T5 1.1 trained from scratch with transformers 5",
        "logits tied, not scaled",
        UNTIED,
        head="tied",
        expected={"logits_via_embedding": True, "scale_decoder_outputs": False},
    ),
    Family(
        "mT5 trained from scratch with transformers 5",
        "logits tied, not scaled",
        {},
        "MT5",
        head="tied",
        listed=False,
        expected={"logits_via_embedding": True, "scale_decoder_outputs": False},
    ),
    Family(
        "T5 1.0 with a matrix of its own for the logits",
        "ReLU; logits scaled, not tied",
        PLAIN,
        listed=False,
        expected={"mlp_activations": ("relu",), "scale_decoder_outputs": True},
    ),
    Family("T5 1.1 whose decoder starts with the end", "ids 0, 1, 1", UNTIED, ids=(0, 1, 1), listed=False),
    Family("T5 1.1 with three ids of its own", "ids 1, 0, 2", UNTIED, ids=(1, 0, 2), listed=False),
    Family("T5 1.1 with another end and start", "ids 0, 2, 1", UNTIED, ids=(0, 2, 1), listed=False),
    Family(
        "umT5 of all differences at once",
        "a relative position table per layer; SiLU; logits tied, not scaled",
        UNTIED | {"feed_forward_proj": "gated-silu", "num_decoder_layers": 3},
        "UMT5",
        head="tied",
        listed=False,
        expected={
            "relative_bias_per_layer": True,
            "mlp_activations": ("silu", "linear"),
            "logits_via_embedding": True,
            "scale_decoder_outputs": False,
        },
    ),
]
BY_NAME = {family.name: family for family in FAMILIES}
ALL_AT_ONCE = BY_NAME["umT5 of all differences at once"].name


def table(families: list[Family]) -> str:
    """Returns the families as a Markdown table."""
    rows = [("family", "difference from T5 1.1"), ("---", "---")]
    rows += [(family.name, family.differs) for family in families if family.listed]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def ids_of(family: Family) -> tuple[int, int, int]:
    return family.ids if OWN_IDS else (0, 1, 0)


@functools.cache
def their_model(name: str) -> Any:
    """Returns a family's model with random weights, layer norms included."""
    import torch
    import transformers

    family = BY_NAME[name]
    pad, end, start = ids_of(family)
    ids = {"pad_token_id": pad, "eos_token_id": end, "decoder_start_token_id": start}
    config = getattr(transformers, f"{family.kind}Config")(**SIZE | family.fields | ids)
    model = getattr(transformers, f"{family.kind}ForConditionalGeneration")(config).eval()
    if family.head == "own":  # transformers 5 ties the logits of every family
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, config.d_model))
    randomise(model, config.d_kv)
    with torch.no_grad():
        if getattr(config, "scale_decoder_outputs", False):
            model.lm_head.weight *= config.d_model**0.5  # keeps the size of the logits, which are scaled
        model.lm_head.weight[end] *= 2 if family.head == "own" else 4 if end == 1 else 8  # so that some answers end
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns a function that returns the folder of a family's model, as transformers saves it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    pytest.importorskip("torch").set_num_threads(1)
    pytest.importorskip("transformers")

    @functools.cache
    def folder_of(name: str) -> Path:
        folder = tmp_path_factory.mktemp("family")
        their_model(name).save_pretrained(folder)
        BY_NAME[name].change(folder)
        return folder

    return folder_of


def some_tokens(family: Family, rows: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Returns padded inputs of 1 to WIDTH tokens, and decoder inputs."""
    rng = np.random.default_rng(0)
    pad, _, start = ids_of(family)
    lengths = np.array([1, WIDTH, *rng.integers(1, WIDTH + 1, rows - 2)])
    inputs = np.where(np.arange(WIDTH) < lengths[:, None], rng.integers(3, VOCAB, (rows, WIDTH)), pad)
    decoder_inputs = np.concatenate([np.full((rows, 1), start), rng.integers(3, VOCAB, (rows, 4))], axis=1)
    return inputs.astype(np.int32), decoder_inputs.astype(np.int32)


def their_inputs(model: Any, inputs: np.ndarray, prompt: np.ndarray | None) -> dict[str, Any]:
    """Returns the arguments of their model. A prompt is put before the embedded inputs, and is never masked."""
    import torch

    tokens = torch.tensor(inputs.astype(np.int64))
    mask = (tokens != model.config.pad_token_id).long()
    if prompt is None:
        return {"input_ids": tokens, "attention_mask": mask}
    before = torch.tensor(prompt, dtype=model.dtype).expand(len(tokens), *prompt.shape)
    embedded = torch.cat([before, model.get_input_embeddings()(tokens)], dim=1)
    return {"inputs_embeds": embedded, "attention_mask": torch.cat([torch.ones_like(before[:, :, 0]).long(), mask], 1)}


def theirs(model: Any, inputs: np.ndarray, decoder_inputs: np.ndarray, prompt: np.ndarray | None):
    """Returns transformers' logits, computed in float64, and greedy answers.

    In float32 its own rounding, which depends on the processor, takes up to 3/4 of the tolerance.
    """
    import torch

    given, exact = their_inputs(model, inputs, prompt), copy.deepcopy(model).double()
    with torch.no_grad():
        logits = exact(
            **their_inputs(exact, inputs, prompt), decoder_input_ids=torch.tensor(decoder_inputs.astype(np.int64))
        ).logits.numpy()
        # Their cache has a slot for each encoder layer, and some decoders here have more layers.
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": LENGTH, "use_cache": False}
        tokens = model.generate(**given, **options).numpy()[:, 1:]
    padding = ((0, 0), (0, LENGTH - tokens.shape[1]))
    return logits, np.pad(tokens, padding, constant_values=model.config.pad_token_id)


@functools.cache
def compiled(config: T5Config, with_prompt: bool) -> Callable:
    """Returns a compiled function that returns our logits and greedy answers for any weights of this size."""

    @jax.jit
    def run(params, inputs, decoder_inputs, prompt):
        prompt = prompt if with_prompt else None
        answers, _ = greedy(Transformer(config), tree(params), inputs, LENGTH, prompt=prompt)
        return logits_of(config, params, inputs, decoder_inputs, prompt), answers

    return run


def ours(config: T5Config, params: Any, inputs: np.ndarray, decoder_inputs: np.ndarray, prompt: np.ndarray | None):
    return compiled(config, prompt is not None)(params, inputs, decoder_inputs, PROMPT if prompt is None else prompt)


def logits_of(config: T5Config, params: Any, inputs: Any, decoder_inputs: Any, prompt: Any = None) -> Any:
    tokens = jnp.asarray(inputs), *[jnp.asarray(decoder_inputs)] * 2
    return Transformer(config).apply({"params": tree(params)}, *tokens, enable_dropout=False, prompt=prompt)


@functools.cache
def compiled_logits(config: T5Config) -> Callable:
    """Returns a compiled function that returns only our logits, which compiles faster, for any kind of parameters."""
    return jax.jit(functools.partial(logits_of, config))


def read(arrays: dict[str, StoredArray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in arrays.items()}


@pytest.mark.parametrize("name", BY_NAME)
def test_logits_and_greedy_answers_are_those_of_transformers(folders, name):
    """Compares 64 padded inputs with and without a prompt; we decode with a cache, transformers without."""
    family, model = BY_NAME[name], their_model(name)
    config, arrays = huggingface.open_folder(folders(name))
    size = SIZE | family.fields
    own = {"head_dim": size["d_kv"], **family.expected}
    if OWN_IDS:
        own |= dict(zip(("pad_token_id", "eos_token_id", "decoder_start_token_id"), family.ids, strict=True))
    assert config == T5Config(VOCAB, 24, 3, size["num_layers"], size["num_decoder_layers"], 40, **own)
    check_shapes({path: array.shape for path, array in arrays.items()}, config, "")
    inputs, decoder_inputs = some_tokens(family)
    for prompt in (None, PROMPT):
        logits, answers = theirs(model, inputs, decoder_inputs, prompt)
        our_logits, our_answers = ours(config, read(arrays), inputs, decoder_inputs, prompt)
        assert 0.5 < logits.std() < 4
        np.testing.assert_allclose(our_logits, logits, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(our_answers, answers)
        ended = np.any(answers == ids_of(family)[1], axis=1).sum()
        assert 0 < ended < 64  # some end, some do not
        # The random model that starts from T5's end of sequence gives a single answer besides the empty one.
        assert len({tuple(answer) for answer in answers}) > (1 if family.ids == (0, 2, 1) else 3)


def test_the_guide_has_the_table_of_families():
    assert table(FAMILIES) in (ROOT / "docs" / "guides" / "base_models.md").read_text()


def resaved(folder: Path, target: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Path:
    """Copies a folder to `target` with changed tensors."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["T5 1.0", ALL_AT_ONCE])
def test_a_copy_of_the_table_for_the_logits_is_no_matrix_of_its_own(folders, tmp_path, monkeypatch, name):
    """Files of older versions have the table under several names; the copies are compared in blocks of rows."""
    monkeypatch.setattr(huggingface, "BLOCK_BYTES", 7 * 24 * 4)
    config, arrays = huggingface.open_folder(folders(name))
    copies = (*huggingface.TABLE_COPIES, huggingface.LOGITS)
    everywhere = lambda tensors: tensors | {copy: tensors["shared.weight"].copy() for copy in copies}  # noqa: E731
    found, same = huggingface.open_folder(resaved(folders(name), tmp_path / "copies", everywhere))
    # If the logits are not scaled, two equal matrices give the same logits as one.
    untied = dataclasses.replace(config, logits_via_embedding=False, scale_decoder_outputs=None)
    assert found == (config if config.scales_logits else untied)
    for path, array in arrays.items():
        np.testing.assert_array_equal(same[path], array)

    def changed(tensors):
        logits = tensors["shared.weight"].copy()
        logits[-1, -1] += 1
        return tensors | {huggingface.LOGITS: logits}

    found, other = huggingface.open_folder(resaved(folders(name), tmp_path / "changed", changed))
    assert (found.logits_via_embedding, found.scales_logits) == (False, config.scales_logits)
    facts = inspect_base(str(tmp_path / "changed")).facts
    scaled = "scaled by d_model^-0.5" if config.scales_logits else "not scaled"
    assert facts["head"] == f"a matrix of its own, decoder outputs {scaled}"
    table, logits = other["token_embedder/embedding"], other["decoder/logits_dense/kernel"]
    assert (np.asarray(table) != np.asarray(logits).T).sum() == 1


@pytest.mark.parametrize(
    "name", ["UL2, Flan-UL2", "umT5", ALL_AT_ONCE, "T5 1.0 with a matrix of its own for the logits"]
)
def test_transformers_reads_what_we_write(folders, tmp_path, name):
    import transformers

    config, arrays = huggingface.open_folder(folders(name))
    huggingface.write(tmp_path / "model", config, arrays)
    assert huggingface.open_folder(tmp_path / "model")[0] == config
    model, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(model) is type(their_model(name)) and not any(report.values()), report
    inputs, decoder_inputs = some_tokens(BY_NAME[name])
    expected, _ = theirs(their_model(name), inputs, decoder_inputs, None)
    found, _ = theirs(model.eval(), inputs, decoder_inputs, None)
    np.testing.assert_array_equal(found, expected)


def test_every_gradient_is_that_of_transformers(folders):
    """Compares the gradients by the prompt and by every parameter.

    These include each layer's position table, and the embedding table, which is used twice. Layers are recomputed in
    the backward pass, with their tables.
    """
    import torch

    config, arrays = huggingface.open_folder(folders(ALL_AT_ONCE))
    again = dataclasses.replace(config, remat_policy="full")
    inputs, decoder_inputs = some_tokens(BY_NAME[ALL_AT_ONCE], rows=6)
    weights = np.random.default_rng(2).normal(size=(6, 5, VOCAB)).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradients(trained):
        prompt, params = trained
        return jnp.sum(logits_of(again, params, inputs, decoder_inputs, prompt) * weights)

    found = gradients((jnp.asarray(PROMPT), read(arrays)))
    model = their_model(ALL_AT_ONCE)
    given = their_inputs(model, inputs, PROMPT)
    embedded = model.get_input_embeddings()(torch.tensor(inputs.astype(np.int64)))
    prompt: Any = torch.tensor(PROMPT, requires_grad=True)
    given["inputs_embeds"] = torch.cat([prompt.expand(6, *PROMPT.shape), embedded], dim=1)
    logits = model(**given, decoder_input_ids=torch.tensor(decoder_inputs.astype(np.int64))).logits
    model.zero_grad()
    (logits * torch.tensor(weights)).sum().backward()
    named = dict(model.named_parameters())
    expected = {ours: (named[theirs].grad, turned) for ours, (theirs, turned) in huggingface.names(config).items()}
    model.zero_grad()
    expected = {path: (grad.T if turned else grad).numpy() for path, (grad, turned) in expected.items()}
    assert sum("relpos_bias" in path for path in expected) == 5
    for path, gradient in (*expected.items(), ("prompt", prompt.grad.numpy())):
        own = found[0] if path == "prompt" else found[1][path]
        largest = np.abs(gradient).max()
        assert largest > 1e-3
        np.testing.assert_allclose(own, gradient, rtol=0, atol=1e-5 * largest, err_msg=path)


def test_ranking_is_by_the_log_likelihood_of_transformers(folders):
    import torch

    family, model = BY_NAME[ALL_AT_ONCE], their_model(ALL_AT_ONCE)
    pad, end, start = ids_of(family)
    config, arrays = huggingface.open_folder(folders(ALL_AT_ONCE))
    inputs = jnp.asarray(some_tokens(family, rows=6)[0])
    choices = np.array([[7, 9, end], [8, end, pad]], np.int32)
    run = jax.jit(lambda params: choice_scores(Transformer(config), tree(params), inputs, jnp.asarray(choices[None])))
    found = run(read(arrays))
    for place, choice in enumerate(choices):
        targets = torch.tensor(np.tile(choice, (6, 1)).astype(np.int64))
        shifted = torch.cat([torch.full((6, 1), start), targets[:, :-1]], dim=1)
        with torch.no_grad():
            logits = model(**their_inputs(model, np.asarray(inputs), None), decoder_input_ids=shifted).logits
        picked = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
        expected = (picked * (targets != pad)).sum(1).numpy()
        np.testing.assert_allclose(found[:, place], expected, rtol=0, atol=5e-5)


def test_int8_keeps_the_position_tables_and_computes_with_the_matrices_that_it_holds(folders):
    config = huggingface.open_folder(folders(ALL_AT_ONCE))[0]
    params = load_base(str(folders(ALL_AT_ONCE)), config, "int8").params
    floats = {}
    for path, value in params.items():
        axis = output_axis(path)
        if axis is None:
            assert value.dtype == jnp.float32
            floats[path] = value
        else:
            assert value.dtype == jnp.int8
            floats[path] = value * jnp.expand_dims(params[scale_path(path)], 1 - axis)
    floats = {path: value for path, value in floats.items() if not path.endswith(("kernel_scale", "embedding_scale"))}
    inputs, decoder_inputs = some_tokens(BY_NAME[ALL_AT_ONCE])
    expected, found = (compiled_logits(config)(held, inputs, decoder_inputs) for held in (floats, params))
    # Each of the two is rounded, by up to the 2e-5 that the logits of all families are allowed.
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-5)


def test_every_layers_position_table_is_divided_by_heads():
    config = T5Config(VOCAB, 24, 3, 2, 3, 40, head_dim=7, relative_bias_per_layer=True)
    axes = logical_axes(config)
    tables = [path for path in expected_shapes(config) if path.endswith("rel_embedding")]
    assert len(tables) == 5
    assert {axes[path] for path in tables} == {("heads", "relpos_buckets")}


# peft 0.21 needs names that transformers 5 has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_peft_computes_the_same_with_a_model_of_a_table_per_layer(peft, folders, tmp_path):
    """Compares LoRA and a prefix of the decoder, from folders that PEFT loads."""
    import torch

    config, arrays = huggingface.open_folder(folders("umT5"))
    params = {path: jnp.asarray(array) for path, array in read(arrays).items()}
    inputs, decoder_inputs = some_tokens(BY_NAME["umT5"], rows=6)
    for method in (LoRA(3), PrefixTuning(4, "decoder")):
        trained = method.init(jax.random.key(0), ShapeModel(config, params))
        rng = np.random.default_rng(0)
        trained = {path: value + rng.normal(0, 0.1, value.shape).astype(np.float32) for path, value in trained.items()}
        injection = method.apply(trained, params)
        write_adapters(tmp_path / type(method).__name__, injection, config)
        model = type(their_model("umT5")).from_pretrained(folders("umT5")).eval()
        model = peft.PeftModel.from_pretrained(model, tmp_path / type(method).__name__)
        given = their_inputs(their_model("umT5"), inputs, None)
        with torch.no_grad():
            tokens = torch.tensor(decoder_inputs.astype(np.int64))
            expected = model(**given, decoder_input_ids=tokens).logits.numpy()
            without = their_model("umT5")(**given, decoder_input_ids=tokens).logits.numpy()
        found = compiled_logits(config)({**params, **injection.parameters}, inputs, decoder_inputs)
        assert np.abs(without - expected).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


# --- T5X


@pytest.fixture(scope="module")
def scalable():
    """Returns the numbers of T5X's scalable_t5 with `scan_layers`; see fixtures/README.md."""
    return reference("t5x_scalable_scan.npz")


SCALABLE = T5Config(40, 16, 2, 3, 2, 24, head_dim=4, relative_bias_per_layer=True)


def stacked(scalable: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("param:"): array for name, array in scalable.items() if name.startswith("param:")}


def test_stacked_layers_are_read_as_t5x_computes_with_them(scalable, tmp_path, monkeypatch):
    """No array is read when the checkpoint is opened, and each is read once when it is loaded."""
    write_legacy(tmp_path, stacked(scalable))
    opened, reads, read_part = open_t5x(tmp_path), [], StoredArray.__getitem__

    def noted(stored, index):
        reads.extend(name for name, array in opened.items() if array is stored)
        return read_part(stored, index)

    with monkeypatch.context() as patch:
        patch.setattr(StoredArray, "__getitem__", noted)
        arrays = t5x.from_scalable(opened)
        assert not reads and len(arrays) == 64
        whole = read(arrays)
    assert sorted(reads) == sorted(name for name in opened if t5x.STACKED.fullmatch(name))
    base = load_base(str(tmp_path), SCALABLE)
    assert open_model(str(tmp_path)).config == SCALABLE
    assert "scalable_t5" in inspect_base(str(tmp_path)).facts["family"]
    for path, value in whole.items():
        np.testing.assert_array_equal(base.params[path], value)
    assert base.fingerprint == fingerprint(base.params)
    model = Transformer(SCALABLE)

    @jax.jit
    def run(params, inputs, decoder_inputs):
        encoded = model.apply({"params": tree(params)}, inputs, enable_dropout=False, method="encode")
        tokens = inputs, decoder_inputs, decoder_inputs
        return encoded, model.apply({"params": tree(params)}, *tokens, enable_dropout=False)

    encoded, logits = run(base.params, scalable["inputs"], scalable["decoder_inputs"])
    real = scalable["inputs"] > 0
    np.testing.assert_allclose(encoded[real], scalable["encoded"][real], rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits, scalable["logits"], rtol=0, atol=2e-5)


def test_parts_of_stacked_layers_are_those_of_the_whole(scalable, tmp_path):
    """Each device of a mesh reads such parts."""
    write_legacy(tmp_path, stacked(scalable))
    for path, array in t5x.from_scalable(open_t5x(tmp_path)).items():
        whole = np.asarray(array)
        for half in (0, 1):
            for axis, size in enumerate(array.shape):
                index = [slice(None)] * len(array.shape)
                index[axis] = slice(half * size // 2, (half + 1) * size // 2)
                np.testing.assert_array_equal(array[tuple(index)], whole[tuple(index)], err_msg=path)


def test_layers_along_another_axis_are_refused(scalable, tmp_path):
    arrays = {
        name: np.moveaxis(array, 1, 0) if t5x.STACKED.fullmatch(name) else array
        for name, array in stacked(scalable).items()
    }
    write_legacy(tmp_path, arrays)
    with pytest.raises(
        ValueError, match=r"layer_norm/scale is \[[32], 16\], expected .* axis 1 .*: set `where`"
    ) as error:
        open_model(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_table_per_layer_becomes_a_checkpoint_of_scalable_t5_and_comes_back(scalable, tmp_path):
    """Its arrays are bit for bit those of T5X with separate layers (`scan_layers=False`)."""
    write_legacy(tmp_path, stacked(scalable))
    said = convert(str(tmp_path), str(tmp_path / "apart"), "t5x")
    assert "T5X's scalable_t5 restores it with scan_layers=False" in said
    found = open_t5x(tmp_path / "apart")
    expected = {}
    for name, array in stacked(scalable).items():
        stack, *rest = name.split("/")
        if rest[0] == stack:
            layers = range(array.shape[1])
            expected |= {"/".join([stack, f"layers_{i}", *rest[1:]]): array[:, i] for i in layers}
        else:
            expected[name] = array
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    for source, to in (("apart", "huggingface"), ("huggingface", "orbax")):
        convert(str(tmp_path / source), str(tmp_path / to), to)
        again = open_model(str(tmp_path / to))
        assert again.config == SCALABLE
        for name, array in t5x.from_scalable(found).items():
            np.testing.assert_array_equal(again.arrays[name], array)


def test_what_no_t5x_checkpoint_says_is_told_or_refused(folders, tmp_path):
    said = convert(str(folders("UL2, Flan-UL2")), str(tmp_path / "ul2"), "t5x")
    assert "no T5X checkpoint says mlp_activations ('silu', 'linear'): set T5Config.mlp_activations" in said
    for name, head in (
        (ALL_AT_ONCE, "tied to the embedding table and not scaled"),
        ("T5 1.0 with a matrix of its own for the logits", "scaled and not tied"),
    ):
        for to in ("t5x", "orbax"):
            with pytest.raises(ValueError, match=f"logits that are {head}; T5X has no such network: set `to`") as error:
                convert(str(folders(name)), str(tmp_path / "refused"), to)
            assert "\n" not in str(error.value) and not (tmp_path / "refused").exists()
