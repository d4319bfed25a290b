"""A process of its own for what needs TensorFlow: started with one order, ended with whoever started it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from typing import IO, Any

from prompt_tuning_jax.errors import Setting, SettingError


class Child:
    """`python -m MODULE ORDER`. What it writes to stderr is kept, and becomes our error.

    Attributes:
      stdout: what the child writes, where it was started with a pipe.
    """

    def __init__(self, module: str, order: dict[str, Any], what: str, *, pipe: bool = False):
        """Starts it.

        Args:
          what: what it does, for error messages: "tokenising glue_sst2_v200".
          pipe: whether its stdout is read here; else it goes to our stderr.
        """
        self._what = what
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 as long as the child
        # TensorFlow beside JAX must leave the accelerator alone.
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(order)],
            env=environment,
            stdin=subprocess.PIPE,  # nothing is written: that it closes tells the child of our end
            stdout=subprocess.PIPE if pipe else 2,
            stderr=self._errors,
        )
        self.stdout: Any = self._process.stdout
        self.close = weakref.finalize(self, _end, self._process, self._errors)

    @property
    def pid(self) -> int:
        return self._process.pid

    def finish(self) -> None:
        """Waits for its end.

        Raises:
          ValueError: the user's error that the child ended with, its settings kept.
          ChildProcessError: it was killed.
          RuntimeError: it failed otherwise; with its traceback.
        """
        try:
            code = self._process.wait()
            self._errors.seek(0)
            text = self._errors.read().decode(errors="replace").strip()
        finally:
            self.close()
        if code == 2 and text:
            raise _error_in(text.splitlines()[-1])
        if code < 0:
            name, last = signal.Signals(-code).name, f" ({text.splitlines()[-1]})" if text else ""
            raise ChildProcessError(
                f"{self._what}: process {self.pid} was killed by {name}{last}: start again to go on"
            )
        if code:
            raise RuntimeError(f"{self._what} failed:\n{text}")


def _end(process: subprocess.Popen, errors: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for file in (process.stdin, process.stdout, errors):
        if file:
            file.close()


def end_with_parent() -> None:
    """In the child: ends this process as soon as the one that started it is gone, however it went."""

    def wait() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock the interpreter wants at its end
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def user_errors(error: ValueError) -> None:
    """In the child: writes a user's error as one line on stderr, and exits with code 2.

    The line is the message; of a `SettingError` it is the parts in JSON, {"setting_error": [TEXT, {"setting": NAME}]}.
    """
    line = " ".join(str(error).split())
    if isinstance(error, SettingError):
        parts = [{"setting": str(part)} if isinstance(part, Setting) else part for part in error.parts]
        line = json.dumps({"setting_error": parts})
    print(line, file=sys.stderr)
    sys.exit(2)


def _error_in(line: str) -> ValueError:
    """Returns the error that `user_errors` wrote."""
    try:
        parts = json.loads(line)["setting_error"]
        return SettingError(*(Setting(part["setting"]) if isinstance(part, dict) else part for part in parts))
    except (ValueError, KeyError, TypeError):
        return ValueError(line)
