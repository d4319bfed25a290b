"""The README and docs/: each command is run or read by the program that it is for, and each example in Python is run.

What needs a cloud, hours or a root's rights is run by a stand-in. The pages of methods, of coming from elsewhere and of
troubleshooting have tests of their own, in test_method_pages.py.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import gin
import jsonschema
import numpy as np
import pytest
import yaml

import prompt_tuning_jax as pt
from experiments import answers, averages, claims, costs, figure_1, figures, ladder, method_sizes, scaling
from experiments.sizes import PARAMETERS
from experiments.trials import Result, split_mixtures
from prompt_tuning_jax import gin_files, sweep
from prompt_tuning_jax.checkpoints import huggingface, model
from prompt_tuning_jax.checkpoints.base import EMBEDDED, expected_shapes
from prompt_tuning_jax.inference import service
from prompt_tuning_jax.inference.requests import FIELDS, OWN_FIELDS
from prompt_tuning_jax.parallel.processes import FLAGS, process_of
from prompt_tuning_jax.prompts import initializers
from prompt_tuning_jax.sweeps import spec
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.training import api, eval_run, run
from prompt_tuning_jax.training.memory_table import read_size

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
TESTED_ELSEWHERE = re.compile(r"docs/(methods|coming_from|notebooks)/|docs/troubleshooting\.md")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
OURS = {name: text for name, text in PAGES.items() if not TESTED_ELSEWHERE.match(name)}
LANGUAGES = {"": "shell", "bash": "shell", "python": "python", "yaml": "yaml", "gin": "gin", "console": "", "text": ""}
SCHEMA = json.loads((ROOT / "tests" / "fixtures" / "jobset_v1alpha2_schema.json").read_text())
STAND_INS = "curl gcloud git kubectl make prompt-tuning python python3 scontrol srun tail tensorboard xpk".split()
BESIDE = ("python", "ruff")  # stand-ins in .venv/bin
# Notes its arguments, each ended by a NUL, and runs what it was given to run elsewhere.
STAND_IN = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n'; } >> "$CALLS"
case "${0##*/}" in
  srun) exec "$@" ;;
  gcloud) for word; do case "$word" in --command=*) exec bash -euc "${word#--command=}" ;; esac; done ;;
esac
"""


def blocks(kind: str) -> list:
    """Returns the fenced blocks of one kind as parameters of a test."""
    return [
        pytest.param(text, id=f"{name}-{number}")
        for name, page in OURS.items()
        for number, (language, text) in enumerate(re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", page))
        if LANGUAGES[language] == kind
    ]


pytestmark = pytest.mark.usefixtures("only_this_tests_gin")


def calls(script: str, folder: Path) -> list[list[str]]:
    """Returns what a script calls, with its arguments as the shell makes them."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    for path in [*(folder / name for name in STAND_INS), *(folder / ".venv" / "bin" / name for name in BESIDE)]:
        path.write_text(STAND_IN)
        path.chmod(0o755)
    (folder / "prompt_tuning_jax").mkdir()  # what `git clone` makes
    for name in ("rows.jsonl", "lines.txt"):
        (folder / name).touch()
    log = folder / "calls"
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(log), "SLURM_JOB_ID": "7"}
    environment |= {"NAME": "prompts", "ZONE": "us-west4-a"}  # of an earlier block
    ended = subprocess.run(["bash", "-euc", script], env=environment, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    return [call.split("\0") for call in log.read_text().split("\0\n")[:-1]]


@pytest.mark.parametrize("script", blocks("shell"))
def test_commands_of_the_docs(script, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    found = calls(script, tmp_path / "bin")
    assert found
    monkeypatch.chdir(tmp_path)
    for program, *arguments in found:
        if program == "prompt-tuning":
            assert (
                arguments[0] == "--help"
                or arguments[0] in importlib.import_module("prompt_tuning_jax.__main__").COMMANDS
            )
            if arguments[0] == "--help":
                continue
            arguments = ["-m", f"prompt_tuning_jax.{arguments[0]}", *arguments[1:]]
        if program in ("python", "python3", "prompt-tuning"):
            assert arguments[0] == "-m"
            module = arguments[1]
            if module.split(".")[0] in ("prompt_tuning_jax", "experiments"):
                assert importlib.util.find_spec(module), module
            TRIED.get(module, try_argparse)(arguments[2:], tmp_path, monkeypatch, module)
            gin.clear_config()
        elif program == "make":
            assert all(re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text()) for target in arguments)
        elif program == "curl":
            try_curl(arguments)


def try_pip(arguments, *_):
    """An extra that there is, or a repository at a commit."""
    if arguments[1] == "--no-deps":
        assert all(re.fullmatch(r"\w+ @ git\+https://github\.com/[\w/-]+@\w+", one) for one in arguments[2:])
        return
    assert arguments[:2] == ["install", "-e"]
    extra = re.fullmatch(r"\.(?:\[(\w+)\])?", arguments[2])
    assert extra and (extra[1] is None or f'"{extra[1]}": ' in (ROOT / "setup.py").read_text())


def try_train(arguments, folder, monkeypatch, module=""):
    """Parsed and checked as far as it goes without a base and a task's rows."""
    allowed = ("allow_other_config", "memory-plan", *FLAGS)
    if "--help" in arguments:
        with pytest.raises(SystemExit) as ended:
            gin_files.parse(arguments, flags=allowed, about="about")
        assert ended.value.code is None
        return
    if module == "prompt_tuning_jax.demo":
        arguments = ["--gin_file=runs/demo.gin", *arguments]
    flags = gin_files.parse(arguments, flags=allowed)
    process_of(flags, {})
    if isinstance(flags.get("memory-plan"), str):
        read_size(flags["memory-plan"])
    gin.get_configurable(run.TrainConfig)().check()


def try_eval(arguments, *_):
    """Parsed, and checked without a base and rows."""
    gin_files.parse(arguments, flags=("submission", *FLAGS))
    assert gin.get_configurable(eval_run.evaluate_prompt)(check_only=True) == {}


def try_sweep(arguments, folder, monkeypatch, module=""):
    """Its trials, or on a cluster the whole of it, its volume in a folder of the test's."""
    launcher = next((one.partition("=")[2] for one in arguments if one.startswith("--launcher=")), None)
    if launcher not in ("jobset", "xpk", None) or any(one.startswith("--status=") for one in arguments):
        assert launcher in (*sweep.LAUNCHERS, "here", None)
        own, texts = gin_files.split_bindings(arguments, sweep.FLAGS)
        gin_files.parse(own, sweep.FLAGS)
        assert launcher is None or gin.get_configurable(spec.Sweep)().trials(texts)
        return
    mount = folder / "mnt"
    mount.mkdir(exist_ok=True)
    arguments = [argument.replace("/mnt/sweeps", str(mount)) for argument in arguments]
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")  # for the xpk there
    monkeypatch.setenv("CALLS", str(folder / "bin" / "calls"))
    if "--status" not in arguments:
        launcher = "jobset.JobSet" if "--launcher=jobset" in arguments else "xpk.Xpk"
        arguments = [*arguments, f"--gin.{launcher}.mount={str(mount)!r}"]
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
    with pytest.raises(SystemExit) as ended:
        sweep.main()
        raise SystemExit(0)
    assert ended.value.code in (0, None)
    for path in mount.rglob("manifests/*.yaml"):
        jsonschema.validate(yaml.safe_load(path.read_text()), SCHEMA)


def try_scaling(arguments, *_):
    args = scaling.parser().parse_args(arguments)
    assert args.size and isinstance(args.mesh, dict)


def try_flags(arguments, folder, monkeypatch, module):
    """Read by the command's own `parse`."""
    importlib.import_module(module).parse(arguments)


class _Parsed(Exception):
    """A command line was read without a mistake."""


def try_ladder(arguments, folder, monkeypatch, module=""):
    """The commands that it runs, as far as each of them is tried by itself."""
    ran = []
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", [module, *arguments])
        patched.setattr(subprocess, "run", lambda command, **_: ran.append(command) or SimpleNamespace(returncode=0))
        ladder.main()
    for _, _, program, *own in ran:
        TRIED.get(program, try_argparse)(own, folder, monkeypatch, program)
        gin.clear_config()
    assert len(ran) == len(ladder.SWEEPS) + 2


def try_argparse(arguments, folder, monkeypatch, module):
    """Read by the parser that the command's `main` makes, and no further."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*given, **options):
        raise _Parsed(parse(*given, **options))

    with monkeypatch.context() as patched, pytest.raises(_Parsed):
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patched.setattr(sys, "argv", [module, *arguments])
        main = "prompt_tuning_jax.tasks.__main__" if module == "prompt_tuning_jax.tasks" else module
        importlib.import_module(main).main()


def try_t5x(arguments, *_):
    """T5X may be absent: the gin files are there."""
    assert arguments[0] == "--gin_search_paths=gin_configs"
    files = [one.partition("=")[2] for one in arguments if one.startswith("--gin_file=")]
    assert files and all((ROOT / "gin_configs" / file).is_file() for file in files)


def try_pytest(arguments, *_):
    assert (ROOT / arguments[-1]).is_file()


def try_curl(arguments):
    """A route of the service, and rows with fields that it knows."""
    route = arguments[0].partition("/")[2]
    assert f"/{route}" in (service.PREDICT, service.PROMPTS, service.OPENAPI)
    if "--json" in arguments:
        rows = json.loads(arguments[arguments.index("--json") + 1])["rows"]
        assert rows and all(set(row) <= {*FIELDS, *OWN_FIELDS} for row in rows)


TRIED = {
    "build": lambda *_: None,
    "experiments.ladder": try_ladder,
    "experiments.scaling": try_scaling,
    "pip": try_pip,
    "prompt_tuning_jax.convert": try_flags,
    "prompt_tuning_jax.demo": try_train,
    "prompt_tuning_jax.eval": try_eval,
    "prompt_tuning_jax.infer": try_flags,
    "prompt_tuning_jax.neighbors": try_flags,
    "prompt_tuning_jax.serve": try_flags,
    "prompt_tuning_jax.sweep": try_sweep,
    "prompt_tuning_jax.train": try_train,
    "pytest": try_pytest,
    "t5x.train": try_t5x,
}


@pytest.mark.parametrize("text", blocks("gin"))
def test_gin_files_of_the_docs(text, tmp_path):
    (tmp_path / "mine.gin").write_text(text)
    gin_files.parse([f"--gin_file={tmp_path / 'mine.gin'}"])
    assert len(gin.get_configurable(spec.Sweep)().trials()) == 12


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random model of one layer in each stack, of the embedded model's width and with its tokenizer."""
    config = T5Config(8_320, 128, 2, 1, 1, 32, head_dim=64)
    rng = np.random.default_rng(0)
    parameters = {
        name: rng.normal(1.0 if name.endswith("scale") else 0.0, 0.1, shape).astype(np.float32)
        for name, shape in expected_shapes(config).items()
    }
    folder = tmp_path_factory.mktemp("docs") / "base"
    huggingface.write(folder, config, parameters, EMBEDDED["nano"] / "spiece.model")
    return pt.load(str(folder))


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("code", blocks("python"))
def test_python_of_the_docs_runs(code, small, tmp_path, monkeypatch):
    """As it stands, but for the model, the number of steps, and the shapes of batches, so that few programs compile."""
    train, evaluate = api.train, api.evaluate
    same = {"lengths": {"inputs": 64, "targets": 8}, "batch_size": 2}
    monkeypatch.setattr(model, "load", lambda where: small)
    monkeypatch.setattr(
        api,
        "train",
        lambda *given, steps, **more: train(
            *given, steps=min(steps, 2), **more | same | {"eval_every": 2, "eval_batch_size": 2, "progress": False}
        ),
    )
    monkeypatch.setattr(api, "evaluate", lambda *given, **more: evaluate(*given, **more | same))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("text", blocks("yaml"))
def test_manifests_of_the_docs(text, tmp_path):
    manifest = yaml.safe_load(text)
    jsonschema.validate(manifest, SCHEMA)
    (pod,) = [job["template"]["spec"]["template"]["spec"] for job in manifest["spec"]["replicatedJobs"]]
    (container,) = pod["containers"]
    found = {one["name"]: one["value"] for one in container["env"]} | {"JOB_COMPLETION_INDEX": "1"}
    assert process_of({}, found) == {
        "coordinator_address": "boolq-xxl-train-0-0.boolq-xxl:8476",
        "num_processes": manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"],
        "process_id": 1,
    }
    assert container["command"][:3] == ["python", "-m", "prompt_tuning_jax.train"]
    try_train(container["command"][3:], tmp_path, None)


def test_tables_of_the_docs_are_those_of_their_commands():
    gpu, tpu = PAGES["docs/guides/gpu.md"], PAGES["docs/guides/tpu.md"]
    assert costs.table(0.4) in tpu
    page = (RESULTS / "scaling.md").read_text().splitlines()
    rows = [line for line in tpu.splitlines() if re.match(r"\| \w+ \| v\d\w*:", line)]
    assert len(rows) >= 6 and all(row in page for row in rows)
    hours = costs.measured_hours()
    for size, value in hours.items():
        assert re.search(rf"(?m)^\| {size}\b.*\| {value:.2f} \|$", gpu), size


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", text)


def test_numbers_of_the_readme_are_those_of_the_results():
    """The table of speed, row by row."""
    gpu, cpu = ((RESULTS / name).read_text() for name in ("gpu_h100.md", "benchmarks.md"))
    speed = PAGES["README.md"].partition("## Speed")[2]
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in speed.splitlines() if line.startswith("| ")][
        1:
    ]
    assert len(rows) == 6
    for size, (ours, peers, ratio, memory, peers_memory) in zip(("base", "large", "xl"), rows[:3], strict=True):
        (line,) = [one for one in gpu.splitlines() if one.startswith(f"| {size} |")][:1]
        found = [cell.strip() for cell in line.split("|")[1:-1]]
        assert [found[2], found[7], found[9], found[5], found[8]] == [
            ours,
            peers,
            ratio,
            *numbers(memory + peers_memory),
        ]
    measured = re.findall(
        r"examples per second \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) .*\n.*GB \| ([\d.]+) \| ([\d.]+)", cpu
    )
    for row, wanted in zip(rows[3:], (measured[0], measured[1], measured[3]), strict=True):
        assert numbers(" ".join(row)) == [*wanted]


def ladder_results(name: str) -> list[Result]:
    found = figures.read_answers(RESULTS / answers.FILE)
    return answers.with_answers(f"{name}_ladder", figures.read(RESULTS / f"{name}_ladder.csv"), found)


def test_results_of_the_readme_are_those_of_the_ladder():
    """The table, cell by cell."""
    text = PAGES["README.md"].partition("## Results")[2].partition("![")[0]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    results = ladder_results("figure_1")
    means = {
        (one.axes["SIZE"], one.axes["METHOD"]): f"{one.score}"
        for one in averages.mean_over(split_mixtures(results))
        if one.axes["TASK"] == averages.MEAN
    }
    shares = figure_1.shares(results)
    assert [row[0] for row in table[1:]] == [*shares]
    for size, parameters, *found, share in table[1:]:
        assert parameters == f"{PARAMETERS[size] / 1e6:.1f} million"
        assert found == [means[size, method] for method in ("prompt_tuning", "model_tuning", "multi_task")]
        one = shares[size]
        assert share == f"{one.mean:.0f}% [{one.low:.0f}, {one.high:.0f}]"


def test_intervals_on_the_ladders_page_are_those_that_were_computed():
    page = (RESULTS / "ladder.md").read_text()
    names = ("figure_1", "figure_3a", "figure_3b", "figure_3c", "figure_3d", "table_1_transfer", "table_3")
    results = {name: ladder_results(name) for name in names}
    for trial in [one for of_sweep in results.values() for one in of_sweep] + ladder_results("methods"):
        assert trial.answers or trial.axes["METHOD"] in ("multi_task", "prompt_design")
        assert trial.ranking_answers or "FROM" not in trial.axes
    found = claims.claims(results)
    assert (RESULTS / "ladder_claims.md").read_text() == claims.page(found)
    methods = method_sizes.beside_figure_1(ladder_results("methods"), ladder_results("figure_1"))
    assert (RESULTS / "methods_ladder.md").read_text().endswith(method_sizes.text(methods))
    known = {str(one.interval) for one in (*found, *method_sizes.differences(methods))}
    said = re.findall(r"-?\d+\.\d \[-?\d+\.\d, -?\d+\.\d\]", page)
    assert len(said) >= 20 and set(said) <= known
    shares = figure_1.shares(ladder_results("figure_1")).values()
    said = re.findall(r"\d+% \[\d+, \d+\]", page)
    assert set(said) == {f"{one.mean:.0f}% [{one.low:.0f}, {one.high:.0f}]" for one in shares}


def links(text: str) -> list[str]:
    """Returns what a page links to, outside of its code."""
    return re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"(?ms)^```.*?^```$", "", text))


def test_every_page_is_in_the_navigation_and_every_link_leads_to_a_file():
    site = (ROOT / "mkdocs.yml").read_text()
    for name, page in PAGES.items():
        if name.startswith("docs/") and not name.startswith("docs/notebooks/"):  # which enter it by themselves
            assert f" {name.removeprefix('docs/')}\n" in site, name
        for target in links(page):
            path = (ROOT / name).parent / target
            if path.parent.name == "notebooks" and path.suffix == ".md" and path.stem != "index":
                path = path.with_suffix(".py")  # from which its page is made
            assert "://" in target or path.exists(), (name, target)
    for path in RESULTS.glob("*.md"):
        assert f" results/{path.name}\n" in site, path.name


def test_the_readme_is_short_and_leads_everywhere():
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= 130
    for target in ("quickstart", "concepts", "guides/index", "methods/index", "proof", "benchmarks", "architecture"):
        assert f"(docs/{target}.md)" in readme, target


@pytest.mark.parametrize("repository", ["", "https://example.org/me/it"])
def test_a_package_index_gets_no_path(repository):
    """Its page has no files beside it: what the README links to has an address, or is no link."""
    command = [sys.executable, "setup.py", "--quiet", "--long-description"]
    environment = os.environ | {"REPOSITORY_URL": repository}
    text = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    assert all(target.startswith("https://") for target in links(text))
    assert ("](https://example.org/me/it/raw/main/docs/method.png)" in text) is bool(repository)
    assert ("[proof](https://example.org/me/it/blob/main/docs/proof.md)" in text) is bool(repository)
    assert "[Lester et al. 2021](https://arxiv.org" in text


@pytest.fixture(scope="module")
def hooks(docs_module):
    """What MkDocs calls; it imports MkDocs only when files are added."""
    return docs_module("site_hooks")


def test_links_of_the_site(hooks):
    text = (
        "[a](../../experiments/results/ladder.md#what) ![b](../method.png) [c](tpu.md) [d](../../setup.py) [e](no.md)"
    )
    site = "[a](../results/ladder.md#what) ![b](../method.png) [c](tpu.md) d [e](no.md)"
    assert hooks.relink(text, "docs/guides/gpu.md", None) == site
    address = "[d](https://example.org/me/blob/main/setup.py)"
    assert hooks.relink("[d](../setup.py)", "docs/proof.md", "https://example.org/me") == address
    page = "[n](../../prompt_tuning_jax/bases/nano/README.md) ![f](figure_4.png) [w](https://a.b/c.md) [x](#here)"
    site = "[n](../nano.md) ![f](figure_4.png) [w](https://a.b/c.md) [x](#here)"
    assert hooks.relink(page, "experiments/results/ladder.md", None) == site


def test_the_reference_has_every_public_name():
    reference = PAGES["docs/api.md"]
    for name in set(pt.__all__) - {"init"}:
        found = getattr(pt, name)
        entry = f"::: {found.__module__}.{found.__name__}\n    options: {{heading: pt.{name}, toc_label: pt.{name}"
        assert entry in reference, name
    starts = re.search(r"::: prompt_tuning_jax\.prompts\.initializers\n.*members: \[(.*)\]", reference)
    classes = [one for one in vars(initializers).values() if isinstance(one, type) and dataclasses.is_dataclass(one)]
    own = {one.__name__ for one in classes if one.__module__ == initializers.__name__}
    assert starts and set(starts[1].split(", ")) == own


def test_the_architecture_has_the_floors_that_are_checked():
    (contract,) = [
        one
        for one in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
        if one["type"] == "layers"
    ]
    floors = [set(re.findall(r"\w+", layer)) for layer in contract["layers"]]
    table = re.findall(r"(?m)^\| (\d+) \| ([^|]+) \|", PAGES["docs/architecture.md"])
    assert [set(re.findall(r"\w+", rooms)) for _, rooms in table] == floors
    assert [int(number) for number, _ in table] == [*range(1, len(floors) + 1)]


def test_every_test_that_is_named_as_proof_is_there():
    named = re.findall(r"\[(test_\w+\.py)\]\(\.\./tests/(test_\w+\.py)\)", PAGES["docs/proof.md"])
    assert len(named) >= 30 and all(text == file and (ROOT / "tests" / file).is_file() for text, file in named)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == pt.__version__ and citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors", "preferred-citation"} <= set(citation)
