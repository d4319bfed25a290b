"""From any format of models and prompts to any other, one array in memory at a time."""

import contextlib
import math
import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prompt_tuning_jax.arrays.stored import ArrayError, Index, StoredArray, first_line
from prompt_tuning_jax.arrays.t5x import is_t5x
from prompt_tuning_jax.arrays.whole_folder import whole_folder
from prompt_tuning_jax.checkpoints import huggingface, t5x
from prompt_tuning_jax.checkpoints.base import EMBEDDED, check_shapes, check_vocabulary, default_vocabulary, open_model
from prompt_tuning_jax.checkpoints.tuned import folder_of_additions
from prompt_tuning_jax.errors import Setting, SettingError, renamed
from prompt_tuning_jax.prompts.files import IN_T5X, OFFICIAL_NAME, read_prompt, write_prompt
from prompt_tuning_jax.prompts.peft import is_adapter, write_adapter
from prompt_tuning_jax.tasks.vocabularies import Vocabulary

TARGET = Setting("target")
MODEL_FORMATS, PROMPT_FORMATS = ("t5x", "huggingface", "orbax"), ("npy", "peft", "t5x")


def convert(source: str, target: str, to: str, *, base: str | None = None, vocabulary: str | None = None) -> str:
    """Writes what lies at `source` to `target`, whole or not at all, bit for bit in the dtype it has.

    Args:
      source: a model or a prompt, of any format that `open_model` or `read_prompt` knows.
      target: a path at which nothing is yet.
      to: for a model, "huggingface" (a folder for `transformers`), "t5x" (T5X's own layout) or "orbax" (the layout that
        T5X writes through Orbax); for a prompt, "npy", "peft" (an adapter folder) or "t5x" (a folder with the
        official implementation's file).
      base: the base that a prompt was trained on: its width is checked, and a PEFT adapter names it.
      vocabulary: a SentencePiece model, a tokenizer.json or 'bytes', to put beside a model; None for the one beside
        `source`.

    Returns:
      What was written, in one line.

    Raises:
      ValueError: `source` cannot be read or is not of the kind that `to` is for, or `target` is there already.
    """
    if os.path.lexists(target):
        raise SettingError(f"{target} is there already: set ", TARGET, " to a new path, or delete it")
    prompt = is_prompt(source) or (to not in MODEL_FORMATS and not _is_model_alone(source))
    if to not in (PROMPT_FORMATS if prompt else MODEL_FORMATS):
        kind, formats = ("prompt", PROMPT_FORMATS) if prompt else ("model", MODEL_FORMATS)
        raise SettingError(
            f"{source} is a {kind}, which cannot become {to!r}: set ", Setting("to"), f"={'|'.join(formats)}"
        )
    parents = [parent for parent in Path(target).absolute().parents if not parent.exists()]
    try:
        with renamed(initial_checkpoint_path="source", prompt_file="source"):
            if prompt:
                return _convert_prompt(source, target, to, base)
            return _convert_model(source, target, to, vocabulary)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(f"{target}.partial")
        for parent in parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, ArrayError):
            raise SettingError(f"{error}: set ", Setting("source"), " to a whole one") from None
        if isinstance(error, OSError):
            why = error.strerror or first_line(error)
            raise SettingError(f"{target} cannot be written ({why}): set ", TARGET, " to a place with room") from None
        raise


def is_prompt(source: str) -> bool:
    """Whether `source` is a prompt and not a model. A T5X checkpoint is a model, even with a prompt in it."""
    folder = Path(source)
    if "://" in source or _is_model_alone(source):
        return False
    if folder.is_file() or is_adapter(folder) or folder_of_additions(folder):
        return True
    return (folder / OFFICIAL_NAME).is_file() and not is_t5x(folder)


def _is_model_alone(source: str) -> bool:
    return source in EMBEDDED or Path(source, huggingface.CONFIG).is_file()


def _convert_prompt(source: str, target: str, to: str, base: str | None) -> str:
    if folder_of_additions(source):
        raise SettingError(
            f"{source} is a prompt with additions per layer, which none of {', '.join(PROMPT_FORMATS)} holds: set ",
            Setting("source"),
            " to a prompt [P, D]",
        )
    prompt = read_prompt(source)
    if base is not None and (base in EMBEDDED or Path(base).exists()):
        with renamed(initial_checkpoint_path="base"):
            config = open_model(base).config
        if config is not None and config.emb_dim != prompt.shape[1]:
            raise SettingError(
                f"{source} is {list(prompt.shape)}, but {base} has d_model {config.emb_dim}: set ",
                Setting("base"),
                " to the base it was trained on",
            )
    if to == "peft":
        write_adapter(target, prompt, base)
    elif to == "t5x":
        with whole_folder(target) as partial:
            write_prompt(partial / OFFICIAL_NAME, prompt)
    else:
        write_prompt(target, prompt)
    return f"{target}: a prompt, float32 {list(prompt.shape)}"


def _convert_model(source: str, target: str, to: str, vocabulary: str | None) -> str:
    model = open_model(source)
    if model.config is None:
        raise SettingError(
            f"{source} lacks so many arrays that its size cannot be told: set ",
            Setting("source"),
            " to a whole checkpoint",
        )
    base = {name: array for name, array in model.arrays.items() if name not in IN_T5X}
    check_shapes({name: array.shape for name, array in base.items()}, model.config, source)
    arrays = base if to == "huggingface" else model.arrays
    vocabulary = vocabulary or default_vocabulary(source)
    if vocabulary:
        check_vocabulary(Vocabulary(vocabulary), model.config)
    total = sum(array.nbytes for array in arrays.values())
    disk = next(parent for parent in Path(target).absolute().parents if parent.exists())
    if total > (free := shutil.disk_usage(disk).free):
        raise SettingError(
            f"{target} takes {total:,} bytes, and {disk} has {free:,}: set ", TARGET, " to a place with room"
        )
    with tqdm(total=total, disable=None, unit="B", unit_scale=True) as bar:
        watched = {name: _watched(array, bar) for name, array in arrays.items()}
        if to == "huggingface":
            huggingface.write(target, model.config, watched, vocabulary)
        else:
            (t5x.write if to == "t5x" else t5x.write_orbax)(target, watched, vocabulary)
    dtypes = sorted({array.dtype.name for array in arrays.values()})
    parameters = sum(math.prod(array.shape) for array in arrays.values())
    notes = [f"{target}: {len(arrays)} arrays, {parameters:,} parameters, {' and '.join(dtypes)}"]
    if not vocabulary:
        notes.append(f"no tokenizer lies beside {source}; --vocabulary=FILE puts one there")
    if to == "huggingface" and not Path(source, huggingface.CONFIG).is_file():
        distance = model.config.relative_attention_max_distance
        notes.append(f"relative_attention_max_distance, which no T5X checkpoint says, was taken for T5's {distance}")
    return "; ".join(notes)


def _watched(array: StoredArray, bar: tqdm) -> StoredArray:
    def read(index: Index) -> np.ndarray:
        bar.update(array.nbytes)
        return array[index]

    return StoredArray(array.shape, array.dtype, read)
