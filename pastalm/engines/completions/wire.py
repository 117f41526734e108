"""How prompts are sent and tokens received: as token ids or as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from pastalm.core.params import Request
from pastalm.core.vocabulary import Vocabulary
from pastalm.engines.completions.pieces import Pieces
from pastalm.errors import RequestError

Shares: TypeAlias = Literal["running", "finished"]
"""Whose cached blocks a new request can use: those of running requests, or only of finished ones."""


@dataclass(frozen=True, slots=True)
class CompletionToken:
    """One token of a completion.

    token: its id.
    logprob: its log-probability, if requested.
    top: (id, log-probability) of the most likely alternatives, if requested.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class CompletionEnd:
    """The end of a completion.

    eos: the model ended its answer; otherwise the completion is to be requested again.
    why: the reason, if it failed; code: the HTTP status, if there was one.
    opening: the request itself failed, after the client's own retries.
    unreachable: nothing answers at that address.
    final: another try cannot help.
    """

    eos: bool = False
    why: str = ""
    code: int = 0
    opening: bool = False
    unreachable: bool = False
    final: bool = False

    @property
    def fatal(self) -> bool:
        """Whether the server will refuse every request of this run."""
        return self.code in (401, 403, 404)


Item: TypeAlias = "CompletionToken | CompletionEnd | Exception"


class Wire(Protocol):
    """Converts token ids to prompts, and chunks of a reply to tokens."""

    name: str
    vocabulary: Vocabulary

    def prompt(self, row: list[int]) -> Any:
        """The request's `prompt`."""

    def options(self, request: Request, shares: Shares) -> dict[str, Any]:
        """Fields of the request that only some servers support."""

    def tokens(self, choice: Any) -> list[CompletionToken]:
        """The tokens of a chunk. Raises ValueError for an invalid one."""

    def server_ids(self, token: int) -> Iterable[int]:
        """The server's ids for a tag, or for the end of a text."""


class Ids:
    """Sends and receives token ids. Raises RequestError for a vocabulary without an end-of-text token."""

    name = "token ids"

    def __init__(self, vocabulary: Vocabulary) -> None:
        if not vocabulary.eos:
            raise RequestError("the tokenizer has no end-of-text token: it cannot be used with this server")
        self.vocabulary = vocabulary

    def prompt(self, row: list[int]) -> list[int]:
        return row

    def options(self, request: Request, shares: Shares) -> dict[str, Any]:
        extra: dict[str, Any] = {"return_token_ids": True}
        tags = self.vocabulary.tags
        if tags is not None and request.params.parallelism > 0:
            ends = [tags.sync, tags.async_close]
            extra["stop_token_ids"] = ends + ([tags.promise_end] if shares == "finished" else [])
        if request.params.logprobs is not None:
            extra["return_tokens_as_token_ids"] = True
        return extra

    def tokens(self, choice: Any) -> list[CompletionToken]:
        ids = getattr(choice, "token_ids", None) or []
        if not ids and getattr(choice, "text", None):
            raise ValueError("text without token ids")
        size = self.vocabulary.size
        if not isinstance(ids, list) or any(type(i) is not int or not 0 <= i < size for i in ids):
            raise ValueError(f"token ids outside the tokenizer's vocabulary: {str(ids)[:60]}")
        scores = token_scores(choice)
        if len(scores) != len(ids):
            return [CompletionToken(i) for i in ids]
        return [CompletionToken(i, lp, self._ids(top)) for i, (_, lp, top) in zip(ids, scores, strict=True)]

    def server_ids(self, token: int) -> Iterable[int]:
        return (token,)

    @staticmethod
    def _ids(top: dict[str, float]) -> tuple[tuple[int, float], ...]:
        numbers = ((name.removeprefix("token_id:"), lp) for name, lp in top.items())
        return tuple((int(n), lp) for n, lp in numbers if n.isdecimal())


class Texts:
    """Sends and receives text. A token is a piece of text as the server sent it.

    model: the vocabulary of a prepared model: a logit bias uses its ids, even if prompts are text.
    """

    name = "text"

    def __init__(self, pieces: Pieces, model: Vocabulary | None = None) -> None:
        self.pieces = pieces
        self.vocabulary = pieces.vocabulary
        self._server_ids: dict[int, Iterable[int]] = {}
        if model is not None and model.tags is not None and self.vocabulary.tags is not None:
            tags = zip(self.vocabulary.tags, model.tags, strict=True)
            self._server_ids = {pieces.EOS: model.eos} | {piece_id: (model_id,) for piece_id, model_id in tags}

    def prompt(self, row: list[int]) -> str:
        return self.pieces.text(row)

    def options(self, request: Request, shares: Shares) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if self.vocabulary.tags is not None:
            extra["skip_special_tokens"] = False
        if shares == "finished" and request.params.parallelism > 0:
            extra |= {"stop": "<|/promise|>" if self.vocabulary.tags else '"/>', "no_stop_trim": True}
        return extra

    def tokens(self, choice: Any) -> list[CompletionToken]:
        text = getattr(choice, "text", None) or ""
        if not isinstance(text, str):
            raise ValueError(f"a text that is not a string: {str(text)[:60]}")
        scores = token_scores(choice)
        if "".join(piece for piece, _, _ in scores) != text:
            scores = [(text, None, {})] if text else []
        tokens: list[CompletionToken] = []
        for piece, logprob, top in scores:
            ranked = [(self.pieces.read(t), lp) for t, lp in top.items()]
            alone = tuple((t[0], lp) for t, lp in ranked if len(t) == 1)
            for i, token in enumerate(self.pieces.read(piece)):
                # one token of the server may be several of ours (a tag and digits): the first gets the log-probability
                tokens.append(
                    CompletionToken(token)
                    if logprob is None
                    else CompletionToken(token, 0.0)
                    if i
                    else CompletionToken(token, logprob, alone)
                )
        return tokens

    def server_ids(self, token: int) -> Iterable[int]:
        return self._server_ids[token]


def token_scores(choice: Any) -> list[tuple[str, float | None, dict[str, float]]]:
    """Text, log-probability and alternatives of each token of a chunk; empty if the server does not send them."""
    logprobs = getattr(choice, "logprobs", None)
    tokens = getattr(logprobs, "tokens", None) or []
    n = len(tokens)
    values = getattr(logprobs, "token_logprobs", None) or [None] * n
    tops = getattr(logprobs, "top_logprobs", None) or [{}] * n
    if not n or len(values) != n or len(tops) != n or not all(isinstance(t, str) for t in tokens):
        return []
    clean = [{t: float(v) for t, v in (top or {}).items() if isinstance(v, int | float)} for top in tops]
    return [
        (t, float(v) if isinstance(v, int | float) else None, top)
        for t, v, top in zip(tokens, values, clean, strict=True)
    ]


def ending(choice: Any, tokens: list[CompletionToken], wire: Wire) -> CompletionEnd | None:
    """The end of the completion, if this chunk is the last; else None.

    If the server left out the token that stopped it, that is appended to `tokens`.

    choice: of the chunk.
    tokens: of the chunk.
    wire: how they were received.
    """
    reason = getattr(choice, "finish_reason", None)
    if reason is None:
        return None
    if reason == "length":
        return CompletionEnd()
    if reason not in ("stop", "repetition"):
        return CompletionEnd(why=f"the server ended it: {str(reason)[:60]}", final=reason == "content_filter")
    stopped = getattr(choice, "stop_reason", None) or getattr(choice, "matched_stop", None)
    vocabulary = wire.vocabulary
    last = tokens[-1].token if tokens else None
    if isinstance(stopped, str) and isinstance(wire, Texts):
        if not str(getattr(choice, "text", "") or "").endswith(stopped):
            tokens += [CompletionToken(token) for token in wire.pieces.read(stopped)]
        return CompletionEnd()
    if isinstance(wire, Ids) and type(stopped) is int and 0 <= stopped < vocabulary.size:
        if stopped != last:
            tokens.append(CompletionToken(stopped))
        return CompletionEnd()
    if last in vocabulary.eos:
        return CompletionEnd()  # the token is the end
    return CompletionEnd(eos=True)
