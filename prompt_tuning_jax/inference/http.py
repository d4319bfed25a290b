"""Bodies in and refusals out, for requests of any size and shape."""

import asyncio
import contextlib
import hmac
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import unquote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from prompt_tuning_jax.inference.requests import read_json, shown

JSON = "application/json"
LINGER = 2.0  # seconds that the rest of a refused body is read for


class Refusal(Exception):
    """A request that gets no rows back: its status, and what to say."""

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.headers = status, {}
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    @property
    def response(self) -> Response:
        return JSONResponse({"error": str(self)}, self.status, self.headers)


class ClientGone(Exception):
    """Nobody is there to be answered."""


class Door:
    """Lets requests pass to an application, or refuses them by their headers alone."""

    def __init__(self, app: ASGIApp, *, keys: Collection[str], hosts: Collection[str], open_to_all: Collection[str]):
        """Checks nothing yet.

        Args:
          keys: "Authorization: Bearer KEY" must have one of these; if there are none, nobody is asked for one.
          hosts: a request must be for one of these, whatever the port: otherwise a web page whose name leads to this
            machine could ask with its visitor's browser. If there are none, any host will do.
          open_to_all: the paths that need no key.
        """
        self._app, self._keys, self._hosts, self._open = app, [key.encode() for key in keys], hosts, open_to_all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope["path"], dict(scope["headers"]))
        await (self._app(scope, receive, send) if refusal is None else part(refusal.response, receive, send))

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> Refusal | None:
        if b"content-length" in headers and b"transfer-encoding" in headers:
            return Refusal(400, "both Content-Length and Transfer-Encoding are given, expected one of them")
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._hosts and host.rpartition(":")[0] not in self._hosts and host not in self._hosts:
            return Refusal(421, f"the request is for the host {shown(host)}, expected {' or '.join(self._hosts)}")
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        known = any(hmac.compare_digest(given.strip(), key) for key in self._keys)
        if self._keys and path not in self._open and not (known and scheme.lower() == b"bearer"):
            return Refusal(401, "expected the header Authorization: Bearer KEY, with a key of this service")
        return None


def origin_form(app: ASGIApp) -> ASGIApp:
    """Returns an application that takes `GET http://host/path` as `GET /path` to that host (RFC 9112, 3.2.2)."""

    async def taken(scope: Scope, receive: Receive, send: Send) -> None:
        raw = scope["raw_path"]
        if raw[:7].lower() == b"http://" or raw[:8].lower() == b"https://":
            host, slash, path = raw.partition(b"//")[2].partition(b"/")
            headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
            raw = slash + path or b"/"
            form = {"raw_path": raw, "path": unquote(raw.decode("ascii")), "headers": [(b"host", host), *headers]}
            scope = {**scope, **form}
        await app(scope, receive, send)

    return taken


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
          Refusal: it is no JSON by its content type, or too large, which may be known before a byte is read.
          ClientGone: it ended early.
        """
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").decode("latin-1")
        if kind.partition(";")[0].strip().lower() != JSON:  # a web page may send other types to any host, unasked
            raise Refusal(415, f"the content type is {shown(kind) if kind else 'missing'}, expected {JSON}")
        announced = headers.get(b"content-length", b"0")
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
        found = read_json(data.decode())
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8 (byte {error.start}), expected JSON") from None
    except ValueError as error:
        why = " ".join(str(error).split())
        raise Refusal(400, f'the body is not JSON ({why}), expected {{"rows": [...]}}') from None
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list):
        raise Refusal(400, f'found {shown(found)}, expected {{"rows": [...]}}')
    if len(rows) > max_rows:
        raise Refusal(413, f"there are {len(rows):,} rows, the limit is {max_rows:,}: send several requests")
    return rows


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
