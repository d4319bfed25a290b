"""`python -m prompt_tuning_jax.train` as a user runs it: what it leaves, and that it can be killed at any time."""

import json
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cached import load_split
from sentencepiece import sentencepiece_model_pb2
from tiny import CONFIG, LENGTHS, PROMPT_LENGTH, random_params

from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.base import default_vocabulary, load_base
from prompt_tuning_jax.checkpoints.state import StateStore
from prompt_tuning_jax.methods.prompt_tuning import PROMPT
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary
from prompt_tuning_jax.training.flop import StepShape, step_flop
from prompt_tuning_jax.training.optimizer import adafactor
from prompt_tuning_jax.training.progress import stopping_on_sigterm
from prompt_tuning_jax.training.step import TrainState

STEPS, EVAL_PERIOD, LOG_PERIOD = 400, 50, 20
TRIALS = 3  # of a run that is killed
TIMES = {"seconds", "examples_per_second", "wall_time"}


@pytest.fixture(scope="module")
def command(tiny):
    """The arguments of one prompt-tuning run, but for MODEL_DIR."""
    steps = {"TRAIN_STEPS": STEPS, "EVAL_PERIOD": EVAL_PERIOD, "LOG_PERIOD": LOG_PERIOD}
    return tiny.arguments(**steps, RANDOM_SEED=3)


@pytest.fixture(scope="module")
def finished(tiny, command, tmp_path_factory):
    """The folder of that run, undisturbed."""
    folder = tmp_path_factory.mktemp("train") / "finished"
    done = tiny.run([*command, model_dir(folder)])
    assert done.returncode == 0, done.stderr
    return folder


def model_dir(folder):
    return f"--gin.MODEL_DIR={str(folder)!r}"


def records(folder, split=None):
    """metrics.jsonl, apart from times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in lines
        if split in (None, line["split"])
    ]


def summary(folder):
    found = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in found.items() if name not in TIMES}


def prompts(folder):
    """Every prompt file's bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.npy"))}


def assert_same_run(folder, other):
    assert prompts(folder) == prompts(other)
    assert records(folder) == records(other)
    assert summary(folder) == summary(other)


def folder_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_runs_folder(finished):
    names = {path.name for path in finished.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {
        "run.json",
        "config.gin",
        "metrics.jsonl",
        "checkpoints",
        "prompts",
        "best",
        "summary.json",
    }
    steps = range(EVAL_PERIOD, STEPS + 1, EVAL_PERIOD)
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {str(step) for step in steps}
    assert {path.name for path in (finished / "prompts").iterdir()} == {f"{step}.npy" for step in (0, *steps)}
    assert [path.name for path in (finished / "best").iterdir()] == ["prompt.npy"]
    assert "PROMPT_LENGTH = 5" in (finished / "config.gin").read_text()


def test_metrics_are_logged_at_their_periods(finished):
    train, evals = records(finished, "train"), records(finished, "eval")
    assert [record["step"] for record in train] == sorted(
        {*range(LOG_PERIOD, STEPS + 1, LOG_PERIOD), *range(EVAL_PERIOD, STEPS + 1, EVAL_PERIOD)}
    )
    assert [record["step"] for record in evals] == [*range(EVAL_PERIOD, STEPS + 1, EVAL_PERIOD)]
    for record in train:
        assert set(record) == {
            "step", "split", "loss", "token_accuracy", "gradient_norm", "prompt_norm", "prompt_moved",
            "tflops_per_step",
        }  # fmt: skip
        shape = StepShape(8, *LENGTHS.values(), PROMPT_LENGTH)
        assert record["tflops_per_step"] == step_flop(CONFIG, shape, trains_model=False) / 1e12
        assert np.isfinite([value for name, value in record.items() if name != "split"]).all()
    assert all(set(record) == {"step", "split", "accuracy"} for record in evals)
    assert train[-1]["loss"] < train[0]["loss"]
    prompt = np.load(finished / "prompts" / f"{STEPS}.npy")
    norm = np.linalg.norm(prompt, axis=1).mean()
    assert train[-1]["prompt_norm"] == pytest.approx(norm, rel=1e-5)  # the same sum, in float32 in another order


def test_the_best_prompt_is_that_of_the_best_evaluation(finished):
    evals = records(finished, "eval")
    best = max(evals, key=lambda record: record["accuracy"])
    found = summary(finished)
    assert (found["best_step"], found["best"]) == (best["step"], {"accuracy": best["accuracy"]})
    path = finished / "best" / "prompt.npy"
    assert path.read_bytes() == (finished / "prompts" / f"{best['step']}.npy").read_bytes()
    prompt = np.load(path)
    assert prompt.dtype == np.float32 and prompt.shape == (PROMPT_LENGTH, CONFIG.emb_dim)
    assert np.isfinite(prompt).all()


def test_the_summary_says_what_was_run(finished, tiny):
    found = json.loads((finished / "summary.json").read_text())
    assert found["seconds"] > 0
    assert found["base"] == str(tiny.base)
    assert found["base_fingerprint"] == load_base(str(tiny.base), CONFIG).fingerprint
    expected = {
        "task": "demo_reviews",
        "train_split": "train",
        "eval_split": "validation[:64]",
        "seed": 3,
        "steps": STEPS,
        "stopped_early": False,
        "trainable_parameters": PROMPT_LENGTH * CONFIG.emb_dim,
        "examples_seen": STEPS * 8,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["versions"]["jax"] == jax.__version__


def test_a_checkpoint_is_a_few_times_the_prompt(finished):
    size = PROMPT_LENGTH * CONFIG.emb_dim * 4
    for checkpoint in (finished / "checkpoints").iterdir():
        assert folder_bytes(checkpoint) <= 4 * size + 64 * 1024


@pytest.mark.parametrize("shape", [(100, 768), (100, 4096), (150, 1024)])
def test_a_checkpoint_of_an_official_size_is_a_few_times_the_prompt(tmp_path, shape):
    prompt = {PROMPT: jax.random.normal(jax.random.key(0), shape)}
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), prompt, adafactor(0.3).init(prompt), key)
    store = StateStore(tmp_path)
    store.save(7, state)
    store.wait()
    assert folder_bytes(tmp_path / "7") <= 4 * 4 * shape[0] * shape[1] + 64 * 1024
    restored = store.restore(7, state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    store.close()


def test_the_same_command_gives_the_same_bytes(tiny, command, finished, tmp_path):
    """And with the tokens in their cache, neither TensorFlow nor torch is loaded for a run."""
    done = tiny.run_process([*command, model_dir(tmp_path / "again")], python=["-X", "importtime"])
    assert done.returncode == 0
    assert_same_run(tmp_path / "again", finished)
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert "tensorboardX" in imported
    assert not [name for name in imported if name.startswith(("tensorflow.", "seqio.", "torch."))]


def test_another_seed_gives_another_prompt(tiny, command, finished, tmp_path):
    done = tiny.run([*command, model_dir(tmp_path / "run"), "--gin.RANDOM_SEED=4", f"--gin.TRAIN_STEPS={EVAL_PERIOD}"])
    assert done.returncode == 0
    assert (tmp_path / "run" / "best" / "prompt.npy").read_bytes() not in prompts(finished).values()


def wait_for_lines(path, count, process):
    """Until `path` has `count` lines."""
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def kill(process, after):
    time.sleep(after)
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_been(tiny, command, finished, tmp_path):
    """SIGKILL twice each: at a random moment of training, and at a random moment of the restart."""
    chance = random.Random()
    whole = len(records(finished))
    for trial in range(TRIALS):
        folder = tmp_path / str(trial)
        arguments = [*command, model_dir(folder)]
        process = tiny.start(arguments)
        wait_for_lines(folder / "metrics.jsonl", chance.randint(1, whole // 2), process)
        kill(process, after=chance.uniform(0, 0.03))
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "summary.json").exists()
        kill(tiny.start(arguments), after=chance.uniform(0.2, 5))
        done = tiny.run(arguments)
        assert done.returncode == 0, done.stderr
        assert_same_run(folder, finished)
        assert not [path for path in folder.rglob("*") if "tmp" in path.name or path.name.endswith(".partial")]


@pytest.mark.parametrize("size", [600, 1_500, 4_000])
def test_a_disk_that_fills_is_one_line_and_the_run_goes_on_when_there_is_room(tiny, command, finished, tmp_path, size):
    """No file may be larger: first run.json cannot be written, then parts of a checkpoint, and metrics.jsonl."""
    arguments = [*command, model_dir(tmp_path / "run")]
    process = tiny.start(arguments)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 2, stderr
    *before, last = stderr.splitlines()
    assert re.fullmatch(r"error: .*cannot be written to .*|error: no room for the run in .*", last), last
    assert "free disk space, or set MODEL_DIR" in last
    said = re.compile(r"step \d+ |demo_reviews|best at|tokenising")
    assert not [line for line in before if not said.match(line)]
    done = tiny.run(arguments)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", finished)


def test_sigterm_saves_first(tiny, command, finished, tmp_path):
    folder = tmp_path / "run"
    process = tiny.start([*command, model_dir(folder)])
    wait_for_lines(folder / "metrics.jsonl", 1, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    step = int(re.search(r"terminated, saved at step (\d+): the same command goes on from there", stderr)[1])
    assert LOG_PERIOD <= step < STEPS
    assert (folder / "checkpoints" / str(step)).is_dir()
    assert not (folder / "summary.json").exists()

    done = tiny.run([*command, model_dir(folder)])
    assert done.returncode == 0, done.stderr
    assert prompts(folder) == prompts(finished)
    assert summary(folder) == summary(finished)
    assert records(folder, "eval") == records(finished, "eval")
    # The record after `step` is the mean of the steps since then; all others are those of the undisturbed run.
    following = next(record["step"] for record in records(finished, "train") if record["step"] > step)
    for record, other in zip(records(folder, "train"), records(finished, "train"), strict=True):
        assert record == other or record["step"] == other["step"] == following


def test_sigterm_before_the_first_step_and_after_the_last_ends_a_command_line():
    """While a model is loaded nothing is to be saved; and a sweep does not go on to its next trial."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, stopping_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it went on loading")
    assert ended.value.code == 143
    seen = []
    with pytest.raises(SystemExit) as ended, stopping_on_sigterm() as stop:
        assert not stop(1)
        signal.raise_signal(signal.SIGTERM)
        seen.append("a summary is written")
    assert seen and ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_finished_run_is_not_run_again(tiny, command, finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    checkpoints = {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*")}
    lines = (folder / "metrics.jsonl").read_bytes()
    done = tiny.run([*command, model_dir(folder)])
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, finished)
    assert (folder / "metrics.jsonl").read_bytes() == lines
    assert {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*")} == checkpoints
    first, again = (json.loads((path / "summary.json").read_text())["seconds"] for path in (finished, folder))
    assert again < first + 30, "the time of the run is its own, not that since it was started first"


def test_more_steps_go_on_from_the_last(tiny, command, finished, tmp_path):
    """TRAIN_STEPS may be raised, which is said: the first steps are those of the shorter run."""
    folder = tmp_path / "run"
    short = [*command, model_dir(folder), f"--gin.TRAIN_STEPS={EVAL_PERIOD}"]
    assert tiny.run(short).returncode == 0
    done = tiny.run([*command, model_dir(folder)])
    assert done.returncode == 0, done.stderr
    assert f"is extended from {EVAL_PERIOD} to {STEPS} steps" in done.stderr
    assert_same_run(folder, finished)
    done = tiny.run(short)
    assert done.returncode == 2
    assert f"holds another run (train_steps was {STEPS}, is {EVAL_PERIOD}): set another MODEL_DIR" in done.stderr


def test_a_killed_run_may_get_more_steps(tiny, command, finished, tmp_path):
    folder, fewer = tmp_path / "run", STEPS - EVAL_PERIOD
    process = tiny.start([*command, model_dir(folder), f"--gin.TRAIN_STEPS={fewer}"])
    wait_for_lines(folder / "metrics.jsonl", 5, process)
    kill(process, after=0)
    assert not (folder / "summary.json").exists()
    done = tiny.run([*command, model_dir(folder)])
    assert done.returncode == 0, done.stderr
    assert f"is extended from {fewer} to {STEPS} steps" in done.stderr
    assert_same_run(folder, finished)


def test_a_run_that_ended_between_two_evaluations_may_get_more_steps(tiny, command, finished, tmp_path):
    """It has one evaluation more than a run that was as long from the start, and is the same otherwise."""
    folder, end = tmp_path / "run", EVAL_PERIOD + LOG_PERIOD - EVAL_PERIOD % LOG_PERIOD
    assert end % EVAL_PERIOD and not end % LOG_PERIOD
    assert tiny.run([*command, model_dir(folder), f"--gin.TRAIN_STEPS={end}"]).returncode == 0
    done = tiny.run([*command, model_dir(folder)])
    assert done.returncode == 0, done.stderr
    found = prompts(folder / "prompts")
    assert found.pop(f"{end}.npy") and found == prompts(finished / "prompts")
    (more,) = [record for record in records(folder, "eval") if record["step"] == end]
    assert [record for record in records(folder) if record != more] == records(finished)
    best = max(records(folder, "eval"), key=lambda record: record["accuracy"])["step"]
    assert summary(folder)["best_step"] == best
    assert (folder / "best" / "prompt.npy").read_bytes() == (folder / "prompts" / f"{best}.npy").read_bytes()


CHANGES = {
    "LEARNING_RATE": ("--gin.LEARNING_RATE=0.1", "was -?0.3, is -?0.1"),
    "RANDOM_SEED": ("--gin.RANDOM_SEED=4", "random_seed was 3, is 4"),
    "rows": ("--gin.TRAIN_SPLIT='train[1:]'", "train_data was"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_refused_in_one_line(tiny, command, finished, change):
    argument, message = CHANGES[change]
    done = tiny.run([*command, model_dir(finished), argument])
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(rf"holds another run \(.*{message}", line) and line.endswith("to go on with this one")
    assert "set another MODEL_DIR, or give --allow_other_config" in line


def test_another_vocabulary_beside_the_same_weights_is_refused(tiny, command, finished, tmp_path):
    """Case A6: subwords in another order are other words for the same rows of the table."""
    shutil.copytree(tiny.base, tmp_path / "base")
    model = sentencepiece_model_pb2.ModelProto.FromString(tiny.vocabulary.read_bytes())
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    for piece, (text, score, kind) in zip(model.pieces[3:], reversed(pieces[3:]), strict=True):
        piece.piece, piece.score, piece.type = text, score, kind
    (tmp_path / "base" / "spiece.model").write_bytes(model.SerializeToString())
    done = tiny.run([*command, model_dir(finished), f"--gin.INITIAL_CHECKPOINT_PATH={str(tmp_path / 'base')!r}"])
    assert done.returncode == 2 and "holds another run (tokenizer was" in done.stderr, done.stderr


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_rows_in_the_same_file_are_refused(tiny, tmp_path, split):
    """Case A5: labels are swapped between a run's end and its next start, which may be told to go on all the same."""
    texts = ["a dull film", "a fine film", "it was awful", "a great story"] * 4
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "validation")}

    def write(path, labels):
        rows = [{"inputs": text, "targets": labels[number % 2]} for number, text in enumerate(texts)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for path in files.values():
        write(path, ["negative", "positive"])
    given = ("prompts/random_uniform.gin", "runs/prompt_tune.gin", "tasks/files.gin")
    macros = {"MIXTURE_OR_TASK_NAME": "mine", "TASK_FILES": {name: str(path) for name, path in files.items()}}
    macros |= {"LABELS": ["negative", "positive"], "EVAL_SPLIT": "validation", "TRAIN_STEPS": 4, "EVAL_PERIOD": 4}
    arguments = [*tiny.arguments(*given, **macros), model_dir(tmp_path / "run")]
    assert tiny.run(arguments).returncode == 0
    write(files[split], ["positive", "negative"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    done = tiny.run(arguments)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    name = {"train": "train_data", "validation": "eval_data.mine"}[split]
    assert done.returncode == 2 and re.search(rf'holds another run \({name} was "\w+", is "\w+"\)', line), line
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines
    done = tiny.run([*arguments, "--gin.TRAIN_STEPS=8", "--allow_other_config"])
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in records(tmp_path / "run", "eval")] == [4, 8]


def test_a_base_model_that_is_not_finite_is_refused(tiny, tmp_path):
    """A lower learning rate would not help."""
    params = random_params(0)
    params["encoder/encoder_norm/scale"][3] = np.nan
    huggingface.write(tmp_path / "base", CONFIG, params, tiny.vocabulary)
    done = tiny.run([*tiny.arguments(INITIAL_CHECKPOINT_PATH=str(tmp_path / "base")), model_dir(tmp_path / "run")])
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert line.startswith("error: encoder/encoder_norm/scale of ") and "set INITIAL_CHECKPOINT_PATH" in line


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path):
    """The base model's weights are finite, and so large that its logits are not."""
    params = random_params(0)
    params["decoder/decoder_norm/scale"][:] = 3e38
    huggingface.write(tmp_path / "base", CONFIG, params, tiny.vocabulary)
    macros = {"TRAIN_STEPS": 40, "EVAL_PERIOD": 40, "LOG_PERIOD": 40}
    macros["INITIAL_CHECKPOINT_PATH"] = str(tmp_path / "base")
    folder = tmp_path / "run"
    done = tiny.run([*tiny.arguments(**macros), model_dir(folder)])
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    found = re.fullmatch(
        r"error: the loss is (?:nan|inf) at step (\d+), examples (\[.*\]): lower LEARNING_RATE, or look at these "
        r"examples; .*",
        errors[0],
    )
    assert found, errors[0]
    step, ids = int(found[1]), json.loads(found[2])
    assert step == 1
    batches = DatasetConfig(
        "demo_reviews", "train", 8, LENGTHS, cache_dir=str(tiny.folder / "cache" / "tasks")
    ).batches(Vocabulary(tiny.vocabulary), seed=0, shuffle=True)
    assert ids == batches[step - 1].ids.tolist()
    assert not (folder / "summary.json").exists() and not (folder / "best").exists()
    assert not any((folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    """A model-tuning run's folder."""
    folder = tmp_path_factory.mktemp("train") / "tuned"
    arguments = tiny.arguments("runs/model_tune.gin", LEARNING_RATE=0.05, TRAIN_STEPS=60)
    done = tiny.run([*arguments, model_dir(folder)])
    assert done.returncode == 0, done.stderr
    return folder


def test_model_tuning_leaves_a_base(tiny, tuned):
    """It trains every parameter, and what it leaves is read like the base that it came from."""
    before, after = load_base(str(tiny.base), CONFIG), load_base(str(tuned / "best" / "model"), CONFIG)
    assert summary(tuned)["base_fingerprint"] == before.fingerprint != after.fingerprint
    assert summary(tuned)["trainable_parameters"] == sum(array.size for array in before.params.values())
    assert all(not np.array_equal(before.params[name], after.params[name]) for name in before.params)
    assert Path(default_vocabulary(str(tuned / "best" / "model"))).read_bytes() == tiny.vocabulary.read_bytes()
    assert huggingface.read_config(tuned / "best" / "model") == huggingface.read_config(tiny.base)
    assert not (tuned / "prompts").exists()
    assert len(list((tuned / "checkpoints").iterdir())) == 1


def test_model_tuning_learns_to_answer_with_labels(tuned):
    """A random base answers nothing that is a label; after some steps at a high rate every answer is one."""
    evals = records(tuned, "eval")
    assert evals[-1]["accuracy"] > 25
    assert records(tuned, "train")[-1]["loss"] < 1


def test_a_tuned_model_is_a_base_to_go_on_from(tiny, tuned, tmp_path):
    arguments = tiny.arguments(INITIAL_CHECKPOINT_PATH=str(tuned / "best" / "model"), TRAIN_STEPS=20)
    assert tiny.run([*arguments, model_dir(tmp_path / "run")]).returncode == 0
    tuned_base = load_base(str(tuned / "best" / "model"), CONFIG)
    assert summary(tmp_path / "run")["base_fingerprint"] == tuned_base.fingerprint


@pytest.fixture(scope="module")
def pretraining(tiny, tmp_path_factory):
    """The arguments of span corruption from random weights."""
    folder = tmp_path_factory.mktemp("text")
    texts = [
        fields["inputs_pretokenized"]
        for fields in load_split(tiny.demo, "train", tiny.folder / "cache" / "tasks").fields
    ]
    (folder / "a.txt").write_text("\n".join(" ".join(texts[i : i + 3]) for i in range(0, len(texts), 3)) + "\n")
    macros = {
        "MIXTURE_OR_TASK_NAME": "text_span_corruption",
        "INITIAL_CHECKPOINT_PATH": None,
        "VOCABULARY": str(tiny.vocabulary),
        "DATA_DIR": str(folder),
        "TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 8},
        "EVAL_SPLIT": "train[:64]",
        "TRAIN_SPLIT": "train[64:]",
    }
    return tiny.arguments("runs/pretrain.gin", **macros)


def test_pretraining_logs_how_much_the_encoder_is_used(tiny, pretraining, tmp_path):
    folder = tmp_path / "run"
    done = tiny.run([*pretraining, model_dir(folder), "--gin.EXPORT_DTYPE='bfloat16'"])
    assert done.returncode == 0, done.stderr
    evals = records(folder, "eval")
    assert [set(record) for record in evals] == [{"step", "split", "loss", "encoder_use", "token_accuracy"}] * 2
    assert evals[-1]["loss"] < evals[0]["loss"] < 1.1 * np.log(CONFIG.vocab_size)
    assert all(abs(record["encoder_use"]) < 0.1 for record in evals), "after 40 steps the encoder has no use yet"
    found = summary(folder)
    assert found["base"] is None and not found["stopped_early"]
    assert load_base(str(folder / "best" / "model"), CONFIG).params["token_embedder/embedding"].shape == (400, 16)


def test_pretraining_that_makes_no_use_of_the_encoder_is_stopped_for_good(tiny, pretraining, tmp_path):
    params = random_params(0)
    params["decoder/layers_0/encoder_decoder_attention/out/kernel"][:] = 0
    huggingface.write(tmp_path / "deaf", CONFIG, params, tiny.vocabulary)
    folder = tmp_path / "run"
    base = f"--gin.INITIAL_CHECKPOINT_PATH={str(tmp_path / 'deaf')!r}"
    arguments = [*pretraining, model_dir(folder), base, "--gin.ENCODER_USE_BY=20", "--gin.LEARNING_RATE=1e-9"]
    for _ in range(2):  # a scheduler may start it again
        done = tiny.run(arguments)
        assert done.returncode == 0
        assert summary(folder)["stopped_early"] and summary(folder)["steps"] == 20
        assert records(folder)[-1]["step"] == 20
        assert "stopped at step 20: the decoder makes no use of the encoder" in done.stderr
