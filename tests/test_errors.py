"""Errors that carry their setting: each front end calls it by its own name, and the library by none of them."""

import ast
import asyncio
import gc
import importlib
import pickle
import re
import subprocess
import sys
from pathlib import Path

import gin
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import serialization

import prompt_tuning_jax
from prompt_tuning_jax import convert, gin_files, infer, neighbors
from prompt_tuning_jax.batches.child import Child
from prompt_tuning_jax.checkpoints.base import check_base_dtype, open_model
from prompt_tuning_jax.checkpoints.state import StateStore
from prompt_tuning_jax.errors import Setting, SettingError, error_text, near_misses, prefixed, renamed
from prompt_tuning_jax.inference.bank import PromptBank
from prompt_tuning_jax.inference.folder import PromptFolder
from prompt_tuning_jax.prompts.files import read_prompt, write_prompt
from prompt_tuning_jax.tasks.find import find
from tests.tiny import own_caches

PACKAGE = Path(prompt_tuning_jax.__file__).parent
train = importlib.import_module("prompt_tuning_jax.train").main  # `prompt_tuning_jax.train` is a function
CONFIGS = PACKAGE.parent / "gin_configs"


def an_error():
    return SettingError("no file x: set ", Setting("prompt_file"), " or ", Setting("batch_size"))


def test_python_names_the_argument():
    error = an_error()
    assert isinstance(error, ValueError)
    assert str(error) == "no file x: set `prompt` or `batch_size`"
    assert error.setting == "prompt_file" and type(error.setting) is str
    assert SettingError("no file x").setting is None


def test_a_front_end_names_settings_as_it_calls_them():
    flags = {"prompt_file": "--prompts", "batch_size": "--rows"}
    assert an_error().text(flags.__getitem__) == "no file x: set --prompts or --rows"
    assert error_text(an_error(), str.upper) == "no file x: set PROMPT_FILE or BATCH_SIZE"
    assert error_text(OSError("BATCH_SIZE is full"), str.lower) == "BATCH_SIZE is full"


def test_no_name_is_searched_for_in_the_text():
    error = SettingError("prompt_file/PROMPT_FILE is absent: set ", Setting("prompt_file"))
    assert error.text(lambda name: "--prompts") == "prompt_file/PROMPT_FILE is absent: set --prompts"


def test_a_message_is_one_line_of_bounded_length():
    """Whatever a file's names and headers hold; the setting at the end stays."""
    error = SettingError("the tensor a\nb\u2028c is not part of the model: set ", Setting("prompt_file"))
    assert str(error) == "the tensor a b c is not part of the model: set `prompt`"
    error = SettingError(f"base lacks {'x' * 100_000}: set ", Setting("prompt_file"))
    assert str(error).startswith("base lacks xxx") and str(error).endswith("xxx: set `prompt`")
    assert 1_900 < len(str(error)) <= 2_000 and "x ... x" in str(error)
    assert error.parts == pickle.loads(pickle.dumps(error)).parts


def test_settings_survive_pickling():
    again = pickle.loads(pickle.dumps(an_error()))
    assert type(again) is SettingError and again.setting == "prompt_file"
    assert again.parts == an_error().parts and [*map(type, again.parts)] == [str, Setting, str, Setting]


def test_words_in_front_keep_the_settings():
    error = prefixed("trial 3: ", an_error())
    assert error.text(str.upper) == "trial 3: no file x: set PROMPT_FILE or BATCH_SIZE"
    plain = prefixed("trial 3: ", ValueError("no file x"))
    assert type(plain) is ValueError and str(plain) == "trial 3: no file x"


def test_a_caller_may_call_a_setting_otherwise():
    with pytest.raises(SettingError) as raised, renamed(prompt_file="source"):
        raise an_error()
    assert raised.value.text(str.upper) == "no file x: set SOURCE or BATCH_SIZE"
    with pytest.raises(ValueError, match="^plain$"), renamed(prompt_file="source"):
        raise ValueError("plain")


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("sts2", {}, "did you mean sst2 or stsb?"),
        ("sts2", {"shown": repr}, "did you mean 'sst2' or 'stsb'?"),
        ("zzz", {}, "there are qqp, rte, sst2, stsb"),
        ("zzz", {"few": 2, "shown": repr}, "there are 'qqp', 'rte', ..."),
        ("zzz", {"otherwise": "see the list"}, "see the list"),
        ("rte", {"otherwise": "see the list"}, "did you mean rte?"),
    ],
)
def test_near_misses(name, options, expected):
    assert near_misses(name, ["stsb", "sst2", "rte", "qqp"], **options) == expected


def test_near_misses_of_nothing():
    assert near_misses("sst2", []) == "there are none"


def test_swapped_letters_are_the_first_near_miss():
    """Of 11 letters 10 match in "abcde" and "abcdef", and 8 of 10 in "abcde" and "abdce"."""
    assert near_misses("abcde", ["abcdef", "abdce"]) == "did you mean abdce or abcdef?"


def from_python(call):
    with pytest.raises(SettingError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def said(main, arguments, monkeypatch, capfd):
    """The one line that a command line ends with, which must have exit code 2."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    lines = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0].removeprefix("error: ")


def from_gin(tiny, tmp_path, monkeypatch, capfd, *files, **macros):
    with own_caches(tiny, monkeypatch):
        arguments = tiny.arguments(*files, **{"MODEL_DIR": str(tmp_path / "run")} | macros)
        return said(train, arguments, monkeypatch, capfd)


def test_a_base_that_is_not_there(tiny, tmp_path, monkeypatch, capfd):
    macro = "INITIAL_CHECKPOINT_PATH"
    path = str(tmp_path / macro)  # a path is not a setting, whatever it is called
    line = f"no base model at {path}; expected a folder, an id on the hub or one of nano: set "
    assert from_python(lambda: open_model(path)) == line + "`where`"
    assert from_gin(tiny, tmp_path, monkeypatch, capfd, **{macro: path}) == line + macro
    assert said(infer.main, [f"--base={path}"], monkeypatch, capfd) == line + "--base"
    prompt = tmp_path / "p.npy"
    prompt.write_bytes(b"")
    assert said(neighbors.main, [str(prompt), f"--base={path}"], monkeypatch, capfd) == line + "--base"


def test_a_prompt_that_is_not_there(tiny, tmp_path, monkeypatch, capfd):
    path = str(tmp_path / "p.npy")
    line = f"no prompt file {path}; expected a prompt, float32 [prompt length, d_model]: set "
    assert from_python(lambda: read_prompt(path)) == line + "`prompt`"
    gin_line = from_gin(
        tiny, tmp_path, monkeypatch, capfd, "prompts/from_file.gin", "runs/prompt_tune.gin", PROMPT_FILE=path
    )
    assert gin_line == line + "PROMPT_FILE"
    assert said(neighbors.main, [path], monkeypatch, capfd) == line + "PROMPT"


def test_a_source_that_cannot_be_converted(tmp_path, monkeypatch, capfd):
    path, target = tmp_path / "p.npy", str(tmp_path / "target")
    path.write_bytes(b"half")
    expected = "; expected a prompt, float32 [prompt length, d_model]: set SOURCE"
    line = said(convert.main, [str(path), target, "--to=peft"], monkeypatch, capfd)
    assert line.startswith(f"{path} is not a readable prompt (") and line.endswith(expected)
    # The base model beside a prompt is another setting, though one function opens it and a model to convert.
    write_prompt(path, np.zeros((2, 128), np.float32))
    (tmp_path / "empty").mkdir()
    arguments = [str(path), target, "--to=peft", f"--base={tmp_path / 'empty'}"]
    assert said(convert.main, arguments, monkeypatch, capfd).endswith(": set --base")
    arguments = [str(tmp_path / "empty"), target, "--to=orbax"]
    assert said(convert.main, arguments, monkeypatch, capfd).endswith(": set SOURCE")


def test_a_prompt_in_a_folder_is_broken(tmp_path, monkeypatch, capfd):
    (tmp_path / "a.npy").write_bytes(b"half")
    bank = PromptBank(128)
    (error,) = PromptFolder(tmp_path).sync(bank).broken.values()
    assert isinstance(error, SettingError) and error.setting == "prompt_file"
    line = said(infer.main, [f"--prompts={tmp_path / 'a.npy'}"], monkeypatch, capfd)
    assert line == error.text(lambda name: "--prompts")


def test_a_dtype_that_there_is_not(tiny, tmp_path, monkeypatch, capfd):
    line = " is 'int4', expected 'auto', 'float32', 'bfloat16', 'int8' or None for the file's own"
    assert from_python(lambda: check_base_dtype("int4")) == "`dtype`" + line
    assert from_gin(tiny, tmp_path, monkeypatch, capfd, BASE_DTYPE="int4") == "BASE_DTYPE" + line
    assert said(infer.main, ["--dtype=int4"], monkeypatch, capfd) == "--dtype" + line


def test_a_way_to_decode_that_there_is_not(monkeypatch, capfd):
    assert said(infer.main, ["--decode=best"], monkeypatch, capfd).startswith("--decode is 'best', expected one of")
    assert (
        said(infer.main, ["--temperature=101"], monkeypatch, capfd)
        == "--temperature is 101, expected a number from 0 to 100"
    )


def test_a_task_that_there_is_not_from_the_process_that_tokenises(tiny, tmp_path, monkeypatch, capfd):
    line = "no task 'demo_review'; did you mean 'demo_reviews'? Set "
    assert from_python(lambda: find("demo_review")) == line + "`name`"
    found = from_gin(tiny, tmp_path, monkeypatch, capfd, MIXTURE_OR_TASK_NAME="demo_review")
    assert found == line + "MIXTURE_OR_TASK_NAME"
    command = [sys.executable, "-m", "prompt_tuning_jax.tasks", "show", "demo_review"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (done.returncode, done.stderr) == (2, f"error: {line}NAME\n")


CHILD = """
from prompt_tuning_jax.batches.child import user_errors
from prompt_tuning_jax.errors import Setting, SettingError
user_errors({error})
"""


def from_child(tmp_path, monkeypatch, error):
    (tmp_path / "failing_child.py").write_text(CHILD.format(error=error))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{PACKAGE.parent}")
    with pytest.raises(ValueError) as raised:
        Child("failing_child", {}, "failing").finish()
    return raised.value


def test_a_child_processs_error_keeps_its_settings(tmp_path, monkeypatch):
    text = 'a "quoted" pâth\\n{"setting_error": 1}: set '
    found = from_child(tmp_path, monkeypatch, f"SettingError({text!r}, Setting('data_dir'), ' to one')")
    assert type(found) is SettingError and found.setting == "data_dir"
    assert found.parts == (text, "data_dir", " to one") and [*map(type, found.parts)] == [str, Setting, str]


@pytest.mark.parametrize("text", ["no such rows", '["setting_error"]', '{"other": 1}', "3"])
def test_a_child_processs_other_error_is_its_line(tmp_path, monkeypatch, text):
    found = from_child(tmp_path, monkeypatch, f"ValueError({text!r})")
    assert type(found) is ValueError and str(found) == text


def test_gin_adds_nothing_to_an_error_that_passes_through_it():
    @gin.configurable(module="test_errors")
    def failing(setting=True):
        raise an_error() if setting else ValueError("plain")

    for bindings, expected in (((), "no file x: set PROMPT_FILE or BATCH_SIZE"), (("setting",), "plain")):
        with gin.unlock_config():
            for name in bindings:
                gin.bind_parameter(f"test_errors.failing.{name}", False)
        with pytest.raises(ValueError) as raised:
            failing()
        assert "In call to configurable" in str(raised.value)
        assert gin_files.in_gin(raised.value) == expected
    gin.clear_config()


def test_parsing_leaves_gin_as_it_was(monkeypatch):
    monkeypatch.setattr(gin.config, "_LOCATION_PREFIXES", [""])
    before = [*gin.config._FILE_READERS, ("another", "reader")]
    monkeypatch.setattr(gin.config, "_FILE_READERS", [*before])
    gin.clear_config()
    with pytest.raises(ValueError, match="no gin file zzz"):
        gin_files.parse(["--gin_file=models/nano.gin", "--gin_file=zzz"])
    assert before == gin.config._FILE_READERS
    gin.clear_config()


def test_a_failed_restore_leaves_the_process_as_it_was(tmp_path):
    store = StateStore(tmp_path)
    hook = sys.unraisablehook
    with pytest.raises(SettingError, match="^checkpoint 3 in `folder` cannot be restored") as error:
        store.restore(3, {"a": 1.0})
    assert sys.unraisablehook is hook and error.value.setting == "model_dir"
    store.close()


def test_a_failed_restore_is_told_once(tmp_path, caplog):
    """Orbax waits for one failed read; asyncio would tell of the others, and does tell of anybody else's."""
    store = StateStore(tmp_path)
    with pytest.raises(SettingError):
        store.restore(3, {"a": 1.0})
    store.close()

    async def orbax_reads():
        await serialization.async_deserialize(None, {})  # pyright: ignore[reportArgumentType]

    async def another_reads():
        raise OSError("no such file")

    for read in (orbax_reads, another_reads):
        with asyncio.Runner() as runner:
            task = runner.get_loop().create_task(read())
            runner.run(asyncio.wait([task]))
        del task
    gc.collect()
    told = [record.exc_info[1] for record in caplog.records if record.name == "asyncio" and record.exc_info]
    assert [*map(str, told)] == ["no such file"]


def test_flags_need_neither_gin_nor_jax():
    code = "import sys, prompt_tuning_jax.flags; print(sorted({'gin', 'jax'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout == "[]\n", done.stderr


# What reads gin, what only T5X calls, whose users know its settings as macros, and the table of `train --memory-plan`.
GIN = ("train.py", "eval.py", "sweep.py", "demo.py", "gin_files.py", "t5x_host/", "training/memory_table.py")


def sentences(source):
    """The texts of a file but for its docstrings and its regular expressions; those of more than a word."""
    tree = ast.parse(source)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstrings |= {id(one.value) for one in node.body[:1] if isinstance(one, ast.Expr)}
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and id(node) not in docstrings else None
        if isinstance(text, str) and " " in text and not text.startswith("(?"):
            yield node.lineno, text


def test_no_file_of_the_library_names_a_macro():
    macros = set()
    for file in CONFIGS.rglob("*.gin"):
        macros |= set(re.findall(r"(?m)^([A-Z][A-Z0-9_]+) *=|%([A-Z][A-Z0-9_]+)", file.read_text()))
    macros = {name for pair in macros for name in pair if name}
    assert {"PROMPT_FILE", "INITIAL_CHECKPOINT_PATH", "MESH", "SWEEP_DIR"} <= macros
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(GIN):
            texts = sentences(path.read_text())
            found += [f"{name}:{line}: {text}" for line, text in texts if macros & {*re.findall(r"\w+", text)}]
    assert not found


def test_the_scan_sees_what_it_looks_for():
    source = '"""Set MESH."""\nraise ValueError(f"set MESH to {x}")\nnames = ["MESH"]\nre.sub("(?m)^MESH = 1", "", y)\n'
    assert [*sentences(source)] == [(2, "set MESH to ")]
