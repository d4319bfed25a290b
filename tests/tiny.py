"""Makes a base model so small that a run takes seconds; the tests of the command lines train on it."""

import contextlib
import importlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import gin
import jax
import numpy as np
import pytest
import sentencepiece
from jax.experimental.compilation_cache import compilation_cache

from prompt_tuning_jax.batches.cache import TaskRequest
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.base import expected_shapes
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.tasks.review_grammar import unlabelled
from prompt_tuning_jax.tokenizers.vocabulary import BESIDE, EOS, PAD, UNK

ROOT = Path(__file__).parent.parent
CONFIG = T5Config(
    vocab_size=400, emb_dim=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, mlp_dim=32, head_dim=8
)
# The demo's sentences have 25 to 55 tokens: most are truncated, and all fill one bucket.
LENGTHS = {"inputs": 32, "targets": 8}
PROMPT_LENGTH = 5
GIN = """
from __gin__ import dynamic_registration
from prompt_tuning_jax.t5 import config

include "models/t5_1_1.gin"
VOCAB_SIZE = 400

config.T5Config:
  emb_dim = 16
  mlp_dim = 32
  num_heads = 2
  head_dim = 8
  num_encoder_layers = 1
  num_decoder_layers = 1
"""


class Tiny(NamedTuple):
    """Holds the folder, shared by all tests, with everything that a run of the tiny base model needs."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def vocabulary(self) -> Path:
        return self.base / BESIDE

    @property
    def gin(self) -> Path:
        return self.folder / "tiny.gin"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a run: its caches are in the folder."""
        return {
            "PROMPT_TUNING_CACHE": str(self.folder / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        }

    @property
    def demo(self) -> TaskRequest:
        return TaskRequest("demo_reviews", str(self.vocabulary), LENGTHS)

    def arguments(self, *files: str, **macros) -> list[str]:
        """Returns the command line of a run on the demo's task: prompt tuning, or what the gin `files` say."""
        files = files or ("prompts/random_uniform.gin", "runs/prompt_tune.gin")
        settings = {
            "MIXTURE_OR_TASK_NAME": "demo_reviews",
            "TASK_FEATURE_LENGTHS": LENGTHS,
            "INITIAL_CHECKPOINT_PATH": str(self.base),
            "EVAL_SPLIT": "validation[:64]",
            "BATCH_SIZE": 8,
            "EVAL_BATCH_SIZE": 32,
            "TRAIN_STEPS": 40,
            "EVAL_PERIOD": 20,
            "LOG_PERIOD": 10,
        }
        if "runs/prompt_tune.gin" in files:
            settings["PROMPT_LENGTH"] = PROMPT_LENGTH
        settings |= macros
        return [
            *(f"--gin_file={file}" for file in (self.gin, *files)),
            *(f"--gin.{name}={value!r}" for name, value in settings.items()),
        ]

    def start(self, arguments: list[str], python: Sequence[str] = (), **options) -> subprocess.Popen:
        """Starts `python -m prompt_tuning_jax.train` as a process; `python` has arguments of the interpreter."""
        command = [sys.executable, *python, "-m", "prompt_tuning_jax.train", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        return subprocess.Popen(command, env=os.environ | self.environment, cwd=self.folder, **pipes)

    def run_process(self, arguments: list[str], python: Sequence[str] = ()) -> subprocess.CompletedProcess:
        """Starts the process, and returns its output when it has ended."""
        process = self.start(arguments, python)
        stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def run(self, arguments: list[str], command: str = "train") -> subprocess.CompletedProcess:
        """Runs a command of the package in this process, which saves the imports, and returns what a process would.

        For tests of what a command reads, prints and writes. Tests of signals, limits and imports need a process.
        """
        stdout, stderr, code = io.StringIO(), io.StringIO(), 0
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            stack.enter_context(own_caches(self, patch))
            # Not the processes' folder: JAX warns of a half-written file, which a test that kills a process may leave.
            stack.enter_context(keeping_compiled_programs(self.folder / "compiled_here"))
            stack.enter_context(contextlib.chdir(self.folder))
            stack.enter_context(contextlib.redirect_stdout(stdout))
            stack.enter_context(contextlib.redirect_stderr(stderr))
            patch.setattr(sys, "argv", [command, *arguments])
            try:
                importlib.import_module(f"prompt_tuning_jax.{command}").main()
            except SystemExit as ended:
                code = ended.code
        return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


def make_tiny(factory: pytest.TempPathFactory) -> Tiny:
    """Returns the shared folder; the first test in any worker that needs it creates it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    if not folder.exists():
        partial = factory.mktemp("tiny_partial")
        (partial / "spiece.model").write_bytes(train_vocabulary())
        huggingface.write(partial / "base", CONFIG, random_params(0), partial / "spiece.model")
        (partial / "tiny.gin").write_text(GIN)
        try:
            os.rename(partial, folder)
        except OSError:  # another worker was faster
            shutil.rmtree(partial)
    return Tiny(folder)


@contextlib.contextmanager
def keeping_compiled_programs(folder: Path) -> Iterator[None]:
    """Caches what JAX compiles in this context in `folder`, so that equal programs are compiled once."""
    kept = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in kept}
    for values in (kept, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is kept:
            yield


@contextlib.contextmanager
def own_caches(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets command lines run in this process with the caches of the tiny runs; resets gin and JAX's cache after it."""
    for name, value in tiny.environment.items():
        monkeypatch.setenv(name, value)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tiny.folder / "compiled"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    gin.clear_config()


def train_vocabulary(pieces: int = 300) -> bytes:
    """Returns a case-folding SentencePiece model, trained on the demo's sentences and labels."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*unlabelled(400), *["negative", "positive"] * 20]),
        model_writer=model,
        vocab_size=pieces,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=PAD,
        eos_id=EOS,
        unk_id=UNK,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def random_params(seed: int) -> dict[str, np.ndarray]:
    """Returns random weights of the tiny size, float32, by path."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(1.0 if name.endswith("scale") else 0.0, 0.3, shape).astype(np.float32)
        for name, shape in expected_shapes(CONFIG).items()
    }
