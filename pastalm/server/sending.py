"""Sends the reply to a request: one JSON object, or a stream of chunks."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import suppress

from fastapi.responses import Response
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.types import Receive, Scope, Send

from pastalm.errors import PastaError
from pastalm.server.errors import client_error
from pastalm.server.gate import owner
from pastalm.server.replies import ChatReply, CompletionReply, events_key, to_line
from pastalm.server.requests import ChatRequest, CompletionRequest
from pastalm.server.service import RunningRequest, Service

log = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""nginx's status for a client that has disconnected. Only used in the metrics."""


class Reply(Response):
    """The reply to a request. Decoding starts when it is sent.

    service: of the server.
    request: the checked request.
    """

    def __init__(self, service: Service, request: ChatRequest | CompletionRequest) -> None:
        super().__init__()
        self._service, self._request = service, request
        what = (service.settings.name, service.llm.loaded.vocabulary, request.logprob_count is not None)
        self._reply: ChatReply | CompletionReply
        self._reply = ChatReply(*what, request.calls) if isinstance(request, ChatRequest) else CompletionReply(*what)


class WholeReply(Reply):
    """A reply of one JSON object."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply_task = asyncio.ensure_future(self._whole(owner(scope)))
        disconnected = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((reply_task, disconnected), return_when=asyncio.FIRST_COMPLETED)
            if reply_task.done():
                await reply_task.result()(scope, receive, send)
            else:
                self._service.metrics.disconnects.inc()
                await Response(status_code=CLIENT_LEFT)(scope, receive, send)
        finally:
            reply_task.cancel()
            disconnected.cancel()
            await asyncio.wait((reply_task, disconnected))

    async def _whole(self, owner: str) -> Response:
        async with self._service.running(self._request, owner) as running:
            async for _ in running.deltas():
                pass
        reply = self._reply.whole(running.answers, running.usage())
        return Response(to_line(reply), media_type="application/json")


async def _disconnected(receive: Receive) -> None:
    """Waits until the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


class StreamedReply(Reply):
    """A stream of chunks. An error before the first chunk is a normal error reply, a later one is the last event."""

    _ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._service.settings
        # entered here, not in the generator: a generator that never started is never closed
        async with self._service.running(self._request, owner(scope)) as running:
            stream = EventSourceResponse(
                self._events(running),
                sep="\n",
                send_timeout=settings.client_timeout,
                shutdown_grace_period=settings.timeout,  # what is running is finished
            )
            with suppress(SendTimeoutError):
                await stream(scope, receive, send)
        if not self._ended:
            self._service.metrics.disconnects.inc()

    async def _events(self, running: RunningRequest) -> AsyncIterator[dict[str, str]]:
        try:
            async for chunk in self._chunks(running):
                yield {"data": to_line(chunk)}
            yield {"data": "[DONE]"}
        except Exception as error:
            if not isinstance(error, PastaError | TimeoutError):
                log.error("internal error, please report it", exc_info=error)
            yield {"data": json.dumps(client_error(error).body())}
        self._ended = True

    async def _chunks(self, running: RunningRequest) -> AsyncIterator[ChatCompletionChunk | Completion]:
        request, reply = self._request, self._reply
        for index in range(len(running.answers)):
            if (opening := reply.opening(index, running.answers[index])) is not None:
                yield opening
        async for index, delta in running.deltas():
            more = events_key(delta.events) if request.pasta.events else {}
            for chunk in reply.chunks(index, delta, **more):
                yield chunk
            if delta.finish_reason is not None:
                yield reply.closing(index, delta.finish_reason)
        if request.stream_options.include_usage:
            yield reply.usage(running.usage())
