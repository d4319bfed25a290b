"""The vote against its definition, and an ensemble's prompts against each one evaluated alone."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIG, LENGTHS, random_params

from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.inference.ensembling import Ensemble, vote
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.prompts.files import write_prompt
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary
from prompt_tuning_jax.training.eval_run import evaluate_prompt
from prompt_tuning_jax.training.evaluation import Evaluator

MODEL = Transformer(CONFIG)
PROMPTS = [np.random.default_rng(n).normal(size=(1 + 2 * n, CONFIG.emb_dim)).astype(np.float32) for n in range(3)]


@pytest.fixture(scope="module")
def dataset(tiny):
    return DatasetConfig("demo_reviews", "validation[:40]", 16, LENGTHS, cache_dir=str(tiny.folder / "cache"))


@given(votes=st.lists(st.tuples(st.sampled_from("abc"), st.floats(-9, 0)), min_size=1, max_size=7))
def test_the_commonest_answer_wins_and_of_several_the_one_of_the_highest_score(votes):
    texts, scores = zip(*votes, strict=True)
    winner = vote(texts, scores)
    counts = collections.Counter(texts)
    assert counts[winner] == max(counts.values())
    for rival in counts:
        if counts[rival] == counts[winner]:
            mine, others = (sum(s for t, s in votes if t == text) for text in (winner, rival))
            assert mine >= others


def test_two_of_three_outvote_the_surest():
    assert vote(["no", "yes", "yes"], [-0.01, -4.0, -5.0]) == "yes"
    assert vote(["no", "yes"], [-0.01, -4.0]) == "no"


def test_each_prompt_answers_as_if_it_were_alone(tiny, dataset):
    """Prompts of three lengths in one pass; most of this base's answers are no labels, and differ between prompts."""
    words = Vocabulary(tiny.vocabulary)
    params = {name: jnp.asarray(value) for name, value in random_params(0).items()}
    (batches,) = dataset.eval_batches(words).values()
    ensemble = Ensemble(CONFIG, words, PROMPTS)
    generated, ranked = ensemble.generated(params, batches), ensemble.ranked(params, batches)
    for number, prompt in enumerate(PROMPTS):
        evaluator, alone = Evaluator(CONFIG, words), Injection(prompt=jnp.asarray(prompt))
        assert generated.texts[number] == evaluator.answers(alone, params, batches)
        assert ranked.texts[number] == evaluator.ranked(alone, params, batches)
    assert generated.scores.shape == ranked.scores.shape == (3, 40)
    assert generated.texts[0] != generated.texts[1]
    for row in (0, 7, 39):
        answers = [texts[row] for texts in ranked.texts]
        assert ranked.majority()[row] == vote(answers, ranked.scores[:, row])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    paths = [str(folder / f"{number}.npy") for number in range(len(PROMPTS))]
    for path, prompt in zip(paths, PROMPTS, strict=True):
        write_prompt(path, prompt)
    return paths


def test_eval_reports_average_best_and_ensemble(tiny, dataset, files):
    options = {"size": CONFIG, "initial_checkpoint_path": str(tiny.base), "dataset": dataset}
    found = evaluate_prompt(prompt_files=files, **options)
    alone = [evaluate_prompt(prompt_file=path, **options) for path in files]
    for how in ("generation", "ranking"):
        each = [result[how]["accuracy"] for result in alone]
        table = found[how]
        assert [table["prompts"][path]["accuracy"] for path in files] == each
        assert table["average"]["accuracy"] == pytest.approx(np.mean(each))
        assert table["best"]["accuracy"] == max(each)
        assert table["prompts"][table["best"]["prompt"]]["accuracy"] == max(each)
        assert 0 <= table["ensemble"]["accuracy"] <= 100
    assert found["examples"] == 40


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt_files": ["a.npy", "b.npy"], "prompt_file": "c.npy"}, "`prompt` and `prompt_files` are both set"),
        ({"prompt_files": "a.npy"}, "`prompt_files` is 'a.npy', expected a list"),
        ({"prompt_files": ["a.npy", "a.npy"]}, "`prompt_files` names 1 prompts, expected two or more"),
        ({"prompt_files": []}, "`prompt_files` names 0 prompts, expected two or more"),
        ({"prompt_files": ["a.npy", "b.npy"], "submission": "x"}, "set `prompt`, not `prompt_files`"),
        ({"prompt_file": ""}, "`prompt` must be set: a prompt, or None"),
        ({"prompt_files": ["a.npy", "b.npy"]}, "no prompt file a.npy"),
    ],
)
def test_what_to_score_is_said_once(tiny, dataset, options, message):
    with pytest.raises(ValueError) as error:
        evaluate_prompt(size=CONFIG, initial_checkpoint_path=str(tiny.base), dataset=dataset, **options)
    assert message in str(error.value)
