"""What the tokens of a step see of the pool: the rows that an attention call reads, and their masks as booleans.

NumPy only; the engine moves the results to the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pastalm.engines.batching import Bools, Ints

CALL_COST = 512
"""Cost of one more attention call, in slots of the pool that could be read instead."""


@dataclass(frozen=True, slots=True)
class RowQueries:
    """The tokens of one request in a step, and what they see of its row in the pool.

    row: of the pool.
    visible: [queries, width], the slots that each token sees.
    query_positions: [queries].
    key_positions: [width].
    tokens: [queries], their indices among the packed tokens.
    """

    row: int
    visible: Bools
    query_positions: Ints
    key_positions: Ints
    tokens: Ints

    @property
    def width(self) -> int:
        return self.visible.shape[1]

    def padded(self, queries: int) -> RowQueries:
        """The same with more queries. The added ones belong to no token and see the first slot."""
        missing = queries - len(self.tokens)
        sees_first = np.arange(self.width) == 0
        return replace(
            self,
            visible=np.concatenate([self.visible, np.repeat(sees_first[None], missing, 0)]),
            query_positions=np.pad(self.query_positions, (0, missing)),
            tokens=np.arange(queries),
        )


def grouped(rows: Sequence[int], widths: Sequence[int]) -> list[tuple[int, int]]:
    """Which rows of the pool are read in one attention call: ranges i, j of `rows`.

    rows: ascending.
    widths: slots that must be read of each.

    A call reads all rows between its first and its last, each as far as its widest. The ranges minimise the number of
    slots read plus `CALL_COST` for each call: a short request does not pay for a long one beside it.
    """
    costs, begins = [0.0], [0]
    for j in range(1, len(rows) + 1):
        width, least, begin = 0, math.inf, j - 1
        for i in range(j - 1, -1, -1):
            width = max(width, widths[i])
            cost = costs[i] + (rows[j - 1] + 1 - rows[i]) * width + CALL_COST
            if cost < least:
                least, begin = cost, i
        costs.append(least)
        begins.append(begin)
    ranges, end = [], len(rows)
    while end:
        ranges.append((begins[end], end))
        end = begins[end]
    return ranges[::-1]


def query_layout(
    batch: Sequence[RowQueries], rows: range, queries: int, query_of_token: Ints, first_query: int
) -> Ints:
    """The packed token of each query, [rows, queries].

    batch: the requests whose rows are among `rows`.
    query_of_token: [tokens], is filled in: the index of each token's query among all flattened queries.
    first_query: queries before these rows.
    """
    tokens = np.zeros((len(rows), queries), dtype=np.int64)
    for one in batch:
        row, n = one.row - rows[0], len(one.tokens)
        tokens[row, :n] = one.tokens
        query_of_token[one.tokens] = first_query + row * queries + np.arange(n)
    return tokens


def visibility(batch: Sequence[RowQueries], queries: int, width: int, window: int | None) -> Bools:
    """[rows, queries, width], from the first row of the batch to its last.

    window: of sliding attention, in positions.

    A query without a token sees nothing, and its output is never read.
    """
    first = batch[0].row
    visible = np.zeros((batch[-1].row + 1 - first, queries, width), dtype=np.bool_)
    for one in batch:
        sees = one.visible
        if window is not None:
            sees = sees & (one.query_positions[:, None] - one.key_positions < window)
        visible[one.row - first, : sees.shape[0], : sees.shape[1]] = sees
    return visible
