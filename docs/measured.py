"""A hook of MkDocs that puts measured rows into pages, so that no page has a number that somebody typed.

A page writes `{{ measured "residual" "ulpt" }}` where a table of these methods is to stand. The names are those of
METHOD in gin_configs/sweeps/methods.gin, and the rows come from experiments/results/methods.csv, which
`python -m experiments.methods --collect` writes. `{{ measured }}` gives every method of that file. If it has no row of
a method, the page says that the method is not measured yet.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # experiments/ is never installed

from experiments import methods  # noqa: E402

MARK = re.compile(r'\{\{ measured((?: "\w+")*) \}\}')
NOT_YET = "Not measured yet."
HEAD = (
    f"| method | base model | task | accuracy | less {methods.PLAIN} | learning rate | steps to 99% | trained "
    "| stored |",
    "|---|---|---|---|---|---|---|---|---|",
)


def table(cells: Mapping[tuple[str, str, str], methods.Cell], names: Sequence[str]) -> str:
    """Returns a table in Markdown, with a row per method, base model and task; `NOT_YET` if there are no rows.

    Args:
      cells: of `experiments.methods.cells`.
      names: the methods to show; none for all.
    """
    rows = []
    for (size, task, method), cell in cells.items():
        if names and method not in names:
            continue
        difference = methods.difference(cell, cells.get((size, task, methods.PLAIN))) or ""
        run = cell.runs[0]
        steps = ", ".join(str(methods.steps_to(one.curve)) for one in cell.runs)
        rows.append(
            f"| `{method}` | {size} | {task} | {methods.bootstrap(cell.right)} | {difference} | {run.rate} | {steps} "
            f"| {run.trainable_parameters:,} | {run.stored_bytes:,} bytes |"
        )
    return "\n".join([*HEAD, *rows]) if rows else NOT_YET


def filled(markdown: str, path: Path = methods.RESULTS / "methods.csv") -> str:
    """Returns a page's text with a table in place of each mark.

    Args:
      path: the results; the file need not be there.
    """
    if not MARK.search(markdown):
        return markdown
    cells = methods.cells(methods.from_csv(path)) if path.is_file() else {}
    return MARK.sub(lambda mark: table(cells, re.findall(r"\w+", mark[1])), markdown)


def on_page_markdown(markdown, **_):
    """Fills the marks in a page's text; MkDocs calls this per page."""
    return filled(markdown)
