"""The bank against a dict of arrays, and a folder of prompts as it changes."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning_jax.checkpoints import t5x
from prompt_tuning_jax.inference.bank import PromptBank
from prompt_tuning_jax.inference.folder import PromptFolder
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
    capacity=st.integers(1, 4),
)
def test_the_bank_is_a_dict_of_prompts(operations, capacity):
    bank, expected = PromptBank(WIDTH, capacity=capacity), {}
    for name, length, value in operations:
        if length:
            bank.add(name, prompt_of(length, value))
            expected[name] = prompt_of(length, value)
        elif name in expected:
            bank.remove(name)
            del expected[name]
    assert [*bank] == sorted(expected) and len(bank) == len(expected)
    assert bank.lengths == {name: len(prompt) for name, prompt in sorted(expected.items())}
    rows = jnp.array([bank.row(name) for name in (None, *expected)])
    values, mask = map(np.asarray, bank.prompts.take(rows))
    for prompt, value, seen in zip([prompt_of(0, 0), *expected.values()], values, mask, strict=True):
        np.testing.assert_array_equal(value[seen], prompt)
        assert seen.tolist() == sorted(seen)  # padding in front
        assert not value[~seen].any()


def test_a_row_is_used_again_and_the_capacity_doubles():
    bank = PromptBank(WIDTH, capacity=3)
    for name in "abc":
        bank.add(name, prompt_of(2, 1))
    assert bank.prompts.values.shape == (4, 2, WIDTH)
    bank.remove("b")
    bank.add("d", prompt_of(1, 2))
    assert bank.prompts.values.shape == (4, 2, WIDTH)
    bank.add("e", prompt_of(5, 3))
    assert bank.prompts.values.shape == (8, 5, WIDTH)


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
    values, mask = map(np.asarray, bank.prompts.take(jnp.array([bank.row(name) for name in bank])))
    return {name: value[seen][0, 0] for name, value, seen in zip(bank, values, mask, strict=True)}


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
