"""Answers rows over HTTP with one base and many prompts: `python -m prompt_tuning_jax.serve --prompts=DIR`.

POST /v1/predict takes {"rows": [{"prompt": NAME, "inputs": TEXT}, ...]} and gives the rows back with their answers, as
`infer` does. GET /v1/prompts, /healthz and /metrics say how it stands. Prompts put into the folder are served within
--poll seconds.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from prompt_tuning_jax.compilation import keep_compiled_programs
from prompt_tuning_jax.flags import Parser, flag_errors
from prompt_tuning_jax.inference.folder import PromptFolder
from prompt_tuning_jax.inference.predictor import Predictor
from prompt_tuning_jax.inference.warm_up import warm_up
from prompt_tuning_jax.model_flags import add_model_flags, in_flags, load_predictor

GRACE = 10  # seconds that a shutdown leaves to the requests in progress


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
      ValueError: it is not one of this command's.
    """
    parser = Parser("prompt_tuning_jax.serve", __doc__)
    add_model_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="to listen at; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8000, help="0 for a free one, which is printed")
    parser.add_argument("--warm", type=Path, help="rows, as for infer: their programs are compiled before it is ready")
    parser.add_argument("--wait_ms", type=float, default=3.0, help="that rows wait for others to share their batch")
    parser.add_argument("--max_rows", type=int, default=1024, help="of a request; more are answered with 413")
    parser.add_argument("--max_bytes", type=int, default=4 * 2**20, help="of a request's body; 413")
    parser.add_argument("--max_queue", type=int, default=8192, help="rows that may wait; 429 with Retry-After")
    parser.add_argument(
        "--timeout", type=float, default=30.0, help="seconds a request may take; 503, or 408 without body"
    )
    parser.add_argument("--poll", type=float, default=1.0, help="seconds between looks at the folder of prompts")
    arguments = parser.parse_args(argv)
    for name in ("max_rows", "max_bytes", "max_queue", "timeout", "poll"):
        if not getattr(arguments, name) > 0:
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected above 0")
    if not 0 <= arguments.wait_ms <= 1000 * arguments.timeout:
        raise ValueError(f"--wait_ms is {arguments.wait_ms:g}, expected 0 to --timeout")
    if arguments.max_rows > arguments.max_queue:
        raise ValueError(f"--max_rows is {arguments.max_rows}, more than --max_queue, {arguments.max_queue}")
    return arguments


def load(arguments: argparse.Namespace) -> tuple[Predictor, PromptFolder | None]:
    """The predictor, warm."""
    predictor, folder = load_predictor(arguments)
    if arguments.warm:
        print(f"{warm_up(predictor, read_rows(arguments.warm))} batches to warm up", file=sys.stderr)
    return predictor, folder


def read_rows(path: Path) -> list[Any]:
    """The rows of a JSONL file."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read --warm={path} ({error}): expected a file of rows, a JSON object a line"
        ) from None


def listen(host: str, port: int) -> socket.socket:
    """The port, taken.

    Raises:
      ValueError: it cannot be had.
    """
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen at {host}, port {port} ({why}): set --host and --port") from None


def main() -> None:
    keep_compiled_programs()
    with flag_errors():
        try:
            run(parse(sys.argv[1:]))
        except ModuleNotFoundError as error:
            raise ValueError(f"no module {error.name}: pip install 'prompt_tuning_jax[serve]'") from None


def run(arguments: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT."""
    from prompt_tuning_jax.inference.service import Limits, Service

    limits = Limits(arguments.max_rows, arguments.max_bytes, arguments.max_queue, arguments.timeout)
    if arguments.prompts:
        PromptFolder(arguments.prompts)  # missing: said before anything is loaded
    listening = listen(arguments.host, arguments.port)
    service = Service(
        lambda: load(arguments),
        arguments.base,
        limits,
        wait=arguments.wait_ms / 1000,
        poll=arguments.poll,
        text=in_flags,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn takes them, and raises them again once it has shut down
    asyncio.run(serve(service, make_server(service.app), listening))
    if service.model.busy():  # Python would wait for the model's thread, however long it computes
        sys.stdout.flush()
        os._exit(0)


def make_server(app: Any) -> Any:
    """uvicorn, as quiet as the other commands."""
    import uvicorn

    quiet = {"log_level": "error", "access_log": False}
    return uvicorn.Server(
        uvicorn.Config(app, http="h11", ws="none", lifespan="off", timeout_graceful_shutdown=GRACE, **quiet)
    )


async def serve(service: Any, server: Any, listening: socket.socket) -> None:
    """Answers, from the first moment on, while the base is being loaded, until the server should exit."""
    host, port = listening.getsockname()[:2]

    async def start() -> None:
        try:
            await service.start()
        except BaseException:
            server.should_exit = True
            raise
        print(f"serving at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    starting = asyncio.create_task(start())
    await server.serve([listening])
    await service.stop()
    if starting.done():
        starting.result()
    starting.cancel()


if __name__ == "__main__":
    main()
