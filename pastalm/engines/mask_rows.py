"""Rows of an attention mask as arrays, from what a `Layout` says that tokens and threads see."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def mask_row(sees: int, width: int) -> NDArray[np.bool_]:
    """[width] bool: the first places of those that are seen. sees: bit p says whether place p is."""
    packed = np.frombuffer(sees.to_bytes(-(-max(width, sees.bit_length()) // 8), "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=width, bitorder="little").view(np.bool_)
