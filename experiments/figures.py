"""Draws the paper's figures, and writes its tables, from our sweeps' results.

    python -m experiments.figures [--results=runs] [--out=experiments/results]

With --results, the sweeps in that folder that belong to figures and tables (RESULTS/figure_1, RESULTS/figure_1_ladder,
...) are first collected, each into OUT/<name>.csv. The pages are made only from these files: OUT/<name>.md has the
numbers as a table, and OUT/<name>.png is the picture of a figure. The pages of methods_ladder also have the prompt
tuning and model tuning of figure_1_ladder. OUT/ladder_claims.md has the differences that the paper's claims are about,
from all files of the ladder. Its intervals are over seeds and, if `python -m experiments.answers` has written
OUT/ladder_answers.csv, over rows. OUT/figure_1_ladder_curves.csv has the score at each evaluated step, and the .png
shows it. Figure 4 needs no run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import answers, claims, curves, figure_1, figure_3, figure_4, method_sizes
from experiments.averages import mean_over
from experiments.collect import RESULTS, collect, page
from experiments.sizes import PARAMETERS
from experiments.tables import TABLES
from experiments.trials import Result, from_csv, split_mixtures, to_csv
from prompt_tuning_jax.gin_files import user_errors

FIGURES = {"figure_1": "METHOD"} | {name: ablation.axis for name, ablation in figure_3.ABLATIONS.items()}
AXES = FIGURES | {"methods": "METHOD"}
CURVES_OF = "figure_1_ladder"  # the sweep whose scores at each step are drawn
METHODS = "methods_ladder"  # the sweep whose trials are compared with those of figure_1_ladder
NAMES = [
    *(name + scale for name in FIGURES for scale in ("", "_ladder")),
    *TABLES,
    "table_1_transfer_ladder",
    "table_3_ladder",
    METHODS,
]


def read(path: Path) -> list[Result]:
    """Returns the trials in a CSV.

    Raises:
      ValueError: the file is not such a CSV, or lacks an axis of its figure.
    """
    try:
        results = from_csv(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}: collect the sweep again with --results") from None
    if not results:
        raise ValueError(f"{path} has no trials: collect the sweep again with --results")
    kind = path.stem.removesuffix("_ladder")
    for result in results if kind in AXES else ():
        needed = [AXES[kind], "SIZE", *(["TASK"] if result.axes.get("METHOD") != "multi_task" else [])]
        missing = [axis for axis in needed if axis not in result.axes]
        if missing:
            raise ValueError(f"{path} has a trial without {', '.join(missing)}, which this figure is drawn over")
        if result.axes["SIZE"] not in PARAMETERS:
            raise ValueError(f"{path} has a trial of SIZE {result.axes['SIZE']}, expected {', '.join(PARAMETERS)}")
    return results


def read_answers(path: Path) -> dict[answers.Key, str]:
    """Returns the answers in a CSV; {} if there is no such file.

    Raises:
      ValueError: the file is not such a CSV.
    """
    try:
        return answers.from_csv(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}: run python -m experiments.answers again") from None


def write(name: str, results: Sequence[Result], out: Path) -> list[Path]:
    """Writes the table, and for a figure the picture, of a sweep's results; returns the paths."""
    kind, target = name.removesuffix("_ladder"), out / f"{name}.md"
    if kind in TABLES:
        target.write_text(TABLES[kind](name, results))
        return [target]
    added = {"figure_1": figure_1.shares_text, "methods": method_sizes.text}.get(kind, lambda _: "")
    target.write_text(page(name, results, over="TASK") + added(results))
    for one in mean_over(split_mixtures(results)):
        if one.note:
            setting = ", ".join(f"{axis} {value}" for axis, value in one.axes.items())
            print(f"{name}, {setting}: {one.note}", file=sys.stderr)
    draw = {"figure_1": figure_1.draw, "methods": method_sizes.draw}.get(kind, figure_3.draw)
    figure = draw(name, results)
    picture = out / f"{name}.png"
    figure.savefig(picture, dpi=150)
    return [picture, target]


def write_figure_4(out: Path) -> list[Path]:
    """Writes figure 4 and its numbers; returns the paths."""
    found = figure_4.shares()
    numbers, picture = out / "figure_4.csv", out / "figure_4.png"
    numbers.write_text(figure_4.to_csv(found))
    figure_4.draw(found).savefig(picture, dpi=150)
    return [picture, numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="the folder that the sweeps' folders are in")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with user_errors():
        if args.results and not args.results.is_dir():
            raise ValueError(f"no folder {args.results}: set --results to the one that the sweeps' folders are in")
        args.out.mkdir(parents=True, exist_ok=True)
        absent, ladder = [], {}
        answered = read_answers(args.out / answers.FILE)
        for name in NAMES:
            if args.results and (args.results / name).is_dir():
                try:
                    collect(args.results / name, args.out)
                    if name == CURVES_OF:
                        (args.out / f"{name}_curves.csv").write_text(to_csv(curves.read_curves(args.results / name)))
                except ValueError as error:  # a sweep that has not started must not stop the figures of others
                    print(error, file=sys.stderr)
            source = args.out / f"{name}.csv"
            if source.exists():
                results = answers.with_answers(name, read(source), answered)
                if name == METHODS:
                    results = method_sizes.beside_figure_1(results, ladder.get("figure_1", ()))
                if name.endswith("_ladder"):
                    ladder[name.removesuffix("_ladder")] = results
                print(f"{', '.join(map(str, write(name, results, args.out)))}: {len(results)} trials")
            else:
                absent.append(name)
        source = args.out / f"{CURVES_OF}_curves.csv"
        if source.exists():
            figure = curves.draw("figure 1: scores at each evaluated step", read(source), figure_1.SERIES)
            figure.savefig(source.with_suffix(".png"), dpi=150)
            print(source.with_suffix(".png"))
        if ladder:
            target = args.out / "ladder_claims.md"
            target.write_text(claims.page(claims.claims(ladder)))
            print(target)
        print(", ".join(map(str, write_figure_4(args.out))))
        if absent:
            print(f"absent from {args.out}: {', '.join(absent)}")


if __name__ == "__main__":
    main()
