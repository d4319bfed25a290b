"""Hugging Face folders: read like `transformers` reads them, written so that it reads them, refused when damaged."""

import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fixtures.models import prompted, random_model, random_tokens, randomise, tree
from safetensors.numpy import load_file, save_file

from prompt_tuning_jax.array_files.safetensors import open_safetensors
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.base import check_shapes, load_base, open_model
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.decoding import greedy
from prompt_tuning_jax.t5.network import Transformer

# No two dimensions alike, and stacks of different depth: a transposed or misplaced matrix cannot fit.
CONFIG = T5Config(61, 24, 3, 2, 3, 40, head_dim=7)


@pytest.fixture(scope="module")
def transformers():
    os.environ["HF_HUB_OFFLINE"] = "1"
    pytest.importorskip("torch").set_num_threads(1)
    return pytest.importorskip("transformers")


# What `their_model` may be: T5 1.1 with logits of its own, mT5 with its own configuration, T5 1.0 with the table's.
KINDS = {
    "t5_1_1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {"feed_forward_proj": "gated-gelu"},
    "t5_1_0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
}


@functools.cache
def their_model(kind="t5_1_1"):
    """One of theirs with every weight random, layer norms too."""
    import torch
    import transformers

    make_config, make = (
        (transformers.MT5Config, transformers.MT5ForConditionalGeneration)
        if kind == "mt5"
        else (transformers.T5Config, transformers.T5ForConditionalGeneration)
    )
    config = make_config(
        vocab_size=CONFIG.vocab_size,
        d_model=CONFIG.emb_dim,
        d_kv=CONFIG.head_dim,
        d_ff=CONFIG.mlp_dim,
        num_layers=CONFIG.num_encoder_layers,
        num_decoder_layers=CONFIG.num_decoder_layers,
        num_heads=CONFIG.num_heads,
        decoder_start_token_id=0,
        **KINDS[kind],
    )
    model = make(config).eval()
    if kind != "t5_1_0":
        # transformers 5 ties lm_head to the embedding whatever the config says; T5 1.1 has a matrix of its own.
        model.lm_head.weight = torch.nn.Parameter(torch.empty(CONFIG.vocab_size, CONFIG.emb_dim))
    randomise(model, CONFIG.head_dim)
    with torch.no_grad():
        if kind == "t5_1_0":
            model.shared.weight *= CONFIG.emb_dim**0.5  # logits of the same size, though scaled
        model.lm_head.weight[1] *= 2 if kind != "t5_1_0" else 3  # so that some answers end
    return model


@pytest.fixture(scope="module")
def theirs(transformers):
    return their_model()


@pytest.fixture(scope="module")
def their_folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def our_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours") / "model"
    huggingface.write(folder, CONFIG, jax.device_get(random_model(CONFIG)[1]))
    return folder


def their_inputs(model, inputs, prompt=None):
    """A prompt goes before what the inputs are embedded as, and is never masked."""
    import torch

    ids = torch.tensor(np.asarray(inputs, np.int64))
    mask = (ids > 0).long()
    if prompt is None:
        return {"input_ids": ids, "attention_mask": mask}
    embedded = model.get_input_embeddings()(ids)
    before = torch.tensor(prompt).expand(len(ids), *prompt.shape)
    return {
        "inputs_embeds": torch.cat([before, embedded], dim=1),
        "attention_mask": torch.cat([torch.ones(before.shape[:2], dtype=mask.dtype), mask], dim=1),
    }


def their_logits(model, inputs, decoder_inputs, prompt=None):
    import torch

    with torch.no_grad():
        tokens = torch.tensor(np.asarray(decoder_inputs, np.int64))
        return model(**their_inputs(model, inputs, prompt), decoder_input_ids=tokens).logits.numpy()


def their_answers(model, inputs, length, prompt=None):
    import torch

    with torch.no_grad():
        tokens = model.generate(
            **their_inputs(model, inputs, prompt),
            do_sample=False,
            num_beams=1,
            max_new_tokens=length,
            use_cache=False,  # their cache has a place for each encoder layer, and the decoder has one more
        ).numpy()[:, 1:]
    return np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])))


def read(folder):
    """Every parameter, read."""
    return {name: np.asarray(array) for name, array in huggingface.open_folder(folder)[1].items()}


@functools.cache
def compiled(config, length=None, with_prompt=False):
    """Our logits, or greedy answers of some length: one program for all weights of a size."""
    model = prompted(config) if with_prompt else Transformer(config)

    def run(params, inputs, decoder_inputs, prompt):
        if length:
            return greedy(model, tree(params), inputs, length, prompt=prompt)[0]
        tokens = inputs, decoder_inputs, decoder_inputs
        return model.apply({"params": tree(params)}, *tokens, enable_dropout=False, prompt=prompt)

    return jax.jit(run)


def our_logits(config, params, inputs, decoder_inputs, prompt=None):
    prompt = None if prompt is None else jnp.asarray(prompt)
    return compiled(config, None, prompt is not None)(params, inputs, decoder_inputs, prompt)


def our_answers(config, params, inputs, length, prompt=None):
    prompt = None if prompt is None else jnp.asarray(prompt)
    return compiled(config, length, prompt is not None)(params, inputs, None, prompt)


def some_tokens(rows=4):
    """Padded inputs, and decoder inputs."""
    rng = np.random.default_rng(0)
    return random_tokens(rng, rng.integers(1, 10, rows), 9, 61), random_tokens(rng, [6] * rows, 6, 61)


PROMPT = np.random.default_rng(1).normal(0, 1, (5, CONFIG.emb_dim)).astype(np.float32)


def folders_of(kind, folder):
    """What they save, of each kind; `flan` is T5 1.1 as Flan-T5's folder has it: other fields, other dtype, copies."""
    their_model(kind.replace("flan", "t5_1_1")).save_pretrained(folder)
    if kind == "flan":
        config = json.loads((folder / "config.json").read_text())
        del config["scale_decoder_outputs"]  # of transformers 5; Flan-T5's folders are of 4.23
        config |= {
            "_name_or_path": "google/t5-v1_1-small",
            "tie_word_embeddings": False,
            "is_gated_act": True,
            "dense_act_fn": "gelu_new",
            "n_positions": 512,
            "output_past": True,
            "torch_dtype": "float32",
        }
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            tensors[name] = tensors["shared.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("prompt", [None, PROMPT])
@pytest.mark.parametrize("kind", ["t5_1_1", "flan", "mt5", "t5_1_0"])
def test_logits_and_greedy_answers_are_theirs(transformers, tmp_path, kind, prompt):
    """Over padded inputs; with a prompt and without."""
    model = their_model(kind.replace("flan", "t5_1_1"))
    config, params = huggingface.read_config(folders_of(kind, tmp_path)), read(tmp_path)
    fields = {"mlp_activations": ("relu",), "logits_via_embedding": True} if kind == "t5_1_0" else {}
    assert config == T5Config(**vars(CONFIG) | fields)
    check_shapes({name: array.shape for name, array in params.items()}, config, tmp_path)
    inputs, decoder_inputs = some_tokens(rows=64)
    assert 1 in (inputs > 0).sum(1) and 9 in (inputs > 0).sum(1)
    expected = their_logits(model, inputs, decoder_inputs, prompt)
    found = our_logits(config, params, inputs, decoder_inputs, prompt)
    assert expected.std() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    answers = their_answers(model, inputs, 16, prompt)
    np.testing.assert_array_equal(our_answers(config, params, inputs, 16, prompt), answers)
    assert 0 < np.any(answers == 1, axis=1).sum() < 64  # some end, some do not
    assert len({tuple(answer) for answer in answers}) > (3 if config.logits_via_embedding else 20)


def test_config_that_transformers_5_writes(their_folder):
    """It says "tie_word_embeddings": true of T5 1.1, too; taken at its word, the logits would be of another model."""
    written = json.loads((their_folder / "config.json").read_text())
    assert not huggingface.read_config(their_folder).logits_via_embedding
    if "scale_decoder_outputs" in written:
        assert written["tie_word_embeddings"]


def test_config_of_mt5(transformers, tmp_path):
    """Google's says that nothing is tied, transformers 5's that the logits are; either leaves out mT5's defaults."""
    their_model("mt5").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    assert written["model_type"] == "mt5" and written["tie_word_embeddings"]
    for change in ({}, {"tie_word_embeddings": False}, {"feed_forward_proj": None}):
        text = {name: value for name, value in (written | change).items() if value is not None}
        path.write_text(json.dumps(text))
        assert huggingface.read_config(tmp_path) == CONFIG


@pytest.mark.parametrize(
    ("tied", "activations"),
    [(False, ("gelu", "linear")), (True, ("relu",)), (False, ("relu", "linear")), (True, ("gelu", "linear"))],
)
def test_they_read_what_we_write(transformers, tmp_path, tied, activations):
    """T5 1.1, and the first T5 with its tied logits and plain feed-forward, in one file and in shards."""
    config = T5Config(61, 24, 3, 2, 3, 40, head_dim=7, logits_via_embedding=tied, mlp_activations=activations)
    params = jax.device_get(random_model(config)[1])
    found = our_logits(config, params, *some_tokens())
    for name, shard_bytes in (("whole", 10**9), ("shards", 10_000)):
        huggingface.write(tmp_path / name, config, params, shard_bytes=shard_bytes)
        model, report = transformers.T5ForConditionalGeneration.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not any(report.values()), report
        np.testing.assert_allclose(found, their_logits(model.eval(), *some_tokens()), rtol=0, atol=2e-5)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3


def test_shards_that_they_write(transformers, theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    bit_identical(read(tmp_path / "shards"), read(tmp_path / "whole"))


def bit_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        value = np.asarray(value)
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), name
        assert np.asarray(found[name]).tobytes() == value.tobytes(), name


def test_round_trip_is_bit_identical(our_folder):
    assert huggingface.read_config(our_folder) == CONFIG
    bit_identical(read(our_folder), jax.device_get(random_model(CONFIG)[1]))


@pytest.mark.parametrize("shard_bytes", [1, 5_000, 10**9])
def test_shards_are_numbered_indexed_and_no_larger_than_asked(our_folder, tmp_path, shard_bytes):
    params = jax.device_get(random_model(CONFIG)[1])
    huggingface.write(tmp_path / "model", CONFIG, params, shard_bytes=shard_bytes)
    bit_identical(read(tmp_path / "model"), params)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert sum(len(load_file(file)) for file in files) == len(params)
    if shard_bytes == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
        assert files[0].read_bytes() == (our_folder / "model.safetensors").read_bytes()
        return
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    for file in files:
        sizes = [array.nbytes for array in load_file(file).values()]
        assert sum(sizes) <= shard_bytes or len(sizes) == 1
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in params.values())
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in files)


def test_bfloat16_stays_bfloat16(transformers, tmp_path):
    """Half the bytes on disk and in memory, and no bit of them rounded again; theirs and ours alike."""
    params = {path: np.asarray(value.astype(jnp.bfloat16)) for path, value in random_model(CONFIG)[1].items()}
    whole = {path: value.astype(np.float32) for path, value in params.items()}
    for values, dtype in ((params, None), (params, "bfloat16"), (whole, "bfloat16")):
        huggingface.write(tmp_path / "model", CONFIG, values, dtype=dtype)
        bit_identical(read(tmp_path / "model"), params)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    huggingface.write(tmp_path / "model", CONFIG, whole)
    bit_identical(read(tmp_path / "model"), whole)

    theirs = their_model().bfloat16()
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.float()
    their_model.cache_clear()
    _, arrays = huggingface.open_folder(tmp_path / "theirs")
    assert {array.dtype for array in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
    huggingface.write(tmp_path / "again", CONFIG, arrays)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    assert first["shared.weight"].dtype == ml_dtypes.bfloat16
    bit_identical(second, first)


def test_each_array_keeps_its_own_dtype(tmp_path):
    """Some files have layer norms in float32 beside matrices in bfloat16."""
    params = {
        name: np.asarray(value.astype(jnp.float32 if name.endswith("scale") else jnp.bfloat16))
        for name, value in random_model(CONFIG)[1].items()
    }
    huggingface.write(tmp_path / "model", CONFIG, params)
    bit_identical(read(tmp_path / "model"), params)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"


def test_prompt_is_left_out_and_vocabulary_goes_along(tmp_path):
    """What the base's folder holds is a base; a folder that is there already is replaced, whole."""
    (tmp_path / "words.model").write_bytes(b"any bytes")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    params = jax.device_get(random_model(CONFIG, 5)[1])
    huggingface.write(tmp_path / "model", CONFIG, params, vocabulary=tmp_path / "words.model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "spiece.model",
    }
    assert (tmp_path / "model" / "spiece.model").read_bytes() == b"any bytes"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "words.model"}
    assert "encoder/prompt/prompt" not in huggingface.open_folder(tmp_path / "model")[1]


# Damaged ones.


@pytest.fixture
def copied(our_folder, tmp_path):
    """A whole folder, to be damaged."""
    return shutil.copytree(our_folder, tmp_path / "model")


@pytest.fixture
def shards(tmp_path):
    """The same in shards, to be damaged."""
    huggingface.write(tmp_path / "shards", CONFIG, jax.device_get(random_model(CONFIG)[1]), shard_bytes=10_000)
    return tmp_path / "shards"


def refused(folder, *expected, call=open_model):
    """The one line that a user gets."""
    with pytest.raises(ValueError) as error:
        call(str(folder))
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    for part in (str(folder), "`where`", *expected):
        assert part in message, message
    return message


def load(folder):
    return load_base(folder, CONFIG)


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.5, 0.999])
def test_truncated_weights_are_refused(copied, share):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(copied, "model.safetensors")


def test_absent_weights_are_refused(copied):
    (copied / "model.safetensors").unlink()
    refused(copied, "model.safetensors")


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensors_are_named(copied):
    change_tensors(copied, lambda tensors: tensors.pop("lm_head.weight"))
    refused(copied, "lm_head.weight is missing")


def test_tensors_too_many_are_named(copied):
    change_tensors(copied, lambda tensors: tensors.update({f"lora_{i}": np.ones(3, np.float32) for i in range(5)}))
    refused(copied, "lora_0 is not part of the model", "and 2 more")


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", huggingface.UNUSED])
def test_known_copies_are_accepted(copied, name):
    expected = read(copied)
    change_tensors(copied, lambda tensors: tensors.update({name: tensors["shared.weight"].copy()}))
    bit_identical(read(copied), expected)
    load(str(copied))


def test_a_table_under_its_copys_name_is_found(copied):
    """safetensors keeps one name of a shared tensor, and not always the same."""
    expected = read(copied)
    change_tensors(
        copied, lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors.pop("shared.weight")})
    )
    bit_identical(read(copied), expected)


def test_copies_with_values_of_their_own_are_refused(copied):
    """A model whose encoder has another table is none of ours: left out in silence, it would be another model."""

    def change(tensors, name):
        tensors[name] = tensors["shared.weight"].copy()
        tensors[name][-1, -1] += 1

    change_tensors(copied, lambda tensors: change(tensors, "encoder.embed_tokens.weight"))
    refused(copied, "encoder.embed_tokens.weight", call=load)


def test_integers_are_no_weights(copied):
    change_tensors(
        copied, lambda tensors: tensors.update({"shared.weight": np.ones(tensors["shared.weight"].shape, np.int8)})
    )
    refused(copied, "shared.weight", "I8")


def test_tensors_of_another_shape_are_named(copied):
    change_tensors(copied, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"][:-1].copy()}))
    refused(copied, "decoder/logits_dense/kernel is [24, 60], not [24, 61]", call=load)


def test_a_missing_shard_is_named(shards):
    path = sorted(shards.glob("model-00002-of-*.safetensors"))[0]
    path.unlink()
    refused(shards, path.name)


def test_a_truncated_shard_is_named(shards):
    path = sorted(shards.glob("model-00002-of-*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    refused(shards, path.name)


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(change(index)))


def test_a_tensor_that_is_not_in_its_shard_is_named(shards):
    def change(index):
        index["weight_map"]["lm_head.weight"] = index["weight_map"]["shared.weight"]
        return index

    before = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    assert before["lm_head.weight"] != before["shared.weight"]
    change_index(shards, change)
    refused(shards, "lm_head.weight")


def test_a_tensor_in_two_shards_is_taken_from_the_one_the_index_says(shards):
    """One that a tool left behind in another shard is no weight of the model."""
    expected = read(shards)
    shard_of = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in set(shard_of.values()) - {shard_of["shared.weight"]}:
        tensors = load_file(shards / shard)
        save_file(tensors | {"shared.weight": np.zeros((61, 24), np.float32)}, shards / shard)
    bit_identical(read(shards), expected)


@pytest.mark.parametrize("name", ["../model/model.safetensors", "/etc/passwd", "..", ".", "", "a/b", "x\0y", 7, None])
def test_an_index_that_leads_elsewhere_is_refused(copied, shards, name):
    """Even to weights that would do."""
    change_index(shards, lambda index: {"weight_map": dict.fromkeys(index["weight_map"], name)})
    refused(shards)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 9_999])
def test_an_index_that_is_none_is_refused(shards, text):
    (shards / "model.safetensors.index.json").write_text(text)
    refused(shards, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "7", '"T5"', "{}", '{"model_type": "bert", "hidden_size": 24}', "\xff\x00"),
        "[" * 99_999,
        '{"vocab_size": ' + "9" * 9_999 + "}",
    ],
)
def test_a_config_of_something_else_is_refused(copied, text):
    (copied / "config.json").write_bytes(text.encode("latin-1"))
    refused(copied, "config.json")


WRONG = [0, -1, True, 2.0, "2", [], {}, float("nan"), 10**12]


@pytest.mark.parametrize("field", ["vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers"])
def test_sizes_that_are_none_are_refused(copied, field):
    """None of them makes a model, or a list of 10^12 layers."""
    text = json.loads((copied / "config.json").read_text())
    for value in (*WRONG, None):
        (copied / "config.json").write_text(json.dumps(text | {field: value}))
        refused(copied, "config.json", field)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("num_decoder_layers", WRONG),
        ("relative_attention_num_buckets", WRONG),
        ("relative_attention_max_distance", WRONG),
        ("feed_forward_proj", ["gelu", "gated-gelu-gated", "x" * 9_999, 3, [], None]),
        ("tie_word_embeddings", ["false", 0, None, []]),
        ("layer_norm_epsilon", [1e-5, "1e-6", None]),
    ],
)
def test_choices_that_are_not_ours_are_refused(copied, field, values):
    text = json.loads((copied / "config.json").read_text())
    for value in values:
        (copied / "config.json").write_text(json.dumps(text | {field: value}))
        refused(copied, "config.json")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("relative_attention_max_distance", 64, "relative_attention_max_distance 64, not 128"),
        ("feed_forward_proj", "gated-relu", "mlp_activations ('relu', 'linear'), not ('gelu', 'linear')"),
        ("num_heads", 7, "num_heads 7, not 3"),
        ("relative_attention_num_buckets", 16, "relative_attention_num_buckets 16, not 32"),
        ("tie_word_embeddings", True, "scale_decoder_outputs True, not None"),
    ],
)
def test_a_model_that_is_configured_otherwise_is_refused(copied, field, value, said):
    """Also where every shape would fit."""
    text = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(text | {field: value}))
    refused(copied, said, call=load)


def test_an_absent_config_is_refused(tmp_path):
    refused(tmp_path, "config.json")


def test_the_state_dict_of_their_model(transformers, theirs, tmp_path):
    """As `save_pretrained` wrote it before there were safetensors: with copies of the table in the same storage."""
    import torch

    theirs.save_pretrained(tmp_path)
    expected = read(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} <= theirs.state_dict().keys()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    bit_identical(read(tmp_path), expected)


def test_pickles_beside_safetensors_are_let_lie(copied):
    expected = read(copied)
    (copied / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    bit_identical(read(copied), expected)


def test_other_files_of_tensors_by_their_stem(tmp_path):
    """PEFT's adapters are named otherwise than models."""
    save_file({"prompt": np.ones((2, 3), np.float32)}, tmp_path / "adapter_model.safetensors")
    np.testing.assert_array_equal(open_safetensors(tmp_path, "adapter_model")["prompt"], np.ones((2, 3)))
