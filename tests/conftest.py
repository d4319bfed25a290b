"""What all tests share: JAX on the CPU, reference numbers, and the folder of real data where there is one.

The shapes and types in the package's signatures are checked at run time: `--jaxtyping-packages` in pyproject.toml.
"""

import collections
import contextlib
import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

# The processes that tests start inherit these.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a network; those of the hub have a server of their own
# Tests compile thousands of programs and run each for milliseconds. XLA compiles them in less than half the time
# without LLVM's optimisations. Tests compare programs of the same flags, or with a tolerance for rounding.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

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

# Files that take minutes, the longest first: started last, one would run while the other workers have nothing to do.
# pytest-xdist starts the files with the most tests first unless it is given --no-loadscope-reorder, as in the Makefile.
LONG_FILES = [
    f"test_{name}.py"
    for name in (
        *("meshes", "meshes_of_methods", "methods", "vectorized", "parallel", "network"),
        *("train", "memory_plan", "service", "cache", "api"),
    )
]


def pytest_collection_modifyitems(items):
    """Sorts the files; the tests of a file keep their order."""
    tests = collections.Counter(item.path for item in items)

    def place(item):
        name = item.path.name
        return LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES), -tests[item.path], item.path

    items.sort(key=place)


def pytest_configure(config):
    jax.config.update("jax_platforms", "cpu")
    # The processes that tests start share what they compile until the tests end, leave nothing in the user's cache and
    # find nothing there. pytest-xdist's workers inherit the folder. This process does not read it: some tests compare
    # programs that were compiled separately, and a process killed by a test may leave half a file. Modules that want
    # to keep programs use `compiled_once`.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        compiled = tempfile.TemporaryDirectory(prefix="prompt_tuning_compiled_", ignore_cleanup_errors=True)
        config.add_cleanup(compiled.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", None)
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


@pytest.fixture
def only_this_tests_gin(monkeypatch):
    """Gives a test a gin configuration and search paths of its own."""
    gin, gin_files = importlib.import_module("gin"), importlib.import_module("prompt_tuning_jax.gin_files")
    gin.clear_config()
    monkeypatch.setattr(gin_files, "SEARCH_PATHS", list(gin_files.SEARCH_PATHS))
    monkeypatch.setattr(gin.config, "_LOCATION_PREFIXES", [""])
    yield
    gin.clear_config()


@pytest.fixture(scope="session")
def docs_module():
    """Returns a function that imports a Python file of docs/, which is no package, by its name."""

    def import_file(name: str):
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "docs" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return import_file


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
