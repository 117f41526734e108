"""Phrases: what most often follows the same n-gram in answers like those that the model was trained on.

Source: as REST (He et al., arXiv 2311.08252), whose datastore is made beforehand of such texts. Of them only n-grams
are kept that are frequent and sure, so that the table is a small file. `runs/phrases.py` makes it for a vocabulary;
those that there are stand in the folder `tables`. Where none is of the model's vocabulary nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pastalm.core.vocabulary import Vocabulary
from pastalm.engines.drafts.base import Context, Evidence, SilentDrafter

FOLDER = Path(__file__).parent / "tables"
LENGTHS = (4, 3, 2)
"""Tokens of a context, the longest first."""
LEAST, SURE, SURER = 10, 0.3, 0.1
"""A context is kept that occurs so often, goes on in the same way in this share of cases, and, where a shorter one says
the same, does so in a share that is larger by so much."""
EVERY = 97
"""One in so many tokens is looked at to tell vocabularies apart."""

_SURE: tuple[Evidence, ...] = tuple((0, tenths) for tenths in range(11))

Table: TypeAlias = dict[tuple[int, ...], tuple[int, Evidence]]
"""Of each context the token that follows, and how sure that is: (0, tenths)."""


class Phrases(SilentDrafter):
    """table: of a vocabulary."""

    name = "phrases"

    def __init__(self, table: Table) -> None:
        self._table = table

    def guess(self, context: Context) -> tuple[int, Evidence] | None:
        tail, table = context.tail, self._table
        for n in LENGTHS:
            if (known := table.get(tail[-n:])) is not None:
                return known
        return None


def fingerprint(vocabulary: Vocabulary) -> str:
    """Tells vocabularies apart by their ids and bytes. Ids that were added behind a model's own do not count."""
    pieces = (vocabulary.piece(i) for i in range(0, min(vocabulary.size, 32000), EVERY))
    return blake2b(b"\0".join(pieces), digest_size=8).hexdigest()


@lru_cache(maxsize=4)
def table_of(vocabulary: Vocabulary) -> Table:
    """The table of a vocabulary; empty if there is none."""
    file = FOLDER / f"{fingerprint(vocabulary)}.npz"
    if not file.is_file():
        return {}
    table: Table = {}
    with np.load(file) as arrays:
        for n in LENGTHS:
            contexts, tokens, tenths = (arrays[f"{name}{n}"] for name in ("contexts", "tokens", "tenths"))
            said = zip(tokens.tolist(), [_SURE[sure] for sure in tenths.tolist()], strict=True)
            table.update(zip(map(tuple, contexts.tolist()), said, strict=True))
    return table


def write(file: Path, texts: Sequence[Sequence[int]]) -> int:
    """Makes a table of the token ids of some texts; how many contexts it has."""
    shorter: Table = {}
    arrays: dict[str, NDArray[np.int64]] = {}
    for n in sorted(LENGTHS):
        contexts, tokens, tenths = _frequent(texts, n)
        said = list(zip(tokens.tolist(), tenths.tolist(), strict=True))
        keys = list(map(tuple, contexts.tolist()))
        kept = np.array([i for i, key in enumerate(keys) if _adds(said[i], shorter.get(key[1:]))], dtype=np.int64)
        shorter = {key: (token, _SURE[tenths]) for key, (token, tenths) in zip(keys, said, strict=True)}
        arrays |= {f"contexts{n}": contexts[kept], f"tokens{n}": tokens[kept], f"tenths{n}": tenths[kept]}
    file.parent.mkdir(parents=True, exist_ok=True)
    small = {name: array.astype(np.uint8 if name.startswith("tenths") else np.uint32) for name, array in arrays.items()}
    np.savez_compressed(file, **small)  # type: ignore[arg-type]
    return sum(len(array) for name, array in arrays.items() if name.startswith("tokens"))


def _adds(said: tuple[int, int], shorter: tuple[int, Evidence] | None) -> bool:
    """Whether a context says more than the one that is a token shorter."""
    return shorter is None or shorter[0] != said[0] or said[1] >= shorter[1][1] + 10 * SURER


def _frequent(texts: Sequence[Sequence[int]], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Contexts [found, n] that are frequent and sure, the token that follows most often, and its share in tenths."""
    runs = [np.lib.stride_tricks.sliding_window_view(np.asarray(ids), n + 1) for ids in texts if len(ids) > n]
    grams, counts = np.unique(np.concatenate(runs), axis=0, return_counts=True)
    begins = np.flatnonzero(np.r_[True, (grams[1:, :n] != grams[:-1, :n]).any(1)])
    totals = np.add.reduceat(counts, begins)
    group = np.repeat(np.arange(len(begins)), np.diff(np.r_[begins, len(grams)]))
    first = np.lexsort((-counts, group))[begins]  # of each context the most frequent continuation
    share = (counts[first] - 0.5) / (totals + 0.5)  # a little less, where few were seen
    kept = (totals >= LEAST) & (share >= SURE)
    return grams[first][kept, :n], grams[first][kept, n], (10 * share[kept]).astype(np.int64)
