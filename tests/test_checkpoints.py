"""Checkpoints that people have: multimodal, quantised, with code of their own, cut short, on the hub."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from pastalm.errors import ModelError
from pastalm.models import adapters, checkpoints, downloads, loading, preparing
from pastalm.train.run import RunConfig, begin
from tests.test_models import BYTE_LEVEL, small_model

IDS = torch.arange(3, 23)[None]
_TEXT = {
    "vocab_size": len(BYTE_LEVEL),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
_IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_IMAGES = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({"sliding_window": 8}, _IMAGES),
    "mistral3": ({}, _IMAGES),
    "qwen2_vl": (_SECTIONS, _QWEN_IMAGES),
    "qwen2_5_vl": (_SECTIONS, {**_QWEN_IMAGES, "intermediate_size": 32, "fullatt_block_indexes": [0]}),
    "qwen3_vl": (_SECTIONS, {**_QWEN_IMAGES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}),
    "qwen3_vl_moe": (
        {**_SECTIONS, **_EXPERTS},
        {**_QWEN_IMAGES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "llava": ({}, _IMAGES),
    "internvl": ({}, _IMAGES),
    "smolvlm": ({}, _IMAGES),
}


def multimodal(kind: str) -> Any:
    """A tiny random model of text and images."""
    made = CONFIG_MAPPING[kind]
    text, images = MULTIMODAL[kind]
    default = made()
    kinds = {"text_config": default.text_config.model_type, "vision_config": default.vision_config.model_type}
    parts = {"text_config": {**_TEXT, **text}, "vision_config": images}
    torch.manual_seed(0)
    config = made(**{name: {**part, "model_type": kinds[name]} for name, part in parts.items()})
    return getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind])(config).eval()


def saved(model: Any, folder: Path) -> Path:
    with checkpoints.quiet():
        model.save_pretrained(folder)
        BYTE_LEVEL.save_pretrained(folder)
    return folder


def configured(folder: Path, **more: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


# ------------------------------------------------------------------------------ text parts


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_multimodal_checkpoint_is_read_as_its_text_part_and_saved_as_one(kind: str, tmp_path: Path) -> None:
    whole = multimodal(kind)
    loaded = loading.load(str(saved(whole, tmp_path / "whole")), dtype="float32")
    with torch.no_grad():
        want, got = whole(input_ids=IDS).logits, loaded.model(input_ids=IDS).logits
    assert float(want.std()) > 0.1
    assert torch.allclose(got, want, atol=1e-5)
    assert not [name for name, _ in loaded.model.named_parameters() if "vision" in name or "visual" in name]
    tokenizer = copy.deepcopy(BYTE_LEVEL)
    preparing.prepare(loaded.model, tokenizer)
    checkpoints.save(loaded.model, tokenizer, tmp_path / "text")
    again = loading.load(str(tmp_path / "text"), dtype="float32")
    assert again.prepared and adapters.shape_of(again.model) == adapters.shape_of(loaded.model)
    with torch.no_grad():
        assert torch.allclose(again.model(input_ids=IDS).logits[..., :-6], want, atol=1e-5)


def test_a_text_part_that_nothing_runs_is_one_line(tmp_path: Path) -> None:
    saved(small_model(len(BYTE_LEVEL)), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_MAPPING["glm4v"]().to_dict()))
    with pytest.raises(ModelError, match="no language model for the text part") as caught:
        loading.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    saved(small_model(len(BYTE_LEVEL)), tmp_path)
    path = tmp_path / "model.safetensors"
    held = load_file(path)
    save_file({k: v for k, v in held.items() if "layers.1.mlp" not in k}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights \(model.layers.1.mlp.*3 in all") as caught:
        loading.load(str(tmp_path))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ quantised


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "nobody knows"},
    ],
    ids=lambda said: said["quant_method"],
)
def test_quantised_weights_without_their_library_are_one_line(said: dict[str, Any], tmp_path: Path) -> None:
    configured(saved(small_model(len(BYTE_LEVEL)), tmp_path), quantization_config=said)
    with pytest.raises(ModelError, match="quantised") as caught:
        loading.load(str(tmp_path))
    assert "\n" not in str(caught.value) and said["quant_method"] in str(caught.value)


class Halves(torch.nn.Linear):  # type: ignore[misc]
    """Stands for a quantised layer: its weight must not be cast."""

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        raise AssertionError("quantised weights were cast or moved")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.to(x.dtype).T


@pytest.fixture
def quantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is loaded as a model with quantised layers."""
    folder = saved(small_model(len(BYTE_LEVEL)), tmp_path)
    real = checkpoints.read

    def read(*args: Any, **options: Any) -> tuple[Any, Any]:
        model, tokenizer = real(*args, **options)
        for layer in model.model.layers:
            for name in ("gate_proj", "up_proj"):
                made = Halves(32, 64, bias=False)
                made.weight = torch.nn.Parameter(getattr(layer.mlp, name).weight.data.half(), requires_grad=False)
                setattr(layer.mlp, name, made)
        model.is_quantized = True
        return model, tokenizer

    monkeypatch.setattr(checkpoints, "read", read)
    return folder


def test_quantised_weights_are_never_cast(quantised: Path) -> None:
    from pastalm.core.events import Forked
    from pastalm.core.params import Request, SamplingParams
    from pastalm.engines.transformers.engine import TransformersEngine

    loaded = loading.load(str(quantised))
    assert loaded.model.model.layers[0].mlp.up_proj.weight.dtype == torch.float16
    engine = TransformersEngine(loaded.model, max_model_len=64, pack=True)
    params = SamplingParams(temperature=0, max_tokens=8)
    engine.add(Request(id="a", prompt_token_ids=(3, 4, 5), params=params))
    engine.apply("a", Forked(path=()))
    (sampled,) = engine.step()
    with torch.no_grad():
        assert sampled.token == int(loaded.model(torch.tensor([[3, 4, 5]])).logits[0, -1].argmax())
    assert type(loaded.model.model.layers[0].mlp.up_proj) is Halves
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ModelError, match="leave out the dtype"):
            loading.load(str(quantised), dtype=dtype)


# ------------------------------------------------------------------------------ code of its own


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder whose type of model is defined by code beside it, which leaves a mark when it runs."""
    folder = saved(small_model(len(BYTE_LEVEL)), tmp_path / "foreign")
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    configured(
        folder,
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    return folder


def test_code_of_a_model_runs_only_if_that_was_said(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nothing may be asked on the terminal"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for load in (loading.load, loading.load_tokenizer):
        with pytest.raises(ModelError, match="--trust-remote-code") as caught:
            load(str(foreign))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    loaded = loading.load(str(foreign), dtype="float32", trust_remote_code=True)
    assert type(loaded.model).__name__ == "OwnModel" and (tmp_path / "ran").exists()


def test_training_runs_code_of_a_model_only_if_that_was_said(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "data.jsonl").write_text("{}\n")
    config = RunConfig(data=tmp_path / "data.jsonl", out=tmp_path / "run", model=str(foreign))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        begin(config, lambda _: None)
    assert not (tmp_path / "ran").exists()
    base = begin(replace(config, trust_remote_code=True), lambda _: None)
    assert type(base.model).__name__ == "OwnModel"


def test_a_known_type_needs_no_code_of_its_own(tmp_path: Path) -> None:
    configured(saved(small_model(len(BYTE_LEVEL)), tmp_path), auto_map={"AutoModelForCausalLM": "nothing.Here"})
    assert type(loading.load(str(tmp_path)).model).__name__ == "LlamaForCausalLM"


def test_no_language_model_is_one_line(tmp_path: Path) -> None:
    saved(small_model(len(BYTE_LEVEL)), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_MAPPING["t5"](d_model=8, num_layers=1).to_dict()))
    with pytest.raises(ModelError, match="no causal language model of this type") as caught:
        loading.load(str(tmp_path))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ the hub

REPOSITORY = {
    True: [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
        *("tokenizer.model", "merges.txt", "vocab.json", "special_tokens_map.json", "pasta.json"),
    ],
    False: [
        *("consolidated.safetensors", "consolidated.00.pth", "original/consolidated.00.pth", "original/params.json"),
        *("original/model-00001.safetensors", "onnx/model.onnx", "onnx/config.json", "model.q4.gguf", "README.md"),
        *("pytorch_model.bin", "model.fp16.safetensors", "tf_model.h5", "modeling_own.py", "metal/model.bin"),
        *("openvino/openvino_model.bin", "training_args.bin", "coreml/text.json"),
    ],
}


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("older", [False, True])
def test_of_a_repository_comes_what_is_read(
    trust: bool, older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [f for files in REPOSITORY.values() for f in files if not (older and "safetensors" in f)]

    def download(name: str, allow_patterns: Sequence[str], ignore_patterns: Sequence[str] = ()) -> str:
        for file in there:
            if any(fnmatch(file, p) for p in allow_patterns) and not any(fnmatch(file, p) for p in ignore_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    downloads.pull("somebody/something", trust_remote_code=trust)
    got = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    wanted = {f for f in REPOSITORY[True] if f in there}
    assert got == wanted | ({"pytorch_model.bin"} if older else set()) | ({"modeling_own.py"} if trust else set())


def test_what_a_configuration_says_of_its_weights() -> None:
    assert checkpoints.quantised_by(LlamaConfig()) is None
    config = AutoConfig.for_model("llama", quantization_config={"quant_method": "gptq", "bits": 4})
    assert checkpoints.quantised_by(config) == "gptq"
