"""Measures a training step's speed, memory and start-up, and compares them to PEFT on the same weights and rows.

    python -m experiments.benchmarks.train_step [--size=small] [--mode=prompt|model] [--dtype=float32|bfloat16|int8]
        [--peer=peft] [--peer-dtype=float32|bfloat16|autocast] [--lengths=fixed|sst2|rte --data_dir=path/to/glue]

Each contender has its own process with the same random weights. On a CPU they take steps in turns, and the other is
idle; on an accelerator they run one after the other, so that each has all of the memory. With `--mode=model` all
weights are trained, for the peer with plain transformers. The frozen base model has the dtype `--dtype`, and the peer's
model `--peer-dtype`, where `autocast` means float32 weights under torch.autocast. With `--lengths` the rows are those
of a task: this project's loader makes batches of rows with similar lengths; the peer has the same rows in a random
order, with each batch padded to its longest row.

The last line printed is one JSON object with all settings, and

  contenders: the values of each contender, or null if it does not fit into memory
    import_seconds, start_to_first_step_seconds: from the start of the process to the end of its imports, and to the end
      of its first step, with nothing compiled before; first_step_seconds: only that step, including compilation
    step_seconds: median, min and max; examples_per_second: from the median, with `--lengths` from the sum
    flop, flop_per_second: those of a step's matmuls (`training.flop.step_flop`), with `--lengths` on average
    product_flop_per_second: the best of the matmuls in `products`, measured with the contender's framework
    roofline_share: the time that the step's matmuls would take at that rate, divided by the step's time
    mfu: flop_per_second divided by the device's published peak in bfloat16 (`training.flop.PEAKS`), if it is known
    peak_bytes: the peak memory of the process, or of the accelerator
    busy_elsewhere: cores that other processes kept busy in the meantime; if above about 0.1, the seconds are unreliable
    first_loss: in nats per target token; equal up to rounding if both do the same work
  ratio, memory_ratio: our examples per second, and our peak memory, divided by the peer's

`--largest-batch` instead doubles the batch size until it does not fit into the accelerator's memory. Linux only.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.benchmarks.contenders import (
    CORES,
    EOS,
    TOKENS,
    Contender,
    random_inputs,
    random_prompt,
    used_elsewhere,
    write_base,
)
from experiments.benchmarks.step_contenders import MADE_IN_PLACE, Rows, Settings

if TYPE_CHECKING:
    from prompt_tuning_jax.batches.loader import Batch

TASKS = {"sst2": ("taskless_glue_sst2_v200", 128), "rte": ("taskless_glue_rte_v200", 256)}  # and input length
ROUNDS = {"fixed": 5, "sst2": 40, "rte": 40}


def fixed_rows(batch: int, inputs: int, targets: int) -> Rows:
    """Returns one batch without padding."""
    target_tokens = np.random.default_rng(2).integers(3, TOKENS, (batch, targets)).astype(np.int32)
    target_tokens[:, -1] = EOS
    return [(random_inputs(batch, inputs), target_tokens)]


def task_rows(arguments: argparse.Namespace, rounds: int) -> tuple[Rows, Rows]:
    """Returns the first batches of a run on the task, and the same rows in the peer's random, padded batches."""
    from prompt_tuning_jax.batches.dataset import DatasetConfig
    from prompt_tuning_jax.checkpoints.base import default_vocabulary
    from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary

    task, length = TASKS[arguments.lengths]
    lengths = {"inputs": length, "targets": arguments.target_length}
    dataset = DatasetConfig(task, "train", arguments.batch, lengths, data_dir=arguments.data_dir)
    batches = dataset.batches(Vocabulary(arguments.vocabulary or default_vocabulary("nano")), shuffle=True)
    ours = [batches[number] for number in range(rounds)]
    return [(batch.inputs, batch.targets) for batch in ours], in_any_order(ours, arguments.batch)


def in_any_order(batches: Sequence["Batch"], batch_size: int) -> Rows:
    """Returns the same rows, shuffled and divided into new batches, each as wide as its longest row."""
    rows = [
        tuple(tokens[index][tokens[index] > 0] for tokens in (batch.inputs, batch.targets))
        for batch in batches
        for index in np.flatnonzero(batch.ids >= 0)
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    parts = [order[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    return [(pad([rows[index][0] for index in part]), pad([rows[index][1] for index in part])) for part in parts]


def pad(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Returns rows of tokens as one array, as wide as the longest row."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    return padded


def write_rows(file: Path, rows: Rows) -> None:
    """Writes rows in the format that `step_contenders` reads."""
    inputs = {f"inputs{n}": inputs for n, (inputs, _) in enumerate(rows)}
    np.savez(file, **inputs, **{f"targets{n}": targets for n, (_, targets) in enumerate(rows)})


def start(name: str, folder: Path, arguments: argparse.Namespace) -> Contender:
    """Starts a contender's process, which does its first step at once."""
    settings = Settings(
        contender=name,
        folder=str(folder),
        size=arguments.size,
        mode=arguments.mode,
        prompt_length=arguments.prompt_length if arguments.mode == "prompt" else 0,
        dtype=arguments.dtype if name == "ours" else arguments.peer_dtype,
        device=arguments.device,
        threads=arguments.threads,
        attention=arguments.attention,
        remat_policy=arguments.remat_policy,
    )
    module = "experiments.benchmarks.step_contenders"
    return Contender(module, [json.dumps(settings._asdict())], arguments.threads, arguments.device)


def measure(folder: Path, rows: Mapping[str, Rows], rounds: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures every contender, and returns their values by name."""
    found: dict[str, dict[str, Any]] = {}
    running: dict[str, Contender] = {}
    for name in rows:
        running[name] = start(name, folder, arguments)
        found[name] = running[name].ask("start")  # wait before the next one starts, since they would share the cores
        if found[name] is None:
            print(f"{name} does not fit into memory: set --batch or --size, or --peer-batch", flush=True)
            running.pop(name).end()
            continue
        print(json.dumps({"contender": name} | found[name]), flush=True)
        if found[name]["platform"] == "cpu" and name != [*rows][-1]:
            continue
        before, began = used_elsewhere(running.values()), time.perf_counter()
        for which, seconds in by_turns(running, rows, rounds).items():
            found[which] |= figures(seconds, rows[which], arguments)
        elsewhere = (used_elsewhere(running.values()) - before) / (time.perf_counter() - began)
        for which in running:
            found[which]["busy_elsewhere"] = elsewhere
        for which, contender in running.items():
            found[which]["peak_bytes"] = contender.ask("peak")
        for which, contender in running.items():
            found[which] |= compare_to_matmuls(found[which], contender.ask("products"))
            contender.end()
        running.clear()
    return found


def by_turns(running: Mapping[str, Contender], rows: Mapping[str, Rows], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each contender's steps, measured in turns after every shape has been compiled."""
    for name, contender in running.items():
        first = {(inputs.shape, targets.shape): n for n, (inputs, targets) in reversed([*enumerate(rows[name])])}
        for number in first.values() if name == "ours" else [0]:
            contender.seconds(f"step {number}")
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for number in range(rounds):
        for name, contender in running.items():
            seconds[name].append(contender.seconds(f"step {number % len(rows[name])}"))
        print(json.dumps({"step": number} | {name: round(times[-1], 4) for name, times in seconds.items()}), flush=True)
    return seconds


def figures(seconds: Sequence[float], rows: Rows, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the values that follow from the seconds of steps; with `--lengths`, step n was on batch n."""
    from experiments.sizes import SIZES
    from prompt_tuning_jax.training.flop import StepShape, step_flop

    model = arguments.mode == "model"
    prompt = 0 if model else arguments.prompt_length
    shapes = [StepShape(len(inputs), inputs.shape[1], targets.shape[1], prompt) for inputs, targets in rows]
    flop = statistics.mean(step_flop(SIZES[arguments.size], shape, trains_model=model) for shape in shapes)
    examples = statistics.mean(int((inputs > 0).any(axis=1).sum()) for inputs, _ in rows)
    median = statistics.median(seconds)
    typical = median if arguments.lengths == "fixed" else statistics.mean(seconds)
    return {
        "step_seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "examples_per_second": examples / typical,
        "tokens": {"read": sum(int((inputs > 0).sum()) for inputs, _ in rows), "padded": sum(i.size for i, _ in rows)},
        "flop": flop,
        "flop_per_second": flop / typical,
    }


def compare_to_matmuls(figures: Mapping[str, Any], products: Mapping[str, float]) -> dict[str, Any]:
    """Compares a contender's FLOP per second to that of its best matmul, and to its device's published peak."""
    from prompt_tuning_jax.training.flop import PEAKS

    best, done = max(products.values()), figures["flop_per_second"]
    mfu = {"mfu": done / PEAKS[figures["device"]]} if figures.get("device") in PEAKS else {}
    return {"products": products, "product_flop_per_second": best, "roofline_share": done / best, **mfu}


def largest_batch(name: str, folder: Path, arguments: argparse.Namespace) -> int:
    """Returns the largest of --batch, 2 * --batch, ... whose first step fits into the accelerator's memory, or 0."""
    fits, batch = 0, arguments.batch
    while True:
        write_rows(folder / f"{name}.npz", fixed_rows(batch, arguments.input_length, arguments.target_length))
        contender = start(name, folder, arguments)
        first = contender.ask("start")
        contender.end()
        if first is None:
            return fits
        if first["platform"] == "cpu":
            raise SystemExit("error: --largest-batch fills an accelerator's memory, and there is only a CPU")
        print(json.dumps({"contender": name, "batch": batch} | first), flush=True)
        fits, batch = batch, 2 * batch


def compare(folder: Path, names: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the contenders on their rows, and returns their values and the ratios."""
    if arguments.lengths == "fixed":
        batches = {name: arguments.batch if name == "ours" else arguments.peer_batch for name in names}
        shape = arguments.input_length, arguments.target_length
        rows = {name: fixed_rows(batch, *shape) for name, batch in batches.items()}
    else:
        rows = dict(zip(names, task_rows(arguments, arguments.rounds), strict=False))
    for name in names:
        write_rows(folder / f"{name}.npz", rows[name])
    found = measure(folder, rows, arguments.rounds, arguments)
    record: dict[str, Any] = {"contenders": found}
    if arguments.peer and all(found.values()):
        ours, peer = found["ours"], found[arguments.peer]
        if (ours["platform"] == "cpu") != (peer["platform"] == "cpu"):
            print(f"no ratio: this project ran on {ours['device']}, and torch on {peer['device']}")
            return record
        record["ratio"] = ours["examples_per_second"] / peer["examples_per_second"]
        record["memory_ratio"] = ours["peak_bytes"] / peer["peak_bytes"]
    return record


def parse() -> argparse.Namespace:
    from experiments.sizes import SIZES
    from prompt_tuning_jax.t5.config import ATTENTIONS, REMAT_POLICIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--mode", choices=["prompt", "model"], default="prompt", help="what is trained")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--input-length", type=int, default=128)
    parser.add_argument("--target-length", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=100)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "int8"], default="float32")
    parser.add_argument("--attention", choices=ATTENTIONS, default="products", help="of this project")
    parser.add_argument("--remat-policy", choices=REMAT_POLICIES, default="none", help="of this project")
    parser.add_argument("--peer", choices=["peft"], help="needs the extra [hf]")
    parser.add_argument("--peer-dtype", choices=["float32", "bfloat16", "autocast"], help="--dtype where not given")
    parser.add_argument("--peer-batch", type=int, help="--batch where not given: for a peer that needs more memory")
    parser.add_argument("--lengths", choices=ROUNDS, default="fixed", help="of the rows: --input-length, or a task's")
    parser.add_argument("--data_dir", help="GLUE's folder, for --lengths")
    parser.add_argument("--vocabulary", help="for --lengths; the embedded base's where not given")
    parser.add_argument("--rounds", type=int, help="steps of each contender: 5, with --lengths 40")
    parser.add_argument("--threads", type=int, default=CORES)
    parser.add_argument("--device", choices=["cpu", "default"], default="default")
    parser.add_argument("--largest-batch", action="store_true")
    arguments = parser.parse_args()
    if arguments.lengths != "fixed" and not arguments.data_dir:
        parser.error(f"--lengths={arguments.lengths} reads the task's rows: set --data_dir to GLUE's folder")
    if arguments.peer and not all(map(importlib.util.find_spec, ("torch", "peft"))):
        parser.error("--peer=peft needs torch, transformers and peft: pip install -e '.[hf]'")
    arguments.peer_batch = arguments.peer_batch or arguments.batch
    arguments.rounds = arguments.rounds or ROUNDS[arguments.lengths]
    arguments.peer_dtype = arguments.peer_dtype or ("bfloat16" if arguments.dtype == "int8" else arguments.dtype)
    return arguments


def main() -> None:
    arguments = parse()
    record = vars(arguments).copy()
    import jax

    jax.config.update("jax_platforms", "cpu")  # only in this process: the contenders use the accelerator
    names = ["ours", arguments.peer] if arguments.peer else ["ours"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        np.save(folder / "prompt.npy", random_prompt(0, arguments.prompt_length, arguments.size))
        if arguments.size not in MADE_IN_PLACE:
            write_base(folder / "base", arguments.size)
        if arguments.largest_batch:
            record["largest_batch"] = {name: largest_batch(name, folder, arguments) for name in names}
        else:
            record |= compare(folder, names, arguments)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
