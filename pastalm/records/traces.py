"""Events as JSON: a trace file has one on each line."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pastalm.core.events import Blocked, Decoded, Event, Finished, Forked, Joined
from pastalm.errors import DataError

_adapter: TypeAdapter[Event] = TypeAdapter(
    Annotated[Forked | Decoded | Blocked | Joined | Finished, Field(discriminator="kind")],
    config=ConfigDict(ser_json_inf_nan="strings"),  # JSON has no infinite log-probability
)


def to_json(event: Event) -> str:
    """One line of JSON."""
    return _adapter.dump_json(event, exclude_defaults=False).decode()


def from_json(line: str | bytes) -> Event:
    """The event of one line. Raises DataError if it is none."""
    try:
        return _adapter.validate_json(line)
    except ValidationError as error:
        problem = error.errors()[0]
        raise DataError(f"not an event: {problem['msg']} at {problem['loc']}") from None
