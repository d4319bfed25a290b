"""Answers rows of many tasks with one frozen model: each row of a batch has its own prompt (figure 2)."""

import itertools
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from prompt_tuning_jax.batches.loader import default_buckets
from prompt_tuning_jax.checkpoints.model import Model, load
from prompt_tuning_jax.checkpoints.trained_on import TrainedOn, trained_on
from prompt_tuning_jax.checkpoints.tuned import injection_of
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.inference.bank import PromptBank, StoredPrompt, batch_of, padded_length, power_of_two
from prompt_tuning_jax.inference.engine import engine_of
from prompt_tuning_jax.inference.folder import PromptFolder
from prompt_tuning_jax.inference.requests import ANSWER, RANK, Decoding, Reader, Request
from prompt_tuning_jax.methods.prompt_tuning import MAX_ENCODER_LENGTH
from prompt_tuning_jax.settings import Count, Int, check_values, integer
from prompt_tuning_jax.t5.adapters import PREFIX_KEY

WINDOW = 32  # number of batches whose rows are sorted by length together
MAX_PROGRAMS = 256  # in memory; before one more is compiled, all are dropped (the cache on disk stays)
PASS = 4_096  # label positions of a request; `split_request` splits a request that has more
SEARCHES = 8  # unknown prompts per call whose error suggests similar names


class Predictor:
    """Answers rows `{"prompt": name, "inputs": text}`; rows with different prompts share batches.

    An answer has `"prediction"`, and `"score"`, the log-probability of the prediction (for beam search divided by the
    length penalty). If the row has `"labels"`, they are ranked: `"prediction"` is the best label, and `"scores"` and
    `"probabilities"` have a value per label. If the inputs were longer than `input_length`, the answer has `"cut"`,
    which is true. See `requests.Reader` for all fields of a row.

        predictor = Predictor(load("nano"), {"sst2": "prompts/sst2.npy"})
        for answer in predictor.predict([{"prompt": "sst2", "inputs": "sentence: a joy"}]):
            print(answer["prediction"])

    Attributes:
      bank: the prompts, which may be changed between calls, and by another thread at any time.
      fingerprint: the base model's fingerprint.
    """

    def __init__(
        self,
        model: Model,
        prompts: Any = None,
        *,
        input_length: Annotated[Int, integer(2)] = 512,  # a token and the end of sequence
        max_new_tokens: Count = 32,
        batch_size: Count = 32,
        decoding: Decoding | None = None,
        prompt: str | None = None,
    ):
        """Compiles nothing yet: each shape is compiled when it first occurs.

        Args:
          model: the base model, from `load`.
          prompts: None for the base model alone; or the path of a folder of prompts, or of a single prompt, which is
            then the default for rows without "prompt" (see `folder`); or a mapping from names to arrays [P, D], to
            arrays [L, P, D] of prompts per layer, or to anything else that `checkpoints.tuned.injection_of` takes.
          input_length: the largest number of input tokens. Longer inputs are truncated and keep their end of sequence.
          max_new_tokens: the largest number of tokens of an answer, end of sequence included.
          batch_size: the largest number of rows of a batch.
          decoding: the settings for rows that do not give their own.
          prompt: the prompt's name for rows that have no "prompt".

        Raises:
          ValueError: a setting is invalid, or a prompt does not fit the model.
        """
        check_values(Predictor.__init__, locals())
        decoding = decoding or Decoding()
        self.fingerprint, self.batch_size, self._length = model.fingerprint, batch_size, max_new_tokens
        self._frozen, self._tokenizer = dict(model.parameters), model.tokenizer
        self._buckets = default_buckets(input_length)
        self._engine = engine_of(model.config, beams=decoding.beams)
        self._beams = decoding.beams
        self._compiled: set[tuple] = set()
        self.bank, single = fill_bank(model, prompts, max(MAX_ENCODER_LENGTH - input_length, 1))
        prompt = prompt or single
        self._reader = Reader(model.tokenizer, input_length, decoding, prompt)
        if prompt is not None:
            self.bank.find(prompt)

    @classmethod
    def load(
        cls, base: str = "nano", prompts: Any = None, *, vocabulary: str | None = None, dtype: Any = "auto", **more: Any
    ) -> "Predictor":
        """Loads a base model, and returns its predictor: `Predictor(load(base, dtype, vocabulary), prompts, **more)`.

        Raises:
          ValueError: a file is missing or invalid, a setting is invalid, or a prompt does not fit the model.
        """
        return cls(load(base, dtype, vocabulary), prompts, **more)

    def request(self, row: Any, number: int = 0) -> Request:
        """Returns the request for a row, as `requests.Reader.request` does.

        Raises:
          ValueError: the row is invalid, or there is no such prompt.
        """
        request = self._reader.request(row, number)
        self.bank.find(request.prompt)
        return request

    def requests(self, rows: Iterable[tuple[int, Any]]) -> list[Request | ValueError]:
        """Returns a request per row, or a ValueError for an invalid row.

        An error about an unknown prompt suggests similar names, but only for the first `SEARCHES` unknown prompts,
        because the search compares all names.

        Args:
          rows: pairs of a row's number and the row, or a ValueError instead of the row, which is returned.
        """
        found: list[Request | ValueError] = []
        unknown: dict[str | None, ValueError] = {}
        for number, row in rows:
            try:
                if isinstance(row, ValueError):
                    raise row
                request = self._reader.request(row, number)
                if request.prompt in unknown:
                    raise unknown[request.prompt]
                try:
                    self.bank.find(request.prompt, search=len(unknown) < SEARCHES)
                except ValueError as error:
                    unknown[request.prompt] = error
                    raise
                found.append(request)
            except ValueError as error:
                found.append(error)
        return found

    def cost(self, request: Request) -> int:
        """Returns how many encoder and decoder positions the answer takes if no other row shares its batch."""
        try:
            prompt = self.bank.find(request.prompt, search=False).padded
        except ValueError:  # the prompt has been removed since the row was read
            prompt = 0
        answer = math.prod(label_size(request)) or self._length * (self._beams if request.method == "beam" else 1)
        return prompt + self.bucket(request) + answer

    def predict(self, rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """Yields each row with its answer, in order. A row that cannot be answered gets an "error" instead."""
        numbered = enumerate(rows)
        while window := [*itertools.islice(numbered, self.batch_size * WINDOW)]:
            yield from self.answer_rows(window)

    def answer_rows(self, rows: Sequence[tuple[int, Any]]) -> list[dict[str, Any]]:
        """Returns the fields of each row with its answer or "error"; `rows` has pairs of a row's number and the row."""
        found = self.requests(rows)
        answers = iter(self.answer([request for request in found if isinstance(request, Request)]))
        return [
            own_fields(row) | (next(answers) if isinstance(request, Request) else {"error": str(request)})
            for (_, row), request in zip(rows, found, strict=True)
        ]

    def answer(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """Returns the answer to each request: "prediction" and the other fields, or "error"."""
        answers: list[dict[str, Any]] = [{} for _ in requests]
        running = None
        for batch in self.plan(requests, answers):
            started = self._start([requests[index] for index in batch.indices], batch)
            if running:  # the device computes this batch while the previous one's answers are decoded
                self._finish(*running, requests, answers)
            running = (batch, started)
        if running:
            self._finish(*running, requests, answers)
        return answers

    def plan(self, requests: Sequence[Request], answers: list[dict[str, Any]] | None = None) -> Iterator["BatchPlan"]:
        """Yields batches, the longest rows first. The rows of a batch have the same method and similar lengths.

        A row's length is its number of prompt, input and label positions. Rows share a batch only if padding at most
        doubles the length of each. Rows with prompts per layer come after all others, so that at most one batch per
        method has both kinds.

        Args:
          answers: gets the error of each request whose prompt has been removed since the row was read.
        """
        rows: list[_Row] = []
        for index, request in enumerate(requests):
            try:
                prompt = self.bank.find(request.prompt, search=False)
            except ValueError as error:  # the prompt has been removed since the row was read
                if answers is not None:
                    answers[index]["error"] = str(error)
            else:
                rows.append(_Row(index, request.method, prompt, self.bucket(request), *label_size(request)))

        def order(row: _Row) -> tuple:
            layered = row.prompt.layer_prompts is not None
            return row.method, layered, -row.positions, -len(requests[row.request_index].inputs), row.request_index

        rows.sort(key=order)
        while rows:
            taken, batch, least = 1, rows[0], rows[0].positions
            for row in rows[1 : self.batch_size]:
                both, least = batch.covering(row), min(least, row.positions)
                if row.method != batch.method or both.positions > 2 * least:
                    break
                taken, batch = taken + 1, both
            yield self._make_plan(batch, rows[:taken])
            rows = rows[taken:]

    def _make_plan(self, batch: "_Row", rows: Sequence["_Row"]) -> "BatchPlan":
        size = min(power_of_two(len(rows)), self.batch_size)
        prompts = [row.prompt for row in rows]
        layered = any(prompt.layer_prompts is not None for prompt in prompts)
        table = table_size(batch.labels, batch.tokens) if batch.method == RANK else ()
        program = (batch.method, size, batch.length, padded_length(prompts), layered, *table)
        return BatchPlan(batch.method, batch.length, [row.request_index for row in rows], prompts, program)

    def groups(self, requests: Sequence[Request]) -> tuple[list[list[int]], list[list[int]]]:
        """Divides the indices of requests by whether their programs are compiled.

        Returns:
          Two lists of groups of indices: groups whose programs are compiled, and groups whose programs are not. If all
          programs are compiled, the first list has all requests in one group; otherwise a group is a batch.
        """
        batches = [*self.plan(requests)]
        later = [batch.indices for batch in batches if batch.program not in self._compiled]
        if not later:
            return [[*range(len(requests))]], []
        now = [batch.indices for batch in batches if batch.program in self._compiled]
        # The prompts of these requests have been removed.
        gone = set(range(len(requests))).difference(*(batch.indices for batch in batches))
        return [*now, *([sorted(gone)] if gone else [])], later

    def bucket(self, request: Request) -> int:
        """Returns the length to which the inputs are padded if the batch has no longer inputs."""
        return next(length for length in self._buckets if length >= len(request.inputs))

    def _start(self, requests: Sequence[Request], batch: "BatchPlan") -> Any:
        """Starts a batch on the device. Rows without prompt and inputs pad it to the size of its program."""
        size = batch.program[1]
        inputs = np.full((size, batch.length), self._tokenizer.pad_id, np.int32)
        for slot, request in enumerate(requests):
            inputs[slot, : len(request.inputs)] = request.inputs
        injection, mask, more = batch_of(batch.prompts, size)
        given = (injection, self._frozen, inputs, mask)
        if batch.program not in self._compiled and len(self._compiled) >= MAX_PROGRAMS:
            self._engine.forget()
            self._compiled.clear()
        if batch.method == RANK:
            choices = _choices(requests, (size, *batch.program[-2:]), self._tokenizer.pad_id)
            started = self._engine.rank(*given, **choices, **more)
        elif batch.method == "sample":
            started = self._engine.sample(*given, self._length, **_sampling_arrays(requests, size), **more)
        else:
            started = getattr(self._engine, batch.method)(*given, self._length, **more)
        self._compiled.add(batch.program)
        return started

    def _finish(self, batch: "BatchPlan", started: Any, requests: Sequence[Request], answers: list[dict]) -> None:
        found = jax.device_get(started)
        for slot, index in enumerate(batch.indices):
            request = requests[index]
            if batch.method == RANK:
                answers[index] = _ranked(request.labels, found[slot])
            else:
                tokens, score = found[0][slot], found[1][slot]
                if batch.method == "beam":
                    tokens, score = tokens[0], score[0]
                answers[index] = {"prediction": self._tokenizer.decode(tokens), "score": float(score)}
                if not np.isfinite(score):
                    answers[index] = {"error": f"the answer's score is {score}: the prompt or the base is broken"}
            if request.truncated:
                answers[index]["cut"] = True


def fill_bank(model: Model, prompts: Any, longest: int) -> tuple[PromptBank, str | None]:
    """Returns a bank of a model's prompts, and the prompt's name if `prompts` is the path of a single prompt.

    Args:
      prompts: as `Predictor` takes them, or a `PromptFolder`.
      longest: the largest number of positions that a prompt may have.

    Raises:
      ValueError: a prompt does not fit the model. In a folder of several prompts, such a prompt is left out instead.
    """
    folder = PromptFolder(prompts) if isinstance(prompts, (str, os.PathLike)) else prompts
    size, fingerprint = model.config, model.fingerprint
    if prompts is not None and f"encoder/{PREFIX_KEY}" in model.parameters:
        raise SettingError(
            Setting("prompts"),
            " are given for a model with a learned prefix in its encoder, which would not be next to the shorter "
            "prompts of a batch: such a model answers without prompts",
        )

    known = {"tokenizer": model.tokenizer.fingerprint, "base": model.path}
    bank = PromptBank(size.emb_dim, fingerprint, layers=size.num_encoder_layers, longest=longest, **known)
    if isinstance(folder, PromptFolder):
        changes = folder.sync(bank)
        if folder.single and changes.broken:
            raise changes.broken[folder.single]
        if folder is not prompts:  # the caller that made the folder reads the remarks itself
            for remark in folder.remarks.values():
                warnings.warn(remark, stacklevel=3)
        return bank, folder.single
    named: Any = prompts or {}
    if not isinstance(named, Mapping):
        raise SettingError(Setting("prompts"), f" is {prompts!r:.60}, expected prompts by name, or a folder of them")
    for name, values in named.items():
        source = TrainedOn()
        if isinstance(values, (str, os.PathLike)):
            source = trained_on(values)
            if remark := source.remark(f"prompt {name}", model.path):
                warnings.warn(remark, stacklevel=3)
        elif isinstance(own := getattr(values, "model", None), Model):  # a `Result`
            source = TrainedOn(own.fingerprint, own.tokenizer.fingerprint)
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
                f" has {name!r}, which is not only a prompt, and only prompts can share a model: use it as a model of "
                "its own, `result.merged()`",
            )
        prompt, per_layer = (
            None if array is None else np.asarray(array, np.float32)
            for array in (injection.prompt, injection.layer_prompts)
        )
        if prompt is None:
            bank.add(name, per_layer, source.base, tokenizer=source.tokenizer)
        else:
            bank.add(name, prompt, source.base, additions=per_layer, tokenizer=source.tokenizer)
    return bank, None


def own_fields(row: Any) -> dict[str, Any]:
    """Returns a row's fields without those of an earlier answer, to be returned beside the new answer."""
    return {name: row[name] for name in row if name not in ANSWER} if isinstance(row, Mapping) else {}


class BatchPlan(NamedTuple):
    """Holds the plan of a batch.

    Attributes:
      method: a member of `METHODS`, or `RANK`.
      length: the length to which the inputs are padded.
      indices: the indices of the batch's requests.
      prompts: the prompt of each row.
      program: the method and all sizes that the compiled program depends on; the second entry is the number of rows.
    """

    method: str
    length: int
    indices: list[int]
    prompts: list[StoredPrompt]
    program: tuple


class _Row(NamedTuple):
    """Holds the sizes that a batch must have for one request, or for several.

    Attributes:
      request_index: the index of the request.
      prompt: the request's prompt, or of several requests the one with the largest padded length.
      length: the length to which the inputs are padded.
      labels, tokens: the number of labels to rank, and the tokens to which each is padded; 0 if an answer is generated.
    """

    request_index: int
    method: str
    prompt: StoredPrompt
    length: int
    labels: int
    tokens: int

    @property
    def positions(self) -> int:
        """The number of encoder and decoder positions of a row, without generated tokens."""
        return self.prompt.padded + self.length + self.labels * self.tokens

    def covering(self, other: "_Row") -> "_Row":
        """Returns the sizes that are large enough for both."""
        sizes = (max(pair) for pair in zip(self[3:], other[3:], strict=True))
        return _Row(
            self.request_index, self.method, max(self.prompt, other.prompt, key=lambda prompt: prompt.padded), *sizes
        )


def label_size(request: Request) -> tuple[int, int]:
    """Returns how many labels a request ranks, and the tokens to which each is padded; zeros if it ranks none."""
    if request.choices is None:
        return 0, 0
    count, tokens = request.choices.shape
    return count, max(power_of_two(tokens), 4)


def table_size(labels: int, tokens: int) -> tuple[int, int]:
    """Returns the size of the table for such labels, rounded up because a program is compiled for each size."""
    return max(power_of_two(labels), 16), tokens


def split_request(request: Request) -> list[Request]:
    """Splits a request into requests that rank a few labels each, so that no batch takes long; see `join_answers`."""
    labels, tokens = label_size(request)
    if labels * tokens <= PASS or request.choices is None:
        return [request]
    each = max(PASS // tokens, 1)
    return [
        request._replace(labels=request.labels[first : first + each], choices=request.choices[first : first + each])
        for first in range(0, labels, each)
    ]


def join_answers(request: Request, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the answer to a request from the answers to its parts."""
    failed = [answer for answer in answers if "error" in answer]
    if failed or len(answers) == 1:
        return (failed or answers)[0]
    scores = np.array([score for answer in answers for score in answer["scores"].values()])
    return _ranked(request.labels, scores) | ({"cut": True} if request.truncated else {})


def _sampling_arrays(requests: Sequence[Request], size: int) -> dict[str, np.ndarray]:
    """Returns the arguments of `sample` for a batch of `size` rows."""

    def column(values: Iterable[Any], dtype: Any) -> np.ndarray:
        return np.resize(np.array([*values], dtype), size)

    return {
        "seeds": column((request.seed for request in requests), np.uint32),
        "temperature": column((request.temperature for request in requests), np.float32),
        "top_k": column((request.top_k for request in requests), np.int32),
        "top_p": column((request.top_p for request in requests), np.float32),
    }


def _choices(requests: Sequence[Request], shape: tuple[int, ...], pad: int) -> dict[str, Any]:
    """Returns the arguments of `choice_scores`: label tables of `shape` [B, C, L] and the largest number of labels."""
    tables = [request.choices for request in requests if request.choices is not None]
    choices = np.full(shape, pad, np.int32)
    for row, table in zip(choices, tables, strict=False):
        row[: table.shape[0], : table.shape[1]] = table
    return {"choices": choices, "count": np.int32(max(map(len, tables)))}


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
