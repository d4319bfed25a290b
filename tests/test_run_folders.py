"""A run's folder checks itself: what was damaged, deleted or is in use is said in one line, and never goes on wrong."""

import dataclasses
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import ROOT

import prompt_tuning_jax as pt
from prompt_tuning_jax.batches import lock as lock_module
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.state import METADATA, StateStore
from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.tasks import metrics

LABELS = ["negative", "positive"]
TEXTS = ["a dull film", "a fine film", "it was awful", "a great story", "an odd plot", "good cast"]
ROWS = [{"inputs": f"sentence: {text}", "targets": LABELS[i % 2]} for i, text in enumerate(TEXTS)]
TIMES = {"seconds", "examples_per_second", "wall_time"}

pytestmark = pytest.mark.usefixtures("compiled_once")


def run(model, folder, method=None, **changes):
    given = {"steps": 6, "batch_size": 2, "eval_every": 2, "log_every": 1, "labels": LABELS, "progress": False}
    given |= {"optimizer": optax.adamw(0.05)} | changes
    return pt.train(model, method or pt.PromptTuning(3), ROWS, ROWS, folder=folder, **given)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run(model, folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def records(folder):
    """metrics.jsonl, strictly JSON, apart from times."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def prompts(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.npy")}


def summary(folder):
    found = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in found.items() if name not in TIMES}


def assert_same_run(folder, other):
    assert (prompts(folder), records(folder), summary(folder)) == (prompts(other), records(other), summary(other))


def flip(path, bit=3):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << bit
    path.write_bytes(data)


def of_folder(warned):
    """What warnings say of the folder; of so few rows, others are about the data."""
    return [line for line in map(str, (one.message for one in warned)) if "damaged" in line or " as it was " in line]


def data_file(checkpoint):
    return max((checkpoint / "default" / "d").iterdir(), key=lambda path: path.stat().st_size)


def other_values(checkpoint):
    """Whole files, in TensorStore's eyes, of another state."""
    shutil.rmtree(checkpoint / "default")
    shutil.copytree(checkpoint.parent / "2" / "default", checkpoint / "default")


def other_records(checkpoint):
    text = (checkpoint / METADATA).read_text()
    assert '"accuracy": ' in text
    (checkpoint / METADATA).write_text(text.replace('"accuracy": ', '"accuracy": 9', 1))


DAMAGES = {
    "a flipped bit": lambda checkpoint: flip(data_file(checkpoint)),
    "an empty file": lambda checkpoint: data_file(checkpoint).write_bytes(b""),
    "zeros": lambda checkpoint: data_file(checkpoint).write_bytes(bytes(data_file(checkpoint).stat().st_size)),
    "half a file": lambda checkpoint: os.truncate(data_file(checkpoint), 90),
    "no file": lambda checkpoint: data_file(checkpoint).unlink(),
    "other values": other_values,
    "other records beside it": other_records,
    "metadata that are no JSON": lambda checkpoint: (checkpoint / METADATA).write_text("{"),
    "metadata of another format": lambda checkpoint: (checkpoint / METADATA).write_text('{"metricz": 1}'),
    "no metadata": lambda checkpoint: (checkpoint / METADATA).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(model, folder, finished, damage, capfd):
    DAMAGES[damage](folder / "checkpoints" / "6")
    with pytest.warns(UserWarning, match=r"^checkpoint 6 is damaged \(.*\): going on from checkpoint 4$") as said:
        run(model, folder)
    assert len(of_folder(said)) == 1 and capfd.readouterr().err == ""
    assert_same_run(folder, finished)
    run(model, folder)  # the checkpoint was written again, and is whole


def test_two_damaged_checkpoints_fall_back_to_the_third(model, folder, finished):
    for step in ("6", "4"):
        flip(data_file(folder / "checkpoints" / step))
    with pytest.warns(UserWarning, match="going on from checkpoint 2$") as said:
        run(model, folder)
    assert [line[:24] for line in of_folder(said)] == ["checkpoint 6 is damaged ", "checkpoint 4 is damaged "]
    assert_same_run(folder, finished)


def test_without_a_whole_checkpoint_nothing_is_touched(model, folder):
    for checkpoint in (folder / "checkpoints").iterdir():
        flip(data_file(checkpoint))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SettingError, match=r"^checkpoint 6 in `folder` cannot be restored \(.*\), nor can the 2 be"):
        run(model, folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_restored_state_gives_the_program_of_a_new_one(tmp_path):
    """Arrays that are committed to a device would give the step another program, which would be compiled anew."""
    new = {"a": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.ones((), jnp.bfloat16), "step": jnp.int32(3)}
    on_device = jax.device_put(new, jax.devices()[0])
    store = StateStore(tmp_path)
    store.save(1, new)
    store.wait()
    twice = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + leaf, state), donate_argnums=0)
    for like in (new, on_device):
        restored = store.restore(1, like)
        assert [leaf.committed for leaf in restored.values()] == 3 * [like is on_device]
        assert twice.lower(restored).as_text() == twice.lower(like).as_text()
        jax.tree.map(np.testing.assert_array_equal, restored, like)
        jax.tree.map(np.testing.assert_array_equal, twice(restored), {name: 2 * new[name] for name in new})
    assert twice.lower(new).as_text() != twice.lower(on_device).as_text()
    store.close()


def test_a_state_of_other_shapes_is_refused_and_told_once(tmp_path):
    store = StateStore(tmp_path)
    store.save(1, {"a": jnp.ones((3, 4)), "b": jnp.ones(2), "c": jnp.ones(())})
    store.wait()
    for like in (jnp.ones((4, 4)), jnp.ones((2, 4)), jnp.ones(12)):
        with pytest.raises(SettingError, match="not compatible with the stored shape"):  # Orbax's words
            store.restore(1, {"a": like, "b": jnp.ones(2), "c": jnp.ones(())})
        gc.collect()  # what Orbax left unfinished would be printed now, and pytest would make it an error
    store.close()


def test_any_bit_of_a_state_is_seen(tmp_path):
    """The checksum alone: TensorStore has its own of its files, which others may have been put in place of."""
    values = jnp.linspace(-1, 1, 6).reshape(2, 3)
    state = {"a": values, "key": jnp.array([1, 2**31 + 7], jnp.uint32), "step": jnp.int32(3)}
    store = StateStore(tmp_path)
    store.save(1, state, {"evals": []})
    store.wait()
    metadata = tmp_path / "1" / METADATA
    kept = json.loads(metadata.read_text())
    assert kept["custom_metadata"]["checksum"] != "0" * 16
    for name, array in state.items():
        for bit in (0, 11, 30):
            bits = np.array(array).view(np.uint32).copy()
            bits.reshape(-1)[-1] ^= np.uint32(1 << bit)
            other = StateStore(tmp_path / f"{name}{bit}")
            other.save(1, state | {name: jnp.asarray(bits.view(np.asarray(array).dtype))}, {"evals": []})
            other.close()
            (tmp_path / f"{name}{bit}" / "1" / METADATA).write_text(json.dumps(kept))
            other = StateStore(tmp_path / f"{name}{bit}")
            with pytest.raises(SettingError, match="the checksum differs"):
                other.restore(1, state)
            other.close()
    np.testing.assert_array_equal(store.restore(1, state)["key"], state["key"])
    store.close()


def test_a_checkpoint_of_an_earlier_version_has_no_checksum(model, folder, finished):
    """Its run goes on; but a damaged record of it is refused, since nothing keeps the evaluations."""
    for path in (folder / "checkpoints").glob(f"*/{METADATA}"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))
    run(model, folder)
    assert_same_run(folder, finished)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([*lines[:2], "17\n", *lines[2:]]))
    with pytest.raises(SettingError, match=r"metrics.jsonl, line 3: invalid record, so the run's best step is unknown"):
        run(model, folder)


def lines_of(change):
    """Damage of metrics.jsonl that changes its list of lines."""

    def damage(path):
        lines = path.read_bytes().splitlines(keepends=True)
        change(lines)
        path.write_bytes(b"".join(lines))

    return damage


RECORDS = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "a damaged line in the middle": lines_of(lambda lines: lines.__setitem__(2, lines[2][:20] + b"\n")),
    "JSON, but no record": lines_of(lambda lines: lines.__setitem__(2, b"17\n")),
    "nested too deep": lines_of(lambda lines: lines.__setitem__(2, b"[" * 100_000 + b"\n")),
    "no UTF-8 at the end": lines_of(lambda lines: lines.__setitem__(-1, b"\xff\xfe\n")),
    "a record less": lines_of(lambda lines: lines.pop(2)),
    "records in another order": lines_of(lambda lines: lines.reverse()),
    "another value": lines_of(lambda lines: lines.__setitem__(2, lines[2].replace(b'accuracy": ', b'accuracy": 9'))),
    "a number that is none": lines_of(lambda lines: lines.__setitem__(2, lines[2].replace(b'y": ', b'y": NaN, "z": '))),
}


@pytest.mark.parametrize("damage", RECORDS)
def test_damaged_records_never_change_the_best_step(model, folder, finished, damage):
    """The third line is the first evaluation."""
    assert records(finished)[2]["split"] == "eval"
    RECORDS[damage](folder / "metrics.jsonl")
    with pytest.warns(UserWarning, match="metrics.jsonl is not as it was at step 6: its evaluations are those that"):
        run(model, folder)
    assert (prompts(folder), summary(folder)) == (prompts(finished), summary(finished))
    evals = [record for record in records(finished) if record["split"] == "eval"]
    assert [record for record in records(folder) if record["split"] == "eval"] == evals
    assert all(record in records(finished) for record in records(folder))
    if damage != "empty" and damage != "deleted":
        assert_same_run(folder, finished)


def other_prompt(folder):
    np.save(folder / "best" / "prompt.npy", 1 + np.load(folder / "best" / "prompt.npy"))


BESTS = {
    "best/ is gone": lambda folder: shutil.rmtree(folder / "best"),
    "best/ holds another prompt": other_prompt,
    "a flipped bit": lambda folder: flip(folder / "best" / "prompt.npy"),
    "the prompt of its step is gone, too": lambda folder: [
        shutil.rmtree(folder / name) for name in ("best", "prompts")
    ],
    "the prompt of its step is damaged, too": lambda folder: [
        flip(folder / path) for path in ("best/prompt.npy", f"prompts/{summary(folder)['best_step']}.npy")
    ],
}


@pytest.mark.parametrize("damage", BESTS)
def test_the_best_prompt_is_written_again(model, folder, finished, damage):
    BESTS[damage](folder)
    (folder / "summary.json").write_text("{")
    with pytest.warns(UserWarning, match=r"best is written again from (the prompt of step|checkpoint) \d+$"):
        result = run(model, folder)
    assert (folder / "best" / "prompt.npy").read_bytes() == (finished / "best" / "prompt.npy").read_bytes()
    assert (records(folder), summary(folder)) == (records(finished), summary(finished))
    np.testing.assert_array_equal(result.prompt, np.load(finished / "best" / "prompt.npy"))


def test_a_best_that_cannot_be_made_again_is_refused(model, folder):
    best = summary(folder)["best_step"]
    assert best < 6, "the state that the run goes on from would be enough"
    for path in (folder / "checkpoints" / str(best), folder / "best", folder / "prompts"):
        shutil.rmtree(path)
    with pytest.raises(SettingError, match=f"best, of step {best}, is gone, and so is that step's checkpoint"):
        run(model, folder)


def test_a_best_adapter_is_written_again_from_its_checkpoint(model, tmp_path):
    run(model, tmp_path / "run", pt.LoRA(2))
    files = {path: path.read_bytes() for path in (tmp_path / "run" / "best").rglob("*") if path.is_file()}
    shutil.rmtree(tmp_path / "run" / "best")
    with pytest.warns(UserWarning, match="best is written again from checkpoint"):
        run(model, tmp_path / "run", pt.LoRA(2))
    assert files == {path: path.read_bytes() for path in (tmp_path / "run" / "best").rglob("*") if path.is_file()}


def test_a_folder_is_of_one_run_at_a_time(model, tmp_path):
    """A second run is refused, in another thread or another process, and the first one goes on undisturbed."""
    begun, go_on = threading.Event(), threading.Event()

    def wait(record):
        begun.set()
        assert go_on.wait(60)

    first = threading.Thread(target=run, args=(model, tmp_path / "run"), kwargs={"on_record": wait})
    first.start()
    assert begun.wait(60)
    with pytest.raises(
        SettingError, match=rf"run is being run by process {os.getpid()} on .*; or set another `folder`"
    ):
        run(model, tmp_path / "run")
    code = "import sys; from pathlib import Path; from prompt_tuning_jax.training.run_folder import RunFolder\n"
    code += "try: RunFolder(sys.argv[1], {})\nexcept ValueError as error: print(error)"
    # A child of this process may run the folder for it, as a sweep's jobs do; its own child may not.
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}, sys.argv[1]])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", child, str(tmp_path / "run")], capture_output=True, text=True, env=environment
    )
    assert f"is being run by process {os.getpid()} on " in done.stdout, done.stderr
    go_on.set()
    first.join()
    assert summary(tmp_path / "run")["steps"] == 6 and not (tmp_path / "run" / "running").exists()
    run(model, tmp_path / "run")


def hold(folder, **fields):
    mine = json.dumps({"pid": os.getpid(), "host": lock_module.socket.gethostname()} | fields)
    (folder / "running").write_text(mine)


def test_a_lock_of_a_dead_process_is_taken_over(model, folder, finished):
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait()
    another = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    for fields in ({"pid": dead.pid}, {"pid": another.pid, "started": 1}):  # its number is another process's now
        hold(folder, **fields)
        run(model, folder)
        assert not (folder / "running").exists()
    another.communicate(b"\n")
    assert_same_run(folder, finished)


def test_an_owner_on_another_host_is_waited_for_until_it_must_be_dead(model, folder, monkeypatch):
    monkeypatch.setattr(lock_module, "DEAD_AFTER", 1.0)
    hold(folder, host="elsewhere")
    began = time.monotonic()
    run(model, folder)
    assert time.monotonic() - began > 0.9
    hold(folder, host="elsewhere")
    os.utime(folder / "running", (time.time() + 5,) * 2)
    alive = threading.Timer(0.5, os.utime, [folder / "running"])
    alive.start()
    with pytest.raises(SettingError, match=r"is being run by process \d+ on elsewhere: wait until that ends"):
        run(model, folder)
    alive.join()


def test_a_run_that_fails_or_is_interrupted_lets_go_of_its_folder(model, tmp_path, finished):
    def interrupt(record):
        if record["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "run", on_record=interrupt)
    assert not (tmp_path / "run" / "running").exists()
    run(model, tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("rate", [1e20, 1e38])
def test_a_prompt_that_is_not_finite_stops_the_run(model, tmp_path, rate):
    with pytest.raises(SettingError, match="not finite|NaN|nan|inf") as error:
        run(model, tmp_path / "run", optimizer=optax.sgd(rate), log_every=2)
    assert "\n" not in str(error.value) and error.value.setting in ("learning_rate", "initial_checkpoint_path")
    if (tmp_path / "run" / "metrics.jsonl").exists():
        assert records(tmp_path / "run") is not None
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_base_model_that_is_not_finite_is_named(model, tiny, tmp_path):
    """In its files as it is read; in memory by the loss, and by an evaluation's logits."""
    parameters = {path: np.array(value) for path, value in model.parameters.items()}
    parameters["encoder/encoder_norm/scale"][3] = np.nan
    huggingface.write(tmp_path / "base", model.config, parameters, tiny.vocabulary)
    message = r"^encoder/encoder_norm/scale of .*base is not finite: 1 of 16 values are NaN or infinity: set `where`"
    with pytest.raises(SettingError, match=message):
        pt.load(str(tmp_path / "base"))
    broken = dataclasses.replace(model, parameters={path: jnp.asarray(value) for path, value in parameters.items()})
    with pytest.raises(SettingError, match="^encoder/encoder_norm/scale of the base model holds NaN or infinity"):
        run(broken, None)
    with pytest.raises(SettingError, match="^the logits of row 0 and 5 others of its batch are not finite"):
        pt.evaluate(broken, ROWS, labels=LABELS)


def test_a_metric_that_is_not_finite_stops_the_run(model, tmp_path, monkeypatch):
    """metrics.jsonl would be no JSON, and no evaluation could be told to be the best."""
    monkeypatch.setattr(metrics, "accuracy", broken_metric)
    with pytest.raises(SettingError, match="^accuracy of eval is nan at step 2, expected a finite number"):
        run(model, tmp_path / "run")
    assert [record["split"] for record in records(tmp_path / "run")] == ["train", "train"]


def broken_metric(targets, predictions):
    return {"accuracy": float("nan")}


def test_a_disk_that_fills_is_said_in_one_line(tmp_path, capfd):
    """Whatever of a checkpoint cannot be written; the checkpoint before stands."""
    state, other = {"a": jnp.arange(8_000.0)}, {"a": jnp.sin(jnp.arange(8_000.0))}
    store = StateStore(tmp_path)
    store.save(1, state)
    store.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    message = r"^a checkpoint cannot be written to .* \(.*\): free disk space, or set `folder`"
    try:
        with pytest.raises(SettingError, match=message):
            store.save(2, other)
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    store.close()
    assert capfd.readouterr().err == ""
    store = StateStore(tmp_path)
    assert store.restore_newest(state)[0] == 1
    store.close()
