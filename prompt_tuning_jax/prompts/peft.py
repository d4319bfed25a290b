"""Reads and writes PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors` (peft 0.21).

An `adapter_model.bin` is read, too: older versions of PEFT wrote it, and `safe_serialization=False` still does.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as shown  # truncates values from files of others, so that an error stays one line

import numpy as np
from jaxtyping import Float

from prompt_tuning_jax.array_files.atomic_folder import atomic_folder
from prompt_tuning_jax.array_files.safetensors import open_safetensors, write_safetensors
from prompt_tuning_jax.array_files.stored import ArrayError, StoredArray, first_line
from prompt_tuning_jax.array_files.torch_files import open_torch
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.regular_files import regular

CONFIG, STEM = "adapter_config.json", "adapter_model"
WEIGHTS, TORCH_WEIGHTS = f"{STEM}.safetensors", f"{STEM}.bin"
TENSOR = "prompt_embeddings"
PROMPT_TUNING, TASK = "PROMPT_TUNING", "SEQ_2_SEQ_LM"
EXPECTED = ("a PEFT prompt tuning adapter of a T5: set ", Setting("prompt_file"))


def is_adapter(folder: str | os.PathLike) -> bool:
    """Returns whether the folder is a PEFT adapter of any kind."""
    return Path(folder, CONFIG).is_file()


def read_adapter(folder: str | os.PathLike) -> Float[np.ndarray, "P D"]:
    """Reads a prompt that PEFT trained, or that `write_adapter` wrote.

    Returns:
      float32 [num_virtual_tokens, token_dim], whatever float dtype the file has. If the file has twice as many rows
      (`num_transformer_submodules` 2, PEFT's default for T5), this is the first half: PEFT's own forward pass puts
      `prompts[:, :num_virtual_tokens]` before the encoder's input and never reads the other rows.

    Raises:
      ValueError: the folder is no adapter, or one of another kind; its two files are damaged or disagree; or its
        weights have more arrays than the prompt, are not floats, or have NaN or infinity.
    """
    folder = Path(folder)
    rows, (length, width) = _read_shape(folder / CONFIG)
    arrays = open_weights(folder, EXPECTED)
    mismatch = _mismatch(arrays, rows, width)
    if mismatch:
        raise refusal(f"{weights_in(folder)} {mismatch}", EXPECTED)
    return read_floats(folder, arrays, EXPECTED)[TENSOR][:length].copy()


def base_name(folder: str | os.PathLike) -> str | None:
    """Returns the base model that an adapter of any kind names, with @REVISION if it has one; None if it names none.

    Raises:
      ValueError: the folder's configuration cannot be read.
    """
    config = read_config(Path(folder, CONFIG), EXPECTED)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        return None
    return f"{name}@{revision}" if isinstance(revision, str) and revision else name


def open_weights(folder: Path, expected: Sequence[str]) -> dict[str, StoredArray]:
    """Opens the weights of an adapter of any kind, without reading them.

    Args:
      expected: the parts of a `SettingError` that say what the folder should be.

    Raises:
      ValueError: they are absent, damaged, or no floats.
    """
    path = weights_in(folder)
    if not path.is_file():
        raise refusal(f"no {WEIGHTS} or {TORCH_WEIGHTS} in {folder}", expected)
    try:
        return open_safetensors(folder, STEM) if path.name == WEIGHTS else open_torch(folder, TORCH_WEIGHTS)
    except ArrayError as error:
        raise refusal(f"{error}", expected) from None


def weights_in(folder: Path) -> Path:
    """Returns the path of the weights that are read: the safetensors, as in PEFT, if both files are there."""
    found = folder / WEIGHTS
    return found if found.is_file() else folder / TORCH_WEIGHTS


def read_floats(folder: Path, arrays: Mapping[str, StoredArray], expected: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads the opened weights of the adapter in `folder` as float32, whatever float dtype the file has.

    Raises:
      ValueError: the weights cannot be read, or have NaN or infinity.
    """
    floats = {}
    for name, array in arrays.items():
        try:
            found = np.asarray(array)
        except ArrayError as error:
            raise refusal(f"{error}", expected) from None
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity
            floats[name] = found.astype(np.float32)
        if not np.isfinite(floats[name]).all():
            raise refusal(f"{weights_in(folder)} holds NaN or infinity", expected)
    return floats


def write_adapter(folder: str | os.PathLike, prompt: Float[np.ndarray, "P D"], base: str | None = None) -> None:
    """Writes a folder that `PeftModel.from_pretrained` loads; the folder appears whole or not at all.

    Args:
      prompt: the prompt, which is written as float32.
      base: the base model's path or its name on Hugging Face's hub, for `AutoPeftModelForSeq2SeqLM`.

    Raises:
      ValueError: the folder exists, and has other files than the two of an adapter.
    """
    length, width = prompt.shape
    config = {
        "peft_type": PROMPT_TUNING,
        "task_type": TASK,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_transformer_submodules": 1,  # only the encoder; without this field PEFT expects 2 * length rows
        "prompt_tuning_init": "RANDOM",  # TEXT would ask for a tokenizer
    }
    write_folder(folder, config, {TENSOR: np.asarray(prompt, np.float32)})


def write_folder(folder: str | os.PathLike, config: dict, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the two files of an adapter of any kind; the folder appears whole or not at all.

    Args:
      config: the content of adapter_config.json. A base model's hub id with @REVISION is split into PEFT's two fields,
        `base_model_name_or_path` and `revision`.
      tensors: the content of adapter_model.safetensors, by name.

    Raises:
      ValueError: the folder exists, and has other files than these two.
    """
    folder = Path(folder).resolve()  # a link stays; the folder it points to is replaced
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {CONFIG, WEIGHTS}):
        raise ValueError(
            f"{folder} is there already and holds more than {CONFIG} and {WEIGHTS}; expected a new folder for the "
            "PEFT adapter, or an earlier one of these two files to replace"
        )
    base = config.get("base_model_name_or_path") or ""
    found = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)@(\S+)", base, re.ASCII)
    if found and not os.path.exists(base):
        config = config | {"base_model_name_or_path": found[1], "revision": found[2]}
    with atomic_folder(folder) as partial:
        write_safetensors(partial, tensors, stem=STEM)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_config(path: Path, expected: Sequence[str]) -> dict:
    """Reads the `adapter_config.json` of an adapter of any kind.

    Raises:
      ValueError: the file is missing, or is not a JSON object.
    """
    try:
        config = json.loads(regular(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise refusal(f"no {CONFIG} in {path.parent}", expected) from None
    except (OSError, ValueError, RecursionError) as error:
        raise refusal(f"{path} cannot be read ({first_line(error)})", expected) from None
    if not isinstance(config, dict):
        raise refusal(f"{path} holds {shown(config)}", expected)
    return config


def refusal(found: str, expected: Sequence[str]) -> SettingError:
    """Returns the error which says that an adapter's folder is not what was expected."""
    return SettingError(f"{found}; expected ", *expected)


def _read_shape(path: Path) -> tuple[int, tuple[int, int]]:
    """Returns how many rows the weights must have, and the prompt's (P, D)."""
    config = read_config(path, EXPECTED)
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != PROMPT_TUNING:
        raise refusal(f"{path} is of a {shown(kind)} adapter, not {PROMPT_TUNING!r}", EXPECTED)
    if task not in (TASK, None):
        raise refusal(f"{path} is of a prompt for {shown(task)}, not {TASK!r}", EXPECTED)
    submodules = config.get("num_transformer_submodules")
    if submodules is None:
        submodules = 2 if task == TASK else 1  # PEFT's own rule, in PeftModel._setup_prompt_encoder
    numbers = {
        "num_virtual_tokens": config.get("num_virtual_tokens"),
        "token_dim": config.get("token_dim"),
        "num_transformer_submodules": submodules,
    }
    for name, number in numbers.items():
        if type(number) is not int or number < 1:  # True is an int, too
            raise refusal(f"{path} has {name} {shown(number)}, not a positive number", EXPECTED)
    length, width, _ = numbers.values()
    return length * submodules, (length, width)


def _mismatch(arrays: Mapping[str, StoredArray], rows: int, width: int) -> str | None:
    """Returns what is wrong with the arrays of a file; None if they are a prompt of shape [rows, width]."""
    if TENSOR not in arrays:
        return f"lacks {TENSOR} (it holds {shown(sorted(arrays))})"
    if len(arrays) > 1:  # an embedding table that was resized or trained: that is another base model
        return f"holds more than {TENSOR} ({shown(sorted(arrays))})"
    if arrays[TENSOR].shape != (rows, width):
        return f"holds {shown(list(arrays[TENSOR].shape))}, not [{rows}, {width}] as {CONFIG} says"
    return None
