"""Makes table 3 with the embedded base model: five prompts for SST-2, their average, best, and majority vote.

    python -m experiments.table_3_nano --data_dir=GLUE_FOLDER [--steps=400] [--out=runs/sst2_nano]

The prompts are those of `experiments.sst2_nano` with five seeds; finished runs are not repeated. The table is written
to experiments/results/table_3_nano.md, and its numbers to .json.
"""

import argparse
import json
from pathlib import Path

from experiments.sst2_nano import RESULTS, TASK, run, shell, train_command

SEEDS = range(5)
COLUMNS = ("average", "best", "ensemble")


def eval_command(data_dir: str, prompts: list[str]) -> list[str]:
    """Returns the command that evaluates each prompt and their ensemble."""
    return [
        *("python", "-m", "prompt_tuning_jax.eval", "--gin_file=models/nano.gin", "--gin_file=runs/eval.gin", *TASK),
        f"--gin.DATA_DIR='{data_dir}'",
        "--gin.EVAL_SPLIT='train[-2000:]'",
        f"--gin.PROMPT_FILES={prompts}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/sst2_nano"))
    args = parser.parse_args()

    folders = [args.out / f"prompt_tuning_seed{seed}" for seed in SEEDS]
    for seed, folder in zip(SEEDS, folders, strict=True):
        if not (folder / "summary.json").exists():
            run(train_command("prompt_tuning", seed, args.data_dir, args.steps, folder))
    prompts = [str(folder / "best" / "prompt.npy") for folder in folders]
    result = json.loads(run(eval_command(args.data_dir, prompts), capture=True))

    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "table_3_nano.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "# Table 3 on the embedded base (nano)",
        "",
        f"SST-2, accuracy in per cent on the last 2,000 training rows, held back. {len(prompts)} prompts, P=20,",
        f"{args.steps} steps, that differ in their seed alone; the ensemble is their majority vote, ties by score.",
        "Written by `experiments/table_3_nano.py`.",
        "",
        "| answered by | " + " | ".join(COLUMNS) + " | each prompt |",
        "|---|---|---|---|---|",
    ]
    for how in ("generation", "ranking"):
        found = result[how]
        each = ", ".join(f"{values['accuracy']:.2f}" for values in found["prompts"].values())
        lines.append(f"| {how} | " + " | ".join(f"{found[c]['accuracy']:.2f}" for c in COLUMNS) + f" | {each} |")
    lines += ["", "```", shell(eval_command("GLUE_FOLDER", prompts)), "```", ""]
    (RESULTS / "table_3_nano.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
