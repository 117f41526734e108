"""Logit bias: what is added to the logits of some ids (`SamplingParams.logit_bias`, and the odds of forking)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pastalm.engines.processors.base import Ints, LogitRow, ThreadProcessor, Visible


class Bias(ThreadProcessor):
    """ids: int64. added: float64, one for each."""

    reads_visible = False

    def __init__(self, logit_bias: Mapping[int, float]) -> None:
        self.ids: Ints = np.fromiter(logit_bias.keys(), np.int64, len(logit_bias))
        self.added: NDArray[np.float64] = np.fromiter(logit_bias.values(), np.float64, len(logit_bias))

    def __call__(self, visible: Visible, logits: LogitRow) -> LogitRow:
        logits[self.ids] += self.added.astype(logits.dtype)
        return logits
