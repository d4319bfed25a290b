"""Runs the benchmarks against PEFT, and writes the results to experiments/results/benchmarks.md.

    python -m experiments.benchmarks.page [--data_dir=path/to/glue --vocabulary=spiece.model] [--only=NAME,...]

When a benchmark has finished, its last line is stored in benchmarks.json beside the page, with its command, machine and
date. `--only` runs some benchmarks and keeps the numbers of the others; `--only=` only rewrites the page from the
stored results. Benchmarks on a task's rows need --data_dir. The machine should do nothing else in the meantime. Linux
only.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parents[1] / "results"
IDLE = 0.1  # how many cores other processes may keep busy
PACKAGES = ("prompt_tuning_jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "peft")
DEVICE = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind)"


class Row(NamedTuple):
    """Holds a row of the table. `ratio` is our value divided by the peer's."""

    measure: str
    ours: str
    peer: str = ""
    ratio: str = ""


class Benchmark(NamedTuple):
    """Describes a benchmark.

    Attributes:
      what: says in words what is measured.
      command: the module and its flags.
      rows: yields rows of the table for the record that the benchmark prints.
      targets: the intended values, by measure.
      task: whether the benchmark reads a task's rows from --data_dir.
    """

    what: str
    command: Sequence[str]
    rows: Callable[[Mapping[str, Any]], Iterator[Row]]
    targets: Mapping[str, str] = {}
    task: bool = False


def step_rows(record: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the rows of `train_step`."""
    ours = record["contenders"]["ours"]
    peer = record["contenders"].get(record["peer"])

    def row(measure: str, ratio: float | None, show: Callable[[Mapping[str, Any]], str]) -> Row:
        return Row(measure, show(ours), show(peer) if peer else "", "" if ratio is None else f"{ratio:.2f}")

    yield row("examples per second", record.get("ratio"), lambda found: f"{found['examples_per_second']:.2f}")
    yield row("peak memory, GB", record.get("memory_ratio"), lambda found: f"{found['peak_bytes'] / 1e9:.2f}")
    seconds = "start_to_first_step_seconds"
    ratio = ours[seconds] / peer[seconds] if peer else None
    yield row("process start to first step, s", ratio, lambda found: f"{found[seconds]:.1f}")
    yield row("share of the best matmul's rate", None, lambda found: f"{found['roofline_share']:.1%}")


def decode_rows(record: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the rows of `decode`."""
    ours, *peer = (f"{record['batch'] / record['seconds'][name]:.2f}" for name in ("ours", record["peer"]) if name)
    yield Row("examples per second", ours, *peer, *([f"{record['ratio']:.2f}"] if peer else []))


def startup_rows(record: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the rows of `startup`."""
    for name, what in (("first_step", "first training step"), ("first_answer", "first answer of `infer`")):
        for state, found in record[name].items():
            yield Row(f"{what}, {state}, s", f"{found['seconds']:.2f}")
    slowest = max(record["help"], key=lambda name: record["help"][name]["seconds"])
    yield Row(f"`--help`, the slowest ({slowest}), s", f"{record['help'][slowest]['seconds']:.2f}")
    ours, peer = record["import"]["seconds"], record["peft"]["seconds"] if record["peer"] else None
    yield Row("imports, s", f"{ours:.2f}", *([f"{peer:.2f}", f"{ours / peer:.2f}"] if peer else []))


def input_rows(record: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the rows of `input`."""
    yield Row("rows a CPU second", f"{record['rows_per_cpu_second']:,}")
    for name, share in record["padding"].items():
        yield Row(f"padding of {name} (at fixed width)", f"{share:.1%} ({record['padding_at_fixed_width'][name]:.1%})")
    yield Row("share of a step that waits for its batch", f"{record['wait']:.2%}")


STEP, NO_SLOWER = ("train_step", "--peer=peft"), {"examples per second": "ratio ≥ 1"}
FASTER = {
    "examples per second": "ratio ≥ 1.15",
    "peak memory, GB": "ratio ≤ 0.7",
    "share of the best matmul's rate": "≥ 80%",
}
LESS_PADDED = {"examples per second": "ratio ≥ 1.3"}
LONG = ("--size=base", "--input-length=512", "--batch=8")
SHAPE = "T5 1.1 small, batch 32, P=100, 128 input and 8 target tokens"
BENCHMARKS = {
    "step": Benchmark(f"Prompt tuning, float32: {SHAPE}", STEP, step_rows, FASTER),
    "step_bfloat16": Benchmark("The same, bfloat16", (*STEP, "--dtype=bfloat16"), step_rows, NO_SLOWER),
    "step_model": Benchmark("Model tuning, float32, no prompt", (*STEP, "--mode=model"), step_rows, NO_SLOWER),
    "step_long": Benchmark("Prompt tuning, T5 1.1 base, batch 8, 512 input tokens", (*STEP, *LONG), step_rows, FASTER),
    "step_sst2": Benchmark(
        "Prompt tuning on SST-2's rows, at most 128 tokens", (*STEP, "--lengths=sst2"), step_rows, LESS_PADDED, True
    ),
    "step_rte": Benchmark(
        "Prompt tuning on RTE's rows, at most 256 tokens", (*STEP, "--lengths=rte"), step_rows, LESS_PADDED, True
    ),
    "decode": Benchmark(f"Greedy decoding: {SHAPE}", ("decode", "--peer=peft"), decode_rows, NO_SLOWER),
    "startup": Benchmark(
        "Start-up, from process start: the embedded base, tokens cached",
        ("startup", "--peer=peft"),
        startup_rows,
        {"first training step, warm, s": "≤ 8"},
    ),
    "input": Benchmark("Input: the demo's task", ("input",), input_rows),
}


def machine() -> dict[str, str]:
    """Returns the properties of the machine on which the numbers depend."""

    def field(file: str, name: str) -> str:
        lines = Path(file).read_text().splitlines()
        return next((line.split(":")[1].strip() for line in lines if line.startswith(name)), "unknown")

    versions = [f"Python {sys.version.split()[0]}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    # Ask in a child process, because this process must not take an accelerator's memory.
    device = subprocess.run([sys.executable, "-c", DEVICE], check=True, capture_output=True, text=True).stdout.strip()
    amx = "with" if "amx_tile" in field("/proc/cpuinfo", "flags").split() else "without"
    return {
        "CPU": f"{field('/proc/cpuinfo', 'model name')}, {len(os.sched_getaffinity(0))} cores, {amx} AMX",
        "memory": f"{int(field('/proc/meminfo', 'MemTotal').split()[0]) * 1024 / 1e9:.1f} GB",
        "JAX's device": device,
        "versions": ", ".join(versions),
    }


def run(command: Sequence[str]) -> dict[str, Any]:
    """Runs a benchmark, prints its lines, and returns the record in the last one.

    Raises:
      ChildProcessError: the benchmark failed.
    """
    module, *flags = command
    whole = [sys.executable, "-m", f"{__package__}.{module}", *flags]
    last = ""
    with subprocess.Popen(whole, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line
    if process.returncode:
        raise ChildProcessError(f"{module} ended with {process.returncode}: its error is above")
    return json.loads(last)


def render(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the page with the stored results, in the order of BENCHMARKS."""
    there = {name: stored[name] for name in BENCHMARKS if name in stored}
    machines: list[Mapping[str, str]] = []
    for result in there.values():
        if result["machine"] not in machines:
            machines.append(result["machine"])
    lines = [
        "# Benchmarks",
        "",
        "This page is written by `make bench` (`experiments/benchmarks/page.py`). The peer is PEFT, and for model",
        "tuning plain transformers. Both have the same weights and rows, run in a process each, and take turns. A",
        "ratio divides this project's number by the peer's. The module of each command says how it measures.",
        "",
    ]
    for number, one in enumerate(machines, 1):
        lines += [f"Machine {number}:" if len(machines) > 1 else "Machine:", ""]
        lines += [*(f"- {name}: {value}" for name, value in one.items()), ""]
    lines += ["| what | measure | ours | peer | ratio | target |", "|---|---|---|---|---|---|"]
    for name, result in there.items():
        benchmark = BENCHMARKS[name]
        for index, row in enumerate(benchmark.rows(result["record"])):
            what = "" if index else benchmark.what + _load_warning(result["record"])
            lines.append(f"| {' | '.join([what, *row, benchmark.targets.get(row.measure, '')])} |")
    lines += ["", "The commands, in the table's order:", "", "```"]
    lines += [f"{result['command']}  # {_when(result, machines)}" for result in there.values()]
    return "\n".join([*lines, "```", ""])


def _when(result: Mapping[str, Any], machines: Sequence[Mapping[str, str]]) -> str:
    """Returns the date of a result, and its machine if there are several."""
    known = [result["date"]]
    if len(machines) > 1:
        known.append(f"machine {machines.index(result['machine']) + 1}")
    return ", ".join(known)


def _load_warning(record: Mapping[str, Any]) -> str:
    """Returns a warning if the machine had other work: threads that wait for each other are then many times slower."""
    found = [record, *record.get("contenders", {}).values()]
    busy = max(one.get("busy_elsewhere", 0.0) for one in found)
    return f" (not to be trusted: {busy:.1f} cores were busy elsewhere)" if busy > IDLE else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--data_dir", help="GLUE's own folder")
    parser.add_argument("--vocabulary", help="for its rows; the embedded base's where not given")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of benchmarks.json and benchmarks.md")
    arguments = parser.parse_args()
    names = [*BENCHMARKS] if arguments.only is None else [name for name in arguments.only.split(",") if name]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; expected --only={','.join(BENCHMARKS)}, or some of them")

    file = arguments.out / "benchmarks.json"
    stored = json.loads(file.read_text()) if file.exists() else {}
    here, failed = machine() if names else {}, []
    for number, name in enumerate(names, 1):
        benchmark = BENCHMARKS[name]
        if benchmark.task and not arguments.data_dir:
            print(f"{name}: not run, it needs --data_dir", flush=True)
            continue
        # The page shows placeholders instead of the user's own paths.
        placeholders = {"data_dir": "GLUE_FOLDER", "vocabulary": "SPIECE_MODEL"} if benchmark.task else {}
        given = {flag: value for flag, value in vars(arguments).items() if flag in placeholders and value}
        command = [*benchmark.command, *(f"--{flag}={value}" for flag, value in given.items())]
        shown = [*benchmark.command, *(f"--{flag}={placeholders[flag]}" for flag in given)]
        print(f"{name} ({number} of {len(names)}): {shlex.join(command)}", flush=True)
        try:
            record = run(command)
        except ChildProcessError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
            continue
        stored[name] = {
            "command": shlex.join(["python", "-m", f"{__package__}.{shown[0]}", *shown[1:]]),
            "date": datetime.date.today().isoformat(),
            "machine": here,
            "record": record | {flag: placeholders[flag] for flag in given},
        }
        arguments.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(stored, indent=1) + "\n")
    page = arguments.out / "benchmarks.md"
    page.write_text(render(stored))
    print(f"written: {page}")
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed; the page has the results stored before, where there are any")


if __name__ == "__main__":
    main()
