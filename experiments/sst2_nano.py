"""Compares prompt tuning, model tuning and no tuning on SST-2 with the embedded base model; three seeds each.

    python -m experiments.sst2_nano --data_dir=GLUE_FOLDER [--steps=400] [--out=runs/sst2_nano]

The dev set is the last 2,000 rows of train.tsv, which are held out from training. Runs are written to
OUT/<method>_seed<n> and are not repeated if their summary exists. The table is written to
experiments/results/sst2_nano.md, and its numbers to .json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parent / "results"
TASK = [
    "--gin.MIXTURE_OR_TASK_NAME='taskless_glue_sst2_v200'",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 8}",
    "--gin.INITIAL_CHECKPOINT_PATH='nano'",
]
METHODS = {
    "prompt_tuning": [
        "--gin_file=models/nano.gin",
        "--gin_file=prompts/class_labels.gin",
        "--gin_file=runs/prompt_tune.gin",
        "--gin.CLASS_LABELS=['negative', 'positive']",
        "--gin.PROMPT_LENGTH=20",
        "--gin.DROPOUT_RATE=0.0",
    ],
    "model_tuning": ["--gin_file=models/nano.gin", "--gin_file=runs/model_tune.gin", "--gin.DROPOUT_RATE=0.0"],
}


def train_command(method: str, seed: int, data_dir: str, steps: int, folder: Path) -> list[str]:
    """Returns the command of one run."""
    return [
        "python",
        "-m",
        "prompt_tuning_jax.train",
        *METHODS[method],
        *TASK,
        f"--gin.DATA_DIR='{data_dir}'",
        "--gin.TRAIN_SPLIT='train[:-2000]'",
        "--gin.EVAL_SPLIT='train[-2000:]'",
        f"--gin.TRAIN_STEPS={steps}",
        f"--gin.EVAL_PERIOD={max(steps // 5, 1)}",
        f"--gin.RANDOM_SEED={seed}",
        f"--gin.MODEL_DIR='{folder}'",
    ]


def no_prompt_command(data_dir: str) -> list[str]:
    """Returns the command that evaluates the base model alone."""
    return [
        "python",
        "-m",
        "prompt_tuning_jax.eval",
        "--gin_file=models/nano.gin",
        "--gin_file=runs/eval.gin",
        *TASK,
        f"--gin.DATA_DIR='{data_dir}'",
        "--gin.EVAL_SPLIT='train[-2000:]'",
        "--gin.PROMPT_FILE=None",
    ]


def run(command: list[str], capture: bool = False) -> str:
    done = subprocess.run(
        [sys.executable, *command[1:]], check=True, text=True, stdout=subprocess.PIPE if capture else None
    )
    return done.stdout or ""


def shell(command: list[str]) -> str:
    """Returns the command as a line for a shell."""
    return " ".join(f'"{part}"' if "'" in part or " " in part else part for part in command)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def row(name: str, folders: list[Path]) -> dict[str, Any]:
    """Returns a method's row of the table, with mean and standard deviation over the seeds."""
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    accuracy = [summary["best"]["accuracy"] for summary in summaries]
    newest = max((folders[0] / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)
    return {
        "method": name,
        "accuracy": accuracy,
        "mean": float(np.mean(accuracy)),
        "std": float(np.std(accuracy, ddof=1)),
        "steps": summaries[0]["steps"],
        "best_steps": [summary["best_step"] for summary in summaries],
        "seconds": float(np.mean([summary["seconds"] for summary in summaries])),
        "trainable_parameters": summaries[0]["trainable_parameters"],
        "checkpoint_bytes": folder_bytes(newest),
        "base_fingerprint": summaries[0]["base_fingerprint"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/sst2_nano"))
    args = parser.parse_args()

    rows = []
    for method in METHODS:
        folders = [args.out / f"{method}_seed{seed}" for seed in SEEDS]
        for seed, folder in zip(SEEDS, folders, strict=True):
            if not (folder / "summary.json").exists():
                run(train_command(method, seed, args.data_dir, args.steps, folder))
        rows.append(row(method, folders))
    base = json.loads(run(no_prompt_command(args.data_dir), capture=True))

    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sst2_nano.json").write_text(json.dumps({"no_prompt": base, "methods": rows}, indent=1) + "\n")
    lines = [
        "# SST-2 on the embedded base (nano)",
        "",
        "Dev set: the last 2,000 rows of train.tsv, held back. Accuracy in per cent at each run's best step on it;",
        "mean and standard deviation over three seeds. Written by `experiments/sst2_nano.py`.",
        "",
        "| method | accuracy | each seed | steps | wall time a run | trainable parameters | checkpoint |",
        "|---|---|---|---|---|---|---|",
        f"| frozen base, no prompt, labels ranked | {base['ranking']['accuracy']:.1f} | | 0 | | 0 | |",
        f"| frozen base, no prompt, generated | {base['generation']['accuracy']:.1f} | | 0 | | 0 | |",
    ]
    for r in rows:
        cells = [
            r["method"].replace("_", " "),
            f"{r['mean']:.1f} ± {r['std']:.1f}",
            ", ".join(f"{value:.1f}" for value in r["accuracy"]),
            f"{r['steps']:,}",
            f"{r['seconds']:.0f} s",
            f"{r['trainable_parameters']:,}",
            f"{r['checkpoint_bytes']:,} bytes",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "The runs, for seed 0:", "", "```"]
    lines += [
        shell(train_command(method, 0, "GLUE_FOLDER", args.steps, args.out / f"{method}_seed0")) for method in METHODS
    ]
    lines += [shell(no_prompt_command("GLUE_FOLDER")), "```", ""]
    (RESULTS / "sst2_nano.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
