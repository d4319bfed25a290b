"""Prints the words and class labels nearest to each position of a prompt, and how similar prompts are (section 7).

python -m prompt_tuning_jax.neighbors PROMPT [PROMPT ...] [--labels=negative,positive] [--before=FILE]
"""

import argparse
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.array_files.stored import ArrayError
from prompt_tuning_jax.checkpoints import hub
from prompt_tuning_jax.checkpoints.base import (
    StoredModel,
    open_model,
    open_vocabulary,
    stored_fingerprint,
    with_ids,
)
from prompt_tuning_jax.checkpoints.trained_on import trained_on
from prompt_tuning_jax.checkpoints.tuned import check_width
from prompt_tuning_jax.command_line import Parser
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.flags import flag_errors
from prompt_tuning_jax.prompts.files import IN_T5X, RUN_PROMPT, RUN_PROMPTS, read_prompt
from prompt_tuning_jax.prompts.initializers import word_ids
from prompt_tuning_jax.prompts.nearest_words import Lexicon, Prompt, cosines, describe, make_lexicon
from prompt_tuning_jax.settings import Count, check, integer

SIMILARITIES = ("mean_vector_similarity", "best_match_similarity")
MOST_SHARED = 5
TABLE = "token_embedder/embedding"


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the parsed command line.

    Raises:
      ValueError: an argument is unknown, missing or invalid.
    """
    parser = Parser("prompt_tuning_jax.neighbors", __doc__)
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="a prompt of any format, or a run's folder")
    parser.add_argument("--base", help="what they were trained on; the runs' own where left out, or 'nano'")
    parser.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="spiece.model, tokenizer.json or 'bytes', if none lies beside the base",
    )
    parser.add_argument(
        "--labels",
        type=lambda text: [label.strip() for label in text.split(",")],
        default=[],
        help="class labels to look for, with commas between; of several pieces, their mean, as class_labels.gin starts",
    )
    parser.add_argument(
        "--before", metavar="FILE", help="PROMPT before training; a run's prompts/0.npy, if it is there"
    )
    parser.add_number("top", Count, 5, "how many neighbours of a position are looked at")
    parser.add_argument("--json", action="store_true", help="one JSON object with every number")
    parser.add_argument("--picture", metavar="FILE.png", help="cosines between positions, or between prompts")
    return parser.parse_args(argv)


def main() -> None:
    with flag_errors({"prompt_file": "PROMPT"}):
        read(parse(sys.argv[1:]))


def read(arguments: argparse.Namespace) -> None:
    """Reads and checks all inputs, then prints the report and draws the picture."""
    prompts, earlier = {}, {}
    if arguments.before and len(arguments.prompts) > 1:
        raise ValueError(f"--before is given for {len(arguments.prompts)} prompts: set it with one PROMPT")
    base = arguments.base or base_of(arguments.prompts)
    model = open_table(base)
    files = []
    for name, file, start in [one for given in arguments.prompts for one in prompt_files(given)]:
        prompts[name] = read_prompt(file)
        files.append(file)
        check_width(str(file), prompts[name].shape, model.arrays[TABLE].shape[1])
        first = prompt_file(arguments.before) if arguments.before else start
        if arguments.before or first.is_file():
            earlier[name] = read_prompt(first)
            files.append(first)
            if earlier[name].shape != prompts[name].shape:
                shapes = f"{list(earlier[name].shape)}, {file} {list(prompts[name].shape)}"
                raise ValueError(f"{first} is {shapes}: set --before to the same prompt before it was trained")
    lexicon = open_lexicon(model, arguments.vocabulary, arguments.labels)
    check_sources(files, model, arguments.vocabulary)
    check("top", arguments.top, integer(1, len(lexicon.names), "the number of words and labels"))
    report = {"base": base} | describe(prompts, earlier, lexicon, arguments.top)
    if arguments.picture:
        draw(Path(arguments.picture), report, prompts, earlier, lexicon)
    print(json.dumps(report) if arguments.json else "\n".join(lines(report)), flush=True)


def prompt_file(name: str) -> Path | str:
    """Returns the best prompt's file if `name` is a run's folder; otherwise `name` itself."""
    best = Path(name) / RUN_PROMPT
    return best if best.is_file() else name


def prompt_files(name: str) -> list[tuple[str, Path | str, Path]]:
    """Returns `(name, file, file before training)` of one prompt, or of each prompt of a run that has one per task."""
    if (Path(name) / RUN_PROMPTS).is_dir():
        files = sorted((Path(name) / RUN_PROMPTS).glob("*.npy"))
        return [(f"{name}/{file.stem}", file, Path(name, "prompts", "0", file.name)) for file in files]
    return [(name, prompt_file(name), Path(name, "prompts", "0.npy"))]


def base_of(names: Sequence[str]) -> str:
    """Returns the base model of the finished runs among `names`, or the embedded one if there are no such runs.

    Raises:
      ValueError: the runs have different base models.
    """
    runs = [name for name in names if Path(name, "best").is_dir()]
    summaries = [path for name in runs if (path := Path(name, "summary.json")).is_file()]
    bases = sorted({str(json.loads(path.read_text(encoding="utf-8"))["base"]) for path in summaries})
    if len(bases) > 1:
        raise ValueError(f"the runs are on different bases ({', '.join(bases)}): set --base, or compare runs on one")
    return bases[0] if bases else "nano"


def open_table(base: str) -> StoredModel:
    """Opens the base model `base`, which must have an embedding table.

    Raises:
      ValueError: there is no base model, or arrays of it are missing.
    """
    model = open_model(base)
    if model.config is None or TABLE not in model.arrays:
        raise SettingError(
            f"{base} lacks {TABLE} or other arrays: set ", Setting("initial_checkpoint_path"), " to a whole checkpoint"
        )
    return model


def open_lexicon(model: StoredModel, vocabulary: str | None = None, labels: Sequence[str] = ()) -> Lexicon:
    """Returns the words of a base model, and `labels`, with their vectors. Of the model only the table is read.

    Raises:
      ValueError: the table, the vocabulary or a label cannot be used.
    """
    words = open_vocabulary(vocabulary, model.location, model.config)
    try:
        table = np.asarray(model.arrays[TABLE])
    except ArrayError as error:
        raise SettingError(f"{error}: set ", Setting("initial_checkpoint_path"), " to a whole checkpoint") from None
    return make_lexicon(table, word_ids(words, len(table)), words.piece, words.subwords, labels, words.unk_id)


def check_sources(files: Collection[Path | str], model: StoredModel, vocabulary: str | None = None) -> None:
    """Warns of a PEFT file that names another base model. The whole model is read only if a fingerprint is known.

    Raises:
      ValueError: a prompt was trained on another base model or with another tokenizer.
    """
    assert model.config is not None
    sources = {file: trained_on(file) for file in files}
    words = open_vocabulary(vocabulary, model.location, model.config)
    for file, source in sources.items():
        source.check(f"prompt {file}", None, words.fingerprint)  # before the base model is read
        if remark := source.remark(f"prompt {file}", hub.name_of(model.location) or model.location):
            print(remark, file=sys.stderr)
    if not any(source.base for source in sources.values()):
        return
    arrays = {name: array for name, array in model.arrays.items() if name not in IN_T5X}
    try:
        own = stored_fingerprint(arrays, with_ids(model.config, words))
    except ArrayError as error:
        raise SettingError(f"{error}: set ", Setting("initial_checkpoint_path"), " to a whole checkpoint") from None
    for file, source in sources.items():
        source.check(f"prompt {file}", own, words.fingerprint)


def shown(neighbor: Mapping[str, Any]) -> str:
    """Returns a word with `_` for the space before it, or a class label in brackets."""
    return f"[{neighbor['label']}]" if "label" in neighbor else neighbor["word"].replace("▁", "_")


def neighbor_line(position: int, neighbors: Sequence[Mapping[str, Any]]) -> str:
    """Returns a line with a position and its neighbours; `neighbors` are those that `describe` returns."""
    return f"{position:4}  " + "  ".join(f"{shown(neighbor)} {neighbor['cosine']:.2f}" for neighbor in neighbors)


def lines(report: Mapping[str, Any]) -> list[str]:
    """Returns the lines that are printed for a report."""
    base = os.path.relpath(report["base"]) if os.path.isabs(report["base"]) else report["base"]
    lines = [f"{report['words']:,} words of {base}"]
    for name, prompt in report["prompts"].items():
        lines += ["", f"{name}: {prompt['length']} positions, the {report['top']} nearest words (cosine)"]
        for i, position in enumerate(prompt["positions"]):
            was = f"  (was {shown(position['before'][0])})" if "before" in position else ""
            lines.append(neighbor_line(i, position["neighbors"]) + was)
        lines += [*_prompt_lines(prompt, report), *_label_lines(prompt)]
    if len(report["prompts"]) > 1:
        lines += ["", *_similarity_lines(report)]
    return lines


def _prompt_lines(prompt: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    positions, length, top, chance = prompt["positions"], prompt["length"], report["top"], report["chance"]
    words = [f"{word['word'].replace('▁', '_')} {_numbers(word['positions'])}" for word in prompt["shared"]]
    several = f", of several positions: {'; '.join(words[:MOST_SHARED])}" if words else ""
    several += f"; and {len(words) - MOST_SHARED} more" if len(words) > MOST_SHARED else ""
    lines = [
        f"chance     {prompt['nearer_than_chance']} of {length} positions are nearer to a word than any of "
        f"{chance['directions']} random directions ({chance['mean']:.2f} on average, {chance['largest']:.2f} at most)",
        f"shared     {prompt['distinct']} different words among {length * top}{several}",
    ]
    if top > 1:
        tight = np.mean([position["tightness"] for position in positions])
        lines.append(
            f"tightness  {tight:.2f} between one position's words, {chance['tightness']:.2f} between those of a random "
            "direction"
        )
    if prompt["clusters"]:
        groups = "; ".join(map(_numbers, prompt["clusters"]))
        lines.append(f"clusters   {groups} (connected by half of their words or more)")
    if "before" in positions[0]:
        to_before = [position["cosine_to_before"] for position in positions]
        kept = np.mean([position["kept"] for position in positions])
        lines.append(
            f"moved      {np.mean(to_before):.2f} to itself before on average, {min(to_before):.2f} at least; "
            f"{kept:.1f} of {top} words kept"
        )
    return lines


def _label_lines(prompt: Mapping[str, Any]) -> list[str]:
    """Returns a line per label with the positions near it, and a line with the number of positions near any label."""
    lines, near_labels = [], {}
    for label, stages in prompt["labels"].items():
        found = [f"{stage} at {_numbers(positions) or 'none'}" for stage, positions in stages.items()]
        lines.append(f"label      [{label}] {', '.join(found)}")
        for stage, positions in stages.items():
            near_labels[stage] = near_labels.get(stage, set()) | set(positions)
    counts = [f"{len(positions)} {stage}" for stage, positions in near_labels.items()]
    if "before" in near_labels:
        counts.append(f"{len(near_labels['before'] & near_labels['now'])} before and now")
    return [*lines, f"labels     positions with any: {', '.join(counts)}"] if lines else []


def _numbers(positions: Sequence[int]) -> str:
    return " ".join(map(str, positions))


def _similarity_lines(report: Mapping[str, Any]) -> list[str]:
    lines = ["prompts to one another: cosine of mean vectors below the diagonal, of best-matching positions above"]
    width = max(map(len, report["prompts"]))
    for i, name in enumerate(report["prompts"]):
        below, above = (report[measure][i] for measure in SIMILARITIES)
        cells = [f"{value:6.2f}" for value in below[:i]] + [f"{'-':>6}"] + [f"{value:6.2f}" for value in above[i + 1 :]]
        lines.append(f"{i:4}  {name:{width}}{''.join(cells)}")
    return lines


def _without_diagonal(similarities: Any) -> np.ndarray:
    """Replaces the diagonal by NaN: each item's similarity to itself, 1, would dominate the colour scale."""
    return np.where(np.eye(len(similarities), dtype=bool), np.nan, similarities)


def draw(
    target: Path,
    report: Mapping[str, Any],
    prompts: Mapping[str, Prompt],
    earlier: Mapping[str, Prompt],
    lexicon: Lexicon,
) -> None:
    """Draws cosine similarities: between the positions of one prompt, and to the class labels; or between prompts.

    Raises:
      ValueError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = []  # (title, cosines, column names, (column, row) of each cell to mark)
    if len(prompts) > 1:
        rows = [f"{name}  {i}" for i, name in enumerate(prompts)]
        for measure in SIMILARITIES:
            panels.append((measure.replace("_", " "), _without_diagonal(report[measure]), None, []))
    else:
        (name,) = prompts
        described, stages = report["prompts"][name], {"before": earlier.get(name), "now": prompts[name]}
        rows = [f"{shown(position['neighbors'][0])}  {i}" for i, position in enumerate(described["positions"])]
        panels.append(("other positions", _without_diagonal(cosines(prompts[name], prompts[name])), None, []))
        for stage, prompt in stages.items():
            if prompt is not None and described["labels"]:
                to_labels = cosines(prompt, lexicon.vectors(list(lexicon.labels.values())))
                marks = [(x, y) for x, near in enumerate(described["labels"].values()) for y in near[stage]]
                panels.append((f"labels {stage}", to_labels, list(described["labels"]), marks))
    largest = max(float(np.nanmax(np.abs(values), initial=1e-3)) for _, values, _, _ in panels)
    widths = [max(values.shape[1], len(rows) / 8) for _, values, _, _ in panels]
    side = min(max(0.22 * len(rows), 3.0), 20.0)
    size = (2.5 + side * sum(widths) / len(rows), 1.2 + side)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=size, width_ratios=widths, layout="constrained", squeeze=False
    )  # fmt: skip
    font = min(8.0, 72 * 0.8 * side / len(rows))
    for axis, (title, values, columns, marks) in zip(axes[0], panels, strict=True):
        image = axis.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        axis.set_title(title, fontsize=8)
        if columns is None:  # the columns have the same names as the rows, so their indices are enough
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.tick_params("x", labelsize=8)
        else:
            axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=font, parse_math=False)
        axis.set_yticks([])
        axis.plot(*zip(*marks, strict=True), "k.", markersize=4) if marks else None
    axes[0, 0].set_yticks(range(len(rows)), rows, fontsize=font, parse_math=False)
    dots = f"; dots: among the {report['top']} nearest" if any(marks for *_, marks in panels) else ""
    figure.colorbar(image, ax=axes[0]).set_label(f"cosine{dots}", fontsize=8)
    try:
        figure.savefig(target, dpi=150)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot write {target} ({error}): set --picture to a .png in a folder that is there"
        ) from None
    finally:
        pyplot.close(figure)


if __name__ == "__main__":
    main()
