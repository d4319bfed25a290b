"""Measures the host memory that loading a base model needs, as a multiple of the checkpoint's size.

    python -m experiments.benchmarks.load_memory [--size=base]

It writes random weights of that size (base: 0.99 GB in float32) in each format, loads each in its own process, and
prints a JSON line per format. `peak` is the process's peak memory while loading, minus its memory before (with JAX
started), divided by the bytes of the checkpoint's arrays (on disk, Orbax compresses them). On a CPU, `peak` includes
the loaded parameters. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.serialization import to_bytes
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

from experiments.sizes import SIZES
from prompt_tuning_jax.array_files.stored import StoredArray
from prompt_tuning_jax.checkpoints import huggingface, t5x
from prompt_tuning_jax.checkpoints.base import expected_shapes, load_base

FORMATS = ("huggingface", "huggingface_sharded", "bin", "msgpack", "t5x", "orbax")


def write(folder: Path, kind: str, size: str) -> None:
    """Writes random weights in one of `FORMATS`."""
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> StoredArray:
        return StoredArray(shape, np.dtype(np.float32), lambda index: rng.standard_normal(shape, np.float32)[index])

    params = {path: draw(shape) for path, shape in expected_shapes(SIZES[size]).items()}
    if kind.startswith("huggingface"):
        huggingface.write(folder, SIZES[size], params, shard_bytes=10**8 if kind.endswith("sharded") else 10**12)
    elif kind in ("bin", "msgpack"):
        huggingface.write(folder, SIZES[size], params, shard_bytes=10**12)
        (write_bin if kind == "bin" else write_msgpack)(folder)
    else:
        (t5x.write if kind == "t5x" else t5x.write_orbax)(folder, params)


def write_bin(folder: Path) -> None:
    """Replaces a folder's safetensors by `pytorch_model.bin`, as PyTorch writes it."""
    import torch  # only needed here

    tensors = {name: torch.from_numpy(array) for name, array in load_file(folder / "model.safetensors").items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def write_msgpack(folder: Path) -> None:
    """Replaces a folder's safetensors by `flax_model.msgpack` with the parameters of transformers' FlaxT5."""
    (folder / "flax_model.msgpack").write_bytes(to_bytes(flax_tree(load_file(folder / "model.safetensors"))))
    (folder / "model.safetensors").unlink()


def flax_tree(tensors: Mapping[str, np.ndarray]) -> dict:
    """Returns PyTorch's tensors of a T5 as the nested parameters of transformers' FlaxT5 (modeling_flax_t5.py)."""
    flat = {}
    for name, array in tensors.items():
        *parents, _ = name.split(".")
        if parents[-1].endswith("layer_norm"):
            flat[*parents, "weight"] = array
        elif parents[-1] in ("shared", "relative_attention_bias", "embed_tokens"):
            flat[*parents, "embedding"] = array
        else:
            flat[*parents, "kernel"] = np.ascontiguousarray(array.T)
    return unflatten_dict(flat)


def memory_bytes(what: str) -> int:
    """Returns the bytes of this process in memory: now ("VmRSS"), or the peak so far ("VmHWM")."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{what}:")) * 1024


def measure(folder: Path, kind: str, size: str) -> None:
    """Loads a checkpoint in this process, and prints the JSON line."""
    jnp.zeros(8).block_until_ready()
    before, start = memory_bytes("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current memory
    params = jax.block_until_ready(load_base(str(folder), SIZES[size]).params)
    seconds, peak = time.perf_counter() - start, memory_bytes("VmHWM") - before
    arrays = sum(array.nbytes for array in params.values())
    record = {
        "format": kind,
        "array_bytes": arrays,
        "file_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "peak_bytes": peak,
        "peak": round(peak / arrays, 3),
        "before_bytes": before,
        "seconds": round(seconds, 2),
    }
    print(json.dumps(record), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=SIZES)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--folder", type=Path, help="for the checkpoints, which are deleted at the end")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "FORMAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        measure(Path(arguments.load[0]), arguments.load[1], arguments.size)
        return
    for kind in arguments.formats:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            folder = Path(scratch, kind)
            write(folder, kind, arguments.size)
            command = [sys.executable, "-m", "experiments.benchmarks.load_memory", f"--size={arguments.size}"]
            subprocess.run([*command, "--load", str(folder), kind], check=True)


if __name__ == "__main__":
    main()
