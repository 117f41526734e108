"""The connection to a completions server. Streamed completions are read in a thread."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import openai

from pastalm.engines.completions.wire import CompletionEnd, Item, Wire, ending
from pastalm.records.chat_client import check_address, explain, key, line


@dataclass(slots=True)
class Traffic:
    """Counts of what was requested and received.

    completions: requested completions.
    again: of these, repeated after a failure.
    tokens: received tokens.
    dropped: of these, not used.
    """

    completions: int = 0
    again: int = 0
    tokens: int = 0
    dropped: int = 0


class Connection:
    """A model on a server, with the thread that reads its completions. It closes when it is garbage-collected.

    base_url: the API's address, ending in /v1.
    model: the model's name on the server.
    api_key: None: the value of OPENAI_API_KEY.
    retries: retries of a request that fails.
    timeout: seconds without a token after which a completion counts as stalled.
    inbox: what was received, with the number of its completion.
    """

    def __init__(
        self, base_url: str, model: str, *, api_key: str | None = None, retries: int = 3, timeout: float = 120.0
    ) -> None:
        check_address(base_url)
        self.base_url, self.model = base_url, model
        self.retries, self.timeout = retries, timeout
        self.inbox: queue.SimpleQueue[tuple[int, Item]] = queue.SimpleQueue()
        self._numbers = count()
        self._loop = asyncio.new_event_loop()
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=key(api_key),
            max_retries=retries,
            timeout=timeout,
        )
        self._thread = threading.Thread(
            target=_run, args=(self._loop, self._client), name="pastalm-openai", daemon=True
        )
        self._thread.start()
        # must not wait: the garbage collector may run in the thread that is to end
        self.stop = weakref.finalize(self, _stop, self._loop)

    def open(self, body: dict[str, Any], wire: Wire) -> tuple[int, Future[None]]:
        """Starts a completion. Returns its number in the inbox, and a future that cancels it."""
        number = next(self._numbers)
        return number, asyncio.run_coroutine_threadsafe(self._read(number, body, wire), self._loop)

    def ask(self, call: Callable[[openai.AsyncOpenAI], Any]) -> Any:
        """Makes one call of the client, without retries, and returns its result. Raises what the client raises."""
        client = self._client.with_options(max_retries=0)

        async def waited() -> Any:
            return await call(client)

        return asyncio.run_coroutine_threadsafe(waited(), self._loop).result()

    def close(self) -> None:
        """Ends all completions and the thread. May be called again."""
        self.stop()
        self._thread.join()

    async def _read(self, number: int, body: dict[str, Any], wire: Wire) -> None:
        try:
            end = await self._stream(number, body, wire)
        except openai.OpenAIError as error:
            end = self.failure(error)
        except Exception as error:  # a bug here must not leave the driver waiting
            self.inbox.put((number, error))
            return
        self.inbox.put((number, end))

    async def _stream(self, number: int, body: dict[str, Any], wire: Wire) -> CompletionEnd:
        stream = await self._client.completions.create(model=self.model, stream=True, **body)
        async with stream:
            chunks = aiter(stream)
            last = time.monotonic()
            while True:
                try:
                    async with asyncio.timeout(max(0.0, last + self.timeout - time.monotonic())):
                        chunk = await anext(chunks, None)
                    if chunk is None:
                        return CompletionEnd(why=f"{self.base_url} broke off")
                    choices = getattr(chunk, "choices", None)
                    if not choices:
                        continue
                    choice = choices[0]
                    tokens = wire.tokens(choice)
                    end = ending(choice, tokens, wire)
                except TimeoutError:
                    return CompletionEnd(why=f"{self.base_url} said nothing for {self.timeout:g} s")
                except openai.OpenAIError as error:
                    return replace(self.failure(error), opening=False, unreachable=False)
                except (ValueError, TypeError, LookupError, AttributeError) as error:
                    return CompletionEnd(why=f"{self.base_url} gave no valid answer: {line(error)}")
                for token in tokens:
                    self.inbox.put((number, token))
                if end is not None:
                    return end
                last = time.monotonic() if tokens else last

    def failure(self, error: openai.OpenAIError) -> CompletionEnd:
        """The end of a completion whose request failed."""
        why = explain(error, self.base_url, self.timeout)
        if isinstance(error, openai.APIConnectionError):
            unreachable = not isinstance(error, openai.APITimeoutError)
            return CompletionEnd(why=why, opening=True, unreachable=unreachable)
        if isinstance(error, openai.APIStatusError):
            code = error.status_code
            return CompletionEnd(why=why, final=code < 500 and code not in (408, 409, 429), opening=True, code=code)
        return CompletionEnd(why=why, opening=True)


def _run(loop: asyncio.AbstractEventLoop, client: openai.AsyncOpenAI) -> None:
    """The thread's function: runs the loop until it is stopped, then cancels what is running."""
    try:
        loop.run_forever()
        loop.run_until_complete(_end(client))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


async def _end(client: openai.AsyncOpenAI) -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)
