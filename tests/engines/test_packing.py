"""Packed linear layers compute what plain ones do, up to rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pastalm.engines.transformers.packed_linear import PackedLinear, PackedPart, can_pack, pack

pytestmark = pytest.mark.skipif(not can_pack(torch.nn.Linear(2, 2)), reason="torch has no packed layout on this CPU")


DTYPES = [d for d in (torch.float32, torch.bfloat16) if can_pack(torch.nn.Linear(2, 2).to(d))]


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.sampled_from(DTYPES))
@settings(max_examples=80, deadline=None)
def test_a_packed_layer_equals_the_plain_one(
    rows: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(rows + 41 * inputs + 2911 * outputs)
    plain = torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    packed = PackedLinear(plain)
    x = torch.randn(1, rows, inputs, dtype=dtype)
    rounding = 1e-4 if dtype == torch.float32 else 2**-7
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), plain(x), rtol=rounding, atol=1e-5)
        assert torch.equal(packed.weight, plain.weight)


def test_only_plain_layers_are_replaced() -> None:
    class Own(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), Own(4, 5), torch.nn.Sequential(torch.nn.Linear(5, 6)))
    assert pack(model) == 2
    assert [type(m) for m in (model[0], model[1], model[2][0])] == [PackedLinear, Own, PackedLinear]
    assert pack(model) == 0


class Feed(torch.nn.Module):
    """Siblings by name, called as models call them, and one that has other inputs."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        for name, size in {"q_proj": 8, "k_proj": 4, "v_proj": 4}.items():
            setattr(self, name, torch.nn.Linear(6, size, bias=bias))
        self.gate_proj, self.up_proj = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x), self.gate_proj(x), self.up_proj(x)], -1)


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_one_input_become_one_product(bias: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(Feed(bias), torch.nn.Linear(26, 6), Feed(bias))
    inputs = [torch.randn(1, rows, 6) for rows in (3, 1, 3)]
    with torch.inference_mode():
        want = [model(x) for x in inputs]
        assert pack(model) == 11
        assert [type(model[0].get_submodule(n)) for n in ("v_proj", "up_proj")] == [PackedPart, PackedLinear]
        for x, expected in zip(inputs, want, strict=True):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_parts_may_be_called_in_any_order_and_again() -> None:
    torch.manual_seed(0)
    feed, plain = Feed(True), Feed(True)
    plain.load_state_dict(feed.state_dict())
    pack(feed)
    a, b = torch.randn(1, 2, 6), torch.randn(1, 2, 6)
    with torch.inference_mode():
        for name, x in [("v_proj", a), ("q_proj", a), ("q_proj", a), ("k_proj", b), ("v_proj", a), ("k_proj", b)]:
            torch.testing.assert_close(feed.get_submodule(name)(x), plain.get_submodule(name)(x), rtol=1e-4, atol=1e-5)


def test_other_weights_are_left_alone() -> None:
    assert not can_pack(torch.nn.Linear(2, 2).double())
    assert not can_pack(torch.nn.Linear(2, 2).half())
    assert not can_pack(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16()))
