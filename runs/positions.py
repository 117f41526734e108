"""The cost of each position policy: teacher-forces adapters through annotated answers that they were not trained on.

    python runs/positions.py HELD.jsonl NAME=ADAPTER:POLICY…     # POLICY: of layout.py; off: without tags

Prints a line for each system: the loss on the answer's text and on decisions (tags, and what follows a promise), in
nats a token; recall and precision of promises, where a promise counts as predicted if it is the most likely token; the
share of answers with exactly the right promises (exact); and the share of chunks whose end is the most likely token in
its place. Losses and exact are means over answers with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from pastalm.core.language import Text
from pastalm.eval.intervals import mean
from pastalm.models import dtypes, loading
from pastalm.models.chat_template import encode_chat
from pastalm.models.loading import Loaded
from pastalm.records.documents import Document, strip
from pastalm.train.dataset import Source, collate, read_annotated
from pastalm.train.loss import decisions
from pastalm.train.packing import IGNORED, Packed, pack, pack_serial

LONGEST = 512
"""Tokens of an answer, and half of those of a prompt."""


@dataclass(slots=True)
class Seen:
    """What a model makes of one answer. losses: nats a token."""

    text: list[float]
    decisions: list[float]
    standing: int = 0
    foretold: int = 0
    right: int = 0
    ends: int = 0
    ended: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("held", type=Path)
    parser.add_argument("systems", nargs="+", metavar="NAME=ADAPTER:POLICY")
    parser.add_argument("--answers", type=int, default=80)
    chosen = parser.parse_args()
    rows = [row for row in read_annotated(chosen.held) if row.chunks >= 2 and row.tokens <= LONGEST]
    print("| system | positions | answers | loss on text | on decisions | exact | recall | precision | ends |")
    print("| --- " * 9 + "|", flush=True)
    for system in chosen.systems:
        name, _, rest = system.partition("=")
        adapter, _, policy = rest.rpartition(":")
        loaded = loading.load(adapter=adapter, dtype=dtypes.throughput_dtype("cpu"))
        packed = (answer for row in rows if (answer := _packed(loaded, row, policy)))
        seen = [_seen(loaded, answer) for answer in itertools.islice(packed, chosen.answers)]
        print(f"| {name} | {policy} | {len(seen)} | {' | '.join(_cells(seen))} |", flush=True)


def _packed(loaded: Loaded, row: Source, policy: str) -> list[Packed]:
    """Empty where the prompt is too long."""
    marker = loaded.sequential_marker if policy == "off" else None
    messages = [{"role": "user", "content": row.prompt}]
    prompt = encode_chat(loaded.tokenizer, loaded.vocabulary, messages, marker=marker)
    if len(prompt) > LONGEST // 2:
        return []
    document: Document = (Text(strip(row.document)),) if policy == "off" else row.document
    eos = min(loaded.vocabulary.eos)  # the one that training takes
    if policy == "serial":
        return pack_serial(prompt, document, loaded.vocabulary, eos=eos)
    return [pack(prompt, document, loaded.vocabulary, "promised" if policy == "off" else policy, eos=eos)]


def _seen(loaded: Loaded, answer: list[Packed]) -> Seen:
    tags = loaded.vocabulary.tags
    assert tags is not None
    seen = Seen([], [])
    for part in answer:
        inputs = collate([part])
        labels = inputs["labels"][:, 1:]
        kept = labels != IGNORED
        with torch.no_grad():
            logits = loaded.model(
                input_ids=inputs["input_ids"],
                position_ids=inputs["position_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
            ).logits[:, :-1][kept]
        logits, wanted = logits.float(), labels[kept]
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        likeliest = logits.argmax(-1)
        decided = decisions(inputs, tags)
        seen.decisions += losses[decided].tolist()
        seen.text += losses[~decided].tolist()
        stands, said = wanted == tags.promise, likeliest == tags.promise
        seen.standing += int(stands.sum())
        seen.foretold += int(said.sum())
        seen.right += int((stands & said).sum())
        ends = wanted == tags.async_close
        seen.ends += int(ends.sum())
        seen.ended += int((ends & (likeliest == tags.async_close)).sum())
    return seen


def _cells(seen: list[Seen]) -> list[str]:
    cells = [str(mean([sum(one.text) / len(one.text) for one in seen]))]
    standing, foretold, right = (sum(getattr(one, n) for one in seen) for n in ("standing", "foretold", "right"))
    if not standing:
        return [*cells, "", "", "", "", ""]
    cells.append(str(mean([sum(one.decisions) / len(one.decisions) for one in seen])))
    cells.append(str(mean([one.right == one.standing == one.foretold for one in seen])))
    ended = sum(one.ended for one in seen) / sum(one.ends for one in seen)
    return [*cells, f"{right / standing:.2f}", f"{right / max(1, foretold):.2f}", f"{ended:.2f}"]


if __name__ == "__main__":
    main()
