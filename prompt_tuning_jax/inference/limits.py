"""Limits how much one request to the service may ask for, and how long it may take."""

from typing import NamedTuple

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.settings import Count, Positive, check_values


class Limits(NamedTuple):
    """Holds the limits of one request.

    Attributes:
      max_rows: rows per request.
      max_bytes: bytes of a request's body. All requests in progress together may have `service.BODIES` times as many.
      max_queue: rows of all requests that wait for the model.
      timeout: seconds from a request's headers to its answer.
      max_tokens: positions of a request's prompts, inputs, labels and answers. `service.QUEUE` times as many may wait.
    """

    max_rows: Count = 1024
    max_bytes: Count = 4 * 2**20
    max_queue: Count = 8192
    timeout: Positive = 30.0
    max_tokens: Count = 2**19

    def check(self) -> None:
        """Raises SettingError if a limit is invalid, or if a request may have more rows than may wait."""
        check_values(Limits, self._asdict())
        if self.max_rows > self.max_queue:
            raise SettingError(
                Setting("max_rows"), f" is {self.max_rows}, more than ", Setting("max_queue"), f", {self.max_queue}"
            )
