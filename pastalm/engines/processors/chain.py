"""The chain of processors of a request, and those that have a name.

A package adds a named processor by an entry point of the group `pastalm.logits_processors`: what it loads is called
with the settings as keywords and returns a processor or a function of visible ids and logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np

from pastalm.core.events import Decoded, Event, Path
from pastalm.core.params import Request
from pastalm.engines.processors.base import LogitRow, Processor, ThreadFunction, ThreadProcessor, Visible
from pastalm.engines.processors.bias import Bias
from pastalm.engines.processors.penalty import RepetitionPenalty
from pastalm.errors import EngineError, PastaError, RequestError

GROUP = "pastalm.logits_processors"
"""The group of entry points."""
OWN = {"caad": "caad:Caad", "decortl": "decortl:DecoRtl"}
"""The processors of this package, by name: module and class."""
KEPT = 16
"""Named processors that are kept for further requests with the same settings."""

Chain: TypeAlias = tuple[ThreadProcessor, ...]
NOTHING = Visible(())
"""For chains that read no visible ids."""


class Function(ThreadProcessor):
    """A function of visible ids and logits as a processor."""

    def __init__(self, function: ThreadFunction) -> None:
        self._function = function

    def __call__(self, visible: Visible, logits: LogitRow) -> LogitRow:
        return self._function(visible, logits)

    def __str__(self) -> str:
        return getattr(self._function, "__name__", str(self._function))


@cache
def _installed() -> Mapping[str, Any]:
    from importlib.metadata import entry_points  # slow to import, and rarely needed

    return {point.name: point for point in entry_points(group=GROUP)}


def names() -> list[str]:
    """The names of all processors that are installed."""
    return sorted({*OWN, *_installed()})


def named(name: str, settings: Mapping[str, Any]) -> Any:
    """What a named processor's maker returns for these settings; for equal settings it is made once, as long as it is
    among the last. Raises RequestError."""
    try:
        return _made_once(name, tuple(sorted(settings.items())))
    except TypeError:  # settings that cannot be compared, such as arrays
        return _made(name, settings)


@lru_cache(maxsize=KEPT)
def _made_once(name: str, settings: tuple[tuple[str, Any], ...]) -> Any:
    return _made(name, dict(settings))


def _made(name: str, settings: Mapping[str, Any]) -> Any:
    try:
        return _maker(name)(**settings)
    except PastaError:
        raise
    except (TypeError, ValueError, OSError) as error:
        raise RequestError(f"the logits processor {name!r} does not take these settings: {error}") from error


def _maker(name: str) -> Any:
    if name in OWN:
        module, kind = OWN[name].split(":")
        return getattr(import_module(f"pastalm.engines.processors.{module}"), kind)
    if name not in _installed():
        raise RequestError(f"there is no logits processor {name!r}: installed are {', '.join(names())}")
    try:
        return _installed()[name].load()
    except (ImportError, AttributeError) as error:
        raise RequestError(f"the logits processor {name!r} cannot be loaded: {error}") from error


def begin(request: Request) -> Chain:
    """The chain of a request's main thread. Raises RequestError if one of its processors cannot be made, EngineError if
    one fails."""
    params = request.params
    chain: list[ThreadProcessor] = []
    if request.logit_bias:
        chain.append(Bias(request.logit_bias))
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenalty(params.repetition_penalty, request.prompt_token_ids))
    return (*chain, *(_begun(each, request) for each in params.processors or ()))


def _begun(given: Any, request: Request) -> ThreadProcessor:
    if isinstance(given, str):
        given = named(given, {})
    elif isinstance(given, Sequence):
        given = named(*given)
    if not hasattr(given, "begin"):
        return Function(given)
    processor: Processor = given
    with _named(processor):
        return processor.begin(request)


def reads_visible(chain: Chain) -> bool:
    return any(processor.reads_visible for processor in chain)


def fork(chain: Chain, path: Path) -> Chain:
    """The chain of a child that begins now. Raises EngineError if a processor fails."""
    forked = []
    for processor in chain:
        with _named(processor):
            forked.append(processor.fork(path))
    return tuple(forked)


def join(chain: Chain, children: Sequence[Chain]) -> None:
    """Tells a chain that its thread joins these children's. Raises EngineError if a processor fails."""
    if children:
        for processor, theirs in zip(chain, zip(*children, strict=True), strict=True):
            with _named(processor):
                processor.join(theirs)


def write(chain: Chain, event: Event) -> None:
    """Tells a chain of the tokens that an event gives its thread. Raises EngineError if a processor fails."""
    for processor in chain:
        with _named(processor):
            if isinstance(event, Decoded):
                processor.write(event.token, tag=event.tag, forced=False)
            for token in event.forced:
                processor.write(token, tag=False, forced=True)


def processed(chain: Chain, visible: Visible, logits: LogitRow) -> LogitRow:
    """The logits of a thread's next token; the row itself is changed. Raises EngineError if a processor fails."""
    row = logits
    for processor in chain:
        with _named(processor):
            row = processor(visible, row)
        if row is not logits:
            row = _checked(processor, row, logits)
    return row


def _checked(processor: ThreadProcessor, row: Any, like: LogitRow) -> LogitRow:
    array = np.asarray(row)
    if array.shape != like.shape or array.dtype.kind not in "fiu":
        raise EngineError(
            f"the logits processor {_name(processor)} must return logits of shape {like.shape}, "
            f"not {type(row).__name__} of shape {array.shape}"
        )
    return np.ascontiguousarray(array, dtype=like.dtype)


class _named:
    """Inside, what a processor raises becomes an EngineError that names it; refusals stay as they are."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, PastaError):
            raise EngineError(
                f"the logits processor {_name(self._processor)} failed: {type(error).__name__}: {error}"
            ) from error


def _name(processor: Any) -> str:
    return str(processor) if isinstance(processor, Function) else type(processor).__name__
