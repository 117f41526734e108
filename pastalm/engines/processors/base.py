"""What a logits processor is, and what it is told of its thread."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from pastalm.core.events import Path
from pastalm.core.params import Request

Ints: TypeAlias = NDArray[np.int64]
LogitRow: TypeAlias = NDArray[Any]
"""Logits [vocabulary], float32 or float64."""


class Visible(Sequence[int]):
    """The ids of the tokens that a thread sees, tags included, in the order in which it came to see them: the prompt,
    what its ancestors saw and wrote up to the fork, then its own tokens, and the chunks that it joins where it joins
    them. It only grows at its end.

    A token costs an entry of a list. An array is made only when `ids` is read, and then of new ids only.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._ids = list(prompt)
        self._array = np.empty(0, dtype=np.int64)
        self._filled = 0
        self._inherited = 0

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._ids[index]

    @property
    def ids(self) -> Ints:
        """All ids, int64 [n]; not to be written."""
        n = len(self._ids)
        if n > len(self._array):
            larger = np.empty(2 * n, dtype=np.int64)
            larger[: self._filled] = self._array[: self._filled]
            self._array = larger
        if n > self._filled:
            self._array[self._filled : n] = self._ids[self._filled :]
            self._filled = n
        ids = self._array[:n]
        ids.flags.writeable = False
        return ids

    def write(self, token: int) -> None:
        """The thread has a further token."""
        self._ids.append(token)

    def fork(self) -> Visible:
        """What a child sees that begins now."""
        child = Visible(self._ids)
        child._inherited = len(self)
        return child

    def join(self, children: Sequence[Visible]) -> None:
        """Adds what these children of the thread have come to see since they began."""
        for child in children:
            self._ids += child._ids[child._inherited :]


class ThreadProcessor(ABC):
    """Processes the logits of one thread. The base of those that keep a state along the thread's tokens; any other can
    be a function of visible ids and logits.

    reads_visible: whether it reads the visible ids. A chain in which none does keeps none.
    """

    reads_visible: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        stateful = cls.write is not ThreadProcessor.write or cls.join is not ThreadProcessor.join
        if stateful and cls.fork is ThreadProcessor.fork:
            raise TypeError(
                f"{cls.__name__} keeps a state (write or join), so it must define fork: a child needs its own"
            )

    @abstractmethod
    def __call__(self, visible: Visible, logits: LogitRow) -> LogitRow:
        """The logits from which the thread's next token is chosen. It is called once for each token that is sampled.

        visible: ids of what the thread sees now.
        logits: [vocabulary], as the processor before it left them; may be changed in place and returned.
        """

    def fork(self, path: Path) -> ThreadProcessor:
        """The processor of a child that begins now, at `path`. The same one does where nothing is kept."""
        return self

    def write(self, token: int, *, tag: bool, forced: bool) -> None:  # noqa: B027 - most keep nothing
        """The thread has a further token. tag: it belongs to a tag. forced: it was not sampled."""

    def join(self, children: Sequence[Any]) -> None:  # noqa: B027 - most keep nothing
        """From now on the thread sees what some children wrote. children: their processors of this kind, in order."""


ThreadFunction: TypeAlias = Callable[[Visible, LogitRow], LogitRow]
"""Visible ids and logits in, logits out: a processor that keeps nothing."""


class Processor(Protocol):
    """A logits processor as a user gives it: makes what processes the threads of a request."""

    def begin(self, request: Request) -> ThreadProcessor:
        """The processor of the request's main thread. `request.prompt_token_ids` is what it sees, `request.vocabulary`
        has the tokens' bytes. Raises RequestError if it cannot serve the request."""
