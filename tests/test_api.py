"""The Python API as a notebook uses it: rows in memory, no gin, and neither files nor the process changed unasked."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import optax
import pytest
from sentencepiece import sentencepiece_model_pb2
from tiny import CONFIG, ROOT

import prompt_tuning_jax as pt
from prompt_tuning_jax import infer
from prompt_tuning_jax.batches.data import dataset_of
from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.model_flags import load_predictor
from prompt_tuning_jax.prompts.peft import write_adapter
from prompt_tuning_jax.training.eval_run import evaluate_prompt

CONTRACT = ROOT / "docs" / "notebook.py"
LABELS = ["negative", "positive"]
ROWS = [
    {"inputs": f"sentence: {text}", "targets": LABELS[i % 2]}
    for i, text in enumerate(
        ["a dull film", "a fine film", "it was awful", "a great story", "an odd plot", "good cast"]
    )
]
OPTIONS = {"steps": 4, "batch_size": 2, "eval_every": 2, "labels": LABELS, "progress": False}


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def result(model):
    return pt.train(model, pt.PromptTuning(3), ROWS, ROWS, optimizer=optax.adamw(0.05), **OPTIONS)


def test_the_notebook_runs_as_it_is(tmp_path):
    """The whole public API, from an empty folder, in a process that has nothing but the package."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(CONTRACT)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_the_notebook_is_the_contract(data_dir):
    contract = data_dir.parent / "contract" / "notebook.py"
    if not contract.is_file():
        pytest.skip(f"no {contract}")
    assert CONTRACT.read_bytes() == contract.read_bytes()


def test_importing_the_package_imports_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import prompt_tuning_jax as pt; dir(pt); "
        "print([name for name in set(sys.modules) - before if name.partition('.')[0] in "
        "('jax', 'numpy', 'flax', 'optax', 'tensorflow', 'seqio', 'torch')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in pt.__all__:
        assert getattr(pt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        pt.trian  # noqa: B018


def test_train_stays_a_function_beside_the_command_line_of_its_name():
    import prompt_tuning_jax.train  # noqa: F401

    assert pt.train.__module__ == "prompt_tuning_jax.training.api"


def test_nothing_is_written_and_nothing_is_left_in_the_process(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = (signal.getsignal(signal.SIGTERM), sys.unraisablehook, sys.excepthook, "torch" in sys.modules)
    pt.train(model, pt.PromptTuning(3), ROWS, ROWS, optimizer=optax.adamw(0.05), **OPTIONS)
    assert not [*tmp_path.iterdir()]
    assert before == (signal.getsignal(signal.SIGTERM), sys.unraisablehook, sys.excepthook, "torch" in sys.modules)
    assert capsys.readouterr() == ("", "")


def test_it_works_outside_the_main_thread(model, result, tmp_path):
    done = []

    def work():
        done.append(
            pt.train(
                model, pt.PromptTuning(3), ROWS, ROWS, optimizer=optax.adamw(0.05), folder=tmp_path / "run", **OPTIONS
            )
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    np.testing.assert_array_equal(done[0].prompt, result.prompt)


def test_records_are_those_of_metrics_jsonl(model, tmp_path):
    records = []
    pt.train(
        model, pt.PromptTuning(3), ROWS, ROWS, optimizer=optax.adamw(0.05), folder=tmp_path / "run",
        on_record=records.append, **OPTIONS,
    )  # fmt: skip
    assert records == [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_result_is_that_of_the_best_evaluation(model, result):
    found = pt.evaluate(model, ROWS, prompt=result, labels=LABELS)
    assert {name: found[name] for name in result.metrics} == result.metrics
    assert found == pt.evaluate(model, ROWS, prompt=result.prompt, labels=LABELS)
    assert result.trainable_parameters == 3 * CONFIG.emb_dim
    assert result.summary["best"] == result.metrics


def test_evaluate_takes_whatever_was_left(model, result, tmp_path):
    """An array, a prompt file, a run's folder and an adapter's folder."""
    run = pt.train(model, pt.LoRA(rank=2), ROWS, ROWS, optimizer=optax.adamw(0.05), folder=tmp_path / "run", **OPTIONS)
    expected = pt.evaluate(model, ROWS, prompt=run, labels=LABELS)
    run.save(tmp_path / "adapter")
    assert pt.evaluate(model, ROWS, prompt=tmp_path / "run", labels=LABELS) == expected
    assert pt.evaluate(model, ROWS, prompt=tmp_path / "adapter", labels=LABELS) == expected
    assert pt.evaluate(run.merged(), ROWS, labels=LABELS).keys() == expected.keys()
    result.save(tmp_path / "prompt.npy")
    assert pt.evaluate(model, ROWS, prompt=str(tmp_path / "prompt.npy"), labels=LABELS) == pt.evaluate(
        model, ROWS, prompt=result, labels=LABELS
    )


@pytest.fixture(scope="module")
def others(tiny, tmp_path_factory):
    """The tiny base model with its tokens in reverse order, and with other positions."""
    bases = {}
    for name in ("tokens", "positions"):
        bases[name] = shutil.copytree(tiny.base, tmp_path_factory.mktemp("others") / name)
    vocabulary = sentencepiece_model_pb2.ModelProto.FromString(tiny.vocabulary.read_bytes())
    tokens = [one for one in vocabulary.pieces if one.type == one.NORMAL]
    for one, text in zip(tokens, [one.piece for one in reversed(tokens)], strict=True):
        one.piece = text
    (bases["tokens"] / "spiece.model").write_bytes(vocabulary.SerializeToString())
    config = bases["positions"] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"relative_attention_max_distance": 1}))
    return {name: pt.load(str(path)) for name, path in bases.items()}


def in_folder(folder, name="of the others"):
    """A copy of a run in a folder of prompts."""
    shutil.copytree(folder, folder.with_name("prompts") / name, dirs_exist_ok=True)
    return folder.with_name("prompts")


OPENED = {
    "a predictor of a run": lambda model, run, result: pt.Predictor(model, run),
    "of its prompt": lambda model, run, result: pt.Predictor(model, run / "best" / "prompt.npy"),
    "of prompts by name": lambda model, run, result: pt.Predictor(model, {"a": run}),
    "of a file by name": lambda model, run, result: pt.Predictor(model, {"a": str(run / "best" / "prompt.npy")}),
    "of a result": lambda model, run, result: pt.Predictor(model, {"a": result}),
    "of infer": lambda model, run, result: load_predictor(
        infer.parse(["--base", model.path, "--prompts", str(run)]), prompt=None
    ),
    "of a folder": lambda model, run, result: pt.Predictor(model, in_folder(run), prompt="of the others"),
    "evaluate": lambda model, run, result: pt.evaluate(model, ROWS, prompt=run),
    "evaluate a result": lambda model, run, result: pt.evaluate(model, ROWS, prompt=result),
    "eval": lambda model, run, result: evaluate_prompt(
        size=model.config, initial_checkpoint_path=model.path, prompt_file=str(run), base_dtype="float32",
        dataset=dataset_of(ROWS, "validation", batch_size=8, lengths={"inputs": 16, "targets": 8}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("opened", OPENED)
def test_a_prompt_of_another_base_model_or_tokenizer_is_refused(opened, model, others, folder, result):
    """Wherever it is opened. Only the tokens of the one differ, and only what is computed of the other."""
    said = {
        "tokens": (model.tokenizer.fingerprint, "trained with a tokenizer", others["tokens"].tokenizer.fingerprint),
        "positions": (model.fingerprint, "trained on a base", others["positions"].fingerprint),
    }
    assert others["tokens"].fingerprint == model.fingerprint
    for name, (own, what, other) in said.items():
        with pytest.raises(ValueError, match=f"{what} of fingerprint {own}, this one is {other}: set ") as refused:
            OPENED[opened](others[name], folder, result)
        assert "\n" not in str(refused.value)


def test_a_prompt_of_which_nothing_is_known_is_taken(model, others, result, tmp_path):
    result.save(tmp_path / "sst2.npy")
    for prompt in (result.prompt, tmp_path / "sst2.npy"):
        for other in others.values():
            assert [*pt.Predictor(other, {"a": prompt}).bank] == ["a"]
    (tmp_path / "sst2.json").write_text(json.dumps(result.summary))
    assert [*pt.Predictor(model, tmp_path).bank] == ["sst2"]
    assert [*pt.Predictor(others["tokens"], tmp_path).bank] == []


def test_a_peft_prompt_of_another_base_model_is_warned_of(tiny, model, result, tmp_path, capsys):
    """Both are named. Nothing is said if the file names this one, or none."""
    write_adapter(tmp_path / "other", result.prompt, "google/t5-v1_1-base")
    write_adapter(tmp_path / "same", result.prompt, model.path)
    write_adapter(tmp_path / "none", result.prompt)
    base = re.escape(model.path)
    says = f"prompt {{}} says that it was trained on the base model 'google/t5-v1_1-base', and this one is {base}$"
    other = tmp_path / "other"
    with pytest.warns(UserWarning, match=says.format("other")):
        pt.Predictor(model, other)
    with pytest.warns(UserWarning, match=says.format("a")):
        pt.Predictor(model, {"a": other})
    with pytest.warns(UserWarning, match=says.format(other)):
        found = pt.evaluate(model, ROWS, prompt=other, labels=LABELS)
    assert found == pt.evaluate(model, ROWS, prompt=tmp_path / "same", labels=LABELS)
    for name in ("same", "none"):
        pt.Predictor(model, tmp_path / name)
        pt.Predictor(model, {"a": tmp_path / name})
    capsys.readouterr()
    load_predictor(infer.parse(["--base", model.path, "--prompts", str(tmp_path)]))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "trained on" in line]
    assert re.match(says.format("other"), line)
    OPENED["eval"](model, other, result)
    assert re.search(says.format(other), capsys.readouterr().err, re.MULTILINE)


def test_files_and_rows_are_the_same_data(model, result, tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(lines)
    data = pt.files({name: tmp_path / f"{name}.jsonl" for name in ("train", "validation")}, labels=LABELS)
    options = {name: value for name, value in OPTIONS.items() if name != "labels"}
    found = pt.train(model, pt.PromptTuning(3), data, data, optimizer=optax.adamw(0.05), **options)
    np.testing.assert_array_equal(found.prompt, result.prompt)
    assert found.metrics == result.metrics


def run(model, folder, **changes):
    given = {"optimizer": optax.adamw(0.05), "folder": folder, "method": pt.PromptTuning(3), "train": ROWS}
    given |= OPTIONS | changes
    return pt.train(model, given.pop("method"), given.pop("train"), ROWS, **given)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    run(model, path)
    return path


OTHERS = {
    "another seed": ({"seed": 1}, "random_seed was 0, is 1"),
    "another batch": ({"batch_size": 3}, "batch_size was 2, is 3"),
    "another rate": ({"optimizer": optax.adamw(0.1)}, "step_size was -0.05, is -0.1"),
    "another optimiser": ({"optimizer": optax.sgd(0.05)}, "optimizer"),
    "another schedule": ({"optimizer": optax.adamw(lambda step: 0.05 / (1 + step))}, "optimizer"),
    "another method": ({"method": pt.PerLayerPrompt(3)}, 'method.class was ".*PromptTuning", is ".*PerLayerPrompt"'),
    "another length": ({"method": pt.PromptTuning(4)}, "method.length was 3, is 4"),
    "another start": ({"method": pt.PromptTuning(3, pt.init.RandomUniform())}, "method.initializer"),
    "other rows": ({"train": ROWS[:5]}, "train_data was"),
    "the rows in another order": ({"train": ROWS[::-1]}, "train_data was"),
    "other labels": ({"labels": LABELS[::-1]}, "train_data was"),
    "dropout": ({"dropout_rate": 0.1}, "model.dropout_rate was 0.0, is 0.1"),
    "fewer steps": ({"steps": 2}, "train_steps was 4, is 2"),
    "other evaluations": ({"eval_every": 1}, "eval_period was 2, is 1"),
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_run_is_refused_in_a_folder(change, folder, model):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changes, message = OTHERS[change]
    with pytest.raises(SettingError, match=f"holds another run \\(.*{message}") as refused:
        run(model, folder, **changes)
    assert "\n" not in str(refused.value) and refused.value.setting == "model_dir"
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_call_is_already_done(folder, model):
    before = sorted((path, path.stat().st_mtime_ns) for path in (folder / "checkpoints").rglob("*"))
    same = run(model, folder)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (folder / "checkpoints").rglob("*"))
    np.testing.assert_array_equal(same.prompt, np.load(folder / "best" / "prompt.npy"))


def test_more_steps_extend_a_run(model, tmp_path):
    """A schedule that does not know the number of steps: the longer run is the one that was longer from the start."""
    run(model, tmp_path / "run")
    longer = run(model, tmp_path / "run", steps=8)
    whole = run(model, tmp_path / "whole", steps=8)
    np.testing.assert_array_equal(longer.prompt, whole.prompt)
    for path in (tmp_path / "whole" / "prompts").iterdir():
        assert (tmp_path / "run" / "prompts" / path.name).read_bytes() == path.read_bytes()


def test_more_steps_need_no_other_argument(model, tmp_path):
    """Not even `eval_every`, which is by default a tenth of the steps."""
    options = {name: value for name, value in OPTIONS.items() if name not in ("steps", "eval_every")}
    options["folder"] = tmp_path / "run"
    for steps, evaluations in ((20, [*range(2, 21, 2)]), (24, [*range(2, 25, 2)])):
        pt.train(model, pt.PromptTuning(3), ROWS, ROWS, steps=steps, **options)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [record["step"] for record in map(json.loads, lines) if record["split"] == "eval"] == evaluations


def test_a_schedule_over_the_steps_cannot_be_extended(model, tmp_path):
    def optimizer(steps):
        return optax.adamw(optax.linear_schedule(0.05, 0.0, steps))

    run(model, tmp_path / "run", optimizer=optimizer(4))
    with pytest.raises(SettingError, match="transition_steps was 4, is 8"):
        run(model, tmp_path / "run", optimizer=optimizer(8), steps=8)


def test_a_changed_formula_is_another_run(model, tmp_path):
    """A notebook's class may change between two calls, and keep its name and fields."""

    def method(factor):
        @dataclasses.dataclass(frozen=True)
        class Scaled(pt.Method):
            length: int

            def init(self, key, model):
                return {"prompt": pt.init.SampledVocabulary()(key, self.length, model)}

            def apply(self, trained, frozen):
                return pt.Injection(prompt=factor * trained["prompt"])

        return Scaled(3)

    run(model, tmp_path / "run", method=method(1.0))
    with pytest.raises(SettingError, match=r"method.methods.apply.factor was 1.0, is 2.0"):
        run(model, tmp_path / "run", method=method(2.0))


@pytest.mark.parametrize(
    ("call", "setting", "message"),
    [
        (lambda model: pt.load("nowhere"), "initial_checkpoint_path", "no base model at nowhere"),
        (lambda model: run(model, None, steps=0), "train_steps", "`steps` is 0, expected a whole number of at least 1"),
        (lambda model: run(model, None, eval_every=0), "eval_period", "`eval_every` is 0"),
        (lambda model: run(model, None, batch_size=0), "batch_size", "`batch_size` is 0"),
        (lambda model: run(model, None, train="rows.jsonl"), "train", "pt.files"),
        (lambda model: run(model, None, train=[]), "train", "no rows"),
        (
            lambda model: run(model, None, labels=["yes", "no"]),
            "train",
            "row 0: targets 'negative' is not one of the labels 'yes'",
        ),
        (lambda model: run(model, None, method=pt.LoRA(2), optimizer=None), "optimizer", "must be given for LoRA"),
        (lambda model: pt.evaluate(model, ROWS, prompt=np.zeros(3)), "prompt_file", r"expected floats \[P, D\]"),
        (lambda model: pt.evaluate(model, ROWS, prompt=np.zeros((3, 5))), "initial_checkpoint_path", "d_model 16"),
        (lambda model: pt.evaluate(model, ROWS, prompt="no.npy"), "prompt_file", "no prompt file no.npy"),
        (lambda model: pt.Predictor(model, ["a"]), "prompts", "expected prompts by name"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_setting(call, setting, message, model):
    with pytest.raises(SettingError, match=message) as refused:
        call(model)
    assert "\n" not in str(refused.value)
    assert str(refused.value.setting) == setting


def test_a_model_says_what_it_is(model):
    assert "d_model 16" in repr(model) and model.fingerprint in repr(model)
    assert model.tokenizer.encode("a film")


def test_the_readme_starts_with_this_api():
    """The first code block after the two commands is Python, at most 15 lines."""
    text = (ROOT / "README.md").read_text()
    commands, python = (part.partition("\n") for part in text.split("```")[1:4:2])
    assert commands[2].startswith("make demo") and "make test" in commands[2]
    assert python[0] == "python" and len(python[2].strip().splitlines()) <= 15
