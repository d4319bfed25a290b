"""`convert --inspect`: what a base model is, and every reason why it would be refused."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import CONFIG, ROOT, random_params

import prompt_tuning_jax as pt
from prompt_tuning_jax import convert
from prompt_tuning_jax.checkpoints import huggingface, t5x
from prompt_tuning_jax.checkpoints.base import expected_shapes
from prompt_tuning_jax.checkpoints.inspection import family, inspect_base
from prompt_tuning_jax.t5.config import T5Config

# What the config.json of each published model says that tells its family.
FAMILIES = {
    "google-t5/t5-base": ({}, 32_128, ("relu",), True, "T5 1.0, which was also trained on the tasks of GLUE"),
    "google/flan-t5-base": (
        {"model_type": "t5"},
        32_128,
        ("gelu", "linear"),
        False,
        "T5 1.1, LM-adapted T5 1.1 or",
    ),
    "google/mt5-base": ({"model_type": "mt5"}, 250_112, ("gelu", "linear"), False, "mT5"),
    "CohereLabs/aya-101": ({"model_type": "t5"}, 250_112, ("gelu", "linear"), False, "Aya-101"),
    "google/flan-ul2": ({"model_type": "t5"}, 32_128, ("silu", "linear"), True, "UL2 or Flan-UL2"),
    "google/madlad400-3b-mt": ({"model_type": "t5"}, 256_000, ("gelu", "linear"), False, "MADLAD-400"),
    "google/umt5-base": ({"model_type": "umt5"}, 256_384, ("gelu", "linear"), False, "umT5"),
    "EleutherAI/pile-t5-base": ({"model_type": "umt5"}, 32_128, ("gelu", "linear"), False, "Pile-T5"),
    "Salesforce/codet5-base": ({"model_type": "t5"}, 32_100, ("relu",), True, "CodeT5 or CodeT5+"),
    "google/byt5-base": ({"tokenizer_class": "ByT5Tokenizer"}, 384, ("gelu", "linear"), False, "ByT5"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_told_by_its_files(name):
    told, rows, activations, tied, expected = FAMILIES[name]
    config = T5Config(rows, 32, 2, 2, 2, 64, mlp_activations=activations, logits_via_embedding=tied)
    assert family(told, config).startswith(expected)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"model_type": "longt5", "vocab_size": 32_128}, "LongT5, whose encoder"),
        ({"model_type": "t5gemma"}, "T5Gemma, which is made of Gemma"),
        ({"model_type": "t5", "chronos_config": {}, "vocab_size": 4_096}, "Chronos, a T5 of numbers"),
        ({"model_type": "bart"}, "BART, which has learned absolute positions"),
        ({"model_type": "bert"}, "unknown: model_type is 'bert'"),
    ],
)
def test_a_family_that_this_project_does_not_have(told, expected):
    assert family(told, None).startswith(expected)


def test_the_facts_of_a_base(tiny):
    facts, refused = inspect_base(str(tiny.base))
    size = (tiny.base / "model.safetensors").stat().st_size
    assert refused == []
    assert facts == {
        "base": str(tiny.base),
        "files": f"Hugging Face, model.safetensors, {size:,} bytes",
        "family": "T5 1.1",
        "size": "d_model 16, 1+1 layers, 2 heads of 8, d_ff 32 (gelu, linear), 400 table rows, 32 position buckets up "
        "to 128",
        "parameters": f"{sum(value.size for value in random_params(0).values()):,}",
        "dtype": "float32",
        "ids": "pad 0, end 1, start 0",
        "tokenizer": "SentencePiece (spiece.model), 300 tokens, 100 sentinels after them",
        "head": "a matrix of its own, decoder outputs not scaled",
    }


def test_the_facts_of_t5_1_0(tmp_path):
    """Whose head is the embedding table; and of bytes in place of a tokenizer's file."""
    config = dataclasses.replace(CONFIG, vocab_size=384, mlp_activations=("relu",), logits_via_embedding=True)
    params = {name: np.zeros(shape, np.float16) for name, shape in expected_shapes(config).items()}
    huggingface.write(tmp_path / "base", config, params, "bytes")
    facts, refused = inspect_base(str(tmp_path / "base"))
    assert refused == [] and facts["dtype"] == "float16"
    assert facts["head"] == "tied to the embedding table, decoder outputs scaled by d_model^-0.5"
    assert facts["tokenizer"] == "bytes, 259 ids, 11 sentinels among them"


def test_the_facts_of_a_t5x_checkpoint(tiny, tmp_path):
    """With a fingerprint, which is that of the same model in another format."""
    params = {name: value.astype(np.float32) for name, value in random_params(0).items()}
    t5x.write(tmp_path / "checkpoint_1", params, tiny.vocabulary)
    facts, refused = inspect_base(str(tmp_path / "checkpoint_1"), fingerprint=True)
    assert refused == [] and facts["files"] == f"T5X, {len(params)} arrays"
    assert facts["fingerprint"] == pt.load(str(tiny.base)).fingerprint
    assert facts | {"base": "", "files": "", "fingerprint": ""} == inspect_base(str(tiny.base)).facts | {
        "base": "", "files": "", "fingerprint": "",
    }  # fmt: skip


def test_every_reason_is_told(tiny, tmp_path):
    """Those of the parameters and those of the tokenizer are told together."""
    shutil.copytree(tiny.base, tmp_path / "base")
    weights = tmp_path / "base" / huggingface.WEIGHTS
    tensors = load_file(weights)
    tensors["encoder.block.0.layer.0.SelfAttention.q.weight"] = np.zeros((3, 3), np.float64)
    save_file(tensors, weights)
    (tmp_path / "base" / "spiece.model").write_bytes(b"no model")
    facts, refused = inspect_base(str(tmp_path / "base"))
    assert [*map(str, refused)] == [
        "the arrays are float64, expected float32 or bfloat16 or float16",
        f"{tmp_path / 'base'} does not fit the model: encoder/layers_0/attention/query/kernel is [3, 3], not [16, 16]: "
        "set `where`",
        f"{tmp_path / 'base' / 'spiece.model'} is not a SentencePiece model: set `vocabulary` to a .model file",
    ]
    assert facts["dtype"] == "float32 and float64" and "tokenizer" not in facts


def test_a_model_of_another_kind_is_described_and_refused(tiny, tmp_path):
    config = json.loads((tiny.base / "config.json").read_text()) | {
        "model_type": "longt5",
        "feed_forward_proj": "gated-tanh",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts, refused = inspect_base(str(tmp_path))
    assert facts["family"] == "LongT5, whose encoder attends to a part of the inputs at a time"
    assert (
        facts["size"] == "d_model 16, num_layers 1, num_decoder_layers 1, num_heads 2, d_kv 8, d_ff 32, vocab_size 400"
    )
    assert facts["files"] == "Hugging Face, without parameters"
    assert len(refused) == 2 and str(refused[1]) == "no tokenizer lies beside the model"
    assert str(refused[0]).startswith(f"{tmp_path / 'config.json'} is not the configuration of a T5 (")


@pytest.fixture
def said(monkeypatch, capfd):
    """Runs the command line, and returns its exit code and what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        capfd.readouterr()
        try:
            convert.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return code, out + err

    return run


def test_the_command_line_prints_a_line_per_fact_and_reason(said, tiny, tmp_path):
    code, text = said("--inspect", tiny.base)
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    assert code == 0 and dict(lines) == inspect_base(str(tiny.base)).facts | {"refused": "no reason found"}
    shutil.copytree(tiny.base, tmp_path / "base")
    (tmp_path / "base" / "spiece.model").unlink()
    code, text = said("--inspect", tmp_path / "base")
    assert code == 0 and text.splitlines()[-1].startswith(
        f"refused      no vocabulary beside the base {tmp_path / 'base'}: set --vocabulary to its SentencePiece"
    )


def test_the_guide_shows_what_is_printed(said):
    guide = (ROOT / "docs" / "guides" / "base_models.md").read_text()
    page = guide.partition("--inspect nano\n")[2].partition("```")[0].splitlines()
    _, printed = said("--inspect", "nano")
    assert len(page) == 6 and page.pop() == "..."
    assert [line for line in page if f"\n{line.removesuffix(', ...')}" not in printed] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inspect", "no/such/base"], "no base model at no/such/base; expected a folder, an id on the hub or one of"),
        (["--inspect", "nano", "target"], "TARGET is given with --inspect, which takes SOURCE alone; "),
        (["--inspect", "nano", "--to=t5x"], "--to is given with --inspect, which takes SOURCE alone; "),
        (["--inspect"], "the following arguments are required: SOURCE; "),
        (["nano", "target", "--to=t5x", "--fingerprint"], "--fingerprint is given without --inspect; "),
        (["nano", "target"], "the following arguments are required: --to; "),
        (["nano", "--to=t5x"], "the following arguments are required: TARGET; "),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(said, arguments, message):
    code, text = said(*arguments)
    assert code == 2 and text.startswith(f"error: {message}") and text.count("\n") == 1
