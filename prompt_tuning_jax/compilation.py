"""Keeps compiled programs on disk, so that only runs with new shapes wait for the compiler."""

import contextlib
import os

import jax

from prompt_tuning_jax.batches.cache import user_cache


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache in the user's cache folder, unless a folder is configured already.

    Small programs are kept as well, because a start compiles dozens of them, which take longer than the large ones.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = user_cache() / "compiled"
        with contextlib.suppress(OSError):  # without a writable folder, JAX would warn for every program
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
