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
    """What a compiled program is given: C rows, each a prompt, or one per encoder layer, behind its padding.

    Attributes:
      values: float32; a prompt shorter than P lies at the end of its row.
      lengths: positions of each prompt; 0 for a free row, and for the base model alone.
    """

    values: Float[Array, "C *L P D"]
    lengths: Int[Array, " C"]

    def take(self, rows: Int[Array, " B"]) -> tuple[Float[Array, "B *L P D"], Bool[Array, "B P"]]:
        """Returns the prompts of these rows, and which of their positions are no padding, for `Transformer.encode`."""
        length = self.values.shape[-2]
        first = length - self.lengths[rows]
        return self.values[rows], jnp.arange(length)[None, :] >= first[:, None]


class PromptBank:
    """Named prompts of one base model, on the device.

    Adding, replacing and removing write one row in place. The array's shape changes, and programs compile anew, only
    where the prompts outgrow the capacity, which then doubles, or where one is longer than all before it.

    Attributes:
      prompts: the array. It is donated to the next change: pass it on at once, do not keep it.
      layered: the prompts per layer, [L, P, D] each, in an array of their own; None as long as there are none.
    """

    def __init__(
        self, width: int, fingerprint: str | None = None, capacity: int = 8, length: int = 0, layers: int | None = None
    ):
        """An empty bank.

        Args:
          width: d_model.
          fingerprint: of the base model.
          capacity: prompts that fit before it must grow.
          length: of the longest prompt to come, in positions.
          layers: of prompts per layer, if it is such a bank.
        """
        self.layered: PromptBank | None = None
        shape = (length, width) if layers is None else (layers, length, width)
        self._fingerprint = fingerprint
        self._rows: dict[str, int] = {}
        self._lengths: dict[str, int] = {}
        rows = power_of_two(capacity + 1)
        self._free = list(reversed(range(1, rows)))
        self.prompts = Prompts(jnp.zeros((rows, *shape), jnp.float32), jnp.zeros(rows, jnp.int32))

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[str]:
        return iter(self.lengths)

    def __contains__(self, name: object) -> bool:
        return name in self._rows or self.is_layered(name)

    def is_layered(self, name: object) -> bool:
        """Returns whether a prompt is one per layer, whose row is one of `layered`."""
        return self.layered is not None and name in self.layered._rows

    @property
    def lengths(self) -> dict[str, int]:
        """The number of positions of each prompt, by name."""
        return dict(sorted((self._lengths | (self.layered._lengths if self.layered else {})).items()))

    def row(self, name: str | None) -> int:
        """Returns the row of a prompt; None is the base model alone.

        Raises:
          ValueError: there is no such prompt.
        """
        if name is None:
            return BASE_ALONE
        row = self._rows.get(name)
        if row is None and self.layered is not None:
            row = self.layered._rows.get(name)
        if row is None:
            names = list(self)  # a copy: another thread may be changing the bank
            short = name[:MAX_NAME]
            raise ValueError(f"no prompt {short!r}{'...' if short != name else ''}; {near_misses(short, names)}")
        return row

    def add(self, name: str, prompt: Float[np.ndarray, "*L P D"], fingerprint: str | None = None) -> None:
        """Adds a prompt, [P, D] or [L, P, D], or replaces the one of this name.

        Args:
          fingerprint: of the base model that it was trained on, if that is known.

        Raises:
          ValueError: it was trained on another base model.
        """
        values, lengths = self.prompts
        width = values.shape[-1]
        if prompt.shape[-1] != width:
            raise SettingError(
                f"prompt {name} is {list(prompt.shape)}, but the base has d_model {width}: it was trained on another "
                "model size. Set ",
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
        if self.is_layered(name) and prompt.ndim == 2:
            self.remove(name)
        if prompt.ndim > values.ndim - 1:
            if self.layered is None:
                self.layered = PromptBank(width, self._fingerprint, layers=len(prompt))
            if name in self._rows:
                self.remove(name)
            return self.layered.add(name, prompt)
        row = self._rows.get(name) or (self._free.pop() if self._free else len(values))
        rows, length, positions = values.shape[0], values.shape[-2], prompt.shape[-2]
        more = (rows if row == rows else 0, max(positions - length, 0))
        if any(more):
            self._free[:0] = reversed(range(rows + 1, rows + more[0]))
            layers = [(0, 0)] * (values.ndim - 3)
            values = jnp.pad(values, ((0, more[0]), *layers, (more[1], 0), (0, 0)))
            lengths = jnp.pad(lengths, (0, more[0]))
        whole = np.zeros(values.shape[1:], np.float32)
        whole[..., whole.shape[-2] - positions :, :] = prompt
        self.prompts = _replace_row(Prompts(values, lengths), row, whole, positions)
        self._rows[name], self._lengths[name] = row, positions

    def remove(self, name: str) -> None:
        """Forgets a prompt, and leaves its row to the next one."""
        if self.layered is not None and self.is_layered(name):
            return self.layered.remove(name)
        row = self._rows.pop(name)
        del self._lengths[name]
        self._free.append(row)


@functools.partial(jax.jit, donate_argnums=0)
def _replace_row(
    prompts: Prompts, row: Int[Array, ""], prompt: Float[Array, "*L P D"], length: Int[Array, ""]
) -> Prompts:
    return Prompts(prompts.values.at[row].set(prompt), prompts.lengths.at[row].set(length))


# A program of its own: a bank that grows compiles this one anew, and not the model's.
take = jax.jit(Prompts.take)


def power_of_two(least: int) -> int:
    """The first power of two from `least` on."""
    return 1 << (least - 1).bit_length()
