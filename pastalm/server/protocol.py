"""What clients send and get: OpenAI's requests, checked, and OpenAI's replies, built.

Of a field of OpenAI's or vLLM's one of four things is true. It is done as they do it. It changes nothing of the answer
and any value is taken (`_Unheeded`). It is taken with the value that means what happens anyway (`neutral`), and null is
always such a value. Else it is refused by its name. The replies are the openai package's own types; what is PASTA's
stands on them as one more key, `pasta`, which other clients ignore.
"""

from __future__ import annotations

import codecs
import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    chat_completion,
)
from openai.types.chat import chat_completion_chunk as chunk_types
from openai.types.completion_choice import Logprobs
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pastalm.core.events import Decoded, Event, SampledToken
from pastalm.core.params import Parameter, SamplingParams, parameters
from pastalm.core.transcript import Transcript
from pastalm.core.vocabulary import Vocabulary
from pastalm.errors import PastaError
from pastalm.models.chat_template import Rendering
from pastalm.records.traces import to_json

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
        message = str(self).encode("utf-8", "replace").decode()  # a lone surrogate that a client sent
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def bad_value(message: str, param: str) -> Refused:
    """A field whose value cannot be served."""
    return Refused(message, code="invalid_value", param=param)


# ------------------------------------------------------------------------------ requests


class Encoded(Protocol):
    """A request that has prompts. about: the field that they come from. add_special_tokens: of raw prompts."""

    about: ClassVar[str]

    @property
    def add_special_tokens(self) -> bool: ...

    @property
    def prompts(self) -> list[Any]: ...

    def rendering(self) -> Rendering:
        """How a conversation is rendered. Raises RequestError."""


class BadValue(PydanticCustomError):
    """A value that is refused, with the field that it is about."""

    def __new__(cls, param: str, message: str) -> BadValue:
        return super().__new__(cls, "bad_value", "{said}", {"said": message, "param": param})


def _unicode(text: str) -> str:
    """JSON can spell half a character, which nothing can encode."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half a character (a lone surrogate) is no text")
    return text


_Text = Annotated[str, AfterValidator(_unicode)]
_Token = Annotated[int, Field(ge=0, lt=2**63)]
_Object = dict[str, Any]


def _same(value: Any, other: Any) -> bool:
    """Whether JSON values are equal; true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


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
        return {k: v for k, v in value.items() if v is not None and not cls._changes_nothing(k, v)}

    @classmethod
    def _changes_nothing(cls, name: str, value: Any) -> bool:
        return any(_same(value, other) for other in cls.neutral.get(name, ()))


class TextPart(_Checked):
    """A part of a message."""

    type: str
    text: _Text
    annotations: list[Any] | None = None
    cache_control: _Object | None = None
    prompt_cache_breakpoint: _Object | None = None
    logprobs: list[Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") not in ("text", "input_text", "output_text"):
            kind = str(value.get("type"))[:40]
            raise BadValue("type", f"the model reads text only, not parts of the type {kind!r}")
        return value


class RefusalPart(_Checked):
    """A part of an assistant's message."""

    type: Literal["refusal"]
    refusal: _Text


class CalledFunction(_Checked):
    """What a tool call of an earlier answer asked for. arguments: JSON."""

    name: _Text = Field(min_length=1)
    arguments: _Text = ""


class ToolCall(_Checked):
    """A tool call of an earlier answer."""

    id: _Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


def _kind(part: Any) -> str:
    """Which kind of part a value is, or comes nearest to. Kinds are no names of fields: see `_place`."""
    if isinstance(part, str):
        return "<words>"
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return "<refusal>" if kind == "refusal" else "<text>"


_Part = Annotated[
    Annotated[_Text, Tag("<words>")] | Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(_kind),
]


_ASSISTANTS = ("tool_calls", "refusal", "reasoning", "reasoning_content", "thinking")


class Message(_Checked):
    """One message of a conversation. content: of an assistant it may be null. What `Message` has beside `role`,
    `content`, `reasoning` and tools changes nothing."""

    neutral = {"annotations": [[]], "tool_calls": [[]], "prefix": [False], "partial": [False]}
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Text | list[_Part] | None = None
    refusal: _Text | None = None
    reasoning: _Text | None = None
    reasoning_content: _Text | None = None
    thinking: _Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: _Text | None = None
    name: _Text | None = None
    type: Literal["text", "message"] | None = None
    id: str | None = None
    status: str | None = None
    annotations: list[Any] | None = None
    cache_control: _Object | None = None
    weight: float | None = None

    @model_validator(mode="after")
    def _complete(self) -> Message:
        if self.role == "tool" and self.tool_call_id is None:
            raise BadValue("tool_call_id", "a message of the role tool needs the tool_call_id that it answers")
        if self.role != "assistant":
            if self.content is None:
                raise BadValue("content", f"a message of the role {self.role} needs a content")
            if (name := next((name for name in _ASSISTANTS if getattr(self, name)), None)) is not None:
                raise BadValue(name, f"{name} is an assistant's: leave it out")
        return self

    def rendered(self) -> dict[str, Any]:
        """As a chat template takes it."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self._template_content()}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude_none=True, exclude={"index"}) for call in self.tool_calls]
        optional = {
            "tool_call_id": self.tool_call_id,
            "name": self.name,
            "reasoning_content": self.reasoning_content or self.reasoning or self.thinking,
        }
        return {**message, **{name: value for name, value in optional.items() if value is not None}}

    def _template_content(self) -> str:
        """The text; parts are lines of it, as at vLLM."""
        if self.content is None:
            return self.refusal or ""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(
            part if isinstance(part, str) else part.refusal if isinstance(part, RefusalPart) else part.text
            for part in self.content
        )


class StreamOptions(_Checked):
    """What a stream carries beside the text. include_obfuscation: nothing is padded in any case."""

    neutral = {"continuous_usage_stats": [False]}
    include_usage: bool = False
    include_obfuscation: bool | None = None


class PastaOptions(_Checked):
    """What only this server understands. parallelism: the odds of forking are multiplied by it, 0 turns forking
    off; given, it is not lowered under load. events: the chunks of a stream carry the threads' events."""

    parallelism: float | None = Field(default=None, ge=parameters()["parallelism"].ge)
    events: bool = False


class _Unheeded(_Checked):
    """Fields that change nothing of an answer here: who asks, what to store, hints for speed, and what belongs to
    ways of decoding that are refused (beams, slow tokenizers)."""

    user: str | None = None
    metadata: _Object | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: _Object | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    session_id: str | None = None
    priority: int | None = None
    stream_interval: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncation_side: Literal["left", "right"] | None = None
    return_token_offsets: bool | None = None
    return_mm_kwargs: bool | None = None
    media_io_kwargs: _Object | None = None
    mm_processor_kwargs: _Object | None = None
    cache_prompt: bool | None = None


_NOT_DONE: dict[str, Sequence[Any]] = {
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "response_format": [{"type": "text"}],
    "use_beam_search": [False],
    "skip_special_tokens": [True],
    "include_stop_str_in_output": [False],
    "bad_words": [[]],
    "watermarking": [False],
    "truncate_prompt_tokens": [-1],
    "thinking_token_budget": [-1],
    "return_tokens_as_token_ids": [False],
    "return_token_ids": [False],
    "return_prompt_text": [False],
    "routed_experts_prompt_start": [0],
    "vllm_xargs": [{}],
    "kv_transfer_params": [{}],
    "ec_transfer_params": [{}],
    "no_stop_trim": [False],
    "return_hidden_states": [False],
    "typical_p": [1],
    "mirostat": [0],
}


OTHER_FORM = ("stop", "max_tokens", "logprobs", "logit_bias", "stop_token_ids", "parallelism")
"""Sampling parameters that a request has in a form or place of its own: written out below."""
_SAME_FORM = {name: row for name, row in parameters().items() if name not in OTHER_FORM}
"""The others, whose fields are made from their rows of the table."""


def _sampling_field(row: Parameter) -> tuple[Any, Any]:
    """Type and bounds of a field."""
    lowest = row.ge if row.served_ge is None else row.served_ge
    highest = row.le if row.served_le is None else row.served_le
    return row.kind, Field(default=row.default, description=row.help, gt=row.gt, ge=lowest, le=highest)


if TYPE_CHECKING:

    class _Sampling(_Unheeded):
        """What the code below reads by name; see `_SAME_FORM`."""

        n: int
        min_tokens: int
else:
    _fields = {name: _sampling_field(row) for name, row in _SAME_FORM.items()}
    _Sampling = create_model("_Sampling", __base__=_Unheeded, __module__=__name__, **_fields)


class _Sampled(_Sampling):
    model: str | None = None
    stop: _Text | list[_Text] | None = None
    stop_token_ids: list[_Token] | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    pasta: PastaOptions = PastaOptions()

    @classmethod
    def _changes_nothing(cls, name: str, value: Any) -> bool:
        return super()._changes_nothing(name, value) or any(_same(value, other) for other in _NOT_DONE.get(name, ()))

    @model_validator(mode="after")
    def _together(self) -> _Sampled:
        if len(self.stops) > MOST_STOPS or not all(1 <= len(stop) <= 256 for stop in self.stops):
            raise BadValue("stop", f"stop must be at most {MOST_STOPS} texts of 1 to 256 characters")
        if len(self.stop_token_ids or ()) > MOST_STOPS:
            raise BadValue("stop_token_ids", f"stop_token_ids must be at most {MOST_STOPS}")
        bias = self.logit_bias or {}
        if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in bias):
            raise BadValue("logit_bias", "the keys of logit_bias must be token ids")
        if not all(-100 <= value <= 100 for value in bias.values()):
            raise BadValue("logit_bias", "the values of logit_bias must be in -100..100")
        if not self.stream and (self.pasta.events or self.stream_options.include_usage):
            param = "pasta.events" if self.pasta.events else "stream_options.include_usage"
            raise BadValue(param, "stream_options.include_usage and pasta.events need stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    echoes: ClassVar[bool] = False
    """Whether answers begin with their prompt."""

    def rendering(self) -> Rendering:
        """How a conversation is rendered. Raises RequestError."""
        return Rendering()

    def params(self, *, max_tokens: int, logprobs: int | None, parallelism: float) -> SamplingParams:
        """How it is sampled. Raises RequestError."""
        return SamplingParams(
            **{name: getattr(self, name) for name in _SAME_FORM},
            stop=self.stops,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            max_tokens=max_tokens,
            logprobs=logprobs,
            logit_bias={int(key): value for key, value in (self.logit_bias or {}).items()},
            parallelism=parallelism,
        )


MOST_STOPS = 64
"""Stop strings of a request, and stop token ids."""


class _Conversation(_Checked):
    """Fields of a conversation, and how the chat template is to render it, as vLLM has them."""

    about: ClassVar[str] = "messages"
    add_special_tokens: ClassVar[bool] = True
    """The template says them itself."""
    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: _Object | None = None

    @model_validator(mode="after")
    def _open(self) -> _Conversation:
        if self.continue_final_message and self.add_generation_prompt:
            raise BadValue("continue_final_message", "continue_final_message needs add_generation_prompt: false")
        return self

    @property
    def prompts(self) -> list[Any]:
        return [[message.rendered() for message in self.messages]]

    @property
    def names(self) -> dict[str, Any]:
        """What the chat template may read beside the messages."""
        return dict(self.chat_template_kwargs or {})

    def rendering(self) -> Rendering:
        """Raises RequestError."""
        opened = self.add_generation_prompt
        return Rendering(
            add_generation_prompt=not self.continue_final_message if opened is None else opened,
            continue_final_message=self.continue_final_message,
            names=self.names,
        )


class ChatRequest(_Conversation, _Sampled):
    """`POST /v1/chat/completions`."""

    neutral = {
        "modalities": [["text"]],
        "tools": [[]],
        "tool_choice": ["none", "auto"],
        "functions": [[]],
        "function_call": ["none", "auto"],
        "echo": [False],
        "add_special_tokens": [False],
    }
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=parameters()["logprobs"].le)
    documents: list[_Object] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    parallel_tool_calls: bool | None = None
    prediction: _Object | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_tools(cls, value: Any) -> Any:
        """Tools that are not to be called are as good as absent."""
        if isinstance(value, dict):
            for chosen, offered in (("tool_choice", "tools"), ("function_call", "functions")):
                if value.get(chosen) == "none":
                    value = {k: v for k, v in value.items() if k != offered or not isinstance(v, list)}
        return value

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise BadValue("max_tokens", "give max_completion_tokens or max_tokens, not both")
        if self.top_logprobs and not self.logprobs:
            raise BadValue("top_logprobs", "top_logprobs needs logprobs: true")
        return self

    @property
    def names(self) -> dict[str, Any]:
        given = {"documents": self.documents, "reasoning_effort": self.reasoning_effort}
        return {**{k: v for k, v in given.items() if v}, **(self.chat_template_kwargs or {})}

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(_Sampled):
    """`POST /v1/completions`: raw prompts, as text or as token ids."""

    about: ClassVar[str] = "prompt"
    neutral = {"suffix": [""]}
    prompt: _Text | list[_Text] | list[_Token] | list[list[_Token]]
    max_tokens: int = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=parameters()["logprobs"].le)
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _agree(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise BadValue("best_of", "best_of must be n: this server returns every answer that it decodes")
        return self

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

    @property
    def echoes(self) -> bool:  # type: ignore[override]
        return self.echo


class TokenizeRequest(_Checked):
    """`POST /tokenize` of a raw prompt, as vLLM's."""

    about: ClassVar[str] = "prompt"
    model: str | None = None
    prompt: _Text
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @property
    def prompts(self) -> list[Any]:
        return [self.prompt]

    def rendering(self) -> Rendering:
        """None is rendered."""
        return Rendering()


class TokenizeChatRequest(_Conversation):
    """`POST /tokenize` of a conversation, as vLLM's."""

    neutral = {"tools": [[]], "add_special_tokens": [False]}
    model: str | None = None
    return_token_strs: bool = False
    media_io_kwargs: _Object | None = None
    mm_processor_kwargs: _Object | None = None


def tokenized(body: Any) -> str:
    """What a request for tokens is about."""
    chat = "messages" in body if isinstance(body, dict) else isinstance(body, TokenizeChatRequest)
    return "<messages>" if chat else "<prompt>"


class Tokens(BaseModel):
    """Token ids of a text, and how they are spelled if that was asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(_Checked):
    """`POST /detokenize`, as vLLM's."""

    model: str | None = None
    tokens: list[_Token]


class TokensText(BaseModel):
    """The text of token ids."""

    prompt: str


def refusal(errors: Sequence[Mapping[str, Any]], body: Any) -> Refused:
    """What is wrong with a body, as one error: a field that is not supported comes first, then what lies deepest (of
    the kinds that a value may have, the one that it comes nearest to)."""
    places = [_place(error, body) for error in errors]
    rank = [
        (e["type"] == "extra_forbidden", len(where), not str(e["type"]).endswith("_type"))
        for e, where in zip(errors, places, strict=True)
    ]
    worst = max(range(len(errors)), key=lambda i: rank[i])
    error, where = errors[worst], places[worst]
    param = _spelled(where) or None
    if error["type"] == "bad_value":
        message, param = (
            f"{param}: {error['msg']}" if param else error["msg"],
            _spelled([*where, error["ctx"]["param"]]),
        )
        return Refused(message, code="invalid_value", param=param)
    if error["type"] == "extra_forbidden":
        message = f"{param} is not supported by this server: leave it out"
        return Refused(message, code="unsupported_parameter", param=param)
    if error["type"] == "json_invalid":
        return Refused("the body is not JSON", code="invalid_json")
    if error["type"] == "missing" and param:
        return bad_value(f"{param} is missing: give it", param)
    message = str(error["msg"]).removeprefix("Value error, ")
    if param is None and (error["type"] == "missing" or error["type"].endswith("_type")):
        message = "the body must be a JSON object"
    return Refused(f"{param}: {message}" if param else message, code="invalid_value", param=param)


def _place(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Where in the body an error is; what pydantic says of it names the kinds, too, that a value may have."""
    where: list[str | int] = []
    parts = [part for part in error["loc"] if part != "body"]
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        listed = isinstance(body, list) and isinstance(part, int) and part < len(body)
        if listed or isinstance(body, dict) and part in body:
            body = body[part]
        elif not (last and error["type"] == "missing"):
            continue
        where.append(part)
    return where


def _spelled(where: Sequence[str | int]) -> str:
    """A place as OpenAI writes it: messages[0].content[1]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")


# ------------------------------------------------------------------------------ answers


Scored = tuple[int, Decoded | SampledToken]
"""A token of the text, and the character at which it begins."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that its answer is to begin with. scores: of all its tokens but the first, if they were asked for.
    ends: the ids that end a text."""

    text: str
    token_ids: list[int]
    scores: list[SampledToken] | None
    ends: frozenset[int]


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
    echo: Echo | None = None
    transcript: Transcript = field(default_factory=Transcript)
    _characters: int = 0
    _tokens: int = 0
    _end: Decoded | None = None

    def take(self, events: list[Event]) -> Delta:
        """What some events, all of one step, made certain."""
        for event in events:
            self.transcript.apply(event)
            self._end = self._ended(event) or self._end
        text = self.transcript.certain(self.stops, start=self._characters)
        self._characters += len(text)
        end = math.inf if self.transcript.finished else self._characters
        scored = self.transcript.scored_from(self._tokens, end=end)
        self._tokens += len(scored)
        placed = self._placed(scored)
        return Delta(text, placed, events, self.transcript.finish_reason)

    def _ended(self, event: Event) -> Decoded | None:
        """The end that the model wrote: behind an echo it is a token as any other, since whoever asks for one counts
        tokens."""
        if self.echo is None or not isinstance(event, Decoded) or event.path or event.logprob is None:
            return None
        return event if event.tag and event.token in self.echo.ends else None

    def _placed(self, scored: Sequence[Scored]) -> list[Scored]:
        begin = len(self.echo.text) if self.echo else 0
        placed = [(begin + at, token) for at, token in scored]
        if self._end is not None and self.transcript.finished:
            placed.append((begin + len(self.transcript.text), self._end))
        return placed

    def text(self) -> str:
        """All of it, the echo too."""
        return (self.echo.text if self.echo else "") + self.transcript.text

    def scored(self) -> list[Scored]:
        """The answer's tokens with their places in all of the text."""
        return self._placed(list(self.transcript.scored()))


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

    def opening(self, index: int, answer: Answer) -> ChatCompletionChunk | None:
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
            self._choice(i, a.text(), a.scored(), a.transcript.finish_reason, a.echo) for i, a in enumerate(answers)
        ]
        return self._of(choices, usage=used)

    def opening(self, index: int, answer: Answer) -> Completion | None:
        """The chunk of the prompt, if it is to be echoed."""
        if answer.echo is None:
            return None
        return self._of([self._choice(index, answer.echo.text, [], None, answer.echo)])

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
        self,
        index: int,
        text: str,
        scored: Sequence[Scored],
        finish_reason: str | None,
        echo: Echo | None = None,
    ) -> CompletionChoice:
        return CompletionChoice.construct(
            index=index, text=text, finish_reason=finish_reason, logprobs=self._logprobs(scored, echo)
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

    def _logprobs(self, scored: Sequence[Scored], echo: Echo | None) -> Logprobs | None:
        if not self.with_logprobs:
            return None
        first = [echo.token_ids[0]] if echo else []  # nothing stands before it: null
        offsets = self._offsets(echo.token_ids) if echo else []
        behind = list(zip(offsets[1:], echo.scores or (), strict=False)) if echo else []
        listed: list[Scored] = [*behind, *scored]
        return Logprobs.construct(
            text_offset=[*offsets[:1], *(at for at, _ in listed)],
            tokens=[self.vocabulary.text([token]) for token in (*first, *(t.token for _, t in listed))],
            token_logprobs=[*([None] * len(first)), *(_finite(token.logprob) for _, token in listed)],
            top_logprobs=[*([None] * len(first)), *(self._top(token) for _, token in listed)],
        )

    def _offsets(self, token_ids: Sequence[int]) -> list[int]:
        """The character at which each token of a text begins."""
        reader = codecs.getincrementaldecoder("utf-8")(errors="replace")
        lengths = (len(reader.decode(self.vocabulary.piece(token))) for token in token_ids)
        return [0, *accumulate(lengths)][:-1]

    def _top(self, token: Decoded | SampledToken) -> dict[str, float]:
        """The likeliest tokens by their text, and the token itself in any case."""
        ranked = [(token.token, token.logprob), *reversed(token.top_logprobs)]
        return {self.vocabulary.text([i]): _finite(p) for i, p in ranked}


def _finite(logprob: float | None) -> float:
    return UNLIKELY if logprob is None else max(logprob, UNLIKELY)


def line(reply: BaseModel) -> str:
    """JSON, without the fields that were never given."""
    return reply.model_dump_json(exclude_unset=True)


def events_key(events: Sequence[Event]) -> dict[str, Any]:
    """The extra key of a chunk that carries events; each is a line of a trace."""
    return {"pasta": {"events": [json.loads(to_json(event)) for event in events]}}
