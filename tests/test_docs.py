"""The commands of docs/: every one is run, what needs a cloud by a stand-in, and what is ours is read by ours."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gin
import jsonschema
import pytest
import yaml

from experiments import costs, scaling
from prompt_tuning_jax import gin_files, sweep
from prompt_tuning_jax.parallel.processes import FLAGS, process_of
from prompt_tuning_jax.training import run
from prompt_tuning_jax.training.memory_table import read_size

ROOT = Path(__file__).parent.parent
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
SCHEMA = json.loads((ROOT / "tests" / "fixtures" / "jobset_v1alpha2_schema.json").read_text())
STAND_INS = ("gcloud", "git", "kubectl", "python", "python3", "scontrol", "srun", "tail", "tensorboard", "xpk")
# Notes its arguments, each ended by a NUL, and runs what it was given to run elsewhere.
STAND_IN = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n'; } >> "$CALLS"
case "${0##*/}" in
  srun) exec "$@" ;;
  gcloud) for word; do case "$word" in --command=*) exec bash -euc "${word#--command=}" ;; esac; done ;;
esac
"""


def blocks(kind: str) -> list:
    """The fenced blocks of one kind: shell commands, or YAML."""
    return [
        pytest.param(text, id=f"{name}-{number}")
        for name, doc in DOCS.items()
        for number, (language, text) in enumerate(re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", doc))
        if (language == "yaml") == (kind == "yaml")
    ]


@pytest.fixture(autouse=True)
def only_this_tests_gin(monkeypatch):
    gin.clear_config()
    monkeypatch.setattr(gin_files, "SEARCH_PATHS", list(gin_files.SEARCH_PATHS))
    monkeypatch.setattr(gin.config, "_LOCATION_PREFIXES", [""])
    yield
    gin.clear_config()


def calls(script: str, folder: Path) -> list[list[str]]:
    """What a script calls, with its arguments as the shell makes them."""
    for name in STAND_INS:
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    (folder / "prompt_tuning_jax").mkdir()  # what `git clone` makes
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
    for program, *arguments in found:
        if program in ("python", "python3") and arguments[:2] == ["-m", "pip"]:
            assert arguments[2:4] == ["install", "-e"]
            extra = re.fullmatch(r"\.\[(\w+)\]", arguments[4])
            assert extra and f'"{extra[1]}": [' in (ROOT / "setup.py").read_text()
        elif program in ("python", "python3"):
            assert arguments[0] == "-m"
            importlib.import_module(arguments[1])
            TRIED[arguments[1]](arguments[2:], tmp_path, monkeypatch)
            gin.clear_config()


def try_train(arguments, folder, monkeypatch):
    """Parsed and checked as far as it goes without a base and a task's rows."""
    flags = gin_files.parse(arguments, flags=("allow_other_config", "memory-plan", *FLAGS))
    process_of(flags, {})
    if isinstance(flags.get("memory-plan"), str):
        read_size(flags["memory-plan"])
    gin.get_configurable(run.TrainConfig)().check()


def try_sweep(arguments, folder, monkeypatch):
    """Run, its volume in a folder of the test's."""
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


def try_scaling(arguments, folder, monkeypatch):
    args = scaling.parser().parse_args(arguments)
    assert args.size and isinstance(args.mesh, dict)


TRIED = {
    "prompt_tuning_jax.train": try_train,
    "prompt_tuning_jax.sweep": try_sweep,
    "experiments.scaling": try_scaling,
}


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
    assert costs.table(0.4) in DOCS["tpu.md"]
    page = (ROOT / "experiments" / "results" / "scaling.md").read_text().splitlines()
    rows = [line for line in DOCS["tpu.md"].splitlines() if re.match(r"\| \w+ \| v\d\w*:", line)]
    assert len(rows) >= 6 and all(row in page for row in rows)
    hours = costs.measured_hours()
    for size, value in hours.items():
        assert re.search(rf"(?m)^\| {size}\b.*\| {value:.2f} \|$", DOCS["gpu.md"]), size


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert all(f"docs/{name}" in readme for name in DOCS)
    for name, doc in DOCS.items():
        for target in re.findall(r"\]\(([^)#]+)\)", doc):
            assert "://" in target or (ROOT / "docs" / target).exists(), (name, target)
