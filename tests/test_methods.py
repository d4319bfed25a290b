"""What every method must do: train, resume, share a program, and be saved as what was evaluated."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.models import random_model
from tiny import CONFIG

import prompt_tuning_jax as pt
from prompt_tuning_jax.batches.data import dataset_of
from prompt_tuning_jax.checkpoints.base import expected_shapes
from prompt_tuning_jax.checkpoints.conversion import convert
from prompt_tuning_jax.checkpoints.model import load
from prompt_tuning_jax.checkpoints.state import StateStore
from prompt_tuning_jax.checkpoints.tuned import injection_of, read_tuned
from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.methods.fold import make_fold
from prompt_tuning_jax.methods.ia3 import IA3
from prompt_tuning_jax.methods.lora import LoRA
from prompt_tuning_jax.methods.low_rank_prompt import LowRankPrompt
from prompt_tuning_jax.methods.lstm_prompt import LSTMPrompt
from prompt_tuning_jax.methods.method import Injection, Method, merge, tasks_of
from prompt_tuning_jax.methods.mlp_prompt import MLPPrompt
from prompt_tuning_jax.methods.model_tuning import ModelTuning
from prompt_tuning_jax.methods.mpt import MPT
from prompt_tuning_jax.methods.multitask_prompt import MultitaskPrompt
from prompt_tuning_jax.methods.per_layer_prompt import PerLayerPrompt
from prompt_tuning_jax.methods.prefix_tuning import PrefixTuning
from prompt_tuning_jax.methods.prompt_tuning import PROMPT, PromptTuning
from prompt_tuning_jax.methods.residual_prompt import EPSILON, ResidualPrompt
from prompt_tuning_jax.methods.scale_shift_prompt import ScaleShiftPrompt
from prompt_tuning_jax.methods.shapes import check_injection, start_shapes
from prompt_tuning_jax.methods.super_pos import SuperPos
from prompt_tuning_jax.methods.ulpt import ULPT
from prompt_tuning_jax.prompts.initializers import RandomUniform, SampledVocabulary
from prompt_tuning_jax.sweeps.shared_step import program_key
from prompt_tuning_jax.sweeps.vectorized import train_together
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.training.loop import train
from prompt_tuning_jax.training.optimizer import adafactor
from prompt_tuning_jax.training.run import TrainConfig

STEPS, EVAL_PERIOD = 6, 3
TIMES = {"seconds", "examples_per_second"}


@dataclasses.dataclass(frozen=True)
class ScaledPrompt(Method):
    """P' = scale * P + shift: a method as a user writes it, with no word of it in the package."""

    length: int

    def init(self, key, model):
        start = SampledVocabulary()(key, self.length, model)
        return {"prompt": start, "scale": jnp.ones(start.shape[1]), "shift": jnp.zeros(start.shape[1])}

    def apply(self, trained, frozen):
        return Injection(prompt=trained["scale"] * trained["prompt"] + trained["shift"])


def test_a_start_that_does_not_need_the_table_does_not_read_it():
    """On a mesh the table has to be gathered, and in int8 to be computed."""

    class Guarded:
        config, parameters, tokenizer = CONFIG, dict(random_model(CONFIG)[1]), None

        @property
        def embeddings(self):
            raise AssertionError("the embedding table is read")

    assert LoRA(rank=2).init(jax.random.key(0), Guarded())
    with pytest.raises(AssertionError, match="the embedding table is read"):
        PromptTuning(3).init(jax.random.key(0), Guarded())


@dataclasses.dataclass(frozen=True)
class ScaledQuery(Method):
    """The first layer's queries scaled by a number: a user's method that replaces a parameter of the frozen model."""

    def init(self, key, model):
        return {"factor": jnp.ones(())}

    def apply(self, trained, frozen):
        path = "encoder/layers_0/attention/query/kernel"
        return Injection(parameters={path: trained["factor"] * frozen[path]})


TASKS = ("reviews", "films")
METHODS = {
    "PromptTuning": PromptTuning(length=4),
    "ResidualPrompt": ResidualPrompt(length=4, bottleneck=6),
    "ScaledPrompt": ScaledPrompt(4),
    "LowRankPrompt": LowRankPrompt(length=4, rank=2),
    "ULPT": ULPT(length=4, rank=3),
    "SuperPos": SuperPos(length=4, tokens=6, population=300),
    "ScaleShiftPrompt": ScaleShiftPrompt(length=4),
    "MLPPrompt": MLPPrompt(length=4, hidden_size=6),
    "LSTMPrompt": LSTMPrompt(length=4, hidden_size=6),
    "PerLayerPrompt": PerLayerPrompt(length=3),
    "PerLayerPrompt that adds": PerLayerPrompt(length=3, combine="add"),
    "MPT": MPT(TASKS, length=4),
    "MultitaskPrompt": MultitaskPrompt(TASKS, length=3, combine="concatenate", task_length=2),
    "LoRA": LoRA(rank=2),
    "IA3": IA3(),
    "PrefixTuning": PrefixTuning(length=2),
    "ModelTuning": ModelTuning(),
    "ScaledQuery": ScaledQuery(),
}
FOLDING_TO_ONE_PROMPT = [*METHODS][: [*METHODS].index("PerLayerPrompt")]
FOLDING = (*FOLDING_TO_ONE_PROMPT, "PerLayerPrompt", "PerLayerPrompt that adds")
OF_TASKS = ("MPT", "MultitaskPrompt")  # these fold into a prompt per task
METHOD = pytest.mark.parametrize("name", METHODS)


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def rows():
    texts = ["a dull film", "a fine film", "it was awful", "a great story", "an odd plot", "the cast is good"]
    return [{"inputs": f"sentence: {text}", "targets": ["negative", "positive"][i % 2]} for i, text in enumerate(texts)]


def data_for(method, rows):
    """The rows; a method of a prompt per task gets them as two tasks, one of which has them all."""
    return rows if tasks_of(method) is None else {"reviews": rows, "films": rows[:4]}


@pytest.fixture(scope="module")
def settings(model, rows):
    """Makes the settings of a run of a few steps."""

    def make(folder, method, seed=0, **other):
        own = data_for(method, rows)
        data = {"lengths": {"inputs": 16, "targets": 8}, "labels": ["negative", "positive"]}
        chosen = {
            "size": dataclasses.replace(model.config, dropout_rate=0.1),
            "initial_checkpoint_path": model.path,
            "model": model,
            "train_dataset": dataset_of(own, "train", batch_size=2, **data),
            "eval_dataset": dataset_of(own, "validation", batch_size=6, **data),
            "method": method,
            "optimizer": adafactor(0.02),
            "train_steps": STEPS,
            "eval_period": EVAL_PERIOD,
            "log_period": 2,
            "random_seed": seed,
            "model_dir": None if folder is None else str(folder),
        }
        return TrainConfig(**(chosen | other))

    return make


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """Returns the run of a method by its name, undisturbed."""

    @functools.cache
    def run(name):
        return quiet(settings(tmp_path_factory.mktemp("finished") / name, METHODS[name]))

    return run


def quiet(config, **options):
    return train(config, say=None, progress=False, **options)


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def assert_same_files(folder, other):
    """What two runs leave must be the same, to the last bit."""
    names = [path.relative_to(other) for path in other.rglob("*") if path.suffix in (".npy", ".safetensors")]
    assert names and all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)
    assert records(folder) == records(other)


def logits(model, injection, params, rng=0):
    """The plain model's logits of some rows, padded ones among them; with a prompt per task, of the rows in each."""
    if injection.task_prompts is not None:
        return np.stack([logits(model, injection.of_task(task), params, rng) for task in TASKS])
    inputs = np.random.default_rng(rng).integers(3, CONFIG.vocab_size, (3, 7)).astype(np.int32)
    inputs[1, 4:] = 0
    inputs, targets = jnp.asarray(inputs), jnp.asarray(inputs[:, :5])
    found = Transformer(model.config).apply(
        {"params": merge(injection.parameters, params)}, inputs, targets, targets, enable_dropout=False,
        **injection.prompts,
    )  # fmt: skip
    return np.asarray(found)


def trained_by(method, model):
    """Trainable parameters away from their start, where a wrong formula would not show."""
    start = method.init(jax.random.key(1), model)
    rng = np.random.default_rng(2)
    return {
        name: jnp.asarray(value, jnp.float32) + 0.1 * rng.normal(size=value.shape).astype(np.float32)
        for name, value in start.items()
    }


@METHOD
def test_what_is_saved_is_what_was_evaluated(name, finished, model):
    """The training model's logits are those of the plain model with what best/ holds."""
    run = finished(name)
    store = StateStore(Path(run.config.model_dir) / "checkpoints")
    state = store.restore(run.summary["best_step"], run.state)  # as it was when the best evaluation was made
    store.close()
    training = jax.jit(lambda trained, frozen: METHODS[name].apply(trained, frozen))(state.trainable, run.frozen)
    expected = logits(model, training, model.parameters)
    saved = read_tuned(Path(run.config.model_dir) / "best", model.config)
    found = logits(model, jax.tree.map(jnp.asarray, saved), model.parameters)
    if name in (*FOLDING, *OF_TASKS):
        np.testing.assert_array_equal(found, expected)
    else:  # in best/model the parameters are stored as they are; an adapter's factor is split from its matrix
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
    unchanged = logits(model, Injection(), model.parameters)
    assert np.abs(found - unchanged).max() > 1e-3, "nothing was trained"


@METHOD
def test_saved_by_a_result_is_loaded_into_the_plain_model(name, model, rows, tmp_path):
    options = {"steps": 2, "batch_size": 2, "labels": ["negative", "positive"], "progress": False}
    data = data_for(METHODS[name], rows)
    result = pt.train(model, METHODS[name], data, data, optimizer=optax.adamw(0.05), **options)
    expected = logits(model, jax.tree.map(jnp.asarray, result.injection), model.parameters)
    if name in FOLDING:
        path = tmp_path / "prompt.npy"
        result.save(path)
        file = path / "prompt.npy" if path.is_dir() else path
        assert np.array_equal(np.load(file), result.prompt) and result.prompt.dtype == np.float32
        found = logits(model, jax.tree.map(jnp.asarray, injection_of(path, model.config)), model.parameters)
        np.testing.assert_array_equal(found, expected)
        return
    if name in OF_TASKS:
        result.save(tmp_path / "prompts")
        for task, of_task in zip(TASKS, expected, strict=True):
            path = tmp_path / "prompts" / f"{task}.npy"
            assert np.array_equal(np.load(path), result.prompts[task])
            found = logits(model, jax.tree.map(jnp.asarray, injection_of(path, model.config)), model.parameters)
            np.testing.assert_array_equal(found, of_task)
        return
    if name == "PrefixTuning":  # a folder of matrices has no place for it; in memory it stays beside them
        with pytest.raises(
            ValueError, match="prefix_key is a learned prefix, which Hugging Face's T5 has no place for"
        ):
            result.save(tmp_path / "merged", merge=True)
        plain = result.merged()
        with pytest.raises(SettingError, match="`prompts` are given for a model with a learned prefix in its encoder"):
            pt.Predictor(plain, {"a": np.zeros((2, CONFIG.emb_dim), np.float32)})
        asked = [{"prompt": None, "inputs": row["inputs"], "labels": options["labels"]} for row in rows]
        best = [answer["prediction"] for answer in pt.Predictor(plain).predict(asked)]
        task = [row | {"targets": label} for row, label in zip(rows, best, strict=True)]
        assert pt.evaluate(model, task, prompt=result, labels=options["labels"])["ranking"]["accuracy"] == 100
    else:
        result.save(tmp_path / "merged", merge=True)
        plain = load(str(tmp_path / "merged"))
    # A merged kernel rounds each weight, and the sums of products after it; 1.6e-6 was found.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits(plain, Injection(), plain.parameters), expected, atol=2e-6 * scale)
    if name in ("LoRA", "IA3", "PrefixTuning"):
        result.save(tmp_path / "adapter")
        found = jax.tree.map(jnp.asarray, injection_of(tmp_path / "adapter", model.config))
        np.testing.assert_allclose(logits(model, found, model.parameters), expected, atol=1e-6 * scale)


class Killed(BaseException):
    """Stands for a kill: nothing in a run may catch it."""


@METHOD
def test_a_killed_run_goes_on_to_the_same_bytes(name, finished, settings, tmp_path):
    undisturbed = finished(name)

    def kill(record):
        if record["step"] == STEPS - 1 or (record["split"] == "train" and record["step"] == STEPS):
            raise Killed

    with pytest.raises(Killed):
        quiet(settings(tmp_path / "killed", METHODS[name]), on_record=kill)
    resumed = quiet(settings(tmp_path / "killed", METHODS[name]))
    assert_same_files(tmp_path / "killed", Path(undisturbed.config.model_dir))
    for one, other in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(undisturbed.state), strict=True):
        np.testing.assert_array_equal(one, other)


# Each compiles three programs. Of the methods that end as one prompt, whose own part is all in one program in the next
# test, SuperPos stands for the others here: it also reads the base model.
COVERED_BELOW = ("LowRankPrompt", "ULPT", "ScaleShiftPrompt", "MLPPrompt", "LSTMPrompt")


@pytest.mark.parametrize("name", [name for name in METHODS if name not in COVERED_BELOW])
def test_runs_of_a_method_share_a_program(name, finished, settings, tmp_path):
    """Two seeds and learning rates in one program are trained as each is alone, to the last bit."""
    runs = {"a": {"seed": 0}, "b": {"seed": 1, "optimizer": adafactor(0.05)}}
    keys = {program_key(settings(tmp_path / run, METHODS[name], **own)) for run, own in runs.items()}
    assert len(keys) == 1 and None not in keys
    assert not train_together((run, settings(tmp_path / run, METHODS[name], **own)) for run, own in runs.items())
    assert_same_files(tmp_path / "a", Path(finished(name).config.model_dir))
    quiet(settings(tmp_path / "alone", METHODS[name], **runs["b"]))
    assert_same_files(tmp_path / "b", tmp_path / "alone")


def test_methods_that_fold_share_a_program_with_each_other(finished, settings, tmp_path):
    names = FOLDING_TO_ONE_PROMPT
    assert len({program_key(settings(tmp_path / name, METHODS[name])) for name in names}) == 1
    assert not train_together((name, settings(tmp_path / name, METHODS[name])) for name in names)
    for name in names:
        assert_same_files(tmp_path / name, Path(finished(name).config.model_dir))


DIFFERENT = ("PromptTuning", "PerLayerPrompt", "MPT", "LoRA", "IA3", "PrefixTuning")


def test_methods_of_different_kinds_do_not_share_a_program(settings):
    keys = [program_key(settings(None, METHODS[name])) for name in DIFFERENT]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", FOLDING)
def test_a_prompt_of_any_method_answers_beside_others(name, model):
    """Rows of a method's prompt in a mixed batch get what `evaluate` finds of that prompt alone."""
    injection = METHODS[name].apply(trained_by(METHODS[name], model), model.parameters)
    other = np.random.default_rng(0).normal(size=(2, CONFIG.emb_dim)).astype(np.float32)
    predictor = pt.Predictor(model, {"own": injection, "other": other}, max_new_tokens=4)
    asked = [{"prompt": name, "inputs": text} for text in ("a dull film", "a fine") for name in ("own", "other", None)]
    mixed = [*predictor.predict(asked)]
    for row, answer in zip(asked, mixed, strict=True):
        (alone,) = predictor.predict([row])
        assert alone["prediction"] == answer["prediction"]
        assert alone["score"] == pytest.approx(answer["score"], abs=1e-5)  # sums of other shapes, in float32
    scores = {row["prompt"]: answer["score"] for row, answer in zip(asked, mixed, strict=True)}
    assert len(set(scores.values())) == 3


def test_adapters_are_refused_in_a_bank(model):
    injection = METHODS["LoRA"].apply(trained_by(METHODS["LoRA"], model), model.parameters)
    with pytest.raises(
        ValueError, match="'own', which is not only a prompt, and only prompts can share a model: use it"
    ):
        pt.Predictor(model, {"own": injection})


def test_the_residual_prompts_formula(model):
    """Written out for each position, as the paper has it (arXiv 2305.03937, section 3)."""
    trained = trained_by(ResidualPrompt(length=3, bottleneck=5), model)
    found = ResidualPrompt(length=3, bottleneck=5).apply(trained, {}).prompt
    p = {name: np.asarray(value, np.float64) for name, value in trained.items()}
    for position, vector in enumerate(p["prompt"]):
        hidden = np.maximum(p["down"].T @ vector + p["down_bias"], 0)
        up = p["up"].T @ hidden + p["up_bias"]
        normed = (up - up.mean()) / np.sqrt(up.var() + EPSILON)
        expected = vector + normed * p["norm_scale"] + p["norm_bias"]
        np.testing.assert_allclose(found[position], expected, atol=1e-5)


@pytest.fixture(scope="module")
def deep(model):
    """A model of three encoder layers, where prompts per layer differ from one prompt."""
    config = dataclasses.replace(model.config, num_encoder_layers=3)
    return dataclasses.replace(model, config=config, parameters=random_model(config)[1])


def test_prompts_that_are_added_start_as_prompt_tuning_does(deep):
    method, key = PerLayerPrompt(4, RandomUniform(), "add"), jax.random.key(3)
    trained = method.init(key, deep)
    start = PromptTuning(4, RandomUniform()).init(key, deep)[PROMPT]
    assert trained["layer_prompts"].shape == (3, 4, CONFIG.emb_dim)
    injection = method.apply(trained, deep.parameters)
    np.testing.assert_array_equal(
        logits(deep, injection, deep.parameters), logits(deep, Injection(prompt=start), deep.parameters)
    )
    # Each of the L matrices then enters its own layer, and none enters twice.
    injection = method.apply({"layer_prompts": jnp.arange(3.0)[:, None, None] + start}, deep.parameters)
    np.testing.assert_array_equal(injection.prompt, start)
    np.testing.assert_array_equal(injection.layer_prompts[0], jnp.zeros_like(start))
    np.testing.assert_array_equal(injection.layer_prompts[1:], jnp.array([1.0, 2.0])[:, None, None] + start)


def test_a_prompt_with_additions_is_read_back_wherever_a_prompt_is(deep, rows, tmp_path):
    method = PerLayerPrompt(4, combine="add")
    result = pt.Result(deep, method.apply(trained_by(method, deep), deep.parameters), {}, 0, {})
    folder = tmp_path / "saved"
    result.save(folder)
    result.save(folder)  # an earlier one is replaced
    expected = logits(deep, result.injection, deep.parameters)
    for path in (folder, folder / "prompt.npy"):
        found = jax.tree.map(jnp.asarray, injection_of(path, deep.config))
        np.testing.assert_array_equal(logits(deep, found, deep.parameters), expected)
    alone = logits(deep, Injection(prompt=jnp.asarray(result.prompt)), deep.parameters)
    assert np.abs(alone - expected).max() > 1e-2  # the additions matter
    scored = {"labels": ["negative", "positive"], "lengths": {"inputs": 16, "targets": 8}}
    assert pt.evaluate(deep, rows, prompt=folder, **scored) == pt.evaluate(deep, rows, prompt=result, **scored)
    answers = [next(pt.Predictor(deep, given).predict([{"prompt": "saved", "inputs": "a film"}])) for given in (
        folder, tmp_path, {"saved": folder}, {"saved": result},
    )]  # fmt: skip
    assert all(answer == answers[0] for answer in answers) and "score" in answers[0]
    wrong = Injection(jnp.zeros((2, CONFIG.emb_dim)), jnp.zeros((3, 4, CONFIG.emb_dim)))
    with pytest.raises(SettingError, match=r"the prompt has a prompt \[2, 16\] and additions \[3, 4, 16\] to it"):
        pt.Predictor(deep, {"wrong": wrong})
    with pytest.raises(ValueError, match="is a prompt with additions per layer, which none of npy, peft, t5x holds"):
        convert(str(folder), str(tmp_path / "peft"), "peft")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="saved is there already and holds more than prompt.npy and layer_prompts.npy"):
        result.save(folder)


def test_a_residual_prompt_has_the_papers_number_of_parameters():
    """Table 1's T5-base: 10 x 768 for the prompt, and a network of bottleneck 400 with biases and a LayerNorm."""
    base = dataclasses.replace(pt.load("nano").config, emb_dim=768, num_heads=12, mlp_dim=2048)
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in expected_shapes(base).items()}
    trained, _ = start_shapes(ResidualPrompt(length=10, bottleneck=400), base, shapes)
    assert sum(leaf.size for leaf in trained.values()) == 10 * 768 + 2 * 768 * 400 + 400 + 768 + 2 * 768


def test_model_tuning_keeps_one_copy_of_what_it_trains(settings):
    """A trained parameter of the base model's is not among the frozen ones."""
    assert quiet(settings(None, ModelTuning())).frozen == {}
    run = quiet(settings(None, ModelTuning((r".*layer_norm/scale",))))
    assert all(path.endswith("layer_norm/scale") for path in run.state.trainable)
    assert not run.state.trainable.keys() & run.frozen.keys()
    assert run.state.trainable.keys() | run.frozen.keys() == run.config.model.parameters.keys()


def test_a_fold_copies_nothing_that_it_passes_on(model):
    trained = {path: jnp.array(value) for path, value in model.parameters.items()}
    injection = make_fold(ModelTuning(), trained, {})(trained, {})
    assert all(injection.parameters[path] is trained[path] for path in trained)


def test_the_frozen_model_is_left_as_it_was(model, tiny, finished):
    for name in METHODS:
        finished(name)
    for path, value in load(str(tiny.base)).parameters.items():
        np.testing.assert_array_equal(model.parameters[path], value)


KERNEL = "encoder/layers_0/mlp/wo/kernel"


@pytest.mark.parametrize(
    ("injection", "message"),
    [
        (Injection(prompt=np.zeros((3, 5))), r"gives a prompt of shape \[3, 5\], expected \[P, 16\]"),
        (Injection(prompt=np.zeros(16)), r"gives a prompt of shape \[16\], expected \[P, 16\]"),
        (Injection(layer_prompts=np.zeros((2, 3, 16))), r"of shape \[2, 3, 16\], expected \[1, P, 16\]"),
        (
            Injection(np.zeros((4, 16)), np.zeros((1, 3, 16))),
            r"layer prompts of shape \[1, 3, 16\], expected \[1, 4, 16\]",
        ),
        (Injection(task_prompts={"a": np.zeros((3, 16))}), r"gives prompts for \['a'\], expected one for each of its"),
        (Injection(parameters={"encoder/layers_0/mlp/wo/kernal": np.zeros(1)}), "which the model does not read"),
        (Injection(parameters={KERNEL: np.zeros((16, 32))}), r"of shape \[16, 32\], expected \[32, 16\]"),
    ],
)
def test_what_a_method_gives_must_fit_the_model(injection, message, model):
    with pytest.raises(ValueError, match=message):
        check_injection(PromptTuning(), injection, model.config, model.parameters)


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        (PromptTuning(0), "prompt_length", "`length` is 0, expected a whole number from 1 to"),
        (PromptTuning(5_000), "prompt_length", "is 5000, expected a whole number from 1 to"),
        (ResidualPrompt(4, 0), "bottleneck", "`bottleneck` is 0, expected a whole number of at least 1"),
        (PerLayerPrompt(0), "prompt_length", "is 0, expected a whole number from 1 to"),
        (PerLayerPrompt(4, combine="sum"), "combine", "`combine` is 'sum', expected one of 'replace', 'add'"),
        (MPT(TASKS, 0), "prompt_length", "is 0, expected a whole number from 1 to"),
        (
            MPT(TASKS, 4, rank=5),
            "rank",
            "`rank` is 5, expected a whole number from 1 to 4, the smaller side",
        ),
        (MPT(), "tasks", "`tasks` is empty, expected the tasks of a mixture, two or more"),
        (MPT(("reviews",)), "tasks", "`tasks` has one task, 'reviews', expected the tasks of a mixture"),
        (MPT(("a", "../b")), "tasks", r"has '\.\./b', expected a name that a file may have"),
        (MPT(("a", "b", "a")), "tasks", "has 'a' twice"),
        (
            MultitaskPrompt(TASKS, combine="ad"),
            "combine",
            "`combine` is 'ad', expected one of 'add', 'concatenate', .*; did you mean 'add'?",
        ),
        (MultitaskPrompt(TASKS, task_length=3), "task_length", "is only for 'concatenate': leave it out, or set `comb"),
        (MultitaskPrompt(TASKS, 4_000, "concatenate"), "prompt_length", "is 8000, expected a whole number from 1 to"),
        (
            MultitaskPrompt(TASKS, combine="concatenate_features", shared_features=16),
            "shared_features",
            "`shared_features` is 16, expected a whole number from 1 to 15",
        ),
        (LoRA(rank=17), "rank", "`rank` is 17, expected a whole number from 1 to 16"),
        (LoRA(rank=0), "rank", "`rank` is 0"),
    ],
)
def test_impossible_methods_are_refused_before_anything_is_read(method, setting, message, settings):
    with pytest.raises(SettingError, match=message) as refused:
        quiet(settings(None, method))
    assert refused.value.setting == setting


def test_prompt_tuning_keeps_the_path_of_t5x(model):
    """In a run's checkpoints the prompt lies where T5X has it."""
    assert [*PromptTuning(3, RandomUniform()).init(jax.random.key(0), model)] == [PROMPT] == ["encoder/prompt/prompt"]
