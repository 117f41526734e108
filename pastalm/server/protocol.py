"""What clients send and get: OpenAI's requests, checked, and OpenAI's replies, built.

A field of OpenAI's that is not here is refused by its name, unless it is null or has the value that means what
happens anyway (`neutral`). The replies are the openai package's own types; what is PASTA's stands on them as one
more key, `pasta`, which other clients ignore.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    chat_completion,
)
from openai.types.chat import chat_completion_chunk as chunk_types
from openai.types.completion_choice import Logprobs
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pastalm.engine import SamplingParams
from pastalm.errors import PastaError
from pastalm.events import Decoded, Event, to_json
from pastalm.transcript import Transcript
from pastalm.vocabulary import Vocabulary

UNLIKELY = -9999.0
"""OpenAI's word for a log-probability that JSON cannot write."""


class Refused(PastaError):
    """An error as clients get it: an HTTP status, OpenAI's code, the field it is about, headers."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        said = str(self).encode("utf-8", "replace").decode()  # a lone surrogate that a client sent
        return {"error": {"message": said, "type": kind, "param": self.param, "code": self.code}}


# ------------------------------------------------------------------------------ requests


def _unicode(text: str) -> str:
    """JSON can spell half a character, which nothing can encode."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half a character (a lone surrogate) is no text")
    return text


_Text = Annotated[str, AfterValidator(_unicode)]


class _Checked(BaseModel):
    """No field is converted, and none that is unknown is taken; null is as good as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """Values of fields that are not supported which change nothing."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if v is not None and v not in cls.neutral.get(k, ())}


class TextPart(_Checked):
    """A part of a message."""

    type: Literal["text"]
    text: _Text


class Message(_Checked):
    """One message of a conversation."""

    neutral = {"annotations": [[]], "tool_calls": [[]]}
    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[TextPart]

    def rendered(self) -> dict[str, str]:
        """As a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Checked):
    """What a stream carries beside the text."""

    neutral = {"include_obfuscation": [False]}
    include_usage: bool = False


class PastaOptions(_Checked):
    """What only this server understands. parallelism: the odds of forking are multiplied by it, 0 turns forking
    off; given, it is not lowered under load. events: the chunks of a stream carry the threads' events."""

    parallelism: float | None = Field(default=None, ge=0)
    events: bool = False


class _Sampled(_Checked):
    model: str
    n: int = Field(default=1, ge=1, le=128)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=2**31)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    pasta: PastaOptions = PastaOptions()

    @model_validator(mode="after")
    def _together(self) -> _Sampled:
        if len(self.stops) > 4 or not all(1 <= len(stop) <= 256 for stop in self.stops):
            raise ValueError("stop must be at most 4 texts of 1 to 256 characters")
        bias = self.logit_bias or {}
        if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in bias):
            raise ValueError("the keys of logit_bias must be token ids")
        if not all(-100 <= value <= 100 for value in bias.values()):
            raise ValueError("the values of logit_bias must be in -100..100")
        if not self.stream and (self.pasta.events or self.stream_options.include_usage):
            raise ValueError("stream_options.include_usage and pasta.events need stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def params(self, *, max_tokens: int, logprobs: int | None, parallelism: float) -> SamplingParams:
        """How it is sampled. Raises RequestError."""
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=self.stops,
            max_tokens=max_tokens,
            logprobs=logprobs,
            logit_bias={int(key): value for key, value in (self.logit_bias or {}).items()},
            parallelism=parallelism,
        )


_NO_PENALTY = {"frequency_penalty": [0], "presence_penalty": [0]}


class ChatRequest(_Sampled):
    """`POST /v1/chat/completions`."""

    neutral = {
        **_NO_PENALTY,
        "response_format": [{"type": "text"}],
        "modalities": [["text"]],
        "service_tier": ["auto", "default"],
        "store": [False],
        "tools": [[]],
        "tool_choice": ["none"],
    }
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def prompts(self) -> list[Any]:
        return [[message.rendered() for message in self.messages]]

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(_Sampled):
    """`POST /v1/completions`: raw prompts, as text or as token ids."""

    neutral = {**_NO_PENALTY, "echo": [False], "best_of": [1], "suffix": [""]}
    prompt: _Text | list[_Text] | list[int] | list[list[int]]
    max_tokens: int = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def prompts(self) -> list[Any]:
        single = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if single else list(self.prompt)

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


def refusal(errors: Sequence[Mapping[str, Any]]) -> Refused:
    """What is wrong with a body, as one error: a field that is not supported comes first."""
    worst = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    where = [str(part) for part in worst["loc"] if part != "body"]
    param = ".".join(where) or None
    if worst["type"] == "extra_forbidden":
        said = f"{param} is not supported by this server: leave it out"
        return Refused(said, code="unsupported_parameter", param=param)
    if worst["type"] == "json_invalid":
        return Refused("the body is not JSON", code="invalid_json")
    said = str(worst["msg"]).removeprefix("Value error, ")
    return Refused(f"{param}: {said}" if param else said, code="invalid_value", param=param)


# ------------------------------------------------------------------------------ answers


Scored = tuple[int, Decoded]
"""A token of the text, and the character at which it begins."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What a client can append. finish_reason: once nothing more comes."""

    text: str
    scored: list[Scored]
    events: list[Event]
    finish_reason: str | None


@dataclass(slots=True)
class Answer:
    """One answer, folded from its events. What its deltas hold is in document order, and together it is the text:
    it goes through the first unfinished chunk, and never past what may begin a stop string."""

    stops: tuple[str, ...] = ()
    transcript: Transcript = field(default_factory=Transcript)
    _characters: int = 0
    _tokens: int = 0

    def take(self, events: list[Event]) -> Delta:
        """What some events, all of one step, made certain."""
        for event in events:
            self.transcript.apply(event)
        text = self.transcript.certain(self.stops, start=self._characters)
        self._characters += len(text)
        end = math.inf if self.transcript.finished else self._characters
        scored = self.transcript.scored_from(self._tokens, end=end)
        self._tokens += len(scored)
        return Delta(text, scored, events, self.transcript.finish_reason)


def usage(prompt_tokens: int, answers: Sequence[Answer], fork_odds: float) -> CompletionUsage:
    """Tokens in and out. `pasta`: what each choice took, and the odds of forking that were applied."""
    each = [answer.transcript for answer in answers]
    tokens = sum(t.tokens for t in each)
    return CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=tokens,
        total_tokens=prompt_tokens + tokens,
        pasta={
            "fork_odds": fork_odds,
            "choices": [
                {
                    "tokens": t.tokens,
                    "critical_path": t.critical_path,
                    "parallelism": round(t.parallelism, 4),
                    "steps": t.steps,
                    "threads": len(t.threads),
                }
                for t in each
            ],
        },
    )


@dataclass(frozen=True, slots=True)
class ChatReply:
    """Builds the replies to one chat request."""

    model: str
    vocabulary: Vocabulary
    with_logprobs: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer], used: CompletionUsage) -> ChatCompletion:
        """The reply of a request that does not stream."""
        choices = [
            chat_completion.Choice.construct(
                index=i,
                message=ChatCompletionMessage.construct(role="assistant", content=a.transcript.text),
                finish_reason=a.transcript.finish_reason,
                logprobs=self._logprobs(list(a.transcript.scored())),
            )
            for i, a in enumerate(answers)
        ]
        return ChatCompletion.construct(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=choices,
            usage=used,
        )

    def opening(self, index: int) -> ChatCompletionChunk | None:
        """The chunk that says who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, index: int, delta: Delta, **more: Any) -> ChatCompletionChunk:
        """The chunk of what can be appended."""
        return self._chunk(index, {"content": delta.text}, self._logprobs(delta.scored), **more)

    def closing(self, index: int, finish_reason: str) -> ChatCompletionChunk:
        """The chunk that says why a choice ended."""
        return self._chunk(index, {}, finish_reason=finish_reason)

    def used(self, used: CompletionUsage) -> ChatCompletionChunk:
        """The chunk of the usage."""
        return self._of([], usage=used)

    def _chunk(
        self, index: int, delta: dict[str, str], logprobs: Any = None, finish_reason: str | None = None, **more: Any
    ) -> ChatCompletionChunk:
        choice = chunk_types.Choice.construct(
            index=index,
            delta=chunk_types.ChoiceDelta.construct(**delta),
            logprobs=logprobs,
            finish_reason=finish_reason,
        )
        return self._of([choice], **more)

    def _of(self, choices: list[Any], **more: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk.construct(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=choices,
            **more,
        )

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        return {
            "content": [
                {
                    **self._token(token.token, token.logprob),
                    "top_logprobs": [self._token(*each) for each in token.top_logprobs],
                }
                for _, token in scored
            ]
        }

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        piece = self.vocabulary.piece(token)
        return {
            "token": piece.decode("utf-8", "replace"),
            "logprob": _finite(logprob),
            "bytes": list(piece),
        }


@dataclass(frozen=True, slots=True)
class CompletionReply:
    """Builds the replies to one completion request; a chunk is of the same type as the whole."""

    model: str
    vocabulary: Vocabulary
    with_logprobs: bool
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer], used: CompletionUsage) -> Completion:
        """The reply of a request that does not stream."""
        choices = [
            self._choice(i, a.transcript.text, list(a.transcript.scored()), a.transcript.finish_reason)
            for i, a in enumerate(answers)
        ]
        return self._of(choices, usage=used)

    def opening(self, index: int) -> Completion | None:
        """Completions begin with text."""
        return None

    def chunk(self, index: int, delta: Delta, **more: Any) -> Completion:
        """The chunk of what can be appended."""
        return self._of([self._choice(index, delta.text, delta.scored, None)], **more)

    def closing(self, index: int, finish_reason: str) -> Completion:
        """The chunk that says why a choice ended."""
        return self._of([self._choice(index, "", [], finish_reason)])

    def used(self, used: CompletionUsage) -> Completion:
        """The chunk of the usage."""
        return self._of([], usage=used)

    def _choice(
        self, index: int, text: str, scored: Sequence[Scored], finish_reason: str | None
    ) -> CompletionChoice:
        return CompletionChoice.construct(
            index=index, text=text, finish_reason=finish_reason, logprobs=self._logprobs(scored)
        )

    def _of(self, choices: list[Any], **more: Any) -> Completion:
        return Completion.construct(
            id=self.id,
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=choices,
            **more,
        )

    def _logprobs(self, scored: Sequence[Scored]) -> Logprobs | None:
        if not self.with_logprobs:
            return None
        return Logprobs.construct(
            text_offset=[at for at, _ in scored],
            tokens=[self.vocabulary.text([token.token]) for _, token in scored],
            token_logprobs=[_finite(token.logprob) for _, token in scored],
            top_logprobs=[
                {self.vocabulary.text([i]): _finite(p) for i, p in reversed(token.top_logprobs)} for _, token in scored
            ],
        )


def _finite(logprob: float | None) -> float:
    return UNLIKELY if logprob is None else max(logprob, UNLIKELY)


def line(reply: BaseModel) -> str:
    """JSON, without the fields that were never given."""
    return reply.model_dump_json(exclude_unset=True)


def events_key(events: Sequence[Event]) -> dict[str, Any]:
    """The extra key of a chunk that carries events; each is a line of a trace."""
    return {"pasta": {"events": [json.loads(to_json(event)) for event in events]}}
