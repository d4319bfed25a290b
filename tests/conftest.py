"""What all tests share: JAX on the CPU, reference numbers, and the folder of real data where there is one.

The shapes and types in the package's signatures are checked at run time: `--jaxtyping-packages` in pyproject.toml.
"""

import contextlib
import importlib
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # for processes that tests start, too
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a network; those of the hub have a server of their own

import absl.logging
import hypothesis
import jax
import numpy as np
import pytest

from prompt_tuning_jax.t5.config import T5Config

with contextlib.suppress(ImportError):
    importlib.import_module("triton")  # of torch's CUDA builds: loaded after TensorFlow, it crashes

# Compilation makes a first example slow, and a red build must be red again when it is looked into.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("tests")

FIXTURES = Path(__file__).parent / "fixtures"
DATA = Path(os.environ.get("PROMPT_TUNING_DATA") or Path(__file__).parents[2] / "shared" / "data")


def pytest_configure():
    jax.config.update("jax_platforms", "cpu")
    # absl's handler closes its stream when logging is configured anew, as submitit does, unless that is the process's
    # own: it would close the one with which pytest captures what tests print.
    absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: vocabularies, released prompts, benchmarks' own files."""
    if not DATA.is_dir():
        pytest.skip(f"no data at {DATA}: set PROMPT_TUNING_DATA")
    return DATA


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A base model so small that a run of it takes seconds, and what a run of it needs: see tiny.py."""
    return importlib.import_module("tiny").make_tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def compiled_once(tiny):
    """Keeps the programs that a module's runs compile: runs of one method and shape compile the same ones."""
    with importlib.import_module("tiny").keeping_compiled_programs(tiny.folder / "compiled_here"):
        yield


@pytest.fixture(scope="module")
def model(tiny):
    """The tiny base model, as `pt.load` gives it."""
    return importlib.import_module("prompt_tuning_jax").load(str(tiny.base))


@pytest.fixture(scope="session")
def peft():
    """PEFT, with one thread."""
    pytest.importorskip("torch").set_num_threads(1)
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def forget_tasks():
    """Removes the tasks and mixtures that the module's tests registered in this process: near misses name them all."""
    for module in importlib.import_module(
        "prompt_tuning_jax.tasks"
    ).TASK_MODULES:  # a module registers its tasks once only, when it is first imported
        importlib.import_module(module)
    seqio = importlib.import_module("seqio")
    registries = (seqio.TaskRegistry, seqio.MixtureRegistry)
    before = [set(registry.names()) for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry.names()) - names:
            registry.remove(name)


def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name) as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def t5x() -> dict[str, np.ndarray]:
    """T5X's minimal T5 1.1 of `tiny_config`: see fixtures/README.md."""
    return reference("t5x_minimal_t5_1_1.npz")


@pytest.fixture(scope="session")
def official() -> dict[str, np.ndarray]:
    """The official prompt-tuned model of `tiny_config`, with ten training steps."""
    return reference("official_prompt_tuning_tiny.npz")


@pytest.fixture(scope="session")
def t5x_adafactor() -> dict[str, np.ndarray]:
    """T5X's Adafactor on a [20, 32] parameter."""
    return reference("t5x_adafactor_20x32.npz")


@pytest.fixture(scope="session")
def tiny_config() -> T5Config:
    """The size of the reference models."""
    return T5Config(
        vocab_size=128, emb_dim=32, num_heads=4, num_encoder_layers=2, num_decoder_layers=2, mlp_dim=64, head_dim=8
    )
