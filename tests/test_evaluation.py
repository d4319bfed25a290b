"""Evaluation of a real, tiny model on splits written by hand: answers, ranking and scores against slow definitions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, LENGTHS, random_params

from prompt_tuning_jax.batches.cache import CachedExamples
from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.batches.loader import Batches
from prompt_tuning_jax.inference import engine
from prompt_tuning_jax.inference.labels import written_labels
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.t5.log_likelihood import shift_right
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.tasks.review_grammar import unlabelled
from prompt_tuning_jax.tokenizers.vocabulary import EOS, Vocabulary
from prompt_tuning_jax.training import eval_run
from prompt_tuning_jax.training.evaluation import (
    Evaluator,
    check_labels,
    is_right,
    postprocess,
    takes_scores,
)
from prompt_tuning_jax.training.step import merge

POSTPROCESSORS, METRICS = "prompt_tuning_jax.tasks.postprocessors", "prompt_tuning_jax.tasks.metrics"
LABELS = ["negative", "positive"]
MODEL = Transformer(CONFIG)
SENTENCES = [*unlabelled(23)]


@pytest.fixture(scope="module")
def words(tiny):
    return Vocabulary(tiny.vocabulary)


@pytest.fixture(scope="module")
def evaluator(words):
    return Evaluator(CONFIG, words)


@pytest.fixture(scope="module")
def params():
    return {name: jnp.asarray(value) for name, value in random_params(1).items()}


@pytest.fixture
def split(words, tmp_path):
    """Writes a cache of texts and reads it back as batches."""
    made = iter(range(99))

    def make(texts, targets, *, fields=None, postprocessor="label_index", options=None, metrics=("accuracy",), rows=8):
        folder = tmp_path / str(next(made))
        folder.mkdir()
        for name, lines in (("inputs", texts), ("targets", targets)):
            tokens = [[*words.encode(line), EOS] for line in lines]
            np.save(folder / f"{name}.npy", np.concatenate([np.asarray(ids, np.int32) for ids in tokens]))
            np.save(folder / f"{name}_ends.npy", np.cumsum([len(ids) for ids in tokens], dtype=np.int64))
        kept = [
            {"inputs_pretokenized": text, "targets_pretokenized": target, "idx": place, **(fields or [{}] * 99)[place]}
            for place, (text, target) in enumerate(zip(texts, targets, strict=True))
        ]
        (folder / "fields.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        options = {"labels": LABELS} if options is None else options
        path = postprocessor if ":" in postprocessor else f"{POSTPROCESSORS}:{postprocessor}"
        task = {
            "name": "by_hand",
            "examples": len(texts),
            "postprocessor": {"function": path, "options": options},
            "metrics": [{"function": name if ":" in name else f"{METRICS}:{name}", "options": {}} for name in metrics],
        }
        (folder / "task.json").write_text(json.dumps(task))
        return Batches(CachedExamples(folder), rows, LENGTHS, shuffle=False)

    return make


@jax.jit
def forward(params, inputs, targets):
    return MODEL.apply({"params": merge({}, params)}, inputs, shift_right(targets, 0), targets, enable_dropout=False)


def logits(params, inputs, targets):
    """Of one row alone, teacher-forced, padded to the full lengths."""
    rows = np.zeros((1, LENGTHS["inputs"]), np.int32), np.zeros((1, 12), np.int32)
    for row, tokens in zip(rows, (inputs, targets), strict=True):
        row[0, : len(tokens)] = tokens
    return np.asarray(forward(params, *rows)[0, : len(targets)], np.float64)


def log_likelihood(params, inputs, targets):
    rows = logits(params, inputs, targets)
    rows -= np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True)) + rows.max(1, keepdims=True)
    return sum(row[token] for row, token in zip(rows, targets, strict=True))


def kept(words, text):
    return [*words.encode(text)[: LENGTHS["inputs"] - 1], EOS]


def test_answers_are_each_rows_own_greedy_decode(evaluator, params, split, words):
    """Whatever batch and bucket a row is in; the model's own words are compared, so any label set will do."""
    batches = split(SENTENCES, ["positive"] * len(SENTENCES))
    found = evaluator.answers(Injection(), params, batches)
    assert len({*found}) > 1
    for text, answer in zip(SENTENCES, found, strict=True):
        tokens = []
        while len(tokens) < LENGTHS["targets"] and EOS not in tokens:
            tokens.append(int(logits(params, kept(words, text), [*tokens, 3])[-1].argmax()))
        assert answer == words.decode(tokens)


def test_the_best_label_is_that_of_the_highest_likelihood(evaluator, params, split, words):
    """Of labels of different lengths, padded in one table."""
    labels = ["negative", "positive", "the plot was lovely in the end", "a"]
    batches = split(SENTENCES, ["a"] * len(SENTENCES), options={"labels": labels})
    found = evaluator.ranked(Injection(), params, batches)
    for text, answer in zip(SENTENCES, found, strict=True):
        scores = [log_likelihood(params, kept(words, text), [*words.encode(label), EOS]) for label in labels]
        assert answer == labels[int(np.argmax(scores))]
    assert evaluator.rank_metrics(Injection(), params, batches) == {"accuracy": 100 * found.count("a") / len(found)}


def test_ranking_runs_the_encoder_once_for_all_labels(evaluator, params, split, monkeypatch):
    from prompt_tuning_jax.t5 import network

    calls = []
    encode = network.Encoder.__call__
    monkeypatch.setattr(network.Encoder, "__call__", lambda *a, **k: (calls.append(1), encode(*a, **k))[1])
    engine._engine_of.cache_clear()
    fresh = Evaluator(CONFIG, evaluator._tokenizer)
    fresh.ranked(
        Injection(), params, split(SENTENCES[:4], ["positive"] * 4, options={"labels": ["a", "b", "c", "d", "e"]})
    )
    assert len(calls) == 1, "traced once, and outside the loop over the labels"


def test_a_transfer_task_ranks_the_words_it_was_trained_on(evaluator, params, split):
    """The same model and rows, the labels called otherwise in the targets: the same choices."""
    names = {"negative": "bad", "positive": "good"}
    plain = split(SENTENCES, ["positive"] * len(SENTENCES))
    transfer = split(SENTENCES, ["good"] * len(SENTENCES), options={"labels": ["bad", "good"], "translate": names})
    assert evaluator.ranked(Injection(), params, transfer) == evaluator.ranked(Injection(), params, plain)
    assert evaluator.rank_metrics(Injection(), params, transfer) == evaluator.rank_metrics(Injection(), params, plain)


def test_multirc_is_ranked_as_well(evaluator, params, split):
    count = len(SENTENCES)
    fields = [{"idx/paragraph": 0, "idx/question": row // 4, "idx/answer": row % 4} for row in range(count)]
    batches = split(
        SENTENCES, ["False", "True"] * (count // 2) + ["True"] * (count % 2), fields=fields, postprocessor="multirc",
        options={"labels": ["False", "True"]}, metrics=("multirc_f1a", "multirc_em"),
    )  # fmt: skip
    found = evaluator.rank_metrics(Injection(), params, batches)
    assert set(found) == {"f1", "exact_match"}
    truth = [fields["targets_pretokenized"] for fields in batches.examples.fields]
    assert postprocess(batches.examples, truth).metrics(batches.examples) == {"f1": 100.0, "exact_match": 100.0}
    assert (
        evaluator.rank_metrics(Injection(), params, split(SENTENCES, SENTENCES, postprocessor="text", options={}))
        is None
    )


def test_an_answer_is_the_label_as_the_vocabulary_writes_it(evaluator, params, split, words):
    """The tiny vocabulary folds case: a label in capitals is what the model answers in small letters."""
    plain = evaluator.answers(Injection(), params, split(SENTENCES, ["positive"] * len(SENTENCES)))
    said = next(text for text in plain if text != text.upper() and words.written(text.upper()) == text)
    label = said.upper()
    batches = split(SENTENCES, [label] * len(SENTENCES), options={"labels": [label, "negative"]})
    share = 100 * plain.count(said) / len(plain)
    found, invalid = evaluator.metrics(Injection(), params, batches)
    assert found == {"accuracy": pytest.approx(share)}
    assert said not in invalid and label not in invalid
    with pytest.raises(ValueError, match="'True' and 'TRUE' are both 'true' in the vocabulary .*: set"):
        written_labels(["True", "TRUE"], words)
    check_labels({"a": batches}, words)
    with pytest.raises(ValueError, match="b: the labels 'A' and 'a' are both 'a'"):
        check_labels({"a": batches, "b": split(["a"], ["a"], options={"labels": ["A", "a"]})}, words)


def test_a_sentinel_in_a_label_is_one_token(words):
    tokens = words.encode("<extra_id_0> positive")
    assert tokens == [words.size - 1, *words.encode("positive")]
    assert words.decode([*tokens, EOS]) == "<extra_id_0> positive"


def test_likelihoods_are_those_of_each_rows_targets(evaluator, params, split, words):
    targets = ["positive", "a", "the plot was dull", *["negative"] * (len(SENTENCES) - 3)]
    found = evaluator.likelihoods(Injection(), params, split(SENTENCES, targets))
    for text, target, value in zip(SENTENCES, targets, found, strict=True):
        expected = log_likelihood(params, kept(words, text), [*words.encode(target), EOS][: LENGTHS["targets"]])
        assert value == pytest.approx(expected, rel=1e-5)


def test_a_task_of_scored_choices_is_scored_and_not_generated(evaluator, params, split, words):
    """Every choice is a row (T5's rank classification): the accuracy is that of ranking the labels of the same rows."""
    rows = [(number, place) for number in range(8) for place in range(2)]
    fields = [{"idx": [number, place], "is_correct": place == number % 2} for number, place in rows]
    ranking = "prompt_tuning_jax.tasks.rank_classification"
    batches = split(
        [SENTENCES[number] for number, _ in rows], [LABELS[place] for _, place in rows], fields=fields,
        postprocessor=f"{ranking}:choice", options={}, metrics=(f"{ranking}:rank_classification",),
    )  # fmt: skip
    assert takes_scores(batches.examples)
    found, invalid = evaluator.metrics(Injection(), params, batches)
    plain = split(SENTENCES[:8], [LABELS[number % 2] for number in range(8)])
    assert not takes_scores(plain.examples)
    assert found == evaluator.rank_metrics(Injection(), params, plain)
    assert invalid == {}


def test_what_is_no_label_is_counted(split):
    examples = split(["a"] * 5, ["positive"] * 5).examples
    found = postprocess(examples, ["positive", "good", "negative", "good", ""])
    assert found.no_label() == {"good": 2, "": 1}
    result = eval_run.task_result(split(["a"] * 5, ["positive"] * 5), found, {"accuracy": 60.0})
    assert result == {
        "examples": 5,
        "generation": {"accuracy": 20.0},
        "ranking": {"accuracy": 60.0},
        "no_label": {"good": 2, "": 1},
        "no_label_count": 3,
        "score": 20.0,
        "ranking_score": 60.0,
    }
    numbers = split(["a"] * 3, ["3.8"] * 3, postprocessor="number", options={}, metrics=("pearson",))
    assert postprocess(numbers.examples, ["3.8", "four", "nan"]).no_label() == {"four": 1, "nan": 1}


def test_samples_are_right_and_wrong_answers(split):
    texts = [f"sentence {place}" for place in range(20)]
    examples = split(texts, ["positive", "negative"] * 10).examples
    found = postprocess(examples, ["positive"] * 20).samples(examples, 3)
    assert [len(rows) for rows in found.values()] == [3, 3]
    assert {row["targets"] for row in found["right"]} == {"positive"}
    assert {row["targets"] for row in found["wrong"]} == {"negative"}
    assert {row["prediction"] for rows in found.values() for row in rows} == {"positive"}
    assert {row["inputs"] for rows in found.values() for row in rows} <= {*texts}
    assert found == postprocess(examples, ["positive"] * 20).samples(examples, 3)


@pytest.mark.parametrize(
    "target, answer, right",
    [
        (1, 1, True), (1, 0, False), (-1, -1, False), (3.8, 3.8, True), ("a cat", "a cat", True),
        (["the cat", "dog"], "Dog.", True), (["the cat"], "hat", False),
        ({"group": 1, "value": 1}, {"group": 1, "value": 1}, True),
        ({"group": 1, "value": ["Bob"]}, {"group": 1, "value": "Ann"}, False),
    ],
)  # fmt: skip
def test_right_is_what_was_asked(target, answer, right):
    assert is_right(target, answer) is right


def result(**scores):
    return {"generation": {}, **scores}


def test_a_suites_score_is_the_mean_of_its_tasks():
    boolq, stsb, axb = result(score=60.0, ranking_score=70.0), result(score=20.0), result()
    assert eval_run.suite_result({"boolq": boolq, "axb": axb}) == {"score": 60.0, "ranking_score": 70.0}
    assert eval_run.suite_result({"boolq": boolq, "stsb": stsb}) == {"score": 40.0}
    assert eval_run.suite_result({"axb": axb}) == {}


def test_a_split_without_labels_is_not_scored(split):
    labelled, test = split(["a"], ["positive"]), split(["a"], ["<unk>"])
    wsc = split(["a"], ["Bob"], fields=[{"label": -1}], postprocessor="wsc", options={})
    eval_run.check_labelled({"labelled": labelled}, "validation")
    for batches in (test, wsc):
        with pytest.raises(ValueError, match="test of cb has no labels to score: set `validation` .*--submission=DIR"):
            eval_run.check_labelled({"labelled": labelled, "cb": batches}, "test")


class Splits(DatasetConfig):
    """A `DatasetConfig` for `evaluate_prompt`, over splits that are at hand."""

    def __init__(self, tasks):
        super().__init__("by_hand", "validation", 32, {"inputs": 64, "targets": 8})
        object.__setattr__(self, "_tasks", tasks)

    def check(self):
        """Nothing is set that could be wrong."""

    def eval_batches(self, vocabulary, **options):
        return self._tasks


def test_a_mixture_is_each_task_and_the_mean(tiny, evaluator, split, capsys):
    """Run unchecked for types: `Splits` stands in for a configuration that would read files."""
    tasks = {
        "reviews": split(SENTENCES, ["positive"] * len(SENTENCES)),
        "nine": split(SENTENCES[:9], ["negative"] * 9, metrics=("accuracy", "f1")),
    }
    evaluate = getattr(eval_run.evaluate_prompt, "__wrapped__", eval_run.evaluate_prompt)
    options = {"size": CONFIG, "initial_checkpoint_path": str(tiny.base)}
    found = evaluate(dataset=Splits(tasks), samples=2, **options)
    lines = capsys.readouterr().err.splitlines()
    base = {name: jnp.asarray(value) for name, value in random_params(0).items()}
    for name, batches in tasks.items():
        alone = evaluator.predictions(Injection(), base, batches), evaluator.rank_metrics(Injection(), base, batches)
        assert found["tasks"][name] == eval_run.task_result(batches, *alone)
    assert found["examples"] == len(SENTENCES) + 9 and found["task"] == "by_hand"
    for name, part in (("score", "generation"), ("ranking_score", "ranking")):
        means = [np.mean([*result[part].values()]) for result in found["tasks"].values()]
        assert found[name] == pytest.approx(np.mean(means))
    assert sum(line.startswith("reviews, wrong: prediction ") for line in lines) == 2
    assert all("targets 'positive' inputs " in line for line in lines if line.startswith("reviews"))
    one = evaluate(dataset=Splits({"nine": tasks["nine"]}), **options)
    common = {name: found[name] for name in ("task", "split", "base", "base_fingerprint", "prompt")}
    assert one == found["tasks"]["nine"] | common, "of one task, without a level in between"
