"""Compares the demo's prompt, tuned on the embedded base model in int8, bfloat16 and float32, with three seeds each.

    python -m experiments.int8_nano [--out=runs/int8_nano]

Runs are written to OUT/<dtype>_seed<n> and are not repeated if their summary exists. The table is written to
experiments/results/int8_nano.md, and its numbers to .json.
"""

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.checkpoints.base import load_base, open_model, open_vocabulary
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.log_likelihood import shift_right
from prompt_tuning_jax.t5.network import Transformer

DTYPES = ("float32", "bfloat16", "int8")
SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parent / "results"


def arguments(dtype: str, seed: int, folder: Path) -> list[str]:
    """Returns the arguments of `python` for one run."""
    settings = {"BASE_DTYPE": dtype, "RANDOM_SEED": seed, "MODEL_DIR": str(folder)}
    macros = [f"--gin.{name}={value!r}" for name, value in settings.items()]
    return ["-m", "prompt_tuning_jax.train", "--gin_file=runs/demo.gin", *macros]


def logits_of(dtype: str) -> tuple[np.ndarray, int]:
    """Returns the base model's logits on 128 of the demo's validation rows, without padding, and its bytes."""
    config = open_model("nano").config
    assert config is not None
    base, words = load_base("nano", config, dtype), open_vocabulary(None, "nano", config)
    dataset = DatasetConfig("demo_reviews", "validation", 128, {"inputs": 48, "targets": 8})
    batch = next(iter(next(iter(dataset.eval_batches(words).values()))))
    model = jax.jit(functools.partial(Transformer(config).apply, enable_dropout=False))
    targets = jnp.asarray(batch.targets)
    shifted = shift_right(targets, config.decoder_start_token_id)
    logits = model({"params": unflatten_dict(base.params, sep="/")}, batch.inputs, shifted, targets)
    bytes_of_weights = sum(value.nbytes for value in base.params.values())
    return np.asarray(logits, np.float64)[batch.targets != config.pad_token_id], bytes_of_weights


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sum(one * other) / np.sqrt(np.sum(one * one) * np.sum(other * other)))


def measure(out: Path) -> list[dict[str, Any]]:
    """Returns one row per dtype: bytes, cosine, and the accuracy of each seed."""
    exact, rows = logits_of("float32")[0], []
    for dtype in DTYPES:
        logits, size = logits_of(dtype)
        accuracies = []
        for seed in SEEDS:
            folder = out / f"{dtype}_seed{seed}"
            if not (folder / "summary.json").exists():
                subprocess.run([sys.executable, *arguments(dtype, seed, folder)], check=True)
            accuracies.append(json.loads((folder / "summary.json").read_text())["best"]["accuracy"])
        rows.append({"dtype": dtype, "bytes": size, "cosine": cosine(logits, exact), "accuracy": accuracies})
    return rows


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the page with the table, and the command of the int8 run with seed 0."""
    activations = T5Config(1, 1, 1, 1, 1, 1, dtype="auto").dtype.__name__
    bfloat16 = next(row for row in rows if row["dtype"] == "bfloat16")
    lines = [
        "# The embedded base model as int8",
        "",
        "Accuracy of the demo's prompt in per cent, at each run's best step on held-back rows: mean and standard",
        f"deviation, and each of {len(SEEDS)} seeds. The cosine compares the base model's logits, without a prompt, with",
        f"those in float32, on 128 rows. The model's file is bfloat16; activations are {activations}.",
        "",
        "| base model | bytes of weights | share of bfloat16's | cosine | accuracy | each seed |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracy = row["accuracy"]
        cells = [row["dtype"], f"{row['bytes']:,}", f"{row['bytes'] / bfloat16['bytes']:.3f}", f"{row['cosine']:.6f}"]
        cells.append(f"{np.mean(accuracy):.1f} ± {np.std(accuracy, ddof=1):.1f}")
        cells.append(", ".join(f"{value:.1f}" for value in accuracy))
        lines.append(f"| {' | '.join(cells)} |")
    command = " ".join(f'"{part}"' if "'" in part else part for part in arguments("int8", 0, Path("runs/int8")))
    lines += [
        "",
        "Made by `python -m experiments.int8_nano`. One of its runs:",
        "",
        "```",
        f"python {command}",
        "```",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/int8_nano"))
    rows = measure(parser.parse_args().out)
    (RESULTS / "int8_nano.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "int8_nano.md").write_text(page(rows))
    print(page(rows))


if __name__ == "__main__":
    main()
