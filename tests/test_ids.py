"""The ids of padding, the end and the start: read from a base model's files, and used wherever a token is one of them.

That logits and greedy answers are those of transformers for each family's ids is in test_families.py.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import prompt_tuning_jax as pt
from prompt_tuning_jax.array_files.stored import ArrayError
from prompt_tuning_jax.batches.cache import TaskRequest
from prompt_tuning_jax.batches.data import dataset_of
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.base import with_ids
from prompt_tuning_jax.checkpoints.conversion import convert
from prompt_tuning_jax.checkpoints.inspection import inspect_base
from prompt_tuning_jax.inference.engine import engine_of
from prompt_tuning_jax.inference.labels import label_table
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.prompts.initializers import word_ids
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.log_likelihood import shift_right, token_log_probs
from prompt_tuning_jax.tasks.seqio_tokenizer import seqio_vocabulary
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary
from prompt_tuning_jax.training.loss import cross_entropy

NAMES = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
ROWS = [
    {"inputs": "sentence: a joy", "targets": "positive"},
    {"inputs": "sentence: a bore to sit through", "targets": "positive"},  # one answer: few steps learn it
]


def ids_of(config: T5Config) -> tuple[int, ...]:
    return tuple(getattr(config, name) for name in NAMES)


@pytest.fixture
def base_with(tiny, tmp_path):
    """Makes a copy of the tiny base model with other fields in config.json, and files beside it."""

    def make(fields: dict, generation: dict | None = None) -> Path:
        folder = tmp_path / f"base{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny.base, folder)
        told = json.loads((folder / "config.json").read_text())
        told = {name: value for name, value in (told | fields).items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(told))
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        return folder

    return make


ABSENT = dict.fromkeys(NAMES, "absent")


@pytest.mark.parametrize(
    ("fields", "generation", "expected"),
    [
        ({}, None, (0, 1, 0)),
        (dict(zip(NAMES, (1, 2, 0), strict=True)), None, (1, 2, 0)),
        (ABSENT, None, (0, 1, 0)),
        (ABSENT, dict(zip(NAMES, (0, 2, 1), strict=True)), (0, 2, 1)),
        ({"eos_token_id": 2}, {"eos_token_id": 1}, (0, 2, 0)),  # config.json wins
        ({"eos_token_id": [2]}, None, (0, 2, 0)),
        (ABSENT | {"pad_token_id": 3}, None, (3, 1, 3)),  # without a start of its own, it starts with padding
    ],
)
def test_ids_are_those_of_config_json_then_of_generation_config_json(base_with, fields, generation, expected):
    folder = base_with(fields, generation)
    assert ids_of(huggingface.read_config(folder)) == expected
    model = pt.load(str(folder))
    assert ids_of(model.config) == expected
    assert (model.tokenizer.pad_id, model.tokenizer.eos_id, model.tokenizer.start_id) == expected


def test_ids_that_the_two_files_contradict_are_said_once(base_with, caplog):
    folder = base_with({"eos_token_id": [2], "pad_token_id": 0}, {"eos_token_id": 1, "pad_token_id": 0})
    for _ in range(2):
        pt.load(str(folder))
    assert [record.getMessage() for record in caplog.records if "token_id" in record.getMessage()] == [
        f"{folder}/config.json has eos_token_id 2, and generation_config.json 1: config.json's is used"
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"eos_token_id": [1, 2]}, "eos_token_id is [1, 2], expected one id below the vocab_size of"),
        ({"eos_token_id": 10**9}, "eos_token_id is 1000000000, expected one id below"),
        ({"pad_token_id": True}, "pad_token_id is True, expected one id"),
        ({"pad_token_id": 1}, "pad_token_id and eos_token_id are both 1"),
        ({"model_type": "longt5"}, "model_type 'longt5' is not supported: it is LongT5"),
        ({"model_type": "t5gemma"}, "model_type 't5gemma' is not supported: it is T5Gemma"),
        ({"model_type": "bert"}, "model_type 'bert' is not supported; expected t5, mt5, umt5"),
        ({"chronos_config": {}}, "it is Chronos, a T5 of numbers"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder is false, which is not supported; expected true"),
        ({"forced_bos_token_id": 5}, "forced_bos_token_id is 5, which is not supported; expected null"),
        ({"suppress_tokens": [7]}, "suppress_tokens is [7], which is not supported; expected []"),
        ({"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}, which is not supported'),
        ({"is_gated_act": False}, "is_gated_act is False, and feed_forward_proj 'gated-gelu'"),
        ({"dense_act_fn": "silu"}, "dense_act_fn is 'silu', and feed_forward_proj 'gated-gelu'"),
    ],
)
def test_what_would_change_the_model_is_refused_by_name(base_with, fields, said):
    folder = base_with(fields)
    with pytest.raises(ArrayError) as refused:
        huggingface.read_config(folder)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="is not the configuration of a T5"):
        pt.load(str(folder))


@pytest.mark.parametrize(
    ("generation", "said"),
    [
        ({"forced_bos_token_id": 5}, "forced_bos_token_id is 5, which is not supported; expected null"),
        ({"suppress_tokens": [4]}, "suppress_tokens is [4], which is not supported; expected []"),
        ({"sequence_bias": [[[3], -10.0]]}, "sequence_bias is [[[3], -10.0]], which is not supported"),
        ({"min_new_tokens": 4}, "min_new_tokens is 4, which is not supported; expected 0"),
        ({"eos_token_id": [1, 3]}, "eos_token_id is [1, 3], expected one id"),
        ([1], "it is no JSON object"),
    ],
)
def test_what_would_change_the_answers_is_refused_in_generation_config_json(base_with, generation, said):
    """transformers generates with what this file says, also if config.json has ids of its own."""
    with pytest.raises(ArrayError) as refused:
        huggingface.read_config(base_with({}, generation))
    assert f"generation_config.json: {said}" in str(refused.value) and "\n" not in str(refused.value)


def test_how_answers_are_searched_for_is_no_part_of_the_model(base_with):
    searched = {"num_beams": 4, "max_length": 20, "do_sample": True, "top_k": 50, "eos_token_id": [1], "min_length": 0}
    assert huggingface.read_config(base_with({}, searched)) == huggingface.read_config(base_with({}))


def test_ids_are_part_of_the_base_models_identity(base_with, tiny):
    """A prompt of a model that ends with 1 must not match one that ends with 2."""
    others = [{}, {"eos_token_id": 2}, {"pad_token_id": 2}, {"decoder_start_token_id": 2}]
    prints = [pt.load(str(base_with(fields))).fingerprint for fields in others]
    assert len(set(prints)) == len(others) and prints[0] == pt.load(str(tiny.base)).fingerprint
    folder = base_with({"eos_token_id": 2})
    assert inspect_base(str(folder), fingerprint=True).facts["fingerprint"] == prints[1]


def test_ids_that_no_t5x_checkpoint_holds_are_not_dropped(base_with, tmp_path):
    """T5X pads and starts with 0, and ends with the tokenizer's end."""
    target = tmp_path / "t5x"
    for fields, said in (
        (
            {"eos_token_id": 2},
            "has eos_token_id 2, but the tokenizer's is 1; a T5X checkpoint cannot store eos_token_id: set `to`",
        ),
        ({"pad_token_id": 2}, "has pad_token_id 2, but T5X's is 0"),
        ({"decoder_start_token_id": 2}, "has decoder_start_token_id 2, but T5X's is 0"),
    ):
        folder = base_with(fields)
        with pytest.raises(ValueError, match=said) as refused:
            convert(str(folder), str(target), "t5x")
        assert "\n" not in str(refused.value) and not target.exists()
    (ended := base_with({"eos_token_id": 2})).joinpath("spiece.model").unlink()
    assert "no T5X checkpoint says eos_token_id 2: use it with" in convert(str(ended), str(target), "t5x")
    convert(str(folder), str(tmp_path / "again"), "huggingface")
    assert ids_of(huggingface.read_config(tmp_path / "again")) == (0, 1, 2)


def test_fields_that_change_nothing_are_accepted(base_with):
    harmless = {"use_cache": False, "dropout_rate": 0.3, "is_decoder": False, "forced_bos_token_id": None}
    harmless |= {"is_gated_act": True, "dense_act_fn": "gelu_new", "repetition_penalty": 1.0, "suppress_tokens": None}
    assert huggingface.read_config(base_with(harmless)) == huggingface.read_config(base_with({}))


def test_a_size_with_other_ids_than_the_files_is_refused(base_with):
    model = pt.load(str(base_with({"eos_token_id": 2})))
    assert ids_of(with_ids(T5Config(128, 8, 1, 1, 1, 8), model.tokenizer)) == (0, 2, 0)
    with pytest.raises(ValueError, match="eos_token_id is 2, not 3: leave T5Config.eos_token_id out"):
        with_ids(T5Config(128, 8, 1, 1, 1, 8, eos_token_id=3), model.tokenizer)


def test_the_loss_is_that_of_torch_without_padding():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 11)).astype(np.float32)
    targets = np.array([[0, 5, 2, 1, 1], [0, 0, 2, 1, 1], [4, 2, 1, 1, 1]], np.int32)  # 1 pads, 0 is a token
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), 1, z_loss=0.0)
    flat = torch.tensor(logits).reshape(-1, 11), torch.tensor(targets.reshape(-1).astype(np.int64))
    expected = torch.nn.functional.cross_entropy(*flat, ignore_index=1, reduction="sum")
    np.testing.assert_allclose(found.loss, expected.item(), rtol=1e-6)
    assert found.tokens == 8 and found.rows == 3
    scores = token_log_probs(jnp.asarray(logits), jnp.asarray(targets), 1).sum()
    np.testing.assert_allclose(scores, -expected.item(), rtol=1e-6)
    np.testing.assert_array_equal(shift_right(jnp.asarray(targets), 7)[:, :3], [[7, 0, 5], [7, 0, 0], [7, 4, 2]])


def test_batches_and_labels_are_padded_and_ended_with_the_models_ids(base_with):
    words = pt.load(str(base_with(dict(zip(NAMES, (1, 2, 0), strict=True))))).tokenizer
    own = Vocabulary(words.path)
    lengths = {"inputs": 16, "targets": 8}
    batch = dataset_of(ROWS, "train", batch_size=4, lengths=lengths).batches(words)[0]
    for row, at in zip(ROWS, (0, 1), strict=True):
        for name, array in (("inputs", batch.inputs), ("targets", batch.targets)):
            ids = [*own.encode(row[name]), 2]
            assert array[at].tolist() == ids + [1] * (array.shape[1] - len(ids))
    assert set(batch.inputs[2:].reshape(-1).tolist()) == {1}
    table = label_table(["positive", "a very good one"], words)
    assert [row.tolist()[-1] for row in table] == [1, 2] and own.eos_id not in table[1]
    assert words.decode([*own.encode("a joy"), 1, 2, 5]) == "a joy"


def test_a_cache_with_another_end_is_another_cache(base_with):
    from prompt_tuning_jax.batches.build import find_task  # imports TensorFlow

    path = Vocabulary(str(base_with({}) / "spiece.model")).path
    requests = [TaskRequest("demo_reviews", path, {"inputs": 8, "targets": 8}, eos_id=eos) for eos in (None, 1, 2)]
    assert requests[0].fingerprint() == requests[1].fingerprint() != requests[2].fingerprint()
    assert seqio_vocabulary(path).eos_id == 1 and seqio_vocabulary(path, 2).eos_id == 2
    assert seqio_vocabulary(path, 2).encode("a joy") == seqio_vocabulary(path).encode("a joy")
    rows = [next(find_task(one).get_dataset(None, "train", shuffle=False).as_numpy_iterator()) for one in requests]
    for name in ("inputs", "targets"):
        own, _, other = (row[name].tolist() for row in rows)
        assert own[:-1] == other[:-1] and (own[-1], other[-1]) == (1, 2)


def test_special_tokens_are_no_words_whatever_their_ids(base_with):
    words = pt.load(str(base_with(dict(zip(NAMES, (5, 7, 9), strict=True))))).tokenizer
    ids = word_ids(words, 200)
    assert not {0, 1, 2, 5, 7, 9} & {*ids.tolist()} and {3, 4, 6, 8} <= {*ids.tolist()}


@pytest.mark.parametrize("ids", [(1, 2, 0), (0, 2, 1)])
def test_training_learns_the_models_end_and_stops_there(base_with, ids):
    """Before, targets ended in 1 whatever the model's end."""
    model = pt.load(str(base_with(dict(zip(NAMES, ids, strict=True)))))
    options = {"steps": 20, "batch_size": 8, "lengths": {"inputs": 16, "targets": 8}, "progress": False}
    result = pt.train(model, pt.ModelTuning(), ROWS * 4, ROWS, optimizer=optax.adam(0.03), **options)
    tuned = result.merged()
    pad, end, _ = ids
    inputs = np.full((2, 16), pad, np.int32)
    for row, given in zip(inputs, ROWS, strict=True):
        tokens = [*tuned.tokenizer.encode(given["inputs"]), end]
        row[: len(tokens)] = tokens
    tokens, _ = engine_of(tuned.config).greedy(Injection(), dict(tuned.parameters), inputs, None, 8)
    expected = [[*tuned.tokenizer.encode(row["targets"]), end] for row in ROWS]
    assert np.asarray(tokens).tolist() == [row + [pad] * (8 - len(row)) for row in expected]
    assert result.metrics["accuracy"] == 100.0
    answers = [
        answer["prediction"] for answer in pt.Predictor(tuned).predict([{**row, "prompt": None} for row in ROWS])
    ]
    assert answers == [row["targets"] for row in ROWS]


def test_a_tuned_model_keeps_its_ids(base_with, tmp_path):
    model = pt.load(str(base_with(dict(zip(NAMES, (1, 2, 0), strict=True)))))
    huggingface.write(tmp_path / "again", model.config, model.parameters, model.tokenizer.path)
    again = pt.load(str(tmp_path / "again"))
    assert ids_of(again.config) == (1, 2, 0) and again.fingerprint == model.fingerprint
    assert jax.tree.all(jax.tree.map(jnp.array_equal, dict(again.parameters), dict(model.parameters)))
