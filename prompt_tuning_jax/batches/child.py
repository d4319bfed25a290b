"""Runs code that needs TensorFlow in a child process, which ends when its parent ends."""

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
    """A child process that runs `python -m MODULE REQUEST`, and whose stderr becomes the error that `finish` raises.

    Attributes:
      stdout: the child's stdout if `pipe` is set, otherwise None.
    """

    def __init__(self, module: str, request: dict[str, Any], what: str, *, pipe: bool = False):
        """Starts the child.

        Args:
          module: the module to run.
          request: the child's argument, passed as JSON.
          what: the child's work, for error messages: "tokenising glue_sst2_v200".
          pipe: whether the caller reads the child's stdout; otherwise it goes to this process's stderr.
        """
        self._what = what
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 it stays open until `close`
        # TensorFlow in the child must not use the accelerator, which JAX in this process uses.
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(request)],
            env=environment,
            stdin=subprocess.PIPE,  # nothing is written to it: the child exits when it is closed
            stdout=subprocess.PIPE if pipe else 2,
            stderr=self._errors,
        )
        self.stdout: Any = self._process.stdout
        self.close = weakref.finalize(self, _end, self._process, self._errors)

    @property
    def pid(self) -> int:
        return self._process.pid

    def finish(self) -> None:
        """Waits for the child to end.

        Raises:
          ValueError: the child ended with a user's error, which is raised here with its settings.
          ChildProcessError: the child was killed.
          RuntimeError: the child failed in another way; the message has its traceback.
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
    """Makes this child process exit as soon as its parent has ended for any reason."""

    def wait() -> None:
        while os.read(0, 4096):  # not sys.stdin: the interpreter needs its lock at exit
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def user_errors(error: ValueError) -> None:
    """Reports a user's error from the child: writes one line to stderr, and exits with code 2.

    The line is the error's message. For a `SettingError` it has the parts as JSON,
    {"setting_error": [TEXT, {"setting": NAME}]}.
    """
    line = " ".join(str(error).split())
    if isinstance(error, SettingError):
        parts = [{"setting": str(part)} if isinstance(part, Setting) else part for part in error.parts]
        line = json.dumps({"setting_error": parts})
    print(line, file=sys.stderr)
    sys.exit(2)


def _error_in(line: str) -> ValueError:
    """Returns the error that `user_errors` wrote as `line`."""
    try:
        parts = json.loads(line)["setting_error"]
        return SettingError(*(Setting(part["setting"]) if isinstance(part, dict) else part for part in parts))
    except (ValueError, KeyError, TypeError):
        return ValueError(line)
