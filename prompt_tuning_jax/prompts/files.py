"""Prompt files: `.npy`, float32 [P, D], also under the official name `encoder.prompt.prompt.prompt` without suffix."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float

OFFICIAL_NAME = "encoder.prompt.prompt.prompt"


def read_prompt(path: str | os.PathLike) -> Float[np.ndarray, "P D"]:
    """Reads a prompt; a folder stands for the official file name inside it.

    Raises:
      ValueError: the file is absent, truncated, not an array of two dimensions, or not of finite floats.
    """
    path = Path(path)
    if path.is_dir():
        path = path / OFFICIAL_NAME
    expected = "a .npy file, float32 [prompt length, d_model]: set PROMPT_FILE"
    try:
        prompt = np.array(np.lib.format.open_memmap(path, mode="r"))  # never unpickles, nor trusts a shape
    except FileNotFoundError:
        raise ValueError(f"no prompt file {path}; expected {expected}") from None
    except Exception as error:  # any: NumPy lets through what Python's tokenizer makes of a damaged header
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a readable prompt ({why}); expected {expected}") from None
    if prompt.ndim != 2 or prompt.dtype.kind != "f" or not prompt.size:
        raise ValueError(f"{path} holds {prompt.dtype} {list(prompt.shape)}; expected {expected}")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity
        prompt = prompt.astype(np.float32)
    if not np.isfinite(prompt).all():
        raise ValueError(f"{path} holds NaN or infinity; expected {expected}")
    return prompt


def write_prompt(path: str | os.PathLike, prompt: Float[np.ndarray, "P D"]) -> None:
    """Writes a prompt, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:  # a file object: np.save adds a suffix to a bare name
        np.save(file, np.asarray(prompt, np.float32))
    os.replace(partial, path)
