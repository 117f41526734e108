"""The masks of values as a logits processor: a thread may write only what its grammar has."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pastalm.core.events import Path
from pastalm.engines.processors.base import LogitRow, ThreadProcessor, Visible
from pastalm.structured.grammar import Value


class ValueMask(ThreadProcessor):
    """Masks one thread's logits. It keeps nothing: the interpreter of the answer has each thread's value.

    value: the value that a thread writes now (None: it writes none, and is not masked).
    path: the thread.
    """

    reads_visible = False

    def __init__(self, value: Callable[[Path], Value | None], path: Path) -> None:
        self._value, self._path = value, path

    def __call__(self, visible: Visible, logits: LogitRow) -> LogitRow:
        if (value := self._value(self._path)) is not None:
            mask = value.mask()
            logits[: len(mask)][~mask] = -np.inf
            logits[len(mask) :] = -np.inf
        return logits

    def fork(self, path: Path) -> ValueMask:
        return ValueMask(self._value, path)
