"""Makes the notebooks of docs/notebooks/: `python docs/notebook_pages.py` writes NAME.ipynb from each NAME.py.

A text is a Python file in Jupytext's percent format: `# %%` begins a cell of code, and `# %% [markdown]` one of text,
whose lines are comments. It runs as it is, too. As a hook of MkDocs this file makes a page of each text.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent / "notebooks"
LIST = "notebooks/index.md"
CELL = re.compile(r"(?m)^# %%(?P<markdown> \[markdown\])?\n")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def texts() -> list[Path]:
    """Returns the files that notebooks are made from."""
    return sorted(FOLDER.glob("*.py"))


def cells(text: str) -> Iterator[tuple[str, str]]:
    """Yields each cell of a percent-format file: "markdown" or "code", and what is in it.

    >>> [*cells("# %% [markdown]\\n# # Title\\n\\n# %%\\nprint(1)\\n")]
    [('markdown', '# Title'), ('code', 'print(1)')]
    """
    marks = [*CELL.finditer(text)]
    for mark, end in zip(marks, [*(mark.start() for mark in marks[1:]), len(text)], strict=True):
        body = text[mark.end() : end].strip("\n")
        if mark["markdown"]:
            yield "markdown", re.sub(r"(?m)^# ?", "", body)
        else:
            yield "code", body


def notebook(text: str) -> str:
    """Returns the .ipynb of a percent-format file, without outputs."""
    made = []
    for number, (kind, body) in enumerate(cells(text)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": body.splitlines(keepends=True)}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    whole = {"cells": made, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def page(path: Path) -> str:
    """Returns the page of a percent-format file in Markdown, with a link to its notebook under the heading."""
    parts = [body if kind == "markdown" else f"```python\n{body}\n```" for kind, body in cells(path.read_text())]
    heading, _, rest = parts[0].partition("\n")
    links = f"[Notebook]({path.stem}.ipynb), or the same [as a Python file]({path.name})."
    return "\n\n".join([heading, links, rest.strip(), *parts[1:]]) + "\n"


def on_config(config):
    """Puts the list of the notebooks before their pages in the navigation; MkDocs calls this with its settings."""
    own = next((part["Notebooks"] for part in config.nav or [] if "Notebooks" in part), None)
    if own is not None and LIST not in own:
        own.insert(0, LIST)
    return config


def on_files(files, config):
    """Adds a page for each notebook; MkDocs calls this with the site's files."""
    from mkdocs.structure.files import File

    for path in texts():
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page(path)))
    return files


if __name__ == "__main__":
    for path in texts():
        path.with_suffix(".ipynb").write_text(notebook(path.read_text()), encoding="utf-8")
        print(path.with_suffix(".ipynb"))
