"""A training step: how fast, how much memory, how soon, beside PEFT on the same weights and rows.

    python -m experiments.benchmarks.train_step [--size=small] [--mode=prompt|model] [--dtype=float32|bfloat16|int8]
        [--peer=peft] [--peer-dtype=float32|bfloat16|autocast] [--lengths=fixed|sst2|rte --data_dir=path/to/glue]

A process for each contender makes steps on the same random weights by turns, the other idle; on an accelerator one
contender after the other, each with the memory to itself. With `--mode=model` all weights are trained, the peer's by
plain transformers. The frozen base is held in the dtype asked for, the peer's in its own: `autocast` is float32 weights
under torch.autocast. With `--lengths` the rows are a task's: this project's loader makes its batches of rows of about
one length, the peer has the same rows in a random order, each batch padded to its longest.

The last line printed is one JSON object: everything asked for, and

  contenders: of each, or null for one that does not fit into memory
    import_seconds, start_to_first_step_seconds: from the start of the process to the end of its imports, and of its
      first step, with nothing compiled before; first_step_seconds: that step alone, compilation included
    step_seconds: median, min and max; examples_per_second: from the median, with `--lengths` from the sum
    flop, flop_per_second: of a step's matrix products (`flop.step_flop`), with `--lengths` on average
    product_flop_per_second: the best of `products`, measured through the contender's framework
    roofline_share: the share of the time that the products would take at that rate
    peak_bytes: of the process, or on an accelerator of its memory
    busy_elsewhere: cores that other processes kept busy meanwhile; above 0.1 or so, the seconds are not to be trusted
    first_loss: nats a target token; the same but for rounding where both do the same work
  ratio, memory_ratio: our examples a second, and our peak, over the peer's

`--largest-batch` doubles the batch until an accelerator's memory ends, instead. Linux only.
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
from experiments.benchmarks.step_contenders import MADE_IN_PLACE, Asked, Rows

if TYPE_CHECKING:
    from prompt_tuning_jax.batches.loader import Batch

TASKS = {"sst2": ("taskless_glue_sst2_v200", 128), "rte": ("taskless_glue_rte_v200", 256)}  # and the input length
ROUNDS = {"fixed": 5, "sst2": 40, "rte": 40}


def fixed_rows(batch: int, inputs: int, targets: int) -> Rows:
    """One batch without padding."""
    target_tokens = np.random.default_rng(2).integers(3, TOKENS, (batch, targets)).astype(np.int32)
    target_tokens[:, -1] = EOS
    return [(random_inputs(batch, inputs), target_tokens)]


def task_rows(arguments: argparse.Namespace, rounds: int) -> tuple[Rows, Rows]:
    """The first batches of a run on the task, and the same rows as others batch them: in any order, padded at need."""
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
    """The same rows, shuffled and batched anew, each batch as wide as its longest row."""
    rows = [
        tuple(tokens[at][tokens[at] > 0] for tokens in (batch.inputs, batch.targets))
        for batch in batches
        for at in np.flatnonzero(batch.ids >= 0)
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    parts = [order[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    return [(pad([rows[at][0] for at in part]), pad([rows[at][1] for at in part])) for part in parts]


def pad(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of tokens as one array, as wide as the longest."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    return padded


def write_rows(file: Path, rows: Rows) -> None:
    """As `step_contenders` reads them."""
    inputs = {f"inputs{n}": inputs for n, (inputs, _) in enumerate(rows)}
    np.savez(file, **inputs, **{f"targets{n}": targets for n, (_, targets) in enumerate(rows)})


def start(name: str, folder: Path, arguments: argparse.Namespace) -> Contender:
    """A contender's process; it does its first step at once."""
    asked = Asked(
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
    return Contender(module, [json.dumps(asked._asdict())], arguments.threads, arguments.device)


def measure(folder: Path, rows: Mapping[str, Rows], rounds: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of every contender."""
    found: dict[str, dict[str, Any]] = {}
    running: dict[str, Contender] = {}
    for name in rows:
        running[name] = start(name, folder, arguments)
        found[name] = running[name].ask("start")  # the next starts when this one is done: they would share the cores
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
            found[which] |= against_products(found[which], contender.ask("products"))
            contender.end()
        running.clear()
    return found


def by_turns(running: Mapping[str, Contender], rows: Mapping[str, Rows], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender's steps, once every shape is compiled and warm."""
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
    """What the seconds of steps say; with `--lengths` step n was on batch n."""
    from experiments.benchmarks.flop import Shape, step_flop
    from experiments.sizes import SIZES

    model = arguments.mode == "model"
    prompt = 0 if model else arguments.prompt_length
    shapes = [Shape(len(inputs), inputs.shape[1], targets.shape[1], prompt) for inputs, targets in rows]
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


def against_products(figures: Mapping[str, Any], products: Mapping[str, float]) -> dict[str, Any]:
    """How near a contender's steps come to its best matrix product."""
    best = max(products.values())
    share = figures["flop_per_second"] / best
    return {"products": products, "product_flop_per_second": best, "roofline_share": share}


def largest_batch(name: str, folder: Path, arguments: argparse.Namespace) -> int:
    """The last of --batch and its doubles whose first step fits into the accelerator's memory; 0 for none."""
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
    """Both on their rows, and one over the other."""
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

    jax.config.update("jax_platforms", "cpu")  # of this process alone: the accelerator is the contenders'
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
