"""Capabilities: what an engine declares is what it may be asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pastalm.core.params import Request, SamplingParams
from pastalm.engines import scripted
from pastalm.engines.base import Capabilities
from pastalm.errors import CapabilityError

ALL = Capabilities(name="any", weights="none", positions=("promised", "overlap"))


def request(**changed: Any) -> Request:
    positions = changed.pop("positions", "promised")
    params = SamplingParams(**changed)
    return Request(id="a", prompt_token_ids=(1,), params=params, positions=positions)


@pytest.mark.parametrize(
    ("lacking", "asked", "says"),
    [
        ({"positions": ("overlap",)}, {}, "offers positions overlap, not 'promised'"),
        ({}, {"positions": "serial"}, "offers positions promised and overlap, not 'serial'"),
        ({"logprobs": False}, {"logprobs": 0}, "gives no log-probabilities"),
        ({"masks": False}, {"parallelism": 0}, "cannot forbid tags"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(lacking: dict[str, Any], asked: dict[str, Any], says: str) -> None:
    with pytest.raises(CapabilityError, match=f"the any engine {says}"):
        replace(ALL, **lacking).check(request(**asked))


def test_what_is_offered_is_not_refused() -> None:
    ALL.check(request(logprobs=3, parallelism=0))
    replace(ALL, logprobs=False, masks=False).check(request())


def test_engines_check_what_they_are_given() -> None:
    engine = scripted.ScriptedEngine(scripted.byte_vocabulary(), ["x"])
    with pytest.raises(CapabilityError, match="the scripted engine offers positions"):
        engine.add(request(positions="serial"))
    assert not engine.has_unfinished()
