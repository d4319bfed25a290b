"""The embedded base is what its card says, and the demo and `eval` do with it what the README shows."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence

import gin
import numpy as np
import pytest

from experiments.sizes import SIZES
from prompt_tuning_jax import demo
from prompt_tuning_jax.checkpoints.base import EMBEDDED, expected_shapes, load_base
from prompt_tuning_jax.checkpoints.huggingface import read_config

NANO = EMBEDDED["nano"]


def test_the_embedded_base_is_the_one_on_its_card():
    config = read_config(NANO)
    base = load_base("nano", config)
    assert f"`{base.fingerprint}`" in (NANO / "README.md").read_text(encoding="utf-8")
    size = SIZES["nano"]
    assert (config.emb_dim, config.mlp_dim, config.num_heads) == (size.emb_dim, size.mlp_dim, size.num_heads)
    assert {name: array.shape for name, array in base.params.items()} == expected_shapes(config)
    assert sum(path.stat().st_size for path in NANO.iterdir()) <= 12_000_000


@pytest.mark.slow
def test_the_demo_learns_and_leaves_the_base_alone(tmp_path):
    """On sentences never seen the prompt is right at least 17 times in 20, and `eval` says the same of its file."""
    folder = tmp_path / "demo"
    arguments = [f"--gin.MODEL_DIR={str(folder)!r}", "--gin.TRAIN_STEPS=150", "--gin.EVAL_PERIOD=75"]
    done = run("demo", *arguments, python=["-c", WITHOUT_PROCESSES], PROMPT_TUNING_CACHE=str(tmp_path / "cache"))
    assert not {"tensorflow", "seqio", "torch"} & {*done.stdout.splitlines()[-1].split()}
    assert not (tmp_path / "cache" / "tasks").exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["accuracy_with_prompt"] >= 0.85
    assert summary["accuracy_with_prompt_unseen_words"] > 0.5
    assert summary["accuracies"]["validation_without_prompt_generation"] < summary["accuracy_with_prompt"]
    assert summary["base_fingerprint"] == load_base("nano", read_config(NANO)).fingerprint
    prompt = np.load(folder / "best" / "prompt.npy")
    assert prompt.dtype == np.float32 and prompt.shape == (20, 128)
    assert (folder / "learning_curve.png").stat().st_size > 10_000
    assert re.search(r"sentences never seen +0\.\d{3}", done.stdout)

    found = json.loads(
        run(
            "eval",
            "--gin_file=models/nano.gin",
            "--gin_file=runs/eval.gin",
            "--gin.MIXTURE_OR_TASK_NAME='demo_reviews'",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 48, 'targets': 8}",
            "--gin.INITIAL_CHECKPOINT_PATH='nano'",
            f"--gin.PROMPT_FILE={str(folder / 'best' / 'prompt.npy')!r}",
        ).stdout
    )
    assert found["generation"]["accuracy"] == pytest.approx(100 * summary["accuracy_with_prompt"])
    assert found["examples"] == 500


# Runs the demo where no other process can be started, and prints what was imported.
WITHOUT_PROCESSES = """
import os, subprocess, sys
def never(*arguments, **options):
    raise AssertionError(f"a process was started: {arguments}")
subprocess.Popen = os.fork = os.posix_spawn = never
from prompt_tuning_jax import demo
demo.main()
print(*{name.partition(".")[0] for name in sys.modules if sys.modules[name]})
"""


def run(verb: str, *arguments: str, python: Sequence[str] = (), **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *(python or ("-m", f"prompt_tuning_jax.{verb}")), *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_the_demos_gin_file_is_for_its_task_alone(capsys, monkeypatch):
    gin.clear_config()
    monkeypatch.setattr(sys, "argv", ["demo", "--gin.MIXTURE_OR_TASK_NAME='glue_sst2_v200'"])
    with pytest.raises(SystemExit) as stop:
        demo.main()
    gin.clear_config()
    assert stop.value.code == 2
    assert "'glue_sst2_v200', but runs/demo.gin trains on 'demo_reviews' alone" in capsys.readouterr().err
