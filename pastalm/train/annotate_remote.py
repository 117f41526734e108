"""Annotates answers with a large language model (PASTA section 5.1).

Only the positions of its tags are used: lengths are recomputed, topics are cut to three words, stray syncs are removed,
and if it changed white space the tags are moved to the original response. Annotations that are still invalid are
dropped, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pastalm.core.language import (
    MAX_LENGTH,
    AsyncClose,
    AsyncOpen,
    Mark,
    Promise,
    Sync,
    Text,
    clip_topic,
    round_length,
    topic_key,
)
from pastalm.errors import LanguageError
from pastalm.records.chat_client import ChatClient, Messages
from pastalm.records.documents import Async, Document, Node, linearize, nest, parse, render, strip
from pastalm.train.annotate import PlainAnswer
from pastalm.train.annotation_prompt import EXAMPLES, SYSTEM
from pastalm.train.structure import MAX_GROUP, CountTokens

_PROMISE = re.compile(r"<promise\b([^<>]*?)/?>\s*(?=<async>)")
_STRAY = re.compile(r"<promise\b[^<>]*?/?>(?!<async>)")
_TOPIC = re.compile(r"""topic\s*=\s*(?:"([^"]*)"|'(.*?)'(?=\s|/|$)|\u201c([^\u201d]*)\u201d)""")
_FENCE = re.compile(r"\s*```[\w-]*\n(.*?)\n?```\s*", re.DOTALL)
_ANSWER = re.compile(r"</?answer>")


def question(row: PlainAnswer) -> Messages:
    """The messages that request a row's annotation."""
    messages = [{"role": "system", "content": SYSTEM}]
    for prompt, annotated in (*EXAMPLES, (row.prompt, "")):
        plain = row.response if not annotated else strip(parse(annotated))
        content = f"Question:\n{prompt}\n\nAnswer to annotate:\n<answer>{plain}</answer>"
        messages.append({"role": "user", "content": content})
        if annotated:
            messages.append({"role": "assistant", "content": f"<answer>{annotated}</answer>"})
    return messages


def read(reply: str, response: str, count_tokens: CountTokens) -> Document | str:
    """Parses a model's reply into a document, or gives the reason why it is invalid.

    reply: the model's text.
    response: the original response.
    count_tokens: counts the tokens of a text.
    """
    try:
        if parse(response) != (Text(response),):
            return "response looks like PASTA-LANG"
        document = parse(_well_spelled(reply, response))
    except LanguageError:
        return "malformed tags"
    marks = _carried(list(linearize(document)), response)
    if marks is None:
        return "text changed"
    try:
        return _mended(nest(_without_strays(marks)), count_tokens)
    except ValueError as error:
        return str(error)


def _well_spelled(reply: str, response: str) -> str:
    """The reply with tags in their exact form, without a code fence or <answer> tags around it."""
    fenced = _FENCE.fullmatch(reply)
    if fenced and not _FENCE.fullmatch(response):
        reply = fenced[1]
    reply = _ANSWER.sub("", reply) if not _ANSWER.search(response) else reply
    reply = re.sub(r"<sync\s*>(?:\s*</sync>)?|<sync\s+/>", "<sync/>", reply)
    reply = _PROMISE.sub(lambda match: _promise(match[1]), reply)
    return _STRAY.sub("", reply)


def _promise(attributes: str) -> str:
    topic = _TOPIC.search(attributes)
    name = clip_topic(" ".join(t for t in topic.groups() if t)) if topic else ""
    return render((Promise(name, 10),)) if name else ""


def _carried(marks: list[Mark], response: str) -> list[Mark] | None:
    """The marks placed in the original response; None if the copy differs in more than white space."""
    copy = "".join(mark.text for mark in marks if isinstance(mark, Text))
    if copy == response:
        return marks
    if "".join(copy.split()) != "".join(response.split()):
        return None
    places = [i for i, c in enumerate(response) if not c.isspace()]
    copied, at, carried = 0, 0, list[Mark]()
    for i, mark in enumerate(marks):
        if not isinstance(mark, Text):
            carried.append(mark)
            continue
        copied += sum(not c.isspace() for c in mark.text)
        more = any(isinstance(m, Text) and m.text.strip() for m in marks[i + 1 :])
        end = places[copied] if more and copied < len(places) else len(response)
        if not mark.text[-1:].isspace() and more:  # keep white space on the same side of the tag as in the copy
            end = places[copied - 1] + 1 if copied else 0
        carried.append(Text(response[at:end]))
        at = end
    return carried if at == len(response) else None


def _without_strays(marks: list[Mark]) -> Iterator[Mark]:
    """Removes syncs that wait for nothing or are inside a chunk, and empty texts."""
    open_, waiting = 0, False
    for mark in marks:
        open_ += isinstance(mark, AsyncOpen) - isinstance(mark, AsyncClose)
        waiting |= isinstance(mark, AsyncClose)
        if isinstance(mark, Sync):
            if open_ or not waiting:
                continue
            waiting = False
        if mark != Text(""):
            yield mark


def _mended(document: Document, count_tokens: CountTokens) -> Document:
    """The document with lengths counted and chunks without nesting. Raises ValueError with the reason if it is
    invalid."""
    nodes, topics = list[Node](), set[str]()
    for i, node in enumerate(document):
        if isinstance(node, Promise):
            chunk = document[i + 1] if i + 1 < len(document) else None
            if not isinstance(chunk, Async):
                raise ValueError("promise without its chunk")
            text = strip(chunk.body)
            if not text.strip():
                raise ValueError("empty chunk")
            if count_tokens(text) > MAX_LENGTH:
                raise ValueError("chunk too long")
            if topic_key(node.topic) in topics or not topic_key(node.topic):
                raise ValueError("topics alike")
            topics.add(topic_key(node.topic))
            if len(topics) > MAX_GROUP:
                raise ValueError("too many promises before a sync")
            nodes += [Promise(node.topic, round_length(count_tokens(text))), Async((Text(text),))]
        elif isinstance(node, Sync):
            topics.clear()
            nodes.append(node)
        elif isinstance(node, Text):
            nodes.append(node)
    return tuple(nodes)


@dataclass(slots=True)
class LanguageModel:
    """An annotator that uses a model on a server. Yields rows in the order of its replies."""

    remote: ChatClient[PlainAnswer]
    count_tokens: CountTokens

    def __call__(self, rows: Iterable[PlainAnswer]) -> Iterator[tuple[PlainAnswer, Document | str]]:
        for row, answer in self.remote.ask((row, question(row)) for row in rows):
            if answer.refused:
                yield row, "refused by the server"
            elif answer.finish_reason == "length":
                yield row, "annotation cut off"
            else:
                yield row, read(answer.text, row.response, self.count_tokens)
