"""A model for the native engine: packed tensors that the C library uses in place.

The library checks its input; what it rejects becomes a ModelError with its message. A model keeps its arrays alive. The
library's memory is freed when a model or pool is closed or garbage-collected. A pool belongs to one model. Neither is
thread-safe.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from ctypes import byref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pastalm.engines.native import library as lib
from pastalm.engines.native.weights import Architecture, Matrix, Tensors
from pastalm.errors import EngineError, ModelError

PAGE = lib.PAGE
CACHE_TYPES = ("BF16", "F32")
MOST_THREADS = 256


def processors() -> int:
    """Threads of a step: OMP_NUM_THREADS, else the processors that this process may use."""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if threads.isdigit() and int(threads):
        return min(int(threads), MOST_THREADS)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_THREADS)


class NativeModel:
    """A packed model.

    architecture, tensors: from `models.packed_models`.
    threads: CPU threads of a step (None: `processors()`).

    Raises ModelError if the tensors do not fit the architecture, CapabilityError if the library is not available.
    """

    def __init__(self, architecture: Architecture, tensors: Tensors, *, threads: int | None = None) -> None:
        self.architecture = architecture
        self.tensors: Mapping[str, Any] = tensors
        self._library = lib.library()
        a = architecture
        layers = (lib.Layer * a.layers)(*map(self._layer, range(a.layers)))
        ropes = (lib.Rope * max(len(a.ropes), 1))()
        frequencies = [np.array(rope.inverse_frequencies, dtype=np.float32) for rope in a.ropes]
        for i, rope in enumerate(a.ropes):
            ropes[i] = lib.Rope(_vector(frequencies[i]), rope.factor)
        config = lib.Config(
            layers=a.layers,
            hidden=a.hidden,
            intermediate=a.intermediate,
            heads=a.heads,
            kv_heads=a.kv_heads,
            head_dim=a.head_dim,
            vocabulary=a.vocabulary,
            ropes=len(a.ropes),
            activation=lib.ACTIVATIONS[a.activation],
            threads=threads or processors(),
            epsilon=a.epsilon,
            embedding_scale=a.embedding_scale,
            attention_scale=a.attention_scale,
            attention_softcap=a.attention_softcap,
            logit_softcap=a.logit_softcap,
            embedding=self._matrix("embedding"),
            head=self._matrix("head" if "head" in tensors else "embedding"),
            norm=self._vector("norm"),
        )
        self._frequencies = frequencies  # the library reads them
        self.pointer: int | None = self._library.pastalm_model_new(byref(config), layers, ropes)
        if not self.pointer:
            raise ModelError(f"the native engine cannot run this model: {lib.error()}")
        self.close = weakref.finalize(self, self._library.pastalm_model_free, self.pointer)
        """Frees the library's memory. The model and its pools cannot be used any more."""
        self.close.atexit = False  # a step may still run

    def _layer(self, i: int) -> lib.Layer:
        a = self.architecture
        matrices = {name: self._matrix(f"{i}.{name}") for name in ("qkv", "attention_out", "gate_up", "down")}
        vectors = {field[0]: self._vector(f"{i}.{field[0]}") for field in lib.Layer._fields_ if field[1] is lib.Vector}
        return lib.Layer(**matrices, **vectors, rope=a.layer_ropes[i], window=a.windows[i])

    def _vector(self, name: str) -> lib.Vector:
        return _vector(self.tensors.get(name))

    def _matrix(self, name: str) -> lib.Matrix:
        matrix: Matrix = self.tensors[name]
        return lib.Matrix(
            data=matrix.data.ctypes.data,
            bytes=matrix.data.nbytes,
            type=lib.WEIGHT_TYPES[matrix.type],
            outputs=matrix.outputs,
            inputs=matrix.inputs,
        )


class Pool:
    """Keys and values of a model's tokens. Memory is only used once it is written to.

    model: the model.
    slots: number of tokens.
    type: BF16 or F32.

    Raises ModelError if it cannot be allocated, EngineError if the model is closed.
    """

    def __init__(self, model: NativeModel, slots: int, type: str = "BF16") -> None:
        if not model.close.alive:
            raise EngineError("the model is closed: make another")
        self._library, self._model = lib.library(), model
        self.slots = slots
        self.pointer: int | None = self._library.pastalm_pool_new(model.pointer, slots, lib.WEIGHT_TYPES[type])
        if not self.pointer:
            raise ModelError(f"{lib.error()}: lower max_num_seqs or max_model_len")
        self.close = weakref.finalize(self, self._library.pastalm_pool_free, self.pointer)
        self.close.atexit = False
        self.slot_bytes: int = self._library.pastalm_pool_bytes(self.pointer)
        """Bytes of keys and values of one token."""
        self._logits = np.empty((0, model.architecture.vocabulary), dtype=np.float32)
        self.likeliest = np.empty(0, dtype=np.int32)
        """Of each row of logits that the last step gave the id of the largest, the first of equal ones; -1 where one is
        not finite."""

    def copy(self, source: int, target: int, count: int) -> None:
        """Copies `count` slots from `source` on to `target` on."""
        self._check_open()
        _check(self._library.pastalm_pool_copy(self.pointer, source, target, count))

    def clear(self, first: int, count: int) -> None:
        """Frees the memory of `count` slots from `first` on."""
        self._check_open()
        _check(self._library.pastalm_pool_clear(self.pointer, first, count))

    def step(
        self,
        ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        slots: NDArray[np.int32],
        groups: Any,
        keep: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        """Runs one forward pass.

        ids, positions, slots: [tokens].
        groups: an array of `library.Group`, to which the tokens belong in order.
        keep: indices of the tokens whose logits are returned, ascending.

        Returns logits [len(keep), vocabulary], which the next step overwrites. Raises EngineError.
        """
        self._check_open()
        if len(keep) > len(self._logits):
            self._logits = np.empty((len(keep), self._model.architecture.vocabulary), dtype=np.float32)
        logits = self._logits[: len(keep)]
        self.likeliest = np.empty(len(keep), dtype=np.int32)
        _check(
            self._library.pastalm_step(
                self._model.pointer,
                self.pointer,
                len(ids),
                ids.ctypes.data,
                positions.ctypes.data,
                slots.ctypes.data,
                len(groups),
                groups,
                len(keep),
                keep.ctypes.data,
                logits.ctypes.data,
                self.likeliest.ctypes.data,
            )
        )
        return logits

    def _check_open(self) -> None:
        if not (self.close.alive and self._model.close.alive):
            raise EngineError("the engine is closed: make another")


def _vector(values: NDArray[np.float32] | None) -> lib.Vector:
    return lib.Vector() if values is None else lib.Vector(values.ctypes.data, len(values))


def _check(code: int) -> None:
    if code:
        raise EngineError(lib.error())
