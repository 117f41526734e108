"""A tokenizer with a chat template that needs only `tokenizers` and jinja2, not torch or transformers.

It has the methods of transformers' tokenizers that prompts and vocabularies use, with the same results. It is created
from a description, which can be stored as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

from pastalm.errors import CapabilityError


def described(tokenizer: Any) -> dict[str, Any]:
    """The description of one of transformers' tokenizers, for `ChatTokenizer`. Raises CapabilityError."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CapabilityError(f"a {type(tokenizer).__name__} works with transformers only")
    template = tokenizer.chat_template
    return {
        "backend": backend.to_str(),
        "chat_template": tokenizer.get_chat_template() if isinstance(template, dict) else template,
        "special_tokens": dict(tokenizer.special_tokens_map),
        "all_special_ids": list(tokenizer.all_special_ids),
    }


class ChatTokenizer:
    """A tokenizer with a chat template.

    description: from `described`. Its `special_tokens` have names ("bos_token") and spellings.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer

        self.backend_tokenizer = Tokenizer.from_str(description["backend"])
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        self.chat_template: str | None = description["chat_template"]
        self.special_tokens_map: dict[str, str] = dict(description["special_tokens"])
        self.all_special_ids: list[int] = list(description["all_special_ids"])

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids: list[int] = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return {"input_ids": ids}

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def get_vocab(self) -> dict[str, int]:
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    def convert_ids_to_tokens(self, token: int) -> str | None:
        """The spelling of a token; None for an unused id."""
        spelling: str | None = self.backend_tokenizer.id_to_token(token)
        return spelling

    def convert_tokens_to_ids(self, spelling: str) -> int | None:
        token: int | None = self.backend_tokenizer.token_to_id(spelling)
        return token

    @cached_property
    def added_tokens_decoder(self) -> dict[int, Any]:
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    def _id_of(self, name: str) -> int | None:
        spelling = self.special_tokens_map.get(name)
        return None if spelling is None else self.convert_tokens_to_ids(spelling)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens_map.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of("eos_token")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        **names: Any,
    ) -> str:
        """The conversation as text.

        messages: at least one.
        tokenize: must be False.
        add_generation_prompt: end with the tokens that start an assistant message.
        names: further variables for the template.

        Raises what the template raises, and ValueError if there is none.
        """
        if tokenize or self.chat_template is None or not messages:
            raise ValueError("a chat template needs at least one message, and gives text only")
        return render(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens_map, **names},
        )


# ------------------------------------------------------------------------------ templates


def render(template: str, messages: Sequence[Mapping[str, Any]], **names: Any) -> str:
    """Renders a conversation, with transformers' conventions. Raises what the template raises."""
    plain = [_plain({k: v for k, v in message.items() if v is not None}) for message in messages]
    text: str = _compiled(template).render(
        {"tools": None, "documents": None, **_plain(names), "messages": [_with_reasoning(m) for m in plain]}
    )
    return text


_REASONING = ("reasoning_content", "thinking", "reasoning")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Copies reasoning to the two names that templates read; messages use three."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """Plain data: templates are untrusted code and must not reach methods of our objects."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # an enum's str() would be its name
    if isinstance(value, int | float):
        return value + 0
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return f"<{type(value).__name__}>"


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """Renders the body of {% generation %} ... {% endgeneration %}, which marks answers for training."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

        def body(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["dict"] = lambda *pairs, **items: dict(*pairs, **items)  # the type has more methods
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, which jinja2's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
