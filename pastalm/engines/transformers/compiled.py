"""Decoding steps through torch.compile, on CPUs: faster after minutes of compiling."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

BUCKETS = (4, 16)
"""Tokens of a compiled step. With packed weights a step of 4 tokens takes as long as one of 1."""
FREEZING = {
    "freezing": True,  # weights become constants in the layout of the kernels made for them
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
}


class CompiledModel:
    """The compiled forward of a model, one graph for each number of tokens.

    Frozen graphs cannot be cached on disk (torch's cache leaves them out), only the choice of their kernels.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from torch._inductor import select_algorithm

        select_algorithm.PRINT_AUTOTUNE = False  # it would print a page for each shape
        self._forward = torch.compile(model, dynamic=False)

    def __call__(self, **inputs: Any) -> Any:
        masks = inputs["attention_mask"]
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            torch._dynamo.maybe_mark_dynamic(mask, 3)  # slots that are read
        with torch._inductor.config.patch(FREEZING):
            return self._forward(**inputs)
