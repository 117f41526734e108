"""What is written down of a transcript: its tokens in linear order, its threads, one JSON object for all of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pastalm.core.events import Decoded, Forked, Joined, Path
from pastalm.core.transcript import Transcript


class LinearToken(NamedTuple):
    """A decoded token. sampled: whether its thread sampled it. A forced token was not, nor one that replaced another;
    a sync was, though it is forced when its thread goes on."""

    path: Path
    token: int
    sampled: bool


def linear_tokens(transcript: Transcript, path: Path = ()) -> Iterator[LinearToken]:
    """Every decoded token in linear order, from thread `path` on."""
    for event in transcript.threads[path].events if transcript.threads else ():
        if isinstance(event, Forked) and event.path != path:
            yield from linear_tokens(transcript, event.path)
            continue
        if isinstance(event, Decoded):
            yield LinearToken(path, event.token, not event.replaced)
        for token in event.forced:
            yield LinearToken(path, token, isinstance(event, Joined) and bool(event.children))


def summary(transcript: Transcript) -> dict[str, Any]:
    """One JSON object for a response."""
    return {
        "text": transcript.text,
        "annotated": transcript.annotated,
        "tokens": transcript.tokens,
        "steps": transcript.steps,
        "passes": transcript.passes,
        "drafted": dict(transcript.drafted),
        "accepted": dict(transcript.accepted),
        "tokens_per_pass": round(transcript.tokens_per_pass, 4),
        "critical_path": transcript.critical_path,
        "parallelism": round(transcript.parallelism, 4),
        "seconds": round(transcript.seconds, 4),
        "finish_reason": transcript.finish_reason,
        "threads": list(threads(transcript)),
    }


def threads(transcript: Transcript) -> tuple[dict[str, Any], ...]:
    """A JSON object for each thread."""
    return tuple(
        {
            "id": thread_name(thread.path),
            "parent": thread_name(thread.path[:-1]) if thread.path else None,
            "topic": thread.topic,
            "promised_tokens": thread.promised,
            "tokens": thread.tokens,
            "start_step": thread.start_step,
            "end_step": thread.end_step,
        }
        for thread in transcript.threads.values()
    )


def thread_name(path: Path) -> str:
    """A thread's name for people: `main`, `0`, `0.1`."""
    return ".".join(map(str, path)) or "main"
