"""Servers to ask in tests: one that replays recorded replies over HTTP, and a real llama.cpp server."""

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
from threading import Thread
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


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def llama_cpp_server(model: Path, *, context: int = 4096) -> Iterator[str]:
    """The base URL of llama-cpp-python's own server of a GGUF file. Raises AssertionError with its last words if it
    ends by itself."""
    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--port", str(port)]
    log = model.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--n_ctx", str(context), "--n_threads", "1"], stdout=file, stderr=file
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
