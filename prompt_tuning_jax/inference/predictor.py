"""One frozen model that answers rows of many tasks at once: each row of a batch has its own prompt (figure 2)."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from prompt_tuning_jax.batches.loader import default_buckets
from prompt_tuning_jax.checkpoints.model import Model, load
from prompt_tuning_jax.checkpoints.tuned import injection_of
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.inference.bank import PromptBank, power_of_two
from prompt_tuning_jax.inference.engine import engine_of
from prompt_tuning_jax.inference.folder import PromptFolder
from prompt_tuning_jax.inference.requests import RANK, Decoding, Reader, Request
from prompt_tuning_jax.t5.adapters import PREFIX_KEY

WINDOW = 32  # batches whose rows are sorted by length together
ANSWER = frozenset(("prediction", "score", "scores", "probabilities", "cut", "error"))


class Predictor:
    """Answers rows `{"prompt": name, "inputs": text}`, those of all prompts in the same batches.

    A row gets `"prediction"`, and `"score"`, its log-probability (with beam search divided by the length penalty).
    With `"labels"` they are ranked: `"prediction"` is the best, `"scores"` and `"probabilities"` are of all. `"cut"` is
    there, and true, where the inputs were longer than `input_length`. See `requests.Reader` for all fields.

        predictor = Predictor(load("nano"), {"sst2": "prompts/sst2.npy"})
        for answer in predictor.predict([{"prompt": "sst2", "inputs": "sentence: a joy"}]):
            print(answer["prediction"])

    Attributes:
      bank: the prompts, which may change between calls.
      fingerprint: of the base.
    """

    def __init__(
        self,
        model: Model,
        prompts: Any = None,
        *,
        input_length: int = 512,
        max_new_tokens: int = 32,
        batch_size: int = 32,
        decoding: Decoding | None = None,
        prompt: str | None = None,
    ):
        """Compiles nothing yet: each shape is compiled where it is first met.

        Args:
          model: of `load`.
          prompts: by name, arrays [P, D], or [L, P, D] of prompts per layer, or what else
            `checkpoints.tuned.injection_of` takes; or a folder of prompts, or one prompt's file, which is then the
            default of rows that name none (`folder`); None for the model alone.
          input_length: tokens of inputs; longer ones are truncated, their end of sequence kept.
          max_new_tokens: of an answer, end of sequence included.
          batch_size: rows of the largest batch.
          decoding: for rows that do not say.
          prompt: the name for rows that have no "prompt".

        Raises:
          ValueError: a setting is impossible, or a prompt does not fit the model.
        """
        for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise SettingError(Setting(name), f" is {value}, expected at least 1")
        if input_length < 2:
            raise SettingError(
                Setting("input_length"), f" is {input_length}, expected at least 2: one token and the end of sequence"
            )
        decoding = decoding or Decoding()
        self.fingerprint, self.batch_size, self._length = model.fingerprint, batch_size, max_new_tokens
        self._frozen, self._tokenizer = dict(model.parameters), model.tokenizer
        self._buckets = default_buckets(input_length)
        self._engine = engine_of(model.config, beams=decoding.beams)
        self.bank, single = fill_bank(model, prompts)
        prompt = prompt or single
        self._reader = Reader(model.tokenizer, input_length, decoding, prompt)
        if prompt is not None:
            self.bank.row(prompt)

    @classmethod
    def load(
        cls, base: str = "nano", prompts: Any = None, *, vocabulary: str | None = None, dtype: Any = "auto", **more: Any
    ) -> "Predictor":
        """Returns the predictor of a base model's files: `Predictor(load(base, dtype, vocabulary), prompts, **more)`.

        Raises:
          ValueError: something is not there, or does not fit.
        """
        return cls(load(base, dtype, vocabulary), prompts, **more)

    def request(self, row: Any, number: int = 0) -> Request:
        """A row, checked and tokenised: see `requests.Reader.request`."""
        request = self._reader.request(row, number)
        self.bank.row(request.prompt)
        return request

    def predict(self, rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """The rows with their answers, in order, as they come. A row that cannot be answered has an "error" instead."""
        numbered = enumerate(rows)
        while window := [*itertools.islice(numbered, self.batch_size * WINDOW)]:
            yield from self.answer_rows(window)

    def answer_rows(self, rows: Sequence[tuple[int, Any]]) -> list[dict[str, Any]]:
        """The rows, each with its number, and what was found: an answer or an error."""
        found: list[Request | ValueError] = []
        for number, row in rows:
            try:
                found.append(row if isinstance(row, ValueError) else self.request(row, number))
            except ValueError as error:
                found.append(error)
        answers = iter(self.answer([request for request in found if isinstance(request, Request)]))
        return [
            asked(row) | (next(answers) if isinstance(request, Request) else {"error": str(request)})
            for (_, row), request in zip(rows, found, strict=True)
        ]

    def answer(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """The answer to each request: "prediction" and more, or "error"."""
        answers: list[dict[str, Any]] = [{} for _ in requests]
        here = []
        for at, request in enumerate(requests):
            try:
                self.bank.row(request.prompt)
                here.append(at)
            except ValueError as error:  # it was there when the row was read
                answers[at]["error"] = str(error)
        running = None
        for batch in self._batches(requests, here):
            started = self._start([requests[at] for at in batch.places], batch)
            if running:  # the device computes the next batch while the last one's answers are written
                self._finish(*running, requests, answers)
            running = (batch, started)
        if running:
            self._finish(*running, requests, answers)
        return answers

    def _batches(self, requests: Sequence[Request], places: Sequence[int]) -> Iterator["Planned"]:
        """Yields rows of one method and about the same length, the longest first.

        Rows of other lengths share a batch as long as that at most doubles the positions of none. Rows of one kind of
        prompt stand side by side: at most one batch of each length has both kinds.
        """

        def order(at: int) -> tuple:
            request = requests[at]
            layered = self.bank.is_layered(request.prompt)
            return request.method, -self.bucket(request), layered, -len(request.inputs), at

        for method, group in itertools.groupby(sorted(places, key=order), key=lambda at: requests[at].method):
            rest = [*group]
            while rest:
                length, first = self.bucket(requests[rest[0]]), rest[: self.batch_size]
                prompt = self.bank.longest(any(self.bank.is_layered(requests[at].prompt) for at in first))
                taken = [at for at in first if prompt + length <= 2 * (prompt + self.bucket(requests[at]))]
                yield Planned(method, length, taken)
                rest = rest[len(taken) :]

    def bucket(self, request: Request) -> int:
        """The length that its inputs are padded to where no longer ones share the batch."""
        return next(length for length in self._buckets if length >= len(request.inputs))

    def _start(self, requests: Sequence[Request], batch: "Planned") -> Any:
        """Sends a batch to the device, padded by rows of no prompt and no inputs to a power of two of rows."""
        size = min(power_of_two(len(requests)), self.batch_size)
        inputs = np.full((size, batch.length), self._tokenizer.pad_id, np.int32)
        for place, request in enumerate(requests):
            inputs[place, : len(request.inputs)] = request.inputs
        injection, mask, more = self.bank.take([request.prompt for request in requests], size)
        given = (injection, self._frozen, inputs, mask)
        if batch.method == RANK:
            return self._engine.rank(*given, **_choices(requests, size, self._tokenizer.pad_id), **more)
        if batch.method == "sample":
            return self._engine.sample(*given, self._length, **_sampling_arrays(requests, size), **more)
        return getattr(self._engine, batch.method)(*given, self._length, **more)

    def _finish(self, batch: "Planned", started: Any, requests: Sequence[Request], answers: list[dict]) -> None:
        found = jax.device_get(started)
        for place, at in enumerate(batch.places):
            request = requests[at]
            if batch.method == RANK:
                answers[at] = _ranked(request.labels, found[place])
            else:
                tokens, score = found[0][place], found[1][place]
                if batch.method == "beam":
                    tokens, score = tokens[0], score[0]
                answers[at] = {"prediction": self._tokenizer.decode(tokens), "score": float(score)}
                if not np.isfinite(score):
                    answers[at] = {"error": f"the answer's score is {score}: the prompt or the base is broken"}
            if request.cut:
                answers[at]["cut"] = True


def fill_bank(model: Model, prompts: Any) -> tuple[PromptBank, str | None]:
    """Returns the prompts of a model by name, and the name of the only one where one file was given.

    Raises:
      ValueError: one of them does not fit; of a folder's prompts, only if the path is that of one prompt.
    """
    folder = PromptFolder(prompts) if isinstance(prompts, (str, os.PathLike)) else prompts
    size, fingerprint = model.config, model.fingerprint
    if prompts is not None and f"encoder/{PREFIX_KEY}" in model.parameters:
        raise SettingError(
            Setting("prompts"),
            " are given for a model with a learned prefix in its encoder, which would not be next to the shorter "
            "prompts of a batch: such a model answers without prompts",
        )

    def bank_of(prompts: int) -> PromptBank:
        return PromptBank(size.emb_dim, fingerprint, capacity=max(prompts, 1), layers=size.num_encoder_layers)

    if isinstance(folder, PromptFolder):
        bank = bank_of(len(folder.entries()))
        changes = folder.sync(bank)
        if folder.single and changes.broken:
            raise changes.broken[folder.single]
        return bank, folder.single
    named: Any = prompts or {}
    if not isinstance(named, Mapping):
        raise SettingError(Setting("prompts"), f" is {prompts!r:.60}, expected prompts by name, or a folder of them")
    bank = bank_of(len(named))
    for name, values in named.items():
        injection = injection_of(getattr(values, "injection", values), size)
        if injection.task_prompts is not None:
            raise SettingError(
                Setting("prompts"),
                f" has {name!r}, which is a prompt for each of {', '.join(sorted(injection.task_prompts))}: give these "
                "by their own names, `result.prompts`",
            )
        if not injection.length or injection.parameters:
            raise SettingError(
                Setting("prompts"),
                f" has {name!r}, which is no prompt alone: adapters and tuned models are used one at a time, as a "
                "model of their own, `result.merged()`",
            )
        prompt, per_layer = (
            None if array is None else np.asarray(array, np.float32)
            for array in (injection.prompt, injection.layer_prompts)
        )
        if prompt is None:
            bank.add(name, per_layer)
        else:
            bank.add(name, prompt, additions=per_layer)
    return bank, None


def asked(row: Any) -> dict[str, Any]:
    """A row without what an earlier answer left in it: its fields come back beside the new one."""
    return {name: row[name] for name in row if name not in ANSWER} if isinstance(row, Mapping) else {}


class Planned(NamedTuple):
    """A batch to be.

    Attributes:
      method: how it is answered.
      length: of its inputs.
      places: the indices of its requests.
    """

    method: str
    length: int
    places: list[int]


def _sampling_arrays(requests: Sequence[Request], size: int) -> dict[str, np.ndarray]:
    """The arguments of `sample`, of `size` rows."""

    def column(values: Iterable[Any], dtype: Any) -> np.ndarray:
        return np.resize(np.array([*values], dtype), size)

    return {
        "seeds": column((request.seed for request in requests), np.uint32),
        "temperature": column((request.temperature for request in requests), np.float32),
        "top_k": column((request.top_k for request in requests), np.int32),
        "top_p": column((request.top_p for request in requests), np.float32),
    }


def _choices(requests: Sequence[Request], size: int, pad: int) -> dict[str, Any]:
    """The arguments of `choice_scores`, of `size` rows, in few shapes: as many labels and tokens as a power of two."""
    tables = [request.choices for request in requests if request.choices is not None]
    count, length = (max(table.shape[axis] for table in tables) for axis in (0, 1))
    choices = np.full((size, max(power_of_two(count), 16), max(power_of_two(length), 4)), pad, np.int32)
    for row, table in zip(choices, tables, strict=False):
        row[: table.shape[0], : table.shape[1]] = table
    return {"choices": choices, "count": np.int32(count)}


def _ranked(labels: Sequence[str], scores: Float[np.ndarray, " C"]) -> dict[str, Any]:
    scores = scores[: len(labels)].astype(np.float64)
    if not np.isfinite(scores).all():
        return {"error": f"the labels' scores are {scores.tolist()}: the prompt or the base is broken"}
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    best = int(scores.argmax())
    return {
        "prediction": labels[best],
        "score": float(scores[best]),
        "scores": dict(zip(labels, scores.tolist(), strict=True)),
        "probabilities": dict(zip(labels, shares.tolist(), strict=True)),
    }
