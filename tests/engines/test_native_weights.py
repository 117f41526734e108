"""Packed matrices stand for what GGML's own code says they do, and lie as pastalm.h draws them."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm.engines.native import weights
from pastalm.engines.native.weights import Architecture, Floats, Matrix, Rope, Rows, WeightType
from pastalm.errors import CapabilityError

TYPES = st.sampled_from(weights.TYPES)
QUANTISED = st.sampled_from(["Q4_0", "Q8_0"])


@st.composite
def arrays(draw: st.DrawFn) -> Floats:
    """Rows with zeros, ties, one value many times and very different sizes."""
    outputs = draw(st.integers(1, 70))
    inputs = 32 * draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    array = rng.standard_normal((outputs, inputs)).astype(np.float32)
    array *= np.float32(10) ** rng.integers(-4, 3, (outputs, 1)).astype(np.float32)
    if draw(st.booleans()):
        array = np.round(array * 4) / 4
    array[rng.random(outputs) < 0.1] = 0
    return array.astype(np.float32)


def ggml(array: Floats, kind: str) -> Any:
    return gguf.quants.quantize(array, getattr(gguf.GGMLQuantizationType, kind))


def meant(array: Floats, kind: str) -> Floats:
    """What gguf's code reads from what it has quantised."""
    if kind == "F32":
        return array
    if kind == "F16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16).astype(np.float32)
    read: Floats = gguf.quants.dequantize(ggml(array, kind), getattr(gguf.GGMLQuantizationType, kind))
    return read.reshape(array.shape)


def same(one: Matrix, other: Matrix) -> bool:
    return one.type == other.type and np.array_equal(one.data, other.data)


@given(array=arrays(), kind=TYPES)
def test_unpack_gives_what_ggml_means(array: Floats, kind: WeightType) -> None:
    matrix = weights.pack(array, kind)
    assert np.array_equal(weights.unpack(matrix), meant(array, kind))
    assert (matrix.outputs, matrix.inputs) == array.shape
    assert matrix.data.ctypes.data % 64 == 0
    assert len(matrix.data) == weights.packed_bytes(kind, *array.shape)


@given(array=arrays(), kind=QUANTISED)
def test_blocks_are_taken_as_they_are(array: Floats, kind: WeightType) -> None:
    assert same(weights.from_blocks(kind, ggml(array, kind), *array.shape), weights.pack(array, kind))


@given(data=st.data(), kind=QUANTISED)
def test_any_blocks_stand_for_what_ggml_reads(data: st.DataObject, kind: WeightType) -> None:
    outputs, groups = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    blocks = rng.integers(0, 256, (outputs, groups, 18 if kind == "Q4_0" else 34), np.uint8)
    scales = rng.standard_normal((outputs, groups, 1)).astype(np.float16)
    blocks[..., :2] = scales.view(np.uint8)
    matrix = weights.from_blocks(kind, blocks, outputs, 32 * groups)
    read = gguf.quants.dequantize(blocks.reshape(outputs, -1), getattr(gguf.GGMLQuantizationType, kind))
    assert np.array_equal(weights.unpack(matrix), read)


@given(array=arrays(), kind=TYPES, data=st.data())
def test_the_bytes_lie_as_the_header_says(array: Floats, kind: WeightType, data: st.DataObject) -> None:
    """Read by the sentences of pastalm.h, one weight at a time."""
    matrix = weights.pack(array, kind)
    outputs, inputs = array.shape
    block_bytes = len(matrix.data) // -(-outputs // 16)
    assert block_bytes % 64 == 0
    truth = meant(array, kind)
    for _ in range(20):
        output, k = data.draw(st.integers(0, outputs - 1)), data.draw(st.integers(0, inputs - 1))
        block = matrix.data[output // 16 * block_bytes :][:block_bytes]
        o, group, at = output % 16, k // 32, k % 32
        if kind == "Q4_0":
            pair = block[(64 + 2 * 256) * (group // 2) :]
            byte = pair[64 + 256 * (group % 2) + 64 * (at // 8) + 4 * o + at % 4]
            q = int(byte >> 4 if at % 8 >= 4 else byte & 15)
            scale = pair[:64].view(np.float16)[16 * (group % 2) + o]
            value = np.float32(scale) * np.float32(q - 8)
        elif kind == "Q8_0":
            pair = block[(64 + 2 * 512) * (group // 2) :]
            q = int(pair[64 + 512 * (group % 2) + 64 * (at // 4) + 4 * o + at % 4])
            scale = pair[:64].view(np.float16)[16 * (group % 2) + o]
            value = np.float32(scale) * np.float32(q - 128)
        elif kind == "BF16":
            half = block.view(np.uint16)[32 * (k // 2) + 2 * o + k % 2]
            value = np.array([int(half) << 16], np.uint32).view(np.float32)[0]
        else:
            held = block.view(np.float32 if kind == "F32" else np.float16)
            value = np.float32(held[16 * k + o])
        assert value == truth[output, k]


@given(array=arrays(), kind=TYPES)
def test_what_lies_behind_the_last_output_is_zero(array: Floats, kind: WeightType) -> None:
    matrix = weights.pack(array, kind)
    whole = Matrix(matrix.data, kind, -(-matrix.outputs // 16) * 16, matrix.inputs)
    assert not weights.unpack(whole)[matrix.outputs :].any()


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).standard_normal((201, 64)).astype(np.float32)
    for kind in weights.TYPES:
        whole = weights.pack(array, kind)
        with monkeypatch.context() as patch:
            patch.setattr(weights, "_SLICE", 64 * 64)
            assert same(weights.pack(array, kind), whole)
            assert np.array_equal(weights.unpack(whole), meant(array, kind))
            if kind in ("Q4_0", "Q8_0"):
                assert same(weights.from_blocks(kind, ggml(array, kind), 201, 64), whole)


@given(seed=st.integers(0, 2**32), data=st.data())
def test_parts_may_end_anywhere(seed: int, data: st.DataObject) -> None:
    """Rows of many parts, read a slice at a time, are the rows of the whole."""
    rng = np.random.default_rng(seed)
    sizes = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=4))
    parts = [rng.standard_normal((size, 64)).astype(np.float32) for size in sizes]
    rows = weights.joined([Rows(len(p), 64, lambda a, b, p=p: p[a:b]) for p in parts])  # type: ignore[misc]
    whole = np.concatenate(parts)
    first = data.draw(st.integers(0, len(whole) - 1))
    last = data.draw(st.integers(first + 1, len(whole)))
    assert rows.outputs == len(whole)
    assert np.array_equal(rows.read(first, last), whole[first:last])
    assert same(weights.pack_rows(rows, "Q8_0"), weights.pack(whole, "Q8_0"))


@given(seed=st.integers(0, 2**32), pairs=st.integers(1, 4), kind=QUANTISED)
def test_gate_and_up_lie_by_turns(seed: int, pairs: int, kind: WeightType) -> None:
    rng = np.random.default_rng(seed)
    gate, up = (rng.standard_normal((32 * pairs, 64)).astype(np.float32) for _ in range(2))
    both = weights.gate_up(gate, up)
    for i in range(len(both)):
        source = up if i // 32 % 2 else gate
        assert np.array_equal(both[i], source[i // 64 * 32 + i % 32])
    blocks = weights.gate_up(ggml(gate, kind), ggml(up, kind))
    assert same(weights.from_blocks(kind, blocks, len(both), 64), weights.pack(both, kind))
    later = weights.interleaved(*(Rows(len(x), 64, lambda a, b, x=x: x[a:b]) for x in (gate, up)))  # type: ignore[misc]
    assert np.array_equal(later.read(0, len(both)), both)
    if pairs > 1:
        assert np.array_equal(later.read(64, len(both)), both[64:])


def test_another_layout_has_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights.fingerprint()
    assert weights.fingerprint() == before
    monkeypatch.setitem(weights._CONVERT, "F32", lambda rows: np.ascontiguousarray(rows[:, ::-1]))
    assert weights.fingerprint() != before


def test_what_cannot_be_packed_is_refused() -> None:
    for kind, inputs in (("Q4_0", 48), ("Q8_0", 0), ("BF16", 3), ("F32", 1)):
        with pytest.raises(CapabilityError, match="multiple"):
            weights.pack(np.zeros((4, inputs), np.float32), kind)  # type: ignore[arg-type]
    with pytest.raises(CapabilityError, match="32"):
        weights.gate_up(np.zeros((48, 32)), np.zeros((48, 32)))


def test_groups_too_small_for_a_scale_are_zeros() -> None:
    array = np.full((16, 32), 1e-42, np.float32)
    for kind in ("Q4_0", "Q8_0"):
        assert not weights.unpack(weights.pack(array, kind)).any()  # type: ignore[arg-type]


@given(
    frequencies=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=4),
    most=st.none() | st.integers(1, 1 << 20),
)
def test_an_architecture_is_the_same_after_json(frequencies: list[float], most: int | None) -> None:
    made = Architecture(
        layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocabulary=100,
        activation="silu", epsilon=1e-5, attention_scale=0.25, ropes=(Rope(tuple(frequencies), 1.1),),
        layer_ropes=(0, -1), windows=(0, 128), max_positions=most,
    )  # fmt: skip
    assert Architecture.from_json(made.to_json()) == made
