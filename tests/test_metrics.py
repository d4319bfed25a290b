"""Metrics against scikit-learn, scipy, rouge-score, and the benchmarks' definitions written out here."""

import collections
import functools
import math
import random
import re
import string

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from prompt_tuning_jax.tasks import metrics, postprocessors, rank_classification

labels = st.lists(st.tuples(st.integers(0, 1), st.integers(-1, 1)), min_size=1, max_size=40)
classes = st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 2)), min_size=1, max_size=40)
tenths = st.integers(-10, 50).map(lambda n: n / 10)
floats = st.floats(-5, 5, allow_subnormal=False)
numbers = st.lists(st.tuples(tenths, tenths), min_size=2, max_size=40) | st.lists(
    st.tuples(floats, floats), min_size=2, max_size=40
)
words = st.lists(
    st.sampled_from("the a an The cat, cat Cat. dog's dogs sat on-mat £5 'quote' – naïve . 7".split()), max_size=6
)
texts = words.map(" ".join) | st.text(max_size=12)
answers = st.lists(st.tuples(st.lists(texts, min_size=1, max_size=3), texts), min_size=1, max_size=12)


def unzip(pairs):
    return [list(part) for part in zip(*pairs, strict=True)]


@given(classes)
def test_accuracy_is_scikit_learns(pairs):
    targets, predictions = unzip(pairs)
    expected = 100 * sklearn.metrics.accuracy_score(targets, predictions)
    assert metrics.accuracy(targets, predictions) == {"accuracy": pytest.approx(expected)}


@given(labels)
def test_f1_is_scikit_learns_with_an_odd_answer_as_the_wrong_one(pairs):
    targets, predictions = unzip(pairs)
    told = [1 - target if found == -1 else found for target, found in pairs]
    expected = 100 * sklearn.metrics.f1_score(targets, told, zero_division=0.0)
    assert metrics.f1(targets, predictions) == {"f1": pytest.approx(expected)}


@given(classes)
def test_mean_f1_is_scikit_learns_macro_average(pairs):
    targets, predictions = unzip(pairs)
    expected = 100 * sklearn.metrics.f1_score(targets, predictions, labels=range(3), average="macro", zero_division=0.0)
    assert metrics.mean_f1(targets, predictions) == {"mean_3class_f1": pytest.approx(expected)}


@given(labels | classes)
def test_matthews_is_scikit_learns(pairs):
    targets, predictions = unzip(pairs)
    if len({*targets, *predictions}) == 1:
        return  # scikit-learn warns of a single label; the constant's test has it
    expected = 100 * sklearn.metrics.matthews_corrcoef(targets, predictions)
    assert metrics.matthews(targets, predictions) == {"matthews_corrcoef": pytest.approx(expected)}


@given(numbers)
def test_correlations_are_scipys(pairs):
    targets, predictions = unzip(pairs)
    spread = min(np.ptp(targets), np.ptp(predictions))
    if 0 < spread < 1e-6:
        return  # scipy warns that such values are nearly constant
    for metric, name, function in (
        (metrics.pearson, "pearson_corrcoef", scipy.stats.pearsonr),
        (metrics.spearman, "spearman_corrcoef", scipy.stats.spearmanr),
    ):
        expected = 100 * function(targets, predictions)[0] if spread else 0.0
        # Both round in the means; the tolerance is in per cent.
        assert metric(targets, predictions) == {name: pytest.approx(expected, abs=1e-7)}


def script_normalize(text):
    """`normalize_answer` of SQuAD v1.1's evaluate-v1.1.py: lower, punctuation, articles, white space, in that order."""
    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def script_f1(prediction, truth):
    """`f1_score` of the same."""
    found, wanted = script_normalize(prediction).split(), script_normalize(truth).split()
    common = collections.Counter(found) & collections.Counter(wanted)
    if sum(common.values()) == 0:
        return 0
    precision = sum(common.values()) / len(found)
    recall = sum(common.values()) / len(wanted)
    return 2 * precision * recall / (precision + recall)


def script(targets, predictions):
    """`evaluate` of the same: each the maximum over the ground truths, in per cent."""
    exact = overlap = 0
    for truths, prediction in zip(targets, predictions, strict=True):
        exact += max(script_normalize(prediction) == script_normalize(truth) for truth in truths)
        overlap += max(script_f1(prediction, truth) for truth in truths)
    return {"em": pytest.approx(100 * exact / len(targets)), "f1": pytest.approx(100 * overlap / len(targets))}


@given(answers)
def test_squad_is_its_script(pairs):
    targets, predictions = unzip(pairs)
    assert metrics.squad(targets, predictions) == script(targets, predictions)


def test_squad_of_some_answers():
    """Values worked out by hand."""
    assert metrics.squad([["the Denver Broncos", "Broncos"]], ["Denver Broncos!"]) == {"em": 100.0, "f1": 100.0}
    found = metrics.squad([["Denver Broncos"], ["1,000"]], ["the Broncos of Denver, Colorado", "1000"])
    assert found == {"em": 50.0, "f1": pytest.approx(100 * (2 * 2 / (2 + 4) + 1) / 2)}


@given(answers, st.randoms(use_true_random=False))
def test_record_counts_each_query_once(pairs, rng):
    """One example an answer, the model's answer to each the same: the metric is SQuAD's over the queries."""
    examples = [
        ({"group": (place // 3, place), "value": truths}, {"group": (place // 3, place), "value": found})
        for place, (truths, found) in enumerate(pairs)
        for _ in truths
    ]
    rng.shuffle(examples)
    assert metrics.record(*unzip(examples)) == script(*unzip(pairs))


questions = st.lists(
    st.lists(st.tuples(st.integers(0, 1), st.integers(-1, 1)), min_size=1, max_size=5), min_size=1, max_size=8
)


@given(questions, st.randoms(use_true_random=False))
def test_multirc_judges_answers_and_questions(questions, rng):
    """F1a: precision and recall over the set of all answers; EM: questions with every answer right."""
    examples = [
        ({"group": (number // 2, number), "value": target}, {"group": (number // 2, number), "value": found})
        for number, judged in enumerate(questions)
        for target, found in judged
    ]
    rng.shuffle(examples)
    judged = [pair for question in questions for pair in question]
    both = sum(pair == (1, 1) for pair in judged)
    claimed = sum(found == 1 or (found == -1 and target == 0) for target, found in judged)
    true = sum(target for target, _ in judged)
    f1a = 2 * (both / claimed) * (both / true) / (both / claimed + both / true) if both else 0.0
    assert metrics.multirc_f1a(*unzip(examples)) == {"f1": pytest.approx(100 * f1a)}
    whole = sum(all(target == found for target, found in question) for question in questions)
    assert metrics.multirc_em(*unzip(examples)) == {"exact_match": pytest.approx(100 * whole / len(questions))}


SENTENCES = "the cat sat on the mat . a dog barked at dusk . she left early and he stayed . it was cold ."


def test_rouge_is_rouge_scores_mean():
    """And so lies within what T5 reports, the middle of random resamplings of the same scores."""
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    from rouge_score.scoring import BootstrapAggregator

    rng = random.Random(0)
    pairs = [[" ".join(rng.choices(SENTENCES.split(), k=rng.randint(0, 30))) for _ in range(2)] for _ in range(40)]
    pairs.append([SENTENCES, SENTENCES])
    targets, predictions = unzip(pairs)
    found = metrics.rouge(targets, predictions)
    assert list(found) == ["rouge1", "rouge2", "rougeLsum"]
    scorer, aggregator = rouge_scorer.RougeScorer([*found]), BootstrapAggregator()
    for target, prediction in pairs:
        aggregator.add_scores(scorer.score(target.replace(" . ", " .\n"), prediction.replace(" . ", " .\n")))
    for name, value in aggregator.aggregate().items():
        assert 100 * value.low.fmeasure < found[name] < 100 * value.high.fmeasure
        assert found[name] == pytest.approx(100 * value.mid.fmeasure, abs=1.0)  # the resampling is not seeded
    # Sentences count for Lsum: the same in another order is all there.
    swapped = "a dog barked at dusk . the cat sat on the mat ."
    straight = "the cat sat on the mat . a dog barked at dusk ."
    assert metrics.rouge([straight], [swapped])["rougeLsum"] == pytest.approx(100.0)
    assert metrics.rouge([straight], [swapped])["rouge2"] < 100.0


def test_rouge_without_its_package_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(ValueError, match="pip install rouge-score"):
        metrics.rouge(["a"], ["a"])


def grouped(values, size=2):
    return [{"group": (0, place // size), "value": value} for place, value in enumerate(values)]


# For each metric: targets, and the worst predictions there are.
LABELS, WRONG = [0, 1, 1, 0, 1, 0], [1, 0, 0, 1, 0, 1]
TEXTS = ["two cats", "a dog sat", "on the mat"]
CASES = {
    metrics.accuracy: (LABELS, WRONG, 0.0),
    metrics.f1: (LABELS, WRONG, 0.0),
    metrics.mean_f1: ([0, 1, 2, 2], [1, 2, 0, 1], 0.0),
    metrics.matthews: (LABELS, WRONG, -100.0),
    metrics.pearson: ([0.2, 1.0, 3.8], [-0.2, -1.0, -3.8], -100.0),
    metrics.spearman: ([0.2, 1.0, 3.8], [5.0, 3.0, 2.8], -100.0),
    metrics.multirc_f1a: (grouped(LABELS), grouped(WRONG), 0.0),
    metrics.multirc_em: (grouped(LABELS), grouped(WRONG), 0.0),
    metrics.squad: ([[text, "else"] for text in TEXTS], ["nothing"] * 3, 0.0),
    metrics.record: (grouped([[text] for text in TEXTS], 1), grouped(["nothing"] * 3, 1), 0.0),
    metrics.rouge: (TEXTS, ["nothing"] * 3, 0.0),
}
every_metric = pytest.mark.parametrize("metric", CASES, ids=lambda metric: metric.__name__)


def told(metric, target):
    """The answer that is the target."""
    if metric is metrics.squad:
        return target[0]
    return target | {"value": target["value"][0]} if metric is metrics.record else target


@every_metric
def test_a_perfect_prediction_scores_100_and_a_wrong_one_its_floor(metric):
    if metric is metrics.rouge:
        pytest.importorskip("rouge_score")
    targets, wrong, floor = CASES[metric]
    assert all(value == pytest.approx(100.0) for value in metric(targets, [told(metric, t) for t in targets]).values())
    assert all(value == pytest.approx(floor) for value in metric(targets, wrong).values())


@every_metric
def test_the_order_of_examples_does_not_matter(metric):
    if metric is metrics.rouge:
        pytest.importorskip("rouge_score")
    targets, wrong, _ = CASES[metric]
    mixed = [told(metric, target) for target in targets[:1]] + wrong[1:]
    expected = metric(targets, mixed)
    rng = random.Random(0)
    for _ in range(5):
        order = rng.sample(range(len(targets)), len(targets))
        found = metric([targets[place] for place in order], [mixed[place] for place in order])
        assert found == pytest.approx(expected)


@every_metric
def test_of_no_examples_a_metric_is_0(metric):
    if metric is metrics.rouge:
        pytest.importorskip("rouge_score")
    assert set(metric([], []).values()) == {0.0}


@every_metric
def test_a_prediction_too_few_is_an_error(metric):
    if metric is metrics.rouge:
        pytest.importorskip("rouge_score")
    targets, wrong, _ = CASES[metric]
    with pytest.raises(ValueError):
        metric(targets, wrong[:-1])


@pytest.mark.parametrize("metric", [metrics.matthews, metrics.pearson, metrics.spearman])
def test_a_constant_correlates_with_nothing(metric):
    """0.1 is the one whose mean is not itself in binary."""
    varied = [0.0, 1.0, 1.0, 0.0, 3.0]
    for constant in (0.0, 0.1, 1.0):
        for targets, predictions in (([constant] * 5, varied), (varied, [constant] * 5), ([constant] * 5,) * 2):
            assert set(metric(targets, predictions).values()) == {0.0}
    assert set(metric([1.0], [1.0]).values()) == {0.0}


def test_huge_numbers_correlate_without_overflow():
    huge = [1e300, -1e308, 1.7e308, 0.0]
    assert metrics.pearson(huge, huge)["pearson_corrcoef"] == pytest.approx(100.0)
    assert math.isfinite(metrics.pearson([0.0, 1.0, 2.0, 3.0], huge)["pearson_corrcoef"])


def test_an_answer_that_is_no_label_is_never_right():
    """Not even where the target has none."""
    for metric in (metrics.accuracy, metrics.f1, metrics.mean_f1):
        assert set(metric([1, 1, 1], [-1, -1, -1]).values()) == {0.0}
    assert metrics.accuracy([-1], [-1]) == {"accuracy": 0.0}
    assert metrics.multirc_em(grouped([-1, 1]), grouped([-1, 1])) == {"exact_match": 0.0}


def test_a_tasks_score_is_the_mean_of_its_metrics_and_a_suites_of_its_tasks():
    assert metrics.task_score({"f1": 90.0, "accuracy": 80.0}) == 85.0
    assert metrics.task_score({}) is None
    assert metrics.suite_score({"cb": 85.0, "rte": 70.0, "axb": None}) == 77.5
    assert metrics.suite_score({"axb": None}) is None


def test_a_label_is_its_place():
    index = functools.partial(postprocessors.label_index, labels=["False", "True"])
    assert [index(text, example={}, is_target=False) for text in ("False", "True", "true", "True ", "")] == [
        0,
        1,
        -1,
        -1,
        -1,
    ]


def test_a_transfer_task_reads_the_other_tasks_words():
    """MRPC by a prompt of QQP's: predictions in QQP's words, targets in MRPC's."""
    index = functools.partial(
        postprocessors.label_index,
        labels=["not_equivalent", "equivalent"],
        translate={"duplicate": "equivalent", "not_duplicate": "not_equivalent"},
    )
    assert [index(text) for text in ("duplicate", "not_duplicate", "equivalent", "not_equivalent")] == [1, 0, 1, 0]
    assert index("duplicates") == -1
    assert postprocessors.answers(index) == ("not_duplicate", "duplicate")


def test_the_closed_set_of_answers_is_in_the_labels_order():
    assert postprocessors.answers(functools.partial(postprocessors.multirc, labels=["False", "True"])) == (
        "False",
        "True",
    )
    for open_set in (
        postprocessors.qa,
        postprocessors.number,
        functools.partial(postprocessors.text),
        lambda text: text,
    ):
        assert postprocessors.answers(open_set) is None


@pytest.mark.parametrize(
    "text, value",
    [("3.8", 3.8), (" 4 ", 4.0), ("-1.0", -1.0), ("four", -1.0), ("", -1.0), ("nan", -1.0), ("inf", -1.0)],
)
def test_a_number_is_finite_or_minus_one(text, value):
    assert postprocessors.number(text, example={}, is_target=False) == value


def test_multirc_groups_by_question():
    fields = {"idx/paragraph": 3, "idx/question": 17, "idx/answer": 0}
    read = functools.partial(postprocessors.multirc, labels=["False", "True"], example=fields)
    assert [read(text, is_target=False)["value"] for text in ("True", "False", "maybe")] == [1, 0, -1]
    other = postprocessors.multirc("True", {**fields, "idx/question": 18}, labels=["False", "True"])
    assert read("True")["group"] == read("no")["group"] != other["group"]


def test_questions_and_records_have_all_their_answers():
    fields = {"answers": ["Denver", "Broncos"], "idx/passage": 2, "idx/query": 5}
    assert postprocessors.qa("Denver", fields, is_target=True) == ["Denver", "Broncos"]
    assert postprocessors.qa("Denver", fields, is_target=False) == "Denver"
    target, found = (postprocessors.record("Denver", fields, is_target=flag) for flag in (True, False))
    assert (target["value"], found["value"]) == (["Denver", "Broncos"], "Denver")
    assert target["group"] == found["group"] == (2, 5)
    assert postprocessors.text("Denver", example=fields, is_target=True) == "Denver"


@pytest.mark.parametrize(
    "candidate, answer, expected",
    [
        ("the fuzzy bunny", "bunny", 1),
        ("bunny", "The Fuzzy Bunny", 1),
        ("his bunny", "bunny of Bob", 1),
        ("Bob's hat", "Bob", 0),
        ("Bob's hat", "bob's", 1),
        ("fuzzy bunny", "fuzzy cat", 0),
        ("bunny", "the", -1),
        ("bunny", "  ", -1),
        ("his", "bunny", 0),
    ],
)
def test_wsc_compares_words_without_determiners(candidate, answer, expected):
    fields = {"targets_pretokenized": candidate, "label": 1}
    assert postprocessors.wsc(answer, fields, is_target=False) == expected
    assert postprocessors.wsc(answer, fields | {"label": 0}, is_target=True) == 0


def test_no_label_is_told_from_the_rest():
    for value in (-1, -1.0, {"group": 3, "value": -1}):
        assert postprocessors.is_no_label(value)
    for value in (0, 1, 3.8, "-1", ["-1"], {"group": -1, "value": 0}, {"group": (0, 1), "value": ["-1"]}):
        assert not postprocessors.is_no_label(value)


def test_shares_are_rounded_once():
    """23 of 40 are 57.5 per cent, though 100 * 0.575 is 57.49999999999999."""
    wanted, found = [1] * 40, [1] * 23 + [0] * 17
    assert metrics.accuracy(wanted, found) == {"accuracy": 57.5}
    for right in range(101):
        assert metrics.accuracy([1] * 100, [1] * right + [0] * (100 - right)) == {"accuracy": float(right)}
        questions = [{"group": n, "value": 1} for n in range(100)]
        answers = [{"value": int(n < right)} for n in range(100)]
        assert metrics.multirc_em(questions, answers) == {"exact_match": float(right)}
    for both in range(51):
        wanted, found = [1] * 50 + [0] * 50, [1] * both + [0] * (50 - both) + [1] * (50 - both) + [0] * both
        assert metrics.f1(wanted, found) == {"f1": 2.0 * both}
    choices = [rank_classification.Choice((n, place), place == 0, 1) for n in range(40) for place in (0, 1)]
    scores = [float(n < 23) if place == 0 else 0.5 for n in range(40) for place in (0, 1)]
    assert rank_classification.rank_classification(choices, scores) == {"accuracy": 57.5}
