"""LLM: prompts in, answers out. The driver loop between an engine and the interpreters of its requests.

`Driver` is that loop and nothing else: it stamps events, applies them to engine and transcript, watches
for stop strings, and hands them on. `LLM` loads a model, encodes prompts and collects outputs.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from pastalm import loading
from pastalm.engine import Engine, Request, SamplingParams
from pastalm.errors import ModelError, RequestError, check_text
from pastalm.events import Event, Finished, FinishReason, Path, stamp
from pastalm.interpreter import Interpreter, Limits
from pastalm.lang import Sync
from pastalm.layout import Policy
from pastalm.models import EMBEDDED
from pastalm.transcript import Transcript, begins
from pastalm.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pastalm.models import Loaded, Rendering

Message: TypeAlias = "Mapping[str, str]"
Prompt: TypeAlias = "str | Sequence[int]"


@dataclass(slots=True)
class Running:
    """A response that is being decoded. searched: characters of its settled text in which no stop string begins and
    ends. free: how many parts of the main thread are too early for stop strings (None: all so far). ended: chunks
    that a stop token ended, and after how many parts."""

    request: Request
    interpreter: Interpreter
    transcript: Transcript = field(default_factory=Transcript)
    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    searched: int = 0
    free: int | None = None
    ended: dict[Path, int] = field(default_factory=dict)

    def note(self) -> None:
        """Takes in what the interpreter says of ends, after the events of which it says it."""
        params, threads = self.request.params, self.transcript.threads
        if self.free is None and self.interpreter.written >= params.min_tokens:
            self.free = len(threads[()].parts) if params.min_tokens else 0
        for path in filter(None, self.interpreter.stopped):
            if path not in self.ended and threads[path].state == "done":
                last = threads[path].parts[-1:]
                self.ended[path] = len(threads[path].parts) - (last == ["\n"])  # what the end of a chunk forces

    def stopped(self) -> int | None:
        """Where the answer is to be cut: where a stop token stood or the first stop string begins in the text that is
        certain, if one does and no other may yet turn out to begin before it."""
        ends = (place(self.transcript, path, parts) for path, parts in self.ended.items())
        end = min((at for at in ends if at is not None), default=None)
        found = self._string(end)
        return end if found is None else found

    def _string(self, end: int | None) -> int | None:
        """Where the first stop string begins in the text before character `end`. Looks at what is new alone."""
        strings = self.request.params.stop_strings
        if not strings or self.free is None:
            return None
        early = place(self.transcript, (), self.free) if self.free else 0
        if early is None:
            return None
        self.searched = max(self.searched, early)
        start = max(0, self.searched - max(map(len, strings)) + 1)
        text = self.transcript.settled_from(start)[: None if end is None else end - start]
        known = self.searched - start
        self.searched = start + len(text)
        places = (text.find(s, max(0, known - len(s) + 1)) for s in strings)
        found = min((at for at in places if at >= 0), default=None)
        over = self.transcript.finished or end is not None
        if found is None or not over and min(_may_begin(text, s, known) for s in strings) < found:
            return None
        return start + found


def _may_begin(text: str, stop: str, known: int) -> int:
    """Where a stop string begins, or may, that does not end in the first `known` characters."""
    start = max(0, known - len(stop) + 1)
    return start + begins(text[start:], stop)


def place(transcript: Transcript, path: Path, parts: int) -> int | None:
    """Characters of the text before part number `parts` of a thread; None while what stands before it may grow."""
    at: int = 0
    here: Path = ()
    while True:
        for i, part in enumerate(transcript.threads[here].parts):
            if here == path and i == parts:
                return at
            if not isinstance(part, tuple):
                at += 0 if isinstance(part, Sync) else len(part if isinstance(part, str) else part.text)
            elif path[: len(part)] == part:
                here = part
                break
            else:
                within = [t for p, t in transcript.threads.items() if p[: len(part)] == part]
                if any(thread.state != "done" for thread in within):
                    return None
                at += sum(len(thread.text) for thread in within)
        else:
            return at


class Driver:
    """Many responses over one engine: submit, step until nothing is unfinished, cancel at any time."""

    def __init__(
        self, engine: Engine, vocabulary: Vocabulary, *, limits: Limits | None = None
    ) -> None:
        limits = limits or Limits()
        if limits.max_position is None:
            limits = replace(limits, max_position=engine.capabilities.max_position)
        self.engine = engine
        self.vocabulary = vocabulary
        self.limits = limits
        self.running: dict[str, Running] = {}
        self._ids = count()

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        choice: int = 0,
        seed: int | None = None,
        positions: Policy = "promised",
    ) -> tuple[Running, list[Event]]:
        """Takes a prompt; the response and the event that begins it.

        Raises RequestError for a prompt that is empty or too long, CapabilityError for what the engine
        does not offer.
        """
        bias = dict(params.logit_bias or {})
        tags = self.vocabulary.tags
        if tags is not None and params.parallelism not in (0, 1):
            bias[tags.promise] = bias.get(tags.promise, 0.0) + math.log(params.parallelism)
        chosen = params.seed if seed is None else seed
        request = Request(
            id=str(next(self._ids)),
            prompt_token_ids=tuple(prompt_token_ids),
            params=params,
            seed=random.getrandbits(63) if chosen is None else chosen,
            choice=choice,
            logit_bias=bias,
            positions=positions,
        )
        interpreter = Interpreter(
            self.vocabulary,
            max_tokens=params.max_tokens,
            prompt_length=len(request.prompt_token_ids),
            limits=self.limits,
            parallelism=params.parallelism,
            ignore_eos=params.ignore_eos,
            min_tokens=params.min_tokens,
            stop_token_ids=params.stop_token_ids or (),
        )
        self.engine.add(request)
        running = Running(request, interpreter)
        self.running[request.id] = running
        return running, self._take(running, interpreter.start())

    def step(self) -> list[tuple[Running, Event]]:
        """One step of the engine; every event that followed, in order.

        Raises EngineError, or what else went wrong; every response is cancelled then, and the driver can
        be used again.
        """
        try:
            return self._step()
        except Exception:
            for running in list(self.running.values()):
                self.cancel(running)
            raise

    def _step(self) -> list[tuple[Running, Event]]:
        sampled = self.engine.step()
        for request_id in {s.request_id for s in sampled}:
            self.running[request_id].steps += 1
        happened: list[tuple[Running, Event]] = []
        for token in sampled:
            if token.request_id in self.running:
                running = self.running[token.request_id]
                events = self._take(running, running.interpreter.advance(token))
                happened += [(running, event) for event in events]
        return happened

    def cancel(self, running: Running) -> list[Event]:
        """Ends a response now; its slots are free at once."""
        if running.request.id not in self.running:
            return []
        events = self._take(running, running.interpreter.finish("abort"))
        self.engine.cancel(running.request.id)
        return events

    def _take(self, running: Running, events: list[Event]) -> list[Event]:
        """Stamps events, applies them to transcript and engine, and ends all at a stop string."""
        batch = self._note(running, events)
        running.note()
        cut = running.stopped()
        if cut is not None:
            batch += self._note(running, running.interpreter.finish("stop"))
            last, end = max(
                ((i, e) for i, e in enumerate(batch) if isinstance(e, Finished)),
                key=lambda found: found[0],
            )
            batch[last] = replace(end, cut=cut)
            running.transcript.cut(cut)
        for event in batch:
            self.engine.apply(running.request.id, event)
        if running.interpreter.finished:
            self.running.pop(running.request.id, None)
        return batch

    @staticmethod
    def _note(running: Running, events: list[Event]) -> list[Event]:
        seconds = time.perf_counter() - running.started
        for event in events:
            stamp(event, running.steps, seconds)
            running.transcript.apply(event)
        return events


T = TypeVar("T")
Task: TypeAlias = Generator[Sequence[Running], None, T]
"""Submits responses, yields them, is resumed when all of them have ended, and so on; returns what it made of them."""


def at_once(driver: Driver, tasks: Iterable[Task[T]], most: int) -> Generator[T | RequestError, None, None]:
    """What tasks return, in the order in which they end, `most` of them under way at once; of a task that is refused,
    its RequestError. What is still under way is cancelled when the iterator is closed. Raises as `Driver.step`."""
    todo, waiting = iter(tasks), dict[Task[T], Sequence[Running]]()

    def go_on(task: Task[T]) -> Iterator[T | RequestError]:
        waiting.pop(task, None)
        try:
            waiting[task] = next(task)
        except StopIteration as ended:
            yield ended.value
        except RequestError as error:
            yield error

    try:
        while True:
            while len(waiting) < most and (task := next(todo, None)) is not None:
                yield from go_on(task)
            if not waiting:
                return
            driver.step()
            for task in [t for t, phase in waiting.items() if all(r.transcript.finished for r in phase)]:
                yield from go_on(task)
    finally:
        for running in [r for phase in waiting.values() for r in phase]:
            driver.cancel(running)


# ------------------------------------------------------------------------------ what users call


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer. token_ids: linear order, tags too. logprobs: one {token id: log-probability} a
    token of the text, in document order, if they were asked for."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: list[dict[int, float]] | None
    finish_reason: FinishReason | None
    transcript: Transcript


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answers to one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    finished: bool = True


class Stream:
    """One answer as it is decoded: iterate over its events; `transcript` has what is known so far.

    interrupted: asked before every step; the answer is cancelled once it says yes, also where nothing comes.
    """

    def __init__(self, driver: Driver, running: Running, first: list[Event]) -> None:
        self._driver, self._running, self._held = driver, running, first
        self.interrupted: Callable[[], bool] = lambda: False

    @property
    def transcript(self) -> Transcript:
        return self._running.transcript

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self._running.request.prompt_token_ids

    def __iter__(self) -> Iterator[Event]:
        while True:
            held, self._held = self._held, []
            yield from held
            if self.transcript.finished and not self._held:
                return
            if self.interrupted():
                self.cancel()
                continue
            self._held += [e for r, e in self._driver.step() if r is self._running]

    def cancel(self) -> list[Event]:
        """Ends the answer now; the events of its end, which also come from the iterator."""
        events = self._driver.cancel(self._running)
        self._held += events
        return events


class LLM:
    """A model that answers asynchronously.

    model: the embedded model's name, a hub name, a folder, or a GGUF file. engine: native, transformers or llama.cpp;
    "auto" is native on a CPU, wherever that can run the model (`loading`, docs/engines.md). adapter: "auto" takes the
    one that ships for this model, None none, else a folder. dtype: of the weights; q8_0 and q4_0 are native's, "auto"
    is what each engine is good at. positions: the policy of layout.py (None: the engine's first). max_num_seqs:
    responses at once; more wait. max_model_len: slots each may fill (None: the model's, 4096 at most). compiled: steps
    of one response as torch.compile makes them on a CPU, faster after minutes (transformers). trust_remote_code: code that comes
    with the model may run. A context manager, which closes it. Raises ModelError, CapabilityError, RequestError.
    """

    def __init__(
        self,
        model: str = EMBEDDED,
        *,
        engine: str = "auto",
        adapter: str | None = "auto",
        dtype: str = "auto",
        device: str = "cpu",
        positions: Policy | None = None,
        limits: Limits | None = None,
        max_num_seqs: int = 8,
        max_model_len: int | None = None,
        compiled: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        options = loading.Options(
            engine=engine,
            adapter=adapter,
            dtype=dtype,
            device=device,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            compiled=compiled,
            trust_remote_code=trust_remote_code,
        )
        loaded, made = loading.load(model, options)
        self._begin(made, loaded, positions, limits)

    @classmethod
    def over(
        cls,
        engine: Engine,
        loaded: Loaded,
        *,
        positions: Policy | None = None,
        limits: Limits | None = None,
    ) -> LLM:
        """One over an engine that was made elsewhere. loaded: its vocabulary and tokenizer."""
        made = cls.__new__(cls)
        made._begin(engine, loaded, positions, limits)
        return made

    @classmethod
    def remote(
        cls,
        base_url: str,
        model: str | None = None,
        *,
        tokenizer: str | None = None,
        prompted: bool = False,
        positions: Policy | None = None,
        limits: Limits | None = None,
        **options: Any,
    ) -> LLM:
        """One over a server of OpenAI's completions API: vLLM, SGLang, llama.cpp's (docs/engines.md).

        model: its name there (None: the only one). tokenizer: where its tokenizer and chat template are, a hub name or
        a folder (None: the model's name; where there is none by it, only raw prompts can be sent, as text). prompted:
        the model was not finetuned and is taught the tags in its system message. options: of
        `engines.openai.connect`. Raises RemoteError, ModelError.
        """
        from pastalm import models
        from pastalm.engines.openai import connect

        found: list[Loaded] = []

        def vocabulary(served: str) -> Vocabulary | None:
            try:
                found.append(models.load_tokenizer(tokenizer or served, prompted=prompted))
            except ModelError:
                if tokenizer:
                    raise
                return None
            return found[0].vocabulary

        engine = connect(base_url, model, vocabulary=vocabulary, **options)
        spoken = engine.wire.vocabulary
        if not found:
            words: Any = models.TextTokenizer(None, spoken.encode)
            teaching = models.TEACHING if prompted else None
            loaded = models.Loaded(engine.connection.model, None, words, spoken, False, None, 2048, teaching)
        elif spoken is found[0].vocabulary:
            loaded = found[0]
        else:
            loaded = models.in_pieces(found[0], spoken)
        return cls.over(engine, loaded, positions=positions, limits=limits)

    def _begin(
        self, engine: Engine, loaded: Loaded, positions: Policy | None, limits: Limits | None
    ) -> None:
        self.positions: Policy = positions or engine.capabilities.positions[0]
        self._parts: tuple[Loaded, Driver] | None = (loaded, Driver(engine, loaded.vocabulary, limits=limits))

    def _open(self) -> tuple[Loaded, Driver]:
        if self._parts is None:
            raise RequestError("this LLM was closed: make another")
        return self._parts

    @property
    def loaded(self) -> Loaded:
        """The model and what goes with it. Raises RequestError once it is closed."""
        return self._open()[0]

    @property
    def driver(self) -> Driver:
        """What it decodes with. Raises RequestError once it is closed."""
        return self._open()[1]

    def close(self) -> None:
        """Cancels what decodes, and frees cache and weights where Python does not; may be called again."""
        if self._parts is None:
            return
        (loaded, driver), self._parts = self._parts, None
        for running in list(driver.running.values()):
            driver.cancel(running)
        for part in (driver.engine, loaded.model):
            if (close := getattr(part, "close", None)) is not None:
                close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Completes raw prompts (text, or token ids), all at once; outputs in their order."""
        if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
            raise RequestError(f"prompts are texts or lists of token ids, not {type(prompts).__name__}")
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        each: Sequence[Any] = [prompts] if single else prompts
        return self._run([self._encode(p) for p in each], params or SamplingParams(), list(each))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several at once, through the model's chat template."""
        params = params or SamplingParams()
        single = not messages or isinstance(messages, str | bytes | Mapping) or isinstance(messages[0], Mapping)
        many: Sequence[Any] = [messages] if single else messages
        return self._run([self._conversation(m, params) for m in many], params, [None] * len(many))

    def stream(
        self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None
    ) -> Stream:
        """Decodes one answer and hands on its events as they happen (n must be 1)."""
        params = params or SamplingParams()
        if params.n != 1:
            raise RequestError("a stream decodes one answer; n must be 1")
        return Stream(self.driver, *self.submit(prompt, params))

    def submit(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams,
        *,
        choice: int = 0,
        seed: int | None = None,
    ) -> tuple[Running, list[Event]]:
        """Hands one answer to the driver, whose `step` decodes it beside all others; as `Driver.submit`.
        choice, seed: what its randomness hangs on (SPEC "Threads"). Raises RequestError, CapabilityError."""
        ids = self.encode(prompt, params)
        return self.driver.submit(ids, params, choice=choice, seed=seed, positions=self.positions)

    def encode(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams,
        *,
        rendering: Rendering | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Token ids of a raw prompt, or of a conversation as the chat template has it. rendering: of a conversation.
        add_special_tokens: whether a raw prompt begins with what the tokenizer puts before a text. Raises
        RequestError, ModelError."""
        chat = isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        if chat:
            return self._conversation(prompt, params, rendering)
        return self._encode(prompt, add_special_tokens)  # type: ignore[arg-type]

    def _encode(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a raw prompt. A tag's spelling in it is text, other special tokens are themselves."""
        if not isinstance(prompt, str):
            tokens: Any = prompt
            listed = isinstance(tokens, Sequence) and not isinstance(tokens, bytes)
            if not listed or not all(isinstance(token, int) for token in tokens):
                raise RequestError(f"a prompt is text, token ids or messages, not {type(prompt).__name__}")
            return list(tokens)
        from pastalm import models

        check_text(prompt, "the prompt")
        return models.raw_prompt(
            self.loaded.tokenizer, self.loaded.vocabulary, prompt, add_special_tokens=add_special_tokens
        )

    def _conversation(
        self, messages: Any, params: SamplingParams, rendering: Rendering | None = None
    ) -> list[int]:
        """Token ids of a conversation up to where the answer begins, with the marker of sequential answers where
        the model has one and `params` asks for that, else with what the model has to be taught. Raises RequestError
        for an empty one."""
        from pastalm import models

        listed = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
        if not listed or not all(isinstance(message, Mapping) for message in messages):
            raise RequestError("messages are dictionaries, each with a role and a content")
        if not messages or not str(messages[-1].get("content", "")).strip():
            raise RequestError("the prompt is empty: say something")
        for i, message in enumerate(messages):
            for key, value in message.items():
                if isinstance(value, str):
                    check_text(value, f"{key} of message {i}")
        marker = self.loaded.sequential_marker if params.parallelism == 0 else self.loaded.teaching
        ids: list[int] = models.chat_prompt(self.loaded, messages, marker=marker, rendering=rendering)
        return ids

    def _run(
        self, prompts: list[list[int]], params: SamplingParams, texts: list[Any]
    ) -> list[RequestOutput]:
        submitted: list[list[Running]] = []
        try:
            for ids in prompts:
                seed = random.getrandbits(63) if params.seed is None else params.seed
                submitted.append([])
                for choice in range(params.n):
                    running, _ = self.driver.submit(
                        ids, params, choice=choice, seed=seed, positions=self.positions
                    )
                    submitted[-1].append(running)
            while self.driver.running:
                self.driver.step()
        finally:
            for choices in submitted:
                for running in choices:
                    self.driver.cancel(running)
        return [
            RequestOutput(
                request_id=choices[0].request.id,
                prompt=text if isinstance(text, str) else None,
                prompt_token_ids=tuple(ids),
                outputs=[_output(i, running) for i, running in enumerate(choices)],
            )
            for choices, ids, text in zip(submitted, prompts, texts, strict=True)
        ]


def _output(index: int, running: Running) -> CompletionOutput:
    transcript = running.transcript
    scores = None
    if running.request.params.logprobs is not None:
        scores = [{**dict(d.top_logprobs), d.token: d.logprob or 0.0} for d in transcript.logprobs()]
    return CompletionOutput(
        index=index,
        text=transcript.text,
        token_ids=tuple(token for _, token in transcript.linear_tokens()),
        logprobs=scores,
        finish_reason=transcript.finish_reason,
        transcript=transcript,
    )
