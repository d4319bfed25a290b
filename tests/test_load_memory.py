"""Loading a base takes its own size and little more: docs/guides/base_models.md has the same measurement as a table."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import ROOT


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_a_gigabyte_peaks_below_one_and_a_fifth(tmp_path):
    """In a process of its own for each format: what another test freed would hide what this one takes."""
    command = [sys.executable, "-m", "experiments.benchmarks.load_memory", f"--folder={tmp_path}"]
    formats = ["huggingface", *(["bin"] if find_spec("torch") else []), "msgpack", "t5x"]
    command += ["--formats", *formats]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in printed.splitlines()]
    assert [record["format"] for record in records] == formats
    for record in records:
        assert record["array_bytes"] > 0.98e9
        assert 1.0 <= record["peak"] <= (1.2 if record["format"] == "t5x" else 1.15), record
