"""The service under load: is every answer `infer`'s, and how long does one take?

    python -m experiments.benchmarks.serving [--base=nano] [--clients=200] [--seconds=60]

makes random prompts of several lengths and rows of every kind (generated, ranked, of beam search, sampled, cut, and
some that cannot be answered), has `infer` answer them, starts the service, and lets each client ask for 1 to 4 of the
rows at a time, over and over. Then it asks for more than the queue holds, and goes away. It prints one JSON object.
Clients and service share the machine. Linux only.

A prediction must be `infer`'s. A score may differ by `TOLERANCE` of itself (absolutely below 1): the rows around a row
are others, and another size of batch adds up in another order.
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
LENGTHS = (1, 5, 10, 20, 20, 40, 40, 64)  # of the prompts
LABELS = (["negative", "positive"], ["bad", "neither", "good"])
FLAGS = ("--input_length=24", "--max_new_tokens=16")


def make_prompts(folder: Path, base: str) -> None:
    """Random prompts, and a file that is none."""
    config = open_model(base).config
    assert config is not None
    rng = np.random.default_rng(0)
    for number, length in enumerate(LENGTHS):
        np.save(folder / f"task_{number}.npy", rng.normal(0, 0.3, (length, config.emb_dim)).astype(np.float32))
    (folder / "broken.npy").write_bytes(b"no prompt")


def make_rows(count: int) -> list[dict[str, Any]]:
    """Rows of every kind; those to be sampled have seeds of their own, since the default is the place in a request."""
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
    """The answers expected."""
    command = [sys.executable, "-m", "prompt_tuning_jax.infer", f"--input={rows}", *flags]
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[tuple[int, subprocess.Popen]]:
    """A service that is ready, on a port of its own; it must end well."""
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
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: Any


class Client:
    """One connection, kept open."""

    def __init__(self, port: int):
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, rows: Sequence[Any]) -> Reply:
        """Asks for rows."""
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
    """The largest between numbers, relative where they are above 1; infinite where anything else differs."""
    if isinstance(expected, float) and isinstance(found, float):
        return abs(found - expected) / max(1.0, abs(expected))
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        return max((difference(found[name], expected[name]) for name in expected), default=0.0)
    return 0.0 if found == expected else float("inf")


class Load:
    """Clients that ask until it is time, and what they saw."""

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
            places = [rng.randrange(len(self._rows)) for _ in range(rng.randint(1, 4))]
            started = time.monotonic()
            reply = await client.post([self._rows[at] for at in places])
            self.seconds.append(time.monotonic() - started)
            self.statuses[reply.status] += 1
            if reply.status == 200:
                for found, at in zip(reply.body["rows"], places, strict=True):
                    self._check(found, self._expected[at])
        client.close()

    def _check(self, found: dict[str, Any], expected: dict[str, Any]) -> None:
        self.answered += 1
        differs = difference(found, expected)
        if differs > TOLERANCE:
            self.wrong.append({"found": found, "expected": expected})
        else:
            self.largest = max(self.largest, differs)


async def overload(port: int, row: Any, requests: int = 20, rows: int = 1024) -> dict[str, Any]:
    """More rows than the queue holds at once: how many requests are turned away. The others' clients go away."""
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
    after = await Client(port).post([row])  # rows that nobody waits for are not in its way
    return {
        "requests": requests,
        "statuses": dict(statuses),
        "retry_after": max(retry, default=None),
        "then": after.status,
    }


def held(pid: int, what: str) -> int:
    """Bytes of a process in memory: now ("VmRSS"), or at most so far ("VmHWM")."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{what}:")) * 1024


def measure(base: str, clients: int, seconds: float, count: int, batch_size: int) -> dict[str, Any]:
    """Everything, as a record."""
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
            ready = held(process.pid, "VmRSS")
            load, started = Load(port, rows, expected), time.monotonic()
            asyncio.run(load.run(clients, seconds))
            took = time.monotonic() - started
            peak = held(process.pid, "VmHWM")
            too_much = asyncio.run(overload(port, rows[0]))
            too_much["peak_bytes"] = held(process.pid, "VmHWM")
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
