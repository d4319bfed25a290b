"""Serves a predictor over HTTP, as an ASGI application.

    POST /v1/predict    {"rows": [...]}; returns the answers in order, as `infer` writes them
    GET  /v1/prompts    the prompts, and the errors of broken prompts
    GET  /livez         503 if the service must be restarted
    GET  /readyz        200 while the model answers; /healthz is the same
    GET  /metrics       counters for Prometheus
    GET  /openapi.json  the OpenAPI description of these paths

If a row cannot be answered, the response is still a 200, and the row has an "error". Other errors are {"error": one
line}, with one of these statuses:

    400  the body is not a valid request
    401  the API key is missing or wrong
    408  the body did not arrive in time
    413  the body, its rows or their tokens are too many
    415  the content type is not JSON
    421  the request is for another host
    429  too many rows, tokens or bodies are waiting
    503  the base model is loading, the model failed, or the answer took longer than `Limits.timeout`, which does not
         count the time for compiling
"""

import asyncio
import itertools
import json
import os
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.inference.batcher import Batcher, Job, ModelError, ModelThread, Overloaded
from prompt_tuning_jax.inference.folder import Changes, PromptFolder
from prompt_tuning_jax.inference.http import (
    BodyReader,
    ClientGone,
    HeaderCheck,
    Refusal,
    disconnected,
    error_response,
    origin_form,
    respond_and_close,
    rows_of,
)
from prompt_tuning_jax.inference.limits import Limits
from prompt_tuning_jax.inference.openapi import openapi_document
from prompt_tuning_jax.inference.predictor import Predictor, join_answers, own_fields, split_request
from prompt_tuning_jax.inference.prometheus import Metrics
from prompt_tuning_jax.inference.requests import Request
from prompt_tuning_jax.settings import NotNegative, Positive, check_values

PREDICT, PROMPTS, METRICS, OPENAPI = "/v1/predict", "/v1/prompts", "/metrics", "/openapi.json"
LIVEZ, READYZ, HEALTHZ = PROBES = ("/livez", "/readyz", "/healthz")
PATHS = (PREDICT, PROMPTS, METRICS, OPENAPI, *PROBES)
BODIES = 16  # times `max_bytes`: the largest size of all bodies in progress together
QUEUE = 8  # times `max_tokens`: the largest number of tokens that may wait
SMALL = 64 * 1024  # bytes; bodies up to this size are parsed on a thread of their own
LOST = 10  # times `timeout`: a model call that takes longer is taken to be stuck for good
LOADING = "the base is still being loaded"
WINDOW = 4  # number of batches handed to the model at once


class Service:
    """Owns the predictor, the predictor's threads, and the queue of rows.

    Attributes:
      app: the ASGI application. It answers /healthz from the beginning, and rows after `start` has returned.
      model: the thread on which the predictor computes.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Predictor, PromptFolder | None]],
        base: str,
        limits: Limits | None = None,
        *,
        wait: NotNegative = 0.003,
        poll: Positive = 1.0,
        text: Callable[[Exception], str] = str,
        keys: Collection[str] = (),
        hosts: Collection[str] = (),
    ):
        """Loads nothing yet.

        Args:
          load: returns the predictor, and the folder of its prompts or None; `start` calls it on the model's thread.
          base: the base model's path. Clients see its last part.
          limits: the limits of a request; None for the defaults.
          wait: seconds that a batch waits for more rows while the model is idle.
          poll: seconds between two checks of the folder.
          text: returns an error's message with the names of settings that the front end uses.
          keys, hosts: the accepted API keys and hosts; see `HeaderCheck`.
        """
        check_values(Service.__init__, locals())
        limits = limits or Limits()
        limits.check()
        self.model, self._compiler = ModelThread(), ModelThread()
        self._load, self._base, self._limits, self._wait, self._poll = load, base, limits, wait, poll
        self._text = text
        # Threads that parse and tokenise: a large request must not delay the event loop or small requests.
        self._small, self._large, self._files = (ThreadPoolExecutor(1, name) for name in ("small", "large", "files"))
        self._predictor: Predictor | None = None
        self._batcher: Batcher | None = None
        self._answering: asyncio.Task | None = None
        self._tasks: list[asyncio.Task] = []
        self._prompts: dict[str, Any] = {}
        self._bytes_in_progress = 0  # bytes of bodies in progress
        self._metrics = Metrics(PATHS, lambda: self._batcher.waiting if self._batcher else 0)
        starlette = Starlette(
            routes=[
                Route(PREDICT, _Endpoint(self), methods=["POST"]),
                Route(PROMPTS, self.prompts),
                Route(LIVEZ, self.livez),
                Route(READYZ, self.readyz),
                Route(HEALTHZ, self.readyz),
                Route(METRICS, self.metrics),
                Route(OPENAPI, self.openapi),
            ],
            exception_handlers={HTTPException: error_response},
        )
        starlette.router.redirect_slashes = False
        checked = HeaderCheck(starlette, keys=keys, hosts=hosts, open_to_all=PROBES)
        self.app = origin_form(self._metrics.counting(checked))

    async def start(self) -> None:
        """Loads the predictor, and starts to answer rows.

        Raises:
          ValueError: `load` failed.
        """
        predictor, folder = await self.model.run(self._load)
        if folder is not None:
            await self._run_in(self._files, self._refresh, predictor, folder, False)
            self._tasks.append(asyncio.create_task(self._watch_folder(predictor, folder)))
        self._batcher = Batcher(
            predictor.answer,
            self.model,
            batch_size=predictor.batch_size,
            window=WINDOW * predictor.batch_size,
            wait=self._wait,
            max_queue=self._limits.max_queue,
            max_tokens=QUEUE * self._limits.max_tokens,
            cost=predictor.cost,
            groups=predictor.groups,
            compiler=self._compiler,
            observe=self._metrics.windows.observe,
        )
        self._answering = asyncio.create_task(self._batcher.run())
        self._tasks.append(self._answering)
        self._predictor = predictor

    async def stop(self) -> None:
        """Stops what `start` started. The batch that the model is computing goes on to its end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for thread in (self.model, self._compiler):
            thread.close()
        for executor in (self._small, self._large, self._files):
            executor.shutdown(wait=False, cancel_futures=True)

    def busy(self) -> bool:
        """Returns whether the model is computing or a program is being compiled."""
        return bool(self.model.busy() or self._compiler.busy())

    def compiling(self) -> bool:
        """Returns whether rows wait for a program that is being compiled."""
        return self._batcher is not None and self._batcher.compiling()

    @staticmethod
    async def _run_in(executor: ThreadPoolExecutor, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(executor, work, *arguments)

    async def predict(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles POST /v1/predict."""
        body = BodyReader(self._limits.max_bytes, self._add_bytes)
        try:
            response = await self._respond(scope, receive, body)
        except ClientGone:
            return
        finally:
            self._bytes_in_progress -= body.size
        await (response(scope, receive, send) if body.complete else respond_and_close(response, receive, send))

    async def _respond(self, scope: Scope, receive: Receive, body: BodyReader) -> Response:
        late = f"within {self._limits.timeout:g} seconds"
        try:
            async with asyncio.timeout(self._limits.timeout) as deadline:
                return Response(await self._answer(scope, receive, body, deadline), media_type="application/json")
        except Refusal as refusal:
            return refusal.response
        except Overloaded as error:
            return Refusal(429, str(error), error.seconds).response
        except ModelError as error:
            return Refusal(503, str(error), 1).response
        except TimeoutError:
            if body.complete:
                return Refusal(503, f"there was no answer {late}", self._seconds()).response
            return Refusal(408, f"the body was not there {late}").response
        except asyncio.CancelledError:  # the server shuts down, and its grace period is over
            return Refusal(503, "the service is shutting down", 1).response

    async def _answer(self, scope: Scope, receive: Receive, body: BodyReader, deadline: asyncio.Timeout) -> bytes:
        if self._batcher is None:
            raise Refusal(503, LOADING, 1)
        data = await body.read(scope, receive)
        executor = self._small if len(data) <= SMALL else self._large
        rows, found = await self._run_in(executor, self._read, data)
        parts = [split_request(request) for request in found if isinstance(request, Request)]
        job = self._batcher.submit([*itertools.chain(*parts)], deadline)
        try:
            answers = await self._answers(job, receive)
        finally:
            self._metrics.rows.labels("dropped").inc(self._batcher.cancel(job))
        return await self._run_in(executor, self._write, rows, found, answers)

    async def _answers(self, job: Job, receive: Receive) -> list[dict[str, Any]]:
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait([job.answers, gone], return_when=asyncio.FIRST_COMPLETED)
            if not job.answers.done():
                raise ClientGone
            return job.answers.result()
        finally:
            gone.cancel()

    def _read(self, data: bytes) -> tuple[list[Any], Sequence[Request | ValueError]]:
        """Returns the rows of a body, and for each row its request or its error.

        Raises:
          Refusal: the body is invalid, or it has too many rows or tokens.
        """
        assert self._predictor is not None
        rows = rows_of(data, self._limits.max_rows)
        found = self._predictor.requests(enumerate(rows))
        tokens = sum(self._predictor.cost(request) for request in found if isinstance(request, Request))
        if tokens > self._limits.max_tokens:
            raise Refusal(
                413,
                f"the rows take {tokens:,} tokens of prompts, inputs, labels and answers, the limit is "
                f"{self._limits.max_tokens:,}: send several requests",
            )
        return rows, found

    def _write(
        self, rows: list[Any], requests: Sequence[Request | ValueError], answers: Sequence[dict[str, Any]]
    ) -> bytes:
        """Returns the body of the response: each row's own fields with its answer.

        Raises:
          Refusal: a row is nested too deep to be written as JSON.
        """
        remaining, written = iter(answers), []
        for row, request in zip(rows, requests, strict=True):
            if isinstance(request, Request):
                answer = join_answers(request, [*itertools.islice(remaining, len(split_request(request)))])
            else:
                answer = {"error": str(request)}
            written.append(own_fields(row) | answer)
        errors = sum("error" in answer for answer in written)
        self._metrics.rows.labels("error").inc(errors)
        self._metrics.rows.labels("answered").inc(len(written) - errors)
        try:
            return json.dumps({"rows": written}, ensure_ascii=False).encode(errors="backslashreplace")
        except RecursionError:
            raise Refusal(400, "a row is nested too deep to be written back") from None

    def _add_bytes(self, size: int) -> None:
        """Adds `size` bytes to the size of all bodies in progress.

        Raises:
          Refusal: all bodies in progress together are too large.
        """
        self._bytes_in_progress += size
        if self._bytes_in_progress > BODIES * self._limits.max_bytes:
            raise Refusal(429, "too many large requests are in progress: try again later", self._seconds())

    def _seconds(self) -> int:
        return self._batcher.seconds() if self._batcher else 1

    def _refresh(self, predictor: Predictor, folder: PromptFolder, settled: bool) -> Changes:
        """Updates the bank from the folder, on a thread of its own, so that a slow disk does not delay the model."""
        changes = folder.sync(predictor.bank, settled=settled)
        self._prompts = {
            "prompts": predictor.bank.lengths,
            "broken": {name: self._text(error) for name, error in folder.public_errors.items()},
        }
        return changes

    async def _watch_folder(self, predictor: Predictor, folder: PromptFolder) -> None:
        """Checks the folder every `poll` seconds, and prints what has changed. An error does not stop the service."""
        reported: dict[str, str] = {}
        while True:
            await asyncio.sleep(self._poll)
            before = self._prompts
            try:
                changes = await self._run_in(self._files, self._refresh, predictor, folder, True)
                for what, names in (("added", changes.added), ("removed", changes.removed)):
                    if names:
                        print(f"prompts {what}: {', '.join(names)}", file=sys.stderr)
                for remark in (folder.remarks[name] for name in changes.added if name in folder.remarks):
                    print(remark, file=sys.stderr)
                broken = {name: self._text(error) for name, error in changes.broken.items()}
                for name, message in broken.items():
                    if reported.get(name) != message:
                        print(f"prompt {name} is left out: {message}", file=sys.stderr)
                reported = broken
            except Exception as error:
                public = error.public if isinstance(error, SettingError) else "the folder of prompts cannot be read"
                self._prompts = before | {"folder": " ".join(str(public).split())}
                if self._prompts != before:
                    print(f"prompts: {self._text(error) or type(error).__name__}", file=sys.stderr)

    async def prompts(self, request: HTTPRequest) -> Response:
        """Handles GET /v1/prompts: lengths by name, errors of broken prompts by name, and an error of the folder."""
        if self._predictor is None:
            return Refusal(503, LOADING, 1).response
        base = os.path.basename(self._base.rstrip("/"))
        found = self._prompts or {"prompts": {}, "broken": {}}
        return JSONResponse({"base": base, "fingerprint": self._predictor.fingerprint} | found)

    async def livez(self, request: HTTPRequest) -> Response:
        """Handles GET /livez: 503 only if the service cannot recover, and should be restarted."""
        lost = self.model.busy() > LOST * self._limits.timeout and self._predictor is not None
        ended = self._answering is not None and self._answering.done()
        return JSONResponse({"status": "lost" if lost or ended else "ok"}, 503 if lost or ended else 200)

    async def readyz(self, request: HTTPRequest) -> Response:
        """Handles GET /readyz: 503 while the model loads, and while a model call takes longer than `Limits.timeout`."""
        if self._predictor is None:
            return JSONResponse({"status": "loading"}, 503)
        stuck = self.model.busy() > self._limits.timeout
        return JSONResponse({"status": "stuck" if stuck else "ok"}, 503 if stuck else 200)

    async def openapi(self, request: HTTPRequest) -> Response:
        """Handles GET /openapi.json."""
        return JSONResponse(openapi_document(self._limits.max_rows))

    async def metrics(self, request: HTTPRequest) -> Response:
        """Handles GET /metrics."""
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)


class _Endpoint:
    """Makes `Service.predict` an ASGI application: Starlette would wrap a function and read the body itself."""

    def __init__(self, service: Service):
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._service.predict(scope, receive, send)
