"""Adapters on models of every make: tag rows of embedding and head are trained, saved, merged and exported alike."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pastalm import LLM, SamplingParams
from pastalm.core.language import Promise, Sync, Text
from pastalm.core.vocabulary import Tags, Vocabulary
from pastalm.engines.native import weights
from pastalm.errors import ModelError
from pastalm.models import adapters, checkpoints, gguf_files, loading, lossless, packed_models, preparing
from pastalm.models.chat_template import encode_chat
from pastalm.records.documents import Async, Document, render
from pastalm.train import run
from pastalm.train.dataset import Mix, collate
from pastalm.train.loss import weighted_loss
from pastalm.train.packing import pack
from pastalm.train.sft import SftConfig, train
from tests.test_checkpoints import Halves, multimodal, saved
from tests.test_models import byte_level, small_model

TOKENIZER = byte_level()

ASKED = [{"role": "user", "content": "Tips?"}]
DOCUMENT: Document = (
    Text("Tips\n"),
    Promise("sleep", 10),
    Async((Text("1.\n"),)),
    Promise("food", 10),
    Async((Text("2.\n"),)),
    Sync(),
    Text("."),
)


def copies() -> dict[str, Any]:
    """One model twice: its head is its embedding, or has the same weights of its own."""
    tied, untied = small_model(len(TOKENIZER)), small_model(len(TOKENIZER), tied=False)
    untied.load_state_dict(tied.state_dict())
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    return {"tied": tied, "untied": untied}


def batch_of(tokenizer: Any, vocabulary: Vocabulary, eos: int) -> dict[str, torch.Tensor]:
    return collate([pack(encode_chat(tokenizer, vocabulary, ASKED), DOCUMENT, vocabulary, "promised", eos=eos)])


def learn(config: run.RunConfig, adapted: Any, batch: dict[str, torch.Tensor], base: run.Base, steps: int) -> float:
    """Trains, and gives the loss of the tags."""
    optimizer = run.optimizer(config, adapted)
    for _ in range(steps):
        optimizer.zero_grad()
        loss, each, decision = weighted_loss(adapted.train(), batch, base.tags, 4.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)  # as trainers do
        optimizer.step()
    return float(each[decision].mean())


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, float]]:
    """Folders with base and adapter, and the tag loss reached, of both copies."""
    found = {}
    for name, model in copies().items():
        folder = tmp_path_factory.mktemp(name)
        checkpoints.save(model, copy.deepcopy(TOKENIZER), folder / "base")
        (folder / "data").write_text("")
        config = run.RunConfig(
            data=folder / "data",
            out=folder / "out",
            model=str(folder / "base"),
            lora_rank=16,
            learning_rate=4e-3,
            row_learning_rate=2e-2,
        )
        base = run.begin(config, str)
        adapted = run.adapted(config, base.model, base.tags)
        loss = learn(config, adapted, batch_of(base.tokenizer, base.vocabulary, base.eos), base, 150)
        run._save_adapter(adapted, adapted.state_dict(), config, folder / "adapter")
        adapters.write_card(folder / "adapter", {"shape": adapters.shape_of(adapted.get_base_model())})
        found[name] = folder, loss
    return found


def test_tied_and_untied_copies_learn_the_tags_alike(taught: dict[str, tuple[Path, float]]) -> None:
    losses = {name: loss for name, (_, loss) in taught.items()}
    assert max(losses.values()) < 0.05, losses


def said(llm: LLM) -> tuple[str, int]:
    """What a model answers, and how many threads wrote it."""
    out = llm.chat(ASKED, SamplingParams(temperature=0, max_tokens=120))[0].outputs[0]
    llm.close()
    return out.text, len(out.transcript.threads) - 1


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_both_fork_however_they_are_loaded(taught: dict[str, tuple[Path, float]], name: str, tmp_path: Path) -> None:
    folder, _ = taught[name]
    base, adapter = str(folder / "base"), str(folder / "adapter")
    text, chunks = said(LLM(base, adapter=adapter, dtype="float32", engine="transformers"))
    assert chunks >= 2
    assert said(LLM(base, adapter=adapter, dtype="float32", engine="native")) == (text, chunks)
    loaded = loading.load(base, adapter=adapter, dtype="float32")
    file = gguf_files.export(loaded, tmp_path / "model.gguf", "F32")
    assert said(LLM(str(file), engine="native"))[1] >= 2
    held = packed_models.load_gguf(file).tensors
    for place, table in zip(("embedding", "head"), preparing.token_tables(loaded.model), strict=False):
        rows = held[place]
        assert isinstance(rows, weights.Matrix)
        np.testing.assert_allclose(weights.unpack(rows)[: len(table.weight)], table.weight, atol=0.02)
    assert ("head" in held) == (name == "untied")
    checkpoints.save(loaded.model, loaded.tokenizer, tmp_path / "merged")
    again = loading.load(str(tmp_path / "merged"), adapter=None, dtype="float32").model
    tables = preparing.token_tables(again)
    assert len(tables) == (1 if name == "tied" else 2)
    for mine, other in zip(tables, preparing.token_tables(loaded.model), strict=True):
        assert torch.equal(mine.weight, other.weight)


def test_training_goes_on_from_both_tables_rows(taught: dict[str, tuple[Path, float]], tmp_path: Path) -> None:
    folder, loss = taught["untied"]
    (tmp_path / "data").write_text("")
    config = run.RunConfig(
        data=tmp_path / "data", out=tmp_path / "out", model=str(folder / "base"), start=folder / "adapter"
    )
    base = run.begin(config, str)
    adapted = run.adapted(config, base.model, base.tags)
    batch = batch_of(base.tokenizer, base.vocabulary, base.eos)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad and "trainable_tokens" in name]
    assert len(trained) == 2 and {p.shape[0] for n, p in adapted.named_parameters() if n in trained} == {6}
    with torch.no_grad():
        _, each, decision = weighted_loss(adapted, batch, base.tags, 1.0)
    assert float(each[decision].mean()) < 2 * loss + 0.02  # weights were saved in bfloat16
    old = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    old["trainable_token_indices"] = list(base.tags)
    short = tmp_path / "old"
    short.mkdir()
    for file in (folder / "adapter").iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    (short / "adapter_config.json").write_text(json.dumps(old))
    fresh = run.begin(replace(config, out=tmp_path / "again", start=short), str)
    with pytest.raises(ModelError, match="no tag rows of the output head"):
        run.adapted(replace(config, start=short), fresh.model, fresh.tags)


# ------------------------------------------------------------------------------ heads of every make

SMALL = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
HEADS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "granite": {"logits_scaling": 3.0, "tie_word_embeddings": False, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.3},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": False},
    "phi": {},  # its head has a bias
    "phi3": {"tie_word_embeddings": False},
    "starcoder2": {},
}


@pytest.mark.parametrize("kind", HEADS)
def test_what_was_trained_is_what_is_loaded(kind: str, tmp_path: Path) -> None:
    """The loss of an adapted model is that of its adapter merged, its tag rows those that were trained."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | HEADS[kind])))
    if getattr(made.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(made.get_output_embeddings().bias)
    checkpoints.save(made, copy.deepcopy(TOKENIZER), tmp_path / "base")
    (tmp_path / "data").write_text("")
    config = run.RunConfig(data=tmp_path / "data", out=tmp_path / "out", model=str(tmp_path / "base"), lora_rank=4)
    base = run.begin(config, str)
    plain = copy.deepcopy(base.model)
    adapted = run.adapted(replace(config, learning_rate=1e-2), base.model, base.tags)
    batch = batch_of(base.tokenizer, base.vocabulary, base.eos)
    with torch.no_grad():
        assert weighted_loss(adapted.eval(), batch, base.tags, 1.0)[0].item() == pytest.approx(
            weighted_loss(plain.eval(), batch, base.tags, 1.0)[0].item(), abs=1e-5
        )
    before = learn(config, adapted, batch, base, 1)
    learn(config, adapted, batch, base, 8)
    with torch.no_grad():
        loss, each, decision = weighted_loss(adapted.eval(), batch, base.tags, 1.0)
        assert float(each[decision].mean()) < before
        adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
        adapters.write_card(tmp_path / "adapter", {"shape": adapters.shape_of(plain)})
        merged = loading.load(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"), dtype="float32").model
        assert float(weighted_loss(merged, batch, base.tags, 1.0)[0]) == pytest.approx(float(loss), abs=1e-4)
    for table, was in zip(preparing.token_tables(merged), preparing.token_tables(plain), strict=True):
        changed = (table.weight != was.weight).any(dim=1).nonzero().flatten().tolist()
        assert changed == list(base.tags)


def test_only_the_text_part_of_a_model_that_sees_is_adapted(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**SMALL, "head_dim": 16, "query_pre_attn_scalar": 16, "vocab_size": 300}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    model = Gemma3ForConditionalGeneration(config)
    asked = run.RunConfig(data=tmp_path, out=tmp_path)
    model.resize_token_embeddings(400)
    adapted = run.adapted(asked, model, tags_of(prepared_tokenizer()))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and not any("vision" in name or "projector" in name for name in trained)
    for part in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "embed_tokens"):
        assert any(part in name for name in trained), part
    assert adapters.shape_of(model) == {"model_type": "gemma3", "hidden_size": 32, "num_hidden_layers": 2}


def prepared_tokenizer() -> Any:
    tokenizer = copy.deepcopy(TOKENIZER)
    preparing.prepare(small_model(len(tokenizer)), tokenizer)
    return tokenizer


def tags_of(tokenizer: Any) -> Tags:
    tags = lossless.vocabulary_of(tokenizer, eos=[1]).tags
    assert tags is not None
    return tags


def test_quantised_weights_are_adapted_and_neither_cast_nor_trained(tmp_path: Path) -> None:
    model = small_model(400)
    for layer in model.model.layers:
        made = Halves(32, 64, bias=False)
        made.weight = torch.nn.Parameter(layer.mlp.up_proj.weight.data.half(), requires_grad=False)
        layer.mlp.up_proj = made
    model.is_quantized = True
    config = run.RunConfig(data=tmp_path, out=tmp_path)
    tokenizer = prepared_tokenizer()
    with pytest.raises(ModelError, match="leave out --full"):
        run.adapted(replace(config, full=True), model, tags_of(tokenizer))
    adapted = run.adapted(config, model, tags_of(tokenizer))
    trained = {name: p.dtype for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("up_proj.lora" in name for name in trained) and set(trained.values()) == {torch.float32}
    vocabulary = lossless.vocabulary_of(tokenizer, eos=[1])
    loss, _, _ = weighted_loss(adapted.train(), batch_of(tokenizer, vocabulary, 1), tags_of(tokenizer), 2.0)
    loss.backward()
    assert loss.isfinite()


def test_a_model_whose_layers_take_no_mask_is_refused_before_training(tmp_path: Path) -> None:
    model = small_model(400)
    model.config.layer_types = ["linear_attention", "full_attention"]
    for full in (False, True):
        with pytest.raises(ModelError, match="layers of 'linear_attention'"):
            run.adapted(run.RunConfig(data=tmp_path, out=tmp_path, full=full), model, tags_of(prepared_tokenizer()))


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl"])
def test_multimodal_checkpoints_are_trained_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    """Their text part is; the adapter that comes out goes onto what it was made for."""
    saved(multimodal(kind), tmp_path / "base")
    row = {"prompt": "Tips?", "annotated": render(DOCUMENT), "tokens": 12, "chunks": 2}
    rows = [{**row, "id": str(i), "prompt": f"Tips {i}?"} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SftConfig(
        data=tmp_path / "data.jsonl",
        out=tmp_path / "out",
        model=str(tmp_path / "base"),
        mix=Mix(token_budget=600, plain=0, sequential=0),
        validation_rows=1,
        lora_rank=2,
        batch_tokens=300,
    )
    adapter = train(config, str)
    assert loading.load(config.model, adapter=str(adapter), dtype="float32").prepared
    whole = train(replace(config, full=True, out=tmp_path / "whole"), str)
    assert loading.load(str(whole), adapter=None, dtype="float32").prepared
