"""Which sampling parameters the command and the `llm` plugin offer: both show one answer, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pastalm.bounds import Parameter
from pastalm.core.params import parameters

LIBRARY_ONLY = ("n", "logprobs", "logit_bias", "ignore_eos", "min_tokens", "stop_token_ids", "processors") + (
    "schema",
    "depends",
    "tools",
    "tool_choice",
)
"""Parameters that are not offered."""
DEFAULTS: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 1024}
"""Defaults that differ from those of the table."""


def offered() -> Mapping[str, Parameter]:
    """The rows of the offered parameters, by name."""
    return {name: row for name, row in parameters().items() if name not in LIBRARY_ONLY}


def takes_texts(row: Parameter) -> bool:
    """Whether a parameter is a list of texts. The command takes these as an option that may be repeated."""
    return tuple[str, ...] in get_args(row.kind)
