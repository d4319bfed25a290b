"""Reading prompts: every measure against scikit-learn, SciPy or its definition, and what the command line says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist, pdist
from sklearn.metrics.pairwise import cosine_distances

from prompt_tuning_jax import neighbors as command
from prompt_tuning_jax.array_files.stored import StoredArray
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.base import StoredModel, open_model, open_vocabulary
from prompt_tuning_jax.prompts import nearest_words
from prompt_tuning_jax.prompts import similarity as similarity_file
from prompt_tuning_jax.prompts.files import write_prompt
from prompt_tuning_jax.prompts.initializers import ClassLabels, word_ids
from prompt_tuning_jax.prompts.nearest_words import (
    Neighbors,
    best_match_similarity,
    clusters,
    make_lexicon,
    mean_vector_similarity,
    nearest,
    overlaps,
    shared,
    tightness,
)
from prompt_tuning_jax.prompts.peft import write_adapter

NANO = open_model("nano")
WORDS = open_vocabulary(None, "nano", NANO.config)
TABLE = np.asarray(NANO.arrays[command.TABLE])
LABELS = ["negative", "entailment", "positive", "very bad film"]  # one piece, three, one, three


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def lexicon_of(embeddings, words, **labels):
    return make_lexicon(
        embeddings, np.arange(3, words, dtype=np.int32), "w{}".format, lambda label: labels[label], list(labels)
    )


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 6), k=st.integers(1, 30), padding=st.integers(0, 9))
def test_neighbours_are_those_of_scikit_learn(seed, length, k, padding):
    """Over the words and the labels of several pieces alone; blocks, sizes and a table's dtype do not matter."""
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(33 + 4 + padding, 7)).astype(ml_dtypes.bfloat16)
    prompt = rng.normal(size=(length, 7)).astype(np.float32)
    lexicon = lexicon_of(embeddings, 33, one=[8], two=[9, 12], three=[20, 20, 31])
    table = embeddings.astype(np.float32)
    named = {f"w{token}": table[token] for token in range(3, 33)}
    named |= {"two": (table[9] + table[12]) / 2, "three": (2 * table[20] + table[31]) / 3}
    assert lexicon.names == list(named) and lexicon.labels == {"one": 5, "two": 30, "three": 31}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity_file, "BLOCK", 10)
        found = nearest(prompt, lexicon, k)
    expected = 1 - cosine_distances(prompt, np.stack(list(named.values())))
    np.testing.assert_allclose(found.cosines, -np.sort(-expected, axis=1)[:, :k], atol=1e-6)
    np.testing.assert_allclose(found.cosines, np.take_along_axis(expected, found.indices, axis=1), atol=1e-6)
    assert all(len(set(places)) == k for places in found.indices.tolist())


def test_what_is_no_word_is_nobodys_neighbour():
    """<pad>, </s>, <unk>, the sentinels and the rows that fill a table, even where a position is one of them."""
    words = WORDS.size - 100
    lexicon = make_lexicon(TABLE, word_ids(WORDS, len(TABLE)), WORDS.piece)
    assert np.shares_memory(lexicon.words, TABLE)
    assert TABLE.shape[0] > WORDS.size
    others = [0, 1, 2, words, WORDS.size - 1, WORDS.size, TABLE.shape[0] - 1]
    found = nearest(TABLE[others].astype(np.float32), lexicon, 5)
    assert found.cosines.max() < 0.999
    assert lexicon.names == [WORDS.piece(token) for token in range(3, words)]
    assert command.open_lexicon(NANO).names == lexicon.names


def test_of_equal_words_the_first_is_named():
    embeddings = np.repeat(normal(4, 5), 3, axis=0)  # ids 3 to 11, three times the same
    found = nearest(2 * embeddings[[6]], lexicon_of(embeddings, 12), 4)
    assert found.indices[0, :3].tolist() == [3, 4, 5]


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 12), k=st.integers(2, 7))
def test_overlaps_clusters_and_shared_words_are_what_they_are_defined_as(seed, length, k):
    rng = np.random.default_rng(seed)
    places = np.stack([rng.choice(3 * k, k, replace=False) for _ in range(length)])
    expected = np.array([[len(set(a) & set(b)) / k for b in places.tolist()] for a in places.tolist()])
    found = overlaps(places)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    _, component = connected_components(expected >= 0.5, directed=False)
    groups = {tuple(np.flatnonzero(component == number).tolist()) for number in component}
    assert {tuple(group) for group in clusters(found)} == {group for group in groups if len(group) > 1}
    several = shared(places)
    assert several == {
        place: where
        for place in range(3 * k)
        if len(where := [i for i, row in enumerate(places.tolist()) if place in row]) > 1
    }
    counts = [len(where) for where in several.values()]
    assert counts == sorted(counts, reverse=True)


def test_tightness_is_the_mean_over_pairs():
    lexicon = lexicon_of(normal(20, 6), 20)
    places = np.array([[0, 5, 16], [3, 4, 9]])
    expected = [np.mean(1 - pdist(lexicon.words[row], "cosine")) for row in places]
    np.testing.assert_allclose(tightness(Neighbors(places, normal(2, 3)), lexicon), expected, atol=1e-6)


def test_similarity_of_prompts_is_symmetric_and_blind_to_order():
    a, b = normal(4, 6, seed=1), normal(7, 6, seed=2)
    assert mean_vector_similarity(a, b) == pytest.approx(1 - cdist([a.mean(0)], [b.mean(0)], "cosine")[0, 0], abs=1e-6)
    between = 1 - cdist(a, b, "cosine")
    expected = (np.mean([row.max() for row in between]) + np.mean([row.max() for row in between.T])) / 2
    assert best_match_similarity(a, b) == pytest.approx(expected, abs=1e-6)
    for similarity in (mean_vector_similarity, best_match_similarity):
        assert similarity(a, b) == pytest.approx(similarity(b, a), abs=1e-6)
        assert similarity(a, 3 * a[[2, 0, 3, 1]]) == pytest.approx(1, abs=1e-6)
        assert similarity(a, b) < 0.9


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line, which must do what it is told; returns what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["neighbors", *map(str, arguments)])
        command.main()
        said = capsys.readouterr()
        assert not said.err
        return said.out

    return run


@pytest.fixture
def refused(monkeypatch, capsys):
    """The command line, which must end with exit code 2 and one line; returns the line."""

    def refused(*arguments):
        monkeypatch.setattr(sys, "argv", ["neighbors", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            command.main()
        said = capsys.readouterr()
        assert stopped.value.code == 2 and not said.out
        assert said.err.startswith("error: ") and said.err.count("\n") == 1
        return said.err

    return refused


def class_label_prompt(seed: int, length: int = 12) -> np.ndarray:
    """Step 0 of a run with class labels."""

    model = SimpleNamespace(config=SimpleNamespace(emb_dim=TABLE.shape[1]), embeddings=TABLE, tokenizer=WORDS)
    return np.asarray(ClassLabels(LABELS)(jax.random.fold_in(jax.random.key(seed), 1), length, model))


@pytest.mark.parametrize("seed", range(5))
def test_a_class_label_prompt_names_the_labels_at_their_positions_and_nowhere_else(run, tmp_path, seed):
    prompt = class_label_prompt(seed)
    write_prompt(tmp_path / "0.npy", prompt)
    report = json.loads(run(tmp_path / "0.npy", f"--labels={','.join(LABELS)}", "--top=1", "--json"))
    described = report["prompts"][str(tmp_path / "0.npy")]
    # A sampled word may be a label of one piece.
    sampled = {
        label: [i for i in range(4, 12) if len(ids) == 1 and (prompt[i] == TABLE[ids[0]].astype(np.float32)).all()]
        for label in LABELS
        if (ids := WORDS.encode(label))
    }
    assert described["labels"] == {label: {"now": [i, *sampled[label]]} for i, label in enumerate(LABELS)}
    for position, label in zip(described["positions"][:4], LABELS, strict=True):
        (neighbor,) = position["neighbors"]
        assert neighbor["label"] == label
        assert neighbor["cosine"] == pytest.approx(1, abs=1e-6)
    for i, position in enumerate(described["positions"][4:], 4):  # the other positions are the words drawn
        (neighbor,) = position["neighbors"]
        row = TABLE[[WORDS.piece(token) for token in range(WORDS.size)].index(neighbor["word"])]
        np.testing.assert_array_equal(prompt[i], row.astype(np.float32))


@pytest.fixture
def trained(tmp_path) -> Path:
    """A run's folder. [negative] has stayed at 0, [entailment] gone from 1, [positive] come to 5 beside 2."""
    prompts = {"0": class_label_prompt(0)}
    prompts["best"] = prompts["0"].copy()
    prompts["best"][1] = normal(128)
    prompts["best"][5] = 0.5 * prompts["0"][2]
    folder = tmp_path / "run"
    write_prompt(folder / "prompts" / "0.npy", prompts["0"])
    write_prompt(folder / "best" / "prompt.npy", prompts["best"])
    (folder / "summary.json").write_text(json.dumps({"base": NANO.location}))
    return folder


def test_labels_are_followed_from_before_training_to_now(run, trained):
    labels = f"--labels={','.join(LABELS)}"
    said = run(trained, labels, "--top=1", "--json")
    report = json.loads(said)
    (described,) = report["prompts"].values()
    assert report["base"] == NANO.location
    assert described["labels"] == {
        "negative": {"before": [0], "now": [0]},
        "entailment": {"before": [1], "now": []},
        "positive": {"before": [2], "now": [2, 5]},
        "very bad film": {"before": [3], "now": [3]},
    }
    to_before = [position["cosine_to_before"] for position in described["positions"]]
    still = [i for i in range(12) if i not in (1, 5)]
    np.testing.assert_allclose(np.array(to_before)[still], 1, atol=1e-6)
    assert max(to_before[1], to_before[5]) < 0.9
    assert [position["kept"] for position in described["positions"]] == [i in still for i in range(12)]
    assert {"word": "▁positive", "positions": [2, 5]} in described["shared"] and [2, 5] in described["clusters"]

    # --before names the same file, and a prompt file has no run's folder to look into.
    files = trained / "best" / "prompt.npy", f"--before={trained / 'prompts' / '0.npy'}"
    again = json.loads(run(*files, labels, "--top=1", "--json"))
    assert list(again["prompts"].values()) == [described]
    assert "before" not in run(files[0], labels)


def test_positions_nearer_to_a_word_than_chance_are_counted(run, trained):
    """Chance is what random directions have; a position that is one is no nearer, and one that is a word is."""
    report = json.loads(run(trained, "--json"))
    drawn = nearest_words.random_directions(128)
    nearest_by_chance = 1 - cosine_distances(drawn, TABLE[3 : WORDS.size - 100].astype(np.float32)).min(axis=1)
    assert report["chance"]["largest"] == pytest.approx(nearest_by_chance.max(), abs=1e-6)
    assert report["chance"]["mean"] == pytest.approx(nearest_by_chance.mean(), abs=1e-6)
    (described,) = report["prompts"].values()
    firsts = [position["neighbors"][0]["cosine"] for position in described["positions"]]
    assert described["nearer_than_chance"] == sum(first > nearest_by_chance.max() for first in firsts) == 11


def test_the_terminal_shows_words_labels_and_measures(run, trained):
    said = run(trained, f"--labels={','.join(LABELS)}", "--top=2").splitlines()
    assert said[0] == f"{WORDS.size - 103:,} words of {os.path.relpath(NANO.location)}"
    assert said[2] == f"{trained}: 12 positions, the 2 nearest words (cosine)"
    assert said[3].startswith("   0  [negative] 1.00  ") and said[3].endswith("  (was [negative])")
    assert said[4].endswith("(was [entailment])") and not said[4].startswith("   1  [entailment]")
    assert [line.split()[0] for line in said[15:]] == [
        "chance", "shared", "tightness", "clusters", "moved", "label", "label", "label", "label", "labels"
    ]  # fmt: skip
    assert "11 of 12 positions" in said[15]
    assert "label      [very bad film] before at 3, now at 3" in said
    assert "▁" not in "".join(said)


def test_prompts_of_other_lengths_are_compared(run, trained, tmp_path):
    write_prompt(tmp_path / "other.npy", normal(7, 128))
    report = json.loads(run(trained, tmp_path / "other.npy", "--json"))
    a, b = np.load(trained / "best" / "prompt.npy"), np.load(tmp_path / "other.npy")
    for measure, similarity in (
        ("mean_vector_similarity", mean_vector_similarity),
        ("best_match_similarity", best_match_similarity),
    ):
        np.testing.assert_allclose(report[measure], [[1, similarity(a, b)], [similarity(b, a), 1]], atol=1e-6)
    rows = run(trained, tmp_path / "other.npy").splitlines()[-2:]
    assert rows[0].split()[-2:] == ["-", f"{best_match_similarity(a, b):.2f}"]
    assert rows[1].split()[-2:] == [f"{mean_vector_similarity(a, b):.2f}", "-"]


def test_pictures(run, trained, tmp_path):
    write_prompt(tmp_path / "long.npy", normal(150, 128))
    run(trained, "--labels=negative,very bad film", f"--picture={tmp_path / 'labels.png'}")
    run(tmp_path / "long.npy", f"--picture={tmp_path / 'long.png'}")
    run(trained, tmp_path / "long.npy", f"--picture={tmp_path / 'two.png'}")
    from matplotlib.image import imread

    for name in ("labels", "long", "two"):
        height, width, _ = imread(tmp_path / f"{name}.png").shape
        assert 300 < height < 4_000 and 300 < width < 4_500


def test_of_the_base_the_embedding_table_alone_is_read(run, trained, monkeypatch):
    def unreadable(index):
        raise AssertionError("read")

    arrays = {
        name: array if name == command.TABLE else StoredArray(array.shape, array.dtype, unreadable)
        for name, array in NANO.arrays.items()
    }
    monkeypatch.setattr(command, "open_model", lambda base: StoredModel(NANO.location, NANO.config, arrays))
    assert "11 of 12 positions" in run(trained)


NANO_PRINTS = {"base_fingerprint": "d78aa9ae865fc70a", "tokenizer_fingerprint": WORDS.fingerprint}


def test_a_prompt_of_this_base_model_is_read(run, trained):
    summary = trained / "summary.json"
    summary.write_text(json.dumps({"base": NANO.location} | NANO_PRINTS))
    assert "11 of 12 positions" in run(trained)


@pytest.mark.parametrize(
    ("prints", "message"),
    [
        ({"base_fingerprint": "aaaa"}, "a base of fingerprint aaaa, this one is d78aa9ae865fc70a: set --base"),
        ({"tokenizer_fingerprint": "bbbb"}, f"fingerprint bbbb, this one is {WORDS.fingerprint}: set --vocabulary"),
    ],
)
def test_a_prompt_of_another_base_model_or_tokenizer_is_refused(refused, trained, tmp_path, prints, message):
    """Its neighbours would be those of another table. NAME.json beside NAME.npy says the same as a run's folder."""
    said = json.dumps({"base": NANO.location} | NANO_PRINTS | prints)
    (trained / "summary.json").write_text(said)
    write_prompt(tmp_path / "alone.npy", normal(2, 128))
    (tmp_path / "alone.json").write_text(said)
    for prompt, file in ((trained, trained / "best" / "prompt.npy"), *[(tmp_path / "alone.npy",) * 2]):
        line = refused(prompt)
        assert f"prompt {file} was trained" in line and message in line


def test_a_peft_file_that_names_another_base_model_is_remarked(monkeypatch, capsys, tmp_path):
    write_adapter(tmp_path / "peft", normal(2, 128), "google/t5-v1_1-base")
    monkeypatch.setattr(sys, "argv", ["neighbors", str(tmp_path / "peft")])
    command.main()
    said = capsys.readouterr()
    assert "2 positions" in said.out
    assert said.err == (
        f"prompt {tmp_path / 'peft'} says that it was trained on the base model 'google/t5-v1_1-base', and this one is "
        f"{NANO.location}\n"
    )


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["wide.npy"], ["wide.npy is [2, 99], but the base model has d_model 128", "Set --base to the base model"]),
        (["none.npy"], ["no prompt file none.npy", "set PROMPT"]),
        (["."], ["no prompt file in .", "set PROMPT"]),
        (["good.npy", "--base=nowhere"], ["no base model at nowhere", "nano: set --base"]),
        (["good.npy", "--base=bare", "--vocabulary=none.model"], ["no vocabulary at none.model", "set --vocabulary"]),
        (["good.npy", "--base=bare"], ["no vocabulary beside the base", "set --vocabulary"]),
        (["good.npy", "--labels="], ["'' tokenises to nothing: set --labels"]),
        (["good.npy", "--labels=good,,bad"], ["'' tokenises to nothing: set --labels"]),
        (["good.npy", "--labels=good,not_good"], ["'not_good' tokenises to <unk>: set --labels"]),
        (["good.npy", "--top=0"], ["--top is 0, expected a whole number of at least 1"]),
        (["good.npy", "--labels=very bad", "--top=8191"], ["--top is 8191, expected a whole number from 1 to 8190"]),
        (["good.npy", "--top=many"], ["--top is 'many', expected a whole number of at least 1"]),
        (["good.npy", "--before=none.npy"], ["no prompt file none.npy"]),
        (["good.npy", "--before=long.npy"], ["long.npy is [5, 128], good.npy [2, 128]: set --before"]),
        (["good.npy", "long.npy", "--before=good.npy"], ["--before is given for 2 prompts: set it with one PROMPT"]),
        (["good.npy", "--picture=none/p.png"], ["cannot write none/p.png", "set --picture"]),
        (["good.npy", "--picture=p.bmp2"], ["cannot write p.bmp2", "bmp2", "set --picture"]),
        ([], ["required: PROMPT"]),
        (["good.npy", "--label=good"], ["unrecognized arguments: --label=good", "--help"]),
        (["runs/a", "runs/b"], ["the runs are on different bases (a, b): set --base"]),
        (["runs/a"], ["no base model at a", "set --base"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_to_set(refused, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    write_prompt("wide.npy", normal(2, 99))
    write_prompt("good.npy", normal(2, 128))
    write_prompt("long.npy", normal(5, 128))
    if "--base=bare" in arguments:
        huggingface.write("bare", NANO.config, {name: np.asarray(value) for name, value in NANO.arrays.items()}, None)
    for run in ("a", "b"):
        write_prompt(f"runs/{run}/best/prompt.npy", normal(2, 128))
        Path(f"runs/{run}/summary.json").write_text(json.dumps({"base": run}))
    line = refused(*arguments)
    assert all(part in line for part in parts), line


def test_a_damaged_table_is_one_line(refused, trained, tmp_path):
    files = {path.name: path.read_bytes() for path in Path(NANO.location).iterdir()}
    (tmp_path / "cut").mkdir()
    for name, data in files.items():
        (tmp_path / "cut" / name).write_bytes(data[: len(data) // 2] if name == huggingface.WEIGHTS else data)
    assert "set --base to a whole checkpoint" in refused(trained, f"--base={tmp_path / 'cut'}")


def test_it_starts_without_what_it_does_not_need(trained):
    code = "import sys; from prompt_tuning_jax import neighbors; neighbors.main(); "
    code += "print(sorted({'tensorflow', 'seqio', 'torch', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, str(trained)], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n") and "11 of 12 positions" in done.stdout
