"""Trains a prompt for a generated review task on the embedded base model, and shows its effect.

    python -m prompt_tuning_jax.demo [--gin.NAME=...]

All settings are in gin_configs/runs/demo.gin. Files are written to MODEL_DIR, by default runs/demo.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import gin

from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.checkpoints.base import open_model
from prompt_tuning_jax.compilation import keep_compiled_programs
from prompt_tuning_jax.gin_files import config_text, configured, parse, user_errors
from prompt_tuning_jax.neighbors import neighbor_line, open_lexicon, open_table
from prompt_tuning_jax.prompts.files import read_prompt
from prompt_tuning_jax.prompts.nearest_words import name_neighbors, nearest
from prompt_tuning_jax.tasks.reviews import Reviews
from prompt_tuning_jax.training import loop, run
from prompt_tuning_jax.training.eval_run import evaluate_prompt
from prompt_tuning_jax.training.progress import stopping_on_sigterm
from prompt_tuning_jax.training.run_folder import write_text

SPLITS = {"validation": "sentences never seen", "unseen_words": "sentiment words never seen"}


def main() -> None:
    keep_compiled_programs()
    with user_errors():
        flags = parse(["--gin_file=runs/demo.gin", *sys.argv[1:]], flags=("allow_other_config",), about=__doc__)
        folder = Path(gin.query_parameter("%MODEL_DIR"))
        config = configured(run.TrainConfig, "runs/prompt_tune.gin")
        allow_other_config = bool(flags.get("allow_other_config"))
        with stopping_on_sigterm() as stop:
            made = config(config=config_text(), allow_other_config=allow_other_config)
            summary = loop.train(made, stop=stop).summary
        prompt_file = folder / "best" / "prompt.npy"
        scores = score_splits(summary["base"], prompt_file)
        fingerprint = {row["base_fingerprint"] for row in scores.values()}
        if fingerprint != {summary["base_fingerprint"]}:
            raise RuntimeError(f"the base's fingerprint was {summary['base_fingerprint']} and is {fingerprint}")
        accuracies = {
            f"{split}_{prompted}_{how}": row[how]["accuracy"] / 100
            for (split, prompted), row in scores.items()
            for how in ("generation", "ranking")
        }
        summary["accuracy_with_prompt"] = accuracies["validation_with_prompt_generation"]
        summary["accuracy_with_prompt_unseen_words"] = accuracies["unseen_words_with_prompt_generation"]
        summary["accuracies"] = accuracies
        write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        draw_learning_curve(folder / "metrics.jsonl", accuracies, folder / "learning_curve.png")
        report(folder, summary, accuracies, prompt_file)


def score_splits(base: str, prompt_file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the results of `evaluate_prompt` on both splits, without a prompt and with it."""
    size = open_model(base).config
    task, lengths = (gin.query_parameter(f"%{name}") for name in ("MIXTURE_OR_TASK_NAME", "TASK_FEATURE_LENGTHS"))
    return {
        (split, prompted): evaluate_prompt(
            size=size,
            initial_checkpoint_path=base,
            dataset=DatasetConfig(task, split, 128, lengths, source=Reviews()),
            prompt_file=path,
        )
        for split in SPLITS
        for prompted, path in (("without_prompt", None), ("with_prompt", str(prompt_file)))
    }


def draw_learning_curve(metrics: Path, accuracies: dict[str, float], target: Path) -> None:
    """Draws validation accuracy and training loss by step.

    For comparison it also shows the base model's accuracy without a prompt, and the best prompt's accuracy on unseen
    sentiment words.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [(record["step"], record["loss"]) for record in records if record["split"] == "train"]
    evals = [(record["step"], record["accuracy"] / 100) for record in records if record["split"] == "eval"]
    figure, left = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    left.plot(*zip(*evals, strict=True), "o-", color="tab:blue", label="with the prompt, sentences never seen")
    best = max(evals, key=lambda point: point[1])[0]
    left.plot(
        [best], [accuracies["unseen_words_with_prompt_generation"]], "s", color="tab:blue", markerfacecolor="white",
        label="with the best prompt, sentiment words never seen",
    )  # fmt: skip
    base = accuracies["validation_without_prompt_ranking"]
    left.axhline(base, color="tab:gray", linestyle="--", label="the frozen base alone (ranking)")
    left.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02), xlim=(0, None))
    right = left.twinx()
    right.plot(*zip(*train, strict=True), color="tab:orange", alpha=0.7, label="training loss (right)")
    right.set(ylabel="nats a target token", ylim=(0, None))
    handles = [handle for axis in (left, right) for handle in axis.get_legend_handles_labels()[0]]
    left.legend(handles=handles, loc="center right", fontsize=8)
    figure.savefig(target, dpi=150)
    pyplot.close(figure)


def report(folder: Path, summary: dict[str, Any], accuracies: dict[str, float], prompt_file: Path) -> None:
    """Prints the accuracies, the words nearest to the prompt, and the paths of the files."""
    print(f"\naccuracy of best step {summary['best_step']} (chance is 0.5)")
    print(f"{'':28}{'frozen base alone':>24}{'with the prompt':>24}")
    print(f"{'':28}" + f"{'generated':>12}{'ranked':>12}" * 2)
    for split, name in SPLITS.items():
        row = [
            accuracies[f"{split}_{p}_{how}"]
            for p in ("without_prompt", "with_prompt")
            for how in ("generation", "ranking")
        ]
        print(f"{name:28}" + "".join(f"{value:12.3f}" for value in row))

    prompt = read_prompt(prompt_file)
    print("\nnearest words of the first prompt positions (cosine)")
    words = open_lexicon(open_table(summary["base"]))
    for position, named in enumerate(name_neighbors(nearest(prompt[:6], words), words)):
        print(neighbor_line(position, named))

    print(f"\nthe prompt          {prompt_file}  float32 {list(prompt.shape)}, {prompt_file.stat().st_size:,} bytes")
    print(f"the learning curve  {folder / 'learning_curve.png'}")
    print(f"every number        {folder / 'summary.json'}, {folder / 'metrics.jsonl'}")
    base_path, fingerprint = os.path.relpath(summary["base"]), summary["base_fingerprint"]
    print(f"the frozen base     {base_path}, fingerprint {fingerprint} before and after")


if __name__ == "__main__":
    main()
