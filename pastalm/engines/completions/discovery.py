"""Finds out what a server supports, and makes the engine over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import openai

from pastalm.core.vocabulary import Vocabulary
from pastalm.engines.completions.connection import Connection
from pastalm.engines.completions.engine import MAX_NUM_SEQS, OpenAIEngine, Server
from pastalm.engines.completions.pieces import Pieces
from pastalm.engines.completions.wire import Ids, Shares, Texts, Wire, token_scores
from pastalm.errors import RemoteError, RequestError
from pastalm.records.chat_client import line, no_api


def _sglang_fields(guide: dict[str, Any]) -> dict[str, Any]:
    return {"json_schema": json.dumps(guide["json"])} if "json" in guide else dict(guide)


BOTH = ("regex", "json")
SERVERS = {
    "vllm": Server(known=True, guides=BOTH, guide=lambda guide: {"structured_outputs": guide}),
    "pastalm": Server(known=True, guides=("json",), guide=lambda guide: {"structured_outputs": guide}),
    "sglang": Server("finished", known=True, guides=BOTH, guide=_sglang_fields),
    "llamacpp": Server(
        known=True,
        penalty="repeat_penalty",
        every=0,
        guides=("json",),
        guide=lambda guide: {"json_schema": guide["json"]},
    ),
    "me": Server(known=True, penalty="repeat_penalty", every=0),
}
"""By `owned_by` in the server's list of models; "me" is llama-cpp-python's."""


def connect(
    base_url: str,
    model: str | None = None,
    *,
    vocabulary: Callable[[str], Vocabulary | None] = lambda _: None,
    wire: Literal["ids", "text"] | None = None,
    shares: Shares | None = None,
    api_key: str | None = None,
    retries: int = 3,
    timeout: float = 120.0,
    backoff: float = 0.5,
    max_num_seqs: int = MAX_NUM_SEQS,
) -> OpenAIEngine:
    """The engine over a server. Requests to the server find out what it supports.

    model: its name there (None: the only one).
    vocabulary: returns the vocabulary of a model's tokenizer, by the model's name, or None. With it, token ids are used
        for a prepared model if the server takes and returns them, else text with the tags spelled out. A model that
        writes XML always gets text, since its tokens do not end where the XML's tags do.
    wire: ids or text, for any model.
    shares: whose cached blocks a new request can use (None: by the kind of server).
    api_key, retries, timeout: as in `Connection`.
    backoff, max_num_seqs: as in `OpenAIEngine`.

    Raises RemoteError.
    """
    if shares not in (None, "running", "finished"):
        raise RequestError(f"unknown shares {shares!r}: running or finished")
    connection = Connection(base_url, model or "", api_key=api_key, retries=retries, timeout=timeout)
    try:
        entry = _model_entry(connection, model)
        connection.model = str(getattr(entry, "id", model))
        server = SERVERS.get(str(getattr(entry, "owned_by", "")), Server())
        wire_, logprobs = _choose_wire(connection, vocabulary(connection.model), wire)
        length = getattr(entry, "max_model_len", None)
        return OpenAIEngine(
            connection,
            wire_,
            replace(server, shares=shares or server.shares),
            logprobs=logprobs,
            max_num_seqs=max_num_seqs,
            max_model_len=length if isinstance(wire_, Ids) and isinstance(length, int) else 0,
            backoff=backoff,
        )
    except BaseException:
        connection.close()
        raise


def _model_entry(connection: Connection, model: str | None) -> Any:
    """The model in the server's list of models. Raises RemoteError if it has several and none is named."""
    reply: Any = None
    try:
        reply = connection.ask(lambda client: client.models.list())
    except openai.NotFoundError as error:
        if model is None:
            raise RemoteError(f"{connection.failure(error).why}; or give --model") from None
    except (openai.APIResponseValidationError, ValueError):
        pass
    except AttributeError:  # raised in the client, which treats any reply as a list
        raise RemoteError(no_api(connection.base_url)) from None
    except openai.OpenAIError as error:
        raise RemoteError(connection.failure(error).why) from None
    if isinstance(reply, str):
        raise RemoteError(no_api(connection.base_url))
    listed = list(getattr(reply, "data", None) or [])
    names = [str(getattr(entry, "id", "")) for entry in listed]
    if model is None and not listed:
        raise RemoteError(f"{connection.base_url} lists no model: load one there, or give --model")
    if model is None and len(listed) != 1:
        raise RemoteError(f"{connection.base_url} serves {', '.join(names)[:120]}: give --model, one of these")
    matches = [entry for entry, name in zip(listed, names, strict=True) if name == model]
    if model is None or not matches and len(listed) == 1 and getattr(listed[0], "owned_by", "") in ("me", "llamacpp"):
        return listed[0]  # llama.cpp's servers answer to any name
    if listed and not matches:
        raise RemoteError(f"{connection.base_url} serves no {model!r}, but {', '.join(names)[:120]}: give one of these")
    return matches[0] if matches else None


def _choose_wire(
    connection: Connection, vocabulary: Vocabulary | None, requested: Literal["ids", "text"] | None
) -> tuple[Wire, bool]:
    """How prompts are sent, and whether the server gives log-probabilities: requests one token to find out."""
    if vocabulary is None and requested == "ids":
        raise RemoteError("token ids need the model's tokenizer: give --tokenizer")
    if vocabulary is not None and (requested == "ids" or requested is None and vocabulary.tags is not None):
        ids = Ids(vocabulary)
        row = list(vocabulary.encode("Hello"))
        extra = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        choice = _probe(connection, row, logprobs=0, extra_body=extra)
        if choice is not None and getattr(choice, "token_ids", None):
            try:
                (token,) = ids.tokens(choice)
            except ValueError:
                token = None
            if token is None or not _same_text(vocabulary, token.token, str(getattr(choice, "text", ""))):
                raise RemoteError(f"the model at {connection.base_url} has another tokenizer: give its --tokenizer")
            return ids, token.logprob is not None
        if requested == "ids":
            raise RemoteError(f"{connection.base_url} does not return token ids: leave out wire='ids'")
    if vocabulary is not None and vocabulary.tags is not None:
        texts = Texts(Pieces(prepared=True, ends=vocabulary.ends), vocabulary)
    else:
        texts = Texts(Pieces())
    choice = _probe(connection, "Hello", logprobs=1)
    if choice is not None and token_scores(choice):
        return texts, True
    if choice is None:
        _probe(connection, "Hello", needed=True)
    return texts, False


def _same_text(vocabulary: Vocabulary, token: int, text: str) -> bool:
    """Whether tokenizer and server have the same text for a token. Part of a character counts as the same."""
    ours = vocabulary.piece(token).decode(errors="replace")
    return ours.strip() == text.strip() or "\ufffd" in ours + text or not ours or not text


def _probe(connection: Connection, prompt: Any, *, needed: bool = False, **options: Any) -> Any:
    """Requests a completion of one token. Returns its choice; None if the server refuses.

    connection: to the server.
    prompt: as the wire sends it.
    needed: raise an error if the server refuses.
    options: further fields of the request.

    Raises RemoteError if the server cannot be reached, or refuses a request that is needed.
    """
    try:
        reply = connection.ask(
            lambda client: client.completions.create(
                model=connection.model, prompt=prompt, max_tokens=1, temperature=0, **options
            )
        )
        if isinstance(reply, str):
            raise RemoteError(no_api(connection.base_url))
        choices = getattr(reply, "choices", None)
        if choices:
            return choices[0]
        why = f"{connection.base_url} gave no valid answer: no choices"
    except openai.OpenAIError as error:
        failure = connection.failure(error)
        if failure.unreachable or failure.fatal:
            raise RemoteError(failure.why) from None
        why = failure.why
    except ValueError as error:
        why = f"{connection.base_url} gave no valid answer: {line(error)}"
    if needed:
        raise RemoteError(why)
    return None
