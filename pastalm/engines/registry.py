"""Every engine by name: where it is, what it loads, and what has to be installed for it.

A new engine is one file and one entry here; one that loads weights from a name also has a loader in
`pastalm.engine_choice`. Nothing is imported before it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Literal

Source = Literal["folder", "gguf"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One engine.

    name: as users write it, and in its capabilities.
    module: declares CAPABILITIES. It may have `notes()`, which says how it runs here ("" for nothing to say), and
        `unavailable()`, which says why it cannot ("" where it can).
    extra: of the package, with what it imports; "" for none.
    loads: what `pastalm.engine_choice` can open with it; empty for an engine that is made in another way.
    """

    name: str
    module: str
    extra: str = ""
    loads: tuple[Source, ...] = ()

    def describe(self) -> str:
        """What the engine can do here, or what has to be installed, in one line."""
        try:
            engine = import_module(f"pastalm.engines.{self.module}")
        except ImportError:
            return f"pip install 'pastalm[{self.extra}]'"
        if reason := getattr(engine, "unavailable", str)():
            return str(reason)
        notes = getattr(engine, "notes", str)()
        return f"works: {engine.CAPABILITIES}" + (f"; {notes}" if notes else "")


ENTRIES = (
    Entry(name="native", module="native.engine", loads=("folder", "gguf")),
    Entry(name="transformers", module="transformers.engine", extra="transformers", loads=("folder",)),
    Entry(name="llama.cpp", module="llama_cpp", extra="llama-cpp", loads=("gguf",)),
    Entry(name="openai", module="completions.engine", extra="remote"),
    Entry(name="scripted", module="scripted"),
)
LOADABLE = tuple(entry.name for entry in ENTRIES if entry.loads)
"""Names that `LLM(engine=…)` takes, beside "auto"."""


def describe() -> dict[str, str]:
    """A line for each engine, by name."""
    return {entry.name: entry.describe() for entry in ENTRIES}
