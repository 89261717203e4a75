"""What driving a server adds to an image: the whole of a round here, less the seconds that the server says it took.

    python benchmarks/server_overhead.py [--rounds 300] [--size 128x128 --size 1024x1024 ...]

Against the stand-in of the tests, over loopback, whose images take next to nothing: what remains is the request, the
websocket, the history, fetching the image, and decoding and hashing its pixels. Then the answer of a vLLM-Omni, where
it is the client's clock that is judged: a whole image as base64, beside what a bare socket takes for the same bytes.
Exits with 1 if the median of the first size is above 5 ms. A busy machine adds what it adds: the lower quartile says
what the work itself takes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from standins.comfyui_plan import make_files, workload
from standins.comfyui_server import standin

from pytest_zimage.engines.servers.http import Http
from pytest_zimage.engines.servers.images import decoded

LIMIT_S = 5e-3
WARM_UP = 20
SIZES = ("128x128", "1024x512", "1024x1024")


def rounds_of(count: int, width: int, height: int) -> list[tuple[float, float]]:
    """Per round: what it took beyond the server's seconds until the image was here, and until it was hashed."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        models = make_files(Path(folder) / "models", "bf16")
        with standin(models, Path(folder), "--step-ms", "0", "--load-ms", "0") as server, server.warm() as session:
            for seed in range(1, count + WARM_UP + 1):
                drawn = workload(seed=seed, width=width, height=height)
                began = time.perf_counter()
                served = session.draw(drawn, "any" if seed == 1 else "warm")
                decoded(served.image, width, height)
                whole_s = time.perf_counter() - began
                found.append((served.beside_s["client"] - served.seconds, whole_s - served.seconds))
    return found[WARM_UP:]


def serve(listener: socket.socket, answer: bytes) -> None:
    """The same answer to every request, for ever."""
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while connection.recv(65536):
                connection.sendall(answer)


def bare(url: str, size: int) -> Callable[[], None]:
    """Asks over a socket, and takes what comes."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))

    def ask() -> None:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: it\r\n\r\n")
        left = size
        while left:
            left -= len(connection.recv(65536))

    return ask


def answers_of(count: int, width: int, height: int) -> dict[str, list[float]]:
    """Seconds of one answer with an image of that size as base64, by who asks."""
    body = b"x" * (4 * width * height)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = multiprocessing.get_context("fork").Process(target=serve, args=(listener, answer), daemon=True)
        server.start()
        try:
            with Http(url, what="it", timeout_s=60) as http:
                own = timed(lambda: http.raw("GET", "/", len(body)), count)
            return {"here": own, "bare socket": timed(bare(url, len(answer)), count)}
        finally:
            server.kill()
            server.join()


def timed(ask: Callable[[], object], count: int) -> list[float]:
    found = []
    for _ in range(count + WARM_UP):
        began = time.perf_counter()
        ask()
        found.append(time.perf_counter() - began)
    return found[WARM_UP:]


def say(what: str, seconds: Iterable[float]) -> None:
    values = list(seconds)
    lower, middle, upper = (1e3 * value for value in statistics.quantiles(values, n=4))
    print(f"{what:46} median {middle:6.2f} ms  quartiles {lower:6.2f} {upper:6.2f}  ({len(values)} times)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--size", action="append", help=f"WIDTHxHEIGHT; repeatable (default: {', '.join(SIZES)})")
    arguments = parser.parse_args()
    medians = []
    for size in arguments.size or SIZES:
        width, height = map(int, size.split("x"))
        found = rounds_of(arguments.rounds, width, height)
        for name, values in zip(("is here", "is hashed"), zip(*found, strict=True), strict=True):
            say(f"{size}: a round until its image {name}", values)
        medians.append(statistics.median(client for client, _ in found))
        for who, times in answers_of(arguments.rounds, width, height).items():
            say(f"{size}: an answer of {4 * width * height / 1e6:.1f} MB, {who}", times)
    print(f"limit {1e3 * LIMIT_S:g} ms a round: {'met' if medians[0] <= LIMIT_S else 'NOT met'}")
    return int(medians[0] > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
