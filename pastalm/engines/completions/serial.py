"""The policy `serial`, for engines that know only ordinary causal rows, such as a completions server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pastalm.core.events import Decoded, Event, Forked, Joined, Path


class SerialLayout:
    """The row of each thread under `serial`: an ordinary causal row, the linear form of everything that it may see.

    It takes the same events as a `Layout`. A row only grows until its thread joins; then it is replaced.

    prompt: the prompt's tokens.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._prompt = list(prompt)
        self._threads: dict[Path, _Written] = {}

    def apply(self, event: Event) -> None:
        """Applies an event."""
        path = event.path
        if isinstance(event, Forked):
            self._threads[path] = _Written(self.row(path[:-1]) if path else self._prompt)
            if path:
                self._threads[path[:-1]].own.append(path)
        elif isinstance(event, Joined):
            written = self._threads[path]
            written.own += [child for child in event.children if child[:-1] != path]
            written.joined.update(event.children)
        own = self._threads[path].own
        if isinstance(event, Decoded):
            own.append(event.token)
        own += event.forced

    def row(self, path: Path) -> list[int]:
        """Everything that thread `path` sees now, in linear order."""
        return [*self._threads[path].context, *self._expanded(path)]

    def _expanded(self, path: Path) -> Iterator[int]:
        thread = self._threads[path]
        for item in thread.own:
            if isinstance(item, int):
                yield item
            elif item in thread.joined:
                yield from self._expanded(item)


@dataclass(slots=True)
class _Written:
    """What a thread wrote.

    context: the row before it.
    own: its tokens, its children in their places, and other threads where it joined them.
    joined: of these, those that it has joined.
    """

    context: list[int]
    own: list[int | Path] = field(default_factory=list)
    joined: set[Path] = field(default_factory=set)
