"""The law of training: the losses of every architecture are over the log-probabilities that the engine gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pastalm.engines.transformers.supported import MODEL_TYPES
from pastalm.models import logits
from tests.laws.architectures import VARIANTS, build
from tests.laws.losses import difference

EXACTLY = 1e-11
PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
SHAPES = {kind: (kind, {}) for kind in sorted(MODEL_TYPES)} | VARIANTS
POLICIES = ("promised", "overlap")


@pytest.mark.parametrize("name", SHAPES)
def test_the_loss_is_over_what_the_engine_says(name: str) -> None:
    """A scale, a cap or a bias of the head, windows, sinks: whatever a model does, both do."""
    kind, more = SHAPES[name]
    worst, spread = difference(build(kind, **more), POLICIES[[*SHAPES].index(name) % 2])
    assert spread > 0.01
    assert worst < EXACTLY * max(spread, 1)


def test_the_page_names_the_same_models() -> None:
    rows = re.findall(r"^\| (\d+e-\d+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    named = [name for _, names in rows for name in names.split("; ")]
    assert sorted(named) == sorted(SHAPES)
    assert all(float(figure) < EXACTLY for figure, _ in rows)


@pytest.mark.parametrize("kind", ["granite", "cohere", "gemma2", "phi", "minicpm3"])
def test_only_the_chosen_places_go_through_the_head(kind: str) -> None:
    """The same logits as the model's own forward gives there, and nothing computed elsewhere."""
    model = build(kind)
    ids = torch.arange(40, 60).view(2, 10)
    chosen = torch.zeros(2, 10, dtype=torch.bool)
    chosen[0, [1, 4]] = chosen[1, 9] = True
    rows = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, given, __: rows.append(given[0].shape[:-1]))
    with torch.no_grad():
        found = logits.at(model, {"input_ids": ids}, chosen)
        hook.remove()
        want = model(input_ids=ids).logits[chosen]
    assert rows == [(1, 3)]
    assert float((found - want).abs().max()) < 1e-12
