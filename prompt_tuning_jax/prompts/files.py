"""Reads and writes prompts: `.npy`, PEFT adapter folders, the official file, run folders, T5X checkpoints."""

import io
import os
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float

from prompt_tuning_jax.array_files.stored import ArrayError
from prompt_tuning_jax.array_files.t5x import is_t5x, open_t5x
from prompt_tuning_jax.errors import Private, Setting, SettingError
from prompt_tuning_jax.prompts import peft
from prompt_tuning_jax.regular_files import is_irregular

OFFICIAL_NAME = "encoder.prompt.prompt.prompt"
PROMPT, TASK_PROMPTS = "prompt.npy", "prompts"
# The paths in a run's folder of what it trained: one prompt, or a folder with a file TASK.npy for each task.
RUN_PROMPT, RUN_PROMPTS = Path("best", PROMPT), Path("best", TASK_PROMPTS)
# The paths of a prompt in a T5X checkpoint: with this project's module, and with the official one.
IN_T5X = ("encoder/prompt/prompt", "encoder/prompt/prompt/prompt")
EXPECTED = ("a prompt, float32 [prompt length, d_model]: set ", Setting("prompt_file"))


def read_prompt(path: str | os.PathLike, dimensions: tuple[int, ...] = (2,)) -> Float[np.ndarray, "*L P D"]:
    """Reads a prompt from a file, folder or checkpoint of any format that this module knows.

    Args:
      path: a `.npy` file, with any name; a run's folder, whose best prompt is read; a folder with the official file; a
        PEFT adapter folder; or a T5X checkpoint, by path or URL.
      dimensions: (2,) for a prompt [P, D], (3,) for one per encoder layer [L, P, D]; (2, 3) accepts both.

    Returns:
      The prompt in float32, whatever float dtype the file has.

    Raises:
      ValueError: there is no prompt, it is truncated, has another number of dimensions, or is not of finite floats.
    """
    folder = Path(path)
    if "://" in str(path):
        prompt = _read_t5x(path)
    elif not folder.is_dir():
        prompt = _read_npy(folder)
    elif (folder / RUN_PROMPT).is_file():
        prompt = _read_npy(folder / RUN_PROMPT)
    elif (folder / RUN_PROMPTS).is_dir():
        tasks = ", ".join(sorted(task.stem for task in (folder / RUN_PROMPTS).glob("*.npy")))
        raise SettingError(
            f"{path} is a run with a prompt for each of {tasks}: set ", Setting("prompt_file"),
            f" to one of them, {folder / RUN_PROMPTS / 'TASK.npy'}",
        )  # fmt: skip
    elif peft.is_adapter(folder):
        prompt = peft.read_adapter(folder)
    elif (folder / OFFICIAL_NAME).is_file():
        prompt = _read_npy(folder / OFFICIAL_NAME)
    elif is_t5x(folder):
        prompt = _read_t5x(folder)
    else:
        held = f"{RUN_PROMPT} (a run), {OFFICIAL_NAME}, adapter_config.json (PEFT) or a T5X checkpoint"
        raise SettingError(f"no prompt file in {path}, which has no {held}; expected ", *EXPECTED)
    floats = prompt.dtype.kind == "f" or prompt.dtype == ml_dtypes.bfloat16  # NumPy gives bfloat16 the kind "V"
    if prompt.ndim not in dimensions or not floats or not prompt.size:
        found = f"holds {str(prompt.dtype):.40} {list(prompt.shape)}; expected "
        raise SettingError(Private(f"{path} "), found, *EXPECTED)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity
        prompt = prompt.astype(np.float32)
    if not np.isfinite(prompt).all():
        raise SettingError(Private(f"{path} "), "holds NaN or infinity; expected ", *EXPECTED)
    return prompt


def prompts_in(folder: str | os.PathLike) -> dict[str, Path]:
    """Returns the paths of a folder's prompts by name, for `read_prompt`, without reading them.

    A prompt is a `.npy` file, or a folder that `read_prompt` reads. A run with one prompt per task gives one prompt per
    task, with the name RUN/TASK. `folder` may also be such a run itself; its names are then TASK.
    """
    folder = Path(folder)
    if (folder / RUN_PROMPTS).is_dir():
        folder = folder / RUN_PROMPTS
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix == ".npy":
            found[path.stem] = path
        elif (path / RUN_PROMPTS).is_dir():
            found |= {f"{path.name}/{task.stem}": task for task in sorted((path / RUN_PROMPTS).glob("*.npy"))}
        elif path.is_dir() and (
            (path / RUN_PROMPT).is_file() or (path / OFFICIAL_NAME).is_file() or peft.is_adapter(path) or is_t5x(path)
        ):
            found[path.name] = path
    return found


def _read_npy(path: Path) -> np.ndarray:
    if is_irregular(path):
        raise SettingError(Private(f"{path} "), "is no regular file; expected ", *EXPECTED)
    try:
        # Never unpickles, and does not trust the header's shape.
        return np.array(np.lib.format.open_memmap(path, mode="r"))
    except FileNotFoundError:
        raise SettingError(f"no prompt file {path}; expected ", *EXPECTED) from None
    except Exception as error:  # of any type: NumPy passes on the errors of Python's tokenizer for a damaged header
        why = (str(error) or type(error).__name__).splitlines()[0]
        found = (Private(f"{path} "), "is not a readable prompt", Private(f" ({why})"), "; expected ")
        raise SettingError(*found, *EXPECTED) from None


def _read_t5x(location: str | os.PathLike) -> np.ndarray:
    try:
        arrays = open_t5x(location)
        for name in IN_T5X:
            if name in arrays:
                return np.asarray(arrays[name])
    except ArrayError as error:
        raise SettingError(f"{error}; expected ", *EXPECTED) from None
    raise SettingError(f"{location} has no prompt among its parameters ({IN_T5X[0]}); expected ", *EXPECTED)


def write_prompt(path: str | os.PathLike, prompt: Float[np.ndarray, "*L P D"]) -> None:
    """Writes a prompt, or one per encoder layer, as a float32 `.npy`; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # Into memory first: on a full disk, np.save to a file can lose the last bytes without an error.
    file = io.BytesIO()
    np.save(file, np.asarray(prompt, np.float32))
    try:
        partial.write_bytes(file.getvalue())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
