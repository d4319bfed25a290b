"""Describes values as JSON, and compares descriptions, so that a run folder can tell whether it holds the same run.

>>> describe(0.1), describe({"steps": 60}), describe(("a", None))
(0.1, {'steps': 60}, ['a', None])
"""

import dataclasses
import functools
import hashlib
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

# Functions of these packages are described by name and enclosed values; all other functions also by their constants.
LIBRARIES = ("builtins", "flax", "jax", "numpy", "optax", "prompt_tuning_jax")


def describe(value: Any) -> Any:
    """Returns `value` as JSON that is the same for equal values in any process.

    A dataclass or named tuple is described by its class and fields; an array by its shape, its dtype and a hash of its
    bytes; a function by its name, the values that it encloses and, outside of `LIBRARIES`, its constants. An optax
    optimiser, which is a pair of functions, is therefore described by its learning rate and other numbers.
    """
    return _describe(value, ())


def _describe(value: Any, above: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if id(value) in above:
        return "itself"
    inner = functools.partial(_describe, above=(*above, id(value)))
    if isinstance(value, (np.ndarray, np.generic)) or hasattr(value, "__array__"):
        array = np.asarray(value)
        if not array.ndim:
            return inner(array.item())
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
        return {"array": f"{array.dtype} {list(array.shape)}", "sha256": digest}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: inner(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": _name(type(value)), **fields, **_own_code(type(value), inner)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {"class": _name(type(value)), **{name: inner(field) for name, field in value._asdict().items()}}
    if isinstance(value, Mapping):
        return {str(name): inner(value[name]) for name in value}
    if isinstance(value, (set, frozenset)):
        return sorted((inner(one) for one in value), key=str)
    if isinstance(value, (list, tuple, range)):
        return [inner(one) for one in value]
    if isinstance(value, functools.partial):
        return {"partial": inner(value.func), "args": inner(value.args), "keywords": inner(value.keywords)}
    if isinstance(value, types.MethodType):
        return {"method": value.__name__, "of": inner(value.__self__)}
    if hasattr(value, "__wrapped__"):
        return inner(value.__wrapped__)
    if isinstance(value, types.FunctionType):
        return {"function": _name(value)} | _enclosed(value, inner) | _constants(value, inner)
    if isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)) or not hasattr(value, "__dict__"):
        return getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or str(value)
    return {"class": _name(type(value)), **{name: inner(field) for name, field in sorted(vars(value).items())}}


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _enclosed(function: types.FunctionType, inner: Any) -> dict[str, Any]:
    """Returns the values that a function has besides its arguments: those of its closure and its defaults."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = inner(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    defaults = inner([*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()])
    return found | ({"defaults": defaults} if defaults else {})


def _constants(function: types.FunctionType, inner: Any) -> dict[str, Any]:
    if str(function.__module__).partition(".")[0] in LIBRARIES:
        return {}
    return {"constants": [*_constants_of(function.__code__, inner)]}


def _constants_of(code: types.CodeType, inner: Any) -> Iterator[Any]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _constants_of(constant, inner)
        elif constant is not None and constant != code.co_consts[0]:  # the first is usually the docstring
            yield inner(constant)


def _own_code(kind: type, inner: Any) -> dict[str, Any]:
    """Returns the methods of a class outside of `LIBRARIES`, since a run with a changed formula is another run."""
    if str(kind.__module__).partition(".")[0] in LIBRARIES:
        return {}
    functions = {name: value for name, value in vars(kind).items() if isinstance(value, types.FunctionType)}
    own = {name: value for name, value in functions.items() if value.__qualname__ == f"{kind.__qualname__}.{name}"}
    return {"methods": {name: inner(value) for name, value in own.items() if not name.startswith("__")}}


def differences(kept: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (path, kept, now) for each difference of two descriptions; a missing value is None."""
    if isinstance(kept, Mapping) and isinstance(now, Mapping):
        for name in [*kept, *(name for name in now if name not in kept)]:
            yield from differences(kept.get(name), now.get(name), f"{path}.{name}" if path else name)
    elif isinstance(kept, list) and isinstance(now, list) and len(kept) == len(now):
        for index, (one, other) in enumerate(zip(kept, now, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
    elif kept != now:
        yield path, kept, now
