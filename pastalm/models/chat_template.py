"""Renders conversations with a model's chat template, up to the start of the answer, and encodes raw prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pastalm.core.vocabulary import TAG_TOKENS, Vocabulary
from pastalm.errors import ModelError, RequestError
from pastalm.models import checkpoints, lossless, tool_messages

if TYPE_CHECKING:
    from pastalm.models.loading import Loaded


SEQUENTIAL_MARKER = "Write the answer in one piece."
"""In the system message of sequential answers (no tags), in training and in decoding."""
TEACHING = """\
You write the independent parts of an answer at the same time. Where parts of an answer do not need each other (the
items of a list, separate sections), you do not write them. In the place of each you write one tag that promises it:
<promise topic="TOPIC" tokens="N"/>
TOPIC is at most three words; N is about how many tokens the part will have, a multiple of 10. Write these tags one
after another with nothing between them, then <sync/>. Short answers, and parts that build on each other, have no tags.

Example. Asked for two tips for sleeping well, you write:
Two tips.
<promise topic="fixed hours" tokens="20"/><promise topic="no screens" tokens="20"/><sync/>
Then each part stands behind its promise, and you end the answer without saying the parts again:
Two tips.
<promise topic="fixed hours" tokens="20"/><async>1. Go to bed at the same time every day.
</async><promise topic="no screens" tokens="20"/><async>2. Put your phone away an hour before.
</async><sync/>Try both for a week.
Where the text before you ends with <async>, you write that one part: its number or mark, the part, a line break, and
then </async>."""
"""Instructions for a model that was not finetuned, so that it writes the tags (PASTA section 3)."""
_PLACE = re.compile("\ue000(\\d+)\ue001")
_OPEN = "\ue003"
"""Placeholder for the end of the last message if that is left open."""
_OWN_NAMES = {"messages", "conversation", "tokenize", "chat_template", "return_dict", "return_tensors"} | {
    "add_generation_prompt", "continue_final_message", "raise_exception", "self", "tokenizer"
}  # fmt: skip
"""Reserved names: arguments of apply_chat_template that a client must not set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """Options for rendering a conversation with a chat template, named as in transformers.

    add_generation_prompt: end with the tokens that start an assistant message.
    continue_final_message: leave the last message open, so that the answer continues it.
    names: further variables for the template.

    Raises RequestError if both flags are set, or if `names` has a reserved name.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    names: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError("continue_final_message and add_generation_prompt exclude each other: give one")
        if odd := sorted(_OWN_NAMES.intersection(self.names)):
            raise RequestError(f"chat_template_kwargs cannot set {odd[0]}: leave it out")


def chat_prompt(
    loaded: Loaded,
    messages: Sequence[Mapping[str, Any]],
    *,
    marker: str | None = None,
    rendering: Rendering | None = None,
) -> list[int]:
    """Token ids of a conversation rendered by the model's chat template, up to the start of the answer.

    Special tokens and tags in a message are encoded as plain text.

    loaded: the model's tokenizer and vocabulary.
    messages: at least one, each with role and content.
    marker: appended to the system message (the template's default one if there is none).
    rendering: options of the template.

    Raises ModelError if the model has no chat template, RequestError if the template rejects the messages.
    """
    return encode_chat(loaded.tokenizer, loaded.vocabulary, messages, marker=marker, rendering=rendering)


def encode_chat(
    tokenizer: Any,
    vocabulary: Vocabulary,
    messages: Sequence[Mapping[str, Any]],
    *,
    marker: str | None = None,
    rendering: Rendering | None = None,
) -> list[int]:
    """`chat_prompt` with a tokenizer and its vocabulary in place of a loaded model."""
    if not tokenizer.chat_template:
        raise ModelError(
            "this model has no chat template: give a raw prompt (generate --raw), or, for a model on a server, its "
            "--tokenizer"
        )
    pattern = lossless.any_of(lossless.special_spellings(tokenizer) | {*TAG_TOKENS.values(), "\ue000", _OPEN})
    fields = (m.get(key) for m in messages for key in ("role", "content"))
    if not messages or not all(isinstance(value, str) for value in fields):
        raise RequestError("give at least one message, each with a role and text as content")
    hidden_parts: list[str] = []

    def hide(match: re.Match[str]) -> str:
        hidden_parts.append(match[0])
        return f"\ue000{len(hidden_parts) - 1}\ue001"

    def hidden(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(hide, value)
        if isinstance(value, Mapping):
            return {hidden(key): hidden(item) for key, item in value.items()}
        return [hidden(item) for item in value] if isinstance(value, list | tuple) else value

    rendering = rendering or Rendering()
    if marker is not None:
        messages = _marked(tokenizer, messages, marker)
    messages = tool_messages.readable(messages, lambda probe: _render(tokenizer, probe))
    plain = [{**m, **{key: hidden(value) for key, value in m.items() if key != "role"}} for m in messages]
    text = _rendered(tokenizer, plain, replace(rendering, names=hidden(rendering.names)))
    parts = [hidden_parts[int(part)] if i % 2 else part for i, part in enumerate(_PLACE.split(text))]
    return lossless.encode_parts(tokenizer, vocabulary.encode, parts)


def renders_tools(tokenizer: Any) -> bool:
    """Whether the template says which tools there are."""
    return bool(re.search(r"\btools\b", str(tokenizer.chat_template or "")))


def with_tools(rendering: Rendering | None, tools: Sequence[Mapping[str, Any]]) -> Rendering:
    """The options with tools for the template, in OpenAI's form."""
    rendering = rendering or Rendering()
    listed = [{"type": "function", "function": dict(tool)} for tool in tools]
    return replace(rendering, names={"tools": listed, **rendering.names})


def raw_prompt(tokenizer: Any, vocabulary: Vocabulary, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text. Tags in it are encoded as plain text, other special tokens as themselves.

    tokenizer: of transformers, or an object with the same methods.
    vocabulary: its Vocabulary.
    prompt: the text.
    add_special_tokens: add what the tokenizer puts before a text, such as BOS.
    """
    parts = re.split(f"({lossless.any_of(set(TAG_TOKENS.values())).pattern})", prompt)
    if len(parts) == 1:
        return list(tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"])
    begin = lossless.begins_with(tokenizer) if add_special_tokens else []
    return begin + lossless.encode_parts(tokenizer, vocabulary.encode, parts)


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], rendering: Rendering) -> str:
    """The conversation as text. Raises RequestError if the template rejects it."""
    if rendering.continue_final_message:
        messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + _OPEN}]
    text = _render(tokenizer, messages, add_generation_prompt=rendering.add_generation_prompt, **rendering.names)
    if rendering.continue_final_message:
        text, placeholder, _ = text.rpartition(_OPEN)
        if not placeholder:
            raise RequestError("this model's chat template cannot leave the final message open")
    return text


def _render(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **names: Any
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **names
        )
    except Exception as error:
        raise RequestError(f"the chat template rejects these messages: {checkpoints.first_line(error)}") from None
    return text


def _marked(tokenizer: Any, messages: Sequence[Mapping[str, str]], marker: str) -> list[Mapping[str, str]]:
    first, *rest = messages
    if first["role"] == "system":
        return [{"role": "system", "content": f"{first['content']} {marker}"}, *rest]
    own = _own_system(tokenizer)
    if own is None:
        return [{**first, "content": f"{marker}\n\n{first['content']}"}, *rest]
    return [{"role": "system", "content": f"{own} {marker}".strip()}, *messages]


def _own_system(tokenizer: Any) -> str | None:
    """The template's default system message ("" if none); None if the template accepts no system message."""
    user = {"role": "user", "content": "x"}
    try:
        with_ours = _render(tokenizer, [{"role": "system", "content": "\ue002"}, user])
    except RequestError:
        return None
    before, marker, after = with_ours.partition("\ue002")
    if not marker:
        return None
    plain = _render(tokenizer, [user])
    if plain.startswith(before) and plain.endswith(after) and len(plain) >= len(before + after):
        return plain[len(before) : len(plain) - len(after)]
    return ""


class TextTokenizer:
    """A chat template for a server that takes text. If the server adds BOS, the template's BOS is removed."""

    def __init__(self, inner: Any | None, encode: Callable[[str], Sequence[int]]) -> None:
        self._inner, self._encode = inner, encode
        self.chat_template = getattr(inner, "chat_template", None)
        self.added_tokens_decoder = getattr(inner, "added_tokens_decoder", {})
        self._added = ""
        if inner is not None and inner("")["input_ids"][:1] == [inner.bos_token_id]:
            self._added = inner.bos_token

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Sequence[int]]:
        return {"input_ids": self._encode(text)}

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        assert self._inner is not None
        text: str = self._inner.apply_chat_template(messages, **options)
        return text.removeprefix(self._added)
