"""Closes connections whose clients send no request or do not read the answer; uvicorn would wait for them forever."""

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS = 10.0  # seconds that a connection may wait for all headers of a request
UNREAD = 60.0  # seconds that a client may leave an answer unread


def connection_limit(wanted: int) -> int:
    """Returns how many connections may be open: `wanted`, but at most half of the process's limit of open files."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if files == resource.RLIM_INFINITY else min(wanted, max(files // 2, 1))


def protocol_of(limit: int) -> type[H11Protocol]:
    """Returns the protocol class for uvicorn, whose instances are connections.

    Args:
      limit: the largest number of open connections. One more connection closes the one that has waited longest for a
        request; if all others have a request in progress, the new one itself is closed.
    """

    class Protocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.timer: asyncio.TimerHandle | None = None
            self.unread: asyncio.TimerHandle | None = None
            self._watch()
            others: list[Any] = [other for other in self.connections if not other.transport.is_closing()]
            if len(others) > limit:
                idle = [other for other in others if other.timer]
                min(idle, key=lambda other: other.timer.when()).transport.close()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop()
            if self.unread is not None:
                self.unread.cancel()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.unread = self.loop.call_later(UNREAD, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.unread is not None:
                self.unread.cancel()

        def _watch(self) -> None:
            """Starts the timer if no request is in progress; stops it otherwise."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()
            elif self.timer is None:
                self.timer = self.loop.call_later(HEADERS, self.transport.close)

        def _stop(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    return Protocol
