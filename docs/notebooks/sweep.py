# %% [markdown]
# # A sweep and its figures
#
# A sweep is a gin file with a grid of settings, and with the settings that all trials share. Trials that differ only in
# numbers share one executable, which is compiled once. This sweep trains the demo with two learning rates and two
# seeds, for 60 steps each.

# %%
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

Path("my_sweep.gin").write_text("""
from __gin__ import dynamic_registration
from prompt_tuning_jax.sweeps import spec

include "sweeps/sweep.gin"

SWEEP_DIR = "runs/rates"

spec.Sweep:
  grid = {"LEARNING_RATE": [0.03, 0.3], "RANDOM_SEED": [0, 1]}
  gin_files = ["runs/demo.gin"]
  macros = {"TRAIN_STEPS": 60, "EVAL_PERIOD": 20, "BATCH_SIZE": 16, "EVAL_SPLIT": "validation[:200]"}
""")


def command(*arguments):
    """Runs a command line of the package."""
    subprocess.run([sys.executable, "-m", *arguments], check=True)


# %% [markdown]
# `--launcher=print` prints one `train` command per trial, and runs nothing. `--launcher=here` runs the trials in one
# process. Other launchers use several processes, Slurm, Kubernetes or TPU pods.

# %%
command("prompt_tuning_jax.sweep", "--gin_file=my_sweep.gin", "--launcher=print")

# %%
command("prompt_tuning_jax.sweep", "--gin_file=my_sweep.gin", "--launcher=here")

# %% [markdown]
# You can stop a sweep at any time. The same command then resumes it, and skips the finished trials.

# %%
command("prompt_tuning_jax.sweep", "--status=runs/rates")

# %% [markdown]
# ## Figures
#
# Each trial has its own run folder with `metrics.jsonl`, `summary.json` and `best/prompt.npy`.

# %%
trials = {}
for folder in sorted(Path("runs/rates").glob("*/")):
    if (folder / "summary.json").is_file():
        axes = dict(pair.split("=") for pair in folder.name.split(","))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record["split"] == "eval"]
        trials[axes["LEARNING_RATE"], axes["RANDOM_SEED"]] = records
assert len(trials) == 4

figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for rate in sorted({rate for rate, _ in trials}):
    runs = [records for (own, _), records in trials.items() if own == rate]
    steps = [record["step"] for record in runs[0]]
    scores = np.array([[record["accuracy"] for record in records] for records in runs])  # [seeds, evaluations]
    axis.plot(steps, scores.mean(axis=0), "o-", label=f"learning rate {rate}")
    axis.fill_between(steps, scores.min(axis=0), scores.max(axis=0), alpha=0.2)
axis.set(xlabel="step", ylabel="accuracy, two seeds", ylim=(0, 102))
axis.legend()
figure.savefig("rates.png")

# %% [markdown]
# In a checkout of the source, `python -m experiments.collect runs/rates` writes a CSV file and a table of means and
# standard deviations. `python -m experiments.figures` draws the paper's figures from such sweeps.
