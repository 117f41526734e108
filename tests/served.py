"""Servers to ask in tests: one that replays recorded replies over HTTP, one that streams, a real llama.cpp server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

Reply = tuple[int, dict[str, str], Any]
"""Status, headers, body (bytes as they are, else JSON)."""


def completion(text: str, finish_reason: str = "stop", tokens: tuple[int, int] = (10, 5), **more: Any) -> Reply:
    """A chat completion. more: further fields of its choice."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason, **more}
    usage = dict(zip(("prompt_tokens", "completion_tokens"), tokens, strict=True)) | {"total_tokens": sum(tokens)}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
    return 200, {}, body | {"choices": [choice], "usage": usage}


@contextmanager
def replaying(answer: Callable[[dict[str, Any]], Reply]) -> Iterator[str]:
    """The base URL of a server that answers each request's body as told."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, value = answer(body)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, content in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, content)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


Parts = Iterator[Any]
"""What a stream sends: a JSON value as an event, bytes as they are; None ends the connection there."""


@contextmanager
def streaming(answer: Callable[[dict[str, Any]], Reply | Parts], models: list[dict[str, Any]]) -> Iterator[str]:
    """The base URL of a completions server that lists `models` and answers each request's body as told: whole, or
    part by part. A client that leaves closes the iterator."""

    gone = Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._whole(200, {}, {"object": "list", "data": models})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if gone.is_set():
                self.close_connection = True
                return
            told = answer(body)
            if isinstance(told, tuple):
                self._whole(*told)
                return
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for part in told:
                    if part is None:
                        return
                    data = part if isinstance(part, bytes) else f"data: {json.dumps(part)}\n\n".encode()
                    self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.write(b"0\r\n\r\n")
            except OSError:
                pass
            finally:
                told.close()  # type: ignore[attr-defined]

        def _whole(self, status: int, headers: dict[str, str], value: Any) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, content in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, content)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        gone.set()
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def llama_cpp_server(model: Path, *, context: int = 4096, options: tuple[str, ...] = ()) -> Iterator[str]:
    """The base URL of llama-cpp-python's own server of a GGUF file. Raises AssertionError with its last words if it
    ends by itself."""
    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--port", str(port)]
    log = model.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--n_ctx", str(context), "--n_threads", "1", *options], stdout=file, stderr=file
        )
    url = f"http://127.0.0.1:{port}/v1"

    def running() -> None:
        assert process.poll() is None, f"the server ended ({process.returncode}): {log.read_text()[-2000:]}"

    try:
        for _ in range(240):
            running()
            try:
                with urlopen(f"{url}/models", timeout=5):
                    break
            except (URLError, TimeoutError):
                time.sleep(0.5)
        else:
            raise AssertionError("the server does not come up")
        yield url
        running()
    finally:
        process.kill()
        process.wait()
