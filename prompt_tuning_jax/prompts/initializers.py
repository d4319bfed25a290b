"""Initialises prompts (section 2.1): random, sampled vocabulary, class labels, a text, or a prompt trained before.

An initialiser here is a frozen dataclass that is called with `(key, length, model)` and returns a prompt, float32
[P, D]. `model` is the frozen base model; an initialiser may read its `config`, `embeddings` [V, D] and `tokenizer`. Any
function of these three arguments is an initialiser, too, and so is one of `jax.nn.initializers`.

    >>> from types import SimpleNamespace
    >>> model = SimpleNamespace(config=SimpleNamespace(emb_dim=4))
    >>> RandomUniform()(jax.random.key(0), 3, model).shape
    (3, 4)
"""

import dataclasses
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from prompt_tuning_jax.errors import Setting, SettingError, renamed
from prompt_tuning_jax.prompts.files import RUN_PROMPT, prompts_in, read_prompt
from prompt_tuning_jax.prompts.similarity import mean_vector_similarity
from prompt_tuning_jax.settings import Callback, Finite, Int, Name, Texts, as_path, check_fields, integer
from prompt_tuning_jax.settings import Text as AnyText

SPECIAL_TOKENS = 3  # T5's <pad>, </s> and <unk> are ids 0, 1 and 2
UNKNOWN = 2  # T5's <unk>, for tokenizers that do not say their own
Population = Annotated[
    Int, integer(SPECIAL_TOKENS + 1)
]  # tokens are drawn from the ids below it, but for special tokens

Encode = Callable[[str], Sequence[int]]
Initializer = Callback  # (key, length, model) -> [P, D], or one of JAX's: (key, shape, dtype) -> [P, D]


@dataclasses.dataclass(frozen=True)
class RandomUniform:
    """Draws uniformly over [minval, maxval); the paper's random initialisation is over [-0.5, 0.5)."""

    minval: Finite = -0.5
    maxval: Finite = 0.5

    def __post_init__(self):
        check_fields(self)
        if self.minval > self.maxval:
            raise SettingError(Setting("minval"), f" is {self.minval}, above ", Setting("maxval"), f", {self.maxval}")

    def __call__(self, key: jax.Array, length: int, model: Any) -> Float[Array, "P D"]:
        return jax.random.uniform(key, (length, model.config.emb_dim), jnp.float32, self.minval, self.maxval)


@dataclasses.dataclass(frozen=True)
class OfficialRandomUniform(RandomUniform):
    """Draws uniformly over [0, 0.5), as the official runs do, because Flax's `uniform(scale)` starts at 0."""

    minval: Finite = 0.0


@dataclasses.dataclass(frozen=True)
class SampledVocabulary:
    """Takes the embeddings of distinct tokens, drawn from the first `population` ids, which are the most common ones.

    Special tokens, sentinels and padding rows of the table are never drawn, however large the population is. Tokens are
    drawn with replacement only if the prompt is longer than the population. The official code also draws <pad>, </s>
    and <unk>.
    """

    population: Population = 5_000

    def __post_init__(self):
        check_fields(self)

    def __call__(self, key: jax.Array, length: int, model: Any) -> Float[Array, "P D"]:
        table = jnp.asarray(model.embeddings)
        words = word_ids(model.tokenizer, table.shape[0])
        ids = jnp.asarray(words[words < self.population])
        drawn = jax.random.choice(key, ids, (length,), replace=length > len(ids))
        return jnp.take(table, drawn, axis=0).astype(jnp.float32)


def word_ids(tokenizer: Any, rows: int) -> Integer[np.ndarray, " words"]:
    """Returns the ids of ordinary tokens in order: no special tokens, sentinels or padding rows of the table.

    Args:
      tokenizer: has `size`, `sentinels` and `special_ids`, as `tokenizers.vocabulary.Vocabulary`, or `vocab_size` and
        `extra_ids`, as SeqIO's. If it has none of them, no id is taken for a sentinel or padding, and the special
        tokens are T5's.
      rows: number of rows of the embedding table.
    """
    size = getattr(tokenizer, "size", getattr(tokenizer, "vocab_size", rows))
    sentinels = getattr(tokenizer, "sentinels", getattr(tokenizer, "extra_ids", 0))  # the last ids below `size`
    special = getattr(tokenizer, "special_ids", range(SPECIAL_TOKENS))
    return np.array([n for n in range(min(rows, size - sentinels)) if n not in special], np.int32)


def start_prompt(initializer: Initializer, key: jax.Array, length: int, model: Any) -> Float[Array, "P D"]:
    """Returns the prompt that an initialiser returns, after a check of its shape.

    Args:
      initializer: called with `(key, length, model)`; or with `(key, (length, d_model), float32)` if its second
        argument is called `shape`, as in `jax.nn.initializers`.

    Raises:
      SettingError: it takes other arguments, or does not return floats of shape [length, d_model].
    """
    setting, shape = Setting("prompt_init"), (length, model.config.emb_dim)
    arguments: tuple[Any, ...] = (key, length, model)
    try:
        signature = inspect.signature(initializer)
    except (TypeError, ValueError):  # a built-in function has no signature
        signature = None
    if signature is not None:
        if [*signature.parameters][1:2] == ["shape"]:
            arguments = (key, shape, jnp.float32)
        try:
            signature.bind(*arguments)
        except TypeError:
            names = ", ".join(signature.parameters)
            raise SettingError(
                setting, f" takes ({names}), expected a function of (key, length, model) or of (key, shape, dtype)"
            ) from None
    prompt = initializer(*arguments)
    if getattr(prompt, "shape", None) != shape or not jnp.issubdtype(prompt.dtype, jnp.floating):
        found = f"{prompt.dtype} {list(prompt.shape)}" if hasattr(prompt, "dtype") else f"a {type(prompt).__name__}"
        raise SettingError(setting, f" gives {found}, expected float32 {list(shape)}")
    return jnp.asarray(prompt, jnp.float32)


SAMPLED_VOCABULARY = SampledVocabulary()  # the default of every method that starts from a prompt


@dataclasses.dataclass(frozen=True)
class ClassLabels:
    """Starts position i at label i, the mean of its subwords' embeddings; sampled vocabulary fills other positions.

    The call raises SettingError if a label is empty or has a subword that the tokenizer does not know.
    """

    labels: Texts
    population: Population = 5_000

    def __post_init__(self):
        with renamed(labels="class_labels"):
            check_fields(self)
        if not self.labels:
            raise SettingError(
                Setting("class_labels"), " is empty: set it to the task's labels, or take another initialisation"
            )
        object.__setattr__(self, "labels", tuple(self.labels))

    def __call__(self, key: jax.Array, length: int, model: Any) -> Float[Array, "P D"]:
        rows = [jnp.mean(_embed(label, model, "class_labels"), axis=0) for label in self.labels]
        return _overwrite(SampledVocabulary(self.population)(key, length, model), rows, "class labels")


@dataclasses.dataclass(frozen=True)
class Text:
    """Starts position j at the embedding of subword j of `text`; sampled vocabulary fills the other positions."""

    text: AnyText
    population: Population = 5_000

    def __post_init__(self):
        with renamed(text="prompt_text"):
            check_fields(self)

    def __call__(self, key: jax.Array, length: int, model: Any) -> Float[Array, "P D"]:
        rows = list(_embed(self.text, model, "prompt_text"))
        return _overwrite(SampledVocabulary(self.population)(key, length, model), rows, "subwords")


@dataclasses.dataclass(frozen=True)
class FromFile:
    """Starts at the prompt in a file that `prompts.files.read_prompt` reads; its shape must be [length, d_model]."""

    path: Name

    def __post_init__(self):
        object.__setattr__(self, "path", as_path(self.path))
        with renamed(path="prompt_file"):
            check_fields(self)

    def __call__(self, key: jax.Array, length: int, model: Any) -> Float[Array, "P D"]:
        del key
        prompt = read_prompt(self.path)
        _check_shape(self.path, prompt, length, model.config.emb_dim)
        return jnp.asarray(prompt)


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Starts at the prompt in a folder that is most similar to a prompt of the target task (SPoT, Vu et al. 2022).

    A prompt is the embedding of its task, and similarity is the cosine of the mean vectors of two prompts (section 3).
    `similarities` returns the cosines.

    Attributes:
      folder: a folder of source prompts, all of shape [length, d_model]: files and folders that `read_prompt` reads, so
        it may be a folder of runs. It must not change before a run that starts from it has ended.
      like: a prompt of the target task, trained for a short time: a file or folder that `read_prompt` reads. If it is
        in `folder`, it is not a candidate.
    """

    folder: Name
    like: Name

    def __post_init__(self):
        for name in ("folder", "like"):
            object.__setattr__(self, name, as_path(getattr(self, name)))
        with renamed(folder="prompt_folder", like="prompt_like"):
            check_fields(self)

    def __call__(self, key: jax.Array, length: int, model: Any) -> Float[Array, "P D"]:
        del key
        target, sources = self._read()
        for path, prompt in {self.like: target, **sources}.items():
            _check_shape(path, prompt, length, model.config.emb_dim)
        nearest = max(sources, key=lambda path: mean_vector_similarity(sources[path], target))
        return jnp.asarray(sources[nearest])

    def similarities(self) -> dict[str, float]:
        """Returns the cosine of each source prompt and `like`, by the source's path, in decreasing order."""
        target, sources = self._read()
        found = {path: mean_vector_similarity(prompt, target) for path, prompt in sources.items()}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def chosen(self) -> str:
        """Returns a line that says which prompt was chosen as the start."""
        found = self.similarities()
        path, cosine = next(iter(found.items()))
        return f"the prompt starts from {path}, the nearest of {len(found)} to {self.like} (cosine {cosine:.3f})"

    def _read(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns `like` and the source prompts by path; raises SettingError unless all have one d_model."""
        with renamed(prompt_file="prompt_like"):
            target = read_prompt(self.like)
        folder = Setting("prompt_folder")
        if not Path(self.folder).is_dir():
            raise SettingError(f"no folder of prompts at {self.folder}: set ", folder, " to a folder of prompts")
        own = _real(self.like)
        paths = [str(path) for path in prompts_in(self.folder).values() if _real(path) != own]
        if not paths:
            raise SettingError(f"{self.folder} holds no prompt but {self.like}: set ", folder, " to one with others")
        with renamed(prompt_file="prompt_folder"):
            sources = {path: read_prompt(path) for path in paths}
        for path, prompt in sources.items():
            if prompt.shape[1] != target.shape[1]:
                shapes = f"{list(prompt.shape)}, and {self.like} {list(target.shape)}"
                raise SettingError(f"{path} is {shapes}: set ", folder, " to prompts of the same base model")
        return target, sources


def _real(path: str | os.PathLike) -> str:
    """Returns the real path of a prompt, which is the same for a run's folder and for the prompt in it."""
    inner = Path(path) / RUN_PROMPT
    return os.path.realpath(inner if inner.is_file() else path)


def _check_shape(path: str, prompt: np.ndarray, length: int, width: int) -> None:
    """Raises SettingError unless the shape of a prompt to start from is [length, width]."""
    if prompt.shape != (length, width):
        raise SettingError(
            f"prompt {path} is [{prompt.shape[0]}, {prompt.shape[1]}], expected [{length}, {width}]: set ",
            Setting("prompt_length"),
            " to its length, and ",
            Setting("initial_checkpoint_path"),
            " to the base model it was trained on",
        )


def written_prompt(text: str, model: Any) -> Float[Array, "n D"]:
    """Returns a text's subword embeddings as a prompt, which does the same as the text in front of the inputs."""
    return _embed(text, model, "prompt_text")


def _embed(text: str, model: Any, setting: str) -> Float[Array, "n D"]:
    # `subwords` omits what a tokenizer puts in front of every text, such as CodeT5's <s>.
    encode = getattr(model.tokenizer, "subwords", model.tokenizer.encode)
    ids = np.asarray(encode(text), np.int32)
    if not len(ids) or getattr(model.tokenizer, "unk_id", UNKNOWN) in ids:
        found = "nothing" if not len(ids) else "<unk>"
        raise SettingError(
            f"{text!r} tokenises to {found}: set ", Setting(setting), " to words that the tokenizer knows"
        )
    return jnp.take(model.embeddings, ids, axis=0).astype(jnp.float32)


def _overwrite(prompt: Float[Array, "P D"], rows: list[jax.Array], what: str) -> Float[Array, "P D"]:
    if len(rows) > prompt.shape[0]:
        logging.warning("%d %s, but the prompt has %d positions: the rest is left out", len(rows), what, len(prompt))
    rows = rows[: prompt.shape[0]]
    return prompt.at[: len(rows)].set(jnp.stack(rows))
