"""Where a trial stands, from what lies in its folder, and the table of a sweep's trials."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given

from prompt_tuning_jax.batches.lock import DEAD_AFTER, running
from prompt_tuning_jax.sweeps.spec import Trial
from prompt_tuning_jax.sweeps.status import (
    STATES,
    TrialState,
    counts,
    describe,
    owner,
    table,
    trial_state,
)

STATE_OF_ALL = [
    TrialState("SIZE=nano,RANDOM_SEED=0", "finished", 400, 400, 91.234),
    TrialState("SIZE=nano,RANDOM_SEED=1", "running", 150, 400, 88.0, 754.4),
    TrialState("SIZE=nano,RANDOM_SEED=2", "failed", 50, 400, None, None, "error: the loss is nan"),
    TrialState("SIZE=micro,RANDOM_SEED=0", "stopped", 50, 400, 61.5),
    TrialState("SIZE=micro,RANDOM_SEED=1", "waiting"),
]


@pytest.fixture
def trial(tmp_path):
    return Trial("SEED=1", "train", (), {"MODEL_DIR": str(tmp_path / "SEED=1")}, (), {"SEED": "1"})


def leave(trial, **files):
    trial.folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (trial.folder / name.replace("_", ".")).write_text(text)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def mark(trial, age=0.0, **fields):
    path = trial.folder / "running"
    path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()} | fields))
    os.utime(path, (time.time() - age,) * 2)


def dead_pid():
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_the_states_a_trial_goes_through(trial):
    assert trial_state(trial) == TrialState("SEED=1", "waiting")
    assert trial_state(trial, steps=300).steps == 300
    trial.folder.mkdir()
    with running(trial.folder):
        assert trial_state(trial).state == "running"  # begun, but nothing is written yet
    assert trial_state(trial).state == "waiting"

    leave(trial, config_gin="X = 1\nTRAIN_STEPS = 400\nY.train_steps = %TRAIN_STEPS\n")
    assert trial_state(trial) == TrialState("SEED=1", "stopped", None, 400)
    records = [
        {"step": 50, "split": "train", "seconds": 30.0, "loss": 1.0},
        {"step": 100, "split": "train", "seconds": 40.0, "loss": 0.5},
        {"step": 100, "split": "eval", "seconds": 45.0, "accuracy": 70.0, "f1": 50.0},
        {"step": 150, "split": "eval", "seconds": 55.0, "accuracy": 60.0, "f1": 40.0},
    ]
    leave(trial, metrics_jsonl=lines(*records) + '{"step": 200, "spl')
    assert trial_state(trial) == TrialState("SEED=1", "stopped", 150, 400, 60.0)
    with running(trial.folder):
        # 250 steps to go, at 100 steps in the 25 seconds between the first and the last record.
        assert trial_state(trial) == TrialState("SEED=1", "running", 150, 400, 60.0, 62.5)

    leave(trial, failed_txt="Traceback\nValueError: no\n\n")
    assert trial_state(trial) == TrialState("SEED=1", "failed", 150, 400, 60.0, None, "ValueError: no")
    with running(trial.folder):
        assert trial_state(trial).state == "failed"  # one of several in a process that goes on with the others
    done = {"best": {"accuracy": 70.0, "f1": 50.0}, "best_step": 100}
    leave(trial, summary_json=json.dumps(done | {"steps": 400, "stopped_early": False}))
    assert trial_state(trial) == TrialState("SEED=1", "finished", 150, 400, 60.0)
    assert trial_state(trial, steps=401).state == "failed"  # the summary is of a run of fewer steps
    leave(trial, summary_json=json.dumps(done | {"steps": 150, "stopped_early": True}))
    assert trial_state(trial, steps=401).state == "finished"


def test_a_single_record_counts_the_time_of_starting(trial):
    leave(trial, metrics_jsonl=lines({"step": 50, "split": "train", "seconds": 30.0, "loss": 1.0}))
    with running(trial.folder):
        assert trial_state(trial, steps=150).seconds_left == 60.0
        assert trial_state(trial).seconds_left is None


def test_an_evaluation_has_its_score_in_its_summary(trial):
    leave(trial, summary_json=json.dumps({"task": "x", "generation": {"accuracy": 81.0}, "score": 81.0}))
    assert trial_state(trial) == TrialState("SEED=1", "finished", score=81.0)
    leave(trial, summary_json=json.dumps({"task": "x", "generation": {"average": {"accuracy": 81.0}}}))
    assert trial_state(trial) == TrialState("SEED=1", "finished")


def test_running_is_told_from_stopped_over_hosts(trial):
    leave(trial, config_gin="")
    states = {}
    for name, fields in {
        "this process": {},
        "a dead process": {"pid": dead_pid()},
        "another host's": {"pid": dead_pid(), "host": "elsewhere"},
        "another host's, silent": {"host": "elsewhere", "age": DEAD_AFTER + 5},
        "a pid given again": {"age": DEAD_AFTER + 5},
        "of another format": {"more": 1},
    }.items():
        mark(trial, **fields)
        states[name] = trial_state(trial).state
    assert states == {
        "this process": "running",
        "a dead process": "stopped",
        "another host's": "running",
        "another host's, silent": "stopped",
        "a pid given again": "stopped",
        "of another format": "running",
    }


def test_a_folder_is_run_by_one_process(trial):
    trial.folder.mkdir()
    mark(trial, host="elsewhere")
    with pytest.raises(ValueError, match=r"SEED=1 is being run by process \d+ on elsewhere: wait until that ends"):
        running(trial.folder).__enter__()
    assert owner(trial.folder / "running") == (os.getpid(), "elsewhere")
    for fields in ({"pid": dead_pid()}, {"host": "elsewhere", "age": DEAD_AFTER + 5}):
        mark(trial, **fields)
        began = time.monotonic()
        with running(trial.folder):
            assert owner(trial.folder / "running") == (os.getpid(), socket.gethostname())
        assert time.monotonic() - began < 1  # a lock alone would be waited for, a minute long
        assert not (trial.folder / "running").exists()
    mark(trial, pid=os.getppid())
    with running(trial.folder):  # for the parent, which marked it
        pass
    assert owner(trial.folder / "running") == (os.getppid(), socket.gethostname())


def test_the_table():
    # Written out: a column is as wide as what is in it, numbers end where their title ends.
    assert table(STATE_OF_ALL, width=200).splitlines() == [
        "trial                     state        step  score    left",
        "SIZE=nano,RANDOM_SEED=0   finished  400/400  91.23",
        "SIZE=nano,RANDOM_SEED=1   running   150/400  88.00  12m34s",
        "SIZE=nano,RANDOM_SEED=2   failed     50/400",
        "    error: the loss is nan",
        "SIZE=micro,RANDOM_SEED=0  stopped    50/400  61.50",
        "SIZE=micro,RANDOM_SEED=1  waiting",
        "5 trials: 1 finished, 1 running, 1 failed, 1 stopped, 1 waiting",
    ]


def test_a_narrow_table_cuts_names_in_the_middle():
    rows = table(STATE_OF_ALL, width=50).splitlines()
    assert rows[1] == "SIZE=na...SEED=0  finished  400/400  91.23"
    assert max(map(len, rows)) <= 50


def test_a_low_table_keeps_the_trials_that_run_or_failed():
    shown = table(STATE_OF_ALL, 200, height=6).splitlines()
    assert [row.split(",")[0] for row in shown[1:3]] == ["SIZE=nano", "SIZE=nano"]
    assert shown[2].startswith("SIZE=nano,RANDOM_SEED=2  failed")
    assert shown[4:] == ["... and 3 more", counts(STATE_OF_ALL)]


@given(
    st.lists(
        st.builds(
            TrialState,
            st.text("A=_,1", min_size=1, max_size=90),
            st.sampled_from(STATES),
            st.none() | st.integers(0, 30_000),
            st.none() | st.integers(1, 30_000),
            st.none() | st.floats(-9, 100),
            st.none() | st.floats(0, 1e6),
            st.text(max_size=200).map(lambda text: text and f"error: {text}"),
        ),
        unique_by=lambda state: state.name,
    ),
    st.integers(60, 200),
    st.integers(4, 40),
)
def test_a_table_fits_and_is_plain_text(states, width, height):
    rows = table(states, width, height).split("\n")
    assert len(rows) <= height
    assert all(len(row) <= width and row.isprintable() for row in rows)
    assert rows[-1] == counts(states)[:width]
    shown = len(rows) - 2 - sum(row.startswith("    ") for row in rows)
    if more := re.fullmatch(r"\.\.\. and (\d+) more", rows[-2]):
        assert int(more[1]) == len(states) - (shown - 1)


def test_a_line_of_one_trial():
    assert describe(STATE_OF_ALL[0]) == "SIZE=nano,RANDOM_SEED=0: finished at step 400/400, score 91.23"
    assert describe(STATE_OF_ALL[2]) == "SIZE=nano,RANDOM_SEED=2: failed at step 50/400: error: the loss is nan"
    assert describe(STATE_OF_ALL[4]) == "SIZE=micro,RANDOM_SEED=1: waiting"
    assert counts([]) == "0 trials: none"
