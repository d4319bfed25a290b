"""Bodies in and refusals out, for requests of any size and shape."""

import asyncio
import contextlib
import json
import math
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from prompt_tuning_jax.inference.requests import shown

LINGER = 2.0  # seconds that the rest of a refused body is read for


class Refusal(Exception):
    """A request that gets no rows back: its status, and what to say."""

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after

    @property
    def response(self) -> Response:
        headers = {"retry-after": str(self.retry_after)} if self.retry_after is not None else None
        return JSONResponse({"error": str(self)}, self.status, headers)


class ClientGone(Exception):
    """Nobody is there to be answered."""


class Body:
    """The body of a request, as it comes.

    Attributes:
      size: bytes so far.
      whole: whether all of it is read.
    """

    def __init__(self, max_bytes: int, hold: Callable[[int], None]):
        """`hold` is told of every piece, and may refuse it."""
        self.size, self.whole = 0, False
        self._max_bytes, self._hold = max_bytes, hold

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """All of it.

        Raises:
          Refusal: it is too large, which may be known before a byte is read.
          ClientGone: it ended early.
        """
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced[:20]) > self._max_bytes:
            self._too_large()
        pieces = []
        while not self.whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            piece = message.get("body", b"")
            self.size += len(piece)
            self._hold(len(piece))
            if self.size > self._max_bytes:
                self._too_large()
            pieces.append(piece)
            self.whole = not message.get("more_body", False)
        return b"".join(pieces)

    def _too_large(self) -> None:
        raise Refusal(413, f"the body is over the limit of {self._max_bytes:,} bytes: send several requests")


def rows_of(data: bytes, max_rows: int) -> list[Any]:
    """The rows of a body.

    Raises:
      Refusal: it has none, or too many.
    """
    try:
        found = json.loads(data.decode(), parse_constant=_finite, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8 (byte {error.start}), expected JSON") from None
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise Refusal(400, f'the body is not JSON ({why}), expected {{"rows": [...]}}') from None
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list):
        raise Refusal(400, f'found {shown(found)}, expected {{"rows": [...]}}')
    if len(rows) > max_rows:
        raise Refusal(413, f"there are {len(rows):,} rows, the limit is {max_rows:,}: send several requests")
    return rows


def _finite(text: str) -> float:
    """A number; Python would also read NaN and 1e999, which JSON cannot write back."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


async def disconnected(receive: Receive) -> None:
    """Returns when a client whose body was read has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def part(response: Response, receive: Receive, send: Send) -> None:
    """Sends a response before the request's body is whole, and ends the connection.

    Closed at once, a connection is reset where the client still sends, and the response may be lost. So what comes is
    read and forgotten for a while.
    """
    headers = [*response.raw_headers, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while (await receive()).get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def explain(request: Request, error: Exception) -> Response:
    """No such path, or no such method there, in the form of every other error."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {shown(request.url.path)}"
    return JSONResponse({"error": f"{error.detail}: {what}"}, error.status_code, error.headers)
