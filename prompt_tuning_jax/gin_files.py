"""How every command line reads gin: `--gin_file=...`, `--gin.MACRO=...`, T5X's habits, and errors before anything runs."""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import gin

_PACKAGE = Path(__file__).parent
# A checkout has gin_configs beside the package, a wheel inside it.
SEARCH_PATHS = [path for path in (_PACKAGE.parent / "gin_configs", _PACKAGE / "gin_configs") if path.is_dir()]


def parse(argv: Sequence[str], flags: Sequence[str] = ()) -> dict[str, str | bool]:
    """Parses the gin files and bindings of a command line, in T5X's order: files first, then bindings.

    Args:
      argv: without the program's name.
      flags: other flags the command knows, without dashes; `--name` or `--name=value`.

    Returns:
      The other flags that were given.

    Raises:
      ValueError: an unknown flag, file, macro or binding, or a macro that must be set and is not.
    """
    files, bindings, given = [], [], {}
    for argument in argv:
        name, _, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--gin_file="):
            files.append(value)
        elif argument.startswith("--gin_search_paths="):
            SEARCH_PATHS[:0] = [Path(path) for path in value.split(",")]
        elif argument.startswith("--gin."):
            bindings.append(argument.removeprefix("--gin."))
        elif argument.startswith("--") and name in flags:
            given[name] = value or True
        else:
            known = ["--gin_file", "--gin_search_paths", "--gin.NAME", *(f"--{flag}" for flag in flags)]
            raise ValueError(f"unknown argument {argument!r}; expected {', '.join(known)}")
    for path in SEARCH_PATHS:
        gin.add_config_file_search_path(str(path))
    # gin would also look for runs/train.gin inside a Python package called "runs", and stumbles over a folder of runs.
    gin.config._FILE_READERS[:] = [(open, os.path.isfile)]
    for file in files:
        _check_file(file)
    try:
        gin.parse_config_files_and_bindings(files, bindings, finalize_config=False)
        text = gin.config_str()
    except (ValueError, SyntaxError, OSError, ImportError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"gin: {' '.join(str(error).split())}") from None
    _check_macros(text, bindings)
    gin.finalize()
    return given


def _check_file(name: str) -> None:
    if any(Path(path, name).is_file() for path in ("", *SEARCH_PATHS)):
        return
    there = [str(file.relative_to(path)) for path in SEARCH_PATHS for file in sorted(path.rglob("*.gin"))]
    near = difflib.get_close_matches(name, there, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(there)}"
    raise ValueError(f"no gin file {name}; {hint}")


def _check_macros(text: str, bindings: Sequence[str]) -> None:
    """gin takes a macro that nothing reads in silence: a misspelt one would change nothing."""
    read = set(re.findall(r"%([A-Za-z_]\w*)", text))
    macros = dict(re.findall(r"(?m)^([A-Za-z_]\w*) = (.*)$", text))
    for binding in bindings:
        name = binding.partition("=")[0].strip()
        if name.isidentifier() and name not in read:
            near = difflib.get_close_matches(name, sorted(read), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(read))}"
            raise ValueError(f"no macro {name} in these gin files; {hint}")
    missing = sorted(name for name in read if macros.get(name, "%gin.REQUIRED").strip() == "%gin.REQUIRED")
    missing = [name for name in missing if name not in ("gin", "REQUIRED")]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be set: --gin.{missing[0]}=...")


def config_text() -> str:
    """The parsed configuration, as gin writes it; MODEL_DIR, which says only where, left out."""
    return re.sub(r"(?m)^MODEL_DIR = .*\n(?:    .*\n)*", "", gin.config_str())


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns a ValueError into its one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
