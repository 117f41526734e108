"""Gumbel-max sampling over whole rows in the C library (`src/draw.h`): exact, and without the GIL."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from pastalm.engines.native import library
from pastalm.engines.sampling import LogitRow, Winners


@functools.cache
def load() -> Winners | None:
    """`sampling.winners`, computed by the library; None if it is not available."""
    loaded = library.load()
    if loaded is None:
        return None
    function: Any = loaded.pastalm_draw
    function.restype, function.argtypes = ctypes.c_int32, [ctypes.c_int32] * 3 + [ctypes.c_void_p] * 4

    def winners(rows: Sequence[LogitRow], temperatures: Sequence[float], keys: Sequence[int]) -> list[int]:
        """The id of the largest logit by temperature + noise in each row; rows of one length and type."""
        n, size, kind = len(rows), len(rows[0]), rows[0].dtype
        rows = [np.ascontiguousarray(row) for row in rows]
        addresses = np.array([row.__array_interface__["data"][0] for row in rows], dtype=np.uintp)
        heat = np.array(temperatures, dtype=np.float64)
        seeds = np.array(keys, dtype=np.int64)
        tokens = np.empty(n, dtype=np.int64)
        arrays = (addresses, heat, seeds, tokens)
        failed = function(n, size, kind == np.float64, *(a.__array_interface__["data"][0] for a in arrays))
        if failed or any(row.shape != (size,) or row.dtype != kind for row in rows):
            raise ValueError(f"rows must have {size} values of type {kind}, and temperatures must be above 0")
        drawn: list[int] = tokens.tolist()
        return drawn

    return winners
