"""Schemas in a short form."""

from __future__ import annotations

from typing import Any


def fields(**properties: Any) -> dict[str, Any]:
    """An object that has all of some properties."""
    return {"type": "object", "properties": properties, "required": list(properties)}
