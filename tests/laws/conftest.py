"""Models the laws run on: one fixture, every architecture; built once."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from pastalm.core.vocabulary import Vocabulary
from tests.laws.tiny import ARCHITECTURES, tiny_model, tiny_vocabulary


@cache
def _built(name: str) -> PreTrainedModel:
    return tiny_model(name, dtype=torch.float64)


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny random model in float64."""
    return _built(request.param)


@pytest.fixture
def vocabulary() -> Vocabulary:
    return tiny_vocabulary()
