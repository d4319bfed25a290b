"""The notebooks: each text runs as a plain Python file, and each .ipynb is what its text makes."""

import json
import os
import re
import subprocess
import sys

import pytest
from tiny import ROOT

FOLDER = ROOT / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
MADE = {
    "compare_methods": ["lora", "low_rank.npy", "methods.png"],
    "mixed_tasks": ["prompts"],
    "sweep": ["my_sweep.gin", "rates.png", "runs"],
    "tune_and_read": ["learning_curve.png", "prompt.npy"],
}


@pytest.fixture(scope="module")
def pages(docs_module):
    """The module that makes notebooks and pages of texts."""
    return docs_module("notebook_pages")


def shortened(text: str) -> str:
    """Returns a notebook with a quarter of the steps, and with evaluations four times as often."""
    settings = r"""((?:"TRAIN_STEPS"|"EVAL_PERIOD"|"steps"|"eval_every"): |\b(?:steps|eval_every)=)(\d+)"""
    short, count = re.subn(settings, lambda found: found[1] + str(int(found[2]) // 4), text)
    assert count >= 2
    return short


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path):
    """In an empty folder, as a reader would run it; it ends with what it promises."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    notebook = tmp_path / f"{name}.py"
    notebook.write_text(shortened((FOLDER / notebook.name).read_text(encoding="utf-8")), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, notebook], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir() if path != notebook) == MADE[name]


@pytest.mark.parametrize("name", NAMES)
def test_an_ipynb_is_that_of_its_text(name, pages):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    made = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert made == pages.notebook(text), "run python docs/notebook_pages.py"
    read = json.loads(made)
    assert read["nbformat"] == 4
    code = ["".join(cell["source"]) for cell in read["cells"] if cell["cell_type"] == "code"]
    # Nothing of the text is lost: what is no cell of code is a comment.
    lines = [line for line in text.splitlines() if line and not line.startswith("# ") and line != "#"]
    assert [line for cell in code for line in cell.splitlines() if line and not line.startswith("# ")] == lines


def test_cells_and_pages_of_a_text(pages, tmp_path):
    text = "# %% [markdown]\n# # Title\n#\n# Words: `x`.\n\n# %%\nx = 1\n\n\n# a comment\nprint(x)\n\n"
    text += "# %% [markdown]\n# End\n"
    assert [*pages.cells(text)] == [
        ("markdown", "# Title\n\nWords: `x`."),
        ("code", "x = 1\n\n\n# a comment\nprint(x)"),
        ("markdown", "End"),
    ]
    made = json.loads(pages.notebook(text))
    assert [cell["cell_type"] for cell in made["cells"]] == ["markdown", "code", "markdown"]
    assert made["cells"][1] == {
        "cell_type": "code", "id": "cell-1", "metadata": {}, "execution_count": None, "outputs": [],
        "source": ["x = 1\n", "\n", "\n", "# a comment\n", "print(x)"],
    }  # fmt: skip
    path = tmp_path / "name.py"
    path.write_text(text)
    page = pages.page(path)
    assert page.startswith("# Title\n\n[Notebook](name.ipynb)") and "```python\nx = 1\n" in page


def test_the_list_names_every_notebook():
    text = (FOLDER / "index.md").read_text(encoding="utf-8")
    assert sorted(MADE) == NAMES and all(f"]({name}.md)" in text for name in NAMES)
