"""A script that was played on an engine in float32, held against one masked forward pass of transformers."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedModel

from tests.laws.oracle import Linear
from tests.laws.reference import reference_logits
from tests.laws.script import Script


def errors(model: PreTrainedModel, script: Script, *, hiding: bool = True) -> list[float]:
    """Of each token the largest difference between the engine's logits and one masked pass, over their spread."""
    linear = Linear(script.prompt, script.record, script.policy)
    n = len(linear.entries)
    visible = linear.visible if hiding else np.tril(np.ones((n, n), dtype=np.bool_))
    want = reference_logits(model, linear.tokens, linear.positions, visible)
    assert len(script.logits) > 10
    spread = float(want.std())
    return [
        float((logits - want[linear.place[path, index]]).abs().max()) / spread
        for (path, index), logits in script.logits.items()
    ]


def error(model: PreTrainedModel, script: Script, *, hiding: bool = True) -> float:
    return max(errors(model, script, hiding=hiding))
