"""Ends uvicorn's server so that every request which the system has accepted is answered."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import uvicorn

GRACE = 10.0  # seconds that a shutdown leaves to the requests in progress; compiling a program does not count
LONGEST = 120.0  # seconds that a shutdown takes at most, compiling included
FIRST = 1.0  # seconds that a shutdown leaves to a new connection until its first request is there
CANCELLED = 1.0  # seconds in which requests are told that they are cancelled
TICK = 0.05  # seconds between looks at what a shutdown waits for


class Server(uvicorn.Server):
    """A server that a first SIGTERM or SIGINT ends after the requests in progress, and a second one at once."""

    def __init__(self, config: uvicorn.Config, compiling: Callable[[], bool]):
        """`compiling` returns whether requests wait for a program that is being compiled."""
        super().__init__(config)
        self._compiling = compiling

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes the port and answers what came before; what takes longer than the limits is cancelled."""
        state, started = self.server_state, time.monotonic()
        await self._close_port(sockets or [])
        # A connection without a request would be reset if its request were on the way.
        await asyncio.sleep(TICK)
        while any(one.cycle is None for one in state.connections) and not self._is_past(started + FIRST):
            await asyncio.sleep(TICK)
        for connection in list(state.connections):
            connection.shutdown()
        compiled = time.monotonic()
        while (state.connections or state.tasks) and not self._is_past(min(compiled + GRACE, started + LONGEST)):
            await asyncio.sleep(TICK)
            if self._compiling():
                compiled = time.monotonic()
        for task in (tasks := list(state.tasks)):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CANCELLED)

    def _is_past(self, end: float) -> bool:
        return self.force_exit or time.monotonic() > end

    async def _close_port(self, sockets: Sequence[socket.socket]) -> None:
        """Closes the listening sockets once every connection is opened that the system has accepted from a client."""
        loop, accepted = asyncio.get_running_loop(), []
        for listening in sockets:
            loop.remove_reader(listening)
        await asyncio.sleep(0)  # asyncio opens what it has accepted, which it cannot do after `close`
        for listening in sockets:
            with contextlib.suppress(OSError):  # there are no more, or too many files are open
                while True:
                    accepted.append(listening.accept()[0])
        for server in self.servers:
            server.close()
        for listening in sockets:
            listening.close()
        for connection in accepted:
            with contextlib.suppress(OSError):  # the client has gone
                connection.setblocking(False)
                await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
