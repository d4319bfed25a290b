"""`train --profile=STEPS`: the trace holds so many steps of the run, and the run is the same."""

import gzip
import importlib
import json

import pytest

from prompt_tuning_jax.errors import SettingError

train = importlib.import_module("prompt_tuning_jax.train")


def calls(folder, name: str) -> int:
    """How often a function was called, by the trace that Perfetto opens, in which a call has two events, nested."""
    (path,) = (folder / "profile").rglob("*.trace.json.gz")
    assert [*path.parent.glob("*.xplane.pb")]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("name") == name)
    return sum(not any(start < own and end < other for start, other in spans) for own, end in spans)


def test_a_trace_holds_as_many_steps_as_were_asked_for(tiny, tmp_path):
    """Two evaluations lie between the traced steps, and programs other than the step's are called there."""
    with_profile, without = tmp_path / "with", tmp_path / "without"
    for folder, flags in ((with_profile, ["--profile=3"]), (without, [])):
        command = tiny.arguments(MODEL_DIR=str(folder), TRAIN_STEPS=6, EVAL_PERIOD=2, LOG_PERIOD=2)
        done = tiny.run([*command, *flags])
        assert done.returncode == 0, done.stderr[-2000:]
    assert calls(with_profile, "PjitFunction(train_step)") == 3
    assert not (without / "profile").exists()
    again = tiny.run(
        [*tiny.arguments(MODEL_DIR=str(without), TRAIN_STEPS=6, EVAL_PERIOD=2, LOG_PERIOD=2), "--profile=3"]
    )
    assert "the profile has 0 of 3 steps, because the run had only 0 steps left" in again.stderr
    assert (with_profile / "best/prompt.npy").read_bytes() == (without / "best/prompt.npy").read_bytes()


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "three", "²", "10", "11", True])
def test_an_impossible_number_of_steps_is_refused(text):
    with pytest.raises(SettingError, match=f"^--profile is {text}, expected a whole number from 1 to 9, "):
        train.steps_to_profile(text, 10)


def test_all_steps_but_the_first_may_be_traced():
    assert train.steps_to_profile("9", 10) == 9
