"""Requests to a server are bounded in time and size, typed, and an accident is told from a wrong answer."""

from __future__ import annotations

import json
import signal
import socketserver
import threading

import pytest
from msgspec import Struct

from pytest_zimage.engines.servers import wire
from pytest_zimage.engines.servers.faults import RequestFault
from pytest_zimage.engines.servers.http import Http, StatusError
from pytest_zimage.errors import EngineError


class Count(Struct):
    n: int


class Faulty(socketserver.ThreadingTCPServer):
    """Answers by path, some of it as a server should not."""

    allow_reuse_address = True
    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ended = threading.Event()
        self.connections = 0
        self.closed = threading.Semaphore(0)
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """A client that gives up is part of the tests."""


class Handler(socketserver.StreamRequestHandler):
    server: Faulty

    def handle(self) -> None:
        self.server.connections += 1
        while self.answer():
            pass

    def finish(self) -> None:
        super().finish()
        self.connection.close()
        self.server.closed.release()

    def answer(self) -> bool:
        """Whether there may be another request on this connection."""
        method, _, target = self.rfile.readline().decode().rpartition(" ")[0].partition(" ")
        if not method:
            return False
        headers = {}
        while line := self.rfile.readline().decode().strip():
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        body = self.rfile.read(int(headers.get("content-length", 0)))
        self.server.asked.append(target)
        match target.partition("?")[0]:
            case "/count":
                self.send(200, b'{"n": 1}')
            case "/echo":
                said = {"method": method, "target": target, "headers": headers, "body": body.decode()}
                self.send(200, json.dumps(said).encode())
            case "/empty":
                self.send(200, b"")
            case "/drop":
                return False
            case "/half":
                self.send(200, b'{"n": 1}', length=100)
                return False
            case "/last":
                self.send(200, b'{"n": 1}')
                return False
            case "/babble":
                self.wfile.write(b"\x00\x01\x02\r\n\r\n")
                return False
            case "/wrong":
                self.send(200, b'{"n": "many"}')
            case "/html":
                self.send(200, b"<html>\xff")
            case "/deep":
                self.send(200, b"[" * 100_000)
            case "/redirect":
                self.send(302, b"", "Location: /count")
            case "/endless":
                return self.flood()
            case "/hang":
                self.server.ended.wait()
                return False
            case "/drip":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while not self.server.ended.wait(0.01):
                    self.wfile.write(b"x")
                return False
            case status:
                self.send(int(status[1:]), b'{"error": "' + b"x" * 2000 + b'"}')
        return True

    def send(self, status: int, body: bytes, *headers: str, length: int | None = None) -> None:
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body) if length is None else length}", *headers]
        self.wfile.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def flood(self) -> bool:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while not self.server.ended.is_set():
            self.wfile.write(b"x" * 65536)
        return False


@pytest.fixture
def faulty(nothing_left):
    server = Faulty()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def http(faulty):
    with Http(faulty.url, what="server of nvfp4", timeout_s=20) as http:
        yield http


def test_an_answer_comes_back_typed(http):
    assert http.json("GET", "/count", Count) == Count(1)
    assert http.json("GET", "/count", dict[str, int]) == {"n": 1}


def test_what_is_sent_arrives(http):
    said = http.json("POST", "/echo", dict[str, object], {"prompt": {"1": {}}}, params={"filename": "../a&b", "n": 2})
    assert (said["method"], said["target"]) == ("POST", "/echo?filename=..%2Fa%26b&n=2")
    assert json.loads(said["body"]) == {"prompt": {"1": {}}}
    assert said["headers"]["content-type"] == "application/json"
    assert said["headers"]["accept-encoding"] == "identity", "what is not unpacked cannot grow"


def test_bytes_come_back_as_they_are(http):
    assert http.raw("GET", "/html", 100) == b"<html>\xff"
    assert http.raw("POST", "/empty", 100, body={"unload_models": True}) == b""


def test_one_connection_serves_many_requests(http, faulty):
    for _ in range(20):
        http.json("GET", "/count", Count)
    assert faulty.connections == 1


def test_a_connection_that_the_server_closed_is_not_used_again(http, faulty):
    for _ in range(3):
        assert http.json("GET", "/last", Count) == Count(1)
        assert faulty.closed.acquire(timeout=20)
    assert faulty.connections == 3


def test_proxies_and_credentials_of_the_environment_are_left_alone(http, monkeypatch, tmp_path, faulty):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with Http(faulty.url, what="it", timeout_s=20) as other:
        assert "authorization" not in other.json("GET", "/echo", dict[str, object])["headers"]


@pytest.mark.parametrize(
    ("path", "kind", "says"),
    [
        ("/drop", "dropped connection", "the connection was dropped"),
        ("/half", "dropped connection", "the connection was dropped"),
        ("/babble", "dropped connection", "the connection was dropped"),
        ("/500", "status 500", "status 500: .*xxx"),
        ("/503", "status 503", "status 503"),
    ],
)
def test_an_accident_is_a_fault_of_its_kind(http, path, kind, says):
    with pytest.raises(RequestFault, match=f"server of nvfp4: GET {path}: {says}") as caught:
        http.json("GET", path, Count)
    assert caught.value.kind == kind
    assert len(caught.value.message) < 800
    assert http.json("GET", "/count", Count) == Count(1), "the next request is none the worse"


def test_nobody_listening_is_a_dropped_connection(faulty):
    with Http("http://127.0.0.1:9", what="it", timeout_s=20) as http, pytest.raises(RequestFault) as caught:
        http.json("GET", "/count", Count)
    assert caught.value.kind == "dropped connection"


@pytest.mark.parametrize("path", ["/hang", "/drip"])
def test_the_whole_of_a_request_has_one_limit(http, path):
    with pytest.raises(RequestFault, match=r"no whole answer within 0\.2 s") as caught:
        http.raw("GET", path, 1 << 30, timeout_s=0.2)
    assert caught.value.kind == "timeout"
    assert http.json("GET", "/count", Count) == Count(1)


@pytest.mark.parametrize(
    ("path", "says"),
    [("/wrong", r"got `str` - at `\$\.n`: .*many"), ("/html", "<html>"), ("/deep", r"\[\[")],
)
def test_an_answer_of_another_shape_is_an_error_that_quotes_it(http, path, says):
    with pytest.raises(EngineError, match=f"GET {path}: the answer is not what it should be: .*{says}") as caught:
        http.json("GET", path, Count)
    assert not isinstance(caught.value, RequestFault), "asking again would not help"
    assert len(caught.value.message) < 800


def test_a_long_answer_is_cut_off(http):
    with pytest.raises(EngineError, match="longer than 1000000 bytes") as caught:
        http.raw("GET", "/endless", 1_000_000)
    assert not isinstance(caught.value, RequestFault)
    with pytest.raises(EngineError, match="longer than 7 bytes"):
        http.raw("GET", "/count", 7)
    assert len(http.raw("GET", "/count", 8)) == 8


def test_another_status_is_told_with_what_the_server_says(http, faulty):
    with pytest.raises(StatusError, match="status 404") as caught:
        http.json("GET", "/404", Count)
    assert (caught.value.status, len(caught.value.body)) == (404, 2013)
    assert len(caught.value.message) < 800
    assert http.json("GET", "/404", dict[str, str], accept=(200, 404))["error"].startswith("xxx")


def test_no_redirect_is_followed(http, faulty):
    with pytest.raises(StatusError) as caught:
        http.json("GET", "/redirect", Count)
    assert caught.value.status == 302
    assert faulty.asked == ["/redirect"]


@pytest.mark.parametrize("path", ["/drop", "/500", "/hang"])
def test_a_server_that_is_dead_is_reported_as_dead(faulty, path):
    def check() -> None:
        raise EngineError("the server left with exit status 3")

    with Http(faulty.url, what="it", timeout_s=0.2, check=check) as http:
        with pytest.raises(EngineError, match="exit status 3"):
            http.json("GET", path, Count)
        with pytest.raises(StatusError):
            http.json("GET", "/404", Count)


def test_a_request_that_waits_shows_signs_of_life(faulty):
    signs = []

    def waiting() -> None:
        signs.append("alive")
        faulty.ended.set()

    with Http(faulty.url, what="it", timeout_s=20, waiting=waiting) as http:
        with pytest.raises(RequestFault) as caught:
            http.json("GET", "/hang", Count)
        assert caught.value.kind == "dropped connection"
    assert signs == ["alive"]


def test_death_ends_a_request_that_would_wait_for_ever(faulty):
    """A child of the dead server may still hold the connection open."""

    def check() -> None:
        raise EngineError("the server left with exit status 3")

    with Http(faulty.url, what="it", timeout_s=600, check=check) as http, pytest.raises(EngineError, match="status 3"):
        http.json("GET", "/hang", Count)


@pytest.mark.parametrize(
    "interrupt", [lambda: signal.raise_signal(signal.SIGINT), lambda: (_ for _ in ()).throw(KeyboardInterrupt)]
)
def test_ctrl_c_ends_a_request_and_leaves_nothing(faulty, interrupt):
    def waiting() -> None:
        for _ in interrupt() or ():
            pass

    # Whoever starts pytest in the background of a shell has the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Http(faulty.url, what="it", timeout_s=60, waiting=waiting) as http:
            with pytest.raises(KeyboardInterrupt):
                http.json("GET", "/hang", Count)
            assert http.json("GET", "/count", Count) == Count(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_noticed_at_once(faulty, monkeypatch):
    """No sign of life comes meanwhile: what ends the wait is the signal."""

    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wire, "TICK_S", 600)
    before = signal.signal(signal.SIGALRM, interrupted)
    try:
        with Http(faulty.url, what="it", timeout_s=600) as http:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                http.json("GET", "/hang", Count)
            assert http.json("GET", "/count", Count) == Count(1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_many_faults_leave_nothing_behind(http, faulty):
    counts = {"dropped connection": 0, "status 500": 0, "timeout": 0}
    good = 0
    for number in range(300):
        path = (
            "/drop"
            if number % 50 == 7
            else "/500"
            if number % 100 == 9
            else "/hang"
            if number % 100 == 11
            else "/count"
        )
        try:
            good += http.json("GET", path, Count, timeout_s=0.05 if path == "/hang" else 20).n
        except RequestFault as fault:
            counts[fault.kind] += 1
    assert (good, counts) == (288, {"dropped connection": 6, "status 500": 3, "timeout": 3})


def test_closing_twice_is_closing_once(faulty):
    http = Http(faulty.url, what="it", timeout_s=20)
    http.json("GET", "/count", Count)
    http.close()
    http.close()
