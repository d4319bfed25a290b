"""Collects the results of a sweep's trials, from every summary.json, in one CSV and one table.

    python -m experiments.collect SWEEP_DIR [SWEEP_DIR ...] [--out=DIR] [--seeds=RANDOM_SEED] [--mean_over=TASK]

It writes DIR/<name>.csv with one row per trial, and DIR/<name>.md with mean ± sample standard deviation over the seeds,
where <name> is the name of the sweep's folder. By default, DIR is the parent of that folder. Trials that are not
finished or cannot be read are named on stderr.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.averages import group, mean_over, to_markdown
from experiments.trials import Result, axes_in, read_trials, split_mixtures, to_csv
from prompt_tuning_jax.gin_files import user_errors

RESULTS = Path(__file__).parent / "results"


def collect(sweep_dir: Path, out: Path) -> list[Result]:
    """Writes OUT/<name>.csv with the results of the finished trials, and names the other trials on stderr.

    Raises:
      ValueError: there is no sweep at `sweep_dir`.
    """
    results, problems = read_trials(sweep_dir)
    for problem in problems:
        print(problem, file=sys.stderr)
    if results:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{sweep_dir.resolve().name}.csv").write_text(to_csv(results))
    else:
        print(f"{sweep_dir}: no trial is finished", file=sys.stderr)
    return results


def page(name: str, results: Sequence[Result], seeds: str = "RANDOM_SEED", over: str | None = None) -> str:
    """Returns the table of a sweep, with a heading, in Markdown.

    Args:
      name: the sweep's name.
      results: the trials' results.
      seeds: the axis of the seeds.
      over: an axis over which rows with means are added, or None.
    """
    axes = axes_in(results)
    if over is not None:
        results = split_mixtures(results, over)
        axes = list(dict.fromkeys([*axes, over]))
    averages = group(results, seeds) + (mean_over(results, over, seeds) if over else [])
    said = (
        f"Mean ± sample standard deviation over {seeds}, n of them, of the best evaluated step on the dev set; in per "
        "cent. Losses are in nats."
    )
    if over:
        said += f" Of {over} `mean`: a seed's mean over {over} first."
    return f"# {name}\n\n{said}\n\n{to_markdown(averages, axes)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep_dirs", nargs="+", type=Path, metavar="SWEEP_DIR")
    parser.add_argument("--out", type=Path, help="by default the folder that the sweep's folder is in")
    parser.add_argument("--seeds", default="RANDOM_SEED", help="the axis to take mean and standard deviation over")
    parser.add_argument("--mean_over", metavar="AXIS", help="an axis to add the means over, such as TASK")
    args = parser.parse_args()
    with user_errors():
        for sweep_dir in args.sweep_dirs:
            out = args.out or sweep_dir.resolve().parent
            results = collect(sweep_dir, out)
            if results:
                name = sweep_dir.resolve().name
                axes = axes_in(results)
                if args.mean_over and args.mean_over not in axes:
                    raise ValueError(f"{name} has no axis {args.mean_over}; it has {', '.join(axes)}: set --mean_over")
                (out / f"{name}.md").write_text(page(name, results, args.seeds, args.mean_over))
                print(f"{out / name}.csv, .md: {len(results)} trials")


if __name__ == "__main__":
    main()
