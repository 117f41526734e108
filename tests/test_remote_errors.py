"""Every way in which a server cannot be asked is one line of its own, that ends in what to do: as an engine
(`connect`), for questions (`ChatClient`), and on the command line."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

pytest.importorskip("openai")

from typer.testing import CliRunner

from pastalm.cli import app
from pastalm.engines.completions.discovery import connect
from pastalm.errors import ModelError, PastaError, RemoteError, RequestError
from pastalm.records.chat_client import ChatClient
from tests.served import free_port

Told = tuple[int, str, Any]
"""Status, content type, body."""
HTML = (200, "text/html", "<!DOCTYPE html><html><body>hello</body></html>")
LISTED = (200, "application/json", {"object": "list", "data": [{"id": "m", "object": "model"}]})


@contextmanager
def telling(told: Callable[[str, str], Told], tls: tuple[Path, Path] | None = None) -> Iterator[int]:
    """The port of a server that answers each request by method and path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._tell("GET")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._tell("POST")

        def _tell(self, method: str) -> None:
            status, kind, body = told(method, self.path)
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def as_engine(url: str, model: str | None) -> str:
    with pytest.raises(PastaError) as caught:
        connect(url, model, retries=0, timeout=5).close()
    return str(caught.value)


def as_questions(url: str, model: str | None) -> str:
    remote: ChatClient[int] = ChatClient(url, model or "m", retries=0, timeout=5)
    with pytest.raises(PastaError) as caught:
        list(remote.ask([(0, [{"role": "user", "content": "x"}])]))
    return str(caught.value)


def as_command(url: str, model: str | None) -> str:
    named = [] if model is None else ["--model", model]
    result = CliRunner().invoke(app, ["generate", "--raw", "x", "--base-url", url, *named])
    assert result.exit_code in (1, 2) and result.stdout == ""
    (line,) = result.stderr.splitlines()
    return str(line)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tokenizer is looked for."""

    def refuse(name: str, **_: object) -> None:
        raise ModelError("there is none")

    monkeypatch.setattr("pastalm.models.loading.load_tokenizer", refuse)


EVERY = (as_engine, as_questions, as_command)


def one_line(said: str, *words: str) -> None:
    assert "\n" not in said and "<html" not in said.lower()
    assert all(word in said for word in words), said


def no_route(method: str, path: str) -> Told:
    """As vLLM: nothing outside of /v1."""
    if not path.startswith("/v1/"):
        return 404, "application/json", {"detail": "Not Found"}
    return LISTED if method == "GET" else (500, "application/json", {})


def no_model(method: str, path: str) -> Told:
    if method == "GET":
        return 200, "application/json", {"object": "list", "data": []}
    return 404, "application/json", {"error": {"message": "The model `x` does not exist.", "code": 404}}


def always(*told: Any) -> Callable[[str, str], Told]:
    return lambda method, path: told  # type: ignore[return-value]


def posts(*told: Any) -> Callable[[str, str], Told]:
    return lambda method, path: LISTED if method == "GET" else told  # type: ignore[return-value]


JSON = "application/json"


@pytest.mark.parametrize("asked", EVERY)
@pytest.mark.parametrize("model", [None, "m"])
def test_a_base_url_without_v1(asked: Any, model: str | None) -> None:
    with telling(no_route) as port:
        one_line(asked(f"http://127.0.0.1:{port}", model), "404", f"http://127.0.0.1:{port}/v1")
        one_line(asked(f"http://127.0.0.1:{port}/", model), f"http://127.0.0.1:{port}/v1")


@pytest.mark.parametrize("asked", EVERY)
@pytest.mark.parametrize("status", [200, 404, 405])
def test_a_web_page_is_no_api(asked: Any, status: int) -> None:
    with telling(always(status, *HTML[1:])) as port:
        one_line(asked(f"http://127.0.0.1:{port}", "m"), "a web page", f"--base-url http://127.0.0.1:{port}/v1")
        one_line(asked(f"http://127.0.0.1:{port}/v1", "m"), "a web page", "--base-url of the API")


@pytest.mark.parametrize("asked", EVERY)
@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_missing_or_not_taken(asked: Any, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = always(status, JSON, {"error": {"message": "Incorrect API key provided."}})
    with telling(refused) as port:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        one_line(asked(f"http://127.0.0.1:{port}/v1", "m"), str(status), "set OPENAI_API_KEY", "Incorrect")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        said = asked(f"http://127.0.0.1:{port}/v1", "m")
        one_line(said, "another key")
        assert "secret" not in said


@pytest.mark.parametrize("bad", ["sk-secret\n", "sk secret", "sk-sécret", " sk-secret"])
@pytest.mark.parametrize("asked", EVERY)
def test_a_key_that_is_none_is_not_shown(asked: Any, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", bad)
    said = asked("http://127.0.0.1:9/v1", "m")
    one_line(said, "OPENAI_API_KEY")
    assert "cret" not in said.replace("OPENAI_API_KEY", "")


@pytest.mark.parametrize("asked", EVERY)
def test_a_model_that_is_not_there(asked: Any) -> None:
    with telling(no_model) as port:
        one_line(asked(f"http://127.0.0.1:{port}/v1", "x"), "404", "does not exist", "--model", "/v1/models")


@pytest.mark.parametrize("asked", [as_engine, as_command])
def test_models_that_are_listed(asked: Any) -> None:
    with telling(no_model) as port:
        one_line(asked(f"http://127.0.0.1:{port}/v1", None), "lists no model", "--model")
    with telling(posts(200, JSON, {})) as port:
        one_line(asked(f"http://127.0.0.1:{port}/v1", "x"), "serves no 'x'", "but m", "give one of these")
    chat = {"error": {"message": "This is a chat model and not supported in the v1/completions endpoint."}}
    with telling(posts(404, JSON, chat)) as port:
        one_line(asked(f"http://127.0.0.1:{port}/v1", "m"), "chat model", "--model that completes text")


@pytest.mark.parametrize("asked", EVERY)
def test_nobody_answers(asked: Any) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    one_line(asked(url, "m"), f"cannot reach {url}", "start the server")
    one_line(asked("http://nowhere.invalid/v1", "m"), "the host 'nowhere.invalid' is unknown")


@pytest.mark.parametrize("asked", EVERY)
@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "localhost:8000", "ftp://x/v1", "http://", "", "http://x:y/v1"])
def test_what_is_no_address(asked: Any, url: str) -> None:
    one_line(asked(url, "m"), "--base-url must be like http://")


@pytest.mark.parametrize("asked", EVERY)
def test_tls_on_one_side_only(asked: Any, tmp_path: Path) -> None:
    with telling(no_route) as port:
        one_line(asked(f"https://127.0.0.1:{port}/v1", "m"), "TLS", f"--base-url http://127.0.0.1:{port}/v1")
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-days", "2"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with telling(no_route, tls=(certificate, key)) as port:
        one_line(asked(f"https://127.0.0.1:{port}/v1", "m"), "certificate", "SSL_CERT_FILE")
        one_line(asked(f"http://127.0.0.1:{port}/v1", "m"), f"--base-url https://127.0.0.1:{port}/v1")


@pytest.mark.parametrize("asked", [as_engine, as_questions])
@pytest.mark.parametrize(
    ("status", "what"), [(429, "try again later"), (500, "server's log"), (502, "server's log"), (503, "server's log")]
)
def test_a_server_that_is_busy_or_broken(asked: Any, status: int, what: str) -> None:
    with telling(always(status, JSON, {"error": {"message": "no, not now"}})) as port:
        one_line(asked(f"http://127.0.0.1:{port}/v1", "m"), str(status), "no, not now", what)


def test_a_server_that_does_not_answer() -> None:
    from threading import Event

    end = Event()

    def silent(method: str, path: str) -> Told:
        end.wait(20)
        return LISTED

    with telling(silent) as port:
        with pytest.raises(RemoteError, match="did not answer within 0.3 s: wait"):
            connect(f"http://127.0.0.1:{port}/v1", "m", retries=0, timeout=0.3)
        remote: ChatClient[int] = ChatClient(f"http://127.0.0.1:{port}/v1", "m", retries=0, timeout=0.3)
        with pytest.raises(RemoteError, match="did not answer within 0.3 s: wait"):
            list(remote.ask([(0, [{"role": "user", "content": "x"}])]))
        end.set()


def test_addresses_that_will_do() -> None:
    from pastalm.records.chat_client import check_address

    for url in ("http://127.0.0.1:8000/v1", "https://api.example.com/v1", "http://[::1]:9/", "http://x/openai/v1?a=b"):
        check_address(url)
    with pytest.raises(RequestError):
        check_address("x")
