"""Reads and writes SWEEP_DIR/sweep.json, which lists the trials in the folder, so that two sweeps are never mixed."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.sweeps.spec import Trial, train_steps
from prompt_tuning_jax.training.run_folder import check_writable, write_text

RECORD = "sweep.json"


def check_record(
    sweep_dir: str, trials: Sequence[Trial], to_run: Collection[Trial] | None = None
) -> dict[str, list[str]]:
    """Returns the arguments, without MODEL_DIR, of the recorded trials and of these, by name.

    A sweep may get more trials, and its trials may get more steps.

    Args:
      trials: all trials of the sweep.
      to_run: those that may run now, which are the only ones that get more steps; None for all.

    Raises:
      ValueError: the folder cannot be written, or holds another sweep.
    """
    path = Path(sweep_dir, RECORD)
    check_writable(path.parent)
    found = {trial.name: [part for part in trial.arguments if not _is_model_dir(part)] for trial in trials}
    if not path.exists():
        return found
    recorded = json.loads(path.read_text(encoding="utf-8"))
    if recorded and not set(recorded) & set(found):
        raise SettingError(
            f"{sweep_dir} holds another sweep, of trials like {next(iter(recorded))}, now they are like "
            f"{next(iter(found))}: set another ",
            Setting("sweep_dir"),
        )
    extended = {name for name in set(recorded) & set(found) if _has_more_steps(found[name], recorded[name])}
    if to_run is not None:
        kept = extended - {trial.name for trial in to_run}
        extended -= kept
        found |= {name: recorded[name] for name in kept}
    for name, arguments in found.items():
        if name in recorded and name not in extended and recorded[name] != arguments:
            was, now = (sorted(set(a) - set(b)) for a, b in ((recorded[name], arguments), (arguments, recorded[name])))
            raise SettingError(
                f"{sweep_dir} holds a trial {name} of another configuration (was {' '.join(was) or 'without'}, is "
                f"{' '.join(now) or 'without'}): set another ",
                Setting("sweep_dir"),
            )
    return recorded | found


def _has_more_steps(arguments: Sequence[str], before: Sequence[str]) -> bool:
    """Returns whether a trial's arguments differ from earlier ones only in that TRAIN_STEPS is larger."""
    changed = [(new, old) for new, old in zip(arguments, before, strict=False) if new != old]
    if len(arguments) != len(before) or len(changed) != 1:
        return False
    new, old = map(train_steps, changed[0])
    return new is not None and old is not None and new > old


def recorded_trials(sweep_dir: str) -> list[Trial]:
    """Returns the trials that were started in a sweep's folder, in the configuration recorded there; none if it is new.

    Raises:
      ValueError: the record cannot be read.
    """
    path = Path(sweep_dir, RECORD)
    if not path.exists():
        return []
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        return [_recorded(sweep_dir, name, arguments) for name, arguments in recorded.items()]
    except (ValueError, AttributeError, TypeError) as error:
        raise SettingError(f"{path} is no record of a sweep ({error}): set another ", Setting("sweep_dir")) from None


def _recorded(sweep_dir: str, name: str, arguments: Sequence[str]) -> Trial:
    """Returns a trial from its record. Its macros and bindings are all in `texts`; its gin files are left out."""
    values = {axis: value for axis, _, value in (part.partition("=") for part in name.split(","))}
    texts = tuple(part.removeprefix("--gin.") for part in arguments if part.startswith("--gin."))
    return Trial(name, "train", (), {"MODEL_DIR": str(Path(sweep_dir, name))}, texts, values)


def write_record(sweep_dir: str, record: dict[str, list[str]]) -> None:
    Path(sweep_dir).mkdir(parents=True, exist_ok=True)
    write_text(Path(sweep_dir, RECORD), json.dumps(record, indent=1) + "\n")


def _is_model_dir(argument: str) -> bool:
    return argument.startswith("--gin.MODEL_DIR=")
