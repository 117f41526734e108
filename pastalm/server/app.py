"""The HTTP server: OpenAI's paths over one model, and a page at `/`.

A request passes these files: gate.py (host, key, size of the body), requests.py (checks), service.py (queue, token
ids), worker.py (the engine's thread), answers.py (deltas in document order), sending.py with replies.py (one JSON
reply, or chunks). Whatever ends it early (the client disconnects, a time limit, an error) frees its slots.
"""

from __future__ import annotations

import math
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Discriminator, Tag
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from pastalm.errors import PastaError, RequestError
from pastalm.llm import LLM
from pastalm.server.errors import ErrorReply, error_reply
from pastalm.server.gate import Gate, is_loopback
from pastalm.server.page import PAGE, file_route
from pastalm.server.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
    Tokens,
    TokensText,
    tokenize_kind,
)
from pastalm.server.sending import StreamedReply, WholeReply
from pastalm.server.service import Service
from pastalm.server.settings import Settings


def application(llm: LLM, settings: Settings) -> FastAPI:
    """The ASGI application for a model. It runs the model's driver from startup to shutdown.

    llm: the model.
    settings: of the server.
    """
    service = Service(llm, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop()

    error_replies: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorReply, "description": "An error"} for code in ("4XX", "5XX")
    }
    app = FastAPIOffline(title="pastalm", lifespan=lifespan, responses=error_replies)
    for kind in (PastaError, TimeoutError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, error_reply)
    key = [Depends(HTTPBearer(auto_error=False, description="The key of --api-key."))] if settings.api_key else []
    for add_routes in (_add_answer_routes, _add_model_routes, _add_token_routes):
        add_routes(app, service, key)
    _add_state_routes(app, service)
    for path, name in PAGE.items():
        app.add_api_route(path, file_route(name), methods=["GET"], include_in_schema=False)
    paths = frozenset(str(getattr(route, "path", "")) for route in app.routes)
    app.add_middleware(Gate, settings=settings, metrics=service.metrics, paths=paths)
    if settings.cors_origins:
        # outside the gate: browsers send preflight requests without the key, and pages must be able to read errors
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    return app


def _add_answer_routes(app: FastAPI, service: Service, key: Sequence[Any]) -> None:
    """Chat and completions."""
    data = {"type": "string", "description": "With stream: a chunk, an error, or [DONE]"}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    stream = {"text/event-stream": {"schema": event}}

    @app.post("/v1/chat/completions", responses={200: {"model": ChatCompletion, "content": stream}}, dependencies=key)
    async def chat(request: ChatRequest) -> Response:
        """Answers a conversation."""
        return (StreamedReply if request.stream else WholeReply)(service, request)

    @app.post("/v1/completions", responses={200: {"model": Completion, "content": stream}}, dependencies=key)
    async def complete(request: CompletionRequest) -> Response:
        """Completes raw prompts."""
        return (StreamedReply if request.stream else WholeReply)(service, request)


def _add_model_routes(app: FastAPI, service: Service, key: Sequence[Any]) -> None:
    """The list of models, which has one entry."""
    model_card: dict[str, Any] = Model(
        id=service.settings.name,
        created=int(time.time()),
        object="model",
        owned_by="pastalm",
        max_model_len=service.max_model_len,
    ).model_dump(exclude_unset=True)

    @app.get("/v1/models", dependencies=key)
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [model_card]}

    @app.get("/v1/models/{model:path}", responses={200: {"model": Model}}, dependencies=key)
    async def one_model(model: str) -> dict[str, Any]:
        """The one model, by its name."""
        service.check_model(model)
        return model_card


def _add_token_routes(app: FastAPI, service: Service, key: Sequence[Any]) -> None:
    """Tokenizer paths, as in vLLM's API."""

    @app.post("/tokenize", dependencies=key)
    async def tokenize(
        request: Annotated[
            Annotated[TokenizeRequest, Tag("<prompt>")] | Annotated[TokenizeChatRequest, Tag("<messages>")],
            Discriminator(tokenize_kind),
        ],
    ) -> Tokens:
        """Token ids of a raw prompt or of a conversation, as vLLM gives them."""
        service.check_model(request.model)
        service.check_ids((), request.about)
        (ids,) = await service.encode(request)
        strings = await service.spell(ids) if request.return_token_strs else None
        return Tokens(count=len(ids), max_model_len=service.max_model_len, tokens=ids, token_strs=strings)

    @app.post("/detokenize", dependencies=key)
    async def detokenize(request: DetokenizeRequest) -> TokensText:
        """The text of token ids, as vLLM gives it."""
        service.check_model(request.model)
        return TokensText(prompt="".join(await service.spell(request.tokens)))

    @app.get("/tokenizer_info", dependencies=key)
    async def tokenizer_info() -> dict[str, Any]:
        """Special tokens and chat template, as vLLM gives them."""
        tokenizer = service.llm.loaded.tokenizer
        names = ("bos_token", "eos_token", "pad_token", "chat_template")
        values = {name: getattr(tokenizer, name, None) for name in names}
        return {"tokenizer_class": type(tokenizer).__name__, **values}


def _add_state_routes(app: FastAPI, service: Service) -> None:
    """Health and metrics."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the engine's thread is running."""
        if not service.worker.alive:
            raise HTTPException(503, "the engine's thread has ended: start the server again")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def listen(host: str, port: int) -> socket.socket:
    """A socket for clients. Port 0 takes a free one. Raises RequestError if the address cannot be used."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise RequestError(f"cannot listen on {host}, port {port} ({error}): give another --host or --port") from None


def serve(llm: LLM, settings: Settings, listening: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C; then finishes what is running and accepts no new clients.

    llm: the model.
    settings: of the server. A server that listens beyond loopback accepts any host name.
    listening: from `listen`.
    """
    if not is_loopback(listening.getsockname()[0]):
        settings = replace(settings, hosts=("*",))
    config = uvicorn.Config(
        application(llm, settings),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(settings.timeout),
    )
    # uvicorn raises the signal again after shutdown; SIGTERM is not a failure
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
    uvicorn.Server(config).run(sockets=[listening])
