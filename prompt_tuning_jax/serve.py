"""Answers rows over HTTP with one base model and many prompts: `python -m prompt_tuning_jax.serve --prompts=DIR`.

POST /v1/predict takes {"rows": [{"prompt": NAME, "inputs": TEXT}, ...]} with the content type application/json, and
returns the rows with their answers, as `infer` does. GET /v1/prompts lists the prompts, /livez, /readyz and /metrics
return the state of the service, and /openapi.json describes all routes. A prompt that is put into the folder is served
after the folder has been checked twice. Without --api_key_file, anyone who can reach the port can send requests; at
127.0.0.1, only requests for localhost are answered.
"""

import argparse
import asyncio
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prompt_tuning_jax.command_line import Parser
from prompt_tuning_jax.compilation import keep_compiled_programs
from prompt_tuning_jax.flags import flag_errors
from prompt_tuning_jax.inference.folder import PromptFolder
from prompt_tuning_jax.inference.limits import Limits
from prompt_tuning_jax.inference.predictor import Predictor
from prompt_tuning_jax.inference.requests import read_json
from prompt_tuning_jax.inference.warm_up import warm_up
from prompt_tuning_jax.model_flags import add_model_flags, in_flags, load_predictor
from prompt_tuning_jax.settings import Count, NotNegative, Positive, integer
from prompt_tuning_jax.tasks.lines import read_lines

BACKLOG = 2048  # connections that the system keeps until they are opened


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
      ValueError: it is not one of this command's.
    """
    parser = Parser("prompt_tuning_jax.serve", __doc__)
    add_model_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="to listen at; 0.0.0.0 for all")
    parser.add_number("port", integer(0, 65_535), 8000, "0 for a free one, which is printed")
    parser.add_argument("--warm", type=Path, help="rows, as for infer: their programs are compiled before it is ready")
    parser.add_number("wait_ms", NotNegative, 3.0, "that rows wait for others to share their batch")
    parser.add_numbers(
        Limits,
        max_rows="of a request; more are answered with 413",
        max_bytes="of a request's body; 413",
        max_tokens="of a request: of its prompts, inputs, labels and answers; 413",
        max_queue="rows that may wait; 429 with Retry-After",
        timeout="seconds a request may take; 503, or 408 without body",
    )
    parser.add_number("max_connections", Count, 4096, "open at once; at most half of the files it may open")
    parser.add_argument(
        "--api_key_file", "--api-key-file", type=Path, help="a key a line; requests need Authorization: Bearer KEY"
    )
    parser.add_number("poll", Positive, 0.5, "seconds between looks at the folder of prompts")
    arguments = parser.parse_args(argv)
    limits_of(arguments).check()
    if arguments.wait_ms > 1000 * arguments.timeout:
        raise ValueError(f"--wait_ms is {arguments.wait_ms:g}, more than --timeout, {arguments.timeout:g} seconds")
    return arguments


def limits_of(arguments: argparse.Namespace) -> Limits:
    """Returns what a request may ask for."""
    return Limits(**{name: getattr(arguments, name) for name in Limits._fields})


def load(arguments: argparse.Namespace) -> tuple[Predictor, PromptFolder | None]:
    """The predictor, warm."""
    predictor, folder = load_predictor(arguments)
    if arguments.warm:
        print(f"{warm_up(predictor, read_rows(arguments.warm))} batches to warm up", file=sys.stderr)
    return predictor, folder


def read_rows(path: Path) -> list[Any]:
    """Returns the rows of a JSONL file."""
    try:
        return [read_json(line) for line in read_lines(path) if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read --warm={path} ({error}): expected a file of rows, a JSON object a line"
        ) from None


def read_keys(path: Path | None) -> list[str]:
    """Returns the keys of a file, one a line; none without a file.

    Raises:
      ValueError: it cannot be read, or holds no key, or one that no header can hold.
    """
    if path is None:
        return []
    try:
        keys = path.read_text(encoding="ascii").split()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read --api_key_file={path} ({error}): expected a file of keys, one a line") from None
    if not keys:
        raise ValueError(f"--api_key_file={path} holds no key, expected one a line")
    return keys


def hosts_of(listening: socket.socket) -> tuple[str, ...]:
    """Returns the names of this machine if only it can reach the port; else none, which stands for any name."""
    loopback = ipaddress.ip_address(listening.getsockname()[0]).is_loopback
    return ("localhost", "127.0.0.1", "[::1]") if loopback else ()


def listen(host: str, port: int) -> socket.socket:
    """The port, taken.

    Raises:
      ValueError: it cannot be had.
    """
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG
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
    from prompt_tuning_jax.inference.service import Service

    keys = read_keys(arguments.api_key_file)
    if arguments.prompts:
        PromptFolder(arguments.prompts)  # missing: said before anything is loaded
    listening = listen(arguments.host, arguments.port)
    service = Service(
        lambda: load(arguments),
        arguments.base,
        limits_of(arguments),
        wait=arguments.wait_ms / 1000,
        poll=arguments.poll,
        text=in_flags,
        keys=keys,
        hosts=hosts_of(listening),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn takes them, and raises them again once it has shut down
    server = make_server(service.app, arguments.max_connections, service.compiling)
    asyncio.run(serve(service, server, listening))
    if service.busy():  # Python would wait for the model's threads, however long they compute
        sys.stdout.flush()
        os._exit(0)


def make_server(app: Any, max_connections: int = 4096, compiling: Callable[[], bool] = lambda: False) -> Any:
    """Returns uvicorn's server, as quiet as the other commands, and with limits to its connections.

    Args:
      compiling: returns whether requests wait for a program that is being compiled.
    """
    import uvicorn

    from prompt_tuning_jax.inference.connections import connection_limit, protocol_of
    from prompt_tuning_jax.inference.server import Server

    limit = connection_limit(max_connections)
    options = {"log_level": "error", "access_log": False, "ws": "none", "lifespan": "off"}
    # asyncio opens up to `backlog` connections before it looks at the first of them.
    backlog = max(min(limit, BACKLOG // 2) // 4, 1)
    return Server(uvicorn.Config(app, http=protocol_of(limit), backlog=backlog, **options), compiling)


async def serve(service: Any, server: Any, listening: socket.socket) -> None:
    """Answers, from the first moment on, while the base is being loaded, until the server should exit."""
    host, port = listening.getsockname()[:2]

    async def start() -> None:
        try:
            await service.start()
            listening.listen(BACKLOG)  # uvicorn has set it to less
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
