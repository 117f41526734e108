"""Adapters in the tree are small, and `runs/smaller_adapters.py` cuts off what matters least."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pastalm.errors import ModelError
from pastalm.models import checkpoints, downloads, loading, lossless, preparing
from pastalm.models.downloads import EMBEDDED
from pastalm.train.run import adapted
from pastalm.train.sft import SftConfig

ROOT = Path(__file__).parents[1]
WHOLE = {"lambda2", "eager"}
"""Stored as they were trained."""


@pytest.fixture(scope="module")
def smaller() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smaller_adapters", ROOT / "runs" / "smaller_adapters.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def moment(n: int, seed: int) -> torch.Tensor:
    """Of inputs whose directions differ in size by far."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4 * n, n, generator=generator) * torch.logspace(0, -2, n)
    return rows.T @ rows


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 6), st.integers(0, 2**31))
def test_no_other_change_of_that_rank_is_nearer_as_the_layer_is_weighed(
    smaller: ModuleType, m: int, n: int, k: int, seed: int
) -> None:
    """What is left out has the norm of the singular values left out (Eckart and Young)."""
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    one = smaller.factor(b, a, smaller.Moments(moment(n, seed), moment(m, seed + 1)))
    seen = one.left.T @ (b.double() @ a.double()) @ one.right
    values = torch.linalg.svdvals(seen)
    assert torch.allclose(one.values[: min(m, n, k)], values[:k], rtol=1e-6, atol=1e-9 * float(values[0]))
    for rank in range(1, min(m, n, k) + 1):
        rows = one.rows[:rank]
        missed = smaller.missed(one, smaller._fitted(one, rows), rows) ** 0.5
        assert abs(missed - float(values[rank:].norm())) <= 1e-6 * float(values[0])


@given(st.integers(8, 24), st.integers(8, 24), st.integers(1, 4), st.integers(0, 2**31), st.floats(1e-3, 1e2))
def test_rounding_costs_little_whatever_the_size_of_the_change(
    smaller: ModuleType, m: int, n: int, k: int, seed: int, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, a = size * torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    one = smaller.factor(b, a, smaller.Moments(torch.eye(n), torch.eye(m)))
    small_a, small_b = smaller.rounded(one, k)
    assert small_a.dtype == small_b.dtype == torch.float8_e4m3fn
    assert small_a.shape == (k, n) and small_b.shape == (m, k)
    missed = b.double() @ a.double() - small_b.double() @ small_a.double() / k
    assert float(missed.norm()) < 0.1 * float((b @ a).norm())


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6), st.data())
def test_ranks_stay_within_the_size_and_no_layer_is_left_out(
    smaller: ModuleType, shapes: list[tuple[int, int]], data: st.DataObject
) -> None:
    factored = {}
    for i, (m, n) in enumerate(shapes):
        values = sorted(data.draw(st.lists(st.floats(0, 9), min_size=4, max_size=4)), reverse=True)
        empty = torch.zeros(0)
        b, a = torch.zeros(m, 4), torch.zeros(4, n)
        factored[str(i)] = smaller.Factored(b, a, empty, empty, empty, torch.tensor(values))
    least = sum(map(sum, shapes))
    size = data.draw(st.integers(least, 5 * least))
    ranks = smaller.allocated(factored, size)
    assert all(1 <= ranks[name] <= 4 for name in factored)
    assert sum(ranks[str(i)] * (m + n) for i, (m, n) in enumerate(shapes)) <= size


def test_adapters_in_the_tree_are_small() -> None:
    found = {folder.parent.name: folder for folder in (ROOT / "adapters").glob("*/adapter_model.safetensors")}
    if not found:
        pytest.skip("a source distribution has the cards alone")
    assert {"baseline", "stage1", "own", "lambda1", "lambda2", "lambda4", "lambdainf", "eager"} == set(found)
    for name, file in found.items():
        assert file.stat().st_size < (10e6 if name in WHOLE else 3e6), name


def test_a_small_adapter_is_plain_peft_and_can_be_trained_on(smaller: ModuleType) -> None:
    """Loaded by PEFT, a layer's change is what the stored factors say; and training goes on from it in float32."""
    folder = ROOT / "adapters" / "lambda1"
    if not (folder / "adapter_model.safetensors").exists():
        pytest.skip("a source distribution has the cards alone")
    try:
        base = loading.load(adapter=None, dtype="float32").model
    except ModelError as error:
        pytest.skip(str(error))
    layer = "layers.3.mlp.down_proj"
    before = base.model.get_submodule(layer).weight.clone()
    after = loading.load(adapter=str(folder), dtype="float32").model.model.get_submodule(layer).weight
    stored = load_file(folder / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.model.{layer}.lora_{part}.weight"].float() for part in "AB")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert len(a) == config["rank_pattern"].get(f"model.{layer}", config["r"])
    assert torch.allclose(after - before, b @ a / len(a), atol=1e-6)
    model, tokenizer = checkpoints.read(downloads.pull(EMBEDDED))
    preparing.prepare(model, tokenizer)
    tags = lossless.vocabulary_of(tokenizer, eos=[2]).tags
    trained = adapted(SftConfig(data=Path("x"), out=Path("y"), start=folder), model, tags)
    free = {name: value for name, value in trained.named_parameters() if value.requires_grad}
    assert {value.dtype for value in free.values()} == {torch.float32}
    assert torch.equal(free[f"base_model.model.model.{layer}.lora_A.default.weight"], a)
