"""Steps of fixed shapes as CUDA graphs: a GPU is done with a step of few tokens before Python has launched its kernels.

A graph is captured when its shape is first needed, some tenths of a second, and replayed from then on with new
numbers in the same inputs. On other devices the forward simply runs, over the same padded inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

Shape = TypeVar("Shape", bound=Hashable)
Inputs = Mapping[str, Tensor]

WARM_UP = 2
"""Forwards before a capture: libraries allocate what they keep in the first ones."""


class Graphs(Generic[Shape]):
    """`forward` by shape. It must read nothing but its inputs and what always lies in the same memory, write there
    the same again when it runs twice, and never wait for the device."""

    def __init__(self, forward: Callable[[Shape, Inputs], Tensor], device: torch.device) -> None:
        self._forward, self._device = forward, device
        self._steps: dict[Shape, _Step] = {}
        self._memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, shape: Shape, given: Mapping[str, NDArray[Any]]) -> Tensor:
        """What the forward gives; the next call may overwrite it."""
        step = self._steps.get(shape)
        if step is None:
            inputs = {name: torch.from_numpy(x).to(self._device) for name, x in given.items()}
            step = self._steps[shape] = _Step(lambda: self._forward(shape, inputs), inputs, self._memory)
        else:
            for name, x in given.items():
                step.inputs[name].copy_(torch.from_numpy(x))
        return step.run()

    def __len__(self) -> int:
        return len(self._steps)


class _Step:
    """One shape: its inputs, and the graph over them where there are graphs."""

    def __init__(self, forward: Callable[[], Tensor], inputs: Inputs, memory: Any) -> None:
        self.inputs, self.run = inputs, forward
        if memory is None:
            return
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                forward()
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
            self._out = forward()
        self.run = self._replay

    def _replay(self) -> Tensor:
        self._graph.replay()
        return self._out
