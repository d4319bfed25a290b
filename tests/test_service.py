"""Tests the service over real sockets: its answers are the predictor's, and no client can break it for others."""

import asyncio
import contextlib
import copy
import http.client
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from tiny import CONFIG, ROOT

from prompt_tuning_jax.inference import connections as connections_module
from prompt_tuning_jax.inference import engine
from prompt_tuning_jax.inference import http as http_module
from prompt_tuning_jax.inference import predictor as predictor_module
from prompt_tuning_jax.inference import requests as requests_module
from prompt_tuning_jax.inference import server as server_module
from prompt_tuning_jax.inference import service as service_module
from prompt_tuning_jax.inference.batcher import Batcher, ModelThread, Overloaded
from prompt_tuning_jax.inference.folder import PromptFolder
from prompt_tuning_jax.inference.predictor import Predictor
from prompt_tuning_jax.inference.requests import Request
from prompt_tuning_jax.inference.service import Limits, Service
from prompt_tuning_jax.inference.warm_up import sizes, warm_up
from prompt_tuning_jax.serve import hosts_of, listen, make_server, parse, read_keys, read_rows, serve

JSON = {"content-type": "application/json"}
GREEDY = {"prompt": "p0", "inputs": "the plot was a treasure"}
RANKED = {"prompt": "p1", "inputs": "the plot was a stinker", "labels": ["negative", "positive"]}


LABELS = [f"{first} {second}" for first in "abcdef" for second in "abcde"]


def write_prompt(folder, name, length=3, seed=0, width=CONFIG.emb_dim):
    np.save(folder / f"{name}.npy", np.random.default_rng(seed).normal(0, 0.5, (length, width)).astype(np.float32))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for number in range(3):
        write_prompt(folder, f"p{number}", length=1 + 2 * number, seed=number)
    return folder


@pytest.fixture(scope="module")
def predictor(tiny, prompts):
    """Returns a predictor whose programs are compiled, so that rows of both kinds run on the model's thread."""
    predictor = Predictor.load(str(tiny.base), prompts, input_length=16, max_new_tokens=4, batch_size=2)
    warm_up(predictor, [GREEDY, RANKED])
    return predictor


class Served(NamedTuple):
    """Holds a service that runs in a thread, and sends it requests."""

    port: int
    service: Service

    def ask(
        self, body=None, path="/v1/predict", method="POST", headers=None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, JSON if headers is None else headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def predict(self, rows) -> tuple[int, dict]:
        status, _, body = self.ask(json.dumps({"rows": rows}))
        return status, json.loads(body)

    def get(self, path) -> tuple[int, dict]:
        status, _, body = self.ask(path=path, method="GET")
        return status, json.loads(body)

    def metric(self, name) -> float:
        lines = self.ask(path="/metrics", method="GET")[2].decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))

    def send(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(data)
        return connection


@contextlib.contextmanager
def serving(predictor, folder=None, wait=0.001, door=None, connections=4096, **limits) -> Iterator[Served]:
    options = {"wait": wait, "poll": 0.05} | (door or {})
    service = Service(lambda: (predictor, folder), "bases/tiny", Limits(**limits), **options)
    server, listening = make_server(service.app, connections), listen("127.0.0.1", 0)
    served = Served(listening.getsockname()[1], service)
    thread = threading.Thread(target=lambda: asyncio.run(serve(service, server, listening)))
    thread.start()
    try:
        until(lambda: served.get("/healthz")[0] == 200)
        yield served
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def until(true, seconds=30) -> None:
    """Waits until `true()` is true; fails after `seconds`."""
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)


class Gate:
    """Lets a predictor compute only while the gate is open, and records what was computed."""

    def __init__(self, predictor):
        self.predictor = copy.copy(predictor)
        self.predictor.answer = self
        self.open, self.windows, self._answer = threading.Event(), [], predictor.answer

    def __call__(self, requests):
        self.windows.append([request.seed for request in requests])  # by default, a row's index in its request
        assert self.open.wait(60)
        return self._answer(requests)


@pytest.fixture(scope="module")
def served(predictor):
    with serving(predictor, max_rows=100, max_bytes=100_000, timeout=120) as served:
        yield served


def head(length, *lines) -> bytes:
    first = ["POST /v1/predict HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*first, *lines, "", ""]).encode()


def same(found, expected) -> bool:
    """Returns whether two scores are equal up to rounding, because batches of another size round differently.

    A score is a sum over 4 tokens of differences of float32 logits near 10, which have steps of 1e-6. So the absolute
    error does not depend on the score.
    """
    if isinstance(expected, float):
        return found == pytest.approx(expected, rel=2e-5, abs=1e-5)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)
    return found == expected


def test_answers_are_the_predictors(served, predictor):
    """Sixteen clients at the same time, whose rows share batches. A row's seed depends on its index in its request."""
    kinds = [
        GREEDY,
        RANKED,
        GREEDY | {"prompt": None},
        GREEDY | {"decode": "sample", "temperature": 2.0},
        GREEDY | {"inputs": "a joy " * 40},
        GREEDY | {"prompt": "p00"},
        GREEDY | {"inputs": " "},
        GREEDY | {"inputs": "half \ud83d of it"},
        GREEDY | {"note": "\udc80 kept"},
        "no row",
    ]
    asked = [[kinds[(first + n) % len(kinds)] for n in range(1 + first)] for first in range(16)]
    expected = [predictor.answer_rows([*enumerate(rows)]) for rows in asked]
    with ThreadPoolExecutor(16) as clients:
        found = [*clients.map(served.predict, asked)]
    assert [status for status, _ in found] == [200] * 16
    pairs = [
        pair
        for (_, answer), rows in zip(found, expected, strict=True)
        for pair in zip(answer["rows"], rows, strict=True)
    ]
    assert not [pair for pair in pairs if not same(*pair)]
    answers = dict(zip(map(str, kinds), predictor.answer_rows([*enumerate(kinds)]), strict=True))
    assert answers[str(kinds[4])]["cut"] is True
    assert "did you mean p0" in answers[str(kinds[5])]["error"]
    assert len({row["prediction"] for rows in expected for row in rows if row.get("decode") == "sample"}) > 3


BAD = {
    "not JSON": (b'{"rows": [', 400, "is not JSON"),
    "nothing": (b"", 400, "is not JSON"),
    "not UTF-8": (b'{"rows": ["\xff"]}', 400, "is not UTF-8 (byte 11)"),
    "UTF-16": ('{"rows": []}'.encode("utf-16"), 400, "is not UTF-8"),
    "NaN": (b'{"rows": [NaN]}', 400, "NaN is not a finite number"),
    "infinite": (b'{"rows": [1e999]}', 400, "1e999 is not a finite number"),
    "digits": (b"9" * 5000, 400, "is not JSON"),
    "nested": (b"[" * 50_000, 400, "is not JSON"),
    "no object": (b"[1, 2]", 400, 'found [1, 2], expected {"rows": [...]}'),
    "no rows": (b'{"row": []}', 400, "expected"),
    "rows are none": (b'{"rows": {"a": 1}}', 400, "expected"),
    "many rows": (json.dumps({"rows": [0] * 10_000}).encode(), 413, "there are 10,000 rows, the limit is 100"),
    "many bytes": (b" " * 100_001, 413, "over the limit of 100,000 bytes"),
}


@pytest.mark.parametrize(("body", "expected", "message"), BAD.values(), ids=BAD)
def test_what_is_no_request_is_said_in_one_line(served, body, expected, message):
    status, _, answer = served.ask(body)
    error = json.loads(answer)["error"]
    assert status == expected and message in error and "\n" not in error and len(error) < 300


def test_rows_are_answered_as_deep_as_json_reads_them(served):
    """Python reads some rows that are nested too deep for it to write: they get an answer or one line, never a 500."""
    for depth in (100, 400, 900, 980, 990, 1000):
        status, _, _ = served.ask('{"rows": [' + "[" * depth + "]" * depth + "]}")
        assert status in (200, 400)
        status, answer = served.predict([GREEDY | {"note": "?"}])
        assert status == 200 and "prediction" in answer["rows"][0]


FIELDS = ["prompt", "inputs", "labels", "decode", "temperature", "top_k", "top_p", "seed"]
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -1, 2**32, 2**64])
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(["p0", "greedy", "sample", "beam", "a", "\ud800", "\x00"])
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
near_rows = st.builds(
    lambda row, more: row | more,
    st.sampled_from([{}, GREEDY, RANKED, GREEDY | {"decode": "sample"}]),
    st.dictionaries(st.sampled_from(FIELDS), values, max_size=2),
)
bodies = (
    st.lists(near_rows | values, max_size=5).map(lambda rows: json.dumps({"rows": rows}).encode())
    | values.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=200)
)
PATHS = ["/v1/predict", "/v1/prompts", "/healthz", "/metrics", "/", "/v1/predict/", "//", "/%ff", "/v1/predict?a=%00"]
names = st.sampled_from(
    ["accept", "content-type", "content-encoding", "expect", "upgrade", "cookie", "range", "host", "te"]
)
headers = st.lists(
    st.tuples(names, st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)), max_size=4
)


@hypothesis.settings(max_examples=200)
@hypothesis.given(
    method=st.sampled_from(["POST"] * 6 + ["GET", "HEAD", "PUT", "OPTIONS", "BREW"]),
    path=st.sampled_from(["/v1/predict"] * 9 + PATHS) | st.text(st.characters(min_codepoint=33, max_codepoint=126)),
    more=headers,
    body=bodies,
)
def test_no_request_is_answered_with_a_500(served, method, path, more, body):
    lines = [
        f"{method} {path} HTTP/1.1",
        f"content-length: {len(body)}",
        "content-type: application/json",
        "connection: close",
        *(": ".join(x) for x in more),
    ]
    with served.send("\r\n".join([*lines, "", ""]).encode() + body) as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status in (200, 400, 404, 405, 415)
    if status == 200 and method == "POST":
        asked, rows = json.loads(body)["rows"], json.loads(answer)["rows"]
        assert len(rows) == len(asked) and all("prediction" in row or "error" in row for row in rows)
    if b"application/json" in head and status != 200 and method != "HEAD":
        assert "\n" not in json.loads(answer)["error"]


def test_a_large_body_is_refused_without_being_read(served):
    """With Content-Length before its first byte; in chunks once it is over the limit. The client gets the reason."""
    with served.send(head(10**12)) as connection:
        assert b" 413 " in connection.recv(1000)
    chunked = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    chunked += b"transfer-encoding: chunked\r\n\r\n"
    with served.send(chunked) as connection:
        for _ in range(100):  # what is sent after the refusal is read and discarded
            connection.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
        assert b" 413 " in connection.recv(1000)
    assert served.service._bytes_in_progress == 0


def test_too_many_rows_are_turned_away_and_told_when_to_come_back(predictor):
    gate = Gate(predictor)
    gate.open.set()
    with serving(gate.predictor, max_rows=20, max_queue=20) as served, ThreadPoolExecutor(8) as clients:
        assert served.predict([GREEDY] * 4)[0] == 200  # measures the rate, which Retry-After needs
        gate.open.clear()
        first = clients.submit(served.predict, [GREEDY])
        until(lambda: len(gate.windows) == 2)
        second = clients.submit(served.predict, [GREEDY] * 15)
        until(lambda: served.metric("prompt_tuning_queue_rows") == 15)
        status, headers, body = served.ask(json.dumps({"rows": [GREEDY] * 6}))
        assert status == 429 and int(headers["retry-after"]) >= 1
        assert "15 rows wait already" in json.loads(body)["error"]
        third = clients.submit(served.predict, [GREEDY] * 5)  # these fit
        until(lambda: served.metric("prompt_tuning_queue_rows") == 20)
        gate.open.set()
        assert [task.result()[0] for task in (first, second, third)] == [200, 200, 200]


def test_bodies_in_progress_are_bounded_together(predictor):
    gate = Gate(predictor)
    large = json.dumps({"rows": [GREEDY | {"note": "x" * 9_900}]})
    with serving(gate.predictor, max_bytes=10_100) as served, ThreadPoolExecutor(20) as clients:
        asked = [clients.submit(served.ask, large) for _ in range(20)]
        until(lambda: sum(task.done() for task in asked) == 4)  # 16 bodies are in progress
        gate.open.set()
        assert sorted(task.result()[0] for task in asked) == [200] * 16 + [429] * 4
        assert served.ask(large)[0] == 200


def test_rows_of_a_client_that_went_away_are_not_computed(predictor):
    gate = Gate(predictor)
    with serving(gate.predictor) as served, ThreadPoolExecutor(1) as clients:
        first = clients.submit(served.predict, [GREEDY])
        until(lambda: len(gate.windows) == 1)
        body = json.dumps({"rows": [GREEDY] * 7}).encode()
        with served.send(head(len(body)) + body):
            until(lambda: served.metric("prompt_tuning_queue_rows") == 7)
        until(lambda: served.metric("prompt_tuning_queue_rows") == 0)
        with served.send(head(len(body)) + body[:20]):  # another client disconnects in the middle of its body
            until(lambda: served.service._bytes_in_progress > 20)
        gate.open.set()
        assert first.result()[0] == 200
        assert served.predict([GREEDY] * 2)[0] == 200
        assert gate.windows == [[0], [0, 1]]
        assert served.metric('prompt_tuning_rows_total{outcome="dropped"}') == 7
        assert served.metric('prompt_tuning_requests_total{path="/v1/predict",status="499"}') == 2
        assert served.service._bytes_in_progress == 0


def test_what_takes_too_long_is_given_up(predictor):
    """503 if the answer is late, 408 if the body is late; the health check fails only while the model is stuck."""
    gate = Gate(predictor)
    with serving(gate.predictor, timeout=0.5) as served:
        started = time.monotonic()
        status, headers, body = served.ask(json.dumps({"rows": [GREEDY]}))
        assert status == 503 and "no answer within 0.5 seconds" in json.loads(body)["error"] and headers["retry-after"]
        assert time.monotonic() - started < 5
        until(lambda: served.get("/healthz") == (503, {"status": "stuck"}))
        gate.open.set()
        until(lambda: served.get("/healthz") == (200, {"status": "ok"}))
        with served.send(head(100) + b'{"rows"') as connection:
            for _ in range(100):  # a byte now and then does not extend the time for the body
                time.sleep(0.02)
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b" " if _ < 40 else b"")
            answer = connection.recv(1000)
        assert b" 408 " in answer and b"the body was not there within 0.5 seconds" in answer


def test_a_model_that_fails_fails_one_window(predictor):
    broken = copy.copy(predictor)

    def answer(requests):
        if len(requests) > 2:
            raise MemoryError("out of\nmemory")
        return predictor.answer(requests)

    broken.answer = answer
    with serving(broken) as served:
        status, found = served.predict([GREEDY] * 3)
        assert status == 503 and found["error"] == "the model failed (MemoryError: out of memory)"
        assert served.predict([GREEDY])[0] == 200
        assert served.metric("prompt_tuning_queue_rows") == 0


def test_a_request_that_would_take_too_long_is_refused(predictor):
    """The limit is on rows x labels x tokens; the rows and the bytes of the request are within their limits."""
    rows = [RANKED | {"labels": [f"{'the plot ' * 20}{label}" for label in LABELS]}] * 8
    with serving(predictor, max_tokens=10_000) as served:
        status, found = served.predict(rows)
        assert status == 413 and "the rows take" in found["error"] and "the limit is 10,000" in found["error"]
        assert served.predict([GREEDY])[0] == 200


def test_a_row_of_many_labels_is_ranked_in_parts(predictor, monkeypatch):
    monkeypatch.setattr(predictor_module, "PASS", 16)
    rows = [RANKED | {"labels": LABELS}, RANKED, RANKED | {"prompt": "p00"}]
    seen = Gate(predictor)
    seen.open.set()
    with serving(seen.predictor, timeout=120) as served:
        status, found = served.predict(rows)
    assert status == 200 and sum(map(len, seen.windows)) > 5
    assert all(map(same, found["rows"], predictor.answer_rows([*enumerate(rows)])))


def test_rows_that_wait_for_a_program_hold_nobody_up(predictor):
    """Rows of a new shape are computed on another thread, and compiling does not count for the client's timeout."""
    beam, warm = GREEDY | {"decode": "beam"}, copy.copy(predictor)
    compiled, begun, compute = threading.Event(), threading.Event(), predictor.answer

    def answer(requests):
        if requests[0].method == "beam":
            begun.set()
            assert compiled.wait(60)
        return compute(requests)

    warm.answer, warm._compiled = answer, set(predictor._compiled)
    with serving(warm, timeout=2) as served, ThreadPoolExecutor(2) as clients:
        cold = clients.submit(served.predict, [beam, GREEDY])
        assert begun.wait(30)
        started = time.monotonic()
        while time.monotonic() < started + 3:
            assert served.predict([GREEDY])[0] == 200
        assert not cold.done() and served.get("/readyz")[0] == 200
        waiting = served.send(head(len(body := json.dumps({"rows": [beam] * 3}).encode())) + body)
        until(lambda: served.metric("prompt_tuning_queue_rows") == 3)
        waiting.close()  # its rows are dropped before they are computed
        until(lambda: served.metric("prompt_tuning_queue_rows") == 0)
        compiled.set()
        status, found = cold.result()
        assert status == 200 and all("prediction" in row for row in found["rows"])


def test_small_requests_are_read_beside_large_ones(predictor):
    reading = threading.Event()
    with serving(predictor) as served, ThreadPoolExecutor(1) as clients:
        served.service._large.submit(reading.wait, 60)
        large = clients.submit(served.predict, [GREEDY | {"note": "x" * 100_000}])
        assert served.predict([GREEDY])[0] == 200 and not large.done()
        reading.set()
        assert large.result()[0] == 200


def test_connections_without_a_request_are_closed(predictor, monkeypatch):
    """They are closed after a while; if there are too many, the oldest is closed at once."""
    monkeypatch.setattr(connections_module, "connection_limit", lambda wanted: 20)
    monkeypatch.setattr(connections_module, "HEADERS", 1.0)

    def closed(connection):
        connection.settimeout(0.01)
        try:
            return connection.recv(1) == b""
        except TimeoutError:
            return False
        except ConnectionResetError:
            return True

    with serving(predictor) as served:
        idle = [served.send(data) for data in (b"", b"POST /v1/pre", b"POST /v1/predict HTTP/1.1\r\nhost: x\r\n")]
        kept = served.send(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in kept.recv(1000)
        kept.sendall(b"GET /li")
        until(lambda: all(map(closed, [*idle, kept])), 10)
        many = [served.send(b"POST /v1/pre") for _ in range(60)]
        assert served.predict([GREEDY])[0] == 200
        assert sum(map(closed, many)) >= 40
        for connection in (*idle, kept, *many):
            connection.close()


def test_who_may_ask(predictor):
    door = {"keys": ["one", "two"], "hosts": ("localhost", "127.0.0.1", "[::1]")}
    body = json.dumps({"rows": [GREEDY]})
    with serving(predictor, door=door) as served:

        def ask(path="/v1/predict", method="POST", **headers):
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            return served.ask(body if method == "POST" else None, path, method, names)

        status, headers, answer = ask(content_type="application/json")
        assert (
            status == 401 and headers["www-authenticate"] == "Bearer" and "Authorization" in json.loads(answer)["error"]
        )
        assert ask(content_type="application/json", authorization="Bearer three")[0] == 401
        assert ask("/v1/prompts", "GET")[0] == ask("/metrics", "GET")[0] == 401
        assert [ask(path, "GET")[0] for path in ("/livez", "/readyz", "/healthz")] == [200] * 3
        for key in door["keys"]:
            assert ask(content_type="application/json; charset=utf-8", authorization=f"bearer {key}")[0] == 200
        for kind in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=application/json",
        ):
            status, _, answer = ask(content_type=kind, authorization="Bearer one")
            assert status == 415 and "expected application/json" in json.loads(answer)["error"]
        assert ask(authorization="Bearer one")[0] == 415
        for host, expected in (("localhost:1", 200), ("[::1]", 200), ("evil.example", 421), ("localhost.evil:80", 421)):
            assert ask("/v1/prompts", "GET", authorization="Bearer one", host=host)[0] == expected


def test_only_a_port_that_others_reach_takes_any_host(tmp_path):
    with listen("127.0.0.1", 0) as own, listen("0.0.0.0", 0) as open_to_all:
        assert "localhost" in hosts_of(own) and hosts_of(open_to_all) == ()
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    assert read_keys(keys) == ["one", "two"] and read_keys(None) == []
    keys.write_text("\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_keys(keys)
    assert parse(["--api-key-file=x"]).api_key_file == parse(["--api_key_file=x"]).api_key_file


def test_requests_are_taken_as_http_1_1_asks(served):
    """A target may have scheme and host; both Content-Length and Transfer-Encoding are refused (request smuggling)."""

    def ask(data):
        with served.send(data) as connection:
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(1000), b""))

    assert b" 200 " in ask(b"GET http://host.example:80/livez?x=1 HTTP/1.1\r\nhost: x\r\n\r\n")
    assert b" 404 " in ask(b"GET http://host.example HTTP/1.1\r\nhost: x\r\n\r\n")
    both = ask(head(4, "transfer-encoding: chunked"))
    assert b" 400 " in both and b"both Content-Length and Transfer-Encoding" in both


def test_the_service_describes_itself(served):
    """The document has every route and method, every field of rows and answers, and every status of the code."""
    document = served.get("/openapi.json")[1]
    app = inspect.getclosurevars(inspect.getclosurevars(served.service.app).nonlocals["app"]).nonlocals["app"]._app
    routes = {route.path: {method.lower() for method in route.methods} - {"head"} for route in app.routes}
    assert {path: set(methods) for path, methods in document["paths"].items()} == routes
    schemas = document["components"]["schemas"]
    assert set(schemas["Row"]["properties"]) == {*requests_module.FIELDS, *requests_module.OWN_FIELDS}
    assert set(schemas["Answer"]["properties"]) == set(requests_module.ANSWER)
    sources = [inspect.getsource(module) for module in (service_module, http_module)]
    statuses = {status for source in sources for status in re.findall(r"Refusal\(\s*(\d+)", source)}
    assert statuses | {"200"} == set(document["paths"]["/v1/predict"]["post"]["responses"])
    assert document["paths"]["/v1/predict"]["post"]["requestBody"]["required"]


def test_a_busy_service_is_live_until_it_cannot_recover(predictor, monkeypatch):
    gate = Gate(predictor)
    with serving(gate.predictor, timeout=0.5) as served:
        assert served.predict([GREEDY])[0] == 503
        until(lambda: served.get("/readyz") == served.get("/healthz") == (503, {"status": "stuck"}))
        assert served.get("/livez") == (200, {"status": "ok"})
        monkeypatch.setattr(service_module, "LOST", 1)
        assert served.get("/livez") == (503, {"status": "lost"})
        gate.open.set()
        until(lambda: served.get("/livez")[0] == served.get("/readyz")[0] == 200)
        served.service._answering.cancel()
        until(lambda: served.get("/livez")[0] == 503)


def test_a_broken_prompt_is_named_with_its_reason_and_shows_nothing_else(tiny, tmp_path):
    """The reason shows no path of the server and no content of a file that a link points to."""
    folder, secret = tmp_path / "prompts", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("root:x:0:0:root:/root:/bin/bash")
    write_prompt(folder, "good")
    (folder / "link.npy").symlink_to(secret)
    np.save(folder / "nan.npy", np.full((2, CONFIG.emb_dim), np.nan, np.float32))
    write_prompt(folder, "run")
    (folder / "run.json").write_text(secret.read_text())
    predictor = Predictor.load(str(tiny.base), folder, input_length=16, max_new_tokens=4, batch_size=2)
    with serving(predictor, PromptFolder(folder)) as served:
        found = served.get("/v1/prompts")[1]
        rows = served.predict([GREEDY | {"prompt": name} for name in ("nan", "link", "run")])[1]["rows"]
    assert [*found["broken"]] == ["link", "nan", "run"] and found["base"] == "tiny"
    assert rows[0]["error"].startswith("prompt 'nan' is broken: holds NaN or infinity")
    assert rows[1]["error"].startswith("prompt 'link' is broken: is not a readable prompt")
    for text in (json.dumps(found), json.dumps(rows)):
        assert "root" not in text and str(tmp_path) not in text


def test_a_prompt_that_is_overwritten_in_place_is_never_half_served(tiny, tmp_path):
    """Each answer is computed with the old or the new prompt, however slowly the file is written."""
    write_prompt(tmp_path, "a", length=40, seed=1)
    predictor = Predictor.load(str(tiny.base), tmp_path, input_length=16, max_new_tokens=4, batch_size=2)
    # A reader cannot tell a writer that pauses longer than `poll` from one that has finished, so `poll` is large here.
    with serving(predictor, PromptFolder(tmp_path), door={"poll": 2.0}, timeout=120) as served:

        def score():
            return served.predict([GREEDY | {"prompt": "a"}])[1]["rows"][0]["score"]

        old, found = score(), set()
        with open(tmp_path / "a.npy", "r+b") as file:
            data = file.read()
            new = np.random.default_rng(2).normal(0, 0.5, (40, CONFIG.emb_dim)).astype(np.float32).tobytes()
            file.seek(len(data) - len(new))
            for first in range(0, len(new), 32):
                file.write(new[first : first + 32])
                file.flush()
                found.add(score())
                time.sleep(0.005)
        until(lambda: score() not in found)
        assert found == {old}


def test_windows_have_a_limit_in_tokens():
    """Few rows of 1,000 tokens are computed at a time, other callers get their turn, and cancelled rows are dropped."""
    windows = []

    def answer(requests):
        windows.append([request.prompt for request in requests])
        time.sleep(0.05 * len(requests))
        return [{} for _ in requests]

    def request(name):
        return Request(name, np.array([1], np.int32), False, "greedy", (), None, 1.0, 0, 1.0, 0)

    async def run():
        model = ModelThread()
        batcher = Batcher(
            answer,
            model,
            batch_size=32,
            window=128,
            wait=0.0,
            max_queue=1000,
            max_tokens=150_000,
            cost=lambda request: 100_000 if request.prompt == "huge" else 1000,
        )
        with pytest.raises(
            Overloaded, match="0 tokens wait already, and 200000 more would be over the limit of 150000"
        ):
            batcher.submit([request("huge")] * 2)
        running = asyncio.create_task(batcher.run())
        large = batcher.submit([request("large")] * 100)
        small = batcher.submit([request("small")])
        await small.answers
        assert (
            windows[0] == ["large"] * 5
        )  # 4,096 tokens, and the rest of a row; then half a second at 20 rows a second
        assert windows[1][0] == "small" and len(windows[1]) <= 11 and batcher.rate < 21_000
        assert batcher.cancel(large) >= 60 and batcher.tokens == batcher.waiting == 0
        done = len(windows)
        await asyncio.sleep(0.1)
        assert len(windows) <= done + 1
        running.cancel()
        model.close()

    asyncio.run(run())


def test_the_folder_is_followed(tiny, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    write_prompt(folder, "a")
    write_prompt(folder, "other_base", width=7)
    predictor = Predictor.load(str(tiny.base), folder, input_length=16, max_new_tokens=4, batch_size=2)

    def answer(name, width=CONFIG.emb_dim):
        return served.predict([GREEDY | {"prompt": name}])[1]["rows"][0].get("score")

    with serving(predictor, PromptFolder(folder)) as served:

        def named():
            return served.get("/v1/prompts")[1]

        found = named()
        assert (
            found["prompts"] == {"a": 3} and found["base"] == "tiny" and found["fingerprint"] == predictor.fingerprint
        )
        assert "was trained on another model size" in found["broken"]["other_base"]
        first = answer("a")
        write_prompt(folder, "b", length=6, seed=5)
        until(lambda: named()["prompts"] == {"a": 3, "b": 6})
        other = answer("b")
        assert first != other and same(answer("a"), first)
        write_prompt(folder, "b", seed=0)  # now b has the values of a
        until(lambda: named()["prompts"] == {"a": 3, "b": 3})
        assert same(answer("b"), first)
        (folder / "b.npy").write_bytes(b"broken")
        until(lambda: "b" in named()["broken"])
        assert same(answer("b"), first) and same(answer("a"), first)  # the earlier version of b is still served
        (folder / "a.npy").unlink()
        until(lambda: named()["prompts"] == {"b": 3})
        assert answer("a") is None
        shutil.rmtree(folder)
        until(lambda: "cannot read the folder of prompts" in named().get("folder", ""))
        assert same(answer("b"), first)
        folder.mkdir()
        write_prompt(folder, "c", seed=0)
        until(lambda: named()["prompts"] == {"c": 3} and "folder" not in named())
        assert same(answer("c"), first)


def test_callers_share_windows_and_take_turns():
    """A large request delays a small one by at most one window, and rows that wait share the next window."""
    windows = []

    def answer(requests):
        windows.append([(request.prompt, request.seed) for request in requests])
        time.sleep(0.01)
        return [{"prediction": request.seed} for request in requests]

    def request(name, number):
        return Request(name, np.array([1], np.int32), False, "greedy", (), None, 1.0, 0, 1.0, number)

    async def ask(batcher, name, count):
        job = batcher.submit([request(name, number) for number in range(count)])
        return [found["prediction"] for found in await job.answers]

    async def run():
        model = ModelThread()
        batcher = Batcher(answer, model, batch_size=16, window=16, wait=0.5, max_queue=1000)
        running = asyncio.create_task(batcher.run())
        large = asyncio.create_task(ask(batcher, "large", 100))
        small = [asyncio.create_task(ask(batcher, name, 2)) for name in "abc"]
        assert await asyncio.gather(*small) == [[0, 1]] * 3
        assert not large.done()  # the next window may have begun
        assert windows[0] == [*(("large", n) for n in range(8)), *((name, n) for name in "abc" for n in range(2)),
                              ("large", 8), ("large", 9)]  # fmt: skip
        assert await large == [*range(100)]
        assert [len(window) for window in windows] == [16] * 6 + [10]
        windows.clear()
        await asyncio.gather(*(ask(batcher, name, 1) for name in "abc"))
        assert windows == [[("a", 0), ("b", 0), ("c", 0)]]
        started = time.monotonic()
        await ask(batcher, "a", 16)  # a full batch is computed without waiting
        assert time.monotonic() - started < 0.4
        running.cancel()
        model.close()

    asyncio.run(run())


def test_rows_to_warm_up_with_are_lines_as_infer_reads_them(tmp_path):
    """The file has a byte-order mark, and a text with a Unicode line separator, which does not end a line."""
    rows = [GREEDY, GREEDY | {"inputs": "a\u2028movie"}]
    text = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    assert read_rows(tmp_path / "rows.jsonl") == rows
    (tmp_path / "rows.jsonl").write_text("{")
    with pytest.raises(ValueError, match="cannot read --warm=.*rows.jsonl .*: expected a file of rows"):
        read_rows(tmp_path / "rows.jsonl")


def test_after_warming_up_mixed_batches_compile_nothing_either(tiny):
    """If the bank has prompts per layer, both kinds of batches are compiled; new prompts of either kind add none."""
    engine._engine_of.cache_clear()
    rng, width = np.random.default_rng(0), CONFIG.emb_dim
    shapes = {"ordinary": (5, width), "layered": (CONFIG.num_encoder_layers, 3, width)}
    prompts = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    predictor = Predictor.load(str(tiny.base), prompts, input_length=16, max_new_tokens=2, batch_size=2)
    assert warm_up(predictor, [GREEDY]) == 2 * 2
    assert predictor._engine.greedy._cache_size() == 4
    predictor.bank.add("adding", prompts["ordinary"][:2], additions=prompts["layered"][:, :2])
    names = ("layered", "ordinary", "adding", None, "adding", "layered", "ordinary")
    with serving(predictor) as served:
        status, found = served.predict([GREEDY | {"prompt": name} for name in names])
    assert status == 200 and all("score" in row for row in found["rows"])
    assert predictor._engine.greedy._cache_size() == 4


def test_after_warming_up_nothing_is_compiled(tiny, prompts):
    """No mix of rows compiles anything, whatever the number of rows and of added prompts."""
    engine._engine_of.cache_clear()  # drops the programs of other tests
    predictor = Predictor.load(str(tiny.base), prompts, input_length=16, max_new_tokens=4, batch_size=2)
    rows = [GREEDY, RANKED, RANKED | {"labels": ["a", "b", "negative plot of the film"]}]
    assert (sizes(1), sizes(2), sizes(3), sizes(32)) == ([1], [1, 2], [1, 2, 3], [1, 2, 4, 8, 16, 32])
    assert warm_up(predictor, rows) == 2 * (1 + 2)

    def compiled():
        return {name: getattr(predictor._engine, name)._cache_size() for name in ("greedy", "rank", "sample", "beam")}

    before = compiled()
    assert before == {"greedy": 2, "rank": 4, "sample": 0, "beam": 0}
    rng = np.random.default_rng(0)
    for number in range(20):
        predictor.bank.add(f"new{number}", rng.normal(size=(5, CONFIG.emb_dim)).astype(np.float32))
    for count in (1, 2, 3, 7):
        answers = predictor.answer_rows([(n, rows[(n + count) % 3] | {"prompt": f"new{n}"}) for n in range(count)])
        assert all("prediction" in answer for answer in answers)
    assert compiled() == before


def start(tiny, *flags, python=("-m", "prompt_tuning_jax.serve")) -> subprocess.Popen:
    command = [sys.executable, *python, f"--base={tiny.base}", "--input_length=16", "--max_new_tokens=4", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | tiny.environment, cwd=tiny.folder, **pipes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_requests_in_progress(tiny, prompts, number):
    with start(tiny, f"--prompts={prompts}", "--port=0", "--wait_ms=1500") as process:
        line = process.stdout.readline()
        assert line.startswith("serving at http://127.0.0.1:")
        served = Served(int(line.rpartition(":")[2]), None)
        with ThreadPoolExecutor(1) as clients:
            asked = clients.submit(served.predict, [GREEDY])
            until(lambda: served.metric("prompt_tuning_queue_rows") == 1)
            process.send_signal(number)
            status, found = asked.result()
        assert status == 200 and "prediction" in found["rows"][0]
        stdout, stderr = process.communicate(timeout=30)
        assert process.returncode == 0 and stdout == "" and stderr == ""
        with pytest.raises(ConnectionRefusedError):
            served.predict([GREEDY])


def test_a_shutdown_answers_every_connection_that_the_system_has_accepted(predictor):
    """Also those that asyncio, which opens ten at a time here, does not know yet."""
    body = json.dumps({"rows": [GREEDY]}).encode()

    async def run():
        clients = []
        service = Service(lambda: (predictor, None), "bases/tiny")
        server, listening = make_server(service.app, 40), listen("127.0.0.1", 0)

        async def should_exit(counter):  # once the base model is loaded, and clients connect in that moment
            if service._predictor is not None:
                clients.extend(socket.create_connection(listening.getsockname()) for _ in range(35))
                for client in clients[:-1]:
                    client.sendall(head(len(body)) + body)
            return bool(clients)

        server.on_tick = should_exit
        serving = asyncio.create_task(serve(service, server, listening))
        while not clients:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        clients[-1].sendall(head(len(body)) + body)  # whose request comes after the signal
        await serving
        return clients

    answers = []
    for client in asyncio.run(run()):
        with client:
            answers.append(b"".join(iter(lambda: client.recv(65_536), b"")))  # noqa: B023
    assert [answer.partition(b"\r\n")[0] for answer in answers] == [b"HTTP/1.1 200 OK"] * 35
    assert all(b'"prediction"' in answer for answer in answers)


@contextlib.contextmanager
def ending(predictor) -> Iterator[tuple[Gate, Any, Any]]:
    """Yields the gate, the server and the future answer of a service that is told to end while a program compiles."""
    gate = Gate(predictor)
    gate.predictor.groups = lambda requests: ([], [[*range(len(requests))]])
    service = Service(lambda: (gate.predictor, None), "bases/tiny", wait=0.001)
    server, listening = make_server(service.app, compiling=service.compiling), listen("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(serve(service, server, listening)))
    thread.start()
    served = Served(listening.getsockname()[1], service)
    until(lambda: served.get("/readyz")[0] == 200)
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(served.predict, [GREEDY])
        until(lambda: gate.windows)
        server.handle_exit(signal.SIGTERM, None)
        try:
            yield gate, server, asked
        finally:
            gate.open.set()
            thread.join(30)
    assert not thread.is_alive()


def test_a_shutdown_waits_for_a_program_that_is_being_compiled(predictor, monkeypatch):
    monkeypatch.setattr(server_module, "GRACE", 0.3)
    with ending(predictor) as (gate, _, asked):
        time.sleep(1)
        assert not asked.done()
        gate.open.set()
        status, found = asked.result(30)
        assert status == 200 and "prediction" in found["rows"][0]


def test_a_shutdown_does_not_wait_for_a_program_without_end(predictor, monkeypatch):
    monkeypatch.setattr(server_module, "LONGEST", 0.5)
    with ending(predictor) as (_, _, asked):
        assert asked.result(10) == (503, {"error": "the service is shutting down"})


def test_a_second_signal_ends_a_shutdown_at_once(predictor):
    with ending(predictor) as (_, server, asked):
        time.sleep(0.3)
        assert not asked.done()
        server.handle_exit(signal.SIGTERM, None)
        assert asked.result(5) == (503, {"error": "the service is shutting down"})


def test_what_it_cannot_start_with_is_one_line(tiny, prompts):
    taken = listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    absent = "import sys; sys.modules['starlette'] = None; from prompt_tuning_jax.serve import main; main()"
    cases = [
        (start(tiny, f"--prompts={prompts}", f"--port={port}"), f"port {port} (Address already in use"),
        (start(tiny, "--prompts=nowhere"), "no folder of prompts at nowhere: set --prompts"),
        (start(tiny, python=("-c", absent)), "pip install 'prompt_tuning_jax[serve]'"),
        (start(tiny, "--port=0", "--base=nowhere"), "set --base"),
        (start(tiny, "--max_rows=9000"), "more than --max_queue, 8192"),
    ]
    with taken:
        for process, message in cases:
            stdout, stderr = process.communicate(timeout=120)
            assert process.returncode == 2, stderr
            assert stdout == "" and message in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1


def test_under_load_every_answer_is_infers(tiny):
    """Runs a small benchmark: `infer`, clients that compare answers with it, then more rows than the queue holds."""
    flags = [f"--base={tiny.base}", "--clients=20", "--seconds=3", "--rows=80", "--batch_size=2"]
    command = [sys.executable, "-m", "experiments.benchmarks.serving", *flags]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | tiny.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == 0, found["wrong_answers"]
    assert found["statuses"].keys() == {"200"} and found["rows"] > 200
    assert found["overload"]["statuses"]["429"] > 5 and found["overload"]["retry_after"] >= 1
    assert found["overload"]["then"] == 200
