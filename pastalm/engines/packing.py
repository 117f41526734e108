"""Linear layers laid out once for the few rows of a decoding step, on CPUs.

A step multiplies k rows (one a thread) with every weight of the model. The plain kernels read a
float32 weight twice as slowly for 2 to 8 rows as for one, so that threads would cost what they spare;
oneDNN reads a weight that it has laid out beforehand as fast for 4 rows as for one. This is how
torch's own compiler treats frozen weights (torch.ops.mkldnn), here without compiling anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4
"""The number of rows that weights are laid out for: fastest for 1 to 16 of them where measured."""


class PackedLinear(torch.nn.Module):  # type: ignore[misc]
    """What `linear` computes, for inference: [..., inputs] -> [..., outputs]."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


def can_pack(model: torch.nn.Module) -> bool:
    """Whether the model computes in float32 on a CPU, and torch offers the layout."""
    weights = {(p.device.type, p.dtype) for p in model.parameters()}
    offered = all(hasattr(torch.ops.mkldnn, f) for f in ("_reorder_linear_weight", "_linear_pointwise"))
    return weights == {("cpu", torch.float32)} and torch.backends.mkldnn.is_available() and offered


def pack(model: torch.nn.Module) -> int:
    """Replaces every plain linear layer of a model by a packed one; how many. The model can then
    only infer: its weights cannot be trained or saved any more."""
    plain = [(n, m) for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    for name, linear in plain:
        model.set_submodule(name, PackedLinear(linear))
    return len(plain)
