"""Repetition penalty: against loops.

Source: CTRL (Keskar et al., arXiv 1909.05858), section 4.1, in the form that transformers and vLLM give it: logits of
ids that were seen are divided by the penalty if they are positive, multiplied by it if not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pastalm.core.events import Path
from pastalm.engines.processors.base import Ints, LogitRow, ThreadProcessor, Visible


class RepetitionPenalty(ThreadProcessor):
    """Counts the ids of the prompt and of the reader's text that its thread sees; no tags, and nothing that was forced.

    penalty: above 1 makes repetition less likely.
    """

    reads_visible = False

    def __init__(self, penalty: float, seen: Iterable[int]) -> None:
        self.penalty = penalty
        self._seen: set[int] = set(seen)
        self._ids: Ints = np.fromiter(self._seen, np.int64, len(self._seen))

    @property
    def ids(self) -> Ints:
        """The distinct ids that it counts, int64, in no order."""
        return self._ids[: len(self._seen)]

    def __call__(self, visible: Visible, logits: LogitRow) -> LogitRow:
        penalty = logits.dtype.type(self.penalty)
        before = logits[self.ids]
        logits[self.ids] = np.where(before > 0, before / penalty, before * penalty)
        return logits

    def fork(self, path: Path) -> RepetitionPenalty:
        child = RepetitionPenalty(self.penalty, ())
        child._seen, child._ids = self._seen.copy(), self.ids.copy()
        return child

    def write(self, token: int, *, tag: bool, forced: bool) -> None:
        if not (tag or forced):
            self._count(token)

    def join(self, children: Sequence[RepetitionPenalty]) -> None:
        for child in children:
            for token in child._seen - self._seen:
                self._count(token)

    def _count(self, token: int) -> None:
        n = len(self._seen)
        self._seen.add(token)
        if len(self._seen) == n:
            return
        if n == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(n + 16, dtype=np.int64)])
        self._ids[n] = token
