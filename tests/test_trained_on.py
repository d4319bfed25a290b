"""What is known of a prompt's training, and which names may be one base model's."""

import json

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.base import EMBEDDED
from prompt_tuning_jax.checkpoints.trained_on import TrainedOn, is_called, trained_on
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.prompts.peft import write_adapter

FLAN, OLD, NEW = "google/flan-t5-base", "7" * 40, "b" * 40


@pytest.mark.parametrize(
    "path, name, same",
    [
        (f"{FLAN}@{NEW}", FLAN, True),
        (f"{FLAN}@{NEW}", f"{FLAN}@main", True),
        (f"{FLAN}@{NEW}", f"{FLAN}@{NEW}", True),
        (f"{FLAN}@{NEW}", f"{FLAN}@{OLD}", False),
        (f"{FLAN}@{NEW}", "google/t5-v1_1-base", False),
        (f"{FLAN}@{NEW}", "another/flan-t5-base", False),
        (f"{FLAN}@{NEW}", "/once/was/flan-t5-base/", True),
        ("/models/flan-t5-base", FLAN, True),
        ("/models/flan-t5-base", "/once/was/flan-t5-base", True),
        ("/models/flan-t5-large", FLAN, False),
        ("gs://t5/flan-t5-base", FLAN, True),
        (str(EMBEDDED["nano"]), "nano", True),
        (f"{FLAN}@{NEW}", "nano", False),
        ("/models/nul", "n\0l", False),
    ],
)
def test_which_names_may_be_one_base_models(path, name, same):
    assert is_called(path, name) == same


def test_a_folder_that_is_there_is_compared_by_its_place(tmp_path, monkeypatch):
    """Not by its name: a run's best/model is called as every other's."""
    for run in ("a", "b"):
        (tmp_path / run / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "model")
    monkeypatch.chdir(tmp_path)
    assert is_called(str(tmp_path / "a" / "model"), "link")
    assert is_called(str(tmp_path / "a" / "model"), "a/model")
    assert not is_called(str(tmp_path / "a" / "model"), "b/model")


def test_a_run_is_known_by_each_of_its_files(tmp_path):
    run = tmp_path / "run"
    write_adapter(run / "best" / "adapter", np.ones((2, 4), np.float32), FLAN)
    (run / "summary.json").write_text(json.dumps({"base_fingerprint": "aaaa", "tokenizer_fingerprint": "tttt"}))
    known = TrainedOn("aaaa", "tttt")
    assert trained_on(run) == trained_on(str(run / "best" / "prompt.npy")) == known
    assert trained_on(run / "best" / "prompts" / "sst2.npy") == known
    assert trained_on(run / "best" / "adapter") == known._replace(name=FLAN)
    assert trained_on(run / "prompts" / "20.npy") == trained_on("gs://bucket/prompt") == TrainedOn()
    (run / "summary.json").write_text('{"base_fingerprint": 5}')
    assert trained_on(run) == TrainedOn()
    for text in ("[1]", "{", "[" * 200_000):
        (run / "summary.json").write_text(text)
        with pytest.raises(ValueError, match="run/summary.json is no JSON object; expected the summary.json of a run$"):
            trained_on(run)


def test_a_whole_model_needs_its_tokenizer_and_no_base_model():
    known = TrainedOn("aaaa", "tttt")
    assert known.of(Injection(parameters={"decoder/decoder_norm/scale": np.ones(4)})) == TrainedOn(tokenizer="tttt")
    adapter = {"encoder/layers_0/mlp/wo/lora_a": np.ones((4, 2)), "encoder/layers_0/mlp/wo/lora_b": np.ones((2, 4))}
    for injection in (Injection(), Injection(prompt=np.ones((2, 4), np.float32)), Injection(parameters=adapter)):
        assert known.of(injection) == known
