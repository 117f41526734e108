"""Linear layers whose weights are packed once for the few rows of a decoding step, on CPUs.

A step multiplies k rows (one for each thread) with every weight of the model. The plain kernels take twice as long for
2 to 8 rows as for one with float32 weights, which would cancel the gain of threads, and they repack bfloat16 weights in
every step. oneDNN is as fast for 4 rows as for one if the weight was packed before. torch's compiler does the same with
frozen weights (torch.ops.mkldnn); here nothing is compiled.

Layers with the same input (queries, keys and values; gate and up) become one product, which is computed when the first
of them is called: fewer and larger reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that a module calls with the same input."""
ROWS = 4
"""The number of rows that weights are packed for: the fastest for 1 to 16 rows in measurements."""


class PackedLinear(torch.nn.Module):  # type: ignore[misc]
    """Computes the same as a linear layer, for inference: [..., inputs] -> [..., outputs].

    linear: the layer.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The weight unpacked, [outputs, inputs], for models that multiply with a router's weights themselves."""
        whole: Tensor = self.packed.to_dense()
        return whole

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


class _Product:
    """Several linear layers with the same input as one packed layer. It keeps its outputs for the last input until each
    layer has taken its own."""

    def __init__(self, linears: Sequence[torch.nn.Linear]) -> None:
        whole = torch.nn.Linear(1, 1, bias=False)
        whole.in_features = linears[0].in_features
        self.sizes = [linear.out_features for linear in linears]
        whole.out_features = sum(self.sizes)
        whole.weight = torch.nn.Parameter(torch.cat([m.weight.detach() for m in linears]), False)
        biases = [m.bias.detach() for m in linears if m.bias is not None]
        whole.bias = torch.nn.Parameter(torch.cat(biases), False) if biases else None
        self._packed = PackedLinear(whole)
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def weight(self, index: int) -> Tensor:
        """The weight of one layer."""
        return self._packed.weight.split(self.sizes)[index]

    def __call__(self, x: Tensor, index: int) -> Tensor:
        if x is not self._input or index not in self._outputs:
            self._input = x
            self._outputs = dict(enumerate(self._packed(x).split(self.sizes, -1)))
        out = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return out


class PackedPart(torch.nn.Module):  # type: ignore[misc]
    """One layer of a product; computes the same as `linear`, for inference."""

    def __init__(self, linear: torch.nn.Linear, product: _Product, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._product, self._index = product, index

    @property
    def weight(self) -> Tensor:
        """As `PackedLinear.weight`."""
        return self._product.weight(self._index)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self._index)


def can_pack(model: torch.nn.Module) -> bool:
    """Whether a model can be packed: it is on the CPU in float32, or in bfloat16 if the CPU supports it, and torch has
    the packed layout."""
    weights = {(p.device.type, p.dtype) for p in model.parameters()}
    needed = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, f) for f in needed):
        return False
    if weights == {("cpu", torch.bfloat16)}:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weights == {("cpu", torch.float32)}


def pack(model: torch.nn.Module) -> int:
    """Replaces every plain linear layer of a model by a packed one. Returns their number.

    The model can then only be used for inference: its weights cannot be trained or saved.
    """
    plain = {n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    for names in _siblings(plain):
        product = _Product([plain[name] for name in names])
        for i, name in enumerate(names):
            model.set_submodule(name, PackedPart(plain[name], product, i))
    for name in plain:
        if type(model.get_submodule(name)) is torch.nn.Linear:
            model.set_submodule(name, PackedLinear(plain[name]))
    return len(plain)


def _siblings(plain: dict[str, torch.nn.Linear]) -> list[list[str]]:
    """Groups of names of layers that can be one product."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in plain)
    groups = [[f"{p}.{n}" if p else n for n in names] for p in parents for names in SIBLINGS]
    whole = [group for group in groups if all(name in plain for name in group)]
    return [g for g in whole if len({(plain[n].in_features, plain[n].bias is None) for n in g}) == 1]
