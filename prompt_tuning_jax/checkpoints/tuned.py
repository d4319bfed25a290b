"""Reads and writes what any method trains: a prompt, prompts per layer, an adapter, or a whole model."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax.array_files.atomic_folder import atomic_folder
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.adapters import IA3, LORA, adapter_kind, read_adapter, write_adapter
from prompt_tuning_jax.checkpoints.base import open_model
from prompt_tuning_jax.checkpoints.prefixes import holds_prefix, read_prefix, write_prefix
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.prompts import peft
from prompt_tuning_jax.prompts.files import PROMPT, TASK_PROMPTS, read_prompt, write_prompt
from prompt_tuning_jax.t5.adapters import is_adapter, is_prefix, merged
from prompt_tuning_jax.t5.config import T5Config

EXPORT_DTYPES = ("float32", "bfloat16")
LAYER_PROMPTS, ADAPTER, MODEL = "layer_prompts.npy", "adapter", "model"


def write_tuned(
    folder: str | os.PathLike,
    injection: Injection,
    frozen: Mapping[str, jax.Array | np.ndarray],
    *,
    config: T5Config,
    vocabulary: str | os.PathLike | None,
    base: str | None = None,
    dtype: str = "float32",
) -> None:
    """Writes an injection into a folder, in up to five parts:

    - prompt.npy: a prompt [P, D]; or prompts per encoder layer [L, P, D] if there is no prompt [P, D].
    - layer_prompts.npy: what each encoder layer adds to the prompt, [L, P, D].
    - prompts/TASK.npy: the prompt [P, D] of each task.
    - adapter/: a PEFT folder of LoRA or IA3, or a prefix of keys and values.
    - model/: a folder in Hugging Face's layout with all parameters.

    Args:
      frozen: the base model's parameters; parameters that the injection replaces may be missing.
      base: the base model's path, which is written into an adapter.
      dtype: the dtype of model/.
    """
    folder = Path(folder)
    _write_prompts(folder, injection)
    if has_only_adapters(injection.parameters):
        write_adapters(folder / ADAPTER, injection, config, base)
    elif injection.parameters:
        huggingface.write(folder / MODEL, config, merged(injection.parameters, frozen), vocabulary, dtype)


def write_prompts(path: str | os.PathLike, injection: Injection) -> None:
    """Writes an injection's prompts for `read_prompts`; the file or folder appears whole or not at all.

    A prompt, or prompts per encoder layer, are written as a `.npy` file. A prompt with additions per layer is written
    as a folder of two files, and prompts per task as a folder of one file per task.

    Raises:
      ValueError: the folder for a prompt with additions exists and has anything in it but these two files.
    """
    path = Path(path)
    if injection.task_prompts is not None:
        return write_task_prompts(path, injection.task_prompts)
    if is_one_file(injection):
        prompt = injection.layer_prompts if injection.prompt is None else injection.prompt
        return write_prompt(path, np.asarray(prompt))
    if path.exists() and not (path.is_dir() and {file.name for file in path.iterdir()} <= {PROMPT, LAYER_PROMPTS}):
        raise ValueError(
            f"{path} is there already and holds more than {PROMPT} and {LAYER_PROMPTS}; expected a new folder for a "
            "prompt with additions per layer, or an earlier one of these two files to replace"
        )
    with atomic_folder(path) as partial:
        _write_prompts(partial, injection)


def _write_prompts(folder: Path, injection: Injection) -> None:
    first, second = injection.prompt, injection.layer_prompts
    if first is None:
        first, second = second, None
    for name, prompt in ((PROMPT, first), (LAYER_PROMPTS, second)):
        if prompt is not None:
            write_prompt(folder / name, np.asarray(prompt))
    if injection.task_prompts is not None:
        write_task_prompts(folder / TASK_PROMPTS, injection.task_prompts)


def is_one_file(injection: Injection) -> bool:
    """Returns whether `write_prompts` writes a single file and not a folder."""
    return injection.task_prompts is None and (injection.prompt is None or injection.layer_prompts is None)


def write_task_prompts(folder: str | os.PathLike, prompts: Mapping[str, Any]) -> None:
    """Writes a folder with one prompt per task, TASK.npy; the folder appears whole or not at all."""
    with atomic_folder(folder) as partial:
        for task, prompt in prompts.items():
            write_prompt(partial / f"{task}.npy", np.asarray(prompt))


def has_only_adapters(parameters: Mapping[str, Any]) -> bool:
    """Returns whether there are parameters, and all of them are adapters beside kernels or prefixes."""
    return bool(parameters) and all(is_adapter(path) or is_prefix(path) for path in parameters)


def write_adapters(folder: str | os.PathLike, injection: Injection, config: T5Config, base: str | None = None) -> None:
    """Writes the parameters of LoRA, IA3 or prefix tuning; see `write_adapter` and `write_prefix`."""
    write = write_prefix if any(map(is_prefix, injection.parameters)) else write_adapter
    write(folder, injection, config, base)


def _read_adapters(folder: Path, config: T5Config) -> Injection:
    return read_prefix(folder, config) if holds_prefix(folder) else read_adapter(folder, config)


def read_tuned(folder: str | os.PathLike, config: T5Config) -> Injection:
    """Reads a folder that `write_tuned` wrote.

    Args:
      config: the size of the base model.

    Raises:
      ValueError: a file is damaged, or the folder has none of the files.
    """
    folder = Path(folder)
    prompts = read_prompts(folder / PROMPT) if (folder / PROMPT).is_file() else Injection()
    task_prompts = None
    if (folder / TASK_PROMPTS).is_dir():
        task_prompts = {path.stem: read_prompt(path) for path in sorted((folder / TASK_PROMPTS).glob("*.npy"))}
    parameters = {}
    if (folder / ADAPTER).is_dir():
        parameters = _read_adapters(folder / ADAPTER, config).parameters
    elif (folder / MODEL).is_dir():
        parameters = {path: np.asarray(array) for path, array in open_model(str(folder / MODEL)).arrays.items()}
    if not prompts.length and not task_prompts and not parameters:
        raise ValueError(f"{folder} holds no {PROMPT}, {TASK_PROMPTS}, {ADAPTER} or {MODEL}: nothing that was trained")
    return prompts._replace(parameters=parameters, task_prompts=task_prompts)


def read_prompts(path: str | os.PathLike) -> Injection:
    """Reads a prompt of any format, prompts per layer, or a prompt with additions per layer.

    Args:
      path: what `read_prompt` takes; or a folder with prompt.npy and layer_prompts.npy, or either of these two files.
        If both exist, they are always read together, because they were trained together.

    Raises:
      ValueError: there is no prompt at `path`, it cannot be read, or the two files do not fit each other.
    """
    folder = folder_of_additions(path)
    if folder is None:
        prompt = read_prompt(path, (2, 3))
        return Injection(prompt=prompt) if prompt.ndim == 2 else Injection(layer_prompts=prompt)
    prompt, additions = read_prompt(folder / PROMPT), read_prompt(folder / LAYER_PROMPTS, (3,))
    _check_additions(str(folder), prompt, additions)
    return Injection(prompt, additions)


def _check_additions(where: str, prompt: Any, additions: Any) -> None:
    """Raises SettingError if the additions per layer do not have the shape of the prompt."""
    if prompt is not None and additions is not None and additions.shape[1:] != prompt.shape:
        found = f"{where} has a prompt {list(prompt.shape)} and additions {list(additions.shape)} to it"
        raise SettingError(f"{found}, expected [P, D] and [L, P, D]: set ", Setting("prompt_file"))


def folder_of_additions(path: str | os.PathLike) -> Path | None:
    """Returns the folder of a prompt with additions per layer if `path` is the folder or either of its two files.

    Any other path gives None.
    """
    folder = Path(path)
    folder = folder.parent if folder.is_file() and folder.name in (PROMPT, LAYER_PROMPTS) else folder
    return folder if (folder / PROMPT).is_file() and (folder / LAYER_PROMPTS).is_file() else None


def injection_of(tuned: Any, config: T5Config) -> Injection:
    """Returns the injection for a model of this size from anything that was trained.

    Args:
      tuned: a prompt [P, D] or prompts per layer [L, P, D]; a mapping from tasks to prompts; an `Injection`; or a path:
        a prompt file of any format, a folder that `Result.save` wrote, a PEFT adapter's folder, or a run's folder,
        from which the parameters of the best evaluation are taken.

    Raises:
      SettingError: `tuned` is none of these, or was trained on another model size.
    """
    where = f"prompt {tuned}" if isinstance(tuned, (str, os.PathLike)) else "the prompt"
    if isinstance(tuned, (str, os.PathLike)):
        found = read_injection(tuned, config)
    elif isinstance(tuned, Injection):
        found = tuned
    elif isinstance(tuned, Mapping):
        found = Injection(task_prompts={str(task): np.asarray(prompt) for task, prompt in tuned.items()})
    else:
        array = np.asarray(tuned)
        if array.ndim not in (2, 3) or array.dtype.kind != "f":
            raise SettingError(
                Setting("prompt_file"),
                f" is an array of {array.dtype} {list(array.shape)}, expected floats [P, D] or [L, P, D]",
            )
        found = Injection(prompt=array) if array.ndim == 2 else Injection(layer_prompts=array)
    for prompt in (found.prompt, found.layer_prompts, *(found.task_prompts or {}).values()):
        if prompt is not None:
            check_width(where, prompt.shape, config.emb_dim)
    _check_additions(where, found.prompt, found.layer_prompts)
    if found.layer_prompts is not None and len(found.layer_prompts) != config.num_encoder_layers:
        raise SettingError(
            f"{where} is {list(found.layer_prompts.shape)}, but the base model has {config.num_encoder_layers} encoder "
            "layers: it was trained on another model size. Set ",
            Setting("initial_checkpoint_path"),
            " to the base model it was trained on",
        )
    return found


def read_injection(path: str | os.PathLike, config: T5Config) -> Injection:
    """Reads prompts in any format, an adapter's folder, or the parameters of the best evaluation in a run's folder."""
    folder = Path(path)
    if (folder / "best").is_dir():
        return read_tuned(folder / "best", config)
    kind = adapter_kind(folder) if (folder / peft.CONFIG).is_file() else None
    if kind in (LORA, IA3) or holds_prefix(folder):
        return _read_adapters(folder, config)
    return read_prompts(path)


def check_width(what: str, shape: tuple[int, ...], d_model: int) -> None:
    """Raises SettingError if a prompt was trained on a model of another width."""
    if shape[-1] != d_model:
        raise SettingError(
            f"{what} is {list(shape)}, but the base model has d_model {d_model}: it was trained on another "
            "model size. Set ",
            Setting("initial_checkpoint_path"),
            " to the base model it was trained on",
        )
