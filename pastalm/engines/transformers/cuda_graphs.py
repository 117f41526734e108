"""Steps of fixed shapes as CUDA graphs: a GPU finishes a step of few tokens before Python has launched its kernels.

A graph is captured when its shape is first needed, which takes some tenths of a second, and then replayed with new
numbers in the same inputs. On other devices the forward simply runs, over the same padded inputs.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from pastalm.engines.transformers.masks import RowQueries

Shape = TypeVar("Shape", bound=Hashable)
Inputs = Mapping[str, Tensor]

MOST_GRAPHS = 32
"""Graphs that are kept, those used last: each holds memory of the device."""
WARM_UP = 2
"""Forward passes before a capture: libraries allocate what they keep in the first ones."""

SINGLE_TOKENS = (1, 2, 4, 8, 16, 32)
"""Tokens of a captured step of one request."""
TOKENS_PER_ROW = (0.25, 1, 2, 4)
"""Tokens of a captured step of several requests, for each row of the pool."""
QUERIES = (4, 16)
"""Tokens of one request in a captured step of several."""
MIN_WIDTH = 256
"""Slots that a captured step reads of a row: this, or twice, four times … as many."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """The shape of a captured step.

    tokens: in all.
    width: slots that are read of a row.
    queries: tokens of each row.
    single: whether it reads one row, which is an input, or all rows of the pool.
    """

    tokens: int
    width: int
    queries: int
    single: bool


def step_shape(batch: Sequence[RowQueries], tokens: int, rows: int, capacity: int) -> StepShape | None:
    """The smallest shape that holds the tokens of a batch; None if there is none.

    rows, capacity: rows of the pool, and slots of a row at most.
    """
    used = max(one.width for one in batch)
    width = min(capacity, max(MIN_WIDTH, 1 << (used - 1).bit_length()))
    if len(batch) == 1:
        total = _smallest(SINGLE_TOKENS, tokens)
        return None if total is None else StepShape(total, width, total, single=True)
    total = _smallest([math.ceil(share * rows) for share in TOKENS_PER_ROW], tokens)
    queries = _smallest(QUERIES, max(len(one.tokens) for one in batch))
    return None if total is None or queries is None else StepShape(total, width, queries, single=False)


def _smallest(sizes: Sequence[int], n: int) -> int | None:
    """The first of some ascending sizes that holds n."""
    return next((size for size in sizes if size >= n), None)


class Graphs(Generic[Shape]):
    """Captured steps by shape, at most `MOST_GRAPHS`; the least recently used one makes way.

    forward: takes a shape and its inputs. It must read nothing but its inputs and what stays in the same memory, write
        the same again when it runs twice, and never wait for the device.
    """

    def __init__(self, forward: Callable[[Shape, Inputs], Tensor], device: torch.device) -> None:
        self._forward, self._device = forward, device
        self._steps: OrderedDict[Shape, _Step] = OrderedDict()
        self._memory: Any = None

    def __call__(self, shape: Shape, inputs: Mapping[str, NDArray[Any]]) -> Tensor:
        """The output of the forward; the next call may overwrite it."""
        step = self._steps.get(shape)
        if step is None:
            step = self._capture(shape, inputs)
        else:
            self._steps.move_to_end(shape)
            for name, array in inputs.items():
                step.inputs[name].copy_(torch.from_numpy(array))
        return step.run()

    def _capture(self, shape: Shape, inputs: Mapping[str, NDArray[Any]]) -> _Step:
        while len(self._steps) >= MOST_GRAPHS:
            self._steps.popitem(last=False)
        if self._device.type == "cuda" and not self._steps:
            self._memory = torch.cuda.graph_pool_handle()  # one whose last graph was dropped cannot be used again
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
        step = self._steps[shape] = _Step(lambda: self._forward(shape, tensors), tensors, self._memory)
        return step

    def clear(self) -> None:
        """Drops all graphs: what they read has moved."""
        self._steps.clear()

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Shape]:
        """The shapes, the least recently used first."""
        return iter(self._steps)


class _Step:
    """One shape: its inputs, and on a GPU the graph over them."""

    def __init__(self, forward: Callable[[], Tensor], inputs: Inputs, memory: Any) -> None:
        self.inputs, self.run = inputs, forward
        if memory is None:
            return
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UP):
                forward()
        torch.cuda.current_stream().wait_stream(side_stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
            self._out = forward()
        self.run = self._replay

    def _replay(self) -> Tensor:
        self._graph.replay()
        return self._out
