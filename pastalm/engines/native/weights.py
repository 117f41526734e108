"""Weights of the native engine: packed matrices, and a model's architecture in numbers.

`src/pastalm.h` documents the layouts. A packed matrix consists of blocks of 16 outputs. `Q4_0` and `Q8_0` are quantised
exactly as GGML does, or taken from GGML's blocks unchanged. Large matrices are packed in slices of rows. Arrays are
[outputs, inputs]. Raises CapabilityError for shapes that have no layout. NumPy only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from pastalm.errors import CapabilityError

WeightType = Literal["Q4_0", "Q8_0", "BF16", "F32", "F16"]
TYPES: tuple[WeightType, ...] = get_args(WeightType)
ALIGNMENT = 64
GROUP = 32
"""Inputs that share a scale."""
_BLOCK = 16
"""Outputs of a block."""
_GGML_BYTES = {"Q4_0": 18, "Q8_0": 34}
_GROUP_BYTES = {"Q4_0": 256, "Q8_0": 512}
_SLICE = 1 << 20
"""Elements in a slice, which one CPU thread packs."""
_THREADS = 8

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]


class Rope(NamedTuple):
    """Rotary positions.

    inverse_frequencies: of each pair of dimensions; times the position, they give its angle.
    factor: cosine and sine are multiplied by it.
    """

    inverse_frequencies: tuple[float, ...]
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder like Llama, in numbers. Scales are factors.

    layer_ropes: for each layer an index into `ropes`; -1: no rotation.
    windows: for each layer how many positions it sees; 0: all.
    attention_softcap, logit_softcap: 0: no cap.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    activation: Literal["silu", "gelu_tanh"]
    epsilon: float
    attention_scale: float
    ropes: tuple[Rope, ...]
    layer_ropes: tuple[int, ...]
    windows: tuple[int, ...]
    embedding_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    max_positions: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        fields = json.loads(text)
        fields["ropes"] = tuple(Rope(tuple(inverse), factor) for inverse, factor in fields["ropes"])
        for name in ("layer_ropes", "windows"):
            fields[name] = tuple(fields[name])
        return cls(**fields)


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A packed matrix.

    data: flat, aligned to 64 bytes.
    type: of the weights.
    outputs: without padding.
    inputs: columns.
    """

    data: Bytes
    type: WeightType
    outputs: int
    inputs: int


Tensors: TypeAlias = Mapping[str, "Matrix | Floats"]
"""A model's tensors. Matrices: embedding, head (unless it is the embedding) and for layer i "{i}.qkv",
"{i}.attention_out", "{i}.gate_up", "{i}.down". Vectors: norm, "{i}.input_norm", "{i}.mlp_norm" and, if present,
"{i}.qkv_bias", "{i}.attention_out_bias", "{i}.q_norm", "{i}.k_norm", "{i}.attention_post_norm", "{i}.mlp_post_norm"."""


# ------------------------------------------------------------------------------ whole matrices


def pack(array: NDArray[Any], type: WeightType) -> Matrix:
    """Packs an array of floats; quantises as GGML does."""
    outputs, inputs = array.shape
    return pack_rows(Rows(outputs, inputs, lambda first, last: array[first:last]), type)


def from_blocks(type: WeightType, blocks: NDArray[Any], outputs: int, inputs: int) -> Matrix:
    """Packs GGML's blocks of Q4_0 or Q8_0, row by row, without changing their values."""
    raw = np.ascontiguousarray(blocks).view(np.uint8).reshape(outputs, -1)
    return pack_rows(Rows(outputs, inputs, lambda first, last: raw[first:last]), type, blocks=True)


def unpack(matrix: Matrix) -> Floats:
    """The values of a packed matrix, float32 [outputs, inputs]."""
    whole = np.empty((matrix.outputs, matrix.inputs), np.float32)
    for first, last in slices(matrix.outputs, matrix.inputs):
        whole[first:last] = _unpacked(_blocks(matrix, first, last), matrix)[: last - first]
    return whole


def gate_up(gate: NDArray[Any], up: NDArray[Any]) -> NDArray[Any]:
    """Interleaves rows: 32 of `gate`, then the corresponding 32 of `up`, and so on. Rows are floats or blocks."""
    rows, width = gate.shape
    if rows % GROUP or up.shape != gate.shape:
        raise CapabilityError(f"gate and up must have the same number of outputs, a multiple of {GROUP}, not {rows}")
    pairs = np.empty((rows // GROUP, 2, GROUP, width), gate.dtype)
    pairs[:, 0] = gate.reshape(-1, GROUP, width)
    pairs[:, 1] = up.reshape(-1, GROUP, width)
    return pairs.reshape(2 * rows, width)


# ------------------------------------------------------------------------------ piece by piece


class Rows(NamedTuple):
    """A matrix whose rows are read while it is packed.

    outputs, inputs: its shape.
    read: read(first, last) gives rows as floats or GGML's blocks.
    """

    outputs: int
    inputs: int
    read: Callable[[int, int], NDArray[Any]]


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, concatenated."""
    starts = list(accumulate((part.outputs for part in parts), initial=0))

    def read(first: int, last: int) -> NDArray[Any]:
        ranges = [
            (part, max(first - start, 0), min(last - start, part.outputs))
            for part, start in zip(parts, starts, strict=False)
        ]
        return np.concatenate([part.read(a, b) for part, a, b in ranges if a < b])

    return Rows(starts[-1], parts[0].inputs, read)


def interleaved(gate: Rows, up: Rows) -> Rows:
    """`gate_up` for rows that are read later."""

    def read(first: int, last: int) -> NDArray[Any]:
        a, b = first // 2, last // 2
        return gate_up(gate.read(a, b), up.read(a, b))

    return Rows(gate.outputs + up.outputs, gate.inputs, read)


def pack_rows(rows: Rows, type: WeightType, *, blocks: bool = False) -> Matrix:
    """`pack`, or `from_blocks`, for rows that are read a slice at a time, by several threads."""
    outputs, inputs, read = rows
    matrix = empty(type, outputs, inputs)
    pack_into = fill_blocks if blocks else fill

    def pack_slice(bounds: tuple[int, int]) -> None:
        pack_into(matrix, bounds[0], read(*bounds))

    with ThreadPoolExecutor(min(os.cpu_count() or 1, _THREADS)) as threads:
        for _ in threads.map(pack_slice, slices(outputs, inputs)):
            pass
    return matrix


def empty(type: WeightType, outputs: int, inputs: int) -> Matrix:
    """A matrix of zeros, to be filled."""
    return Matrix(aligned(packed_bytes(type, outputs, inputs)), type, outputs, inputs)


def fill(matrix: Matrix, first: int, array: NDArray[Any]) -> None:
    """Packs rows from row `first` on.

    matrix: to be filled.
    first: a multiple of 16.
    array: rows of floats; their number is a multiple of 16, unless they are the last ones.
    """
    rows = np.asarray(array, np.float32)
    if matrix.type in _GGML_BYTES:
        groups = rows.reshape(len(rows), -1, GROUP)
        quantised = _quantised_q4(groups) if matrix.type == "Q4_0" else _quantised_q8(groups)
        _write_quantised(matrix, first, *quantised)
        return
    padded = _padded(_CONVERT[matrix.type](rows))
    together = 2 if matrix.type == "BF16" else 1
    laid = padded.reshape(-1, _BLOCK, matrix.inputs // together, together).transpose(0, 2, 1, 3)
    _blocks(matrix, first, first + len(rows))[:] = (
        np.ascontiguousarray(laid).view(np.uint8).reshape(len(padded) // _BLOCK, -1)
    )


def fill_blocks(matrix: Matrix, first: int, blocks: Bytes) -> None:
    """`fill` with GGML's blocks of the same type, [rows, bytes of a row]."""
    if matrix.type not in _GGML_BYTES:
        raise CapabilityError(f"{matrix.type} weights are not stored as blocks")
    groups = np.ascontiguousarray(blocks).reshape(len(blocks), -1, _GGML_BYTES[matrix.type])
    scales = np.ascontiguousarray(groups[..., :2]).view(np.float16)[..., 0]
    _write_quantised(matrix, first, _without_sign(groups[..., 2:], matrix.type), scales)


def _without_sign(values: Bytes, type: WeightType) -> Bytes:
    """GGML's bytes of each group as one unsigned value a byte. In Q4_0 the low halves are the first 16 values; Q8_0 is
    signed."""
    if type == "Q4_0":
        return np.concatenate([values & 15, values >> 4], axis=-1)
    return values ^ np.uint8(128)


def slices(outputs: int, inputs: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are packed at once; each starts at a multiple of 64."""
    rows = max(64, _SLICE // inputs // 64 * 64)
    for first in range(0, outputs, rows):
        yield first, min(first + rows, outputs)


def packed_bytes(type: WeightType, outputs: int, inputs: int) -> int:
    """Bytes of a packed matrix. Raises CapabilityError for a shape that cannot be packed."""
    return -(-outputs // _BLOCK) * _block_bytes(type, inputs)


def fingerprint() -> str:
    """A hash of the layouts. Files packed with another one cannot be read."""
    numbers = np.arange(17 * 96, dtype=np.float32).reshape(17, 96) - 800
    return hashlib.sha256(b"".join(pack(numbers, type).data.tobytes() for type in TYPES)).hexdigest()


def aligned(size: int) -> Bytes:
    """Zeros at an address that is a multiple of 64."""
    buffer = np.zeros(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size]


# ------------------------------------------------------------------------------ layouts


def _block_bytes(type: WeightType, inputs: int) -> int:
    multiple = GROUP if type in _GGML_BYTES else 2
    if inputs < multiple or inputs % multiple:
        raise CapabilityError(f"a matrix of {inputs} inputs cannot be {type}: they must be a multiple of {multiple}")
    if type in _GGML_BYTES:
        groups = inputs // GROUP
        return groups * _GROUP_BYTES[type] + -(-groups // 2) * ALIGNMENT
    return _BLOCK * inputs * (4 if type == "F32" else 2)


def _blocks(matrix: Matrix, first: int, last: int) -> Bytes:
    """The blocks of some rows, [blocks, bytes of a block]."""
    whole = matrix.data.reshape(-1, _block_bytes(matrix.type, matrix.inputs))
    return whole[first // _BLOCK : -(-last // _BLOCK)]


def _padded(rows: NDArray[Any]) -> NDArray[Any]:
    missing = -len(rows) % _BLOCK
    return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1)) if missing else rows


def _pairs(target: Bytes, matrix: Matrix) -> tuple[Bytes, Bytes]:
    """Views into blocks [blocks, bytes]: for every two groups their scales and quantised values,
    [blocks, pairs, 64 + 2 * a group's bytes], and the same for an odd last group, [blocks, 64 + its bytes]."""
    size = _GROUP_BYTES[matrix.type]
    count = matrix.inputs // GROUP // 2
    whole = count * (ALIGNMENT + 2 * size)
    pairs = target[:, :whole].reshape(len(target), count, ALIGNMENT + 2 * size)
    return pairs, target[:, whole:]


def _write_quantised(matrix: Matrix, first: int, q: Bytes, scales: NDArray[np.float16]) -> None:
    """Writes quantised values q, [rows, groups, 32] unsigned, and scales, [rows, groups]."""
    target = _blocks(matrix, first, first + len(q))
    groups, count = matrix.inputs // GROUP, len(target)
    q = _padded(q)
    if matrix.type == "Q4_0":
        halves = q.reshape(-1, _BLOCK, groups, 4, 2, 4)  # vector, half of the byte, i
        values = halves[..., 0, :] | halves[..., 1, :] << np.uint8(4)
    else:
        values = q.reshape(-1, _BLOCK, groups, 8, 4)
    laid = np.ascontiguousarray(values.transpose(0, 2, 3, 1, 4)).reshape(count, groups, -1)
    by_group = _padded(scales).reshape(-1, _BLOCK, groups).transpose(0, 2, 1)
    scale_bytes = np.ascontiguousarray(by_group, np.float16).view(np.uint8).reshape(count, groups, -1)
    pairs, rest = _pairs(target, matrix)
    even = groups // 2 * 2
    pairs[..., :ALIGNMENT] = scale_bytes[:, :even].reshape(count, even // 2, ALIGNMENT)
    pairs[..., ALIGNMENT:] = laid[:, :even].reshape(count, even // 2, 2 * laid.shape[2])
    if groups % 2:
        rest[:, : 2 * _BLOCK], rest[:, ALIGNMENT:] = scale_bytes[:, -1], laid[:, -1]


def _unpacked(blocks: Bytes, matrix: Matrix) -> Floats:
    count, inputs = len(blocks), matrix.inputs
    if matrix.type in _GGML_BYTES:
        return _unpacked_groups(blocks, matrix)
    if matrix.type == "BF16":
        halves = np.ascontiguousarray(blocks).view(np.uint16).reshape(count, inputs // 2, _BLOCK, 2)
        rows = halves.transpose(0, 2, 1, 3).reshape(-1, inputs)
        return (rows.astype(np.uint32) << 16).view(np.float32)
    dtype = np.float32 if matrix.type == "F32" else np.float16
    values = np.ascontiguousarray(blocks).view(dtype).reshape(count, inputs, _BLOCK)
    return values.transpose(0, 2, 1).reshape(-1, inputs).astype(np.float32)


def _unpacked_groups(blocks: Bytes, matrix: Matrix) -> Floats:
    count, groups = len(blocks), matrix.inputs // GROUP
    vectors, zero = (4, 8) if matrix.type == "Q4_0" else (8, 128)
    pairs, rest = _pairs(blocks, matrix)
    even, size = groups // 2 * 2, _GROUP_BYTES[matrix.type]
    scale_bytes = pairs[..., :ALIGNMENT].reshape(count, even, 2 * _BLOCK)
    laid = pairs[..., ALIGNMENT:].reshape(count, even, size)
    if groups % 2:
        scale_bytes = np.concatenate([scale_bytes, rest[:, None, : 2 * _BLOCK]], axis=1)
        laid = np.concatenate([laid, rest[:, None, ALIGNMENT:]], axis=1)
    values = laid.reshape(count, groups, vectors, _BLOCK, 4).transpose(0, 3, 1, 2, 4)
    if matrix.type == "Q4_0":
        values = np.stack([values & 15, values >> 4], axis=-2)
    q = values.reshape(count, _BLOCK, groups, GROUP).astype(np.float32) - np.float32(zero)
    scales = np.ascontiguousarray(scale_bytes).view(np.float16).transpose(0, 2, 1).astype(np.float32)
    return (q * scales[..., None]).reshape(-1, matrix.inputs)


# ------------------------------------------------------------------------------ numbers


def _quantised_q4(groups: Floats) -> tuple[Bytes, NDArray[np.float16]]:
    """GGML's Q4_0: the largest value by magnitude becomes -8."""
    at = np.abs(groups).argmax(axis=-1, keepdims=True)
    scale = np.take_along_axis(groups, at, axis=-1) / np.float32(-8)
    scaled = groups * _inverse(scale) + np.float32(8.5)
    return np.clip(scaled, 0, 15).astype(np.uint8), _to_float16(scale[..., 0])


def _quantised_q8(groups: Floats) -> tuple[Bytes, NDArray[np.float16]]:
    """GGML's Q8_0: the largest magnitude becomes 127; halves are rounded away from zero."""
    scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    scaled = groups * _inverse(scale)
    whole = np.trunc(scaled)
    rounded = whole + np.trunc(2 * (scaled - whole))
    q = np.clip(rounded, -127, 127) + np.float32(128)
    return q.astype(np.uint8), _to_float16(scale[..., 0])


def _inverse(scale: Floats) -> Floats:
    """1 / scale; 0 if that is not finite, for groups so small that their scale is 0."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1 / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _to_float16(rows: Floats) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return rows.astype(np.float16)


def _to_bfloat16(rows: Floats) -> NDArray[np.uint16]:
    """Rounds to nearest, ties to even. NaN stays NaN."""
    bits = np.ascontiguousarray(rows).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(rows), np.uint16(0x7FC0), rounded)


_CONVERT: dict[str, Callable[[Floats], NDArray[Any]]] = {
    "BF16": _to_bfloat16,
    "F32": np.ascontiguousarray,
    "F16": _to_float16,
}
