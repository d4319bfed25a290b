"""Measures how fast batches are loaded, how much of them is padding, and whether the training step waits for them.

    python -m experiments.benchmarks.input [--data_dir=GLUE_FOLDER] [--steps=200]

It reads the demo's task, or SST-2 from GLUE's own folder, from the token cache (which is built first), and trains a
prompt on the embedded base model. The last line printed is one JSON object:

  rows_per_cpu_second: examples that the loader returns per CPU second, including its reading thread;
  padding: the fraction of positions in an epoch that are padding, for inputs and for targets;
  padding_at_fixed_width: the same if every batch were as wide as the feature lengths;
  step_seconds: the mean seconds per step of the loop;
  wait_seconds: the part of `step_seconds` in which the loop waits for the next batch;
  wait: `wait_seconds` divided by `step_seconds`.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp

from experiments.benchmarks.contenders import random_prompt
from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.batches.loader import PlannedBatches
from prompt_tuning_jax.checkpoints.base import load_base, open_model, open_vocabulary
from prompt_tuning_jax.compilation import keep_compiled_programs
from prompt_tuning_jax.methods.prompt_tuning import PROMPT, PromptTuning
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.training.optimizer import adafactor
from prompt_tuning_jax.training.progress import Window
from prompt_tuning_jax.training.step import TrainState, make_train_step

BASE = "nano"


def rows_per_cpu_second(batches: PlannedBatches, seconds: float) -> float:
    """Returns the rows per CPU second that `start_at` gives, measured over at least `seconds` CPU seconds."""
    stretch = batches.start_at(0, 10**9)
    next(stretch)  # so that imports and planning, which happen once, are not measured
    rows, started = 0, time.process_time()
    while time.process_time() - started < seconds:
        rows += int((next(stretch).ids >= 0).sum())
    return rows / (time.process_time() - started)


def padding(batches: PlannedBatches) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the fractions of padding in an epoch: of the batches, and if all were as wide as the feature lengths."""
    epoch = [batches[number] for number in range(batches.window)]
    rows = sum(int((batch.ids >= 0).sum()) for batch in epoch)
    ours, fixed = {}, {}
    for name, length in batches.lengths.items():
        arrays = [getattr(batch, name) for batch in epoch]
        tokens = sum(int((array > 0).sum()) for array in arrays)
        ours[name] = round(1 - tokens / sum(array.size for array in arrays), 4)
        fixed[name] = round(1 - tokens / (rows * length), 4)
    return ours, fixed


def times_of_steps(batches: PlannedBatches, config: T5Config, steps: int, prompt_length: int) -> tuple[float, float]:
    """Returns the mean seconds of a training loop's step, and of its wait for a batch, after compilation."""
    base = load_base(BASE, config)
    prompt = {PROMPT: jnp.asarray(random_prompt(0, prompt_length, BASE))}
    optimizer = adafactor(0.3)
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), prompt, optimizer.init(prompt), key)
    train_step = make_train_step(Transformer(config), PromptTuning(prompt_length), optimizer)
    shapes: dict[tuple[int, int], int] = {}
    for number, shape in enumerate(batches.shapes(steps)):
        shapes.setdefault(shape, number)
    for number in shapes.values():
        state, _ = train_step(state, base.params, batches[number])
    jax.block_until_ready(state)

    window, waited = Window(), 0.0
    stretch = batches.start_at(0, steps + 1)
    next(stretch)  # so that the reading thread has started
    started = asked = time.perf_counter()
    for step, batch in enumerate(stretch, 1):
        waited += time.perf_counter() - asked
        state, metrics = train_step(state, base.params, batch)
        window.add(step, batch.ids, metrics, flop=0)  # as in `training.run`: reads the metrics of the previous step
        asked = time.perf_counter()
    jax.block_until_ready(state)
    return (time.perf_counter() - started) / steps, waited / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="GLUE's own folder, for SST-2; the demo's task where there is none")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--prompt_length", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=5.0, help="of the processor, that the loader reads for")
    arguments = parser.parse_args()
    keep_compiled_programs()
    task, length = ("taskless_glue_sst2_v200", 64) if arguments.data_dir else ("demo_reviews", 48)
    lengths = {"inputs": length, "targets": 8}
    dataset = DatasetConfig(task, "train", arguments.batch_size, lengths, data_dir=arguments.data_dir)
    config = open_model(BASE).config
    assert config
    batches = dataset.batches(open_vocabulary(None, BASE, config), shuffle=True)
    ours, fixed = padding(batches)
    rows = rows_per_cpu_second(batches, arguments.seconds)
    step, wait = times_of_steps(batches, config, arguments.steps, arguments.prompt_length)
    record = vars(arguments) | {
        "task": task,
        "rows_per_cpu_second": round(rows),
        "padding": ours,
        "padding_at_fixed_width": fixed,
        "step_seconds": round(step, 5),
        "wait_seconds": round(wait, 6),
        "wait": round(wait / step, 5),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
