"""Keeps the named prompts of one base model in host memory, and copies those of a batch's rows (figure 2).

So adding a prompt compiles nothing, a row is padded only to the longest prompt of its own batch, and removing a prompt
frees its memory.
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

MAX_NAME = 255  # characters; no file name is longer
# The lengths to which a batch's prompts are padded: common prompt lengths, about a factor of two apart. The list is
# short because a program is compiled for each length.
LENGTHS = (20, 40, 64, 100, 150, 256, 512, 1024, 2048, MAX_ENCODER_LENGTH)


class StoredPrompt(NamedTuple):
    """Holds a prompt as `Transformer.encode` takes it.

    Attributes:
      prompt: the prompt in front of the inputs; P is 0 for the base model alone.
      layer_prompts: the prompt of each encoder layer, which replaces the first P positions of the layer's input or is
        added to them; None for an ordinary prompt.
      replaces: whether `layer_prompts` replace the positions; if not, they are added.
      padded: the length to which the prompt is padded if its batch has no longer prompt.
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
    """Holds the named prompts of one base model. Several threads may read it while one thread changes it.

    Attributes:
      base: the base model's path; None if it is not known.
      broken: by name, the error of each prompt that could not be read or added; `find` quotes it in its own error.
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
          width: d_model of the base model.
          fingerprint: the base model's fingerprint; None if it is not known.
          tokenizer: the fingerprint of the base model's tokenizer; None if it is not known.
          base: the base model's path, as in `Model.path`.
          layers: the number of encoder layers of the base model; None if it is not known: then the first prompt per
            layer that is added sets it.
          longest: the largest number of positions that a prompt may have.
        """
        self._width, self._layers, self._longest = width, layers, longest
        self._fingerprint, self._tokenizer, self.base = fingerprint, tokenizer, base
        self._prompts: dict[str, StoredPrompt] = {}
        self._no_prompt = np.zeros((0, width), np.float32)
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
        """The memory that the prompts take, in bytes."""
        arrays = (array for stored in list(self._prompts.values()) for array in stored[:2])
        return sum(array.nbytes for array in arrays if array is not None)

    def find(self, name: str | None, *, search: bool = True) -> StoredPrompt:
        """Returns the prompt called `name`, or for None the empty prompt of the base model alone.

        Args:
          search: whether the error lists similar names, for which it compares `name` with every name.

        Raises:
          ValueError: there is no such prompt, or it is in `broken`.
        """
        if name is None:
            return StoredPrompt(self._no_prompt, padded=LENGTHS[0] if self._prompts else 0)
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
        """Adds a prompt, [P, D] or [L, P, D], or replaces the prompt of the same name.

        Args:
          fingerprint: the fingerprint of the base model that the prompt was trained on; None if it is not known.
          additions: what each encoder layer adds to a prompt [P, D].
          tokenizer: the fingerprint of the tokenizer that the prompt was trained with; None if it is not known.

        Raises:
          ValueError: the prompt was trained on another base model or with another tokenizer, or it is too long.
        """
        per_layer = prompt if prompt.ndim == 3 else additions
        if prompt.shape[-1] != self._width:
            raise _size_error(name, prompt.shape, f"d_model {self._width}")
        if per_layer is not None and self._layers not in (None, len(per_layer)):
            raise _size_error(name, per_layer.shape, f"{self._layers} encoder layers")
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
        self._prompts[name] = _make_stored(prompt, additions)

    def remove(self, name: str) -> None:
        """Removes a prompt."""
        del self._prompts[name]

    def take(self, names: Sequence[str | None], size: int) -> tuple[Injection, Bool[np.ndarray, "B P"], dict[str, Any]]:
        """Returns the prompts of a batch's rows; see `batch_of`."""
        return batch_of([self.find(name) for name in names], size)


def _make_stored(prompt: np.ndarray, additions: np.ndarray | None) -> StoredPrompt:
    padded = LENGTHS[bisect.bisect_left(LENGTHS, prompt.shape[-2])]
    if prompt.ndim == 2 and additions is None:
        return StoredPrompt(np.array(prompt, np.float32), padded=padded)
    if additions is None:  # layer 0 replaces the positions by the same values
        layers = np.array(prompt, np.float32)
        return StoredPrompt(layers[0], layers, replaces=True, padded=padded)
    layers = np.array(additions, np.float32)
    first = prompt + layers[0]  # what the first layer adds can be added to the prompt itself
    layers[0] = 0
    return StoredPrompt(first.astype(np.float32), layers, padded=padded)


def batch_of(prompts: Sequence[StoredPrompt], size: int) -> tuple[Injection, Bool[np.ndarray, "B P"], dict[str, Any]]:
    """Returns what a batch of rows with these prompts runs with: an injection, its mask, and an engine's arguments.

    Each prompt is padded on the left to the padded length of the longest one. If any row has prompts per layer, all
    rows get prompts per layer, which are 0 for an ordinary prompt, so that all such mixtures run the same program.

    Args:
      prompts: one per row.
      size: the number of rows of the batch; rows after the last prompt get no prompt.
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


def padded_length(prompts: Sequence[StoredPrompt]) -> int:
    """Returns the number of prompt positions of a batch whose rows have these prompts."""
    return max(stored.padded for stored in prompts)


def _size_error(name: str, shape: tuple[int, ...], has: str) -> SettingError:
    return SettingError(
        f"prompt {name} is {list(shape)}, but the base has {has}: it was trained on another model size. Set ",
        Setting("initial_checkpoint_path"),
        " to the base it was trained on",
    )


def power_of_two(least: int) -> int:
    """Returns the smallest power of two that is at least `least`."""
    return 1 << (least - 1).bit_length()
