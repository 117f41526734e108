"""Tables of parameters: fields of a dataclass, each with its bounds and one line of help.

    @dataclass(kw_only=True)
    class Settings:
        top_p: Annotated[float, Parameter("Nucleus sampling; 1: off.", gt=0, le=1)] = 1.0

`table(Settings)` has its rows, from which checks, command-line options and fields of HTTP requests are made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, get_type_hints


@dataclass(frozen=True, slots=True)
class Parameter:
    """A row of the table.

    help: one line for users; names what turns the parameter off.
    ge, gt, le: bounds of the value, as pydantic names them.
    off: a value that turns the parameter off, named where a bound is explained.
    served_ge, served_le: narrower bounds of the HTTP server (OpenAI's, or what clients can write).
    name, kind, default: those of the field; `table` fills them in.
    """

    help: str
    _: KW_ONLY
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    off: int | None = None
    served_ge: float | None = None
    served_le: float | None = None
    name: str = ""
    kind: Any = None
    default: Any = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, or None. None is within any bounds: it means that nothing is set."""
        if value is not None and not self._within(value):
            return f"{self.name} must be {self._range()}"
        finite = self.kind is not float or math.isfinite(value)
        return None if finite else f"{self.name} must be finite"

    def _within(self, value: Any) -> bool:
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
        )

    def _range(self) -> str:
        if self.le is None:
            lowest = self.ge if self.off is None else f"{self.off} (off)"
            return f"above {self.gt}" if self.gt is not None else f"{lowest} or more"
        if self.kind in (int, int | None):
            return f"in {self.ge}..{self.le}"
        return f"in {'[' if self.gt is None else '('}{self.ge if self.gt is None else self.gt}, {self.le}]"


def table(parameters: type[Any]) -> Mapping[str, Parameter]:
    """The rows of a dataclass by name, in order. Each of its fields is `Annotated` with one."""
    hints = get_type_hints(parameters, include_extras=True)
    return {
        field.name: replace(
            hints[field.name].__metadata__[0],
            name=field.name,
            kind=hints[field.name].__origin__,
            default=field.default,
        )
        for field in fields(parameters)
    }


def first_problem(parameters: Any, rows: Iterable[Parameter]) -> str | None:
    """What is wrong with the first field of a dataclass that is out of its bounds, or None."""
    return next((problem for row in rows if (problem := row.problem(getattr(parameters, row.name)))), None)
