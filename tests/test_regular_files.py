"""No reader waits for a named pipe, or reads a device without end, where a file of somebody else's should be."""

import json
import os
from pathlib import Path

import pytest
from tiny import CONFIG

from prompt_tuning_jax.array_files.flax_files import open_flax
from prompt_tuning_jax.array_files.safetensors import open_safetensors
from prompt_tuning_jax.array_files.shards import read_index
from prompt_tuning_jax.array_files.torch_files import open_torch
from prompt_tuning_jax.checkpoints import adapters, huggingface, prefixes
from prompt_tuning_jax.infer import whole_lines
from prompt_tuning_jax.prompts import peft
from prompt_tuning_jax.tasks.lines import read_lines
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary, read_settings, vocabulary_in, write_vocabulary


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


SHARD = "model-00001-of-00001.safetensors"
READERS = {
    "adapter": ("adapter_config.json", lambda folder: adapters.read_adapter(folder, CONFIG)),
    "adapter's kind": ("adapter_config.json", adapters.adapter_kind),
    "adapter's base": ("adapter_config.json", peft.base_name),
    "PEFT prompt": ("adapter_config.json", peft.read_adapter),
    "prefix": ("adapter_config.json", lambda folder: prefixes.read_prefix(folder, CONFIG)),
    "config": ("config.json", huggingface.read_config),
    "safetensors": ("model.safetensors", open_safetensors),
    "torch": ("pytorch_model.bin", open_torch),
    "flax": ("flax_model.msgpack", open_flax),
    "index": ("model.safetensors.index.json", lambda folder: read_index(folder / "model.safetensors.index.json")),
    "shard": (SHARD, open_safetensors),
    "vocabulary": ("spiece.model", lambda folder: Vocabulary(str(folder / "spiece.model"))),
    "vocabulary to copy": ("spiece.model", lambda folder: write_vocabulary(folder / "spiece.model", folder)),
    "lines": ("rows.jsonl", lambda folder: [*read_lines(folder / "rows.jsonl")]),
    "packed lines": ("rows.jsonl.gz", lambda folder: [*read_lines(folder / "rows.jsonl.gz")]),
    "answers": ("answers.jsonl", lambda folder: whole_lines(folder / "answers.jsonl")),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [a_pipe, a_device])
@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_are_opened(tmp_path, reader, make):
    name, read = READERS[reader]
    make(tmp_path / name)
    if name == SHARD:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": SHARD}}))
    with pytest.raises((ValueError, OSError), match="no regular file") as error:
        read(tmp_path)
    assert name in str(error.value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [a_pipe, a_device])
def test_settings_that_are_no_regular_file_count_as_absent(tmp_path, make):
    make(tmp_path / "config.json")
    assert read_settings(tmp_path / "config.json") == {}
    assert vocabulary_in(tmp_path) is None
