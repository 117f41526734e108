"""Packed linear layers compute what plain ones do, up to float32 rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pastalm.engines.packing import PackedLinear, can_pack, pack

pytestmark = pytest.mark.skipif(
    not can_pack(torch.nn.Linear(2, 2)), reason="torch has no packed layout on this CPU"
)


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_packed_layer_equals_the_plain_one(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(rows + 41 * inputs + 2911 * outputs)
    plain = torch.nn.Linear(inputs, outputs, bias=bias)
    packed = PackedLinear(plain)
    x = torch.randn(1, rows, inputs)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-4, atol=1e-5)


def test_only_plain_layers_are_replaced() -> None:
    class Own(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), Own(4, 5), torch.nn.Sequential(torch.nn.Linear(5, 6)))
    assert pack(model) == 2
    assert [type(m) for m in (model[0], model[1], model[2][0])] == [PackedLinear, Own, PackedLinear]
    assert pack(model) == 0


def test_only_float32_is_packed() -> None:
    assert not can_pack(torch.nn.Linear(2, 2).double())
    assert not can_pack(torch.nn.Linear(2, 2).bfloat16())
