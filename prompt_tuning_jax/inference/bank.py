"""The prompts of one base model by name. They stay in host memory; each batch takes copies of its rows' own (figure 2).

So a new prompt compiles nothing, a row pays for the longest prompt of its own batch and no other, and the memory of a
removed prompt is free again.
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from prompt_tuning_jax.checkpoints.trained_on import TrainedOn
from prompt_tuning_jax.errors import Setting, SettingError, near_misses
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.methods.prompt_tuning import MAX_ENCODER_LENGTH

MAX_NAME = 255  # characters: no file's name is longer
# The lengths to which a batch's prompts are padded: those that prompts often have, about a factor of two apart. They
# are few, because each is a compiled program of its own.
LENGTHS = (20, 40, 64, 100, 150, 256, 512, 1024, 2048, MAX_ENCODER_LENGTH)


class Stored(NamedTuple):
    """A prompt as `Transformer.encode` takes it.

    Attributes:
      prompt: what is in front of the inputs; without positions for the base model alone.
      layer_prompts: what each layer replaces it by, or adds to it; None for an ordinary prompt.
      replaces: whether `layer_prompts` replace.
      padded: the length to which it is padded if no longer prompt shares its batch.
    """

    prompt: Float[np.ndarray, "P D"]
    layer_prompts: Float[np.ndarray, "L P D"] | None = None
    replaces: bool = False
    padded: int = 0

    @property
    def length(self) -> int:
        """The number of positions, P."""
        return len(self.prompt)


class PromptBank:
    """Named prompts of one base model. Threads may read it while one thread changes it.

    Attributes:
      base: the base model's path, if it is known.
      broken: what whoever asks for a prompt that cannot be read is told, by name.
    """

    def __init__(
        self,
        width: int,
        fingerprint: str | None = None,
        *,
        tokenizer: str | None = None,
        base: str | None = None,
        layers: int | None = None,
        longest: int = MAX_ENCODER_LENGTH,
    ):
        """Makes an empty bank.

        Args:
          width: d_model.
          fingerprint: of the base model.
          tokenizer: the fingerprint of its tokenizer.
          base: its path, as `Model.path` has it.
          layers: of the base model's encoder; None if nobody knows, and prompts per layer are not checked against it.
          longest: the most positions that a prompt may have.
        """
        self._width, self._layers, self._longest = width, layers, longest
        self._fingerprint, self._tokenizer, self.base = fingerprint, tokenizer, base
        self._prompts: dict[str, Stored] = {}
        self._nothing = np.zeros((0, width), np.float32)
        self.broken: Mapping[str, Exception] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.lengths)

    def __contains__(self, name: object) -> bool:
        return name in self._prompts

    @property
    def lengths(self) -> dict[str, int]:
        """The number of positions of each prompt, by name."""
        return {name: prompt.length for name, prompt in sorted(self._prompts.items())}

    @property
    def nbytes(self) -> int:
        """The memory that the prompts take."""
        arrays = (array for stored in list(self._prompts.values()) for array in stored[:2])
        return sum(array.nbytes for array in arrays if array is not None)

    def find(self, name: str | None, *, search: bool = True) -> Stored:
        """Returns the prompt of a name; None is the base model alone.

        Args:
          search: whether the error says which names are similar. It looks at every name.

        Raises:
          ValueError: there is no such prompt, or it is broken.
        """
        if name is None:
            return Stored(self._nothing, padded=LENGTHS[0] if self._prompts else 0)
        found = self._prompts.get(name)
        if found is None:
            short = name[:MAX_NAME]
            called = f"{short!r}{'...' if short != name else ''}"
            if name in self.broken:
                raise ValueError(f"prompt {called} is broken: {self.broken[name]}")
            hint = f"; {near_misses(short, list(self._prompts))}" if search else ""
            raise ValueError(f"no prompt {called}{hint}")
        return found

    def add(
        self,
        name: str,
        prompt: Float[np.ndarray, "*L P D"],
        fingerprint: str | None = None,
        additions: Float[np.ndarray, "L P D"] | None = None,
        *,
        tokenizer: str | None = None,
    ) -> None:
        """Adds a prompt, [P, D] or [L, P, D], or replaces the one of this name.

        Args:
          fingerprint: of the base model that it was trained on, if that is known.
          additions: what each layer adds to a prompt [P, D].
          tokenizer: the fingerprint of the tokenizer that it was trained with, if that is known.

        Raises:
          ValueError: it was trained on another base model or with another tokenizer, or it is too long.
        """
        per_layer = prompt if prompt.ndim == 3 else additions
        if prompt.shape[-1] != self._width:
            raise _other_size(name, prompt.shape, f"d_model {self._width}")
        if per_layer is not None and self._layers not in (None, len(per_layer)):
            raise _other_size(name, per_layer.shape, f"{self._layers} encoder layers")
        if prompt.shape[-2] > self._longest:
            raise SettingError(
                f"prompt {name} has {prompt.shape[-2]:,} positions, expected at most {self._longest:,} beside inputs "
                "of this length: set ",
                Setting("input_length"),
                " to less, or take a shorter prompt",
            )
        TrainedOn(fingerprint, tokenizer).check(f"prompt {name}", self._fingerprint, self._tokenizer)
        if per_layer is not None:
            self._layers = len(per_layer)
        self._prompts[name] = _stored(prompt, additions)

    def remove(self, name: str) -> None:
        """Forgets a prompt."""
        del self._prompts[name]

    def take(self, names: Sequence[str | None], size: int) -> tuple[Injection, Bool[np.ndarray, "B P"], dict[str, Any]]:
        """Returns the prompts of a batch's rows; see `batch_of`."""
        return batch_of([self.find(name) for name in names], size)


def _stored(prompt: np.ndarray, additions: np.ndarray | None) -> Stored:
    padded = LENGTHS[bisect.bisect_left(LENGTHS, prompt.shape[-2])]
    if prompt.ndim == 2 and additions is None:
        return Stored(np.array(prompt, np.float32), padded=padded)
    if additions is None:  # layer 0 replaces what is in front of the inputs by itself
        layers = np.array(prompt, np.float32)
        return Stored(layers[0], layers, replaces=True, padded=padded)
    layers = np.array(additions, np.float32)
    first = prompt + layers[0]  # what is added before the first layer is as good as part of the prompt
    layers[0] = 0
    return Stored(first.astype(np.float32), layers, padded=padded)


def batch_of(prompts: Sequence[Stored], size: int) -> tuple[Injection, Bool[np.ndarray, "B P"], dict[str, Any]]:
    """Returns what a batch of rows with these prompts runs with: an injection, its mask, and an engine's arguments.

    A prompt stands behind padding up to the padded length of the longest. If one has prompts per layer, all rows get
    them, which are 0 for an ordinary prompt, so that every such mixture runs the same program.

    Args:
      prompts: one per row.
      size: the rows of the batch; those that are left over have no prompt.
    """
    length, width = padded_length(prompts), prompts[0].prompt.shape[1]
    layers = next((len(stored.layer_prompts) for stored in prompts if stored.layer_prompts is not None), 0)
    prompt, mask = np.zeros((size, length, width), np.float32), np.zeros((size, length), bool)
    layer_prompts, replaces = np.zeros((size, layers, length, width), np.float32), np.zeros(size, bool)
    for row, stored in enumerate(prompts):
        first = length - stored.length
        prompt[row, first:], mask[row, first:], replaces[row] = stored.prompt, True, stored.replaces
        if stored.layer_prompts is not None:
            layer_prompts[row, :, first:] = stored.layer_prompts
    arrays: Any = (prompt, layer_prompts) if layers else (prompt,)
    return Injection(*arrays), mask, {"layers_replace": replaces} if layers else {}


def padded_length(prompts: Sequence[Stored]) -> int:
    """Returns the prompt positions of a batch of rows with these prompts."""
    return max(stored.padded for stored in prompts)


def _other_size(name: str, shape: tuple[int, ...], has: str) -> SettingError:
    return SettingError(
        f"prompt {name} is {list(shape)}, but the base has {has}: it was trained on another model size. Set ",
        Setting("initial_checkpoint_path"),
        " to the base it was trained on",
    )


def power_of_two(least: int) -> int:
    """The first power of two from `least` on."""
    return 1 << (least - 1).bit_length()
