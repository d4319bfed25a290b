"""Parses `--gin_file=...` and `--gin.MACRO=...` as T5X does, and reports errors before anything else is done."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin

from prompt_tuning_jax.command_line import one_line_errors
from prompt_tuning_jax.errors import error_text, near_misses, spelling

FLAGS = ("allow_other_config",)  # settings that are flags, not macros

_PACKAGE = Path(__file__).parent
# A checkout has gin_configs beside the package, and a wheel has it inside.
SEARCH_PATHS = [path for path in (_PACKAGE.parent / "gin_configs", _PACKAGE / "gin_configs") if path.is_dir()]

_near = functools.partial(near_misses, few=1_000)  # list all names: a user can choose only from these


def parse(argv: Sequence[str], flags: Sequence[str] = (), about: str | None = None) -> dict[str, str | bool]:
    """Parses the gin files and bindings of a command line, in T5X's order: first files, then bindings.

    Args:
      argv: the arguments, without the program's name.
      flags: names of the command's other flags, without dashes; they are given as `--name` or `--name=value`.
      about: what the command does. `--help` prints it, all gin files, and the macros of the files given, and exits.

    Returns:
      The other flags that were given, with their values; True for a flag without a value.

    Raises:
      ValueError: a flag, file, macro or binding is unknown, or a macro that must be set is not set.
    """
    bindings, given, setters = _parse_files(argv, flags, about)
    read_by_files = _read_macros(gin.config_str())
    for binding in bindings:
        with _one_line_gin_errors(f"--gin.{binding}"):
            gin.parse_config(binding)
    _check_macros(gin.config_str(), setters, read_by_files, {*map(_bound, bindings)})
    with _one_line_gin_errors("gin"):
        gin.finalize()
    return given


def split_bindings(
    argv: Sequence[str], flags: Sequence[str] = (), about: str | None = None
) -> tuple[list[str], list[str]]:
    """Splits a command line into arguments that its gin files know, and "NAME=value" texts of unknown macros.

    Raises:
      ValueError: a flag or file is unknown, or a file is invalid, as in `parse`.
    """
    bindings, *_ = _parse_files(argv, flags, about)
    known = _macros(gin.config_str())
    gin.clear_config()
    others = [text for text in bindings if "." not in _bound(text) and _bound(text) not in known]
    return [argument for argument in argv if argument.removeprefix("--gin.") not in others], others


def _bound(binding: str) -> str:
    return binding.partition("=")[0].strip()


def _parse_files(
    argv: Sequence[str], flags: Sequence[str], about: str | None
) -> tuple[list[str], dict[str, str | bool], dict[str, list[str]]]:
    """Parses only the files.

    Returns:
      The bindings; the other flags; and, for each macro, a list with the last of the given files that sets it, followed
      by a later file that replaced what read the macro, if there is one.
    """
    files, bindings, given = [], [], {}
    setters: dict[str, list[str]] = {}
    wants_help = about is not None and "--help" in argv
    for argument in argv:
        name, _, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--gin_file="):
            files.append(value)
        elif argument.startswith("--gin_search_paths="):
            SEARCH_PATHS[:0] = [path for path in map(Path, value.split(",")) if path not in SEARCH_PATHS]
        elif argument.startswith("--gin."):
            bindings.append(argument.removeprefix("--gin."))
        elif argument.startswith("--") and name in flags:
            given[name] = value or True
        elif wants_help and argument == "--help":
            continue
        else:
            known = [
                "--gin_file=FILE",
                "--gin_search_paths=DIR",
                "--gin.NAME=VALUE",
                *(f"--{flag}" for flag in flags),
                "--help",
            ]
            raise ValueError(f"unknown argument {argument!r}; expected {', '.join(known)}")
    for path in SEARCH_PATHS:
        gin.add_config_file_search_path(str(path))
    config = gin.config_str()
    for file in files:
        if not any(Path(path, file).is_file() for path in ("", *SEARCH_PATHS)):
            raise ValueError(f"no gin file {file}; {_near(file, _files())}")
        before, read_before = _macros(config), _read_macros(config)
        with _one_line_gin_errors(file), files_alone():
            gin.parse_config_file(file)
        config = gin.config_str()
        setters |= {name: [file] for name, value in _macros(config).items() if before.get(name) != value}
        for name in read_before - _read_macros(config):
            setters.setdefault(name, []).append(file)
    if wants_help:
        print(_help(about or "", files))
        sys.exit()
    return bindings, given, setters


@contextlib.contextmanager
def files_alone() -> Iterator[None]:
    """Makes gin read only files in this context.

    Otherwise gin would also look for runs/train.gin in a Python package called "runs", and fail on a folder of runs.
    """
    readers = gin.config._FILE_READERS
    kept = readers[:]
    readers[:] = [(open, os.path.isfile)]
    try:
        yield
    finally:
        readers[:] = kept


def _files() -> set[str]:
    """Returns all gin files on the search paths, with names such as `models/nano.gin`."""
    return {str(found.relative_to(path)) for path in SEARCH_PATHS for found in path.rglob("*.gin")}


def _help(about: str, files: Sequence[str]) -> str:
    """Returns what `--help` prints; `files` must be parsed already."""
    lines = [about.strip(), "", "--gin_file=FILE, of --gin_search_paths=DIR,... or of the project's own:", ""]
    for folder, found in itertools.groupby(sorted(map(Path, _files())), lambda file: file.parent):
        text = " ".join(file.name for file in found)
        lines += textwrap.wrap(f"{folder}/ {text}", 118, initial_indent="  ", subsequent_indent=" " * 6)
    lines += ["", f"--gin.NAME=VALUE, of {' and '.join(files) or 'the files given'}:", ""]
    for name in sorted(_macros(gin.config_str())):
        value = repr(gin.query_parameter(f"%{name}"))
        lines.append(f"  {name}" + (", which must be set" if value == "%gin.REQUIRED" else f" = {value}"))
    return "\n".join(lines if files else lines[:-3])


def _macros(config: str) -> dict[str, str]:
    """Returns the macros that a configuration sets, each with the first line of its value."""
    return dict(re.findall(r"(?m)^([A-Za-z_]\w*) = (.*)$", config))


@contextlib.contextmanager
def _one_line_gin_errors(where: str) -> Iterator[None]:
    """Turns gin's errors into a ValueError of one line: where, what, and near misses."""
    try:
        yield
    except (ValueError, SyntaxError, OSError, ImportError, AttributeError, LookupError, TypeError) as error:
        message = " ".join(str(error).split())
        hint = ""
        if parameter := re.search(r"Configurable '(.+?)' doesn't have a parameter named '(.+?)'", message):
            hint = "; " + _near(parameter[2], _parameters(gin.get_configurable(parameter[1])))
        elif unknown := re.search(r"No configurable matching '(.+?)'", message):
            hint = "; " + _near(unknown[1], re.findall(r"(?m)^([\w./]+)\.\w+ = ", gin.config_str()))
        elif isinstance(error, SyntaxError) or "malformed node" in message or "Failed to parse token" in message:
            hint = "; expected a Python value, a text in quotes of its own: --gin.NAME=\"'text'\""
        raise ValueError(f"{where}: {message}{hint}") from None


def _parameters(configurable: Callable) -> Iterable[str]:
    if dataclasses.is_dataclass(configurable):
        return (field.name for field in dataclasses.fields(configurable))
    return inspect.signature(configurable).parameters


def _code(config: str) -> str:
    """Returns a configuration whose string literals are empty, because a "%" in a string is not a macro."""
    return re.sub(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", "''", config)


def _read_macros(config: str) -> set[str]:
    """Returns the macros that something in a configuration reads."""
    return set(re.findall(r"%([A-Za-z_]\w*)", _code(config))) - {"gin"}  # %gin.REQUIRED


def _check_macros(config: str, setters: Mapping[str, Sequence[str]], read_by_files: set[str], bound: set[str]) -> None:
    """Raises ValueError for a macro that nothing reads, such as a misspelt one, which gin would silently accept.

    A macro of a file is accepted if a binding replaced what read it. Also raises ValueError if a macro is not set that
    must be.

    Args:
      setters: the files of each macro, as `_parse_files` returns them.
      read_by_files: the macros that were read before the bindings were parsed.
      bound: the names that the bindings set.
    """
    read, macros = _read_macros(config), _macros(_code(config))
    for name in sorted(macros):
        if name in read or (name in read_by_files and name not in bound):
            continue
        if name in read_by_files:
            raise ValueError(f"nothing reads the macro {name} any more: another binding replaces what read it")
        if name not in setters:
            raise ValueError(f"no macro {name} in these gin files; {_near(name, read)}")
        first, *later = setters[name]
        if later:
            raise ValueError(
                f"{later[-1]} replaces what reads the macro {name} of {first}: give one of these two files"
            )
        hint = near_misses(name, read, otherwise="remove it")
        raise ValueError(f"nothing reads the macro {name} that {first} sets; {hint}")
    missing = sorted(name for name in read if macros.get(name, "%gin.REQUIRED") == "%gin.REQUIRED")
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be set: --gin.{missing[0]}=...")


def configured(what: Callable[..., Any], file: str) -> Callable[..., Any]:
    """Returns `what` with the arguments that the parsed files give it.

    Args:
      file: a gin file that configures `what`, for the message if none of the given files does.

    Raises:
      ValueError: no given file configures `what`.
    """
    try:
        return gin.get_configurable(what)
    except ValueError:
        raise ValueError(
            f"no gin file given sets up {what.__name__}: add --gin_file={file}, say; --help lists them"
        ) from None


def config_text() -> str:
    """Returns the parsed configuration as gin writes it, for a run folder's config.gin.

    MODEL_DIR is removed. MESH and NUM_PARTITIONS are set to None: they only change rounding, and a run may resume on
    another mesh.
    """
    text = re.sub(r"(?m)^MODEL_DIR = .*\n(?:    .*\n)*", "", gin.config_str())
    return re.sub(r"(?m)^(MESH|NUM_PARTITIONS) = .*\n(?:    .*\n)*", r"\1 = None\n", text)


def as_macro(setting: str) -> str:
    """Returns a setting's name as a gin command line writes it: a macro, or the parameter if no macro sets it."""
    if setting in FLAGS:
        return f"--{setting}"
    config, macro = gin.config_str(), setting.upper()
    if macro in _macros(config):
        return macro
    bound = re.search(rf"(?m)^(?:[\w/.]+[/.])?(\w+\.{setting}) = (%?)(\w*)", config)
    if bound is None:
        return macro
    return bound[3] if bound[2] else bound[1]


def in_gin(error: Exception) -> str:
    """Returns an error's message with settings written as macros."""
    return error_text(error, as_macro).split("\n  In call to configurable")[0]  # gin adds this line


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns a ValueError or OSError into one line on stderr and exit code 2, with settings written as macros."""
    with one_line_errors(in_gin), spelling(as_macro):
        yield
