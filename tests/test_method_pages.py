"""The pages of methods, of coming from elsewhere and of troubleshooting: what they say is run, counted or looked up."""

import ast
import functools
import importlib
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ROOT

import prompt_tuning_jax as pt
from experiments import methods
from prompt_tuning_jax import gin_files
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.base import expected_shapes
from prompt_tuning_jax.methods.shapes import start_shapes
from prompt_tuning_jax.prompts.peft import write_adapter
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.training import api, eval_run, run
from prompt_tuning_jax.training.run_folder import NoFolder

DOCS = ROOT / "docs"
PAGES = sorted([*(DOCS / "methods").glob("*.md"), *(DOCS / "coming_from").glob("*.md"), DOCS / "troubleshooting.md"])
TEXTS = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
CONFIG = T5Config(
    vocab_size=8_320, emb_dim=64, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, mlp_dim=32, head_dim=8
)


def blocks(*languages: str) -> list:
    """Returns the fenced blocks of these languages on all pages, as parameters of a test."""
    return [
        pytest.param(text, id=f"{name}-{number}")
        for name, page in TEXTS.items()
        for number, (language, text) in enumerate(re.findall(r"(?ms)^ *```(\w*)\n(.*?)^ *```$", page))
        if language in languages
    ]


pytestmark = pytest.mark.usefixtures("only_this_tests_gin")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model of one layer in each stack, with the embedded vocabulary: the examples' sizes fit it."""
    folder = tmp_path_factory.mktemp("page") / "base"
    rng = np.random.default_rng(0)
    parameters = {
        name: rng.normal(1.0 if name.endswith("scale") else 0.0, 0.3, shape).astype(np.float32)
        for name, shape in expected_shapes(CONFIG).items()
    }
    huggingface.write(folder, CONFIG, parameters, ROOT / "prompt_tuning_jax" / "bases" / "nano" / "spiece.model")
    return folder


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files that the examples read, in the working directory."""
    rows = {
        "train": [("a joy", 1), ("a bore", 0), ("a fine cast", 1), ("an awful plot", 0)],
        "dev": [("a delight", 1), ("so dull", 0)],
    }
    labels = {
        "": ("negative", "positive"),
        "sst2_": ("negative", "positive"),
        "mrpc_": ("not equivalent", "equivalent"),
    }
    for prefix, names in labels.items():
        for split, examples in rows.items():
            lines = [json.dumps({"inputs": f"sentence: {text}", "targets": names[at]}) for text, at in examples]
            (tmp_path / f"{prefix}{split}.jsonl").write_text("\n".join(lines) + "\n")
    rng = np.random.default_rng(0)
    (tmp_path / "sources").mkdir()
    for name in ("source", "short_run", "prompt", "sources/sst2", "sources/mrpc"):
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(100, CONFIG.emb_dim)).astype(np.float32))
    for name in ("peft_prompt", "adapter"):
        write_adapter(tmp_path / name, np.load(tmp_path / "prompt.npy"), "google/t5-v1_1-small")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(code: str, base: Path) -> str:
    """Returns an example on the small model, with two steps of two rows."""
    code = re.sub(r'"(nano|google/[\w-]+)"', repr(str(base)), code)
    code = re.sub(r"\bsteps=[\d_]+", "steps=2, eval_every=1, progress=False", code)
    return re.sub(r"\bbatch_size=\d+", "batch_size=2", re.sub(r"\bmax_steps=\d+", "max_steps=1", code))


load_once = functools.cache(pt.load)  # an example only reads its model


def start_alone(config: run.TrainConfig, **_) -> SimpleNamespace:
    """Stands for `loop.train`: everything but the steps and the evaluations, whose programs take long to compile."""
    begun = run.Run(config, NoFolder(), config.model, warn=lambda line: None)
    trained, count = begun.state.trainable, sum(value.size for value in begun.state.trainable.values())
    summary = {"best": {"accuracy": 0.0}, "trainable_parameters": count}
    return SimpleNamespace(best_injection=config.method.apply(trained, begun.frozen), summary=summary)


# The base model of these tests has another name than that of the page.
@pytest.mark.filterwarnings("ignore:prompt .* says that it was trained on the base model:UserWarning")
@pytest.mark.parametrize("code", blocks("python"))
def test_python_of_the_pages_runs(code, base, files, monkeypatch, request):
    """That of the first page to its end; the others train no step, see `start_alone`."""
    if re.search("import (seqio|transformers)", code):  # a process of their own: of one registry, and of many warnings
        child = [sys.executable, "-c", shortened(code, base)]
        done = subprocess.run(child, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr[-2000:]
        return
    if "methods/prompt_tuning.md" not in request.node.name:
        monkeypatch.setattr(api, "train_run", start_alone)
    monkeypatch.setattr(pt, "load", load_once)
    saved = [Path(name) for name in re.findall(r"(?m)^[^#\n]*\bsave\w*\(\"([\w.]+)\"", code)]
    before = {path: path.exists() and path.stat().st_mtime_ns for path in saved}
    exec(compile(shortened(code, base), "page", "exec"), {"__name__": "page"})
    assert all(path.stat().st_mtime_ns != before[path] for path in saved)


def commands() -> list:
    """Returns every line of a shell block that calls a program of ours, its continuations joined."""
    found = []
    for block in blocks("bash"):
        for number, line in enumerate(block.values[0].replace("\\\n", " ").splitlines()):
            if line.strip() and not line.lstrip().startswith("#"):
                found.append(pytest.param(line, id=f"{block.id}-{number}"))
    return found


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_pages_are_taken(line, files, monkeypatch):
    """As far as they go without the data and the base model of a reader."""
    words = [word for word in shlex.split(line, comments=True) if not re.match(r"\w+=", word)]
    words = words[: words.index("<")] if "<" in words else words
    if words[0] == "prompt-tuning":
        words = ["python", "-m", f"prompt_tuning_jax.{words[1]}", *words[2:]]
    if words[:3] == ["python", "-m", "t5x.train"]:  # which is not installed: the files that it is given are there
        for word in words:
            if word.startswith("--gin_file="):
                assert (ROOT / "gin_configs" / word.partition("=")[2]).is_file(), word
        return
    if words[0] in ("pip", "rm", "ls", "nvidia-smi", "kill"):
        return
    assert words[:2] == ["python", "-m"], words
    module, arguments = words[2], words[3:]
    if module == "prompt_tuning_jax.train":
        flags = gin_files.parse(arguments, flags=("allow_other_config", "memory-plan"))
        assert set(flags) <= {"allow_other_config", "memory-plan"}
        gin.get_configurable(run.TrainConfig)().check()
    elif module == "prompt_tuning_jax.eval":
        gin_files.parse(arguments)
        assert gin.get_configurable(eval_run.evaluate_prompt)(check_only=True) == {}
    elif module == "prompt_tuning_jax.sweep":
        from prompt_tuning_jax import sweep

        monkeypatch.chdir(ROOT)
        assert (
            sweep.sweep([word for word in arguments if not word.startswith("--launcher=")] + ["--launcher=print"]) == 0
        )
    elif module.startswith("experiments."):
        assert importlib.util.find_spec(module)
    else:
        importlib.import_module(module).parse(arguments)


def value_of(formula: str, **sizes: int) -> int:
    """Returns what a formula of the table gives: `·` is a multiplication."""
    tree = ast.parse(formula.replace("·", "*"), mode="eval")
    return eval(compile(tree, "formula", "eval"), {}, sizes)


def test_the_formulas_of_the_table_count_what_is_trained():
    sizes = {"P": 6, "D": 24, "L": 3, "H": 2, "K": 5, "F": 40, "m": 7, "r": 2, "h": 9, "n": 3, "N": 2, "Q": 4, "G": 11}
    config = T5Config(90, 24, 2, 3, 3, 40, head_dim=5)
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in expected_shapes(config).items()}
    tasks = ("a", "b")
    made = {
        "Prompt tuning": pt.PromptTuning(6),
        "SPoT": pt.PromptTuning(6),
        "Residual prompt": pt.ResidualPrompt(6, bottleneck=7),
        "Low-rank prompt": pt.LowRankPrompt(6, rank=2),
        "ULPT": pt.ULPT(6, rank=2),
        "SuperPos": pt.SuperPos(6, tokens=7, population=50),
        "P-tuning, MLP": pt.MLPPrompt(6, hidden_size=9),
        "P-tuning, LSTM": pt.LSTMPrompt(6, hidden_size=9, lstm_layers=3),
        "Scale and shift": pt.ScaleShiftPrompt(6),
        "MPT": pt.MPT(tasks, 6, rank=2),
        "Multitask prompt, add": pt.MultitaskPrompt(tasks, 6),
        "concatenate": pt.MultitaskPrompt(tasks, 6, "concatenate", task_length=4),
        "concatenate features": pt.MultitaskPrompt(tasks, 6, "concatenate_features", shared_features=11),
        "project": pt.MultitaskPrompt(tasks, 6, "project", shared_features=11),
        "Prompts per layer": pt.PerLayerPrompt(6),
        "Prefix tuning": pt.PrefixTuning(6),
        "LoRA": pt.LoRA(rank=2),
        "IA3": pt.IA3(),
    }
    rows = re.findall(r"(?m)^\| ([^|]+) \| ([^|]*)\| ([^|]*)\| `([^`|]+)` \|", TEXTS["methods/index.md"])
    formulas = {re.sub(r"\[([^]]+)\]\([^)]*\)|^- ", r"\1", name): formula for name, _, _, formula in rows}
    assert formulas.keys() == made.keys()
    for name, method in made.items():
        trained, _ = start_shapes(method, config, shapes)
        assert value_of(formulas[name], **sizes) == sum(math.prod(one.shape) for one in trained.values()), name


def test_each_method_and_each_gin_file_has_a_page():
    index = TEXTS["methods/index.md"]
    for path in (ROOT / "gin_configs" / "methods").glob("*.gin"):
        assert f"--gin_file=methods/{path.name}" in TEXTS[f"methods/{path.stem}.md"]
        assert f"`methods/{path.name}`" in index
    classes = [name for name in pt.__all__ if isinstance(getattr(pt, name), type)]
    for name in classes:
        if issubclass(getattr(pt, name), pt.Method) and name != "Method":
            assert f"`{name}`" in index and any(f"pt.{name}(" in page for page in TEXTS.values()), name
    for name in TEXTS:
        if name.startswith("methods/") and name != "methods/index.md":
            assert f"]({Path(name).name})" in index, name
            assert "\n## Formula\n" in TEXTS[name] and "\n## Source\n" in TEXTS[name], name


@pytest.fixture(scope="module")
def measured(docs_module):
    """The hook of MkDocs."""
    return docs_module("measured")


def test_measured_rows_come_from_the_csv(measured, tmp_path):
    def found(method, right, rate="0.3", seed=0):
        curve = {20: 50.0, 40: 50.0}
        return methods.TrialResult(
            method, "nano", "sst2", rate, seed, curve, 40, 40, 2560, 10_368, np.array(right), "0123"
        )

    path = tmp_path / "methods.csv"
    methods.to_csv(
        [found("official", [True, False] * 50), found("lora", [True] * 100), found("lora", [False] * 100, "1.0")], path
    )
    text = measured.filled('a\n\n{{ measured "lora" }}\n\n{{ measured "ia3" }}\n', path)
    row = "| `lora` | nano | sst2 | 100.0 [100.0, 100.0] | 50.0 [40.0, 60.0] | 0.3 | 20 | 2,560 | 10,368 bytes |"
    assert row in text.splitlines() and "`official`" not in text
    assert text.endswith(f"\n\n{measured.NOT_YET}\n")
    assert measured.filled("{{ measured }}", path).count("| nano |") == 2
    assert measured.filled('{{ measured "lora" }}', tmp_path / "absent.csv") == measured.NOT_YET
    assert measured.on_page_markdown("no mark", page=None) == "no mark"


def test_the_marks_of_the_pages_are_names_of_methods(measured):
    """Those of the sweep, or, for one that it does not have, those of a gin file."""
    text = (ROOT / "gin_configs" / "sweeps" / "methods.gin").read_text()
    known = set(re.findall(r'(?m)^ {10}"(\w+)": \{', text)) | {
        path.stem for path in (ROOT / "gin_configs" / "methods").glob("*.gin")
    }
    named = {
        name for page in TEXTS.values() for mark in measured.MARK.findall(page) for name in re.findall(r"\w+", mark)
    }
    assert named <= known and {"official", "lora", "mlp_prompt"} <= named
    assert not any(re.search(r"\{\{(?! measured)", page) for page in TEXTS.values())


def message_patterns() -> list[re.Pattern]:
    """Returns a pattern for each text that the package puts together, with `.*` for what differs."""

    def pattern(node: ast.AST) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return re.escape(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(map(pattern, node.values))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return pattern(node.left) + pattern(node.right)
        return ".*"

    found = set()
    for path in (ROOT / "prompt_tuning_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                found.add("".join(map(pattern, node.args)))
            elif isinstance(node, ast.JoinedStr | ast.BinOp):
                found.add(pattern(node))
    long = [one for one in found if len(re.sub(r"\.\*|\\", "", one)) >= 15]
    return [re.compile(re.sub(r"(\.\*)+", ".*", one), re.DOTALL) for one in long]


def test_the_messages_of_the_page_are_those_of_the_code():
    """A message that is reworded is reworded on the page, too."""
    messages = re.findall(r"(?ms)^```text\n(.*?)\n```$", TEXTS["troubleshooting.md"])
    assert len(messages) > 15
    patterns = message_patterns()
    for message in messages:
        said = [len(re.sub(r"\.\*|\\", "", one.pattern)) for one in patterns if one.search(message)]
        assert said and max(said) > 0.2 * len(message), message  # the rest is names and numbers
    assert not any(one.search("no macro LEARNING_RAT in those gin files") for one in patterns)
