"""Every architecture that the transformers engine names: a tiny one of each says what plain transformers says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from pastalm.engines.transformers.attention import ATTENTION
from pastalm.engines.transformers.engine import TransformersEngine
from pastalm.engines.transformers.supported import MODEL_TYPES
from pastalm.errors import CapabilityError
from tests.laws.architectures import VARIANTS, build, exactness, longrope, plain_logits
from tests.laws.oracle import Linear
from tests.laws.script import play, random_scripts

EXACTLY = 1e-11
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.parametrize("kind", sorted(MODEL_TYPES))
def test_the_engine_is_exact(kind: str) -> None:
    worst, spread = exactness(build(kind))
    assert spread > 0.01
    assert worst < EXACTLY * max(spread, 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_so_it_is_in_other_shapes(name: str) -> None:
    kind, more = VARIANTS[name]
    worst, spread = exactness(build(kind, **more))
    assert worst < EXACTLY * spread


@pytest.mark.parametrize("kind", ["hunyuan_v1_moe", "longcat_flash", "deepseek_v3", "gpt_oss", "falcon"])
def test_packed_layers_leave_nothing_that_fails_at_a_step(kind: str) -> None:
    """Routers read their weights themselves."""
    model = build(kind).float()
    plain = build(kind)
    (script,) = random_scripts(11, "promised", 1)
    play(TransformersEngine(model, max_model_len=256, pack=True), [script])
    want = plain_logits(plain, Linear(script.prompt, script.record, script.policy))
    places = Linear(script.prompt, script.record, script.policy).place
    assert max(float((x - want[places[at]]).abs().max()) for at, x in script.logits.items()) < 1e-3


def test_the_page_names_the_same_models() -> None:
    rows = re.findall(r"^\| ([^|]+?) \| (\d+e[-+]\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name, _ in rows} == MODEL_TYPES | set(VARIANTS)
    assert all(float(error) < EXACTLY * 10 for _, error in rows)


# ------------------------------------------------------------------------------ sinks


def test_sinks_take_weight() -> None:
    """Without them the logits would be others."""
    model: Any = build("gpt_oss")
    worst, spread = exactness(model)
    assert worst < EXACTLY
    (script,) = random_scripts(11, "promised", 1)
    engine = TransformersEngine(model, max_model_len=256)
    play(engine, [script])
    linear = Linear(script.prompt, script.record, script.policy)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)
    want = plain_logits(model, linear)
    off = max(float((x - want[linear.place[at]]).abs().max()) for at, x in script.logits.items())
    assert off > spread / 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sinks_in_lower_precision(dtype: torch.dtype) -> None:
    exact, rounded = build("granite_swa"), build("granite_swa").to(dtype)
    (script,) = random_scripts(11, "promised", 1)
    play(TransformersEngine(rounded, max_model_len=256), [script])
    linear = Linear(script.prompt, script.record, script.policy)
    want = plain_logits(exact, linear)
    off = max(float((x - want[linear.place[at]]).abs().max()) for at, x in script.logits.items())
    assert off < (0.5 if dtype == torch.bfloat16 else 1e-3)


# ------------------------------------------------------------------------------ refused at load


def small_oss() -> Any:
    config = GptOssConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    return GptOssForCausalLM(config)


def test_the_reason_is_true() -> None:
    """RoFormer rotates, but from places that it counts itself."""
    with pytest.raises(CapabilityError, match="no position ids"):
        TransformersEngine(build("roformer", is_decoder=True))


@pytest.mark.parametrize("name", ["position_bias", "indices", "block_indices", "sinks", "cu_seq_lens_q", "anything"])
def test_an_argument_that_is_not_known_is_refused_at_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_oss()
    attention = type(model.model.layers[0].self_attn)
    plain = attention.forward

    def with_another(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs, **{name: torch.zeros(1)})

    monkeypatch.setattr(attention, "forward", with_another)
    with pytest.raises(CapabilityError, match=name) as caught:
        TransformersEngine(model)
    assert "\n" not in str(caught.value)


def test_an_argument_that_is_none_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_oss()
    attention = type(model.model.layers[0].self_attn)
    plain = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *a, **k: plain(self, *a, **k, position_bias=None))
    assert not TransformersEngine(model).own_attention


def test_a_type_that_is_not_listed_must_say_the_same_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pastalm.engines.transformers.supported.MODEL_TYPES", frozenset())
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        TransformersEngine(build("qwen3").to(dtype))  # it does
    model: Any = build("qwen3")
    layer = model.model.layers[0].self_attn
    plain = type(layer).forward

    def forgets(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation == ATTENTION:
            kwargs["attention_mask"] = torch.zeros_like(kwargs["attention_mask"])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(layer), "forward", forgets)
    with pytest.raises(CapabilityError, match="says something else than without"):
        TransformersEngine(model)


# ------------------------------------------------------------------------------ rotary frequencies


def longest(model: Any, length: int) -> Any:
    """An engine, and the logits of a response, whose positions are far from the prompt's."""
    (script,) = random_scripts(5, "promised", 1)
    engine = TransformersEngine(model, max_model_len=length)
    play(engine, [script])
    return engine, torch.stack(list(script.logits.values()))


def test_longrope_keeps_one_set_of_factors() -> None:
    short, long = [1.0, 1.5, 1.25, 2.0], [2.0, 7.0, 9.0, 16.0]
    both = build("phi3", **longrope(short, long))
    engine, within = longest(both, 512)
    assert engine.capabilities.max_position == 512
    assert torch.equal(within, longest(build("phi3", **longrope(short, short)), 512)[1])
    engine, beyond = longest(both, 513)
    assert engine.capabilities.max_position == 4096
    assert torch.equal(beyond, longest(build("phi3", **longrope(long, long)), 513)[1])
    assert not torch.allclose(within, beyond)


def test_the_models_own_frequencies_are_left_as_they_were() -> None:
    model: Any = build("phi3", **longrope())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = model(ids).logits
        longest(model, 2048)
        assert torch.equal(model(ids).logits, before)


def test_dynamic_frequencies_end_where_they_would_change() -> None:
    rope = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
    model = build("llama", max_position_embeddings=128, **rope)
    engine = TransformersEngine(model, max_model_len=4096)
    assert (engine.capabilities.max_model_len, engine.capabilities.max_position) == (128, 128)
