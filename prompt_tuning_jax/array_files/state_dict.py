"""Reads the pickle of a PyTorch state dict without Python's unpickler, which can run any code.

A pickle is a program for a stack machine (`pickletools` documents its opcodes). This module itself interprets the
opcodes that `torch.save` writes for a dict of tensors. It imports nothing and calls nothing that a pickle names. It
makes only strings, numbers, tuples, lists, dicts, `Storage` and `Tensor`; anything else raises an error that names it.
"""

import pickletools
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any, NamedTuple

# PyTorch's names of storages, and the dtype of each; `torch_files` decides which of them are read.
STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
EMPTY_DICT, TENSOR, PARAMETER = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
)
GLOBALS = {EMPTY_DICT, TENSOR, PARAMETER, *(f"torch.{name}" for name in STORAGES)}
MOST_DIMENSIONS, MOST = 8, 2**63


class Global(NamedTuple):
    """Holds the name of one of `GLOBALS`; the object itself is never imported."""

    name: str


class Storage(NamedTuple):
    """Describes a storage, the entries of one or more tensors.

    Attributes:
      key: the storage's name in the file.
      dtype: one of the values of `STORAGES`.
      count: the number of entries.
    """

    key: str
    dtype: str
    count: int


class Tensor(NamedTuple):
    """Describes a tensor, which is a part of a storage; `first` and `strides` are in entries."""

    storage: Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_state_dict(pickle: BytesIO) -> dict[str, Tensor]:
    """Returns the tensors of a pickled state dict by name.

    Raises:
      ValueError: the pickle is damaged, or is not of a dict of tensors.
    """
    tensors = read_value(pickle)
    if not isinstance(tensors, dict):
        raise ValueError(f"it holds a value of type {type(tensors).__name__}, not a state dict")
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name!r:.100} is of type {type(value).__name__}, not a tensor")
    return tensors


def read_value(pickle: BytesIO) -> Any:
    """Interprets one pickle, and leaves the stream at its end.

    Raises:
      ValueError: the pickle is damaged, or has something that no state dict has.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name == "STOP":
                return machine.pop()
            run = _OPCODES.get(opcode.name)
            if run is None:
                raise ValueError(f"it has the opcode {opcode.name}, which no state dict has")
            run(machine, argument)
    except ValueError:
        raise
    except Exception as error:  # from `pickletools` for damaged bytes, or from a stack that is too short
        raise ValueError(f"it is damaged: {type(error).__name__}") from None
    raise ValueError("it is truncated")


class _Machine:
    """Holds the state of the stack machine: the stack, the positions of marks in it, and the memo."""

    def __init__(self):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("it is damaged: a mark is missing")
        return self.stack.pop()

    def pop_many(self, count: int) -> tuple[Any, ...]:
        return tuple([self.pop() for _ in range(count)][::-1])

    def pop_mark(self) -> list[Any]:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def memoize(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("it is damaged: items of no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):  # a nested tuple takes exponential time to hash
                raise ValueError(f"a key of a dict is of type {type(key).__name__}, not a name")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("it is damaged: items of no list")
        self.stack[-1].extend(items)

    def find(self, name: str) -> None:
        if name not in GLOBALS:
            raise ValueError(f"it asks for {name!r:.100}, which no state dict needs")
        self.push(Global(name))

    def find_on_stack(self) -> None:
        module, name = self.pop_many(2)
        self.find(f"{module!s:.100}.{name!s:.100}" if isinstance(module, str) and isinstance(name, str) else "")

    def find_storage(self) -> None:
        found = self.pop()
        if not isinstance(found, tuple) or len(found) not in (5, 6) or found[0] != "storage":
            raise ValueError("it is damaged: a storage is expected")
        kind, key, count = found[1], found[2], found[4]
        name = kind.name.removeprefix("torch.") if isinstance(kind, Global) else None
        if name not in STORAGES or not isinstance(key, str) or not _is_size(count) or found[5:] not in ((), (None,)):
            raise ValueError("it is damaged: a storage is expected")
        self.push(Storage(key, STORAGES[name], count))

    def call(self) -> None:
        function, arguments = self.pop_many(2)
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise ValueError("it calls something that is no name")
        if function.name == EMPTY_DICT and not arguments:
            return self.push({})
        if function.name == TENSOR and len(arguments) in (6, 7):
            storage, first, shape, strides = arguments[:4]
            sizes = all(isinstance(part, tuple) and all(map(_is_size, part)) for part in (shape, strides))
            if isinstance(storage, Storage) and _is_size(first) and sizes and len(shape) == len(strides):
                if arguments[6:] not in ((), (None,), ({},)):
                    raise ValueError("a tensor is conjugated or negated, which is not read")
                if len(shape) > MOST_DIMENSIONS:
                    raise ValueError(f"a tensor has {len(shape)} dimensions")
                return self.push(Tensor(storage, first, shape, strides))
        if function.name == PARAMETER and len(arguments) == 3 and isinstance(arguments[0], Tensor):
            return self.push(arguments[0])
        raise ValueError(f"it calls {function.name} with other arguments than a state dict's")

    def ignore_attributes(self) -> None:
        """Drops the attributes of a state dict, which are the versions of its modules."""
        self.pop()
        if not isinstance(self.stack[-1], dict):
            raise ValueError("it sets attributes of something that is no dict")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST  # True is an int, too


def _push(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


# What each opcode does; `pickletools` reads the argument.
_OPCODES: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), _push),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "TUPLE1": lambda machine, _: machine.push(machine.pop_many(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.pop_many(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.pop_many(3)),
    "SETITEM": lambda machine, _: machine.set_items([*machine.pop_many(2)]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, argument: machine.memoize(argument)),
    "MEMOIZE": lambda machine, _: machine.memoize(len(machine.memo)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, argument: machine.push(machine.memo[argument])),
    "GLOBAL": lambda machine, argument: machine.find(argument.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.find_on_stack(),
    "BINPERSID": lambda machine, _: machine.find_storage(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.ignore_attributes(),
}
