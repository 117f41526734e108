"""Takes a checked request from its prompts to its deltas: the queue, limits, encoding, the engine's thread."""

from __future__ import annotations

import asyncio
import codecs
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial

from openai.types import CompletionUsage
from opentelemetry.trace import Span

from pastalm.core.params import SamplingParams
from pastalm.errors import CapabilityError, RequestError
from pastalm.llm import LLM
from pastalm.server import replies, tracing
from pastalm.server.answers import Delta, Echo
from pastalm.server.errors import Refused, bad_value
from pastalm.server.metrics import Metrics
from pastalm.server.requests import ChatRequest, CompletionRequest, PromptRequest
from pastalm.server.settings import Settings
from pastalm.server.worker import Job, Update, Worker

MOST_REFERENCE_TOKENS = 32_768
"""Of one request: the engine's thread makes a table of them, in some tenths of a second."""


class Service:
    """What all requests share.

    llm: the model.
    settings: of the server.
    worker: the engine's thread.
    metrics: of the server.
    max_model_len: tokens of a prompt and its answer together.
    unfinished: answers that have been accepted and not finished.
    """

    def __init__(self, llm: LLM, settings: Settings) -> None:
        self.llm, self.settings = llm, settings
        self.worker = Worker(llm)
        self.metrics = Metrics()
        self.unfinished = 0
        self._capabilities = llm.driver.engine.capabilities
        self.max_model_len = self._capabilities.max_model_len
        # one thread: tokenizers are not thread-safe, and a long prompt must not block the event loop
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        # its own: a schema may take seconds
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self.metrics.watch("pasta_unfinished_answers", "Answers that decode or wait.", lambda: self.unfinished)
        self.metrics.watch("pasta_running_answers", "Answers in the engine.", lambda: len(llm.driver.running))
        self.metrics.watch("pasta_live_threads", "Threads decoding at once.", lambda: self.worker.live_threads)
        self.metrics.watch("pasta_failed_steps", "Steps of the engine that failed.", lambda: self.worker.failures)

    @contextmanager
    def _places(self, answers: int) -> Iterator[None]:
        """Reserves places in the queue for some answers. Raises Refused if there are not enough."""
        most = self._capabilities.max_num_seqs + self.settings.max_queue
        if answers > most:
            raise Refused(f"this server answers at most {most} at once: lower n or send fewer prompts", param="n")
        if self.unfinished + answers > most:
            raise Refused(
                f"{self.unfinished} answers are under way, of {most}: try again later",
                status=429,
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self.unfinished += answers
        try:
            yield
        finally:
            self.unfinished -= answers

    def _parallelism(self, requested: float | None) -> float:
        """The odds of forking: those requested, else the server's, but 0 while more threads live than its target.

        There is nothing in between: a finetuned model is so sure of its tags that it still forks at 1/256 of the odds.
        """
        if requested is not None:
            return requested
        live = max(self.worker.live_threads, self.unfinished)
        return 0.0 if 0 < self.settings.thread_target < live else self.settings.parallelism

    async def _job(self, request: ChatRequest | CompletionRequest, owner: str) -> Job:
        """The job for the engine's thread. Raises Refused, RequestError, ModelError."""
        parallelism = self._parallelism(request.pasta.parallelism)
        prompts = await self.encode(request, parallelism)
        self._check_ids(request, prompts)
        self._check_processors(request.pasta.processors or ())
        max_tokens = self._max_tokens(max(map(len, prompts), default=0), request.token_limit, request.about)
        if request.min_tokens > max_tokens:
            raise bad_value(f"min_tokens is above max_tokens, {max_tokens}: lower it", "min_tokens")
        params = request.params(
            max_tokens=max(1, max_tokens),
            logprobs=request.logprob_count,
            parallelism=parallelism,
            drafts=self.settings.drafts if request.pasta.drafts is None else request.pasta.drafts,
        )
        if request.form:
            await self._check_form(request, params)
        prompt_logprobs = request.logprob_count if request.echoes else None
        if prompt_logprobs is not None and not self._capabilities.prompt_logprobs:
            engine = self._capabilities.name
            message = f"the {engine} engine gives no log-probabilities of prompts: leave out echo or logprobs"
            raise bad_value(message, "echo")
        return Job(
            prompts,
            params,
            _noise(prompts, params),
            self._echoes(request, prompts) if request.echoes else [],
            prompt_logprobs,
            decodes=max_tokens > 0,
            owner=owner,
            references=await self._references(params),
        )

    async def _references(self, params: SamplingParams) -> list[Sequence[int]]:
        """Token ids of the references, encoded on the tokenizer's thread. Raises Refused."""
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(self._encoder, self.llm.driver.encode_references, params)
        if (tokens := sum(map(len, ids))) > MOST_REFERENCE_TOKENS:
            message = f"the references have {tokens} tokens, the most is {MOST_REFERENCE_TOKENS}: shorten them"
            raise bad_value(message, "pasta.references")
        return ids

    def _echoes(self, request: ChatRequest | CompletionRequest, prompts: list[list[int]]) -> list[Echo]:
        """What the answers to each prompt start with."""
        vocabulary = self.llm.loaded.vocabulary
        end_ids = vocabulary.eos.union(request.stop_token_ids or ())
        return [
            Echo(prompt if isinstance(prompt, str) else vocabulary.text(ids), ids, end_ids)
            for prompt, ids in zip(request.prompts, prompts, strict=True)
        ]

    async def encode(self, request: PromptRequest, parallelism: float = 1.0) -> list[list[int]]:
        """Token ids of a request's prompts. Encodes on the tokenizer's thread. Raises Refused, ModelError."""
        loop = asyncio.get_running_loop()
        try:
            rendering = request.rendering()
        except RequestError as error:
            raise bad_value(str(error), "chat_template_kwargs") from None
        params = self._form(request, parallelism)
        encode = partial(self.llm.encode, rendering=rendering, add_special_tokens=request.add_special_tokens)
        try:
            ids = [await loop.run_in_executor(self._encoder, encode, prompt, params) for prompt in request.prompts]
        except RequestError as error:
            raise bad_value(str(error), request.about) from None
        return ids

    def _form(self, request: PromptRequest, parallelism: float) -> SamplingParams:
        """The sampling parameters that a prompt depends on. Raises Refused."""
        try:
            return SamplingParams(parallelism=parallelism, **request.form)
        except RequestError as error:
            raise bad_value(str(error), request.form_field) from None

    async def _check_form(self, request: PromptRequest, params: SamplingParams) -> None:
        """Compiles the grammar of the answers on a thread of its own, so that it is at hand for the engine's.

        Raises Refused if the form of the answers cannot be held, or max_tokens is less than they need.
        """
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._compiler, self.llm.driver.check_form, params)
        except RequestError as error:
            param = "max_tokens" if str(error).startswith("max_tokens") else request.form_field
            raise bad_value(str(error), param) from None

    async def spell(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token, special tokens included. Raises Refused."""
        self.check_ids(token_ids, "tokens")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoder, self._spellings, token_ids)

    def _spellings(self, token_ids: Sequence[int]) -> list[str]:
        special = self.llm.loaded.tokenizer.added_tokens_decoder
        vocabulary = self.llm.loaded.vocabulary
        reader = codecs.getincrementaldecoder("utf-8")(errors="replace")
        strings = []
        for i, token in enumerate(token_ids):
            piece = vocabulary.piece(token)
            spelling = "" if piece or token not in special else str(special[token].content)
            strings.append(spelling or reader.decode(piece, final=i == len(token_ids) - 1))
        return strings

    def check_ids(self, token_ids: Iterable[int], param: str) -> None:
        """Raises Refused for ids outside the vocabulary, or if a server runs the model and its ids are unknown."""
        size = self.llm.loaded.vocabulary.size
        if size == sys.maxsize:
            raise bad_value("this server's model takes prompts as text, its token ids are unknown: send text", param)
        if (unknown := next((i for i in token_ids if not 0 <= i < size), None)) is not None:
            raise bad_value(f"token id {unknown} is outside the model's vocabulary of {size}", param)

    def _check_ids(self, request: ChatRequest | CompletionRequest, prompts: list[list[int]]) -> None:
        if not all(prompts):
            raise bad_value("the prompt is empty: give some text", request.about)
        if request.logit_bias and self.llm.loaded.vocabulary.size < sys.maxsize:
            self.check_ids(map(int, request.logit_bias), "logit_bias")
        if request.stop_token_ids:
            self.check_ids(request.stop_token_ids, "stop_token_ids")
        if any(isinstance(prompt, list) and isinstance(prompt[0], int) for prompt in request.prompts if prompt):
            self.check_ids((i for prompt in prompts for i in prompt), "prompt")

    def _check_processors(self, names: Iterable[str]) -> None:
        allowed = self.settings.logits_processors
        if (unknown := next((name for name in names if name not in allowed), None)) is not None:
            offered = ", ".join(allowed) or "none: it was started without --logits-processors"
            raise bad_value(f"this server allows no logits processor {unknown!r}, but {offered}", "pasta.processors")

    def check_model(self, model: str | None) -> None:
        """Raises Refused if the request names another model than the one served."""
        if model not in (None, self.settings.name):
            raise Refused(
                f"there is no model {model!r} here, only {self.settings.name!r}",
                status=404,
                code="model_not_found",
                param="model",
            )

    def _max_tokens(self, prompt: int, requested: int | None, about: str) -> int:
        """The limit on new tokens: the requested one, else the server's or what the context has left. Raises Refused.

        prompt: tokens of the longest prompt.
        requested: the request's limit.
        about: the field of the prompts, for the error.
        """
        room = self._capabilities.max_model_len
        most = min(self.settings.max_prompt_tokens or room, room - 1)
        if prompt > most:
            message = f"the prompt has {prompt} tokens, the most is {most}: shorten it"
        elif requested is not None and prompt + requested > room:
            message = f"the prompt's {prompt} tokens and max_tokens {requested} exceed {room}: lower one"
        else:
            return min(self.settings.max_tokens, room - prompt) if requested is None else requested
        raise Refused(message, code="context_length_exceeded", param="max_tokens" if prompt <= most else about)

    async def _accepted(self, running: RunningRequest, request: ChatRequest | CompletionRequest) -> None:
        """Waits until the engine has accepted a request. Raises PastaError, TimeoutError."""
        try:
            await running.accepted()
        except CapabilityError as error:
            if "schema" not in str(error):
                raise
            message = f"{request.form_field} is not supported here: {error}"
            raise bad_value(message, request.form_field) from None

    @asynccontextmanager
    async def running(self, request: ChatRequest | CompletionRequest, owner: str) -> AsyncIterator[RunningRequest]:
        """A request in the engine. At the end, for whatever reason, its places and its slots are freed.

        owner: from `gate.owner`.

        Raises PastaError, TimeoutError.
        """
        started = time.perf_counter()
        self.check_model(request.model)
        if not request.prompts:
            raise Refused("prompt is empty: give at least one", param="prompt")
        with self._places(len(request.prompts) * request.n):
            job = await self._job(request, owner)
            operation = "chat" if isinstance(request, ChatRequest) else "text_completion"
            with tracing.span(operation, self.settings.name, job.params) as span:
                self.worker.submit(job)
                try:
                    running = RunningRequest(job, self, started)
                    await self._accepted(running, request)
                    yield running
                    running.describe(span)
                finally:
                    self.worker.drop(job)


class RunningRequest:
    """A request in the engine.

    answers: one for each choice, in the order of the reply.
    """

    def __init__(self, job: Job, service: Service, started: float) -> None:
        self.answers = job.answers
        self._prompt_tokens, self._model = sum(map(len, job.prompts)), service.settings.name
        self._job, self._started, self._metrics = job, started, service.metrics
        self._deadline = asyncio.get_running_loop().time() + service.settings.timeout
        self._first: Update | None = None

    async def accepted(self) -> None:
        """Waits until the engine has accepted the request. Raises PastaError, TimeoutError."""
        self._first = await self._next()

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Index and delta of each step of each choice, until all have ended. Raises EngineError, TimeoutError."""
        has_text, unfinished = False, len(self.answers)
        while unfinished:
            (index, delta), self._first = self._first or await self._next(), None
            if delta.text and not has_text:
                has_text = True
                self._metrics.first_text.observe(time.perf_counter() - self._started)
            unfinished -= delta.finish_reason is not None
            yield index, delta
        self._metrics.seconds.observe(time.perf_counter() - self._started)
        self._metrics.answered(self._prompt_tokens, self.answers)

    async def _next(self) -> Update:
        async with asyncio.timeout_at(self._deadline):
            return await self._job.next()

    def describe(self, span: Span) -> None:
        """Sets the span's attributes for the answers."""
        tracing.answered(span, self._model, self._prompt_tokens, self.answers)

    def usage(self) -> CompletionUsage:
        """Counts of tokens, of finished answers."""
        return replies.usage(self._prompt_tokens, self.answers, self._job.params.parallelism)


def _noise(prompts: list[list[int]], params: SamplingParams) -> list[tuple[int, int]]:
    """For each prompt its seed and the number of its first choice.

    If a prompt occurs twice, its choices are numbered on, as with a larger n. A prompt gets the same answer as in a
    request of its own with the same seed.
    """
    seeds: dict[tuple[int, ...], int] = {}
    times: Counter[tuple[int, ...]] = Counter()
    noise = []
    for prompt in map(tuple, prompts):
        seed = seeds.setdefault(prompt, random.getrandbits(63) if params.seed is None else params.seed)
        noise.append((seed, times[prompt] * params.n))
        times[prompt] += 1
    return noise
