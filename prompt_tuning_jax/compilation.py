"""Compiled programs are kept on disk, so that only a run of new shapes waits for the compiler."""

import os
from pathlib import Path

import jax


def keep_compiled_programs() -> None:
    """Turns JAX's persistent compilation cache on, in the user's cache folder, unless it is configured already."""
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home, "prompt_tuning_jax", "compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
