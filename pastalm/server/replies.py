"""Builds OpenAI's replies from answers.

The types are those of the openai package. What only PASTA has is in one more key, `pasta`, which other clients ignore.
"""

from __future__ import annotations

import codecs
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, chat_completion
from openai.types.chat import chat_completion_chunk as chunk_types
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel

from pastalm.core.events import Decoded, Event, SampledToken
from pastalm.core.vocabulary import Vocabulary
from pastalm.records.traces import to_json
from pastalm.server.answers import Delta, Echo, PlacedToken, ServedAnswer
from pastalm.server.calls import CallReader

UNLIKELY = -9999.0
"""What OpenAI writes for a log-probability that JSON cannot express."""


def usage(prompt_tokens: int, answers: Sequence[ServedAnswer], fork_odds: float) -> CompletionUsage:
    """Counts of tokens. The key `pasta` has the figures of each choice, and the odds of forking.

    prompt_tokens: tokens of all prompts.
    answers: finished answers, one for each choice.
    fork_odds: the `parallelism` that was applied.
    """
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
                    "passes": t.passes,
                    "drafted": dict(t.drafted),
                    "accepted": dict(t.accepted),
                    "threads": len(t.threads),
                }
                for t in each
            ],
        },
    )


@dataclass(frozen=True, slots=True)
class ChatReply:
    """Builds the replies to one chat request.

    model: the model's name for clients.
    vocabulary: of the model.
    with_logprobs: whether the request wants log-probabilities.
    calls: whether the answers may call a tool ("auto"), have to ("required"), or not (None).
    """

    model: str
    vocabulary: Vocabulary
    with_logprobs: bool
    calls: Literal["auto", "required"] | None = None
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    _readers: dict[int, CallReader] = field(default_factory=dict)
    """Of streamed answers that may call a tool, by choice."""

    def whole(self, answers: Sequence[ServedAnswer], usage: CompletionUsage) -> ChatCompletion:
        """The reply of a request that does not stream."""
        return ChatCompletion.construct(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[self._choice(i, answer) for i, answer in enumerate(answers)],
            usage=usage,
        )

    def _choice(self, index: int, answer: ServedAnswer) -> chat_completion.Choice:
        text, reason = answer.transcript.text, str(answer.transcript.finish_reason)
        message: dict[str, Any] = {"content": text}
        if self.calls is not None:
            reader = CallReader(self.calls)
            reader.read(text, last=True)
            message, reason = reader.message(), reader.finish_reason(reason)
        return chat_completion.Choice.construct(
            index=index,
            message=ChatCompletionMessage.construct(role="assistant", refusal=None, **message),
            finish_reason=reason,
            logprobs=self._logprobs(answer.tokens()),
        )

    def opening(self, index: int, answer: ServedAnswer) -> ChatCompletionChunk | None:
        """The first chunk of a choice, with the role."""
        if self.calls is not None:
            self._readers[index] = CallReader(self.calls)
        content = None if self.calls == "required" else ""
        return self._chunk(index, {"role": "assistant", "content": content, "refusal": None})

    def chunks(self, index: int, delta: Delta, **more: Any) -> list[ChatCompletionChunk]:
        """Chunks with new text, or with a call: its beginning and pieces of its arguments have a chunk each.

        more: further keys of the first chunk, which is then there in any case.
        """
        deltas: list[dict[str, Any]] = [{"content": delta.text}] if delta.text else []
        if self.calls is not None:
            deltas = self._readers[index].read(delta.text, last=delta.finish_reason is not None)
        if not deltas and (more or delta.tokens):
            deltas = [{} if self.calls == "required" else {"content": ""}]
        return [
            self._chunk(index, each, self._logprobs([] if i else delta.tokens), **({} if i else more))
            for i, each in enumerate(deltas)
        ]

    def closing(self, index: int, finish_reason: str) -> ChatCompletionChunk:
        """The last chunk of a choice, with the reason why it ended."""
        if self.calls is not None:
            finish_reason = self._readers[index].finish_reason(finish_reason)
        return self._chunk(index, {}, finish_reason=finish_reason)

    def usage(self, usage: CompletionUsage) -> ChatCompletionChunk:
        """The chunk with the usage."""
        return self._of([], usage=usage)

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None, **more: Any
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

    def _logprobs(self, tokens: Sequence[PlacedToken]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        return {
            "content": [
                {
                    **self._token(token.token, token.logprob),
                    "top_logprobs": [self._token(*each) for each in token.top_logprobs],
                }
                for _, token in tokens
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
    """Builds the replies to one completion request. Chunks have the same type as the whole reply.

    model: the model's name for clients.
    vocabulary: of the model.
    with_logprobs: whether the request wants log-probabilities.
    """

    model: str
    vocabulary: Vocabulary
    with_logprobs: bool
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[ServedAnswer], usage: CompletionUsage) -> Completion:
        """The reply of a request that does not stream."""
        choices = [
            self._choice(i, a.text(), a.tokens(), a.transcript.finish_reason, a.echo) for i, a in enumerate(answers)
        ]
        return self._of(choices, usage=usage)

    def opening(self, index: int, answer: ServedAnswer) -> Completion | None:
        """The first chunk of a choice, with its prompt; None without echo."""
        if answer.echo is None:
            return None
        return self._of([self._choice(index, answer.echo.text, [], None, answer.echo)])

    def chunks(self, index: int, delta: Delta, **more: Any) -> list[Completion]:
        """A chunk with new text, if there is any.

        more: further keys of the chunk, which is then there in any case.
        """
        if not (delta.text or delta.tokens or more):
            return []
        return [self._of([self._choice(index, delta.text, delta.tokens, None)], **more)]

    def closing(self, index: int, finish_reason: str) -> Completion:
        """The last chunk of a choice, with the reason why it ended."""
        return self._of([self._choice(index, "", [], finish_reason)])

    def usage(self, usage: CompletionUsage) -> Completion:
        """The chunk with the usage."""
        return self._of([], usage=usage)

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[PlacedToken],
        finish_reason: str | None,
        echo: Echo | None = None,
    ) -> CompletionChoice:
        return CompletionChoice.construct(
            index=index, text=text, finish_reason=finish_reason, logprobs=self._logprobs(tokens, echo)
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

    def _logprobs(self, tokens: Sequence[PlacedToken], echo: Echo | None) -> Logprobs | None:
        if not self.with_logprobs:
            return None
        first = [echo.token_ids[0]] if echo else []  # has no log-probability: null
        offsets = self._offsets(echo.token_ids) if echo else []
        echoed = list(zip(offsets[1:], echo.scores or (), strict=False)) if echo else []
        listed: list[PlacedToken] = [*echoed, *tokens]
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
        """Log-probabilities of the most likely tokens and of the token itself, by their text."""
        ranked = [(token.token, token.logprob), *reversed(token.top_logprobs)]
        return {self.vocabulary.text([i]): _finite(p) for i, p in ranked}


def _finite(logprob: float | None) -> float:
    return UNLIKELY if logprob is None else max(logprob, UNLIKELY)


def to_line(reply: BaseModel) -> str:
    """A reply as JSON, without fields that were not set."""
    return reply.model_dump_json(exclude_unset=True)


def events_key(events: Sequence[Event]) -> dict[str, Any]:
    """The extra key of a chunk with events; each is a line of a trace."""
    return {"pasta": {"events": [json.loads(to_json(event)) for event in events]}}
