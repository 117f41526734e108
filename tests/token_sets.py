"""Token sets in few letters."""

from __future__ import annotations

from pastalm.core.events import TokenSet


def only(*ids: int) -> TokenSet:
    return TokenSet(frozenset(ids))


def all_but(*ids: int) -> TokenSet:
    return TokenSet(frozenset(ids), inverted=True)
