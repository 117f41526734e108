"""The messages of a conversation, and what all checked objects in a request have in common.

Each field of OpenAI's and vLLM's is treated in one of four ways:

- It is supported and means the same.
- It does not change the answer, so every value is accepted.
- It is not supported, but values that change nothing are accepted (`neutral`). null is always accepted.
- Everything else is an error that names the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from pastalm.server.errors import BadValue


def _without_surrogates(text: str) -> str:
    """Rejects lone surrogates: JSON can spell them, but they cannot be encoded."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half a character (a lone surrogate) is no text")
    return text


Text = Annotated[str, AfterValidator(_without_surrogates)]
Token = Annotated[int, Field(ge=0, lt=2**63)]
Object = dict[str, Any]


def same(value: Any, other: Any) -> bool:
    """Whether JSON values are equal; true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


class Checked(BaseModel):
    """An object in a request. Values are not converted, unknown fields are errors, and null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """Accepted values of fields that are not supported; they change nothing."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if v is not None and not cls.changes_nothing(k, v)}

    @classmethod
    def changes_nothing(cls, name: str, value: Any) -> bool:
        return any(same(value, other) for other in cls.neutral.get(name, ()))


class TextPart(Checked):
    """A part of a message."""

    type: str
    text: Text
    annotations: list[Any] | None = None
    cache_control: Object | None = None
    prompt_cache_breakpoint: Object | None = None
    logprobs: list[Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") not in ("text", "input_text", "output_text"):
            kind = str(value.get("type"))[:40]
            raise BadValue("type", f"the model reads text only, not parts of the type {kind!r}")
        return value


class RefusalPart(Checked):
    """A part of an assistant's message."""

    type: Literal["refusal"]
    refusal: Text


class CalledFunction(Checked):
    """The function that an earlier answer called. `arguments` is JSON."""

    name: Text = Field(min_length=1)
    arguments: Text = ""


class ToolCall(Checked):
    """A tool call of an earlier answer."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


def _kind(part: Any) -> str:
    """The tag of the part type that a value is checked as. In angle brackets, so that no field has the same name (see
    `errors._place`)."""
    if isinstance(part, str):
        return "<words>"
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return "<refusal>" if kind == "refusal" else "<text>"


_Part = Annotated[
    Annotated[Text, Tag("<words>")] | Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(_kind),
]
_ASSISTANTS = ("tool_calls", "refusal", "reasoning", "reasoning_content", "thinking")


class Message(Checked):
    """One message of a conversation.

    content: may be null in an assistant's message.

    Fields other than `role`, `name`, `content`, the three for reasoning, and those for tools change nothing.
    """

    neutral = {"annotations": [[]], "tool_calls": [[]], "prefix": [False], "partial": [False]}
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[_Part] | None = None
    refusal: Text | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    thinking: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None
    name: Text | None = None
    type: Literal["text", "message"] | None = None
    id: str | None = None
    status: str | None = None
    annotations: list[Any] | None = None
    cache_control: Object | None = None
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
        """The message as a chat template expects it."""
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
        """The text; parts are joined with line breaks, as vLLM does."""
        if self.content is None:
            return self.refusal or ""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(
            part if isinstance(part, str) else part.refusal if isinstance(part, RefusalPart) else part.text
            for part in self.content
        )
