"""The official names: each resolves, reads TFDS's rows and scores answers; what was wrong behind some is right."""

import json
import math
import os
import subprocess
import sys

import mock_rows
import pytest
import seqio
import tensorflow as tf
from conftest import FIXTURES
from tiny import LENGTHS, ROOT

from prompt_tuning_jax.batches.build import find_task
from prompt_tuning_jax.batches.cache import TaskRequest
from prompt_tuning_jax.batches.examples import describe
from prompt_tuning_jax.tasks import TASK_MODULES, metrics, module_for, postprocessors, sources
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary

_CORE = json.loads((FIXTURES / "official_core_names.json").read_text())
TASKS, MIXTURES = _CORE["tasks"], _CORE["mixtures"]
_OTHERS = json.loads((FIXTURES / "official_other_names.json").read_text())
LONG = {"inputs": 512, "targets": 512}


@pytest.fixture(autouse=True)
def tfds_again():
    yield
    sources.set_data_dir(None)


def find(tiny, name):
    return find_task(TaskRequest(name, str(tiny.vocabulary), LENGTHS))


def mixture(tiny, name):
    """The tasks of a mixture and their rates."""
    __import__(module_for(name))
    found = seqio.MixtureRegistry.get(name)
    return {task.name: found.get_rate(task) for task in found.tasks}


def decoded(value):
    if isinstance(value, bytes):
        return value.decode()
    return [*map(decoded, value)] if getattr(value, "shape", ()) else value


def examples(task, split=None):
    split = split or ("validation" if "validation" in task.splits else next(iter(task.splits)))
    dataset = task.get_dataset(LONG, split, shuffle=False, seed=0, trim_output_features=False)
    return [{k: decoded(v) for k, v in example.items()} for example in dataset.as_numpy_iterator()]


def right_and_wrong(task, example):
    """An answer that should score in full, and one that should not score at all."""
    target = example["targets_pretokenized"]
    function = getattr(task.postprocessor, "func", task.postprocessor)
    if function is postprocessors.wsc:
        return (target, "nobody") if example["label"] else ("nobody", target)
    if function is postprocessors.number:
        return target, f"{5 - float(target)}"
    if answers := postprocessors.answers(task.postprocessor):
        place = task.postprocessor.keywords["labels"].index(target)
        return answers[place], answers[(place + 1) % len(answers)]
    return target, "zzz"


def score(task, found, answers):
    targets = [task.postprocessor(e["targets_pretokenized"], example=e, is_target=True) for e in found]
    predictions = [task.postprocessor(a, example=e, is_target=False) for a, e in zip(answers, found, strict=True)]
    return {name: value for metric in task.metric_fns for name, value in metric(targets, predictions).items()}


def built_today(tfds_name):
    """The version of a set that TFDS still builds."""
    if tfds_name.startswith("glue/"):
        return tfds_name.replace(":1.0.0", ":2.0.0")
    return {"cnn_dailymail:3.1.0": "cnn_dailymail:3.4.0"}.get(tfds_name, tfds_name)


# A correlation's floor is the opposite order; that of a share is none.
FLOORS = dict.fromkeys(("matthews_corrcoef", "pearson_corrcoef", "spearman_corrcoef"), -100.0)
UNSCORED = ("c4_", "glue_ax_")  # pre-training, and the one set whose labels no one has


@pytest.mark.parametrize("name", TASKS)
def test_a_task_resolves_makes_examples_and_scores_them(tiny, monkeypatch, name):
    expected = TASKS[name]
    asked = mock_rows.use(monkeypatch)
    task = find(tiny, name)
    if "splits" in expected:
        assert set(task.splits) == set(expected["splits"])
    found = examples(task)
    assert set(asked) == {built_today(expected["tfds"])}
    assert len(found) >= 1
    words = Vocabulary(tiny.vocabulary)
    for example in found:
        assert len(example["inputs"]) > 1 and example["inputs"][-1] == example["targets"][-1] == 1
        if "number" in expected:
            assert example["inputs"][0] == words.size - 1 - expected["number"]
    for function in filter(None, (task.postprocessor, *task.metric_fns)):
        json.dumps(describe(function))  # as a cache names it

    if any(part in name for part in UNSCORED):
        assert not task.metric_fns
        return
    assert task.metric_fns
    if metrics.rouge in task.metric_fns:
        pytest.importorskip("rouge_score")
        found = found[1:]  # ROUGE-2 of a single word is 0
    right, wrong = zip(*(right_and_wrong(task, example) for example in found), strict=True)
    scores = score(task, found, right)
    assert scores == pytest.approx(dict.fromkeys(scores, 100.0), abs=1e-4)  # STS-B's targets are rounded
    floor = score(task, found, wrong)
    assert floor == pytest.approx({metric: FLOORS.get(metric, 0.0) for metric in scores}, abs=1e-4)


METRICS = {
    "cola": {"matthews_corrcoef"},
    "sst2": {"accuracy"},
    "mrpc": {"f1", "accuracy"},
    "qqp": {"f1", "accuracy"},
    "stsb": {"pearson_corrcoef", "spearman_corrcoef"},
    "mnli": {"accuracy"},
    "mnli_matched": {"accuracy"},
    "mnli_mismatched": {"accuracy"},
    "qnli": {"accuracy"},
    "rte": {"accuracy"},
    "wnli": {"accuracy"},
    "ax": set(),
    "boolq": {"accuracy"},
    "cb": {"mean_3class_f1", "accuracy"},
    "copa": {"accuracy"},
    "multirc": {"f1", "exact_match"},
    "record": {"em", "f1"},
    "wic": {"accuracy"},
    "wsc_simple_eval": {"accuracy"},
    "axb": {"matthews_corrcoef"},
    "axg": {"accuracy"},
}


@pytest.mark.parametrize("name", METRICS)
def test_a_tasks_metrics_are_the_benchmarks(tiny, monkeypatch, name):
    """Of both RTEs, too. The official code has none for axb and axg, whose labels SuperGLUE's files hold."""
    mock_rows.use(monkeypatch)
    stems = (f"glue_{name}_v200", f"super_glue_{name}_v102", f"super_glue_{name.replace('_', '_v102_', 1)}")
    tasks = [find(tiny, f"taskless_{stem}") for stem in stems if f"taskless_{stem}" in TASKS]
    assert tasks
    for task in tasks:
        found = examples(task)
        assert set(score(task, found, [e["targets_pretokenized"] for e in found])) == METRICS[name]


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_has_the_official_tasks_and_rates(tiny, monkeypatch, name):
    found, expected = mixture(tiny, name), MIXTURES[name]
    if "mnli_and_dev" in name:  # bug 1, below
        prefix = name.partition("glue_")[0]
        expected = {f"{prefix}{task}": rate for task, rate in expected.items()}

    def plain(rates):  # `_examples` makes no difference here, and the official mixtures use both
        return {task.removesuffix("_examples"): rate for task, rate in rates.items()}

    assert plain(found) == plain(expected)
    mock_rows.use(monkeypatch)
    for task in found.keys() - TASKS.keys():
        assert examples(find(tiny, task))


def test_the_names_of_all_330_tasks_and_71_mixtures_are_there():
    for registry, kind, count in ((seqio.TaskRegistry, "tasks", 330), (seqio.MixtureRegistry, "mixtures", 71)):
        names = {*_CORE[kind], *_OTHERS[kind]}
        assert len(names) == count
        for name in names:
            __import__(module_for(name))
        assert names <= {*registry.names()}


@pytest.mark.parametrize("model", ["mt5_", "byt5_"])
def test_names_for_other_vocabularies(tiny, monkeypatch, model):
    """The same texts; what the tokens are is decided by VOCABULARY, and by the prefix for SeqIO alone."""
    mock_rows.use(monkeypatch)
    for name in ("taskless_glue_rte_v200", "task_index_super_glue_wsc_v102_simple_eval", "super_glue_record_v102"):
        assert examples(find(tiny, model + name)) == examples(find(tiny, name))
    seqio_own = seqio.TaskRegistry.get("byt5_taskless_glue_rte_v200").output_features["inputs"].vocabulary
    assert isinstance(seqio_own, seqio.ByteVocabulary)


def test_a_name_tells_its_module(tiny):
    """Every registered name is known by its beginning, so that a run imports one module and what that one needs."""
    source = f"""
import importlib, json, sys
import seqio
from prompt_tuning_jax import tasks
from prompt_tuning_jax.batches.build import find_task
from prompt_tuning_jax.batches.cache import TaskRequest

found = dict()
find_task(TaskRequest('taskless_glue_rte_v200', {str(tiny.vocabulary)!r}, {LENGTHS}))
found['a run'] = sorted(set(sys.modules) & set(tasks.TASK_MODULES))
for module in tasks.TASK_MODULES:
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        registry.reset()
    for other in tasks.TASK_MODULES:
        sys.modules.pop(other, None)
        vars(tasks).pop(other.rpartition('.')[2], None)
    importlib.import_module(module)
    found[module] = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
print(json.dumps(found))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True)
    registered = json.loads(done.stdout)
    assert registered.pop("a run") == ["prompt_tuning_jax.tasks.glue"]
    assert registered.keys() == set(TASK_MODULES)
    names = {name for members in registered.values() for name in members}
    assert len(names) > 1_000
    assert {module_for(name) for name in names} == set(TASK_MODULES)
    for name in names:
        assert name in registered[module_for(name)]


@pytest.mark.parametrize("name", ["zzz", "my_glue_task", "glue", "taskless_"])
def test_a_name_of_no_module(name):
    assert module_for(name) is None


# Section 3.5 of the reference: registered in the official code, and wrong there.


@pytest.mark.parametrize("suffix", ["", "_examples"])
@pytest.mark.parametrize("version", ["v002", "v200"])
def test_bug_1_the_mixtures_of_mnli_have_the_wording_of_their_name(tiny, monkeypatch, version, suffix):
    mock_rows.use(monkeypatch)
    sentinel = Vocabulary(tiny.vocabulary).size - 1 - 1
    for wording, starts in (("", "mnli hypothesis: "), ("taskless_", "hypothesis: "), ("task_index_", "hypothesis: ")):
        tasks = mixture(tiny, f"{wording}glue_mnli_and_dev_{version}{suffix}")
        assert len(tasks) == 3
        for name in tasks:
            for example in examples(find(tiny, name)):
                assert example["inputs_pretokenized"].startswith(starts)
                assert (example["inputs"][0] == sentinel) == (wording == "task_index_")


@pytest.mark.parametrize("suffix", ["", "_examples"])
@pytest.mark.parametrize("wording", ["", "taskless_", "task_index_"])
@pytest.mark.parametrize("version", ["v002", "v200"])
@pytest.mark.parametrize("target, answers", [("mrpc", "duplicate"), ("qqp", "equivalent")])
def test_bug_2_transfer_scores_the_other_tasks_words(tiny, monkeypatch, version, wording, suffix, target, answers):
    """Without `_examples`, the official tasks compare a dict with a number."""
    mock_rows.use(monkeypatch)
    trained = {"mrpc": "qqp", "qqp": "mrpc"}[target]
    task = find(tiny, f"{wording}glue_{target}_from_{trained}_{version}{suffix}")
    found = examples(task, "validation")
    assert [example["targets_pretokenized"] for example in found] == [
        {"mrpc": "equivalent", "qqp": "duplicate"}[target],
        {"mrpc": "not_equivalent", "qqp": "not_duplicate"}[target],
    ]
    assert score(task, found, [answers, f"not_{answers}"]) == {"f1": 100.0, "accuracy": 100.0}
    assert score(task, found, [answers, answers]) == {"f1": pytest.approx(200 / 3), "accuracy": 50.0}
    assert score(task, found, [f"not_{answers}", "neither"]) == {"f1": 0.0, "accuracy": 0.0}
    assert postprocessors.answers(task.postprocessor) == (f"not_{answers}", answers), "what ranking scores"


@pytest.mark.parametrize("suffix", ["", "_examples"])
@pytest.mark.parametrize("wording", ["taskless_", "task_index_"])
def test_bugs_3_and_4_dpr_has_a_postprocessor_and_accuracy(tiny, monkeypatch, wording, suffix):
    """The official postprocessor is a tuple, and the metrics of `task_index_` those of another task: none."""
    mock_rows.use(monkeypatch)
    task = find(tiny, f"{wording}dpr_v001_simple{suffix}")
    found = examples(task, "test")
    assert score(task, found, ["the flower", "The bee"]) == {"accuracy": 100.0}
    assert score(task, found, ["the flower", "the flower"]) == {"accuracy": 50.0}


def test_bug_5_every_question_of_a_passage_is_read(tiny, tmp_path):
    """The official conversion of MRQA's files keeps a passage's first."""
    questions = [{"qid": f"q{i}", "question": f"Which film {i}?", "answers": [f"film {i}"]} for i in range(3)]
    lines = [{"header": {"dataset": "DROP"}}, {"context": "Three films.", "qas": questions}]
    (tmp_path / "dev").mkdir()
    for name in ("DROP.jsonl", "dev/DROP.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources.set_data_dir(str(tmp_path))
    found = examples(find(tiny, "mrqa_drop_v100_examples"), "validation")
    assert [example["targets_pretokenized"] for example in found] == ["film 0", "film 1", "film 2"]


def test_bug_6_nothing_stands_on_a_glue_that_tfds_no_longer_builds(tiny, monkeypatch):
    asked = mock_rows.use(monkeypatch)
    old = [name for name, task in TASKS.items() if task["tfds"].endswith(":1.0.0") and "glue" in name]
    assert len(old) == 72
    for name in old:
        task = find(tiny, name)
        task.source.get_dataset(next(iter(task.splits)), shuffle=False)
    assert {version for _, _, version in (name.partition(":") for name in asked)} == {"2.0.0"}
    assert len({*asked}) == 12


def test_what_the_two_versions_of_a_name_give_is_the_same(tiny, monkeypatch):
    mock_rows.use(monkeypatch)
    for name in ("taskless_glue_stsb_{}", "task_index_glue_mrpc_from_qqp_{}"):
        assert examples(find(tiny, name.format("v002"))) == examples(find(tiny, name.format("v200")))


def test_scores_are_finite(tiny, monkeypatch):
    """Of answers that are all the same or none, for every metric there is."""
    mock_rows.use(monkeypatch)
    for name in ("glue_cola_v200", "glue_stsb_v200", "super_glue_cb_v102", "super_glue_multirc_v102"):
        task = find(tiny, name)
        found = examples(task)
        for answer in ("", "acceptable", "1.0", "True"):
            assert all(map(math.isfinite, score(task, found, [answer] * len(found)).values()))


def test_an_unlabelled_row_has_t5s_target(tiny, monkeypatch):
    for name, row in (
        ("super_glue_boolq_v102", "super_glue/boolq"),
        ("glue_stsb_v200", "glue/stsb"),
        ("glue_qqp_v002", "glue/qqp"),
    ):
        unlabelled = [one | {"label": type(one["label"])(-1)} for one in mock_rows.ROWS[row]]
        monkeypatch.setitem(mock_rows.ROWS, row, unlabelled)
        mock_rows.use(monkeypatch)
        task = find(tiny, name)
        assert {example["targets_pretokenized"] for example in examples(task, "test")} == {"<unk>"}
    monkeypatch.setitem(
        mock_rows.ROWS, "super_glue/record", [one | {"answers": []} for one in mock_rows.ROWS["super_glue/record"]]
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            mock_rows,
            "dataset",
            lambda rows: tf.data.Dataset.from_tensors(rows[0] | {"answers": tf.zeros([0], tf.string)}),
        )
        found = examples(find(tiny, "super_glue_record_v102"), "test")
    assert [(example["targets_pretokenized"], len(example["answers"])) for example in found] == [("<unk>", 0)]
