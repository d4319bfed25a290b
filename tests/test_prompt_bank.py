"""The bank against a dict of arrays, and a folder of prompts as it changes."""

import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning_jax.checkpoints import t5x
from prompt_tuning_jax.checkpoints.tuned import write_prompts
from prompt_tuning_jax.inference.bank import PromptBank
from prompt_tuning_jax.inference.folder import PromptFolder
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.prompts.files import IN_T5X, OFFICIAL_NAME, write_prompt
from prompt_tuning_jax.prompts.peft import write_adapter

WIDTH = 4
NAMES = "abcdefghijkl"


def prompt_of(length, value):
    return np.full((length, WIDTH), value, np.float32)


@settings(max_examples=20)
@given(
    operations=st.lists(
        st.tuples(st.sampled_from(NAMES), st.one_of(st.none(), st.integers(1, 6)), st.integers(1, 99)), max_size=25
    ),
)
def test_the_bank_is_a_dict_of_prompts(operations):
    bank, expected = PromptBank(WIDTH), {}
    for name, length, value in operations:
        if length:
            bank.add(name, prompt_of(length, value))
            expected[name] = prompt_of(length, value)
        elif name in expected:
            bank.remove(name)
            del expected[name]
    assert [*bank] == sorted(expected) and len(bank) == len(expected)
    assert bank.lengths == {name: len(prompt) for name, prompt in sorted(expected.items())}
    injection, mask, _ = bank.take([None, *expected], len(expected) + 1)
    values = np.asarray(injection.prompt)
    for prompt, value, seen in zip([prompt_of(0, 0), *expected.values()], values, mask, strict=True):
        np.testing.assert_array_equal(value[seen], prompt)
        assert seen.tolist() == sorted(seen)  # padding in front
        assert not value[~seen].any()


def test_a_row_pays_for_the_prompts_of_its_own_batch():
    """A long prompt lengthens no batch that it is not in, and its memory is free once it is removed."""
    bank = PromptBank(WIDTH, longest=3_000)
    assert bank.take([None], 1)[1].shape == (1, 0)  # no prompts, no positions
    bank.add("short", prompt_of(3, 1))
    before = bank.nbytes
    bank.add("long", prompt_of(2_000, 2))
    assert bank.take(["short", None], 4)[1].shape == (4, 20)
    assert bank.take(["short", "long"], 4)[1].shape == (4, 2_048)
    bank.remove("long")
    assert bank.nbytes == before
    with pytest.raises(ValueError, match="prompt x has 3,001 positions, expected at most 3,000 beside inputs"):
        bank.add("x", prompt_of(3_001, 1))


def layers_of(length, value, layers=3):
    return np.arange(layers, dtype=np.float32)[:, None, None] + prompt_of(length, value)


def test_a_batch_has_the_prompts_of_its_rows():
    """An ordinary batch has no prompts per layer. A mixed one has each row's, behind padding, and 0 for the others."""
    bank = PromptBank(WIDTH, layers=3)
    bank.add("ordinary", prompt_of(4, 1))
    bank.add("replacing", layers_of(2, 5))
    bank.add("adding", prompt_of(3, 7), additions=layers_of(3, 10))
    assert bank.lengths == {"adding": 3, "ordinary": 4, "replacing": 2}
    injection, mask, more = bank.take(["ordinary", None], 4)
    assert injection.layer_prompts is None and not more
    assert mask.sum(axis=1).tolist() == [4, 0, 0, 0]
    np.testing.assert_array_equal(injection.prompt[0, -4:], prompt_of(4, 1))

    injection, mask, more = bank.take(["replacing", "ordinary", None, "adding"], 5)
    assert mask.sum(axis=1).tolist() == [2, 4, 0, 3, 0] and np.all(np.diff(mask.astype(int)) >= 0)
    assert more["layers_replace"].tolist() == [True, False, False, False, False]
    prompt, layer_prompts = np.asarray(injection.prompt), np.asarray(injection.layer_prompts)
    np.testing.assert_array_equal(layer_prompts[0, :, -2:], layers_of(2, 5))
    np.testing.assert_array_equal(prompt[1, -4:], prompt_of(4, 1))
    np.testing.assert_array_equal(prompt[3, -3:] + layer_prompts[3, 0, -3:], prompt_of(3, 7 + 10))
    np.testing.assert_array_equal(layer_prompts[3, 1:, -3:], layers_of(3, 10)[1:])
    assert not layer_prompts[[1, 2, 4]].any() and not prompt[[2, 4]].any()


def test_a_name_may_change_its_kind():
    bank = PromptBank(WIDTH)
    for prompt, additions, layered in (
        (prompt_of(2, 1), None, False),
        (layers_of(2, 2), None, True),
        (prompt_of(3, 3), layers_of(3, 3), True),
        (prompt_of(1, 4), None, False),
    ):
        bank.add("a", prompt, additions=additions)
        assert (
            [*bank] == ["a"]
            and (bank.find("a").layer_prompts is not None) == layered
            and bank.lengths == {"a": prompt.shape[-2]}
        )
    with pytest.raises(ValueError, match=r"prompt b is \[2, 2, 4\], but the base has 3 encoder layers"):
        bank.add("b", layers_of(2, 1, layers=2))
    bank.add("c", layers_of(2, 1))
    bank.remove("c")
    assert [*bank] == ["a"]
    with pytest.raises(ValueError, match="no prompt 'c'"):
        bank.take(["c"], 1)


def test_a_prompt_of_another_base_is_refused():
    bank = PromptBank(WIDTH, fingerprint="aaaa")
    with pytest.raises(ValueError, match=r"prompt x is \[2, 5\], but the base has d_model 4.*Set `where`"):
        bank.add("x", np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match="prompt x was trained on a base of fingerprint bbbb, this one is aaaa"):
        bank.add("x", prompt_of(2, 1), "bbbb")
    bank.add("x", prompt_of(2, 1), "aaaa")
    bank.add("y", prompt_of(2, 1))
    assert [*bank] == ["x", "y"]


def contents(bank):
    return {name: bank.find(name).prompt[0, 0] for name in bank}


@pytest.fixture
def folder(tmp_path):
    """One prompt of every kind, and what is none."""
    write_prompt(tmp_path / "npy.npy", prompt_of(2, 1))
    write_prompt(tmp_path / "run" / "best" / "prompt.npy", prompt_of(3, 2))
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"base_fingerprint": "aaaa"}))
    write_adapter(tmp_path / "peft", prompt_of(1, 3))
    (tmp_path / "official").mkdir()
    with open(tmp_path / "official" / OFFICIAL_NAME, "wb") as file:
        np.save(file, prompt_of(2, 4))
    t5x.write(tmp_path / "t5x", {IN_T5X[0]: prompt_of(1, 5)})
    (tmp_path / "README.md").write_text("no prompt")
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden.npy").write_text("no prompt")
    return tmp_path


def test_a_folder_fills_the_bank_and_keeps_it(folder):
    bank, prompts = PromptBank(WIDTH, fingerprint="aaaa"), PromptFolder(folder)
    assert prompts.single is None
    changes = prompts.sync(bank)
    assert sorted(changes.added) == ["npy", "official", "peft", "run", "t5x"] and not changes.broken
    assert contents(bank) == {"npy": 1, "official": 4, "peft": 3, "run": 2, "t5x": 5}
    assert prompts.sync(bank) == ([], [], {})

    write_prompt(folder / "npy.npy", prompt_of(5, 7))
    write_prompt(folder / "new.npy", prompt_of(1, 8))
    shutil.rmtree(folder / "peft")
    changes = prompts.sync(bank)
    assert sorted(changes.added) == ["new", "npy"] and changes.removed == ["peft"]
    assert contents(bank) == {"new": 8, "npy": 7, "official": 4, "run": 2, "t5x": 5}


def test_a_broken_file_leaves_the_others_and_its_own_earlier_prompt(folder):
    bank, prompts = PromptBank(WIDTH, fingerprint="aaaa"), PromptFolder(folder)
    (folder / "broken.npy").write_bytes(b"\x93NUMPY")
    changes = prompts.sync(bank)
    assert [*changes.broken] == ["broken"] and str(folder / "broken.npy") in str(changes.broken["broken"])
    assert [*bank] == ["npy", "official", "peft", "run", "t5x"]

    (folder / "npy.npy").write_bytes(b"half")
    changes = prompts.sync(bank)
    assert sorted(changes.broken) == ["broken", "npy"] and not changes.added
    assert contents(bank)["npy"] == 1
    write_prompt(folder / "broken.npy", prompt_of(1, 9))
    (folder / "npy.npy").unlink()
    assert prompts.sync(bank) == (["broken"], ["npy"], {})
    assert contents(bank)["broken"] == 9 and "npy" not in bank


def test_whatever_is_in_a_file_breaks_that_prompt_alone(folder):
    """A named pipe, which would block whoever opens it; other dtypes; JSON nested without end; too long."""
    bank, prompts = PromptBank(WIDTH, fingerprint="aaaa", longest=50), PromptFolder(folder)
    os.mkfifo(folder / "pipe.npy")
    (folder / "piped" / "best").mkdir(parents=True)
    write_prompt(folder / "piped" / "best" / "prompt.npy", prompt_of(2, 1))
    os.mkfifo(folder / "piped" / "summary.json")
    np.save(folder / "fields.npy", np.zeros((2, 4), [("a", "<f4"), ("b", "<f4")]))
    np.save(folder / "void.npy", np.zeros((2, 4), "V3"))
    write_prompt(folder / "deep.npy", prompt_of(2, 1))
    (folder / "deep.json").write_text("[" * 200_000)
    write_prompt(folder / "long.npy", prompt_of(51, 1))
    broken = prompts.sync(bank).broken
    assert sorted(broken) == ["deep", "fields", "long", "pipe", "piped", "void"]
    assert [*bank] == ["npy", "official", "peft", "run", "t5x"]
    assert "pipe.npy is no regular file" in str(broken["pipe"])
    assert "deep.json is no JSON object" in str(broken["deep"])
    assert "51 positions, expected at most 50" in str(broken["long"])
    with pytest.raises(ValueError, match="prompt 'long' is broken: prompt long has 51 positions"):
        bank.find("long")


def test_a_refused_prompt_takes_no_memory(folder):
    """Its error is kept as long as the file is there, but not the array that was read from it."""
    bank, prompts = PromptBank(WIDTH, longest=50), PromptFolder(folder)
    prompts.sync(bank)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        write_prompt(folder / "long.npy", prompt_of(500_000, 1))
        changes = prompts.sync(bank)
        assert "500,000 positions, expected at most 50" in str(changes.broken["long"])
        assert tracemalloc.get_traced_memory()[0] - before < 1_000_000 < 500_000 * WIDTH * 4
    finally:
        tracemalloc.stop()


def test_two_prompts_of_one_name_are_both_named(folder):
    bank, prompts = PromptBank(WIDTH, fingerprint="aaaa"), PromptFolder(folder)
    write_prompt(folder / "run.npy", prompt_of(2, 1))
    broken = prompts.sync(bank).broken
    assert "run and run.npy are prompts of one name" in str(broken["run"]) and "run" not in bank
    (folder / "run.npy").unlink()
    assert prompts.sync(bank) == (["run"], [], {})


def test_a_file_is_read_once_it_has_settled(folder):
    """While it is being written, the bank keeps the earlier prompt; a change between two looks is read at the next."""
    bank, prompts = PromptBank(WIDTH, fingerprint="aaaa"), PromptFolder(folder)
    prompts.sync(bank)
    for value in (7, 8):
        write_prompt(folder / "npy.npy", prompt_of(value, value))
        assert prompts.sync(bank, settled=True) == ([], [], {}) and contents(bank)["npy"] == 1
    assert prompts.sync(bank, settled=True).added == ["npy"] and contents(bank)["npy"] == 8


def test_a_summary_beside_a_prompt_checks_the_base(folder):
    bank, prompts = PromptBank(WIDTH, fingerprint="aaaa"), PromptFolder(folder)
    (folder / "npy.json").write_text('{"base_fingerprint": "cccc"}')
    (folder / "run" / "summary.json").write_text("[1]")
    broken = prompts.sync(bank).broken
    assert "fingerprint cccc, this one is aaaa" in str(broken["npy"])
    assert "expected the summary.json of a run" in str(broken["run"])
    (folder / "npy.json").write_text('{"base_fingerprint": "aaaa"}')
    changes = prompts.sync(bank)
    assert changes.added == ["npy"] and [*changes.broken] == ["run"]


def test_a_summary_beside_a_prompt_checks_the_tokenizer(folder):
    """A prompt whose summary says none, or that has no summary, is taken."""
    bank, prompts = PromptBank(WIDTH, fingerprint="aaaa", tokenizer="tttt"), PromptFolder(folder)
    (folder / "npy.json").write_text('{"base_fingerprint": "aaaa", "tokenizer_fingerprint": "uuuu"}')
    (folder / "t5x" / "summary.json").write_text('{"tokenizer_fingerprint": "tttt"}')
    changes = prompts.sync(bank)
    assert sorted(changes.added) == ["official", "peft", "run", "t5x"] and [*changes.broken] == ["npy"]
    message = "prompt npy was trained with a tokenizer of fingerprint uuuu, this one is tttt: set `vocabulary` to"
    assert str(changes.broken["npy"]).startswith(message)
    with pytest.raises(ValueError, match="prompt 'npy' is broken: prompt npy was trained with a tokenizer"):
        bank.find("npy")


def test_a_peft_file_that_names_another_base_model_is_remarked(folder):
    bank, prompts = PromptBank(WIDTH, fingerprint="aaaa", base="/models/flan-t5-base"), PromptFolder(folder)
    prompts.sync(bank)
    assert prompts.remarks == {}  # it names none
    write_adapter(folder / "peft", prompt_of(1, 3), "google/t5-v1_1-base")
    write_adapter(folder / "same", prompt_of(1, 3), "google/flan-t5-base@main")
    write_adapter(folder / "known", prompt_of(1, 3), "google/t5-v1_1-base")
    (folder / "known" / "summary.json").write_text('{"base_fingerprint": "aaaa"}')  # it is the same whatever its name
    assert sorted(prompts.sync(bank).added) == ["known", "peft", "same"]
    line = "prompt peft says that it was trained on the base model 'google/t5-v1_1-base', and this one is "
    assert prompts.remarks == {"peft": line + "/models/flan-t5-base"}
    assert contents(bank)["peft"] == 3
    shutil.rmtree(folder / "peft")
    prompts.sync(bank)
    assert prompts.remarks == {}


def test_a_prompt_with_additions_is_a_folder_of_two_files(tmp_path):
    """In a folder of prompts, by itself, by either of its files, and in a run; changed files are read again."""
    injection = Injection(prompt_of(2, 1), layers_of(2, 3))
    write_prompts(tmp_path / "adding", injection)
    write_prompts(tmp_path / "run" / "best", injection)
    write_prompts(tmp_path / "ordinary.npy", Injection(prompt_of(2, 9)))
    bank, prompts = PromptBank(WIDTH, layers=3), PromptFolder(tmp_path)
    assert sorted(prompts.sync(bank).added) == ["adding", "ordinary", "run"]
    layered = {name for name in bank if bank.find(name).layer_prompts is not None}
    assert layered == {"adding", "run"}
    for path, name in (
        ("adding", "adding"),
        ("adding/prompt.npy", "prompt"),
        ("adding/layer_prompts.npy", "layer_prompts"),
        ("run", "run"),
        ("run/best/prompt.npy", "prompt"),
    ):
        own, single = PromptBank(WIDTH, layers=3), PromptFolder(tmp_path / path)
        assert single.single == name and single.sync(own).added == [name]
        (found, _, _), (expected, _, _) = own.take([name], 1), bank.take(["adding"], 1)
        np.testing.assert_array_equal((found.prompt + found.layer_prompts[:, 0])[0, -2:], prompt_of(2, 4))
        np.testing.assert_array_equal(found.layer_prompts, expected.layer_prompts)

    write_prompt(tmp_path / "run" / "best" / "layer_prompts.npy", layers_of(2, 30))
    write_prompt(tmp_path / "adding" / "layer_prompts.npy", layers_of(3, 30))
    changes = prompts.sync(bank)
    assert changes.added == ["run"] and [*changes.broken] == ["adding"]
    assert "adding has a prompt [2, 4] and additions [3, 3, 4] to it, expected [P, D] and [L, P, D]" in str(
        changes.broken["adding"]
    )
    np.testing.assert_array_equal(bank.take(["run"], 1)[0].layer_prompts[0, 1:, -2:], layers_of(2, 30)[1:])


ONE = [("npy.npy", "npy"), ("t5x", "t5x"), ("run", "run"), ("run/best/prompt.npy", "prompt")]


@pytest.mark.parametrize("path, name", ONE)
def test_one_prompt_is_a_folder_of_one(folder, path, name):
    bank, prompts = PromptBank(WIDTH, fingerprint="bbbb"), PromptFolder(folder / path)
    assert prompts.single == name
    broken = prompts.sync(bank).broken
    if path in ("npy.npy", "t5x"):
        assert [*bank] == [name]
    else:  # its run's summary is found either way
        assert "fingerprint aaaa, this one is bbbb" in str(broken[name])


def test_a_missing_folder_is_an_error_with_its_argument(tmp_path):
    with pytest.raises(ValueError, match="no folder of prompts at .*nowhere: set `prompts` "):
        PromptFolder(tmp_path / "nowhere")
