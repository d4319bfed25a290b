"""Finds the base model and the tokenizer that a prompt on disk was trained on, and compares them with those in use."""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from prompt_tuning_jax.checkpoints.base import EMBEDDED
from prompt_tuning_jax.checkpoints.tuned import has_only_adapters
from prompt_tuning_jax.errors import Private, Setting, SettingError
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.prompts import peft
from prompt_tuning_jax.prompts.files import RUN_PROMPT, RUN_PROMPTS

RUN_SUMMARY = "summary.json"
COMMIT = re.compile(r"[0-9a-f]{40}")


class TrainedOn(NamedTuple):
    """Holds what the files beside a prompt say about its training.

    Attributes:
      base: the base model's fingerprint; None if it is not known.
      tokenizer: the tokenizer's fingerprint; None if it is not known.
      name: the base model's path or hub id in the configuration of a PEFT adapter, with @REVISION if it has one.
    """

    base: str | None = None
    tokenizer: str | None = None
    name: str | None = None

    def check(self, what: str, base: str | None, tokenizer: str | None) -> None:
        """Raises SettingError if the prompt was trained on another base model or with another tokenizer.

        Args:
          what: what was trained, such as "prompt sst2".
          base, tokenizer: fingerprints of the base model and tokenizer in use; None if they are not known yet.
        """
        if self.base and base and self.base != base:
            raise SettingError(
                f"{what} was trained on a base of fingerprint {self.base}, this one is {base}: set ",
                Setting("initial_checkpoint_path"),
                " to the base it was trained on",
            )
        if self.tokenizer and tokenizer and self.tokenizer != tokenizer:
            raise SettingError(
                f"{what} was trained with a tokenizer of fingerprint {self.tokenizer}, this one is {tokenizer}: set ",
                Setting("vocabulary"),
                " to the tokenizer it was trained with, or ",
                Setting("initial_checkpoint_path"),
                " to the base it was trained on",
            )

    def of(self, injection: Injection) -> "TrainedOn":
        """Returns itself; if a whole model was trained, only the tokenizer, because no base model is needed then."""
        whole = bool(injection.parameters) and not has_only_adapters(injection.parameters)
        return TrainedOn(tokenizer=self.tokenizer) if whole else self

    def remark(self, what: str, path: str | None) -> str | None:
        """Returns a warning if a PEFT adapter names another base model and no fingerprint is known; None otherwise.

        Args:
          what: what was trained, such as "prompt sst2".
          path: the path of the base model in use, as in `Model.path`.
        """
        if self.base or self.name is None or path is None or is_called(path, self.name):
            return None
        return f"{what} says that it was trained on the base model {peft.shown(self.name)}, and this one is {path}"


def is_called(path: str, name: str) -> bool:
    """Returns whether `name` may mean the base model at `path`: the same folder or id, or the same last path part.

    Args:
      path: the base model's path, as in `Model.path`: an absolute path, a URL, or a hub id with its commit.
      name: a path, URL or hub id.

    >>> is_called("google/flan-t5-base@7bcac572ce56", "google/flan-t5-base")
    True
    >>> is_called("/models/flan-t5-base", "google/flan-t5-base"), is_called("/models/t5-base", "google/flan-t5-base")
    (True, False)
    """
    if name in EMBEDDED or os.path.exists(name):
        return os.path.realpath(EMBEDDED.get(name, name)) == os.path.realpath(path)
    (own, _, commit), (asked, _, revision) = path.partition("@"), name.partition("@")
    if COMMIT.fullmatch(revision) and COMMIT.fullmatch(commit) and revision != commit:
        return False
    if any(os.path.isabs(one) or "://" in one for one in (own, asked)):
        own, asked = (os.path.basename(one.rstrip("/")) for one in (own, asked))
    return own == asked


def trained_on(path: str | os.PathLike) -> TrainedOn:
    """Returns what the files beside a prompt or in its folder say about its training.

    Args:
      path: what `tuned.injection_of` takes: a run's folder, or a file or folder in it; NAME.npy with NAME.json, the
        summary.json of its run, beside it; or any other prompt, about which nothing is known.

    Raises:
      ValueError: the summary is not a JSON object.
    """
    if "://" in str(path):
        return TrainedOn()
    path = Path(path)
    return read_trained_on(path, summary_of(path))


def read_trained_on(path: Path, summary: Path) -> TrainedOn:
    """Returns what the file `summary` says, and, if `path` is a PEFT adapter, what its configuration says.

    Raises:
      ValueError: the summary is not a JSON object.
    """
    found = {}
    if summary.is_file():
        try:
            found = json.loads(summary.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError
        except (ValueError, RecursionError):
            what = "is no JSON object; expected the summary.json of a run"
            raise SettingError(Private(f"{summary.parent}/"), f"{summary.name} {what}") from None
    prints = (found.get(name) for name in ("base_fingerprint", "tokenizer_fingerprint"))
    base, tokenizer = (one if isinstance(one, str) else None for one in prints)
    return TrainedOn(base, tokenizer, peft.base_name(path) if peft.is_adapter(path) else None)


def summary_of(path: Path) -> Path:
    """Returns the path at which the summary.json of a prompt's run would be; the file may not exist."""
    if path.is_dir():
        in_run = path.parent.name == "best" and not (path / RUN_SUMMARY).is_file()
        return path.parents[1] / RUN_SUMMARY if in_run else path / RUN_SUMMARY
    for pattern, run in ((RUN_PROMPT, 1), (RUN_PROMPTS / "*.npy", 2)):
        if path.match(str(Path("*", pattern))) and (path.parents[run] / RUN_SUMMARY).is_file():
            return path.parents[run] / RUN_SUMMARY
    return path.with_suffix(".json")
