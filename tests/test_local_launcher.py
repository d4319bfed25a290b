"""The local launcher with jobs that finish, fail, hang and ignore signals: whatever happens, no job is left behind."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prompt_tuning_jax.sweeps.launchers.devices import divide_machine, visible_gpus, visible_tpu_chips
from prompt_tuning_jax.sweeps.spec import Trial
from prompt_tuning_jax.sweeps.status import trial_state

# A process that launches the jobs of its first argument, [[name, [trial, ...], command line], ...].
LAUNCH = """
import json, signal, sys
from prompt_tuning_jax.sweeps.jobs import Job
from prompt_tuning_jax.sweeps.launchers.local import Local
from prompt_tuning_jax.sweeps.spec import Trial

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have it ignored
jobs, folder, processes = map(json.loads, sys.argv[1:])
trials = lambda names: tuple(Trial(name, "train", (), {"MODEL_DIR": f"{folder}/{name}"}, (), {}) for name in names)
try:
    code = Local(processes).launch([Job(name, trials(names), command) for name, names, command in jobs], folder)
except ValueError as error:
    sys.exit(f"error: {error}")
assert "jax" not in sys.modules, "the launcher would hold the devices that its jobs are to have"
sys.exit(code)
"""

# A job: what it does, then the folders of its trials.
JOB = """
import json, os, pathlib, signal, subprocess, sys, time
what, *folders = sys.argv[1:]
folders = [pathlib.Path(folder) for folder in folders]

def finish(folder, **more):
    (folder / "metrics.jsonl").open("a").write(
        json.dumps({"step": 9, "split": "eval", "seconds": 2.0, "accuracy": 75.0}) + "\\n")
    (folder / "summary.json").write_text(json.dumps(more))

def begin(**more):
    (folders[0] / "config.gin").write_text("TRAIN_STEPS = 9\\n")
    (folders[0] / "begun.partial").write_text(json.dumps({"pid": os.getpid(), **more}))
    (folders[0] / "begun.partial").rename(folders[0] / "begun.json")

def save(*_):
    (folders[0] / "saved").touch()
    sys.exit(143)

if what == "finish":
    cores, began = sorted(os.sched_getaffinity(0)), time.time()
    time.sleep(0.3)
    for folder in folders:
        finish(folder, began=began, ended=time.time(), cores=cores, gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
elif what == "save":  # the first time until it is told to end; then it finishes
    if (folders[0] / "saved").exists():
        finish(folders[0])
        sys.exit()
    signal.signal(signal.SIGTERM, save)
    begin()
    time.sleep(60)
elif what == "ignore":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "60"])
    begin(child=child.pid)
    while True:
        time.sleep(60)
elif what == "crash":
    print("step 1")
    raise RuntimeError("out of luck")
elif what == "user error":
    print("\\n".join(map(str, range(30))))
    print("error: no macro TRIAN_STEPS", file=sys.stderr)
    sys.exit(2)
elif what == "half":
    finish(folders[0])
    (folders[1] / "failed.txt").write_text("error: the loss is nan\\n")
    sys.exit("the third is not done")
elif what == "silent":
    sys.exit(3)
elif what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "terminate":
    begin()
    sys.exit(143)
"""


class Launcher:
    """The launcher's process, in a group of its own."""

    def __init__(self, folder, jobs, processes=None, before="", **options):
        jobs = [[name, trials, line(folder, what, trials)] for name, (what, *trials) in jobs.items()]
        arguments = [json.dumps(part) for part in (jobs, str(folder), processes)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True} | options
        self.process = subprocess.Popen([sys.executable, "-c", before + LAUNCH, *arguments], text=True, **options)

    def end(self):
        """The exit code and what stood on stderr."""
        _, stderr = self.process.communicate(timeout=20)
        return self.process.returncode, stderr


def line(folder, what, trials):
    return ["python", "-c", JOB, what, *(f"{folder}/{trial}" for trial in trials)]


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    """A test that went wrong leaves no process behind."""
    yield
    for path in tmp_path.rglob("begun.json"):
        pid = json.loads(path.read_text())["pid"]
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if str(tmp_path) in Path(f"/proc/{pid}/cmdline").read_text():  # not another's of the same number
                os.kill(pid, signal.SIGKILL)


def launch(folder, jobs, processes=None):
    return Launcher(folder, jobs, processes).end()


def state(folder, name):
    return trial_state(Trial(name, "train", (), {"MODEL_DIR": str(folder / name)}, (), {}))


def failed(folder, name):
    return (folder / name / "failed.txt").read_text().splitlines()


def begun(folder, name, process):
    """What a job says of itself, once it has begun."""
    path = folder / name / "begun.json"
    wait_for(lambda: path.exists() or process.poll() is not None)
    assert path.exists(), process.communicate()
    return json.loads(path.read_text())


def wait_for(what, seconds=10.0):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def lives(pid):
    """Whether a process runs; one that has ended and that nobody has asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_jobs_run_as_many_at_a_time_as_there_is_place(tmp_path):
    folder = tmp_path / "sweep"
    code, stderr = launch(folder, {str(n): ("finish", f"a={n}", f"b={n}") for n in range(4)}, processes=2)
    assert code == 0, stderr
    found = [json.loads((folder / f"a={n}" / "summary.json").read_text()) for n in range(4)]
    times = [(one["began"], one["ended"]) for one in found]
    at_once = [sum(began <= moment < ended for began, ended in times) for moment, _ in times]
    assert max(at_once) == 2
    cores = {tuple(one["cores"]) for one in found}
    if len(os.sched_getaffinity(0)) > 1:
        assert len(cores) == 2
        assert sorted(sum(cores, ())) == sorted(os.sched_getaffinity(0))
    lines = stderr.splitlines()
    for name in [f"{axis}={n}" for axis in "ab" for n in range(4)]:
        assert [text for text in lines if text.startswith(name)] == [
            f"{name}: running",
            f"{name}: finished at step 9, score 75.00",
        ]
    assert lines[-1] == "8 trials: 8 finished"
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["0.log", "1.log", "2.log", "3.log"]
    assert not [*folder.rglob("running")]


def test_a_job_that_dies_says_why_and_the_others_go_on(tmp_path):
    jobs = {
        "crash": ("crash", "a"),
        "user": ("user error", "b"),
        "half": ("half", "c", "d", "e"),
        "silent": ("silent", "f"),
        "kill": ("kill", "g"),
        "nothing": ("nothing", "h"),
        "finish": ("finish", "i"),
    }
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "failed.txt").write_text("of another time\n")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "silent.log").write_text("of another time\n")
    code, stderr = launch(tmp_path, jobs, processes=2)
    assert code == 1
    assert failed(tmp_path, "a")[0] == "step 1"  # stdout and stderr in the order they were written
    assert failed(tmp_path, "a")[-1] == "RuntimeError: out of luck"
    assert failed(tmp_path, "b") == [*map(str, range(11, 30)), "error: no macro TRIAN_STEPS"]
    assert state(tmp_path, "c").state == "finished"
    assert failed(tmp_path, "d") == ["error: the loss is nan"]  # the job's own words
    assert failed(tmp_path, "e") == ["the third is not done"]
    assert failed(tmp_path, "f") == ["exited with 3, and said nothing"]
    assert failed(tmp_path, "g") == ["killed by SIGKILL (out of memory?)"]
    assert failed(tmp_path, "h") == ["exited with 0, but left no summary.json"]
    assert state(tmp_path, "i").state == "finished"
    assert not (tmp_path / "i" / "failed.txt").exists()
    assert (tmp_path / "logs" / "crash.log").read_text().startswith("$ python -c ")
    lines = stderr.splitlines()
    assert "b: failed: error: no macro TRIAN_STEPS" in lines
    assert lines[-1] == "9 trials: 2 finished, 7 failed"


def test_a_job_that_was_terminated_has_not_failed(tmp_path):
    code, stderr = launch(tmp_path, {"0": ("terminate", "a"), "1": ("finish", "b")})
    assert code == 1
    assert (state(tmp_path, "a").state, state(tmp_path, "b").state) == ("stopped", "finished"), stderr
    assert stderr.splitlines()[-1] == "2 trials: 1 finished, 1 stopped"


@pytest.mark.parametrize("number, to_group", [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_lets_the_jobs_save(tmp_path, number, to_group):
    jobs = {"0": ("save", "a"), "1": ("save", "b"), "2": ("finish", "c")}
    launcher = Launcher(tmp_path, jobs, processes=2)
    pids = [begun(tmp_path, name, launcher.process)["pid"] for name in "ab"]
    (os.killpg if to_group else os.kill)(launcher.process.pid, number)
    code, stderr = launcher.end()
    assert code == 128 + number, stderr
    assert not any(map(lives, pids))
    assert (tmp_path / "a" / "saved").exists() and (tmp_path / "b" / "saved").exists()
    assert [state(tmp_path, name).state for name in "abc"] == ["stopped", "stopped", "waiting"]
    assert f"{number.name}: 2 jobs save and end; Ctrl-C kills them" in stderr.splitlines()


def test_a_second_ctrl_c_kills_what_does_not_end(tmp_path):
    launcher = Launcher(tmp_path, {"0": ("ignore", "a")})
    job = begun(tmp_path, "a", launcher.process)
    launcher.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    launcher.process.send_signal(signal.SIGTERM)  # that is no Ctrl-C
    time.sleep(0.5)
    assert lives(job["pid"]) and launcher.process.poll() is None
    launcher.process.send_signal(signal.SIGINT)
    code, stderr = launcher.end()
    assert code == 130, stderr
    wait_for(lambda: not lives(job["pid"]) and not lives(job["child"]))
    assert state(tmp_path, "a").state == "stopped"


def test_no_job_outlives_a_launcher_that_is_killed(tmp_path):
    jobs = {"0": ("ignore", "a"), "1": ("save", "b")}
    launcher = Launcher(tmp_path, jobs, processes=2)
    found = [begun(tmp_path, name, launcher.process) for name in "ab"]
    assert [state(tmp_path, name).state for name in "ab"] == ["running", "running"]
    launcher.process.kill()
    launcher.end()
    wait_for(lambda: not any(lives(one["pid"]) for one in found), seconds=2)
    os.kill(found[0]["child"], signal.SIGKILL)  # a job's own children are the job's to end
    assert [state(tmp_path, name).state for name in "ab"] == ["stopped", "stopped"]
    assert not (tmp_path / "b" / "saved").exists()
    code, stderr = launch(tmp_path, {"0": ("finish", "a"), "1": ("finish", "b")})
    assert code == 0, stderr


def test_a_sweep_has_one_launcher_and_a_trial_one_process(tmp_path):
    launcher = Launcher(tmp_path, {"0": ("save", "a")})
    begun(tmp_path, "a", launcher.process)
    host = socket.gethostname()
    owner = f"is being run by process {launcher.process.pid} on {host}: wait until that ends, or stop it first"
    assert launch(tmp_path, {"0": ("finish", "b")}) == (1, f"error: {tmp_path} {owner}\n")
    assert not (tmp_path / "b").exists()

    # A sweep of another folder with a trial in this one.
    other = tmp_path / "other"
    (other / "a").parent.mkdir()
    (other / "a").symlink_to(tmp_path / "a")
    code, stderr = launch(other, {"0": ("finish", "a"), "1": ("finish", "b")})
    assert code == 1
    assert f"{other / 'a'} {owner}" in stderr.splitlines()
    assert state(other, "b").state == "finished"
    launcher.process.terminate()
    assert launcher.end()[0] == 143


def test_a_terminal_shows_a_table_and_its_ctrl_c_lets_the_jobs_save(tmp_path):
    """A real terminal, which sends SIGINT to all processes of its foreground group."""
    ours, theirs = pty.openpty()
    jobs = {"0": ("crash", "SIZE=nano,SEED=0"), "1": ("save", "SIZE=nano,SEED=1")}
    # A session without a terminal takes the first one that it opens.
    take = f"import os; os.open({os.ttyname(theirs)!r}, os.O_RDWR)\n"
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = Launcher(tmp_path, jobs, before=take, env=os.environ | {"TERM": "xterm"}, **streams).process
    os.close(theirs)
    begun(tmp_path, "SIZE=nano,SEED=1", process)
    shown = read_until(ours, "1 running, 1 failed")
    os.write(ours, b"\x03")
    shown += read_until(ours, None)
    assert process.wait(10) == 130
    assert (tmp_path / "SIZE=nano,SEED=1" / "saved").exists()
    assert "SIGINT: 1 job saves and ends; Ctrl-C kills it" in shown
    last = shown[shown.rindex("trial ") :].splitlines()
    assert [text.split() for text in last] == [
        ["trial", "state", "step", "score", "left"],
        ["SIZE=nano,SEED=0", "failed"],
        ["RuntimeError:", "out", "of", "luck"],
        ["SIZE=nano,SEED=1", "stopped", "0/9"],
        ["2", "trials:", "1", "failed,", "1", "stopped"],
    ]
    # Each goes up by as many lines as were drawn.
    drawn = re.findall(r"(trial .*?\d+ trials: [^\r\n]*\r\n).*?\x1b\[(\d+)F", shown, re.DOTALL)
    assert drawn and all(text.count("\n") == int(up) for text, up in drawn)

    code, stderr = launch(tmp_path, {"1": jobs["1"]})
    assert code == 0, stderr
    assert state(tmp_path, "SIZE=nano,SEED=1").state == "finished"


def read_until(terminal, text):
    """What is written to the terminal, until `text` is, or nobody has it open."""
    shown = ""
    while text is None or text not in shown:
        assert select.select([terminal], [], [], 10)[0], f"nothing more after {shown!r}"
        try:
            shown += os.read(terminal, 65536).decode()
        except OSError:
            break
    return shown


def test_a_full_disk_is_one_line_and_the_jobs_that_run_save(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "2.log").symlink_to("/dev/full")
    jobs = {"0": ("save", "a"), "1": ("finish", "b"), "2": ("finish", "c")}
    code, stderr = launch(tmp_path, jobs, processes=2)
    assert code == 1
    assert re.search(
        rf"^error: cannot go on in {tmp_path} \(No space left on device: a log\): free disk space, or set `sweep_dir`",
        stderr.splitlines()[-1],
    )
    assert not lives(json.loads((tmp_path / "a" / "begun.json").read_text())["pid"])
    assert [state(tmp_path, name).state for name in "abc"] == ["stopped", "finished", "waiting"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    code, stderr = launch(tmp_path / "file" / "sweep", {"0": ("finish", "a")})
    assert (code, stderr.count("\n")) == (1, 1)
    assert stderr.startswith(f"error: cannot go on in {tmp_path}/file/sweep (Not a directory")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets what devices there seem to be."""
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION", "TPU_VISIBLE_CHIPS"):
        monkeypatch.delenv(name, raising=False)

    def make(smi=None, **variables):
        monkeypatch.setenv("PATH", str(tmp_path))
        if smi is not None:
            (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
            (tmp_path / "nvidia-smi").chmod(0o755)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return make


def environments(slots):
    return [dict(slot.environment) for slot in slots]


def test_a_process_has_gpus_of_its_own(machine):
    machine("echo 0; echo 1; echo 2")
    assert visible_gpus() == ["0", "1", "2"]
    assert environments(divide_machine(None, 8)) == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "012"]
    assert environments(divide_machine(2, 8)) == [{"CUDA_VISIBLE_DEVICES": gpus} for gpus in ("0", "1,2")]
    assert environments(divide_machine(8, 1)) == [{"CUDA_VISIBLE_DEVICES": "0,1,2"}]
    assert environments(divide_machine(4, 8)) == [
        {"CUDA_VISIBLE_DEVICES": gpu, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.450"} for gpu in "0120"
    ]


def test_only_visible_gpus_count(machine):
    machine("echo 0; echo 1; echo 2", CUDA_VISIBLE_DEVICES="2,GPU-5f,-1,0")
    assert visible_gpus() == ["2", "GPU-5f"]
    machine(CUDA_VISIBLE_DEVICES="")
    assert visible_gpus() == []
    machine(CUDA_VISIBLE_DEVICES="1", JAX_PLATFORMS="cpu")
    assert visible_gpus() == []


def test_a_machine_without_a_gpu(machine):
    machine()
    assert visible_gpus() == []
    machine("echo No devices were found; exit 6")
    assert visible_gpus() == []
    assert visible_tpu_chips() == []
    assert [slot.cores for slot in divide_machine(None, 8)] == [""]


def test_cores_are_divided(machine, monkeypatch):
    machine()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 3, 5, 8})
    assert [slot.cores for slot in divide_machine(2, 8)] == ["1,2", "3,5,8"]
    assert [slot.cores for slot in divide_machine(7, 8)] == ["1", "2", "3", "5", "8", "1", "2"]
    assert [slot.cores for slot in divide_machine(7, 1)] == [""]
    with pytest.raises(ValueError, match="processes is 0, expected at least 1"):
        divide_machine(0, 8)


def test_a_process_has_a_tpu_chip_of_its_own(machine, monkeypatch):
    machine(TPU_VISIBLE_CHIPS="0,1,2,3")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "libtpu" or None)
    slots = environments(divide_machine(None, 8))
    assert [slot["TPU_VISIBLE_CHIPS"] for slot in slots] == ["0", "1", "2", "3"]
    assert len({slot["TPU_PROCESS_PORT"] for slot in slots}) == 4
    assert environments(divide_machine(1, 8)) == [{}]
    with pytest.raises(ValueError, match="processes is 5, but this host has 4 TPU chips"):
        divide_machine(5, 8)
