"""Converts models and prompts between formats, with one array in memory at a time."""

import contextlib
import functools
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prompt_tuning_jax.array_files.atomic_folder import atomic_folder
from prompt_tuning_jax.array_files.stored import ArrayError, Index, StoredArray, first_line
from prompt_tuning_jax.array_files.t5x import is_t5x
from prompt_tuning_jax.checkpoints import hub, huggingface, t5x
from prompt_tuning_jax.checkpoints.base import (
    CHOICES,
    EMBEDDED,
    check_shapes,
    check_vocabulary,
    default_vocabulary,
    open_model,
    resolve,
)
from prompt_tuning_jax.checkpoints.tuned import folder_of_additions
from prompt_tuning_jax.errors import Setting, SettingError, renamed
from prompt_tuning_jax.prompts.files import IN_T5X, OFFICIAL_NAME, read_prompt, write_prompt
from prompt_tuning_jax.prompts.peft import is_adapter, write_adapter
from prompt_tuning_jax.t5.config import IDS, T5Config
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary

TARGET = Setting("target")
MODEL_FORMATS, PROMPT_FORMATS = ("t5x", "huggingface", "orbax"), ("npy", "peft", "t5x")


def convert(source: str, target: str, to: str, *, base: str | None = None, vocabulary: str | None = None) -> str:
    """Writes the model or prompt at `source` to `target`, which appears whole or not at all.

    A model keeps its values and dtypes bit for bit; a prompt is written in float32.

    Args:
      source: a model or a prompt in any format that `open_model` or `read_prompt` reads; a model also by its hub id.
      target: a path that does not exist yet.
      to: for a model, "huggingface" (a folder for `transformers`), "t5x" (T5X's own layout) or "orbax" (the layout that
        T5X writes through Orbax); for a prompt, "npy", "peft" (an adapter folder) or "t5x" (a folder with the
        official implementation's file).
      base: the base model that a prompt was trained on; "peft" writes its name. Its d_model is compared with the
        prompt's, unless it is a hub id that cannot be read now.
      vocabulary: a SentencePiece model, a tokenizer.json or 'bytes', to put beside a model; None for the one beside
        `source`.

    Returns:
      One line that says what was written.

    Raises:
      ValueError: `source` cannot be read or cannot become `to`, or `target` exists or cannot be written.
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
    """Returns whether `source` is a prompt and not a model. A T5X checkpoint with a prompt in it is a model."""
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
    prompt, note = read_prompt(source), ""
    if base is not None:
        with renamed(initial_checkpoint_path="base"):
            config, note = _config_of(base)
        if config is not None and config.emb_dim != prompt.shape[1]:
            raise SettingError(
                f"{source} is {list(prompt.shape)}, but {base} has d_model {config.emb_dim}: set ",
                Setting("base"),
                " to the base it was trained on",
            )
    if to == "peft":
        write_adapter(target, prompt, base)
    elif to == "t5x":
        with atomic_folder(target) as partial:
            write_prompt(partial / OFFICIAL_NAME, prompt)
    else:
        write_prompt(target, prompt)
    return f"{target}: a prompt, float32 {list(prompt.shape)}{note}"


def _config_of(base: str) -> tuple[T5Config | None, str]:
    """Returns the size of the base model that a prompt is for, or None and why its width was not checked."""
    if base in EMBEDDED or Path(base).exists() or not hub.is_id(base):
        return open_model(base).config, ""
    try:
        return huggingface.read_config(hub.fetch(base)), ""
    except (hub.HubError, ArrayError) as error:
        return None, f"; the width of {base} was not checked: {error}"


def _convert_model(source: str, target: str, to: str, vocabulary: str | None) -> str:
    location = resolve(source)
    model = open_model(location)
    if model.config is None:
        raise SettingError(
            f"{source} lacks parameters from which the model's size is read: set ",
            Setting("source"),
            " to a whole checkpoint",
        )
    base = {name: array for name, array in model.arrays.items() if name not in IN_T5X}
    check_shapes({name: array.shape for name, array in base.items()}, model.config, source)
    notes = [] if to == "huggingface" else _notes_on_settings(model.config, base, source)
    arrays = base if to == "huggingface" else model.arrays
    if to != "huggingface" and model.config.relative_bias_per_layer:
        arrays = t5x.to_scalable(arrays, model.config.num_heads)
    vocabulary = vocabulary or default_vocabulary(location)
    tokenizer = Vocabulary(vocabulary) if vocabulary else None
    if tokenizer:
        check_vocabulary(tokenizer, model.config)
    if to != "huggingface":
        notes += _check_ids(model.config, tokenizer, source)
    total = sum(array.nbytes for array in arrays.values())
    disk = next(parent for parent in Path(target).absolute().parents if parent.exists())
    if total > (free := shutil.disk_usage(disk).free):
        raise SettingError(
            f"{target} takes {total:,} bytes, and {disk} has {free:,}: set ", TARGET, " to a place with room"
        )
    with tqdm(total=total, disable=None, unit="B", unit_scale=True) as bar:
        tracked = {name: _with_progress(array, bar) for name, array in arrays.items()}
        if to == "huggingface":
            huggingface.write(target, model.config, tracked, vocabulary)
        else:
            (t5x.write if to == "t5x" else t5x.write_orbax)(target, tracked, vocabulary)
    dtypes = sorted({array.dtype.name for array in arrays.values()})
    parameters = sum(math.prod(array.shape) for array in arrays.values())
    notes.insert(0, f"{target}: {len(arrays)} arrays, {parameters:,} parameters, {' and '.join(dtypes)}")
    if not vocabulary:
        notes.append(f"no tokenizer lies beside {source}; --vocabulary=FILE puts one there")
    if to == "huggingface" and not Path(location, huggingface.CONFIG).is_file():
        distance = model.config.relative_attention_max_distance
        notes.append(f"relative_attention_max_distance, which no T5X checkpoint says, was taken for T5's {distance}")
    return "; ".join(notes)


def _notes_on_settings(config: T5Config, arrays: Mapping[str, StoredArray], source: str) -> list[str]:
    """Returns notes on the settings that a T5X checkpoint does not store and that its user must set.

    Raises:
      ValueError: no network of T5X computes what the model does.
    """
    if config.scale_decoder_outputs is not None:
        head = "tied to the embedding table and not scaled" if config.logits_via_embedding else "scaled and not tied"
        raise SettingError(
            f"{source} has logits that are {head}; T5X has no such network: set ",
            Setting("to"),
            " to huggingface",
        )
    guess = t5x.infer_config({name: array.shape for name, array in arrays.items()})
    notes = [
        f"no T5X checkpoint says {field} {getattr(config, field)}: set T5Config.{field} where this one is used"
        for field in CHOICES
        if getattr(config, field) != getattr(guess, field)
    ]
    if config.relative_bias_per_layer:
        notes.append("T5X's scalable_t5 restores it with scan_layers=False")
    return notes


def _check_ids(config: T5Config, tokenizer: Vocabulary | None, source: str) -> list[str]:
    """Returns notes on the special ids that a T5X checkpoint does not store and that its user must set.

    T5X takes the id of the end of sequence from the tokenizer, and uses 0 for padding and the decoder's start.

    Raises:
      ValueError: the model has other ids than T5X would use.
    """
    end = "eos_token_id"
    in_t5x = IDS | ({} if tokenizer is None else {end: tokenizer.eos_id})
    notes = []
    for name, value in in_t5x.items():
        found = getattr(config, name)
        if found == value:
            continue
        if name == end and tokenizer is None:
            notes.append(f"no T5X checkpoint says {end} {found}: use it with a tokenizer that ends with this id")
            continue
        whose = "the tokenizer's" if name == end else "T5X's"
        raise SettingError(
            f"{source} has {name} {found}, but {whose} is {value}; a T5X checkpoint cannot store {name}: set ",
            Setting("to"),
            " to huggingface",
        )
    return notes


def _with_progress(array: StoredArray, bar: tqdm) -> StoredArray:
    return StoredArray(array.shape, array.dtype, functools.partial(_read, array, bar))


def _read(array: StoredArray, bar: tqdm, index: Index) -> np.ndarray:
    bar.update(array.nbytes)
    return array[index]
