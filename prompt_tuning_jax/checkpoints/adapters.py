"""Reads and writes LoRA and IA3 adapters in PEFT's layout (peft 0.21).

A folder has `adapter_config.json`, and `adapter_model.safetensors` or `adapter_model.bin`. Each field of the
configuration is applied, is known to change nothing after training, or is refused by name. So an adapter that is read
computes what PEFT would compute with it.
"""

import collections
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shown  # truncates a file's values, so that an error stays one line
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from prompt_tuning_jax.checkpoints.base import expected_shapes
from prompt_tuning_jax.checkpoints.huggingface import names
from prompt_tuning_jax.errors import Setting
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.prompts.peft import (
    CONFIG,
    TASK,
    open_weights,
    read_config,
    read_floats,
    refusal,
    weights_in,
    write_folder,
)
from prompt_tuning_jax.t5.adapters import (
    INPUT_SCALE,
    LORA_A,
    LORA_B,
    OUTPUT_SCALE,
    adapted_modules,
    is_adapter,
)
from prompt_tuning_jax.t5.config import T5Config

EXPECTED = ("a PEFT adapter of this model, LoRA or IA3: set ", Setting("prompt_file"))
PREFIX = "base_model.model."
LORA, IA3 = "LORA", "IA3"

# Fields that change what an adapter computes, all of them read below.
HONOURED = {
    LORA: "r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform "
    "layers_pattern init_lora_weights",
    IA3: "target_modules exclude_modules feedforward_modules",
}
# Fields that change nothing after training, or nothing in a T5, which has no biases. The settings of special initial
# values matter only with an `init_lora_weights` that is refused, or that does not change the base model.
HARMLESS = {
    LORA: "lora_dropout bias loftq_config eva_config corda_config lora_ga_config megatron_config megatron_core "
    "qalora_group_size runtime_config ensure_weight_tying",
    IA3: "init_ia3_weights",
}
COMMON = "peft_type task_type base_model_name_or_path revision inference_mode peft_version auto_mapping"
# The accepted values of `init_lora_weights`. All others, such as "pissa", also change the base model's own weights.
STARTS = (True, False, "gaussian", "orthogonal", "eva")


def adapter_kind(folder: str | os.PathLike) -> str:
    """Returns the PEFT type of an adapter's folder: "LORA", "IA3", "PROMPT_TUNING", ...

    Raises:
      ValueError: the folder has no valid `adapter_config.json`.
    """
    return str(read_config(Path(folder, CONFIG), EXPECTED).get("peft_type"))


def read_adapter(folder: str | os.PathLike, config: T5Config) -> Injection:
    """Reads a LoRA or IA3 adapter that PEFT trained, or that `write_adapter` wrote.

    Args:
      config: the size of the base model.

    Returns:
      The parameters by path, in float32 whatever the file's dtype, with LoRA's scaling multiplied into each `lora_b`.

    Raises:
      ValueError: the folder is not an adapter of LoRA or IA3, or it is for another model; its configuration has a field
        that is not supported; or its two files are damaged or disagree.
    """
    folder = Path(folder)
    fields = read_config(folder / CONFIG, EXPECTED)
    try:
        kind = _check_fields(fields)
        modules = [module for module in _modules(config) if _is_targeted(fields, module)]
        if not modules:
            wanted = shown(fields.get("target_modules"))
            raise ValueError(f"target_modules {wanted}, which matches no matrix of this model")
        read = _lora_tensors if kind == LORA else _ia3_tensors
        tensors = read(fields, modules, config)
    except (ValueError, re.error, RecursionError, OverflowError) as error:
        raise refusal(f"{folder / CONFIG} has {_one_line(error)}", EXPECTED) from None
    arrays = open_weights(folder, EXPECTED)
    mismatch = _mismatch({name: array.shape for name, array in arrays.items()}, tensors)
    if mismatch:
        raise refusal(f"{weights_in(folder)} {mismatch}", EXPECTED)
    parameters = {}
    for name, array in read_floats(folder, arrays, EXPECTED).items():
        path, _, factor = tensors[name]
        array = array.T if path.endswith((LORA_A, LORA_B)) else array.reshape(-1)
        with np.errstate(all="ignore"):
            array = array * np.float32(factor)
        if not np.isfinite(array).all():
            what = f"{name} overflows float32 when it is multiplied by LoRA's scale {factor}"
            raise refusal(f"{weights_in(folder)}: {what}", EXPECTED)
        parameters[path] = jnp.asarray(array)
    return Injection(parameters=parameters)


def write_adapter(
    folder: str | os.PathLike,
    injection: Injection,
    config: T5Config,
    base: str | None = None,
    alpha: float | int | None = None,
) -> None:
    """Writes a folder that `PeftModel.from_pretrained` loads; the folder appears whole or not at all.

    Args:
      injection: the injection of `LoRA` or `IA3`, or of another method whose parameters are all of one of these kinds.
      config: the size of the base model.
      base: the base model's path or name on Hugging Face's hub, for `AutoPeftModelForSeq2SeqLM`.
      alpha: written as `lora_alpha`; each B is divided by alpha / rank. None writes each adapter's rank, so that B is
        written unchanged.

    Raises:
      ValueError: the parameters are of neither kind; or the folder exists and has anything in it but an adapter that
        this function wrote.
    """
    if injection.length:
        raise ValueError("the method gives a prompt, which a PEFT adapter of LoRA or IA3 cannot hold")
    replaced = sorted(path for path in injection.parameters if not is_adapter(path))
    if replaced:
        raise ValueError(
            f"the method gives {replaced[0]} in place of the base model's own, which a PEFT adapter cannot hold; "
            "expected LoRA or IA3: save the whole model instead"
        )
    theirs = {path: name for name, path in _modules(config).items()}
    modules = {theirs[path]: adapters for path, adapters in adapted_modules(injection.parameters).items()}
    kinds = {tuple(adapters) for adapters in modules.values()}
    if kinds == {(LORA_A, LORA_B)}:
        fields, tensors = _lora_folder(modules, alpha)
        targets = _short_names(modules, config)
    elif kinds and kinds <= {(INPUT_SCALE,), (OUTPUT_SCALE,)}:
        targets, fields, tensors = _ia3_folder(modules, _short_names(modules, config))
    else:
        found = ", ".join(sorted({name for kind in kinds for name in kind})) or "nothing"
        raise ValueError(
            f"the method gives {found}, which cannot be saved as one PEFT adapter; expected {LORA_A} and {LORA_B} "
            f"(LoRA), or one of {INPUT_SCALE} and {OUTPUT_SCALE} (IA3) beside each kernel"
        )
    settings = {"peft_type": fields.pop("peft_type"), "task_type": TASK, "base_model_name_or_path": base}
    settings |= {"inference_mode": True, "target_modules": targets} | fields
    write_folder(folder, settings, tensors)


def _modules(config: T5Config) -> dict[str, str]:
    """Returns the path of each module with a kernel, by Hugging Face's name."""
    kernels = ((theirs, ours) for ours, (theirs, _) in names(config).items() if ours.endswith("/kernel"))
    return {theirs.removesuffix(".weight"): ours.removesuffix("/kernel") for theirs, ours in kernels}


# By name: the parameter's path, the tensor's shape, and the factor that the tensor is multiplied by.
Tensors = dict[str, tuple[str, tuple[int, ...], float]]


def _lora_tensors(fields: dict, modules: list[str], config: T5Config) -> Tensors:
    """Returns the tensors that a LoRA file must have."""
    ranks, alphas = fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {}
    paths, shapes = _modules(config), expected_shapes(config)
    tensors: Tensors = {}
    for module in modules:
        rank = ranks.get(_pattern(ranks, module), fields.get("r", 8))
        alpha = alphas.get(_pattern(alphas, module), fields.get("lora_alpha", 8))
        if type(rank) is not int or rank < 1:  # True is an int, too
            raise ValueError(f"r or rank_pattern {shown(rank)}, not a positive number")
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ValueError(f"lora_alpha or alpha_pattern {shown(alpha)}, not a number")
        inputs, outputs = shapes[f"{paths[module]}/kernel"]
        factor = alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = (f"{paths[module]}/{LORA_A}", (rank, inputs), 1.0)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = (f"{paths[module]}/{LORA_B}", (outputs, rank), factor)
    return tensors


def _ia3_tensors(fields: dict, modules: list[str], config: T5Config) -> Tensors:
    """Returns the tensors that an IA3 file must have."""
    paths, shapes = _modules(config), expected_shapes(config)
    tensors: Tensors = {}
    for module in modules:
        inputs, outputs = shapes[f"{paths[module]}/kernel"]
        of_input = _is_feedforward(fields["feedforward_modules"], module)
        path, shape = (INPUT_SCALE, (1, inputs)) if of_input else (OUTPUT_SCALE, (outputs, 1))
        tensors[f"{PREFIX}{module}.ia3_l"] = (f"{paths[module]}/{path}", shape, 1.0)
    return tensors


def _lora_folder(modules: Mapping[str, dict[str, ArrayLike]], alpha: float | int | None) -> tuple[dict, dict]:
    """Returns the fields of `adapter_config.json` and the tensors."""
    ranks = {module: np.shape(adapters[LORA_A])[1] for module, adapters in modules.items()}
    ((rank, _),) = collections.Counter(ranks.values()).most_common(1)
    tensors = {}
    for module, adapters in modules.items():
        factor = 1.0 if alpha is None else ranks[module] / alpha
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.asarray(adapters[LORA_A], np.float32).T
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.asarray(adapters[LORA_B], np.float32).T * np.float32(factor)
    others = {module: number for module, number in ranks.items() if number != rank}
    fields = {"peft_type": LORA, "r": rank, "lora_alpha": rank if alpha is None else alpha, "rank_pattern": others}
    return fields | {"alpha_pattern": others if alpha is None else {}, "lora_dropout": 0.0, "bias": "none"}, tensors


def _ia3_folder(modules: Mapping[str, dict[str, ArrayLike]], targets: list[str]) -> tuple[list[str], dict, dict]:
    """Returns the `target_modules`, the other fields of `adapter_config.json`, and the tensors."""
    of_input = {module for module, adapters in modules.items() if INPUT_SCALE in adapters}
    feedforward = sorted({module.rpartition(".")[2] for module in of_input})
    # PEFT requires feed-forward modules to be targets, too. Its "o" also matches "wo".
    exact = all(_is_feedforward(feedforward, module) == (module in of_input) for module in modules)
    if not exact or not set(feedforward) <= set(targets):
        feedforward = sorted(of_input)
    tensors = {}
    for module, adapters in modules.items():
        (scale,) = adapters.values()
        shape = (1, -1) if module in of_input else (-1, 1)
        tensors[f"{PREFIX}{module}.ia3_l"] = np.asarray(scale, np.float32).reshape(shape)
    return sorted({*targets, *feedforward}), {"peft_type": IA3, "feedforward_modules": feedforward}, tensors


def _short_names(modules: Mapping[str, Any], config: T5Config) -> list[str]:
    """Returns `target_modules`: "q" if every q of the model is adapted, else the full name of each adapted module."""
    everywhere = collections.defaultdict(set)
    for module in _modules(config):
        everywhere[module.rpartition(".")[2]].add(module)
    everywhere_adapted = {name for name, found in everywhere.items() if found <= set(modules)}
    return sorted({name if (name := module.rpartition(".")[2]) in everywhere_adapted else module for module in modules})


def _check_fields(fields: dict) -> str:
    """Returns the kind of adapter.

    Raises:
      ValueError: a field is not supported, or its value has the wrong type; the message has the field's name and value.
    """
    kind, task = fields.get("peft_type"), fields.get("task_type")
    if kind not in (LORA, IA3):
        raise ValueError(f"peft_type {shown(kind)}, not {LORA!r} or {IA3!r}")
    if task not in (TASK, None):
        raise ValueError(f"task_type {shown(task)}, not {TASK!r}")
    known = {*COMMON.split(), *HONOURED[kind].split(), *HARMLESS[kind].split()}
    for name, value in fields.items():
        if name not in known and value:
            raise ValueError(f"{name!a:.60} {shown(value)}, which this project does not have")
    start = fields.get("init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in STARTS):
        raise ValueError(f"init_lora_weights {shown(start)}, a start that changes the base model's own weights")
    lists = ["target_modules"] + (["feedforward_modules"] if kind == IA3 else [])
    for name in (*lists, *(name for name in ("exclude_modules", "layers_pattern") if fields.get(name))):
        value = fields.get(name)
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(x, str) for x in value)):
            raise ValueError(f"{name} {shown(value)}, not a list of names")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(fields.get(name) or {}, dict):
            raise ValueError(f"{name} {shown(fields[name])}, not a number for each name")
    layers = fields.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [0 if layers is None else layers]
    if any(type(number) is not int for number in numbers):
        raise ValueError(f"layers_to_transform {shown(layers)}, not a list of numbers")
    return kind


# The functions below find modules by name as PEFT does (tuners/tuners_utils.py, utils/other.py, tuners/ia3/model.py).


def _is_named(wanted: str | list[str], module: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _is_targeted(fields: dict, module: str) -> bool:
    excluded, layers = fields.get("exclude_modules"), fields.get("layers_to_transform")
    wanted: Any = fields.get("target_modules")
    if (excluded and _is_named(excluded, module)) or not _is_named(wanted, module):
        return False
    if layers is None or layers == [] or isinstance(wanted, str) or module in wanted:
        return True
    patterns = fields.get("layers_pattern") or [None]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        number = r".*?\.[^.]*\." if pattern is None else rf"(?:^|.*?\.){pattern}\."
        if match := re.match(rf"{number}(?P<idx>\d+)\.", module):
            return int(match["idx"]) in (layers if isinstance(layers, list) else [layers])
    return False


def _is_feedforward(wanted: str | list[str], module: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module.endswith(name) for name in wanted)


def _pattern(patterns: dict, module: str) -> str | None:
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)


def _mismatch(found: Mapping[str, tuple[int, ...]], expected: Tensors) -> str | None:
    """Returns what is wrong with the names or shapes of a file's tensors; None if they are as expected."""
    lacking, more = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if more:
        return (
            f"has an unexpected tensor {more[0]!r:.120}: {CONFIG} does not target it, or this model has no such matrix"
        )
    if lacking:
        return f"lacks {lacking[0]}"
    for name, shape in found.items():
        if shape != expected[name][1]:
            return f"holds {name} of {shown(list(shape))}, not {list(expected[name][1])} as this model and {CONFIG} say"
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
