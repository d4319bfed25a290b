"""Loading a base takes its own size and little more: docs/guides/base_models.md has the same measurement as a table."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import ROOT


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_loading_takes_the_parameters_and_little_more(tmp_path):
    """In a process of its own for each format: what another test freed would hide what this one takes.

    T5 1.1 small has 308 MB in float32. What else a process takes while loading, such as compiled programs, is 50 to 105
    MB at any size. T5X's chunks are read by several threads, each of which holds a chunk.
    """
    command = [sys.executable, "-m", "experiments.benchmarks.load_memory", "--size=small", f"--folder={tmp_path}"]
    formats = ["huggingface", *(["bin"] if find_spec("torch") else []), "msgpack", "t5x"]
    command += ["--formats", *formats]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in printed.splitlines()]
    assert [record["format"] for record in records] == formats
    for record in records:
        assert record["array_bytes"] == 307_844_608
        assert record["peak"] >= 1.0, record
        more = 150e6 if record["format"] == "t5x" else 120e6
        assert record["peak_bytes"] <= 1.05 * record["array_bytes"] + more, record
