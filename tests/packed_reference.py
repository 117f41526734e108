"""What a packed model computes, written plainly in float64, for tests: one sequence, one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pastalm.engines.native.weights import Architecture, Matrix, Tensors, unpack

Array = NDArray[np.float64]


def logits(made: Architecture, tensors: Tensors, ids: Sequence[int]) -> Array:
    """[tokens, vocabulary] of a plain sequence at positions 0, 1, 2 ..."""

    def weight(name: str) -> Array:
        held = tensors[name]
        return (unpack(held) if isinstance(held, Matrix) else held).astype(np.float64)

    def optional(name: str, otherwise: float) -> Any:
        return weight(name) if name in tensors else otherwise

    def normed(x: Array, name: str) -> Array:
        scaled = x / np.sqrt((x * x).mean(-1, keepdims=True) + made.epsilon)
        return scaled * weight(name)

    positions = np.arange(len(ids))
    apart = positions[:, None] - positions
    x = weight("embedding")[list(ids)] * made.embedding_scale
    for i in range(made.layers):
        y = normed(x, f"{i}.input_norm") @ weight(f"{i}.qkv").T + optional(f"{i}.qkv_bias", 0)
        heads = y.reshape(len(ids), -1, made.head_dim).swapaxes(0, 1)
        queries, keys, values = np.split(heads, [made.heads, made.heads + made.kv_heads])
        if f"{i}.q_norm" in tensors:
            queries, keys = normed(queries, f"{i}.q_norm"), normed(keys, f"{i}.k_norm")
        if made.layer_ropes[i] >= 0:
            inverse, factor = made.ropes[made.layer_ropes[i]]
            angles = positions[:, None] * np.array(inverse)
            queries, keys = (_rotated(part, angles, factor) for part in (queries, keys))
        keys, values = (np.repeat(part, made.heads // made.kv_heads, 0) for part in (keys, values))
        scores = queries @ keys.swapaxes(1, 2) * made.attention_scale
        scores = _capped(scores, made.attention_softcap)
        sees = (apart >= 0) & ((apart < made.windows[i]) | (made.windows[i] == 0))
        scores = np.where(sees, scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        joined = (shares @ values).swapaxes(0, 1).reshape(len(ids), -1)
        y = joined @ weight(f"{i}.attention_out").T + optional(f"{i}.attention_out_bias", 0)
        x = x + (normed(y, f"{i}.attention_post_norm") if f"{i}.attention_post_norm" in tensors else y)
        pairs = (normed(x, f"{i}.mlp_norm") @ weight(f"{i}.gate_up").T).reshape(len(ids), -1, 2, 32)
        gate, up = (pairs[:, :, j].reshape(len(ids), -1) for j in range(2))
        y = (_activated(gate, made.activation) * up) @ weight(f"{i}.down").T
        x = x + (normed(y, f"{i}.mlp_post_norm") if f"{i}.mlp_post_norm" in tensors else y)
    head = weight("head" if "head" in tensors else "embedding")
    return _capped(normed(x, "norm") @ head.T, made.logit_softcap)


def _rotated(x: Array, angles: Array, factor: float) -> Array:
    half = x.shape[-1] // 2
    one, other = x[..., :half], x[..., half:]
    cosine, sine = np.cos(angles) * factor, np.sin(angles) * factor
    return np.concatenate([one * cosine - other * sine, other * cosine + one * sine], -1)


def _capped(x: Array, cap: float) -> Array:
    return cap * np.tanh(x / cap) if cap else x


def _activated(x: Array, kind: str) -> Array:
    if kind == "silu":
        return x / (1 + np.exp(-x))
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
