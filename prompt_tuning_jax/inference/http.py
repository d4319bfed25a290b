"""Reads request bodies, checks headers, and answers invalid requests of any size with an error."""

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
LINGER = 2.0  # seconds for which the rest of a refused body is read


class Refusal(Exception):
    """Says why a request is refused, with the status of the response."""

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
    """Says that the client has closed the connection."""


class HeaderCheck:
    """Passes requests to an application, or refuses them by their headers alone."""

    def __init__(self, app: ASGIApp, *, keys: Collection[str], hosts: Collection[str], open_to_all: Collection[str]):
        """Checks nothing yet.

        Args:
          keys: the accepted API keys, which requests send as "Authorization: Bearer KEY"; if empty, no key is needed.
          hosts: the accepted hosts of the Host header, with any port; if empty, any host is accepted. A list of hosts
            prevents DNS rebinding, in which the domain of a web page resolves to this machine, so that the visitor's
            browser lets the page send requests to the service.
          open_to_all: the paths that need no key.
        """
        self._app, self._keys, self._hosts, self._open = app, [key.encode() for key in keys], hosts, open_to_all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope["path"], dict(scope["headers"]))
        await (
            self._app(scope, receive, send) if refusal is None else respond_and_close(refusal.response, receive, send)
        )

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
    """Returns an application that treats `GET http://host/path` as `GET /path` for that host (RFC 9112, 3.2.2)."""

    async def with_path(scope: Scope, receive: Receive, send: Send) -> None:
        raw = scope["raw_path"]
        if raw[:7].lower() == b"http://" or raw[:8].lower() == b"https://":
            host, slash, path = raw.partition(b"//")[2].partition(b"/")
            headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
            raw = slash + path or b"/"
            form = {"raw_path": raw, "path": unquote(raw.decode("ascii")), "headers": [(b"host", host), *headers]}
            scope = {**scope, **form}
        await app(scope, receive, send)

    return with_path


class BodyReader:
    """Reads the body of one request.

    Attributes:
      size: the number of bytes read so far.
      complete: whether the whole body has been read.
    """

    def __init__(self, max_bytes: int, count_bytes: Callable[[int], None]):
        """Reads nothing yet.

        Args:
          max_bytes: the largest size of the body.
          count_bytes: called with the size of each chunk of the body; it may raise `Refusal`.
        """
        self.size, self.complete = 0, False
        self._max_bytes, self._count_bytes = max_bytes, count_bytes

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """Returns the whole body.

        Raises:
          Refusal: the content type is not JSON, or the body is too large: Content-Length is checked before any byte is
            read.
          ClientGone: the client disconnected before the end of the body.
        """
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").decode("latin-1")
        # A web page may send other content types to any host without a CORS preflight.
        if kind.partition(";")[0].strip().lower() != JSON:
            raise Refusal(415, f"the content type is {shown(kind) if kind else 'missing'}, expected {JSON}")
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced[:20]) > self._max_bytes:
            self._too_large()
        chunks = []
        while not self.complete:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            self.size += len(chunk)
            self._count_bytes(len(chunk))
            if self.size > self._max_bytes:
                self._too_large()
            chunks.append(chunk)
            self.complete = not message.get("more_body", False)
        return b"".join(chunks)

    def _too_large(self) -> None:
        raise Refusal(413, f"the body is over the limit of {self._max_bytes:,} bytes: send several requests")


def rows_of(data: bytes, max_rows: int) -> list[Any]:
    """Returns the rows of a request's body.

    Raises:
      Refusal: the body is not JSON, has no list of rows, or has more than `max_rows`.
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
    """Returns when the client disconnects. The body of its request must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def respond_and_close(response: Response, receive: Receive, send: Send) -> None:
    """Sends a response before the whole request body has been read, then closes the connection.

    If a connection is closed while the client still sends, it is reset, and the client may lose the response. So the
    rest of the body is read and discarded first, for at most `LINGER` seconds.
    """
    headers = [*response.raw_headers, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while (await receive()).get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def error_response(request: Request, error: Exception) -> Response:
    """Returns the response for an unknown path or method, in the same form as every other error."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {shown(request.url.path)}"
    return JSONResponse({"error": f"{error.detail}: {what}"}, error.status_code, error.headers)
