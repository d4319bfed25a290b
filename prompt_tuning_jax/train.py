"""Trains a prompt, an adapter or a model: `python -m prompt_tuning_jax.train --gin_file=... --gin.NAME=...`.

The run uses a mesh of all devices, including those of other processes. On Slurm, Kubernetes and TPU machines the
processes find each other; elsewhere, start each with `--coordinator_address=HOST:PORT --process_count=N
--process_index=I`.

With `--profile=STEPS`, the run also writes a trace of that many steps, from the second one on, to MODEL_DIR/profile.

With `--memory-plan`, or `--memory-plan=80GB` for a device with that much memory, nothing is trained: the command prints
how much memory the same run would need.
"""

import sys

from prompt_tuning_jax.compilation import keep_compiled_programs
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.gin_files import config_text, configured, parse, user_errors
from prompt_tuning_jax.parallel.processes import FLAGS, PeerWatch, exiting_alone, is_writer, start_processes
from prompt_tuning_jax.training import loop, memory_table, run
from prompt_tuning_jax.training.progress import stopping_on_sigterm


def steps_to_profile(text: str | bool, train_steps: int) -> int:
    """Returns the number of steps that --profile names.

    Raises:
      ValueError: it is not a whole number of at least 1, or the run has too few steps.
    """
    steps = int(text) if isinstance(text, str) and text.isascii() and text.isdigit() else 0
    if not 1 <= steps < train_steps:
        raise SettingError(
            f"--profile is {text}, expected a whole number from 1 to {train_steps - 1}, since the first step is not "
            "traced: set --profile, or ", Setting("train_steps"),
        )  # fmt: skip
    return steps


def main() -> None:
    keep_compiled_programs()
    with exiting_alone(), user_errors():
        flags = parse(sys.argv[1:], flags=("allow_other_config", "memory-plan", "profile", *FLAGS), about=__doc__)
        start_processes(flags)
        config = configured(run.TrainConfig, "runs/prompt_tune.gin")
        if "memory-plan" in flags:
            memory_table.show_plan(config(), flags["memory-plan"])
            return
        allow_other_config = bool(flags.get("allow_other_config"))
        with PeerWatch() as watch, stopping_on_sigterm() as stop:
            made = config(config=config_text(), allow_other_config=allow_other_config)
            profile = steps_to_profile(flags["profile"], made.train_steps) if "profile" in flags else 0
            summary = loop.train(made, watch=watch, stop=stop, profile=profile).summary
    if not is_writer():
        return
    best = ", ".join(f"{name} {value:.4g}" for name, value in summary["best"].items())
    print(f"best at step {summary['best_step']}: {best}")


if __name__ == "__main__":
    main()
