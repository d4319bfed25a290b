"""Counts and times the service's requests for Prometheus."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_GONE = 499  # nginx's status for a client that disconnected before the response, which has no status of its own
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Holds the service's counters and histograms, in a registry of their own.

    Attributes:
      rows: counts rows that were "answered", that got an "error", and that were "dropped" from the queue because their
        request had ended.
      windows: histogram of the number of rows that the model was given at once.
    """

    def __init__(self, paths: tuple[str, ...], waiting: Callable[[], int]):
        """Makes the metrics.

        Args:
          paths: the paths that are counted by name. Any other path counts as "other", so that a client cannot create
            new time series. Requests to the first path are timed.
          waiting: returns the number of rows that wait for the model.
        """
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._paths, self._timed = paths, paths[0]
        self._requests = self._make(Counter, "requests", "Requests by path and status.", ["path", "status"])
        self._seconds = self._make(Histogram, "answer_seconds", "From headers to rows answered.", buckets=SECONDS)
        self.rows = self._make(Counter, "rows", "Rows by what became of them.", ["outcome"])
        self.windows = self._make(Histogram, "batch_rows", "Rows given to the model at once.", buckets=ROWS)
        self._make(Gauge, "queue_rows", "Rows that wait for the model.").set_function(waiting)

    def _make(self, kind: type, name: str, text: str, labels: list[str] | None = None, **options: object):
        return kind(f"prompt_tuning_{name}", text, labels or [], registry=self.registry, **options)

    def counting(self, app: ASGIApp) -> ASGIApp:
        """Returns an application that counts the requests to `app`."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            status, started = CLIENT_GONE, time.monotonic()
            path = scope["path"] if scope["path"] in self._paths else "other"

            async def send_and_note_status(message: Message) -> None:
                nonlocal status
                status = message.get("status", status)
                await send(message)

            try:
                await app(scope, receive, send_and_note_status)
            finally:
                self._requests.labels(path, str(status)).inc()
                if path == self._timed and status == 200:
                    self._seconds.observe(time.monotonic() - started)

        return counted
