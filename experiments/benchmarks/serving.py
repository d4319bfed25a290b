"""Tests the service under load: compares every prediction to that of `infer`, and measures the latency.

    python -m experiments.benchmarks.serving [--base=nano] [--clients=200] [--seconds=60]

It makes random prompts of several lengths and rows of every kind: generated, ranked, with beam search, sampled,
truncated, and some with errors. `infer` predicts them first. Then the service is started, and each client repeatedly
asks for 1 to 4 of the rows. At the end, clients ask for more rows than the queue holds and disconnect. It prints one
JSON object. Clients and service share the machine. Linux only.

A prediction must equal that of `infer`. A score may differ by the relative tolerance `TOLERANCE` (absolute below 1): a
row is in a batch with other rows, and another batch size may change the order of additions.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prompt_tuning_jax.checkpoints.base import open_model
from prompt_tuning_jax.tasks.review_grammar import unlabelled

TOLERANCE = 1e-5
LENGTHS = (1, 5, 10, 20, 20, 40, 40, 64)  # the prompts' lengths
LABELS = (["negative", "positive"], ["bad", "neither", "good"])
FLAGS = ("--input_length=24", "--max_new_tokens=16")


def make_prompts(folder: Path, base: str) -> None:
    """Writes random prompts, and a file that is not a prompt."""
    config = open_model(base).config
    assert config is not None
    rng = np.random.default_rng(0)
    for number, length in enumerate(LENGTHS):
        np.save(folder / f"task_{number}.npy", rng.normal(0, 0.3, (length, config.emb_dim)).astype(np.float32))
    (folder / "broken.npy").write_bytes(b"no prompt")


def make_rows(count: int) -> list[dict[str, Any]]:
    """Returns rows of every kind. Rows to sample set a seed, since the default is their index in the request."""
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(unlabelled(count)):
        row: dict[str, Any] = {"prompt": f"task_{rng.randrange(len(LENGTHS))}", "inputs": text}
        kind = number % 20
        if kind < 8:
            row["labels"] = rng.choice(LABELS)
        elif kind == 8:
            row |= {"decode": "beam"}
        elif kind == 9:
            row |= {"decode": "sample", "seed": number, "top_k": 10}
        elif kind == 10:
            row["inputs"] = " ".join([text] * 20)
        elif kind == 11:
            row["prompt"] = rng.choice([None, "task_9", "broken"])
        elif kind == 12 and number % 40 == 12:
            row["inputs"] = ""
        rows.append(row)
    return rows


def infer(rows: Path, *flags: str) -> list[dict[str, Any]]:
    """Returns the expected results, which `infer` computes."""
    command = [sys.executable, "-m", "prompt_tuning_jax.infer", f"--input={rows}", *flags]
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[tuple[int, subprocess.Popen]]:
    """Yields the port and the process of a ready service. The service must exit with 0 at the end."""
    command = [sys.executable, "-m", "prompt_tuning_jax.serve", "--port=0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("serving"):
            raise ChildProcessError(f"the service did not start: exit code {process.wait()}")
        yield int(line.rpartition(":")[2]), process
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            raise ChildProcessError(f"the service ended with {process.returncode}")
    finally:
        process.kill()


class Reply(NamedTuple):
    """Holds a response of the service."""

    status: int
    headers: Mapping[str, str]
    body: Any


class Client:
    """A client with one connection that stays open."""

    def __init__(self, port: int):
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, rows: Sequence[Any]) -> Reply:
        """Sends rows to the service, and returns its response."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        body = json.dumps({"rows": rows}).encode()
        head = "POST /v1/predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        data = await reader.readexactly(int(headers["content-length"]))
        return Reply(int(first.split()[1]), headers, json.loads(data))

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


def difference(found: Any, expected: Any) -> float:
    """Returns the largest difference of numbers, relative for numbers above 1; infinite if anything else differs."""
    if isinstance(expected, float) and isinstance(found, float):
        return abs(found - expected) / max(1.0, abs(expected))
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        return max((difference(found[name], expected[name]) for name in expected), default=0.0)
    return 0.0 if found == expected else float("inf")


class Load:
    """Runs clients for a given time, and records the responses."""

    def __init__(self, port: int, rows: Sequence[Any], expected: Sequence[Any]):
        self._port, self._rows, self._expected = port, rows, expected
        self.seconds: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.answered, self.largest = 0, 0.0
        self.wrong: list[dict[str, Any]] = []

    async def run(self, clients: int, seconds: float) -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._ask(number, until) for number in range(clients)))

    async def _ask(self, number: int, until: float) -> None:
        rng, client = random.Random(number), Client(self._port)
        while time.monotonic() < until:
            indices = [rng.randrange(len(self._rows)) for _ in range(rng.randint(1, 4))]
            started = time.monotonic()
            reply = await client.post([self._rows[index] for index in indices])
            self.seconds.append(time.monotonic() - started)
            self.statuses[reply.status] += 1
            if reply.status == 200:
                for found, index in zip(reply.body["rows"], indices, strict=True):
                    self._check(found, self._expected[index])
        client.close()

    def _check(self, found: dict[str, Any], expected: dict[str, Any]) -> None:
        self.answered += 1
        differs = difference(found, expected)
        if differs > TOLERANCE:
            self.wrong.append({"found": found, "expected": expected})
        else:
            self.largest = max(self.largest, differs)


async def overload(port: int, row: Any, requests: int = 20, rows: int = 1024) -> dict[str, Any]:
    """Sends more rows than the queue holds, counts the refused requests, and disconnects the other clients."""
    clients = [Client(port) for _ in range(requests)]
    asked = [asyncio.create_task(client.post([row] * rows)) for client in clients]
    done, waiting = await asyncio.wait(asked, timeout=5)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for client in clients:
        client.close()
    replies = [task.result() for task in done]
    statuses = Counter(reply.status for reply in replies)
    retry = [int(reply.headers["retry-after"]) for reply in replies if reply.status == 429]
    await asyncio.sleep(1)
    after = await Client(port).post([row])  # rows of disconnected clients must not delay it
    return {
        "requests": requests,
        "statuses": dict(statuses),
        "retry_after": max(retry, default=None),
        "then": after.status,
    }


def memory_bytes(pid: int, what: str) -> int:
    """Returns the bytes of a process in memory: now ("VmRSS"), or the peak so far ("VmHWM")."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{what}:")) * 1024


def measure(base: str, clients: int, seconds: float, count: int, batch_size: int) -> dict[str, Any]:
    """Runs all measurements, and returns the record."""
    with tempfile.TemporaryDirectory() as scratch:
        prompts, rows_file = Path(scratch, "prompts"), Path(scratch, "rows.jsonl")
        prompts.mkdir()
        make_prompts(prompts, base)
        rows = make_rows(count)
        rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = [f"--base={base}", f"--prompts={prompts}", f"--batch_size={batch_size}", *FLAGS]
        expected = infer(rows_file, *flags)
        warm = Path(scratch, "warm.jsonl")
        warm.write_text("".join(json.dumps(row) + "\n" for row in rows if row["inputs"]))
        with serving(f"--warm={warm}", *flags) as (port, process):
            ready = memory_bytes(process.pid, "VmRSS")
            load, started = Load(port, rows, expected), time.monotonic()
            asyncio.run(load.run(clients, seconds))
            took = time.monotonic() - started
            peak = memory_bytes(process.pid, "VmHWM")
            too_much = asyncio.run(overload(port, rows[0]))
            too_much["peak_bytes"] = memory_bytes(process.pid, "VmHWM")
    p50, p95, p99 = np.percentile(load.seconds, [50, 95, 99])
    return {
        "base": base,
        "clients": clients,
        "seconds": round(took, 1),
        "requests": len(load.seconds),
        "rows": load.answered,
        "rows_per_second": round(load.answered / took, 1),
        "statuses": dict(load.statuses),
        "wrong": len(load.wrong),
        "largest_difference": load.largest,
        "p50": round(p50, 3),
        "p95": round(p95, 3),
        "p99": round(p99, 3),
        "ready_bytes": ready,
        "peak_bytes": peak,
        "overload": too_much,
        "wrong_answers": load.wrong[:5],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="nano")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rows", type=int, default=400, help="different ones")
    parser.add_argument("--batch_size", type=int, default=32)
    arguments = parser.parse_args()
    numbers = (arguments.clients, arguments.seconds, arguments.rows, arguments.batch_size)
    print(json.dumps(measure(arguments.base, *numbers), indent=2))


if __name__ == "__main__":
    main()
