"""Runs every trial of a grid of settings: `python -m prompt_tuning_jax.sweep --gin_file=sweeps/X.gin --launcher=local`.

If the sweep's gin file has a macro NAME, --gin.NAME=VALUE changes the sweep; otherwise it is passed to every trial.
Finished trials are skipped, and interrupted trials resume from their last checkpoint.

    --launcher=print    prints one command per trial, to be run by hand
    --launcher=here     runs the trials in this process, one after another, or many runs in one executable
    --launcher=local    runs the trials in processes on this machine, and shows a table of their states
    --launcher=slurm    submits a Slurm job array, with submitit
    --launcher=xpk      creates workloads on TPU pods, with xpk
    --launcher=jobset   writes Kubernetes JobSets as YAML
    --status            prints the states of the trials and runs nothing; --status=SWEEP_DIR needs only the folder
    --only=NAME:NAME    runs only these trials
"""

import contextlib
import importlib
import sys
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import gin
import jax

from prompt_tuning_jax.batches.lock import running
from prompt_tuning_jax.compilation import keep_compiled_programs
from prompt_tuning_jax.errors import prefixed
from prompt_tuning_jax.gin_files import config_text, configured, in_gin, parse, split_bindings, user_errors
from prompt_tuning_jax.sweeps import spec, status
from prompt_tuning_jax.sweeps.shared_step import program_key
from prompt_tuning_jax.sweeps.spec import Trial
from prompt_tuning_jax.sweeps.sweep_file import RECORD, check_record, recorded_trials, write_record
from prompt_tuning_jax.sweeps.trials_to_jobs import most_together, plan
from prompt_tuning_jax.sweeps.vectorized import train_together, write_failure
from prompt_tuning_jax.training import eval_run, loop, run
from prompt_tuning_jax.training.progress import stopping_on_sigterm

LAUNCHERS = {
    "print": "print_commands.Print",
    "local": "local.Local",
    "slurm": "slurm.Slurm",
    "xpk": "xpk.Xpk",
    "jobset": "jobset.JobSet",
}
FLAGS = ("launcher", "status", "only")


def main() -> None:
    keep_compiled_programs()
    with user_errors():
        sys.exit(sweep(sys.argv[1:]))


def sweep(argv: Sequence[str]) -> int:
    """Runs the sweep that a command line asks for, or prints its status; returns the exit code."""
    own, texts = split_bindings(argv, FLAGS, __doc__)
    if folder := next((argument.partition("=")[2] for argument in own if argument.startswith("--status=")), ""):
        return show_status(folder, own)
    flags = parse(own, FLAGS)
    settings = configured(spec.Sweep, "sweeps/demo.gin")()
    if "status" in flags and (recorded := recorded_trials(settings.sweep_dir)):
        known, trials = {trial.name for trial in recorded}, settings.trials(texts)
        if known.isdisjoint(trial.name for trial in trials):
            check_record(settings.sweep_dir, trials)  # raises: the folder holds another sweep
        return print_table([*recorded, *(trial for trial in trials if trial.name not in known)], flags.get("only"))
    launcher = None if "status" in flags or flags.get("launcher") == "here" else named_launcher(flags.get("launcher"))
    if flags.get("launcher") != "here":
        jax.config.update("jax_platforms", "cpu")  # leave the accelerators to the processes that this one starts
    trials = all_trials = settings.trials(texts)
    if "only" in flags:
        trials = spec.chosen(trials, str(flags["only"]).split(":"))
    record = check_record(settings.sweep_dir, all_trials, trials)
    configs = {trial.name: check_trial(trial) for trial in trials}
    steps = {name: config.train_steps if config else None for name, config in configs.items()}
    if "status" in flags:
        print(status.table([status.trial_state(trial, steps[trial.name]) for trial in trials]))
        return 0
    to_run = [trial for trial in trials if not status.is_finished(trial, steps[trial.name])]
    print(f"{len(trials)} trials, {len(trials) - len(to_run)} of them finished", file=sys.stderr)
    if not to_run:
        return 0
    vectorize = settings.vectorize
    if flags.get("launcher") == "print" and vectorize == "auto":
        vectorize = False
    jobs = plan(
        to_run,
        lambda trial: shared_key(configs[trial.name], vectorize),
        lambda part: joint_command_line(argv, part),
        vectorize,
        getattr(launcher, "at_once", 1 if launcher is None else None),
    )
    if flags.get("launcher") != "print":
        write_record(settings.sweep_dir, record)
    if launcher is not None:
        return launcher.launch(jobs, settings.sweep_dir)
    failures = {}
    for job in jobs:
        failures |= run_here(job.trials, most_together(vectorize))
    return 1 if failures else 0


def show_status(sweep_dir: str, arguments: Sequence[str]) -> int:
    """Prints the states of the trials in a sweep's folder; no gin file is needed."""
    flags: dict[str, str] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in ("--status", "--only"):
            raise ValueError(f"--status={sweep_dir} reads the folder alone: leave out {argument}")
        flags[name] = value
    trials = recorded_trials(sweep_dir)
    if not trials:
        raise ValueError(f"no sweep was started in {sweep_dir}, it has no {RECORD}: set --status to a SWEEP_DIR")
    return print_table(trials, flags.get("--only"))


def print_table(trials: Sequence[Trial], only: str | bool | None) -> int:
    """Prints the states of the trials, or only of those named in `only`, as "NAME:NAME"."""
    if only:
        trials = spec.chosen(trials, str(only).split(":"))
    print(status.table([status.trial_state(trial) for trial in trials]))
    return 0


def named_launcher(name: Any) -> Any:
    """Returns the launcher that `--launcher` names, with its fields set by gin."""
    if name not in LAUNCHERS:
        known = ", ".join(["here", *LAUNCHERS])
        raise ValueError(f"--launcher is {name or 'not given'}, expected one of {known}; or --status")
    module, _, attribute = LAUNCHERS[name].partition(".")
    found = getattr(importlib.import_module(f"prompt_tuning_jax.sweeps.launchers.{module}"), attribute)
    return found() if name == "print" else gin.get_configurable(found)()


def check_trial(trial: Trial) -> run.TrainConfig | None:
    """Parses and checks a trial's command line; returns its configuration, or None if the trial only evaluates.

    After the call, gin holds the trial's configuration.

    Raises:
      ValueError: a gin file or a setting does not exist, a required setting is missing, or a value is invalid.
    """
    gin.clear_config()
    try:
        parse(trial.arguments)
        if trial.command == "eval":
            configured(eval_run.evaluate_prompt, "runs/eval.gin")(check_only=True)
            return None
        config = configured(run.TrainConfig, "runs/prompt_tune.gin")(config=config_text())
        config.check()
        return config
    except ValueError as error:
        raise prefixed(f"trial {trial.name}: ", error) from None


def shared_key(config: run.TrainConfig | None, vectorize: bool | int | str) -> Hashable | None:
    """Returns the `program_key` of a trial that should share an executable, or None if it should run alone.

    Trials that train the base model's own parameters share an executable only if VECTORIZE is a number: each has its
    own copy of the base model and of the optimiser's state, and all copies are in memory at once.
    """
    if config is None or (vectorize == "auto" and config.trains_base):
        return None
    return program_key(config)


def joint_command_line(argv: Sequence[str], trials: Sequence[Trial]) -> list[str]:
    """Returns a command line that runs only these trials of the sweep that `argv` starts."""
    names = {f"--{flag}" for flag in FLAGS}
    rest = [argument for argument in argv if argument.partition("=")[0] not in names]
    only = ":".join(trial.name for trial in trials)
    return ["python", "-m", "prompt_tuning_jax.sweep", *rest, "--launcher=here", f"--only={only}"]


def run_here(trials: Sequence[Trial], most: int | None) -> dict[str, str]:
    """Runs the trials of a job in this process; returns the failures by name."""
    with contextlib.ExitStack() as marks:
        for trial in trials:
            marks.enter_context(running(trial.folder))
        stop = marks.enter_context(stopping_on_sigterm())
        return train_or_evaluate(trials, most, stop)


def train_or_evaluate(trials: Sequence[Trial], most: int | None, stop: loop.Stop) -> dict[str, str]:
    """Runs the trials of a job after `run_here` has marked their folders as running; returns the failures by name."""
    if len(trials) > 1:

        def configs() -> Iterator[tuple[str, run.TrainConfig]]:
            for trial in trials:
                config = check_trial(trial)
                assert config is not None  # only training trials share a job
                yield trial.name, config

        return train_together(configs(), most, stop=stop)
    (trial,) = trials
    try:
        config = check_trial(trial)
        if config is None:
            configured(eval_run.evaluate_prompt, "runs/eval.gin")()
        else:
            loop.train(config, stop=stop)
    except (ValueError, OSError) as error:
        failure = " ".join(in_gin(error).split())
        write_failure(trial.name, str(trial.folder), failure)
        return {trial.name: failure}
    return {}


if __name__ == "__main__":
    main()
