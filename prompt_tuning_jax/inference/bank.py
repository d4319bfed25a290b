"""The prompts of one base, by name, in one array: each row of a batch picks its own (figure 2).

Prompts per layer lie in an array of their own, so that a batch of ordinary prompts pays nothing for them.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from prompt_tuning_jax.errors import Setting, SettingError, near_misses
from prompt_tuning_jax.methods.method import Injection

BASE_ALONE = 0  # the row of a prompt without positions
MAX_NAME = 255  # characters: no file's name is longer


class Prompts(NamedTuple):
    """What a compiled program is given: C rows, each a prompt, or one per encoder layer, behind its padding.

    Attributes:
      values: float32; a prompt shorter than P lies at the end of its row.
      lengths: positions of each prompt; 0 for a free row, and for the base model alone.
      replaces: whether a row's prompts per layer replace what the layer before made, or are added to it.
    """

    values: Float[Array, "C *L P D"]
    lengths: Int[Array, " C"]
    replaces: Bool[Array, " C"]

    def take(self, rows: Int[Array, " B"]) -> tuple[Float[Array, "B *L P D"], Bool[Array, "B P"]]:
        """Returns the prompts of these rows, and which of their positions are no padding, for `Transformer.encode`."""
        length = self.values.shape[-2]
        first = length - self.lengths[rows]
        return self.values[rows], jnp.arange(length)[None, :] >= first[:, None]


class Mixed(NamedTuple):
    """A batch of ordinary prompts and prompts per layer, as `Transformer.encode` takes them.

    Attributes:
      prompt: what each row has in front of its inputs.
      layer_prompts: what each layer replaces it by, or adds to it; 0 for an ordinary prompt.
      mask: which positions are no padding.
      replaces: whether a row's `layer_prompts` replace.
    """

    prompt: Float[Array, "B P D"]
    layer_prompts: Float[Array, "B L P D"]
    mask: Bool[Array, "B P"]
    replaces: Bool[Array, " B"]


class _Table:
    """Prompts of one shape by name, a row each.

    Attributes:
      prompts: the array. It is donated to the next change.
      rows, lengths: the row and the number of positions of each prompt, by name.
    """

    def __init__(self, shape: tuple[int, ...], capacity: int):
        rows = power_of_two(capacity + 1)
        self.rows: dict[str, int] = {}
        self.lengths: dict[str, int] = {}
        self._free = list(reversed(range(1, rows)))
        self.prompts = Prompts(jnp.zeros((rows, *shape)), jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool))

    def add(self, name: str, prompt: Float[np.ndarray, "*L P D"], replaces: bool) -> None:
        values, lengths, kinds = self.prompts
        row = self.rows.get(name) or (self._free.pop() if self._free else len(values))
        rows, length, positions = values.shape[0], values.shape[-2], prompt.shape[-2]
        more = (rows if row == rows else 0, max(positions - length, 0))
        if any(more):
            self._free[:0] = reversed(range(rows + 1, rows + more[0]))
            layers = [(0, 0)] * (values.ndim - 3)
            values = jnp.pad(values, ((0, more[0]), *layers, (more[1], 0), (0, 0)))
            lengths, kinds = jnp.pad(lengths, (0, more[0])), jnp.pad(kinds, (0, more[0]))
        whole = np.zeros(values.shape[1:], np.float32)
        whole[..., whole.shape[-2] - positions :, :] = prompt
        self.prompts = _replace_row(Prompts(values, lengths, kinds), row, whole, positions, replaces)
        self.rows[name], self.lengths[name] = row, positions

    def remove(self, name: str) -> None:
        self._free.append(self.rows.pop(name))
        del self.lengths[name]


class PromptBank:
    """Named prompts of one base model, on the device.

    Adding, replacing and removing write one row in place. The array's shape changes, and programs compile anew, only
    where the prompts outgrow the capacity, which then doubles, or where one is longer than all before it.
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
          layers: of the base model's encoder; None if nobody knows, and prompts per layer are not checked against it.
        """
        self._width, self._fingerprint, self._layers = width, fingerprint, layers
        self._ordinary = _Table((length, width), capacity)
        self._layered: _Table | None = None  # made by the first prompt per layer

    @property
    def prompts(self) -> Prompts:
        """The ordinary prompts' array. It is donated to the next change: pass it on at once, do not keep it."""
        return self._ordinary.prompts

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[str]:
        return iter(self.lengths)

    def __contains__(self, name: object) -> bool:
        return name in self._ordinary.rows or self.is_layered(name)

    def is_layered(self, name: object) -> bool:
        """Returns whether a prompt is one per layer, or has additions per layer."""
        return self._layered is not None and name in self._layered.rows

    @property
    def lengths(self) -> dict[str, int]:
        """The number of positions of each prompt, by name."""
        return dict(sorted((self._ordinary.lengths | (self._layered.lengths if self._layered else {})).items()))

    def longest(self, layered: bool) -> int:
        """Returns the prompt positions of a batch's rows.

        Args:
          layered: whether the batch has prompts per layer.
        """
        tables = (self._ordinary, self._layered) if layered else (self._ordinary,)
        return max(table.prompts.values.shape[-2] for table in tables if table is not None)

    def row(self, name: str | None) -> int:
        """Returns the row of a prompt among those of its kind; None is the base model alone.

        Raises:
          ValueError: there is no such prompt.
        """
        if name is None:
            return BASE_ALONE
        row = self._ordinary.rows.get(name)
        if row is None and self._layered is not None:
            row = self._layered.rows.get(name)
        if row is None:
            names = list(self)  # a copy: another thread may be changing the bank
            short = name[:MAX_NAME]
            raise ValueError(f"no prompt {short!r}{'...' if short != name else ''}; {near_misses(short, names)}")
        return row

    def add(
        self,
        name: str,
        prompt: Float[np.ndarray, "*L P D"],
        fingerprint: str | None = None,
        additions: Float[np.ndarray, "L P D"] | None = None,
    ) -> None:
        """Adds a prompt, [P, D] or [L, P, D], or replaces the one of this name.

        Args:
          fingerprint: of the base model that it was trained on, if that is known.
          additions: what each layer adds to a prompt [P, D].

        Raises:
          ValueError: it was trained on another base model.
        """
        per_layer = prompt if prompt.ndim == 3 else additions
        if prompt.shape[-1] != self._width:
            raise _other_size(name, prompt.shape, f"d_model {self._width}")
        if per_layer is not None and self._layers not in (None, len(per_layer)):
            raise _other_size(name, per_layer.shape, f"{self._layers} encoder layers")
        if fingerprint and self._fingerprint and fingerprint != self._fingerprint:
            raise SettingError(
                f"prompt {name} was trained on a base of fingerprint {fingerprint}, this one is {self._fingerprint}: "
                "set ",
                Setting("initial_checkpoint_path"),
                " to the base it was trained on",
            )
        if name in self and self.is_layered(name) != (per_layer is not None):
            self.remove(name)
        if per_layer is None:
            return self._ordinary.add(name, prompt, replaces=False)
        if self._layered is None:
            self._layers = len(per_layer)
            self._layered = _Table((self._layers, 0, self._width), capacity=8)
        if additions is not None:  # what is added before the first layer is as good as part of the prompt
            per_layer = np.concatenate([(prompt + additions[0])[None], additions[1:]])
        self._layered.add(name, per_layer, replaces=additions is None)

    def remove(self, name: str) -> None:
        """Forgets a prompt, and leaves its row to the next one."""
        if self.is_layered(name) and self._layered is not None:
            return self._layered.remove(name)
        self._ordinary.remove(name)

    def take(self, names: Sequence[str | None], size: int) -> tuple[Injection, Bool[Array, "B P"], dict[str, Array]]:
        """Returns the prompts of a batch's rows: an injection, its mask, and more arguments for an engine's programs.

        Rows of ordinary prompts alone are given an ordinary batch. With one prompt per layer among them it is a mixed
        one, which has the same shapes whatever it mixes.

        Args:
          names: of the rows' prompts; None is the base model alone.
          size: rows of the batch; those that are left over have no prompt.
        """
        rows = np.full((2, size), BASE_ALONE, np.int32)
        for place, name in enumerate(names):
            rows[int(self.is_layered(name)), place] = self.row(name)
        ordinary, layered = rows
        if self._layered is None or not layered.any():
            prompt, mask = take(self.prompts, ordinary)
            return Injection(prompt=prompt), mask, {}
        mixed = _take_mixed(self.prompts, self._layered.prompts, ordinary, layered)
        return Injection(mixed.prompt, mixed.layer_prompts), mixed.mask, {"layers_replace": mixed.replaces}


def _other_size(name: str, shape: tuple[int, ...], has: str) -> SettingError:
    return SettingError(
        f"prompt {name} is {list(shape)}, but the base has {has}: it was trained on another model size. Set ",
        Setting("initial_checkpoint_path"),
        " to the base it was trained on",
    )


@functools.partial(jax.jit, donate_argnums=0)
def _replace_row(
    prompts: Prompts,
    row: Int[Array, ""],
    prompt: Float[Array, "*L P D"],
    length: Int[Array, ""],
    replaces: Bool[Array, ""],
) -> Prompts:
    return Prompts(
        prompts.values.at[row].set(prompt),
        prompts.lengths.at[row].set(length),
        prompts.replaces.at[row].set(replaces),
    )


# Programs of their own: a bank that grows compiles these anew, and not the model's.
take = jax.jit(Prompts.take)


@jax.jit
def _take_mixed(ordinary: Prompts, layered: Prompts, rows: Int[Array, " B"], layered_rows: Int[Array, " B"]) -> Mixed:
    """Returns a batch's prompts; each row names a prompt in one of the two arrays, and `BASE_ALONE` in the other."""
    longest = max(table.values.shape[-2] for table in (ordinary, layered))
    lengths = ordinary.lengths[rows] + layered.lengths[layered_rows]  # one of them is 0
    mask = jnp.arange(longest)[None, :] >= longest - lengths[:, None]
    prompt, per_layer = _behind(ordinary.values[rows], longest), _behind(layered.values[layered_rows], longest)
    replaces = layered.replaces[layered_rows]
    # The first of a row's prompts per layer is in front of its inputs: layer 0 replaces it by itself, or adds 0.
    first = jnp.where((layered_rows != BASE_ALONE)[:, None, None], per_layer[:, 0], prompt)
    again = jnp.where(replaces[:, None, None], per_layer[:, 0], 0.0)
    return Mixed(first, per_layer.at[:, 0].set(again), mask, replaces)


def _behind(prompts: Float[Array, "*B P D"], longest: int) -> Float[Array, "*B {longest} D"]:
    """Returns prompts behind so much padding that they have `longest` positions."""
    return jnp.pad(prompts, [(0, 0)] * (prompts.ndim - 2) + [(longest - prompts.shape[-2], 0), (0, 0)])


def power_of_two(least: int) -> int:
    """The first power of two from `least` on."""
    return 1 << (least - 1).bit_length()
