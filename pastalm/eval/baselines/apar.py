"""APAR (Liu et al., "APAR: LLMs can do auto-parallel auto-regressive decoding", 2024), as data for the same training.

The annotator only looks at the form of an answer. In an ordered list, the head of each item stays in the main thread,
and its detail becomes a chunk. In plain paragraphs, the first sentence of each stays, and the rest becomes a chunk.
There is no sync: the main thread never reads a chunk. A model trained on these rows is decoded like any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from pastalm.core.language import Promise, Text, topic_key
from pastalm.records.documents import Async, Document, Node, normalize

LEAST_ITEMS = 3
LEAST_DETAIL = 10
"""Minimum number of tokens of a chunk."""
_ITEM = re.compile(r"^(\d{1,2})[.)] +\S", re.MULTILINE)
_HEAD = re.compile(r"(?:\d{1,2}[.)] +)?[^\n]*?(?::\*{0,2}|[.!?])(?=\s)")
_UNLIKE = re.compile(r"```|\$\$|\\\(|^\s*[-*•|] ", re.MULTILINE)
"""Code, formulas, tables and bullets: answers with these are not annotated."""


def annotate(response: str, count_tokens: Callable[[str], int]) -> Document:
    """The response with its details as chunks; without chunks if it is neither a list nor several paragraphs.

    response: the text.
    count_tokens: counts the tokens of a text.
    """
    if _UNLIKE.search(response):
        return normalize([Text(response)])
    starts = _list(response) or _paragraphs(response)
    return normalize(_nodes(response, starts, count_tokens))


def _list(response: str) -> list[tuple[int, int]]:
    """Start and end of each item of an ordered list, numbered from 1; [] if there are fewer than LEAST_ITEMS."""
    marks = [match for i, match in enumerate(_ITEM.finditer(response), 1) if int(match.group(1)) == i]
    if len(marks) < LEAST_ITEMS:
        return []
    starts = [match.start() for match in marks]
    after = response.find("\n\n", starts[-1])
    end = len(response) if after < 0 else after + 2
    return list(zip(starts, [*starts[1:], end], strict=True))


def _paragraphs(response: str) -> list[tuple[int, int]]:
    """Start and end of each paragraph; [] if there is only one, or if the answer has a list."""
    if _ITEM.search(response):
        return []
    ends = [match.end() for match in re.finditer(r"\n{2,}", response)]
    spans = list(zip([0, *ends], [*ends, len(response)], strict=True))
    return spans if len(spans) > 1 else []


def _nodes(response: str, spans: list[tuple[int, int]], count_tokens: Callable[[str], int]) -> Iterator[Node]:
    written, topics = 0, set[str]()
    for start, end in spans:
        head = _HEAD.match(response, start, end)
        split = head.end() if head else end
        detail = response[split:end]
        topic = _topic(response[start:split])
        if count_tokens(detail) < LEAST_DETAIL or topic_key(topic) in topics or not topic_key(topic):
            continue
        topics.add(topic_key(topic))
        yield Text(response[written:split])
        yield Promise.clip(topic, count_tokens(detail))
        yield Async((Text(detail),))
        written = end
    yield Text(response[written:])


def _topic(head: str) -> str:
    words = re.findall(r"[\w'-]+", re.sub(r"^\d{1,2}[.)]", "", head))
    return " ".join(words[:3])
