"""Rows of many prompts in one batch, against each row decoded alone with its own prompt."""

import dataclasses
import functools
import gc
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.models import prompted, random_model, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIG, random_params

from experiments.sizes import SIZES
from prompt_tuning_jax.checkpoints import t5x
from prompt_tuning_jax.checkpoints.model import Model
from prompt_tuning_jax.inference import bank as bank_module
from prompt_tuning_jax.inference import engine
from prompt_tuning_jax.inference import predictor as predictor_module
from prompt_tuning_jax.inference.bank import PromptBank
from prompt_tuning_jax.inference.folder import PromptFolder
from prompt_tuning_jax.inference.labels import LabelTables
from prompt_tuning_jax.inference.predictor import SEARCHES, Predictor
from prompt_tuning_jax.inference.requests import CHARACTERS, Decoding, Reader
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.prompts.files import IN_T5X, write_prompt
from prompt_tuning_jax.t5.decoding import beam_search, greedy, sample
from prompt_tuning_jax.t5.log_likelihood import shift_right, token_log_probs
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.tasks.review_grammar import unlabelled
from prompt_tuning_jax.tokenizers.vocabulary import EOS, Vocabulary

LENGTHS = {"one": 2, "three": 5, "three too": 5}
INPUTS, ANSWER, WIDTH = 24, 6, CONFIG.emb_dim
TEXTS = [*unlabelled(12), "a", "a movie"]
LABELS = ["negative", "positive", "a b c"]


@pytest.fixture(scope="module")
def words(tiny):
    return Vocabulary(tiny.vocabulary)


@pytest.fixture(scope="module")
def params():
    return {name: jnp.asarray(value) for name, value in random_params(1).items()}


@pytest.fixture(scope="module")
def predictor(words, params):
    options = {"input_length": INPUTS, "max_new_tokens": ANSWER, "batch_size": 2, "decoding": Decoding(beams=3)}
    own = Predictor(Model("made here", CONFIG, params, words, "0" * 16), **options)
    own.bank = PromptBank(WIDTH)
    return own


def refill(bank, rng, scale=1.0):
    """New prompts under the same names."""
    prompts = {name: rng.normal(0, scale, (length, WIDTH)).astype(np.float32) for name, length in LENGTHS.items()}
    for name, prompt in prompts.items():
        bank.add(name, prompt)
    return prompts


@functools.cache
def alone(decoder, length, **options):
    """A decoder of one row and one prompt, which the model owns as it does in training."""
    model = prompted(CONFIG, length) if length else Transformer(CONFIG)
    return jax.jit(lambda params, inputs, **more: decoder(model, tree(params), inputs, ANSWER, **options, **more))


@functools.cache
def forward_alone(length):
    model = prompted(CONFIG, length) if length else Transformer(CONFIG)
    return jax.jit(
        lambda params, inputs, targets: model.apply(
            {"params": tree(params)}, inputs, shift_right(targets, 0), targets, enable_dropout=False
        )
    )


def answer_alone(row, words, params, prompts):
    """The tokens' text and the score of one row, by the model with that row's prompt as its own parameter."""
    prompt = prompts.get(row["prompt"], np.zeros((0, WIDTH), np.float32))
    length = len(prompt)
    if length:
        params = params | {"encoder/prompt/prompt": jnp.asarray(prompt)}
    ids = [*words.encode(row["inputs"]), EOS]
    inputs = np.zeros((1, INPUTS), np.int32)
    inputs[0, : len(ids)] = ids
    if "labels" in row:
        scores = []
        for label in row["labels"]:
            targets = np.zeros((1, 12), np.int32)
            tokens = [*words.encode(label), EOS]
            targets[0, : len(tokens)] = tokens
            logits = forward_alone(length)(params, inputs, targets)
            scores.append(float(token_log_probs(logits, jnp.asarray(targets), 0).sum()))
        return row["labels"][int(np.argmax(scores))], np.array(scores)
    if row.get("decode") == "beam":
        tokens, scores = alone(beam_search, length, beams=3)(params, inputs)
        return words.decode(np.asarray(tokens[0, 0])), float(scores[0, 0])
    if row.get("decode") == "sample":
        tokens, scores = alone(sample, length)(
            params,
            inputs,
            seeds=np.array([row["seed"]], np.uint32),
            temperature=np.array([row["temperature"]], np.float32),
            top_k=np.array([row["top_k"]], np.int32),
            top_p=np.array([1.0], np.float32),
        )
    else:
        tokens, scores = alone(greedy, length)(params, inputs)
    return words.decode(np.asarray(tokens[0])), float(scores[0])


WAYS = st.one_of(
    st.just({}),
    st.just({"decode": "beam"}),
    st.builds(
        lambda seed, temperature, top_k: {"decode": "sample", "seed": seed, "temperature": temperature, "top_k": top_k},
        st.integers(0, 2**32 - 1),
        st.sampled_from([0.0, 0.7, 1.5]),
        st.sampled_from([0, 5]),
    ),
    st.integers(1, 3).map(lambda count: {"labels": LABELS[:count]}),
)
ROWS = st.lists(
    st.builds(
        lambda prompt, inputs, way: {"prompt": prompt, "inputs": inputs} | way,
        st.sampled_from([None, *LENGTHS]),
        st.sampled_from(TEXTS),
        WAYS,
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=12)
@given(rows=ROWS, seed=st.integers(0, 2**32 - 1))
def test_each_row_is_answered_as_if_its_prompt_were_alone(predictor, words, params, rows, seed):
    """Prompts of several lengths, the base alone, four ways to answer, in batches of any order and padding."""
    rows = [row for row in rows if len(words.encode(row["inputs"])) < INPUTS]
    prompts = refill(predictor.bank, np.random.default_rng(seed))
    answers = [*predictor.predict(rows)]
    assert len(answers) == len(rows)
    for row, answer in zip(rows, answers, strict=True):
        assert {name: answer[name] for name in row} == row
        text, score = answer_alone(row, words, params, prompts)
        assert answer["prediction"] == text
        if "labels" in row:
            np.testing.assert_allclose([*answer["scores"].values()], score, rtol=1e-5, atol=1e-5)
            shares = np.exp(score) / np.exp(score).sum()
            np.testing.assert_allclose([*answer["probabilities"].values()], shares, rtol=1e-4, atol=1e-7)
        else:
            np.testing.assert_allclose(answer["score"], score, rtol=1e-5, atol=1e-5)


@pytest.fixture
def compiled():
    """How many programs were compiled so far."""
    events = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(events)
    jax.monitoring.unregister_event_duration_listener(listen)


def test_new_prompts_compile_nothing(words, params, compiled):
    own = Predictor(Model("made here", CONFIG, params, words, "0" * 16), max_new_tokens=2, input_length=16)
    rng = np.random.default_rng(0)

    def compiles(name, length):
        """To answer with a new prompt."""
        own.bank.add(name, rng.normal(size=(length, WIDTH)).astype(np.float32))
        before = compiled()
        assert "prediction" in next(own.predict([{"prompt": name, "inputs": "a movie"}]))
        return compiled() - before

    assert compiles("0", 7) > 0
    assert [compiles(str(number), number) for number in range(1, 20)] == [0] * 19
    assert compiles("longer", 21) > 0
    assert compiles("3", 22) == compiles("new", 2) == 0


DEEP = dataclasses.replace(CONFIG, num_encoder_layers=3)
WAYS_ALONE = {
    "greedy": {"decode": "greedy"},
    "beam": {"decode": "beam"},
    "sample": {"decode": "sample", "seed": 5, "temperature": 1.2, "top_k": 0, "top_p": 1.0},
    "rank": {"labels": LABELS},
}


@pytest.fixture(scope="module")
def deep(words):
    """A predictor with prompts of every kind, and what each row is to run with if it is alone."""
    params = random_model(DEEP)[1]
    rng, width = np.random.default_rng(3), DEEP.emb_dim

    def draw(*shape):
        return rng.normal(0, 0.7, (*shape, width)).astype(np.float32)

    injections = {
        "ordinary": Injection(draw(5)),
        "replacing": Injection(layer_prompts=draw(3, 2)),
        "adding": Injection(draw(6), draw(3, 6)),
    }
    model = Model("made here", DEEP, params, words, "0" * 16)
    options = {"input_length": INPUTS, "max_new_tokens": ANSWER, "batch_size": 8, "decoding": Decoding(beams=3)}
    own = Predictor(model, injections, **options)
    return own, params, jax.tree.map(jnp.asarray, injections) | {None: Injection()}


@jax.jit
def forward(params, injection, inputs, targets):
    """Log-probabilities [1, U, V] of one pass over whole targets, by a row with its prompts and no other's padding."""
    logits = Transformer(DEEP).apply(
        {"params": tree(params)}, inputs, shift_right(targets, 0), targets, enable_dropout=False, **injection.prompts
    )
    return jax.nn.log_softmax(logits)


def found_alone(params, injection, row, words):
    """The text and the scores of a row, by their definition: the decoder's cache is not used."""
    ids = [*words.encode(row["inputs"]), EOS]
    inputs = jnp.asarray([ids + [0] * (16 - len(ids))], jnp.int32)

    def log_probs(tokens):
        """Returns the log-probabilities of every possible next token, and those of `tokens` themselves."""
        targets = jnp.asarray([[*tokens, *[0] * (12 - len(tokens))]], jnp.int32)
        found = np.asarray(forward(params, injection, inputs, targets)[0])
        return found[len(tokens)], found[np.arange(len(tokens)), list(tokens)]

    if "labels" in row:
        scores = [log_probs((*words.encode(label), EOS))[1].sum() for label in row["labels"]]
        return row["labels"][int(np.argmax(scores))], scores
    beams, live, ended = (3 if row["decode"] == "beam" else 1), [(0.0, ())], []
    for length in range(1, ANSWER + 1):
        grown = []
        for score, tokens in live:
            log_p = log_probs(tokens)[0]
            if row["decode"] == "sample":
                key = jax.random.fold_in(jax.random.key(row["seed"]), len(tokens))
                best = [int(np.argmax(log_p / row["temperature"] + jax.random.gumbel(key, log_p.shape)))]
            else:
                best = np.argsort(-log_p)[: 2 * beams]
            grown += [(score + log_p[token], (*tokens, int(token))) for token in best]
        grown = sorted(grown, reverse=True)[: beams if beams == 1 else 2 * beams]
        penalty = ((5 + length) / 6) ** 0.6 if row["decode"] == "beam" else 1
        ended += [(score / penalty, tokens) for score, tokens in grown if tokens[-1] == EOS]
        live = [(score, tokens) for score, tokens in grown if tokens[-1] != EOS][:beams]
    score, tokens = max(ended) if ended else live[0]
    return words.decode(tokens), [score]


@pytest.mark.parametrize("way", WAYS_ALONE)
def test_a_mixed_batch_is_each_row_alone(deep, words, way):
    """Ordinary prompts, prompts that replace and that add in every layer, and none: of other lengths, in one batch."""
    predictor, params, injections = deep
    texts = ("a dull film", "a fine movie")
    rows = [{"prompt": name, "inputs": text} | WAYS_ALONE[way] for text in texts for name in injections]
    requests = [predictor.request(row) for row in rows]
    assert len([*predictor.plan(requests)]) == 1
    different = set()
    for row, answer in zip(rows, predictor.predict(rows), strict=True):
        text, scores = found_alone(params, injections[row["prompt"]], row, words)
        assert answer["prediction"] == text
        found = [*answer["scores"].values()] if "scores" in answer else [answer["score"]]
        np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-5)
        different.add((text, *np.round(found, 4)))
    assert len(different) == len(rows)


def test_every_mixture_is_the_same_program_and_ordinary_batches_keep_theirs(words, compiled):
    params, rng = random_model(DEEP)[1], np.random.default_rng(3)
    shapes = {"ordinary": (4, 16), "other": (1, 16), "replacing": (3, 3, 16)}
    prompts = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    prompts["adding"] = Injection(prompts["ordinary"][:2], prompts["replacing"][:, :2])
    model = Model("made here", DEEP, params, words, "0" * 16)
    own = Predictor(model, prompts, max_new_tokens=2, input_length=16, batch_size=4)

    def compiles(*names):
        before = compiled()
        answers = [*own.predict([{"prompt": name, "inputs": "a movie"} for name in names])]
        return compiled() - before, [answer["score"] for answer in answers]

    count, ordinary = compiles("ordinary", "other", None, None)
    assert count > 0
    assert compiles("ordinary", "replacing", "adding", None)[0] > 0
    for names in (["replacing"] * 4, ["adding"] * 3, ["adding", "ordinary", "other", None], ["other"] * 3):
        assert compiles(*names)[0] == 0, names
    assert compiles("ordinary", "other", None, None) == (0, ordinary)


def test_ordinary_rows_and_others_stand_apart_in_full_batches(deep):
    predictor, _, _ = deep
    names = ["adding", "ordinary"] * 8
    requests = [predictor.request({"prompt": name, "inputs": "a movie"}) for name in names]
    batches = [{names[at] for at in batch.indices} for batch in predictor.plan(requests)]
    assert batches == [{"ordinary"}, {"adding"}]


def test_a_thousand_prompts_fit_and_the_next_is_answered_at_once():
    """P=100 at the width of T5 1.1 small: 205 kB each; the time is that of one prompt added and one batch of 32."""
    bank = PromptBank(SIZES["small"].emb_dim)
    rng = np.random.default_rng(0)
    prompt = rng.normal(size=(100, 512)).astype(np.float32)
    for number in range(1000):
        bank.add(str(number), prompt)
    assert bank.nbytes == 1000 * 100 * 512 * 4
    times = []
    for number in range(5):
        started = time.monotonic()
        bank.add(f"new {number}", prompt)
        bank.take([f"new {number}"] * 32, 32)
        times.append(time.monotonic() - started)
    assert sorted(times)[2] < 0.1


def test_long_inputs_are_cut_and_flagged(predictor, words):
    refill(predictor.bank, np.random.default_rng(0))
    long = " ".join(TEXTS[:4])
    ids = words.encode(long)
    assert len(ids) >= INPUTS
    answers = [*predictor.predict([{"prompt": "one", "inputs": text} for text in (long, "a movie")])]
    assert answers[0]["cut"] is True and "cut" not in answers[1]
    # What was cut is not seen: the row is that of its first tokens.
    request = predictor.request({"prompt": "one", "inputs": long})
    assert request.inputs.tolist() == [*ids[: INPUTS - 1], EOS]


def test_only_the_beginning_of_a_very_long_text_is_tokenised(predictor, words):
    """It gives the tokens of the whole text."""
    text = " ".join(TEXTS * 20)
    request = predictor.request({"prompt": None, "inputs": text})
    assert len(text) > 2 * CHARACTERS * INPUTS and request.truncated
    assert request.inputs.tolist() == [*words.encode(text)[: INPUTS - 1], EOS]
    seen = []

    class Counting(Vocabulary):
        def encode(self, text):
            seen.append(len(text))
            return super().encode(text)

    reader = Reader(Counting(words.path), INPUTS, Decoding())
    for long in (text * 50, " " * 10**6 + "a movie", "x" * 10**6, "a" + " " * 10**6 + "b"):
        assert reader.request({"prompt": None, "inputs": long}).truncated
    assert max(seen) <= CHARACTERS * INPUTS
    blank = reader.request({"prompt": None, "inputs": " " * 10**6 + "a movie"})
    assert blank.inputs.tolist() == [*words.encode("a movie"), EOS]


def test_names_are_searched_for_a_few_times_only(words, params, monkeypatch):
    """1,000 prompts, and 1,024 rows that name as many unknown ones."""
    searched = []
    monkeypatch.setattr(bank_module, "near_misses", lambda name, names: searched.append(name) or "did you mean?")
    own = Predictor(Model("made here", CONFIG, params, words, "0" * 16), input_length=16)
    for number in range(1000):
        own.bank.add(f"prompt {number}", np.zeros((1, WIDTH), np.float32))
    rows = [{"prompt": f"unknown {number}", "inputs": "a"} for number in range(1024)] * 2
    answers = own.answer_rows([*enumerate(rows)])
    assert len(searched) == SEARCHES
    assert all(f"no prompt {row['prompt']!r}" in answer["error"] for row, answer in zip(rows, answers, strict=True))


def test_kept_labels_have_a_limit_in_bytes():
    tables = LabelTables(lambda labels: np.zeros((len(labels), 100), np.int32), 50_000)
    for number in range(1000):
        assert tables((str(number), "x" * (number % 7))).shape == (2, 100)
        assert tables.size <= 50_000
    assert len(tables._tables) > 20 and ("999", "x" * (999 % 7)) in tables._tables
    tables(("y" * 100_000,))  # larger than all: not kept, nor anything left of its size
    assert tables.size == 0 and not tables._tables


def test_compiled_programs_have_a_limit(words, params, monkeypatch):
    """However many shapes come, and with them the memory: what is dropped is really gone."""
    monkeypatch.setattr(predictor_module, "MAX_PROGRAMS", 2)
    engine._engine_of.cache_clear()
    own = Predictor(
        Model("made here", CONFIG, params, words, "0" * 16), input_length=32, max_new_tokens=1, batch_size=2
    )
    loaded = []
    for count in (1, 2):
        for text in ("a", "a movie " * 12):
            answers = [*own.predict([{"prompt": None, "inputs": text}] * count)]
            assert all("prediction" in answer for answer in answers)
            gc.collect()
            loaded.append(len(jax.devices()[0].client.live_executables()))
            assert own._engine.greedy._cache_size() == len(own._compiled) <= 2
    assert max(loaded) - loaded[0] <= 2


def test_a_long_prompt_costs_the_rows_of_others_nothing(words, params):
    own = Predictor(Model("made here", CONFIG, params, words, "0" * 16), input_length=16)
    for name, length in (("short", 3), ("long", 2000)):
        own.bank.add(name, np.zeros((length, WIDTH), np.float32))
    requests = [own.request({"prompt": name, "inputs": "a"}) for name in ("short", "long", None, "short")]
    found = {tuple(batch.indices): batch.program[3] for batch in own.plan(requests)}
    assert found == {(1,): 2048, (0, 2, 3): 20}
    assert own.cost(requests[1]) > 50 * own.cost(requests[0]) - 2000
    with pytest.raises(ValueError, match="prompt x has 12,000 positions, expected at most 4,080"):
        own.bank.add("x", np.zeros((12_000, WIDTH), np.float32))


def test_memory_goes_back_when_a_prompt_is_removed_from_its_folder(words, params, tmp_path):
    """The host's arrays and the device's, after rows with the prompt were answered."""
    own = Predictor(Model("made here", CONFIG, params, words, "0" * 16), input_length=8, max_new_tokens=1, batch_size=1)
    write_prompt(tmp_path / "short.npy", np.ones((3, WIDTH), np.float32))
    folder = PromptFolder(tmp_path)

    def held():
        gc.collect()
        arrays = tracemalloc.take_snapshot().filter_traces([tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)])
        return sum(trace.size for trace in arrays.traces) + sum(array.nbytes for array in jax.live_arrays())

    def answer(name):
        assert "prediction" in own.answer_rows([(0, {"prompt": name, "inputs": "a"})])[0]

    tracemalloc.start()
    try:
        folder.sync(own.bank)
        answer("short")
        before = held()
        write_prompt(tmp_path / "long.npy", np.ones((1_000, WIDTH), np.float32))
        folder.sync(own.bank)
        answer("long")
        assert held() - before >= 1_000 * WIDTH * 4
        (tmp_path / "long.npy").unlink()
        assert folder.sync(own.bank).removed == ["long"]
        # The compiled program keeps its relative positions, 8 bytes each; programs have a limit of their own.
        assert held() - before < 1_000 * WIDTH * 4 / 4
    finally:
        tracemalloc.stop()


def test_labels_of_many_sizes_do_not_pad_each_other(words, params):
    """One row of 195 short labels beside rows of two long ones: no batch takes more than twice its rows' tokens."""
    own = Predictor(Model("made here", CONFIG, params, words, "0" * 16), input_length=16)
    many = [f"{first}{second}" for first in "abcdefghijklmno" for second in "abcdefghijklm"]
    long = ["a movie " * 20, "a plot " * 20]
    rows = [{"prompt": None, "inputs": "a", "labels": labels} for labels in (many, long, long, long)]
    requests = [own.request(row) for row in rows]
    for batch in own.plan(requests):
        _, size, length, prompt, _, _, tokens = batch.program
        labels = max(len(requests[at].labels) for at in batch.indices)
        assert length + prompt + labels * tokens <= 2 * min(own.cost(requests[at]) for at in batch.indices)


def test_seeds_default_to_one_a_row_from_the_first(words, params):
    own = Predictor(
        Model("made here", CONFIG, params, words, "0" * 16),
        input_length=16,
        max_new_tokens=4,
        decoding=Decoding("sample", seed=2**32 - 2, temperature=1.3),
    )
    row = {"prompt": None, "inputs": "a movie"}
    drawn = [answer["prediction"] for answer in own.predict([row] * 4)]
    named = [answer["prediction"] for answer in own.predict([row | {"seed": s} for s in (2**32 - 2, 2**32 - 1, 0, 1)])]
    assert drawn == named
    assert len(set(drawn)) > 1


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "thre", "inputs": "a"}, "no prompt 'thre'; did you mean three"),
        ({"prompt": "zzzzzz", "inputs": "a"}, "no prompt 'zzzzzz'; there are one, three, three too"),
        ({"prompt": 3, "inputs": "a"}, "prompt is 3, expected the name of a prompt, or null"),
        ({"inputs": "a"}, 'the row has no "prompt": name one, or null'),
        ({"prompt": None, "inputs": ""}, "inputs is empty"),
        ({"prompt": None, "inputs": " \n\t"}, "inputs is empty"),
        ({"prompt": None, "inputs": ["a"]}, "inputs is ['a'], expected a text"),
        ({"prompt": None, "input": "a"}, "'input' is no field of a row; did you mean inputs?"),
        ({"prompt": None}, 'the row has no "inputs", expected a text'),
        ({"prompt": None, "inputs": None}, "inputs is None, expected a text"),
        ({"prompt": None, "inputs": "a", "lables": ["a"]}, "'lables' is no field of a row; did you mean labels?"),
        (
            {"prompt": None, "inputs": "a", "max_new_tokens": 3},
            "max_new_tokens cannot be set per row, only when the command",
        ),
        ({"prompt": None, "inputs": "a", "beams": 3}, "beams cannot be set per row"),
        (
            {"prompt": None, "inputs": "a", "decode": "sample", "top_p": 5e-324},
            "top_p is 5e-324, expected a number from 1.18e-38 to",
        ),
        (
            {"prompt": None, "inputs": "a", "decode": "sample", "top_p": 1e-45},
            "top_p is 1e-45, expected a number from 1.18e-38 to",
        ),
        ({"prompt": None, "inputs": "a", "labels": ["w0" + " " * 3000, "b"]}, "has 3,002 characters, expected at most"),
        ({"prompt": None, "inputs": "\ud800"}, "half a surrogate pair"),
        ([1], "found [1], expected an object"),
        ({"prompt": None, "inputs": "a", "labels": "positive"}, "labels is 'positive', expected a list of texts"),
        ({"prompt": None, "inputs": "a", "labels": []}, "there are 0 labels, expected 1 to 256"),
        ({"prompt": None, "inputs": "a", "labels": ["a", ""]}, "label '' has 0 tokens"),
        ({"prompt": None, "inputs": "a", "labels": ["a", "a"]}, "the labels 'a' and 'a' are the same tokens"),
        ({"prompt": None, "inputs": "a", "labels": ["Movie", "movie"]}, "the labels 'Movie' and 'movie' are the same"),
        (
            {"prompt": None, "inputs": "a", "labels": ["a", "b"], "decode": "beam"},
            "decode has no effect in a row with labels, which are ranked and not generated: leave it out, or leave out "
            "labels",
        ),
        ({"prompt": None, "inputs": "a", "decode": "best"}, "decode is 'best', expected one of 'greedy', 'beam'"),
        ({"prompt": None, "inputs": "a", "seed": 3}, 'seed has no effect with decode "greedy"'),
        (
            {"prompt": None, "inputs": "a", "decode": "sample", "seed": -1},
            "seed is -1, expected a whole number from 0 to 4294967295",
        ),
        ({"prompt": None, "inputs": "a", "decode": "sample", "seed": True}, "seed is True"),
        ({"prompt": None, "inputs": "a", "decode": "sample", "temperature": float("nan")}, "temperature is nan"),
        (
            {"prompt": None, "inputs": "a", "decode": "sample", "top_p": 0},
            "top_p is 0, expected a number from 1.18e-38 to 1",
        ),
        ({"prompt": None, "inputs": "a", "decode": "sample", "top_k": 1.5}, "top_k is 1.5"),
    ],
)
def test_a_row_that_is_none_has_an_error_and_the_others_their_answers(predictor, row, message):
    refill(predictor.bank, np.random.default_rng(0))
    sound = {"prompt": "one", "inputs": "a movie"}
    before, broken, after = predictor.predict([sound, row, sound])
    assert message in broken["error"] and "prediction" not in broken
    assert "\n" not in broken["error"]
    assert before == after and "error" not in before


def test_a_prompt_of_nan_is_an_error_of_its_own_rows(predictor):
    refill(predictor.bank, np.random.default_rng(0))
    predictor.bank.add("wild", np.full((2, WIDTH), np.nan, np.float32))
    rows = [{"prompt": "wild", "inputs": "a"}, {"prompt": "one", "inputs": "a"}]
    rows += [row | {"labels": LABELS} for row in rows]
    wild, sound, wild_ranked, sound_ranked = predictor.predict(rows)
    for answer in (wild, wild_ranked):
        assert "the prompt or the base is broken" in answer["error"]
    assert np.isfinite([sound["score"], sound_ranked["score"]]).all()
    predictor.bank.remove("wild")


def test_a_prompt_removed_between_reading_and_answering_is_an_error(predictor):
    refill(predictor.bank, np.random.default_rng(0))
    predictor.bank.add("brief", np.zeros((2, WIDTH), np.float32))
    requests = [predictor.request({"prompt": name, "inputs": "a"}) for name in ("brief", "one")]
    predictor.bank.remove("brief")
    gone, sound = predictor.answer(requests)
    assert "no prompt 'brief'" in gone["error"] and "prediction" in sound


def test_an_earlier_answer_in_a_row_is_forgotten(predictor):
    refill(predictor.bank, np.random.default_rng(0))
    row = {"prompt": "one", "inputs": "a movie", "id": 3}
    (ranked,) = predictor.predict([row | {"labels": LABELS}])
    (fresh,) = predictor.predict([row])
    stale = {name: value for name, value in ranked.items() if name != "labels"} | {"error": "old", "cut": True}
    assert [*predictor.predict([stale])] == [fresh]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"input_length": 1}, "`input_length` is 1"),
        ({"prompt": "none such"}, "no prompt 'none such'; there are none"),
        ({"decoding": Decoding("best")}, "`decode` is 'best'"),
        ({"decoding": Decoding(beams=0)}, "`beams` is 0, expected a whole number from 1 to 64"),
        ({"decoding": Decoding(temperature=-1.0)}, "`temperature` is -1.0"),
        ({"decoding": Decoding(labels=("a", "a"))}, "the labels 'a' and 'a' are the same tokens"),
    ],
)
def test_settings_are_checked_before_anything_runs(words, params, options, message):
    with pytest.raises(ValueError) as error:
        Predictor(Model("made here", CONFIG, params, words, "0" * 16), **options)
    assert message in str(error.value)


def test_loaded_from_files_it_answers_as_from_arrays(tiny, tmp_path, words):
    prompt = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
    np.save(tmp_path / "mine.npy", prompt)
    options = {"input_length": 16, "max_new_tokens": 4}
    rows = [{"prompt": "mine", "inputs": "a movie"}]
    from_folder = [*Predictor.load(str(tiny.base), tmp_path, **options).predict(rows)]
    from_arrays = [*Predictor.load(str(tiny.base), {"mine": prompt}, **options).predict(rows)]
    one = Predictor.load(str(tiny.base), tmp_path / "mine.npy", **options)
    assert from_folder == from_arrays == [*one.predict(rows)]
    assert next(one.predict([{"inputs": "a movie"}]))["prediction"] == from_folder[0]["prediction"]
    # A T5X checkpoint of the base with the prompt in it, as T5X's trainer leaves it, is both.
    both = {name: np.asarray(value) for name, value in random_params(0).items()} | {IN_T5X[0]: prompt}
    t5x.write(tmp_path / "checkpoint_3", both, tiny.vocabulary)
    under_t5x = Predictor.load(str(tmp_path / "checkpoint_3"), tmp_path / "checkpoint_3", **options)
    assert next(under_t5x.predict([{"inputs": "a movie"}])) == {"inputs": "a movie"} | {
        name: from_folder[0][name] for name in ("prediction", "score")
    }
