"""Compares prompts tuned on the embedded base model in int8, bfloat16 and float32, with three seeds each.

    python -m experiments.int8_nano [--data_dir=GLUE_FOLDER] [--sst2_steps=400] [--out=runs/int8_nano]

The tasks are the demo's and, with --data_dir, SST-2 as in `sst2_nano`. Runs are written to OUT/<task>_<dtype>_seed<n>
and are not repeated if their summary exists. The table is written to experiments/results/int8_nano.md, and its numbers
to .json.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from experiments.sst2_nano import RESULTS, SEEDS, run, shell, train_command
from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.checkpoints.base import load_base, open_model, open_vocabulary
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.log_likelihood import shift_right
from prompt_tuning_jax.t5.network import Transformer

DTYPES = ("float32", "bfloat16", "int8")


def demo_command(seed: int, folder: Path) -> list[str]:
    """Returns the command of the demo's training run."""
    macros = [f"--gin.RANDOM_SEED={seed}", f"--gin.MODEL_DIR='{folder}'"]
    return ["python", "-m", "prompt_tuning_jax.train", "--gin_file=runs/demo.gin", *macros]


def command(task: str, dtype: str, seed: int, out: Path, args: argparse.Namespace) -> list[str]:
    """Returns the command of one run."""
    folder = out / f"{task}_{dtype}_seed{seed}"
    if task == "demo":
        made = demo_command(seed, folder)
    else:
        made = train_command("prompt_tuning", seed, args.data_dir or "GLUE_FOLDER", args.sst2_steps, folder)
    return [*made, f"--gin.BASE_DTYPE='{dtype}'"]


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
    return np.asarray(logits, np.float64)[batch.targets != config.pad_token_id], sum(
        value.nbytes for value in base.params.values()
    )


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sum(one * other) / np.sqrt(np.sum(one * one) * np.sum(other * other)))


def measure(tasks: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns one row per dtype: bytes, cosine, and the accuracies on each task."""
    exact, rows = logits_of("float32")[0], []
    for dtype in DTYPES:
        logits, size = logits_of(dtype)
        row: dict[str, Any] = {"dtype": dtype, "bytes": size, "cosine": cosine(logits, exact)}
        for task in tasks:
            row[task] = []
            for seed in SEEDS:
                made = command(task, dtype, seed, args.out, args)
                summary = args.out / f"{task}_{dtype}_seed{seed}" / "summary.json"
                if not summary.exists():
                    run(made)
                row[task].append(json.loads(summary.read_text())["best"]["accuracy"])
        rows.append(row)
    return rows


def page(rows: list[dict[str, Any]], tasks: list[str], args: argparse.Namespace) -> str:
    """Returns the page with the table, and the commands of the int8 runs with seed 0."""
    names = {"demo": "demo, 300 steps", "sst2": f"SST-2, {args.sst2_steps} steps"}
    activations = T5Config(1, 1, 1, 1, 1, 1, dtype="auto").dtype.__name__
    bfloat16 = next(row for row in rows if row["dtype"] == "bfloat16")
    lines = [
        "# The embedded base as int8",
        "",
        "Accuracy in per cent at each run's best step on held-back rows: mean and standard deviation, and each of",
        f"{len(SEEDS)} seeds. The cosine is that of the base's logits, without a prompt, to those of float32, on 128",
        f"rows of the demo. The base's file is bfloat16; activations are {activations}.",
        "Written by `experiments/int8_nano.py`.",
        "",
        f"| base | bytes of weights | of bfloat16's | cosine | {' | '.join(names[task] for task in tasks)} |",
        f"|---|---|---|---|{'---|' * len(tasks)}",
    ]
    for row in rows:
        cells = [row["dtype"], f"{row['bytes']:,}", f"{row['bytes'] / bfloat16['bytes']:.3f}", f"{row['cosine']:.6f}"]
        for task in tasks:
            each = ", ".join(f"{value:.1f}" for value in row[task])
            cells.append(f"{np.mean(row[task]):.1f} ± {np.std(row[task], ddof=1):.1f} ({each})")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "```", *(shell(command(task, "int8", 0, args.out, args)) for task in tasks), "```", ""]
    text = "\n".join(lines)
    return text.replace(args.data_dir, "GLUE_FOLDER") if args.data_dir else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="GLUE's own folder; None for the demo's task alone")
    parser.add_argument("--sst2_steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/int8_nano"))
    args = parser.parse_args()
    tasks = ["demo", *(["sst2"] if args.data_dir else [])]
    rows = measure(tasks, args)
    text = page(rows, tasks, args)
    (RESULTS / "int8_nano.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "int8_nano.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
