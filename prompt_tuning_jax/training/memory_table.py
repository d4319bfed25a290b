"""Prints the memory plan of a run as a table, and the largest batch that fits, for `train --memory-plan`."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from prompt_tuning_jax.errors import Setting, SettingError, message_text
from prompt_tuning_jax.parallel.mesh import mesh_shape
from prompt_tuning_jax.training.memory_plan import (
    SPARE_MEMORY,
    MemoryPlan,
    StepMemory,
    device_part,
    free_bytes,
    largest_batch,
    plan,
)
from prompt_tuning_jax.training.run import TrainConfig

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def read_size(text: str) -> int:
    """Returns the number of bytes of a size such as "80GB" or "79.6GiB".

    Raises:
      ValueError: the text is not a size with a unit, or the size is 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]B|[MGT]iB)", text)
    size = round(float(found[1]) * UNITS[found[2]]) if found else 0
    if not size:
        raise ValueError(
            f"--memory-plan={text}: no size of a memory; expected a number above 0 and its unit (MB, GB, MiB or GiB): "
            "set --memory-plan=80GB, or --memory-plan for this machine's"
        )
    return size


def size_text(size: int | float) -> str:
    """Returns a number of bytes as text with a decimal unit, such as "12.30 GB"."""
    unit = next(unit for unit in ("TB", "GB", "MB", "kB", "B") if size >= UNITS[unit] or unit == "B")
    return f"{size / UNITS[unit]:,.{0 if unit == 'B' else 2}f} {unit}"


def show_plan(config: TrainConfig, memory: str | bool = True, say: Callable[[str], None] = print) -> None:
    """Reports the memory that a run needs, and the largest batch that fits.

    Args:
      memory: memory of the device to plan for, such as "80GB"; True for the free memory of this machine's device.
      say: called with each line of the report.

    Raises:
      ValueError: a setting is invalid; or, after the table, if not even the smallest batch fits.
    """
    device = jax.default_backend()
    total = read_size(memory) if isinstance(memory, str) else free_bytes()
    if total is None:
        raise ValueError("the memory of this machine is unknown: set --memory-plan=80GB, the device's own")
    found = plan(config)
    for line in table(found, config, device):
        say(line)
    if isinstance(memory, str) and device == "cpu" and (settings_there := accelerator_settings(config)):
        settings = ", ".join(f"{message_text(Setting(name))}={value!r}" for name, value in settings_there.items())
        say(f"No accelerator is here, so this is a CPU's plan. What an accelerator would take by itself: {settings}")
    if config.mesh is not None or config.num_partitions is not None:
        show_device_part(config, total, say)
        return
    usable = SPARE_MEMORY * total
    source = "as given" if isinstance(memory, str) else f"free on this {'host' if device == 'cpu' else device}"
    say(_row("memory", total, f"{source}, of which {SPARE_MEMORY:.0%} are planned with: {size_text(usable)}"))
    if found.step.peak > usable:
        missing = f"{size_text(found.step.peak - usable)} more than the {size_text(usable)} planned with"
        say(f"BATCH_SIZE {found.batch_size} does not fit: its step takes {missing}")
    largest = largest_batch(config, usable, found)
    if not largest.fits:
        missing = size_text(largest.step.peak - usable)
        raise SettingError(
            f"a batch of {config.num_microbatches or 1} does not fit: its step takes {size_text(largest.step.peak)}, "
            f"{missing} more than the {size_text(usable)} planned with. Set ",
            Setting("base_dtype"),
            " to 'bfloat16', shorter ",
            Setting("task_feature_lengths"),
            ", or a smaller model",
        )
    end = f"{largest.too_large} does not" if largest.too_large else "no larger one was tried"
    say(_row(f"largest batch: {largest.fits}", largest.step.peak, f"{_basis(largest.step, device)}; {end}"))


def accelerator_settings(config: TrainConfig) -> dict[str, Any]:
    """Returns the automatic settings that would have another value on an accelerator than on a CPU, with that value."""
    other: dict[str, Any] = {}
    if jnp.dtype(config.size.dtype) == jnp.float32:
        other["activation_dtype"] = "bfloat16"
    if config.base_dtype == "auto":
        other["base_dtype"] = "float32" if config.trains_base else "bfloat16"
    if config.num_microbatches is None:
        other["num_microbatches"] = 1
    return other


def show_device_part(config: TrainConfig, total: int, say: Callable[[str], None]) -> None:
    """Reports the memory that the run needs on each device of the configured mesh, whose devices need not exist here.

    Args:
      total: bytes of memory per device.
      say: called with each line of the report.

    Raises:
      ValueError: the run does not fit.
    """
    sizes = {"model": config.num_partitions or 1} | dict(config.mesh or {})
    shape = mesh_shape(sizes, config.num_partitions, math.prod(sizes.values()))
    part = device_part(config, shape)
    usable, needed = SPARE_MEMORY * total, sum(part)
    say(f"on each of {math.prod(shape)} devices, {shape} (of data as many more as divide the batch):")
    say(_row("  frozen parameters", part.frozen, "exact"))
    say(_row("  trained, with optimiser", part.state, "exact"))
    say(_row("  activations", part.activations, "about; less where a model axis divides them too"))
    say(_row("memory", total, f"of a device, of which {SPARE_MEMORY:.0%} are planned with: {size_text(usable)}"))
    if needed > usable:
        raise SettingError(
            f"each device needs {size_text(needed - usable)} more than the {size_text(usable)} planned with: set ",
            Setting("mesh"),
            " with a larger fsdp or model axis, or a smaller ",
            Setting("batch_size"),
        )


def table(plan: MemoryPlan, config: TrainConfig, device: str) -> list[str]:
    """Returns the plan as lines of text: each part with its number of elements, its bytes and a note on the source."""
    step = plan.step
    shape = f"batch {plan.batch_size}, inputs {plan.input_length}, targets {plan.target_length}"
    if plan.prompt_length:
        shape += f", prompt {plan.prompt_length}"
    stored = ", ".join(plan.frozen.dtypes)
    if config.initial_checkpoint_path and config.resolved_base_dtype is None:
        stored += " (at most: BASE_DTYPE leaves it to the file, which is not read)"
    saved = f"{jnp.dtype(config.size.dtype).name}; of {plan.rows} rows at once, kept for their backward pass"
    lines = [shape, f"{'':26}{'numbers':>16}{'bytes':>14}"]
    for name, part, note in (
        ("frozen parameters", plan.frozen, stored),
        ("trainable parameters", plan.trainable, ", ".join(plan.trainable.dtypes)),
        ("optimiser state", plan.optimizer, ", ".join(plan.optimizer.dtypes)),
    ):
        lines.append(_row(name, part.bytes, note, part.count))
    return [
        *lines,
        _row("activations", plan.activations, saved),
        _row("  of them logits", plan.logits, "float32"),
        _row("copies of parameters", plan.copies, "in another dtype or shape, kept likewise"),
        _row("peak of a step", step.peak, f"{_basis(step, device)}; {size_text(step.temporaries)} of it temporary"),
        "The process itself, and evaluation at EVAL_BATCH_SIZE, come on top.",
    ]


def _basis(step: StepMemory, device: str) -> str:
    return f"compiled for {device}" if step.compiled else f"estimated from shallow models compiled for {device}"


def _row(name: str, size: int | float, note: str, count: int | None = None) -> str:
    return f"{name:26}{'' if count is None else f'{count:,}':>16}{size_text(size):>14}  {note}".rstrip()
