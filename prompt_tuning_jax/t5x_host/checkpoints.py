"""Restores a base model from T5X's checkpoints, and writes the prompt beside them (t5x/checkpoints.py).

Both functions are state transformations, which T5X calls for its Orbax checkpoints and for its own layout.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from flax.traverse_util import flatten_dict, unflatten_dict
from t5x import checkpoints, state_utils  # pyright: ignore[reportMissingImports]

from prompt_tuning_jax.methods.prompt_tuning import PROMPT
from prompt_tuning_jax.prompts.files import OFFICIAL_NAME, write_prompt
from prompt_tuning_jax.t5x_host.optimizers import TRAINABLE, trained_paths


def restore_base(
    state_dict: Mapping[str, Any],
    target_state_dict: Mapping[str, Any],
    *,
    is_resuming: bool = False,
    trainable: Sequence[str] = TRAINABLE,
) -> Mapping[str, Any]:
    """Returns the base model's parameters and the step of a checkpoint; T5X initialises prompt and optimiser state.

    For `utils.RestoreCheckpointConfig(fallback_to_scratch=True, state_transformation_fns=[restore_base])`. The official
    runs initialise every parameter that the checkpoint lacks, whatever its name. Here only trained parameters may be
    missing.

    Args:
      state_dict: the checkpoint's state: arrays, or T5X's placeholders for arrays that are not read yet.
      target_state_dict: the run's state: arrays or their shapes.
      is_resuming: whether the checkpoint is the run's own; all of it is then restored.
      trainable: patterns of whole paths, see `methods.model_tuning.matching`.

    Raises:
      ValueError: the checkpoint lacks a parameter of the base model, or has it with another shape.
    """
    if is_resuming:
        return state_dict
    found = state_utils.flatten_state_dict(state_dict["target"])
    expected = flatten_dict(target_state_dict["target"], sep="/")
    base = {name: expected[name] for name in expected.keys() - trained_paths(expected, trainable)}
    problems = [f"{name} is missing" for name in sorted(base) if name not in found]
    problems += [
        f"{name} is {list(found[name].shape)}, not {list(value.shape)}"
        for name, value in sorted(base.items())
        if getattr(found.get(name), "shape", value.shape) != value.shape  # T5X checks those that it has not read yet
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"the base does not fit the model: {'; '.join(problems[:3])}{more}: set INITIAL_CHECKPOINT_PATH"
        )
    restored = {f"target/{name}": found[name] for name in base} | {"state/step": state_dict["state"]["step"]}
    return unflatten_dict(restored, sep="/")


def save_prompt(
    state_dict: Mapping[str, Any], parameter_infos: Mapping[str, Any], *, folder: str
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Writes the prompt beside the checkpoint that is about to be written; returns its arguments unchanged.

    For `utils.SaveCheckpointConfig(state_transformation_fns=[...])`. The file is the official one, float32 [P, D]:
    `numpy_checkpoints/checkpoint_<step>/encoder.prompt.prompt.prompt`, which `prompts.files.read_prompt` reads. These
    files are never deleted, however few checkpoints T5X keeps.

    Args:
      folder: MODEL_DIR, a path or a URL to which TensorFlow can write.
    """
    if jax.process_index() == 0:
        step = int(_local(state_dict["state"]["step"]))
        prompt = _local(flatten_dict(state_dict["target"], sep="/")[PROMPT])
        _write(f"{folder}/numpy_checkpoints/checkpoint_{step}/{OFFICIAL_NAME}", prompt)
    return state_dict, parameter_infos


def _local(value: Any) -> np.ndarray:
    # T5X's own checkpointer gives a LazyArray, which reads from the device; with Orbax it is the array itself.
    value = value.get() if isinstance(value, checkpoints.LazyArray) else value
    return np.asarray(checkpoints.get_local_data(value))


def _write(path: str, prompt: np.ndarray) -> None:
    if "://" not in path:
        return write_prompt(path, prompt)
    with tempfile.TemporaryDirectory() as scratch:  # an uploaded file appears whole or not at all
        write_prompt(Path(scratch, OFFICIAL_NAME), prompt)
        tf.io.gfile.makedirs(path.rpartition("/")[0])
        tf.io.gfile.copy(f"{scratch}/{OFFICIAL_NAME}", path, overwrite=True)
