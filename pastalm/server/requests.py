"""Requests, checked: chat, completions, tokenize, detokenize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, Field, create_model, model_validator

from pastalm.bounds import Parameter
from pastalm.core.params import SamplingParams, parameters
from pastalm.errors import RequestError
from pastalm.models.chat_template import Rendering
from pastalm.server.errors import BadValue
from pastalm.server.messages import Checked, Message, Object, Text, Token, same
from pastalm.server.structured import ResponseFormat, StructuredOutputs, ToolUse


class PromptRequest(Protocol):
    """A request with prompts.

    about: the field that the prompts come from.
    add_special_tokens: add what the tokenizer puts before a raw prompt.
    """

    about: ClassVar[str]

    @property
    def add_special_tokens(self) -> bool: ...

    @property
    def prompts(self) -> list[Any]: ...

    @property
    def form(self) -> dict[str, Any]:
        """The sampling parameters that give the form of the answer; none for free text."""

    @property
    def form_field(self) -> str:
        """The field that gives it."""

    def rendering(self) -> Rendering:
        """Options for the chat template. Raises RequestError."""


class StreamOptions(Checked):
    """What a stream contains in addition to the text.

    include_usage: a last chunk with the usage.
    include_obfuscation: has no effect, chunks are never padded.
    """

    neutral = {"continuous_usage_stats": [False]}
    include_usage: bool = False
    include_obfuscation: bool | None = None


MOST_REFERENCES, MOST_CHARACTERS = 16, 100_000
"""Most references of a request, and their characters together: the engine makes a table of all of them."""


class PastaOptions(Checked):
    """Options that only this server has.

    parallelism: multiplies the odds of forking; 0 turns forking off. A value given here is not lowered under load.
    drafts, references: as in SamplingParams. None: the server's, and no references.
    processors: names of logits processors, of those that the server allows.
    depends: as in SamplingParams; for the schema of response_format.
    events: the chunks of a stream contain the events of the threads.
    """

    parallelism: float | None = Field(default=None, ge=parameters()["parallelism"].ge)
    drafts: str | None = Field(default=None, description=parameters()["drafts"].help)
    references: list[Text] | None = Field(default=None, description=parameters()["references"].help)
    processors: list[str] | None = Field(
        default=None, max_length=8, description="Logits processors, of those that the server allows."
    )
    depends: dict[Text, list[Text]] | None = Field(default=None, description=parameters()["depends"].help)
    events: bool = False

    @model_validator(mode="after")
    def _drafting(self) -> PastaOptions:
        if self.drafts is not None:
            try:
                SamplingParams(drafts=self.drafts)
            except RequestError as error:
                raise BadValue("drafts", str(error)) from None
        if len(self.references or ()) > MOST_REFERENCES or sum(map(len, self.references or ())) > MOST_CHARACTERS:
            most = f"at most {MOST_REFERENCES} texts, of {MOST_CHARACTERS} characters together"
            raise BadValue("references", f"references must be {most}")
        return self


class _WithoutEffect(Checked):
    """Fields that do not change an answer: user and storage, hints for speed, and settings of decoding methods that are
    not supported (beam search, slow tokenizers)."""

    user: str | None = None
    metadata: Object | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Object | None = None
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
    media_io_kwargs: Object | None = None
    mm_processor_kwargs: Object | None = None
    cache_prompt: bool | None = None


_NEUTRAL: dict[str, Sequence[Any]] = {
    "frequency_penalty": [0],
    "presence_penalty": [0],
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
OTHER_FORM = (
    "stop",
    "max_tokens",
    "logprobs",
    "logit_bias",
    "stop_token_ids",
    "parallelism",
    "processors",
    "drafts",
    "references",
    "schema",
    "depends",
    "tools",
    "tool_choice",
)
"""Sampling parameters with another form or place in a request than in `SamplingParams`; their fields are below."""
_SAME_FORM = {name: row for name, row in parameters().items() if name not in OTHER_FORM}
"""The other sampling parameters. Their fields are made from the table in core/params.py."""


def _sampling_field(row: Parameter) -> tuple[Any, Any]:
    """Type and bounds of a field."""
    lowest = row.ge if row.served_ge is None else row.served_ge
    highest = row.le if row.served_le is None else row.served_le
    return row.kind, Field(default=row.default, description=row.help, gt=row.gt, ge=lowest, le=highest)


if TYPE_CHECKING:

    class _Sampling(_WithoutEffect):
        """For type checkers: the fields made from `_SAME_FORM` that the code below reads by name."""

        n: int
        min_tokens: int
else:
    _fields = {name: _sampling_field(row) for name, row in _SAME_FORM.items()}
    _Sampling = create_model("_Sampling", __base__=_WithoutEffect, __module__=__name__, **_fields)


class _SamplingRequest(_Sampling):
    model: str | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: list[Token] | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    pasta: PastaOptions = PastaOptions()

    @classmethod
    def changes_nothing(cls, name: str, value: Any) -> bool:
        return super().changes_nothing(name, value) or any(same(value, other) for other in _NEUTRAL.get(name, ()))

    @model_validator(mode="after")
    def _together(self) -> _SamplingRequest:
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

    @model_validator(mode="after")
    def _one_form(self) -> _SamplingRequest:
        if self.structured_outputs is not None and self.response_format is not None:
            raise BadValue("structured_outputs", "give response_format or structured_outputs, not both")
        if self.pasta.depends and self.answer_schema is None:
            raise BadValue("pasta.depends", "pasta.depends needs a schema: give response_format")
        if self.form and self.min_tokens:
            raise BadValue("min_tokens", f"min_tokens does not go with {self.form_field}: leave it out")
        return self

    @property
    def answer_schema(self) -> Object | None:
        """The JSON Schema of the answer; None for free text."""
        given = self.response_format or self.structured_outputs
        return None if given is None else given.answer_schema

    @property
    def form_field(self) -> str:
        """The field that gives the form of the answer."""
        return "structured_outputs" if self.structured_outputs is not None else "response_format"

    @property
    def form(self) -> dict[str, Any]:
        """The sampling parameters that give the form of the answer; none for free text."""
        schema = self.answer_schema
        return {} if schema is None else {"schema": schema, "depends": self.pasta.depends}

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    echoes: ClassVar[bool] = False
    """Whether answers start with their prompt."""

    def rendering(self) -> Rendering:
        """Options for the chat template. Raises RequestError."""
        return Rendering()

    def params(self, *, max_tokens: int, logprobs: int | None, parallelism: float, drafts: str) -> SamplingParams:
        """The sampling parameters. Raises RequestError."""
        return SamplingParams(
            **{name: getattr(self, name) for name in _SAME_FORM},
            stop=self.stops,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            max_tokens=max_tokens,
            logprobs=logprobs,
            logit_bias={int(key): value for key, value in (self.logit_bias or {}).items()},
            parallelism=parallelism,
            drafts=drafts,
            references=self.pasta.references,
            processors=self.pasta.processors,
            **self.form,
        )


MOST_STOPS = 64
"""Maximum number of stop strings of a request, and of stop token ids."""


class _Conversation(Checked):
    """A conversation and the options of its chat template, as in vLLM's API."""

    about: ClassVar[str] = "messages"
    add_special_tokens: ClassVar[bool] = True
    """The template writes them itself."""
    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Object | None = None

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
        """Further variables for the chat template."""
        return dict(self.chat_template_kwargs or {})

    def rendering(self) -> Rendering:
        """Options for the chat template. Raises RequestError."""
        add = self.add_generation_prompt
        return Rendering(
            add_generation_prompt=not self.continue_final_message if add is None else add,
            continue_final_message=self.continue_final_message,
            names=self.names,
        )


class ChatRequest(_Conversation, ToolUse, _SamplingRequest):
    """`POST /v1/chat/completions`."""

    neutral = {
        "modalities": [["text"]],
        "tools": [[]],
        "functions": [[]],
        "function_call": ["none", "auto"],
        "echo": [False],
        "add_special_tokens": [False],
    }
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=parameters()["logprobs"].le)
    documents: list[Object] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    prediction: Object | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_functions(cls, value: Any) -> Any:
        """With function_call "none" the functions are ignored."""
        if isinstance(value, dict) and value.get("function_call") == "none":
            return {k: v for k, v in value.items() if k != "functions" or not isinstance(v, list)}
        return value

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise BadValue("max_tokens", "give max_completion_tokens or max_tokens, not both")
        if self.top_logprobs and not self.logprobs:
            raise BadValue("top_logprobs", "top_logprobs needs logprobs: true")
        if self.callable_tools and self.answer_schema is not None:
            raise BadValue(self.form_field, f"give {self.form_field} or tools, not both, or tool_choice: none")
        return self

    @property
    def calls(self) -> Literal["auto", "required"] | None:
        """Whether the answer may call a tool, has to, or cannot."""
        return None if not self.callable_tools else "auto" if self.choice == "auto" else "required"

    @property
    def form_field(self) -> str:
        return "tools" if self.callable_tools else super().form_field

    @property
    def form(self) -> dict[str, Any]:
        return self.tool_params or super().form

    @property
    def names(self) -> dict[str, Any]:
        variables = {"documents": self.documents, "reasoning_effort": self.reasoning_effort}
        return {**{k: v for k, v in variables.items() if v}, **(self.chat_template_kwargs or {})}

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(_SamplingRequest):
    """`POST /v1/completions`: raw prompts, as text or as token ids."""

    about: ClassVar[str] = "prompt"
    neutral = {"suffix": [""]}
    prompt: Text | list[Text] | list[Token] | list[list[Token]]
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
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:  # type: ignore[override]
        return self.echo


class TokenizeRequest(Checked):
    """`POST /tokenize` with a raw prompt, as in vLLM's API."""

    about: ClassVar[str] = "prompt"
    model: str | None = None
    prompt: Text
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @property
    def prompts(self) -> list[Any]:
        return [self.prompt]

    form: ClassVar[dict[str, Any]] = {}
    form_field: ClassVar[str] = "prompt"

    def rendering(self) -> Rendering:
        """The defaults; a raw prompt is not rendered."""
        return Rendering()


class TokenizeChatRequest(_Conversation, ToolUse):
    """`POST /tokenize` with a conversation, as in vLLM's API."""

    neutral = {"tools": [[]], "add_special_tokens": [False]}
    form_field: ClassVar[str] = "tools"
    model: str | None = None
    return_token_strs: bool = False
    media_io_kwargs: Object | None = None
    mm_processor_kwargs: Object | None = None

    @property
    def form(self) -> dict[str, Any]:
        """The sampling parameters of the tools, which the prompt names."""
        return self.tool_params


def tokenize_kind(body: Any) -> str:
    """The tag of the type that a body of `POST /tokenize` is checked as."""
    chat = "messages" in body if isinstance(body, dict) else isinstance(body, TokenizeChatRequest)
    return "<messages>" if chat else "<prompt>"


class Tokens(BaseModel):
    """Token ids of a text, and their spelling if it was requested."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Checked):
    """`POST /detokenize`, as in vLLM's API."""

    model: str | None = None
    tokens: list[Token]


class TokensText(BaseModel):
    """The text of token ids."""

    prompt: str
