"""Packed models compute what transformers' do, and what they cannot compute is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from pastalm.engines.native import weights
from pastalm.errors import CapabilityError, ModelError
from pastalm.models import adapters, chat_template, checkpoints, contents, downloads, loading, packed_models
from pastalm.models.packed_models import Packed
from tests.packed_reference import logits
from tests.test_models import BYTE_LEVEL

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA: dict[str, Any] = {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 20}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, wide heads, tied": ("Llama", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama, biases": ("Llama", {"attention_bias": True, "num_key_value_heads": 4}),
    "llama, linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama, llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 8}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, sliding": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "rms_norm_eps": 1e-2}),
    "qwen3, biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "smollm3, sliding": ("SmolLM3", {"use_sliding_window": True, "sliding_window": 7}),
    "gemma2": ("Gemma2", {**GEMMA, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {**GEMMA, "num_hidden_layers": 7}),
    "gemma3, linear": (
        "Gemma3",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
}


def config_class(name: str) -> Any:
    return getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")


def config(name: str, **changes: Any) -> Any:
    return config_class(name)(**(SIZES | changes))


def random_model(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Nothing in it is 0 or 1, norms and biases neither."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config(name, **changes)).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor += torch.randn_like(tensor) / 4
    return model.to(dtype)


def made_of(case: str) -> Any:
    name, changes = MODELS[case]
    return random_model(name, **changes)


@pytest.mark.parametrize("case", MODELS)
def test_packed_weights_compute_what_transformers_does(case: str) -> None:
    model = made_of(case)
    made, tensors = packed_models.from_model(model, "F32")
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], 50).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(logits(made, tensors, ids) - expected).max() < 1e-4 * expected.std()
    assert ("head" in tensors) != model.config.tie_word_embeddings


@pytest.mark.parametrize("kind", weights.TYPES)
def test_matrices_are_of_the_type_that_was_asked_for(kind: weights.WeightType) -> None:
    model = made_of("llama")
    _, tensors = packed_models.from_model(model, kind, head_type="F32")
    kept = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    for name, tensor in tensors.items():
        if isinstance(tensor, weights.Matrix):
            assert tensor.type == ("F32" if name == "head" else kind), name
        else:
            assert tensor.dtype == np.float32
    down = tensors["1.down"]
    assert isinstance(down, weights.Matrix)
    assert np.array_equal(down.data, weights.pack(kept, kind).data)


def test_a_tied_head_is_the_embedding() -> None:
    model = made_of("llama, wide heads, tied")
    _, tensors = packed_models.from_model(model, "Q4_0", head_type="Q8_0")
    embedding = tensors["embedding"]
    assert isinstance(embedding, weights.Matrix)
    assert embedding.type == "Q8_0"


def test_slices_of_a_model_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("Llama", intermediate_size=416, vocab_size=300)
    _, whole = packed_models.from_model(model, "Q8_0")
    monkeypatch.setattr(weights, "_SLICE", 64 * 64)
    _, sliced = packed_models.from_model(model, "Q8_0")
    for name, tensor in whole.items():
        other = sliced[name]
        if isinstance(tensor, weights.Matrix) and isinstance(other, weights.Matrix):
            assert np.array_equal(tensor.data, other.data), name


def test_bfloat16_rounds_gemmas_scale_and_no_angle() -> None:
    whole, _ = packed_models.from_model(random_model("Gemma2", **GEMMA, hidden_size=96), "F32")
    model = random_model("Gemma2", **GEMMA, hidden_size=96, dtype=torch.bfloat16)
    rounded, _ = packed_models.from_model(model, "BF16")
    assert whole.ropes == rounded.ropes
    assert rounded.embedding_scale == 9.8125  # the square root of 96 is 9.798
    assert abs(whole.embedding_scale - 96**0.5) < 1e-6


# ------------------------------------------------------------------------------ what is refused

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Llama", {"mlp_bias": True}, "MLP has biases"),
    ("Llama", {"hidden_act": "gelu"}, "activation is 'gelu'"),
    ("Llama", {"intermediate_size": 100}, "100 wide"),
    ("Llama", {"rope_parameters": DYNAMIC}, "'dynamic'"),
    ("Qwen3", {"rope_parameters": PARTIAL}, "part of each head"),
    ("Gemma2", {"use_bidirectional_attention": True}, "looks ahead"),
    ("Gemma2", {"hidden_activation": "silu"}, "activation is 'silu'"),
    ("Gemma3", {"attn_logit_softcapping": 5.0}, "capped"),
    ("Granite", {}, "type 'granite'"),
    ("Mixtral", {}, "type 'mixtral'"),
    ("Qwen3Moe", {}, "type 'qwen3_moe'"),
    ("Olmo", {"clip_qkv": 3.0}, "type 'olmo'"),
    ("Phi3", {}, "type 'phi3'"),
]


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED)
def test_what_the_engine_would_compute_otherwise_is_refused(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CapabilityError, match=said) as raised:
        packed_models.architecture(config(name, **changes))
    assert "\n" not in str(raised.value)


def test_a_weight_that_nothing_reads_is_refused() -> None:
    model = made_of("llama")
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(CapabilityError, match="layers.1.self_attn.sinks"):
        packed_models.from_model(model, "F32")


def test_a_class_that_is_not_known_is_refused() -> None:
    class Other(transformers.LlamaForCausalLM):  # type: ignore[misc]
        pass

    with pytest.raises(CapabilityError, match="Other"):
        packed_models.from_model(Other(config("Llama")), "F32")


def test_a_width_that_groups_do_not_fit_is_refused() -> None:
    model = random_model("Llama", hidden_size=80)
    with pytest.raises(CapabilityError, match="80 inputs"):
        packed_models.from_model(model, "Q4_0")
    packed_models.from_model(model, "BF16")


_PLAIN = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_parameters",),
    # of no meaning for an answer: training, caches, special tokens (which the tokenizer names)
    *(
        "initializer_range",
        "attention_dropout",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    ),
}
_GEMMA = {
    *("head_dim", "hidden_activation", "query_pre_attn_scalar", "sliding_window", "layer_types"),
    *(
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "use_bidirectional_attention",
        "attention_bias",
    ),
}
_WINDOWS = {"use_sliding_window", "sliding_window", "layer_types"}
LOOKED_AT = {
    "Llama": {"hidden_act", "head_dim", "attention_bias", "mlp_bias", "pretraining_tp"},
    "Mistral": {"hidden_act", "head_dim", "sliding_window"},
    "Qwen2": {"hidden_act", "max_window_layers", *_WINDOWS},
    "Qwen3": {"hidden_act", "head_dim", "attention_bias", "max_window_layers", *_WINDOWS},
    "SmolLM3": {
        *("hidden_act", "attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"),
        *_WINDOWS,
    },
    "Gemma2": _GEMMA,
    "Gemma3": _GEMMA,
}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_no_field_of_a_configuration_is_unknown(name: str) -> None:
    """A field that a new transformers adds must be looked at before it is ignored."""
    ours, theirs = (
        {field.name for field in dataclasses.fields(kind)} for kind in (config_class(name), PreTrainedConfig)
    )
    assert ours - theirs == (_PLAIN | LOOKED_AT[name]) - theirs


# ------------------------------------------------------------------------------ what is kept

PROMPT = [{"role": "user", "content": "Five tips, <|im_end|> please."}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved model, with a cache that is empty. Its files are old, so that their hashes are remembered. It has
    vectors of 16 bytes, right after which the next tensor must not lie."""
    monkeypatch.setenv("PASTALM_CACHE", str(tmp_path / "cache"))
    model = random_model("Qwen3", vocab_size=len(BYTE_LEVEL), head_dim=4, num_attention_heads=8)
    checkpoints.save(model, BYTE_LEVEL, tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        os.utime(file, (1e9, 1e9))
    return tmp_path / "model"


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder.parent / "cache" / "packed").glob("*.packed"))


def same(one: Packed, other: Packed) -> bool:
    """Both say and hold the same."""
    return (
        one.architecture == other.architecture
        and list(one.tensors) == list(other.tensors)
        and all(map(equal, one.tensors.values(), other.tensors.values()))
        and chat_template.chat_prompt(one.loaded, PROMPT) == chat_template.chat_prompt(other.loaded, PROMPT)
        and one.vocabulary.eos == other.vocabulary.eos
        and one.context_length == other.context_length
        and one.sequential_marker == other.sequential_marker
    )


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, weights.Matrix):
        kinds = (one.type, one.outputs, one.inputs) == (other.type, other.outputs, other.inputs)
        return kinds and np.array_equal(one.data, other.data)
    return np.array_equal(one, other)


def test_what_is_kept_is_what_was_packed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_models.load(str(folder), weights="Q8_0", head="F16")
    loaded = loading.load(str(folder), dtype="float32")
    made, tensors = packed_models.from_model(loaded.model, "Q8_0", head_type="F16")
    assert packed.architecture == made
    assert list(packed.tensors) == list(tensors)
    assert all(map(equal, packed.tensors.values(), tensors.values()))
    assert chat_template.chat_prompt(packed.loaded, PROMPT) == chat_template.chat_prompt(loaded, PROMPT)
    assert packed.vocabulary.eos == loaded.vocabulary.eos
    assert packed.vocabulary.size == loaded.vocabulary.size
    assert [packed.vocabulary.piece(i) for i in range(packed.vocabulary.size)] == (
        [loaded.vocabulary.piece(i) for i in range(loaded.vocabulary.size)]
    )
    assert packed.context_length == loaded.context_length
    assert all(t.data.ctypes.data % 64 == 0 for t in packed.tensors.values() if isinstance(t, weights.Matrix))
    monkeypatch.setattr(loading, "load", None)
    assert same(packed_models.load(str(folder), weights="Q8_0", head="F16"), packed)


STARTS = """
import sys
from pastalm.models import adapters, chat_template, checkpoints, downloads, loading
from pastalm.models import packed_models
packed = packed_models.load(sys.argv[1])
chat_template.chat_prompt(packed.loaded, [{"role": "user", "content": "hello"}], marker="x")
assert not {"torch", "transformers", "peft", "huggingface_hub", "gguf", "llama_cpp"} & set(sys.modules)
"""


def test_the_next_start_imports_neither_torch_nor_transformers(folder: Path) -> None:
    packed_models.load(str(folder))
    subprocess.run([sys.executable, "-c", STARTS, str(folder)], check=True)


def change_weights(folder: Path) -> None:
    checkpoints.save(random_model("Llama", vocab_size=len(BYTE_LEVEL), rms_norm_eps=1e-3), BYTE_LEVEL, folder)


def change_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


@pytest.mark.parametrize("change", [change_weights, change_template])
def test_a_model_that_changes_is_packed_anew(folder: Path, change: Callable[[Path], None]) -> None:
    before = packed_models.load(str(folder))
    change(folder)
    after = packed_models.load(str(folder))
    assert not same(before, after)
    assert same(packed_models.load(str(folder)), after)
    assert len(files(folder)) == 1, "the file of what was there before is of no use"


def test_a_file_written_twice_at_the_same_time_is_read_twice(folder: Path) -> None:
    """Clocks have steps: what was written just now may be written again without a later time."""
    template = folder / "chat_template.jinja"
    prompts, now = [], time.time_ns()
    for text in ("{{ messages[0].content }}one", "{{ messages[0].content }}two"):
        template.write_text(text)
        os.utime(template, ns=(now, now))
        prompts.append(chat_template.chat_prompt(packed_models.load(str(folder)).loaded, PROMPT))
    assert prompts[0] != prompts[1]


def test_a_file_that_was_only_touched_or_moved_is_not_packed_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = packed_models.load(str(folder))
    os.utime(folder / "config.json", (2e9, 2e9))
    moved = folder.rename(folder.parent / "moved")
    monkeypatch.setattr(loading, "load", None)
    assert same(packed_models.load(str(moved)), packed)


def test_each_weight_type_has_its_own_file(folder: Path) -> None:
    asked: list[tuple[Any, Any]] = [("Q8_0", None), ("Q4_0", None), ("Q4_0", "Q4_0"), ("F32", None)]
    heads = ["Q8_0", "Q8_0", "Q4_0", "F32"]
    made = [packed_models.load(str(folder), weights=kind, head=head) for kind, head in asked]
    assert len(files(folder)) == len(asked)
    for (kind, head), stands, packed in zip(asked, heads, made, strict=True):
        again = packed_models.load(str(folder), weights=kind, head=head)
        assert same(again, packed)
        assert again.tensors["0.down"].type == kind  # type: ignore[union-attr]
        assert again.tensors["head"].type == stands  # type: ignore[union-attr]


def test_what_nothing_has_read_for_long_goes(folder: Path) -> None:
    for kind in ("Q8_0", "Q4_0"):
        packed_models.load(str(folder), weights=kind)  # type: ignore[arg-type]
    for name in files(folder):
        os.utime(folder.parent / "cache" / "packed" / name, (1e9, 1e9))
    packed_models.load(str(folder), weights="Q8_0")
    packed_models.load(str(folder), weights="F16")
    assert [name.split("-")[1] for name in files(folder)] == ["F16", "Q8_0"]


def test_a_broken_file_is_packed_anew(folder: Path) -> None:
    packed = packed_models.load(str(folder))
    (name,) = files(folder)
    kept = folder.parent / "cache" / "packed" / name
    whole = kept.read_bytes()
    for broken in (b"", whole[:50], whole[:-1], bytes(len(whole)), whole[64:], b"x" + whole[1:]):
        kept.unlink()  # the mapped one must stay as it is
        kept.write_bytes(broken)
        assert same(packed_models.load(str(folder)), packed)
        assert kept.read_bytes() == whole


def test_a_folder_that_cannot_be_written_takes_memory_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_models.load(str(folder))
    (folder.parent / "no folder").write_text("")
    monkeypatch.setenv("PASTALM_CACHE", str(folder.parent / "no folder"))
    assert same(packed_models.load(str(folder)), packed)


def test_what_cannot_be_packed_leaves_nothing_behind(folder: Path) -> None:
    with pytest.raises(CapabilityError):
        checkpoints.save(random_model("Llama", vocab_size=len(BYTE_LEVEL), hidden_size=80), BYTE_LEVEL, folder)
        packed_models.load(str(folder), weights="Q8_0")
    assert [f.name for f in (folder.parent / "cache" / "packed").iterdir() if f.name != "hashes.json"] == []


def test_what_is_refused_is_refused_before_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(checkpoints, "read", lambda *_, **__: pytest.fail("weights are read"))
    (folder / "config.json").write_text(json.dumps(told | {"mlp_bias": True}))
    with pytest.raises(CapabilityError, match="biases"):
        packed_models.load(str(folder))
    monkeypatch.setattr(contents, "files", lambda *_: pytest.fail("files are hashed"))
    (folder / "config.json").write_text(json.dumps(told | {"model_type": "mixtral"}))
    with pytest.raises(CapabilityError, match="mixtral"):
        packed_models.load(str(folder))


@pytest.mark.parametrize("missing", ["nowhere/at/all", "./none"])
def test_a_model_that_is_not_there_is_an_error(folder: Path, missing: str) -> None:
    with pytest.raises(ModelError):
        packed_models.load(missing)
    with pytest.raises(ModelError):
        packed_models.load(str(folder), adapter=missing)


def test_weights_stay_as_stored_where_nothing_is_merged(folder: Path) -> None:
    model = random_model("Llama", vocab_size=len(BYTE_LEVEL)).to(torch.bfloat16)
    checkpoints.save(model, BYTE_LEVEL, folder)
    assert loading.load(str(folder), dtype="stored").model.dtype == torch.bfloat16
    packed = packed_models.load(str(folder), weights="F32")
    down = weights.unpack(packed.tensors["2.down"])  # type: ignore[arg-type]
    assert np.array_equal(down, model.model.layers[2].mlp.down_proj.weight.detach().float().numpy())


# ------------------------------------------------------------------------------ the embedded model

real = pytest.mark.skipif(
    not (adapters.SHIPPED / downloads.EMBEDDED / "adapter_config.json").is_file(),
    reason="no adapter ships in this tree",
)


@real
def test_the_embedded_model_is_packed_with_its_adapter() -> None:
    packed, loaded = packed_models.load(), loading.load(dtype="float32")
    made, tensors = packed_models.from_model(loaded.model, "Q8_0")
    assert packed.architecture == made
    assert list(packed.tensors) == list(tensors)
    assert all(map(equal, packed.tensors.values(), tensors.values()))
    assert packed.loaded.prepared
    assert packed.sequential_marker == loaded.sequential_marker
    prompt = chat_template.chat_prompt(packed.loaded, PROMPT, marker=packed.sequential_marker)
    assert prompt == chat_template.chat_prompt(loaded, PROMPT, marker=loaded.sequential_marker)
    made, whole = packed_models.from_model(loaded.model, "F32")
    with torch.no_grad():
        expected = loaded.model(torch.tensor([prompt])).logits[0].numpy()
    assert np.abs(logits(made, whole, prompt) - expected).max() < 1e-4 * expected.std()


@real
def test_the_embedded_model_starts_without_torch() -> None:
    packed_models.load()
    subprocess.run([sys.executable, "-c", STARTS, downloads.EMBEDDED], check=True)
