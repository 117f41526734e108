"""What an adapter's promised lengths know, and whether its chunks keep them.

    python runs/lengths.py ANNOTATED.jsonl NAME=ADAPTER…

ANNOTATED: what `pasta annotate` wrote, best of answers that no adapter was trained on. Two lines an adapter, positions
`overlap`:

- promises: teacher-forced through the answers. Of the first promise of each answer and of the later ones, which see
  those before them: the share of the commonest greedy number, rank correlations of the greedy number and of the
  expected one with the chunk's length, and the loss in nats.
- chunks: the first promise of each answer is given other lengths, and its chunk decoded greedily: mean tokens by
  length. Chunks that keep their promises get longer from one to the next.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from pastalm.core.language import LENGTHS, Promise
from pastalm.core.vocabulary import Tags
from pastalm.models import loading
from pastalm.models.chat_template import encode_chat
from pastalm.models.loading import Loaded
from pastalm.records.documents import encode
from pastalm.train.dataset import Source, collate, read_annotated
from pastalm.train.packing import pack

LONGEST = 512
GIVEN = (10, 20, 40, 60, 80, 120)
CHUNK = 160
"""Tokens after which a chunk is taken as it is."""


@dataclass(frozen=True, slots=True)
class Told:
    """One promise. said: its greedy number. expected: mean of its distribution. loss: nats."""

    true: int
    said: int
    expected: float
    loss: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("annotated", type=Path)
    parser.add_argument("systems", nargs="+", metavar="NAME=ADAPTER")
    parser.add_argument("--answers", type=int, default=90)
    parser.add_argument("--given", type=int, default=12, help="answers whose first promise is given other lengths")
    chosen = parser.parse_args()
    rows = [row for row in read_annotated(chosen.annotated) if row.chunks >= 2 and row.tokens <= LONGEST]
    for system in chosen.systems:
        name, _, adapter = system.partition("=")
        loaded = loading.load(adapter=adapter, dtype="float32")
        kept = [row for row in rows if len(_prompt(loaded, row)) <= LONGEST // 2][: chosen.answers]
        told = [list(_told(loaded, row)) for row in kept]
        print(f"{name} promises: first {_line([own[0] for own in told])}")
        print(f"{name} promises: later {_line([one for own in told for one in own[1:]])}")
        lengths = [_given(loaded, row) for row in kept[: chosen.given]]
        means = (sum(column) / len(column) for column in zip(*lengths, strict=True))
        print(
            f"{name} chunks: {', '.join(f'{n} {mean:.1f}' for n, mean in zip(GIVEN, means, strict=True))}", flush=True
        )


def _prompt(loaded: Loaded, row: Source) -> list[int]:
    return encode_chat(loaded.tokenizer, loaded.vocabulary, [{"role": "user", "content": row.prompt}])


def _tags(loaded: Loaded) -> Tags:
    assert loaded.vocabulary.tags is not None
    return loaded.vocabulary.tags


@torch.inference_mode()
def _told(loaded: Loaded, row: Source) -> Iterator[Told]:
    tags, numbers = _tags(loaded), loaded.vocabulary.numbers
    packed = pack(_prompt(loaded, row), row.document, loaded.vocabulary, "overlap", eos=min(loaded.vocabulary.eos))
    inputs = collate([packed])
    forward: dict[str, Any] = {key: inputs[key] for key in ("input_ids", "position_ids", "attention_mask")}
    scores = loaded.model(**forward, use_cache=False).logits[0].float().log_softmax(-1)
    ids = packed.input_ids.tolist()
    # the first digit says almost everything: a length below 100 has two, and of the others few chunks are
    digits = {int(str(n)[0]): loaded.vocabulary.encode(str(n))[0] for n in LENGTHS}
    tens = {digit: digit * 10 if digit > 1 else 100 for digit in digits}
    for start in (i for i, token in enumerate(ids) if token == tags.tokens):
        end = ids.index(tags.promise_end, start)
        odds = {digit: float(scores[start, token].exp()) for digit, token in digits.items()}
        yield Told(
            true=numbers[tuple(ids[start + 1 : end])],
            said=tens[max(odds, key=lambda digit: odds[digit])],
            expected=sum(p * tens[digit] for digit, p in odds.items()),
            loss=-sum(float(scores[i - 1, ids[i]]) for i in range(start + 1, end + 1)),
        )


def _line(told: list[Told]) -> str:
    true = [one.true for one in told]
    said, many = Counter(one.said for one in told).most_common(1)[0]
    greedy = spearmanr([one.said for one in told], true).statistic
    expected = spearmanr([one.expected for one in told], true).statistic
    loss = sum(one.loss for one in told) / len(told)
    share = f"{said} said by {many / len(told):.2f}"
    return f"n {len(told)}, {share}, greedy {greedy:.2f}, expected {expected:.2f}, loss {loss:.2f}"


@torch.inference_mode()
def _given(loaded: Loaded, row: Source) -> list[int]:
    """Tokens of the chunk of the first promise, by the length that it is given."""
    tags = _tags(loaded)
    place = next(i for i, node in enumerate(row.document) if isinstance(node, Promise))
    first = row.document[place]
    assert isinstance(first, Promise)
    lengths = []
    for n in GIVEN:
        before = (*row.document[:place], Promise(first.topic, n))
        ids = [*_prompt(loaded, row), *encode(before, loaded.vocabulary), tags.async_open]
        out = loaded.model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=CHUNK,
            do_sample=False,
            eos_token_id=tags.async_close,
            pad_token_id=tags.async_close,
        )
        lengths.append(len(out[0]) - len(ids) - 1)
    return lengths


if __name__ == "__main__":
    main()
