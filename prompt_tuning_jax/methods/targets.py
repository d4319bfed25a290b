"""Finds the matrices that LoRA and IA3 change, by PEFT's names for T5 or by T5X's, in every layer of both stacks."""

from collections.abc import Mapping
from typing import Any

from prompt_tuning_jax.errors import Setting, SettingError, near_misses
from prompt_tuning_jax.settings import Texts, accepts, check
from prompt_tuning_jax.t5.adapters import split_path
from prompt_tuning_jax.t5.config import T5Config

# PEFT's names, which are Hugging Face's, to T5X's. `wi` is the one projection of T5 1.0, `wi_0` and `wi_1` are the two
# of T5 1.1. The logits' matrix and the embedding table cannot be targets.
T5X_NAMES = {"q": "query", "k": "key", "v": "value", "o": "out", "wi": "wi", "wi_0": "wi_0", "wi_1": "wi_1", "wo": "wo"}
PEFT_NAMES = {ours: theirs for theirs, ours in T5X_NAMES.items()}


def as_peft_names(targets: Any) -> Any:
    """Returns targets by PEFT's names and in one order, so that equal methods have equal fields.

    Unknown names are kept: `check_targets` refuses them.
    """
    if isinstance(targets, str):
        targets = (targets,)
    if not accepts(targets, Texts):
        return targets  # `check_targets` refuses it
    names = [str(PEFT_NAMES.get(str(name), name)) for name in targets]
    known = [name for name in T5X_NAMES if name in names]
    return (*known, *(name for name in dict.fromkeys(names) if name not in T5X_NAMES))


def matrix_shapes(config: T5Config) -> dict[str, tuple[int, int]]:
    """Returns the shape [in, out] of every matrix that can be a target, by PEFT's name."""
    width, joined, hidden = config.emb_dim, config.num_heads * config.head_dim, config.mlp_dim
    branches = len(config.mlp_activations)
    projections = ["wi"] if branches == 1 else [f"wi_{i}" for i in range(branches)]
    shapes = dict.fromkeys("qkv", (width, joined)) | {"o": (joined, width)}
    return shapes | dict.fromkeys(projections, (width, hidden)) | {"wo": (hidden, width)}


def check_targets(targets: Texts, config: T5Config) -> None:
    """Raises SettingError if `targets` is empty, or names a matrix that this model does not have."""
    shapes = matrix_shapes(config)
    setting = Setting("targets")
    check("targets", targets, Texts)
    expected = f"expected some of {', '.join(shapes)}"
    if not targets:
        raise SettingError(setting, f" is empty, {expected}")
    for name in targets:
        if name not in shapes:
            known = dict.fromkeys([*shapes, *(T5X_NAMES[theirs] for theirs in shapes)])
            hint = near_misses(name, known, shown=repr, otherwise="")
            found = f" has {name!r:.60}, which is no matrix of this model, "
            raise SettingError(setting, found, "; ".join(filter(None, (expected, hint))))


def targeted_modules(targets: Texts, parameters: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns the shape [in, out] of every kernel that is a target, by its module's path, sorted."""
    names = {T5X_NAMES[target] for target in targets}
    modules = {}
    for path in sorted(parameters):
        module, name = split_path(path)
        if name == "kernel" and split_path(module)[1] in names:
            modules[module] = tuple(parameters[path].shape)
    return modules
