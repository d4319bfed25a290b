"""Tasks made of others' parts: SPoT's, recycling's, the perceptron's and the sentinel variants."""

import json
import lzma

import numpy as np
import pytest
import seqio
import sklearn.metrics
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from task_rows import dataset, examples, plain, register, texts

from prompt_tuning_jax.batches.build import build_missing
from prompt_tuning_jax.batches.cache import TaskRequest, load_tasks
from prompt_tuning_jax.batches.examples import describe
from prompt_tuning_jax.tasks import perceptron, postprocessors
from prompt_tuning_jax.tasks.derived import Splits, parts_of
from prompt_tuning_jax.tasks.rank_classification import Choice, choice, rank_classification
from prompt_tuning_jax.tasks.wrapped_postprocessors import after_sentinel, of_choices
from prompt_tuning_jax.tokenizers.vocabulary import EOS, Vocabulary
from prompt_tuning_jax.training.evaluation import postprocess, takes_scores

register("spot", "recycling", "sentinel")


def write(folder, name, rows):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sst2(folder, count=12):
    (folder / "SST-2").mkdir()
    rows = [f"film {n} \t{n % 2}" for n in range(count)]
    for name in ("train", "dev"):
        (folder / "SST-2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return folder


class Numbers(seqio.DataSource):
    """Rows 0 to 9, as a source of TFDS's may be: of a size that is known, or not."""

    def __init__(self, known):
        self._known = known
        super().__init__(splits=("train", "other"))

    supports_arbitrary_sharding = False

    def list_shards(self, split):
        return [split]

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, *, num_epochs=1):
        dataset = tf.data.Dataset.range(10) if split == "train" else tf.data.Dataset.range(100, 103)
        dataset = dataset if self._known else dataset.filter(lambda _: True)
        return (dataset.shuffle(10, seed=seed) if shuffle else dataset).repeat(num_epochs)


def numbers(source, split, **options):
    return [int(n) for n in source.get_dataset(split, **{"shuffle": False} | options)]


@pytest.mark.parametrize("known", [True, False])
def test_a_split_may_be_a_slice_of_another(known):
    source = Splits(Numbers(known), {"train": "train[:-3]", "validation": "train[-3:]", "test": "other"})
    assert set(source.splits) == {"train", "validation", "test"}
    assert numbers(source, "train") == [*range(7)]
    assert numbers(source, "validation") == [7, 8, 9]
    assert numbers(source, "test") == [100, 101, 102]
    assert numbers(source, "validation", num_epochs=2) == [7, 8, 9] * 2
    shards = [numbers(source, "train", shard_info=seqio.ShardInfo(n, 2)) for n in range(2)]
    assert sorted(sum(shards, [])) == [*range(7)]


def test_a_slice_is_the_same_however_it_is_shuffled():
    source = Splits(Numbers(True), {"train": "train[:-3]", "validation": "train[-3:]"})
    orders = [numbers(source, "train", shuffle=True, seed=seed) for seed in range(4)]
    assert all(sorted(order) == [*range(7)] for order in orders) and len({*map(tuple, orders)}) > 1


def test_a_slice_of_too_little_is_refused():
    with pytest.raises(ValueError, match=r"train\[:-500\] of 10 rows is empty: set `data_dir`"):
        numbers(Splits(Numbers(True), {"train": "train[:-500]"}), "train")


# What T5's and the official preprocessors make of such rows (official_golden_texts.json).
NLI = {"hypothesis": "H.", "premise": "P.", "context": "C.", "label": 0}


@pytest.mark.parametrize(
    "task, file, row, inputs, targets",
    [
        ("spot_anli_r1_v010", "train.jsonl", NLI, "anli_r1 hypothesis: H. context: C.", "entailment"),
        ("spot_snli_v110", "snli/train.jsonl", NLI, "snli hypothesis: H. premise: P.", "entailment"),
        ("spot_doc_nli_v100", "train.jsonl", NLI, "doc_nli hypothesis: H. premise: P.", "not_entailment"),
        (
            "spot_aeslc_v100",
            "aeslc/train.jsonl",
            {"email_body": "Body.", "subject_line": "Subj."},
            "aeslc summarize: Body.",
            "Subj.",
        ),
        ("xsum_v110_examples", "train.jsonl", {"document": "Doc.", "summary": "Sum."}, "summarize: Doc.", "Sum."),
        (
            "cnn_dailymail_v310_examples",
            "train.jsonl",
            {"article": "Art.", "highlights": "Hi."},
            "summarize: Art.",
            "Hi.",
        ),
        (
            "pr:imdb_v100_negative_positive_verbalizers_test",
            "imdb_test.jsonl",
            {"text": "Great<br />film.", "label": 1},
            "Great<br />film.",
            "positive",
        ),
    ],
)
def test_texts_are_the_official_ones(tmp_path, task, file, row, inputs, targets):
    write(tmp_path, file, [row])
    split = "validation" if task.startswith("pr:") else "train"
    assert texts(task, split, tmp_path) == [{"inputs": inputs, "targets": targets}]


def test_spots_glue_keeps_the_tasks_name(tmp_path):
    first = texts("spot_glue_sst2_v200", "train", sst2(tmp_path))[0]
    assert first == {"inputs": "sst2 sentence: film 0 ", "targets": "negative", "idx": 0}


def test_spots_mnli_is_one_task_a_split():
    mixture = seqio.MixtureRegistry.get("spot_glue_mnli_and_dev_v200")
    assert {task.name: set(task.splits) for task in mixture.tasks} == {
        "spot_glue_mnli_train_v200": {"train"},
        "spot_glue_mnli_validation_matched_v200": {"validation"},
        "spot_glue_mnli_validation_mismatched_v200": {"validation"},
    }


REVIEWS = [{"text": f"film {n}", "label": n % 2, "idx": n} for n in range(4)]


def test_every_label_is_an_example_to_score(tmp_path):
    write(tmp_path, "imdb_test.jsonl", REVIEWS)
    rows = texts("pr:imdb_v100_0_1_verbalizers_test", "validation", tmp_path)
    choices = texts("pr:imdb_v100_0_1_verbalizers_test_rc", "validation", tmp_path)
    assert choices == [
        {"idx": [n, place], "inputs": row["inputs"], "targets": label, "is_correct": label == row["targets"]}
        for n, row in enumerate(rows)
        for place, label in enumerate("01")
    ]
    assert {row["targets"] for row in rows} == {"0", "1"}


RECORD = {
    "idx": 3,
    "passage": {
        "text": "Ann met Bob and Cid.\n@highlight\nHi one\n@highlight\nHi two",
        "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 16, "end": 18}],
    },
    "qas": [
        {"query": f"{query} did @placeholder .", "idx": n, "answers": [{"text": text} for text in answers]}
        for n, (query, answers) in enumerate([("X", ["Ann", "Bob"]), ("Y", ["Cid"])])
    ],
}


def test_every_entity_of_record_is_an_example_to_score(tmp_path):
    write(tmp_path, "ReCoRD/val.jsonl", [RECORD])
    assert texts("pr:super_glue_record_v102_rc", "validation", tmp_path) == [
        {
            "idx": [n, place],
            "inputs": f"query: {query} did @placeholder . entities: Ann, Bob, Cid "
            "passage: Ann met Bob and Cid. Hi one. Hi two",
            "targets": entity,
            "is_correct": entity in right,
        }
        for n, (query, right) in enumerate([("X", ("Ann", "Bob")), ("Y", ("Cid",))])
        for place, entity in enumerate(("Ann", "Bob", "Cid"))
    ]
    generated = texts("pr:super_glue_record_v102_test", "validation", tmp_path)
    assert [row["targets"] for row in generated] == ["Ann", "Bob", "Cid"], "an example for each answer"


@pytest.mark.parametrize(
    "name, words",
    [
        ("0_1", ("0", "1")),
        ("not_duplicate_duplicate", ("not_duplicate", "duplicate")),
        ("unique_duplicate", ("unique", "duplicate")),
        ("not_spc_duplicate_duplicate", ("not duplicate", "duplicate")),
    ],
)
def test_verbalizers_of_real_question_pairs(data_dir, tmp_path, name, words):
    """GLUE's format, with the header that this part of it lacks; one of its rows lacks a cell."""
    rows = (data_dir / "qqp" / "gluetrain_part_23496.tsv").read_text("utf-8").splitlines()
    rows = [row for row in rows[:300] if row.count("\t") == 5]
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    (tmp_path / "QQP").mkdir()
    (tmp_path / "QQP" / "dev.tsv").write_text("\n".join([header, *rows]) + "\n", "utf-8")
    found = texts(f"pr:glue_qqp_v200_{name}_verbalizers_test", "validation", tmp_path)
    assert [(row["inputs"], row["targets"]) for row in found] == [
        (f"question1: {one} question2: {two}", words[int(label)])
        for _, _, _, one, two, label in (row.split("\t") for row in rows)
    ]
    assert found[0]["inputs"] == (
        "question1: What causes stool color to change to yellow? "
        "question2: What can cause stool to come out as little balls?"
    )
    ranked = texts(f"pr:glue_qqp_v200_{name}_verbalizers_rc", "validation", tmp_path)
    assert len(ranked) == 2 * len(rows)
    assert [row["targets"] for row in ranked if row["is_correct"]] == [row["targets"] for row in found]


def test_all_of_imdb_in_its_two_parts(data_dir):
    """The last thousand rows are for early stopping; the texts are the file's, and the labels in other words."""
    folder, task = data_dir / "imdb", "pr:imdb_v100_0_1_verbalizers_train"
    rows = {split: dataset(task, split, folder) for split in ("train", "validation")}
    assert {split: int(part.cardinality()) for split, part in rows.items()} == {"train": 24_000, "validation": 1_000}
    with lzma.open(folder / "imdb_train.jsonl.xz", "rt", encoding="utf-8") as lines:
        label_of = {row["text"]: row["label"] for row in map(json.loads, lines)}
    found = [plain(row) for row in rows["validation"].take(50).as_numpy_iterator()]
    assert {row["targets"] for row in found} == {"0", "1"}
    assert found[0]["inputs"].startswith("Had this movie been made a few years later, I would have given it a lower")
    assert all(row["targets"] == str(label_of[row["inputs"]]) for row in found)


# Ranking.


def ranked(rows):
    """Targets and scores of [(right place, scores)]."""
    targets = [
        Choice((n, place), place == right, length)
        for n, (right, scores) in enumerate(rows)
        for place, (_, length) in enumerate(scores)
    ]
    return targets, [score for _, scores in rows for score, _ in scores]


scores = st.tuples(st.integers(-40, 0).map(lambda n: n / 4), st.integers(1, 5))


def rows_of(classes):
    row = st.tuples(st.integers(0, classes - 1), st.lists(scores, min_size=classes, max_size=classes))
    return st.lists(row, min_size=1, max_size=30)


@given(rows_of(2), st.booleans(), st.randoms(use_true_random=False))
def test_two_classes_are_measured_as_t5_measures_them(rows, normed, random):
    """By scikit-learn, as T5 calls it; the examples may come in any order."""
    targets, flat = ranked(rows)
    pairs = [*zip(targets, flat, strict=True)]
    random.shuffle(pairs)
    found = rank_classification(*zip(*pairs, strict=True), num_classes=2, normalize_by_target_length=normed)
    per_class = np.array([[s / (n if normed else 1) for s, n in row] for _, row in rows])
    wanted = np.array([right for right, _ in rows])
    best = per_class.argmax(axis=1)
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(wanted, best),
        "f1": sklearn.metrics.f1_score(wanted, best, zero_division=0),
    }
    lead = per_class[:, 1] - per_class[:, 0]
    if 0 < wanted.sum() < len(wanted):
        expected["auc-roc"] = sklearn.metrics.roc_auc_score(wanted, lead)
        expected["auc-pr"] = sklearn.metrics.average_precision_score(wanted, lead)
    for name, value in expected.items():
        assert found[name] == pytest.approx(100 * value), name
    assert set(found) == {"accuracy", "f1", "auc-roc", "auc-pr"} and all(0 <= v <= 100 for v in found.values())


@given(rows_of(3))
def test_three_classes_have_their_mean_f1(rows):
    targets, flat = ranked(rows)
    found = rank_classification(targets, flat, num_classes=3, prefix="normed_")
    wanted = [right for right, _ in rows]
    best = [int(np.argmax([score for score, _ in row])) for _, row in rows]
    f1 = sklearn.metrics.f1_score(wanted, best, average="macro", labels=range(3), zero_division=0)
    accuracy = sklearn.metrics.accuracy_score(wanted, best)
    assert found == pytest.approx({"normed_accuracy": 100 * accuracy, "normed_mean_3class_f1": 100 * f1})


def test_any_of_several_right_choices_counts():
    targets = [Choice((0, 0), False, 1), Choice((0, 1), True, 2), Choice((0, 2), True, 9), Choice((1, 0), True, 1)]
    targets.append(Choice((1, 1), False, 1))
    assert rank_classification(targets, [-3.0, -2.0, -1.0, -5.0, -4.0]) == {"accuracy": 50.0}
    assert rank_classification(targets, [-3.0, -7.0, -18.0, -3.0, -4.0]) == {"accuracy": 50.0}
    by_length = rank_classification(targets, [-3.0, -7.0, -18.0, -3.0, -4.0], normalize_by_target_length=True)
    assert by_length == {"accuracy": 100.0}


def test_ranking_refuses_what_it_cannot_rank():
    whole = [Choice((0, 0), True, None), Choice((0, 1), False, None)]
    with pytest.raises(ValueError, match="do not hold their targets"):
        rank_classification(whole, [0.0, 0.0], normalize_by_target_length=True)
    with pytest.raises(ValueError, match="expected 3 choices of every example"):
        rank_classification(whole, [0.0, 0.0], num_classes=3)


def test_a_choice_is_known_by_its_numbers(tmp_path, tiny):
    write(tmp_path, "imdb_test.jsonl", REVIEWS)
    name = "pr:imdb_v100_negative_positive_verbalizers_test_rc"
    found = examples(name, "validation", tmp_path, tiny.vocabulary)
    words = Vocabulary(tiny.vocabulary)
    for n, example in enumerate(found):
        label = ("negative", "positive")[n % 2]
        length = len(words.encode(label)) + 1
        assert choice(label, example=example, is_target=True) == Choice(
            (n // 2, n % 2), bool(example["is_correct"]), length
        )
    assert choice(-1.5, example=found[0], is_target=False) == -1.5
    (metric,) = seqio.TaskRegistry.get(name).score_metric_fns
    targets = [choice("", example=example, is_target=True) for example in found]
    perfect = metric(targets, [float(target.is_correct) for target in targets])
    assert set(perfect.values()) == {100.0}
    wrong = metric(targets, [-float(target.is_correct) for target in targets])
    assert wrong["accuracy"] == wrong["auc-roc"] == 0.0


def cached(folder, tiny, name, split="validation"):
    """A split as a run reads it, from a cache."""
    request = TaskRequest(name, str(tiny.vocabulary), {"inputs": 32, "targets": 8}, str(folder))
    build_missing(request, split, folder / "cache", False)
    return load_tasks(request, split, folder / "cache")[name].examples


@pytest.mark.parametrize(
    "name, normed",
    [
        ("glue_sst2_v200_rank_classification_test", False),
        ("pr:glue_qqp_v200_not_duplicate_duplicate_verbalizers_rc", False),
        ("pr:glue_qqp_v200_not_duplicate_duplicate_verbalizers_rc_normed", True),
    ],
)
def test_a_cached_ranking_is_its_definition(tmp_path, tiny, name, normed):
    """Every choice is a row to score; the score is over the tokens of the choice where the task says so."""
    count = 12
    if "sst2" in name:
        sst2(tmp_path, count)
    else:
        (tmp_path / "QQP").mkdir()
        lines = [f"{n}\t1\t2\tfilm {n}?\tplot {n}?\t{n % 2}" for n in range(count)]
        header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
        (tmp_path / "QQP" / "dev.tsv").write_text("\n".join([header, *lines]) + "\n")
    found = cached(tmp_path, tiny, name)
    assert takes_scores(found) and len(found) == 2 * count
    lengths = found.targets.lengths.reshape(count, 2)
    assert (lengths[:, 0] != lengths[:, 1]).all() or not normed
    scores = -np.random.default_rng(0).uniform(1, 9, (count, 2))
    predictions = postprocess(found, scores.reshape(-1).tolist())
    assert [target.is_correct for target in predictions.targets] == [
        place == n % 2 for n in range(count) for place in (0, 1)
    ]
    each = scores / lengths if normed else scores
    wanted, best = np.arange(count) % 2, each.argmax(axis=1)
    assert (scores.argmax(axis=1) != best).any() or not normed
    expected = {
        "accuracy": (wanted == best).mean(),
        "f1": sklearn.metrics.f1_score(wanted, best),
        "auc-roc": sklearn.metrics.roc_auc_score(wanted, each[:, 1] - each[:, 0]),
        "auc-pr": sklearn.metrics.average_precision_score(wanted, each[:, 1] - each[:, 0]),
    }
    assert predictions.metrics(found) == pytest.approx({name: 100 * value for name, value in expected.items()})


def test_a_cached_generation_is_the_tasks_own(tmp_path, tiny):
    """The same rows and texts as the plain task's, answered and ranked as those."""
    found, plainly = (
        cached(sst2(tmp_path), tiny, "glue_sst2_v200_generation_test"),
        cached(tmp_path, tiny, "taskless_glue_sst2_v200"),
    )
    assert not takes_scores(found)
    labels = [postprocessors.answers(examples.postprocess) for examples in (found, plainly)]
    assert labels == [("negative", "positive")] * 2
    assert found.fields == plainly.fields
    for part, other in ((found.inputs, plainly.inputs), (found.targets, plainly.targets)):
        assert all(np.array_equal(part[n], other[n]) for n in range(12))
    answers = ["negative", "positive", "what"] * 4
    assert postprocess(found, answers).metrics(found) == {"accuracy": pytest.approx(100 / 3)}


# All labels at once.


def test_perceptron_examples_hold_all_labels(tmp_path, tiny):
    """[T, C]: a column a label, padded with 0 after its end of sequence."""
    name = "glue_sst2_v200_perceptron_test"
    found = examples(name, "validation", sst2(tmp_path), tiny.vocabulary)
    words = Vocabulary(tiny.vocabulary)
    labels = ("negative", "positive")
    assert len(found) == 12
    for n, example in enumerate(found):
        sentence = f"sentence: film {n} "
        assert [text.decode() for text in example["inputs_pretokenized"]] == [sentence] * 2
        assert [text.decode() for text in example["targets_pretokenized"]] == [*labels]
        assert list(example["is_correct"]) == [n % 2 == 0, n % 2 == 1]
        assert [list(idx) for idx in example["idx"]] == [[n, 0], [n, 1]]
        for part, columns in (("inputs", [sentence] * 2), ("targets", labels)):
            for column, text in enumerate(columns):
                ids = [*words.encode(text), EOS]
                assert list(example[part][:, column]) == ids + [0] * (len(example[part]) - len(ids))


def test_perceptron_examples_are_cut_to_length(tmp_path, tiny):
    lengths = {"inputs": 4, "targets": 2, "is_correct": None}
    folder = sst2(tmp_path)
    found = examples(
        "glue_sst2_v200_perceptron_test", "validation", folder, tiny.vocabulary, lengths, trim_output_features=True
    )
    assert {example["inputs"].shape for example in found} == {(4, 2)}
    assert {example["targets"].shape for example in found} == {(2, 2)}
    assert all((example["inputs"][-1] == EOS).all() for example in found)


def test_perceptron_answers_are_scored_against_the_right_label(tmp_path, tiny):
    name = "glue_sst2_v200_perceptron_test"
    found = examples(name, "validation", sst2(tmp_path), tiny.vocabulary)
    task = seqio.TaskRegistry.get(name)
    targets = [task.postprocess_fn("", example=example, is_target=True) for example in found]
    assert targets == [n % 2 for n in range(12)]
    answers = ["negative", "positive", "what"] * 4
    predictions = [
        task.postprocess_fn(text, example=example, is_target=False)
        for text, example in zip(answers, found, strict=True)
    ]
    assert predictions == [0, 1, -1] * 4
    (metric,) = task.metric_fns
    assert metric(targets, predictions) == {"accuracy": pytest.approx(100 / 3)}


@pytest.mark.parametrize("task", perceptron.HELD_OUT)
def test_the_three_losses_share_rows_texts_and_splits(task):
    """The held-out part is the same in all; the tests are the benchmark's own validation rows."""
    held_out = perceptron.HELD_OUT[task]
    for end in ("perceptron_train", "generation_train"):
        assert splits_of(f"{task}_{end}") == {"train": f"train[:-{held_out}]", "validation": f"train[-{held_out}:]"}
    assert splits_of(f"{task}_rank_classification_validation") == {"validation": f"train[-{held_out}:]"}
    for end in ("perceptron_test", "generation_test", "rank_classification_test"):
        assert splits_of(f"{task}_{end}") == {"validation": "validation"}
    labels = parts_of(f"taskless_{task}").labels
    assert parts_of(f"{task}_perceptron_test").labels == labels
    (metric,) = seqio.TaskRegistry.get(f"{task}_rank_classification_test").metric_fns
    assert metric.keywords == {"num_classes": len(labels)}


def splits_of(name):
    return seqio.TaskRegistry.get(name).source._slices


# Sentinels.


@pytest.mark.parametrize("name", ["sentinel_glue_sst2_v200", "taskless_sentinel_glue_sst2_v200"])
def test_a_sentinel_begins_every_answer(tmp_path, tiny, name):
    found = examples(name, "train", sst2(tmp_path), tiny.vocabulary)
    words = Vocabulary(tiny.vocabulary)
    prefix = "" if name.startswith("taskless") else "sst2 "
    for n, example in enumerate(found):
        label = ("negative", "positive")[n % 2]
        assert list(example["targets"]) == [words.size - 1, *words.encode(label), EOS]
        assert words.decode(example["targets"]) == f"<extra_id_0> {label}"
        assert list(example["inputs"]) == [*words.encode(f"{prefix}sentence: film {n} "), EOS]


def test_an_answer_is_read_behind_its_sentinel(tmp_path, tiny):
    task = seqio.TaskRegistry.get("taskless_sentinel_glue_sst2_v200")
    answers = {
        "<extra_id_0> positive": 1,
        "<extra_id_0>negative": 0,
        "positive": 1,
        "<extra_id_1> positive": -1,
        "<extra_id_0>": -1,
    }
    assert {text: task.postprocess_fn(text, example={}, is_target=False) for text in answers} == answers
    assert postprocessors.answers(task.postprocessor) == ("<extra_id_0> negative", "<extra_id_0> positive")


def test_sentinels_stand_before_any_kind_of_answer():
    """Numbers, referents, questions' answers and passages' are read by the task's own postprocessor."""
    for name, text, example, expected in (
        ("glue_stsb_v200", "3.8", {}, 3.8),
        ("super_glue_multirc_v102", "True", {"idx/paragraph": 1, "idx/question": 2}, {"group": (1, 2), "value": 1}),
        ("super_glue_record_v102", "Ann", {"idx/passage": 1, "idx/query": 2}, {"group": (1, 2), "value": "Ann"}),
        ("super_glue_wsc_v102_simple_eval", "the man", {"targets_pretokenized": "The man", "label": 1}, 1),
    ):
        plain = seqio.TaskRegistry.get(name).postprocess_fn
        behind = seqio.TaskRegistry.get(f"sentinel_{name}").postprocess_fn
        assert plain(text, example=example, is_target=False) == expected
        assert behind(f"<extra_id_0> {text}", example=example, is_target=False) == expected


def test_a_cache_can_name_every_derived_postprocessor_and_metric():
    """As module functions with options that JSON holds."""
    names = [
        n for n in seqio.TaskRegistry.names() if n.startswith(("spot_", "pr:", "sentinel_", "task_index_sentinel"))
    ]
    names += [n for n in seqio.TaskRegistry.names() if "_perceptron_" in n or "_rank_classification_" in n]
    assert len(names) > 100
    for name in names:
        task = seqio.TaskRegistry.get(name)
        for function in (task.postprocessor, *task.metric_fns):
            assert json.loads(json.dumps(describe(function)))["function"].startswith("prompt_tuning_jax.tasks.")


def test_wrappers_pass_their_options_on():
    example = {
        "targets_pretokenized": [b"no", b"yes"],
        "inputs_pretokenized": [b"q", b"q"],
        "is_correct": np.array([False, True]),
    }
    options = {"postprocess": "label_index", "labels": ["no", "yes"]}
    assert of_choices("", example, True, **options) == 1
    assert of_choices("no", example, False, **options) == 0
    assert after_sentinel("<extra_id_0> no", {}, False, **options) == 0
