"""Random documents, nasty on purpose, for the laws."""

from __future__ import annotations

from hypothesis import strategies as st

from pastalm.core.language import LENGTHS, AsyncClose, Mark, Promise, Sync, Text
from pastalm.records.documents import Async, Document, Node, linearize, nest, normalize

LOOK_ALIKES = (
    "<", "</", "\\", "<\\", "<\\\\", "promise", "async", "/async", "sync", "sync/>", "<sync/>", "<async>",
    "</async>", "<\\sync/>", '<promise topic="a" tokens="10"/>', "<promise", '"/>', "/><", "&lt;", "\n",
    "<|promise|>", "<|/async|>", "é", "漢", "🍝", "<p>", " ",
)  # fmt: skip

texts = st.lists(st.sampled_from(LOOK_ALIKES) | st.text(max_size=4), max_size=8).map("".join)

words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Z", "C")) | st.sampled_from('<>&"\\;'),
    min_size=1,
    max_size=5,
).filter(lambda word: len(word.split()) == 1)
topics = st.lists(words, min_size=1, max_size=3).map(" ".join).filter(lambda t: t == " ".join(t.split()))
promises = st.builds(Promise, topics, st.sampled_from(LENGTHS))


def as_decoded(document: Document) -> Document:
    """A script as it is played: where a chunk ends and the text does not end in white space, a newline."""
    marks, last = list[Mark](), " "
    for mark in linearize(document):
        if isinstance(mark, Text):
            last = mark.text[-1]
        elif isinstance(mark, AsyncClose) and not last.isspace():
            last = "\n"
            marks.append(Text(last))
        marks.append(mark)
    return nest(marks)


def _chunks(bodies: st.SearchStrategy[Document]) -> st.SearchStrategy[tuple[Node, ...]]:
    synced = st.sampled_from(((), (Sync(),)))
    return st.builds(lambda p, body, sync: (p, Async(body), *sync), promises, bodies, synced)


def documents(depth: int = 2, pieces: st.SearchStrategy[str] = texts, size: int = 6) -> st.SearchStrategy[Document]:
    """Well-formed documents in normal form, chunks nested at most `depth` deep, `size` nodes in each."""
    runs: st.SearchStrategy[tuple[Node, ...]] = st.one_of(pieces.map(lambda text: (Text(text),)), st.just((Sync(),)))
    if depth:
        runs = runs | _chunks(documents(depth - 1, pieces, size))
    return st.lists(runs, max_size=size).map(lambda r: normalize(node for run in r for node in run))
