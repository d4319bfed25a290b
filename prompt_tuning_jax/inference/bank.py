"""The prompts of one base, by name, in one array: each row of a batch picks its own (figure 2)."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from prompt_tuning_jax.errors import Setting, SettingError, near_misses

BASE_ALONE = 0  # the row of a prompt without positions
MAX_NAME = 255  # characters: no file's name is longer


class Prompts(NamedTuple):
    """What a compiled program is given: C rows, each a prompt behind its padding.

    Attributes:
      values: float32; a prompt shorter than P lies at the end of its row.
      lengths: positions of each prompt; 0 for a free row, and for the base alone.
    """

    values: Float[Array, "C P D"]
    lengths: Int[Array, " C"]

    def take(self, rows: Int[Array, " B"]) -> tuple[Float[Array, "B P D"], Bool[Array, "B P"]]:
        """The prompts of these rows, and which of their positions are no padding: `Transformer.encode`'s arguments."""
        length = self.values.shape[1]
        first = length - self.lengths[rows]
        return self.values[rows], jnp.arange(length)[None, :] >= first[:, None]


class PromptBank:
    """Named prompts of one base, on the device.

    Adding, replacing and removing write one row in place. The array's shape changes, and programs compile anew, only
    where the prompts outgrow the capacity, which then doubles, or where one is longer than all before it.

    Attributes:
      prompts: the array. It is given up by the next change: pass it on at once, do not keep it.
    """

    def __init__(self, width: int, fingerprint: str | None = None, capacity: int = 8, length: int = 0):
        """An empty bank.

        Args:
          width: d_model.
          fingerprint: of the base.
          capacity: prompts that fit before it must grow.
          length: of the longest prompt to come, in positions.
        """
        self._fingerprint = fingerprint
        self._rows: dict[str, int] = {}
        self._lengths: dict[str, int] = {}
        rows = power_of_two(capacity + 1)
        self._free = list(reversed(range(1, rows)))
        self.prompts = Prompts(jnp.zeros((rows, length, width), jnp.float32), jnp.zeros(rows, jnp.int32))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._rows))

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    @property
    def lengths(self) -> dict[str, int]:
        """The number of positions of each prompt, by name."""
        return {name: self._lengths[name] for name in self}

    def row(self, name: str | None) -> int:
        """Where a prompt lies; None is the base alone.

        Raises:
          ValueError: there is no such prompt.
        """
        if name is None:
            return BASE_ALONE
        row = self._rows.get(name)
        if row is None:
            names = list(self)  # a copy: another thread may be changing the bank
            short = name[:MAX_NAME]
            raise ValueError(f"no prompt {short!r}{'...' if short != name else ''}; {near_misses(short, names)}")
        return row

    def add(self, name: str, prompt: Float[np.ndarray, "P D"], fingerprint: str | None = None) -> None:
        """Adds a prompt, or replaces the one of this name.

        Args:
          fingerprint: of the base that it was trained on, where that is known.

        Raises:
          ValueError: it was trained on another base.
        """
        values, lengths = self.prompts
        if prompt.shape[1] != values.shape[2]:
            raise SettingError(
                f"prompt {name} is [{prompt.shape[0]}, {prompt.shape[1]}], but the base has d_model "
                f"{values.shape[2]}: it was trained on another model size. Set ",
                Setting("initial_checkpoint_path"),
                " to the base it was trained on",
            )
        if fingerprint and self._fingerprint and fingerprint != self._fingerprint:
            raise SettingError(
                f"prompt {name} was trained on a base of fingerprint {fingerprint}, this one is {self._fingerprint}: "
                "set ",
                Setting("initial_checkpoint_path"),
                " to the base it was trained on",
            )
        row = self._rows.get(name) or (self._free.pop() if self._free else len(values))
        rows, length = values.shape[:2]
        more = (rows if row == rows else 0, max(prompt.shape[0] - length, 0))
        if any(more):
            self._free[:0] = reversed(range(rows + 1, rows + more[0]))
            values = jnp.pad(values, ((0, more[0]), (more[1], 0), (0, 0)))
            lengths = jnp.pad(lengths, (0, more[0]))
        whole = np.zeros(values.shape[1:], np.float32)
        whole[len(whole) - len(prompt) :] = prompt
        self.prompts = _replace_row(Prompts(values, lengths), row, whole, len(prompt))
        self._rows[name], self._lengths[name] = row, len(prompt)

    def remove(self, name: str) -> None:
        """Forgets a prompt, and leaves its row to the next one."""
        row = self._rows.pop(name)
        del self._lengths[name]
        self._free.append(row)


@functools.partial(jax.jit, donate_argnums=0)
def _replace_row(prompts: Prompts, row: Int[Array, ""], prompt: Float[Array, "P D"], length: Int[Array, ""]) -> Prompts:
    return Prompts(prompts.values.at[row].set(prompt), prompts.lengths.at[row].set(length))


# A program of its own: a bank that grows compiles this one anew, and not the model's.
take = jax.jit(Prompts.take)


def power_of_two(least: int) -> int:
    """The first power of two from `least` on."""
    return 1 << (least - 1).bit_length()
