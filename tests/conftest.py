"""Sets up JAX on the CPU, and has the fixtures of all tests: tiny models, reference numbers, and real data if present.

The shapes and types in the package's signatures are checked at run time: `--jaxtyping-packages` in pyproject.toml.
"""

import atexit
import collections
import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

# The processes that tests start inherit these.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses a network; the tests of the hub start a server of their own
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes would each compile all of the package's sources

import absl.logging
import hypothesis
import jax
import numpy as np
import pytest

from prompt_tuning_jax.t5.config import T5Config

with contextlib.suppress(ImportError):
    importlib.import_module("triton")  # part of torch's CUDA builds, which crashes if it is loaded after TensorFlow

# No deadline, because compilation makes the first example slow. Derandomized, so that a failure can be repeated.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("tests")

# Tests compile thousands of programs and run each for milliseconds, and with these flags XLA compiles faster. Tests
# compare programs of the same flags, or with a tolerance for rounding. XLA reads the flags when JAX compiles its first
# program; the processes that tests start inherit them.
COMPILE_FAST = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
    # One LLVM module per program. With several, the same fusion is rounded differently from program to program, and a
    # run in a shared program would not equal the run alone.
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # jaxlib 0.11 does not know it, and ends the process
    COMPILE_FAST.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *COMPILE_FAST])

FIXTURES = Path(__file__).parent / "fixtures"
DATA = Path(os.environ.get("PROMPT_TUNING_DATA") or Path(__file__).parents[2] / "shared" / "data")

# Files that take minutes, the longest first: if a long file started last, the other workers would be idle meanwhile.
# Without --no-loadscope-reorder, which the Makefile sets, pytest-xdist would start the files with the most tests first.
LONG_FILES = [
    f"test_{name}.py"
    for name in (
        *("meshes_of_methods", "notebooks", "methods", "train", "parallel", "vectorized", "memory_plan", "meshes"),
        *("sweep", "bad_input", "api", "demo", "t5x_checkpoint", "adapters", "service", "network", "task_names"),
    )
]


def pytest_collection_modifyitems(items):
    """Sorts the test files as in `LONG_FILES`; the tests of a file keep their order."""
    tests = collections.Counter(item.path for item in items)

    def place(item):
        name = item.path.name
        return LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES), -tests[item.path], item.path

    items.sort(key=place)


def pytest_configure(config):
    jax.config.update("jax_platforms", "cpu")
    gc.set_threshold(100_000, 10, 10)  # tracing makes many objects, and little garbage
    # The processes that tests start share a temporary compilation cache, and neither read nor write the user's cache.
    # pytest-xdist's workers inherit the folder. This process does not read it: some tests compare programs that were
    # compiled separately, and a process that a test kills may leave half a file. Modules that want to keep programs use
    # `compiled_once`. Temporary files are in the same folder, because TensorFlow deletes its own at exit, which does
    # not happen in workers (see `pytest_unconfigure`) and in processes that a test kills.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        scratch = tempfile.TemporaryDirectory(prefix="prompt_tuning_tests_", ignore_cleanup_errors=True)
        config.add_cleanup(scratch.cleanup)
        os.environ["TMPDIR"] = scratch.name
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(scratch.name, "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", None)
    # absl's handler closes its stream when logging is reconfigured, as submitit does, unless it is the process's own
    # stderr. Without this line it would close the stream with which pytest captures output.
    absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


def pytest_unconfigure():
    # At exit, JAX clears its caches of traced functions. After thousands of tests this takes minutes in each worker of
    # pytest-xdist, although all tests are done. So a worker exits without it.
    if "PYTEST_XDIST_WORKER" in os.environ:
        atexit.register(os._exit, 0)


@pytest.fixture(autouse=True, scope="module")
def collect_garbage_of_this_module_only():
    """Keeps Python's garbage collector from going through the objects of earlier modules again and again.

    Without this fixture and the thresholds of `pytest_configure`, the collector takes an eighth of the processor time
    of test_network, test_adapters, test_step and test_predictor, run one after the other.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Returns the folder of real data: vocabularies, released prompts, and the files of benchmarks."""
    if not DATA.is_dir():
        pytest.skip(f"no data at {DATA}: set PROMPT_TUNING_DATA")
    return DATA


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Returns a base model so small that a run takes seconds, and the files that a run needs; see tiny.py."""
    return importlib.import_module("tiny").make_tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def compiled_once(tiny):
    """Caches the programs that a module's runs compile, because runs of one method and shape compile the same ones."""
    with importlib.import_module("tiny").keeping_compiled_programs(tiny.folder / "compiled_here"):
        yield


@pytest.fixture(scope="module")
def model(tiny):
    """Returns the tiny base model, loaded with `pt.load`."""
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
    """Returns a function that imports a Python file of docs/ by its name, because docs/ is not a package."""

    def import_file(name: str):
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "docs" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return import_file


@pytest.fixture(scope="session")
def peft():
    """Returns PEFT; torch computes with one thread."""
    pytest.importorskip("torch").set_num_threads(1)
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def forget_tasks():
    """Removes the tasks and mixtures that the module's tests registered, because near misses would list them all."""
    for module in importlib.import_module(
        "prompt_tuning_jax.tasks"
    ).TASK_MODULES:  # a module registers its tasks only once, when it is first imported
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
    """Returns the numbers of T5X's minimal T5 1.1 with `tiny_config`; see fixtures/README.md."""
    return reference("t5x_minimal_t5_1_1.npz")


@pytest.fixture(scope="session")
def official() -> dict[str, np.ndarray]:
    """Returns the numbers of the official prompt-tuned model with `tiny_config`, with ten training steps."""
    return reference("official_prompt_tuning_tiny.npz")


@pytest.fixture(scope="session")
def t5x_adafactor() -> dict[str, np.ndarray]:
    """Returns the numbers of T5X's Adafactor on a parameter [20, 32]."""
    return reference("t5x_adafactor_20x32.npz")


@pytest.fixture(scope="session")
def tiny_config() -> T5Config:
    """Returns the size of the reference models."""
    return T5Config(
        vocab_size=128, emb_dim=32, num_heads=4, num_encoder_layers=2, num_decoder_layers=2, mlp_dim=64, head_dim=8
    )
