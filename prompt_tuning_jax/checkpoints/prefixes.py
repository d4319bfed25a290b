"""Reads and writes prefixes of keys and values: the decoder's as PEFT's prefix tuning, all others in our own file.

Two facts about PEFT's folders for a T5, from the forward pass of peft 0.21:

- PEFT uses the prefix only in the decoder's self-attention, and ignores what it has for the cross-attention.
- `prompt_embeddings` is [P, 2 N D]: N pairs of a key and a value. With PEFT's default of two submodules, layer l uses
  pair 2 l modulo N, where N is `num_layers`. By default N is the number of layers L: if L is even, two layers share
  each pair that is used, and half of the pairs are never used. We read the pairs that PEFT uses. We write N = 2 L - 1,
  so that every layer has a pair of its own; the pairs that PEFT does not use are 0.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shown  # truncates a file's values, so that an error stays one line

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.array_files.atomic_folder import atomic_folder
from prompt_tuning_jax.array_files.safetensors import open_safetensors, write_safetensors
from prompt_tuning_jax.array_files.stored import ArrayError
from prompt_tuning_jax.errors import Setting
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.prompts.peft import (
    CONFIG,
    TASK,
    TENSOR,
    open_weights,
    read_config,
    read_floats,
    refusal,
    weights_in,
    write_folder,
)
from prompt_tuning_jax.t5.adapters import PREFIX_KEY, PREFIX_VALUE, is_prefix
from prompt_tuning_jax.t5.config import T5Config

PREFIX_TUNING, STEM = "PREFIX_TUNING", "prefix"
FILE = f"{STEM}.safetensors"
EXPECTED = ("a prefix of this model: set ", Setting("prompt_file"))
DECODER = (f"decoder/{PREFIX_KEY}", f"decoder/{PREFIX_VALUE}")

# Fields that change what PEFT computes, all of them read below; and fields that change nothing after training: PEFT
# saves the output of a network that computes the prefix, not the network.
HONOURED = "peft_type task_type num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers"
HARMLESS = "base_model_name_or_path revision inference_mode peft_version auto_mapping encoder_hidden_size "
HARMLESS += "prefix_projection init_weights"


def holds_prefix(folder: str | os.PathLike) -> bool:
    """Returns whether `read_prefix` can read the folder: our own file is in it, or PEFT's prefix tuning."""
    if Path(folder, FILE).is_file():
        return True
    path = Path(folder, CONFIG)
    return path.is_file() and read_config(path, EXPECTED).get("peft_type") == PREFIX_TUNING


def read_prefix(folder: str | os.PathLike, config: T5Config) -> Injection:
    """Reads a prefix that PEFT trained, or that `write_prefix` wrote.

    Args:
      config: the size of the base model.

    Raises:
      ValueError: its files are damaged or disagree, it is for another model, or it has settings that PEFT cannot run.
    """
    folder = Path(folder)
    if (folder / FILE).is_file():
        return Injection(parameters=_read_file(folder, config))
    pairs, length = _read_fields(folder / CONFIG, config)
    arrays = open_weights(folder, EXPECTED)
    wide = config.num_heads * config.head_dim
    shapes = {name: array.shape for name, array in arrays.items()}
    if shapes != {TENSOR: (length, 2 * pairs * wide)}:
        found = (
            f"{weights_in(folder)} holds {shown(shapes)}, not {TENSOR} [{length}, {2 * pairs * wide}] as {CONFIG} says"
        )
        raise refusal(found, EXPECTED)
    whole = read_floats(folder, arrays, EXPECTED)[TENSOR].reshape(length, pairs, 2, config.num_heads, config.head_dim)
    own = whole[:, [2 * layer % pairs for layer in range(config.num_decoder_layers)]]
    own = own.transpose(2, 1, 3, 0, 4)  # [2, L, H, P, K]
    return Injection(parameters={path: jnp.asarray(own[index]) for index, path in enumerate(DECODER)})


def write_prefix(folder: str | os.PathLike, injection: Injection, config: T5Config, base: str | None = None) -> None:
    """Writes a prefix; the folder appears whole or not at all.

    A prefix of the decoder alone is written as a folder that `PeftModel.from_pretrained` loads.

    Args:
      injection: the injection of `PrefixTuning`.
      config: the size of the base model.
      base: the base model's path or name on Hugging Face's hub, for `AutoPeftModelForSeq2SeqLM`.

    Raises:
      ValueError: the injection also has other parameters or a prompt; or the folder exists and has anything else in it.
    """
    parameters = {path: np.asarray(value, np.float32) for path, value in injection.parameters.items()}
    more = sorted(path for path in parameters if not is_prefix(path)) + ["a prompt"] * bool(injection.length)
    if more:
        raise ValueError(
            f"the method gives a prefix and {more[0]}, which cannot be saved together; expected only a prefix"
        )
    if set(parameters) != set(DECODER):
        return _write_file(Path(folder), parameters)
    own = np.stack([parameters[path] for path in DECODER])  # [2, L, H, P, K]
    _, layers, heads, length, head_dim = own.shape
    pairs = np.zeros((length, 2 * layers - 1, 2, heads, head_dim), np.float32)
    pairs[:, ::2] = own.transpose(3, 1, 0, 2, 4)
    fields = {
        "peft_type": PREFIX_TUNING,
        "task_type": TASK,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "token_dim": heads * head_dim,
        "num_transformer_submodules": 2,
        "num_attention_heads": heads,
        "num_layers": 2 * layers - 1,
        "encoder_hidden_size": None,
        "prefix_projection": False,
    }
    write_folder(folder, fields, {TENSOR: pairs.reshape(length, -1)})


def _read_fields(path: Path, config: T5Config) -> tuple[int, int]:
    """Returns the number of pairs of a key and a value, and the prefix's length.

    Raises:
      ValueError: a field is not supported by the model or by PEFT, or its value has the wrong type.
    """
    fields = read_config(path, EXPECTED)
    task, submodules = fields.get("task_type"), fields.get("num_transformer_submodules")
    if fields.get("peft_type") != PREFIX_TUNING or task != TASK:
        raise refusal(f"{path} is of a {shown(fields.get('peft_type'))} adapter for {shown(task)}", EXPECTED)
    for name, value in fields.items():
        if name not in (*HONOURED.split(), *HARMLESS.split()) and value:
            raise refusal(f"{path} has {name!a:.60} {shown(value)}, which this project does not have", EXPECTED)
    if submodules not in (2, None):  # for this task, PEFT sets it to 2 if it is None
        raise refusal(
            f"{path} has num_transformer_submodules {shown(submodules)}, with which PEFT runs no T5", EXPECTED
        )
    numbers = []
    for name in ("num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads"):
        number = fields.get(name)
        if type(number) is not int or number < 1:  # True is an int, too
            raise refusal(f"{path} has {name} {shown(number)}, not a positive number", EXPECTED)
        numbers.append(number)
    length, pairs, wide, heads = numbers
    if (wide, heads) != (config.num_heads * config.head_dim, config.num_heads):
        raise refusal(
            f"{path} has token_dim {wide} and num_attention_heads {heads}, and the keys of this model are "
            f"{config.num_heads} x {config.head_dim} = {config.num_heads * config.head_dim} wide",
            EXPECTED,
        )
    if pairs < config.num_decoder_layers:
        raise refusal(
            f"{path} has num_layers {pairs}, and the model's decoder has {config.num_decoder_layers}", EXPECTED
        )
    return pairs, length


def _read_file(folder: Path, config: T5Config) -> Mapping[str, np.ndarray]:
    try:
        arrays = {name: np.asarray(array, np.float32) for name, array in open_safetensors(folder, STEM).items()}
    except ArrayError as error:
        raise refusal(f"{error}", EXPECTED) from None
    layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    heads, wide = config.num_heads, config.head_dim
    if not arrays:
        raise refusal(f"{folder / FILE} is empty", EXPECTED)
    for name, array in arrays.items():
        stack = name.partition("/")[0]
        other = arrays.get(f"{stack}/{PREFIX_VALUE if name.endswith(PREFIX_KEY) else PREFIX_KEY}")
        if not is_prefix(name) or other is None or other.shape != array.shape:
            raise refusal(f"{folder / FILE} holds {name!a:.60} without the other half of it", EXPECTED)
        if array.ndim != 4 or array.shape != (layers[stack], heads, array.shape[2] or 1, wide):
            found = f"{folder / FILE} holds {name} {list(array.shape)}"
            raise refusal(f"{found}, and the model takes [{layers[stack]}, {heads}, P, {wide}] there", EXPECTED)
        if not np.isfinite(array).all():
            raise refusal(f"{folder / FILE} holds NaN or infinity", EXPECTED)
    return arrays


def _write_file(folder: Path, parameters: Mapping[str, np.ndarray]) -> None:
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {FILE}):
        raise ValueError(f"{folder} is there already and holds more than {FILE}; expected a new folder for a prefix")
    with atomic_folder(folder) as partial:
        write_safetensors(partial, parameters, stem=STEM)
