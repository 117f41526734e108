"""Precision and recall of the structural annotator on answers that were marked by hand.

    python runs/annotator.py ANSWERS.jsonl            # {id, prompt, response} a line
    python runs/annotator.py ANSWERS.jsonl --show     # and every chunk that is wrong

`marks/train_100.jsonl` has the marks of 100 random answers (`random.Random(100).sample` of the sorted ids): {id, first
16 digits of the answer's sha256, chunks: [start, end] offsets}. A part is marked if someone could write it who sees the
text before its group and the names of its siblings, but not their text. Parts of parts are marked, too. A chunk is
right if it is a marked part, ignoring white space at its ends. Recall counts characters: the share of the outermost
marked parts that is in right chunks.

For topics it prints the number of words, not counting the number of an item; the cosine of the sentence embeddings of a
topic and its chunk, both without that number; and the share of topics that are closer to their own chunk than to any
sibling's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from pastalm.core.language import Promise, Text, topic_key
from pastalm.eval.quality import ReferenceScorer
from pastalm.models import downloads
from pastalm.records.documents import Async, Document, strip
from pastalm.train.annotate import read_rows
from pastalm.train.structure import annotate

MARKS = Path(__file__).parent / "marks" / "train_100.jsonl"
Span = tuple[int, int]


def chunks(document: Document) -> Iterator[Span]:
    """Offsets, in the reader's text, of the outermost chunks, without white space at their ends."""
    at = 0
    for node in document:
        text = node.text if isinstance(node, Text) else ""
        if isinstance(node, Async):
            text = strip(node.body)
            yield at + len(text) - len(text.lstrip()), at + len(text.rstrip())
        at += len(text)


def outermost(spans: list[Span]) -> list[Span]:
    return [a for a in spans if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in spans)]


@dataclass(frozen=True, slots=True)
class Named:
    """The topics of one answer, and the texts of the chunks that they name, without the numbers of items."""

    topics: list[str]
    chunks: list[str]


_ITEM = re.compile(r"\W*\d{1,3}[.)]\s*")


def named(document: Document) -> Named:
    return Named(
        [topic_key(node.topic) for node in document if isinstance(node, Promise)],
        [_ITEM.sub("", strip(node.body), count=1) for node in document if isinstance(node, Async)],
    )


def of_topics(answers: list[Named]) -> str:
    """The figures of topics, as a line."""
    encoder = ReferenceScorer()._encoder()
    own, nearest = list[float](), list[bool]()
    for one in answers:
        vectors = encoder.encode([*one.topics, *one.chunks], normalize_embeddings=True, show_progress_bar=False)
        cosines = vectors[: len(one.topics)] @ vectors[len(one.topics) :].T
        own += cosines.diagonal().tolist()
        nearest += (cosines.argmax(axis=1) == range(len(cosines))).tolist()
    lengths = Counter(len(topic.split()) for one in answers for topic in one.topics)
    words = ", ".join(f"{n} {count / len(own):.2f}" for n, count in sorted(lengths.items()))
    return f"topics: words {words}; cosine {sum(own) / len(own):.3f}; nearest {sum(nearest) / len(nearest):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path)
    parser.add_argument("--marks", type=Path, default=MARKS)
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(downloads.pull() / "tokenizer.json"))
    rows = {row.id: row for row in read_rows(args.answers)}
    right = made = found = wanted = forks = 0
    per_answer, topics = [], []
    for line in args.marks.read_text().splitlines():
        mark = json.loads(line)
        row = rows[mark["id"]]
        if not hashlib.sha256(row.response.encode()).hexdigest().startswith(mark["sha256"]):
            raise SystemExit(f"{row.id}: not the answer that was marked")
        marked = [(start, end) for start, end in mark["chunks"]]
        document = annotate(
            row.response,
            lambda t: len(tokenizer.encode(t, add_special_tokens=False)),
            prompt=row.prompt,
        )
        spans = list(chunks(document))
        if spans:
            topics.append(named(document))
        good = [span for span in spans if span in marked]
        made, right, forks = made + len(spans), right + len(good), forks + bool(spans)
        outer = outermost(marked)
        wanted += sum(end - start for start, end in outer)
        found += sum(e - s for s, e in good if any(a <= s and e <= b for a, b in outer))
        per_answer.append((len(good), len(spans)))
        for start, end in spans if args.show else ():
            if (start, end) not in marked:
                print(f"{row.id} {start}:{end} {row.response[start:end][:100]!r}")
    print(f"{len(per_answer)} answers, {forks} with chunks")
    print(f"precision {right / made:.3f} ({right} of {made} chunks)")
    print(of_topics(topics))
    print(f"recall {found / wanted:.3f} (of {wanted} characters)")


if __name__ == "__main__":
    main()
