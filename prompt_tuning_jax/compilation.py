"""Compiled programs are kept on disk, so that only a run of new shapes waits for the compiler."""

import contextlib
import os

import jax

from prompt_tuning_jax.batches.cache import user_cache


def keep_compiled_programs() -> None:
    """Turns JAX's persistent compilation cache on, in the user's cache folder, unless it is configured already.

    Small programs are kept as well: a start compiles dozens, which together take longer than the large ones.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = user_cache() / "compiled"
        with contextlib.suppress(OSError):  # nothing is kept where nothing can be: JAX would warn of every program
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
