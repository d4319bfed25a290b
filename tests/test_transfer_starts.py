"""SPoT's starts: another run's prompt, and the nearest of a folder of prompts to one of the target task."""

import jax
import numpy as np
import optax
import pytest
from tiny import CONFIG

import prompt_tuning_jax as pt
from prompt_tuning_jax.batches.data import dataset_of
from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.methods.prompt_tuning import PROMPT
from prompt_tuning_jax.prompts import peft
from prompt_tuning_jax.prompts.files import OFFICIAL_NAME, write_prompt
from prompt_tuning_jax.training.loop import train as train_run
from prompt_tuning_jax.training.run import TrainConfig

D, P = CONFIG.emb_dim, 3
ROWS = [{"inputs": "a fine film", "targets": "good"}, {"inputs": "a dull film", "targets": "bad"}]
OPTIONS = {"steps": 1, "batch_size": 2, "optimizer": optax.sgd(0.0), "progress": False, "metrics": []}


pytestmark = pytest.mark.usefixtures("compiled_once")


def drawn(seed, length=P, width=D):
    return np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)


def as_run(folder, prompt):
    write_prompt(folder / "best" / "prompt.npy", prompt)
    write_prompt(folder / "prompts" / "0.npy", np.zeros_like(prompt))


def as_npy(path, prompt):
    write_prompt(path, prompt)


def as_peft(folder, prompt):
    peft.write_adapter(folder, prompt)


def as_official(folder, prompt):
    folder.mkdir(parents=True)
    with open(folder / OFFICIAL_NAME, "wb") as file:
        np.save(file, prompt)


KINDS = {"run": as_run, "prompt.npy": as_npy, "peft": as_peft, "official": as_official}


@pytest.fixture
def sources(tmp_path):
    """A folder with a prompt of each kind, and these by path."""
    prompts = {}
    for seed, (name, write) in enumerate(KINDS.items()):
        path = tmp_path / "sources" / name
        write(path, drawn(seed))
        prompts[str(path)] = drawn(seed)
    return tmp_path / "sources", prompts


def started(model, init):
    """The prompt that a method starts from."""
    return pt.PromptTuning(P, init).init(jax.random.key(0), model)[PROMPT]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_from_a_prompt_of_any_kind(kind, model, tmp_path):
    KINDS[kind](tmp_path / kind, drawn(7))
    np.testing.assert_array_equal(started(model, pt.init.FromFile(str(tmp_path / kind))), drawn(7))


@pytest.mark.parametrize("seed", range(3))
def test_the_nearest_prompt_is_that_of_the_largest_cosine_of_average_rows(seed, model, sources, tmp_path):
    folder, prompts = sources
    like = drawn(100 + seed, length=P)
    write_prompt(tmp_path / "like.npy", like)

    def cosine(prompt):
        a, b = prompt.astype(np.float64).mean(axis=0), like.astype(np.float64).mean(axis=0)
        return a @ b / np.sqrt((a @ a) * (b @ b))

    expected = {path: cosine(prompt) for path, prompt in prompts.items()}
    init = pt.init.Nearest(folder, tmp_path / "like.npy")
    found = init.similarities()
    assert [*found] == sorted(expected, key=lambda path: -expected[path])
    assert found == pytest.approx(expected, abs=1e-6)
    nearest = max(expected, key=lambda path: expected[path])
    np.testing.assert_array_equal(started(model, init), prompts[nearest])
    line = f"the prompt starts from {nearest}, the nearest of 4 to {tmp_path / 'like.npy'}"
    assert init.chosen() == f"{line} (cosine {expected[nearest]:.3f})"


def test_the_target_tasks_own_prompt_is_no_candidate(model, sources):
    folder, prompts = sources
    for path, prompt in prompts.items():
        found = pt.init.Nearest(folder, path).similarities()
        assert {*found} == {*prompts} - {path}, "it would be the nearest"
        assert not np.array_equal(started(model, pt.init.Nearest(folder, path)), prompt)


def test_the_prompts_of_a_run_of_several_tasks_are_candidates(model, tmp_path):
    run = tmp_path / "sources" / "mixture"
    for seed, task in enumerate(("rte", "sst2")):
        write_prompt(run / "best" / "prompts" / f"{task}.npy", drawn(seed))
    write_prompt(tmp_path / "like.npy", drawn(1) + 0.01)
    for folder in (run, run.parent):
        np.testing.assert_array_equal(started(model, pt.init.Nearest(folder, tmp_path / "like.npy")), drawn(1))


def test_a_run_says_which_prompt_it_starts_from_when_it_starts(model, sources, tmp_path):
    folder, prompts = sources
    like = [*prompts][0]
    init, said = pt.init.Nearest(folder, like), []
    data = pt.files({"train": tmp_path / "rows.tsv", "validation": tmp_path / "rows.tsv"})
    (tmp_path / "rows.tsv").write_text("inputs\ttargets\na fine film\tgood\n")
    datasets = {
        name: dataset_of(data, split, batch_size=1, lengths={"inputs": 16, "targets": 8})
        for name, split in (("train_dataset", "train"), ("eval_dataset", "validation"))
    }
    config = TrainConfig(
        size=model.config, initial_checkpoint_path=model.path, model=model, method=pt.PromptTuning(P, init),
        optimizer=optax.sgd(0.0), train_steps=1, eval_period=1, model_dir=str(tmp_path / "run"), **datasets,
    )  # fmt: skip
    train_run(config, say=said.append, progress=False)
    assert said.count(init.chosen()) == 1
    np.testing.assert_array_equal(np.load(tmp_path / "run" / "prompts" / "0.npy"), started(model, init))
    train_run(config, say=said.append, progress=False)
    assert said.count(init.chosen()) == 1, "a run that goes on does not start again"


@pytest.mark.parametrize(
    ("changed", "setting", "message"),
    [
        ({"like": drawn(9, width=D + 1)}, "prompt_folder", r"\[3, 16\], and .*like.npy \[3, 17\]: set `folder` to pro"),
        ({"like": drawn(9, P + 1)}, "prompt_length", r"like.npy is \[4, 16\], expected \[3, 16\]: set `length`"),
        ({"more.npy": drawn(9, P + 1)}, "prompt_length", r"more.npy is \[4, 16\], expected \[3, 16\]: set `length`"),
        ({"more.npy": drawn(9, P)[0]}, "prompt_folder", r"more.npy holds float32 \[16\]; expected a prompt"),
        ({"folder": "nowhere"}, "prompt_folder", "no folder of prompts at nowhere: set `folder` to a folder"),
        ({"folder": "empty"}, "prompt_folder", "holds no prompt but .*like.npy: set `folder` to one with others"),
        ({"like": None}, "prompt_like", "no prompt file .*like.npy; expected a prompt"),
        ({"length": 0}, "prompt_length", "`length` is 0, expected a whole number from 1 to"),
    ],
)
def test_a_start_that_does_not_fit_is_one_line(changed, setting, message, model, sources, tmp_path):
    folder, _ = sources
    like = changed.get("like", drawn(8))
    if like is not None:
        np.save(tmp_path / "like.npy", like)
    if "more.npy" in changed:
        np.save(folder / "more.npy", changed["more.npy"])
    (tmp_path / "empty").mkdir()
    folder = {"nowhere": "nowhere", "empty": str(tmp_path / "empty")}.get(changed.get("folder"), str(folder))
    with pytest.raises(SettingError, match=message) as refused:
        init = pt.init.Nearest(folder, str(tmp_path / "like.npy"))
        pt.train(model, pt.PromptTuning(changed.get("length", P), init), ROWS, ROWS, **OPTIONS)
    assert "\n" not in str(refused.value) and refused.value.setting == setting


@pytest.mark.parametrize("shape", [(P, D + 1), (P + 1, D), (P - 1, D)])
def test_a_file_of_another_width_or_length_is_refused(shape, model, tmp_path):
    write_prompt(tmp_path / "prompt.npy", drawn(0, *shape))
    with pytest.raises(SettingError, match=rf"\[{shape[0]}, {shape[1]}\], expected \[3, 16\]: set `length`"):
        init = pt.init.FromFile(str(tmp_path / "prompt.npy"))
        pt.train(model, pt.PromptTuning(P, init), ROWS, ROWS, **OPTIONS)
