"""Trains, compares, shares and serves prompts and adapters for frozen T5 models, in JAX.

    import prompt_tuning_jax as pt

    model = pt.load("nano")
    rows = [{"inputs": "sentence: a joy", "targets": "positive"}, {"inputs": "sentence: a bore", "targets": "negative"}]
    result = pt.train(model, pt.PromptTuning(length=20), rows, rows, steps=100, labels=["negative", "positive"])
    result.save("prompt.npy")

Each public name is imported when it is first used, so importing the package itself is fast.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prompt_tuning_jax.batches.data import files as files
    from prompt_tuning_jax.batches.data import task as task
    from prompt_tuning_jax.checkpoints.model import Model as Model
    from prompt_tuning_jax.checkpoints.model import load as load
    from prompt_tuning_jax.inference.predictor import Predictor as Predictor
    from prompt_tuning_jax.methods.ia3 import IA3 as IA3
    from prompt_tuning_jax.methods.lora import LoRA as LoRA
    from prompt_tuning_jax.methods.low_rank_prompt import LowRankPrompt as LowRankPrompt
    from prompt_tuning_jax.methods.lstm_prompt import LSTMPrompt as LSTMPrompt
    from prompt_tuning_jax.methods.method import Injection as Injection
    from prompt_tuning_jax.methods.method import Method as Method
    from prompt_tuning_jax.methods.mlp_prompt import MLPPrompt as MLPPrompt
    from prompt_tuning_jax.methods.model_tuning import ModelTuning as ModelTuning
    from prompt_tuning_jax.methods.mpt import MPT as MPT
    from prompt_tuning_jax.methods.multitask_prompt import MultitaskPrompt as MultitaskPrompt
    from prompt_tuning_jax.methods.per_layer_prompt import PerLayerPrompt as PerLayerPrompt
    from prompt_tuning_jax.methods.prefix_tuning import PrefixTuning as PrefixTuning
    from prompt_tuning_jax.methods.prompt_tuning import PromptTuning as PromptTuning
    from prompt_tuning_jax.methods.residual_prompt import ResidualPrompt as ResidualPrompt
    from prompt_tuning_jax.methods.scale_shift_prompt import ScaleShiftPrompt as ScaleShiftPrompt
    from prompt_tuning_jax.methods.super_pos import SuperPos as SuperPos
    from prompt_tuning_jax.methods.ulpt import ULPT as ULPT
    from prompt_tuning_jax.prompts import initializers as init  # noqa: F401
    from prompt_tuning_jax.training.api import Result as Result
    from prompt_tuning_jax.training.api import evaluate as evaluate
    from prompt_tuning_jax.training.optimizer import adafactor as adafactor
    from prompt_tuning_jax.training.optimizer import warmup_cosine as warmup_cosine

# Maps each public name to its definition, "module:name" or "module".
_PLACES = {
    "IA3": "methods.ia3:IA3",
    "Injection": "methods.method:Injection",
    "LSTMPrompt": "methods.lstm_prompt:LSTMPrompt",
    "LoRA": "methods.lora:LoRA",
    "LowRankPrompt": "methods.low_rank_prompt:LowRankPrompt",
    "MLPPrompt": "methods.mlp_prompt:MLPPrompt",
    "MPT": "methods.mpt:MPT",
    "Method": "methods.method:Method",
    "Model": "checkpoints.model:Model",
    "ModelTuning": "methods.model_tuning:ModelTuning",
    "MultitaskPrompt": "methods.multitask_prompt:MultitaskPrompt",
    "PerLayerPrompt": "methods.per_layer_prompt:PerLayerPrompt",
    "PrefixTuning": "methods.prefix_tuning:PrefixTuning",
    "Predictor": "inference.predictor:Predictor",
    "PromptTuning": "methods.prompt_tuning:PromptTuning",
    "ResidualPrompt": "methods.residual_prompt:ResidualPrompt",
    "Result": "training.api:Result",
    "ScaleShiftPrompt": "methods.scale_shift_prompt:ScaleShiftPrompt",
    "SuperPos": "methods.super_pos:SuperPos",
    "ULPT": "methods.ulpt:ULPT",
    "adafactor": "training.optimizer:adafactor",
    "evaluate": "training.api:evaluate",
    "files": "batches.data:files",
    "init": "prompts.initializers",
    "load": "checkpoints.model:load",
    "task": "batches.data:task",
    "train": "training.api:train",
    "warmup_cosine": "training.optimizer:warmup_cosine",
}
__all__ = [*_PLACES]  # pyright: ignore[reportUnsupportedDunderAll]


def _public(name: str) -> Any:
    module, _, attribute = _PLACES[name].partition(":")
    found = importlib.import_module(f"{__name__}.{module}")
    return getattr(found, attribute) if attribute else found


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _public(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


class _Package(types.ModuleType):
    """Keeps `train` a function: importing the submodule `train`, a command line, would replace it by that module."""

    @property
    def train(self) -> Any:
        return _public("train")

    @train.setter
    def train(self, value: Any) -> None:
        pass


sys.modules[__name__].__class__ = _Package
