"""What the files of the package tell a user to run is installed with it, or the text names the source checkout."""

import re

import pytest
from setuptools import find_packages
from tiny import ROOT

# As in setup.py: gin_configs/ is part of the package once installed, and experiments/ is not.
INSTALLED = find_packages(str(ROOT), include=["prompt_tuning_jax", "prompt_tuning_jax.*"])
COMMAND = re.compile(r"python3? -m ([a-z][\w.]*\w)")
SOURCES = sorted([*ROOT.glob("prompt_tuning_jax/**/*.py"), *ROOT.glob("gin_configs/**/*.gin")])
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/notebooks/*.py")])


def is_installed(module: str) -> bool:
    """Whether `python -m MODULE` finds a module of the package without the source tree."""
    path = ROOT / module.replace(".", "/")
    if module in INSTALLED:
        return (path / "__main__.py").is_file()
    return module.rpartition(".")[0] in INSTALLED and path.with_suffix(".py").is_file()


def test_the_package_names_only_commands_that_are_installed():
    """Or says that the command needs a checkout of the source."""
    named = [(path, module) for path in SOURCES for module in COMMAND.findall(path.read_text(encoding="utf-8"))]
    assert len(named) > 30 and ("prompt_tuning_jax.train" in {module for _, module in named})
    wrong = [(path, module) for path, module in named if not is_installed(module)]
    assert {module for _, module in wrong} <= {"experiments.methods"}
    for path, module in wrong:
        assert "in a checkout of the source" in path.read_text(encoding="utf-8"), f"{path} names {module}"


def test_modules_that_are_not_installed_are_not_taken_for_installed_ones():
    assert is_installed("prompt_tuning_jax") and is_installed("prompt_tuning_jax.tasks")
    assert not is_installed("experiments.collect") and not is_installed("prompt_tuning_jax.collect")
    assert not is_installed("prompt_tuning_jax.training")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_say_that_experiments_need_a_checkout(page):
    text = " ".join(page.read_text(encoding="utf-8").replace("\n# ", " ").split())
    if "python -m experiments" in text:
        assert re.search("checkout of the source|In a checkout", text)
