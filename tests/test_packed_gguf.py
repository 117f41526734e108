"""A GGUF file read without llama.cpp computes, and says of its tokens, what llama.cpp makes of it."""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as cores
from transformers import PreTrainedTokenizerFast

from pastalm.core.vocabulary import TAG_TOKENS
from pastalm.engines.native import weights
from pastalm.errors import CapabilityError, ModelError
from pastalm.models import (
    adapters,
    chat_template,
    downloads,
    gguf_files,
    gguf_tokenizers,
    loading,
    lossless,
    packed_gguf,
    packed_models,
)
from pastalm.models.loading import Loaded
from pastalm.models.packed_models import Packed
from tests.packed_reference import logits
from tests.test_models import TEMPLATE
from tests.test_packed_models import equal, random_model, same

llama_cpp = pytest.importorskip("llama_cpp")

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PASTALM_CACHE", str(folder))
    return folder


# ------------------------------------------------------------------------------ tokenizers

SPECIALS = ["<|begin|>", "<|im_start|>", "<|im_end|>", *TAG_TOKENS.values()]
WORDS = [
    "Five tips for sleeping well, and why they'll help: don't worry, I'VE 1234567 reasons.",
    "naïve café 你好吗 🙂🙂 e\u0301 \r\n\r\n  x\ty    z\u00a0w /path/to [INST] #hash",
    "<|im_end|> <think>12</think> ١٢٣ Ⅷ ½ ''S 'd",
] * 9
WHOLE = ["\u0120zebra", "zebras", "cafe"]
"""Tokens that no merge makes: " zebra", "zebras", "cafe"."""


@cache
def trained() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with tags, a word of its own and a token that begins texts. Its merges go across every
    boundary, so that it matters how a text is split into words."""
    core = Tokenizer(cores.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=560,
        max_token_length=8,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIALS],
        show_progress=False,
    )
    core.train_from_iterator(WORDS, trainer)
    core.add_tokens([AddedToken("<think>", normalized=False)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|begin|>", eos_token="<|im_end|>")
    made.chat_template = "{{ bos_token }}" + TEMPLATE
    return made


def with_whole_words(patched: pytest.MonkeyPatch) -> None:
    """Files that are written have the tokens of WHOLE in the place of the last that fill up."""
    add_list, add_types = gguf.GGUFWriter.add_token_list, gguf.GGUFWriter.add_token_types
    kinds = [gguf.TokenType.NORMAL] * len(WHOLE)
    patched.setattr(gguf.GGUFWriter, "add_token_list", lambda w, t: add_list(w, [*t[: -len(WHOLE)], *WHOLE]))
    patched.setattr(gguf.GGUFWriter, "add_token_types", lambda w, t: add_types(w, [*t[: -len(WHOLE)], *kinds]))


def prepared(tokenizer: Any, model: Any) -> Loaded:
    end = tokenizer.eos_token_id
    return Loaded(
        name="tiny",
        model=model,
        tokenizer=tokenizer,
        vocabulary=lossless.vocabulary_of(tokenizer, eos={end}, size=model.config.vocab_size),
        prepared=True,
        sequential_marker="In one piece.",
        context_length=256,
    )


GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def sentence_pieces(writer: Any, *, prefix: bool = False) -> int:
    """Writes a tokenizer of Gemma's kind, or of Llama 2's, which puts a space before a text; its number of tokens."""
    control = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<start_of_turn>",
        "<end_of_turn>",
        *TAG_TOKENS.values(),
    ]
    words = ["  ", "   ", "\n\n", "<think>"]
    core = Tokenizer(cores.BPE())
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learnt = sorted(core.get_vocab(), key=core.token_to_id)
    learnt = sorted(learnt, key=lambda token: len(token) == 1)  # characters come last, as in Gemma
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    kinds = gguf.TokenType
    table = [(t, kinds.CONTROL) for t in control] + [(t, kinds.USER_DEFINED) for t in words]
    table[3] = ("<unk>", kinds.UNKNOWN)
    table += [(t, kinds.BYTE) for t in bytes_] + [(t, kinds.NORMAL) for t in learnt if t not in words]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in table])
    writer.add_token_types([kind for _, kind in table])
    writer.add_token_scores([-float(i) for i in range(len(table))])
    writer.add_add_space_prefix(prefix)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_chat_template(GEMMA_TEMPLATE)
    writer.add_string(gguf_files.MARKER_KEY, "In one piece.")
    return len(table)


@pytest.fixture(scope="module", params=[*gguf_tokenizers.SPLITS, "gemma", "llama"])
def spoken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Loaded, Packed]:
    """The kind of tokenizer; a file of such a kind as llama.cpp reads it, and as we do."""
    way, folder = request.param, tmp_path_factory.mktemp("gguf")
    file = folder / "tiny.gguf"
    with pytest.MonkeyPatch().context() as patched:
        patched.setenv("PASTALM_CACHE", str(folder))
        if way in ("gemma", "llama"):
            size = sentence_pieces(gguf.GGUFWriter(folder / "unused", "gemma3"))
            write(
                random_model("Gemma3", vocab_size=size, **SCALED),
                file,
                "gemma3",
                tokens=partial(sentence_pieces, prefix=way == "llama"),
            )
        else:
            patched.setattr(gguf_files, "_SPLITS", ((way, "ByteLevel"),))
            with_whole_words(patched)
            model = random_model("Llama", vocab_size=len(trained()) + 5)
            gguf_files.export(prepared(trained(), model), file, "F32")
        packed = packed_models.load_gguf(file)
    return way, gguf_files.load(file), packed


TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=8)
    | st.text("abcsSdDtTlL' 0123\n\r\t.,ée\u0301你🙂", max_size=8)
    | st.sampled_from([*SPECIALS, "<think>", "  ", "'ll", " zebra", "zebras", "cafe", "12345", "\n\n"])
    | st.builds(
        lambda words, at, size: words[at : at + size],
        st.sampled_from(WORDS),
        *[st.integers(0, 60)] * 2,
    ),
    max_size=8,
).map("".join)
ONCE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_trained(way: str, text: str) -> str:
    """Qwen's tokenizer composes characters, which llama.cpp does not do."""
    return unicodedata.normalize("NFC", text) if way == "qwen2" else text


@given(text=TEXTS)
@ONCE
def test_ids_are_llama_cpps(spoken: tuple[str, Loaded, Packed], text: str) -> None:
    way, theirs, ours = spoken
    text = as_trained(way, text)
    assert list(ours.vocabulary.encode(text)) == list(theirs.vocabulary.encode(text))
    assert ours.tokenizer(text)["input_ids"] == theirs.tokenizer(text)["input_ids"]
    plain = ours.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert plain == theirs.tokenizer(text, add_special_tokens=False)["input_ids"]


@given(text=TEXTS, system=TEXTS | st.none(), marker=st.none() | st.just("In one piece."))
@ONCE
def test_prompts_are_llama_cpps(
    spoken: tuple[str, Loaded, Packed], text: str, system: str | None, marker: str | None
) -> None:
    way, theirs, ours = spoken
    messages = [{"role": "user", "content": as_trained(way, text)}]
    if system is not None and way not in ("gemma", "llama"):
        messages.insert(0, {"role": "system", "content": as_trained(way, system)})
    assert chat_template.chat_prompt(ours.loaded, messages, marker=marker) == (
        chat_template.chat_prompt(theirs, messages, marker=marker)
    )


@given(text=TEXTS | st.sampled_from(["1. Eat", "<think>x", "\u2581 a", "\0a"]))
@ONCE
def test_a_text_is_read_back_as_it_was(spoken: tuple[str, Loaded, Packed], text: str) -> None:
    _, theirs, ours = spoken
    for vocabulary in (ours.vocabulary, theirs.vocabulary):
        assert vocabulary.text(vocabulary.encode(text)) == text


def test_a_word_that_no_merge_makes_is_a_token_for_some(spoken: tuple[str, Loaded, Packed]) -> None:
    way, theirs, ours = spoken
    whole = way in ("llama-bpe", "llama3", "llama-v3", "falcon3")
    for vocabulary in (ours.vocabulary, theirs.vocabulary):
        assert (len(vocabulary.encode(" zebra")) == 1) == whole


def test_the_vocabulary_is_llama_cpps(spoken: tuple[str, Loaded, Packed]) -> None:
    _, theirs, ours = spoken
    assert ours.vocabulary.size == theirs.vocabulary.size
    assert ours.vocabulary.tags == theirs.vocabulary.tags
    assert ours.vocabulary.eos == theirs.vocabulary.eos
    assert ours.sequential_marker == theirs.sequential_marker
    assert ours.context_length == theirs.context_length
    assert ours.loaded.prepared
    all_ids = range(ours.vocabulary.size)
    assert [ours.vocabulary.piece(i) for i in all_ids] == [theirs.vocabulary.piece(i) for i in all_ids]


# ------------------------------------------------------------------------------ weights

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PLAIN = {"post_attention_layernorm": "ffn_norm"}
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
Metadata = dict[str, Any]
Change = Callable[[Metadata, dict[str, Any]], None]


def write(
    model: Any,
    path: Path,
    kind: str,
    change: Change = lambda *_: None,
    *,
    tokens: Callable[[Any], int] | None = None,
) -> Path:
    """A model in float32 as converters write it. change: may alter metadata and tensors before. tokens: writes the
    tokenizer; None: a byte-level one."""
    config = model.config
    gemma = kind.startswith("gemma")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    metadata: Metadata = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": head_dim,
    }
    rope = config.rope_parameters
    metadata["rope.freq_base"] = float(rope.get("full_attention", rope)["rope_theta"])
    if gemma:
        metadata["attention.sliding_window"] = config.sliding_window
    tensors: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        array = tensor.detach().float().numpy()
        if gemma and name.endswith("norm.weight"):
            array = array + np.float32(1)
        if kind in ("llama", "smollm3") and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if name.startswith("model.layers."):
            _, _, i, rest = name.split(".", 3)
            part, _, suffix = rest.rpartition(".")
            short = (_NAMES | (_GEMMA if gemma else _PLAIN))[part]
            tensors[f"blk.{i}.{short}.{suffix}"] = array
        elif name != "lm_head.weight" or not config.tie_word_embeddings:
            whole = {
                "model.embed_tokens": "token_embd",
                "model.norm": "output_norm",
                "lm_head": "output",
            }
            tensors[f"{whole[name.removesuffix('.weight')]}.weight"] = np.ascontiguousarray(array)
    change(metadata, tensors)
    writer = gguf.GGUFWriter(path, kind)
    for key, value in metadata.items():
        key = key if key.startswith("tokenizer.") else f"{kind}.{key}"
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    if tokens is not None:
        tokens(writer)
    else:
        with pytest.MonkeyPatch().context() as patched:
            patched.setattr(gguf_files, "_SPLITS", (("gpt-2", "ByteLevel"),))
            gguf_files._write_tokenizer(writer, prepared(trained(), model))
    for name, tensor in tensors.items():
        array, kind_ = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=kind_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_cpps(path: Path, ids: list[int]) -> Any:
    """Logits of llama.cpp, everything in float32."""
    model = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, type_k=0, type_v=0, swa_full=True)
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def soft(metadata: Metadata, _: Any) -> None:
    metadata |= {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}


def linear(metadata: Metadata, _: Any) -> None:
    metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0}


def yarn(metadata: Metadata, _: Any) -> None:
    metadata |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    metadata["rope.scaling.original_context_length"] = 64


def divisors(_: Metadata, tensors: dict[str, Any]) -> None:
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 8, dtype=np.float32)


def gemma3_locals(metadata: Metadata, tensors: dict[str, Any]) -> None:
    metadata["rope.freq_base_swa"] = 10_000.0
    linear(metadata, tensors)


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
SCALED: dict[str, Any] = {"query_pre_attn_scalar": 16, "head_dim": 16, "sliding_window": 7}
FILES: dict[str, tuple[str, str, dict[str, Any], Change | None, bool]] = {
    # what the file says, and whether transformers' model computes the same
    "llama": ("llama", "Llama", {}, None, True),
    "llama, untied biases": (
        "llama",
        "Llama",
        {"attention_bias": True, "head_dim": 32},
        None,
        True,
    ),
    "llama, tied": ("llama", "Llama", {"tie_word_embeddings": True}, None, True),
    "llama, linear": ("llama", "Llama", {"rope_parameters": LINEAR}, linear, True),
    "llama, usual base": (
        "llama",
        "Llama",
        {},
        lambda metadata, _: metadata.pop("rope.freq_base"),
        True,
    ),
    "llama, yarn": ("llama", "Llama", {"rope_parameters": YARN}, yarn, True),
    "llama, divisors": ("llama", "Llama", {}, divisors, False),
    "qwen2": ("qwen2", "Qwen2", {}, None, True),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32}, None, True),
    "smollm3": ("smollm3", "SmolLM3", {"num_hidden_layers": 5}, None, True),
    "gemma2": (
        "gemma2",
        "Gemma2",
        {**SCALED, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
        soft,
        True,
    ),
    "gemma2, largest": (
        "gemma2",
        "Gemma2",
        {**SCALED, "head_dim": 32, "num_hidden_layers": 46, "attn_logit_softcapping": 3.0}
        | {"final_logit_softcapping": 2.0, "initializer_range": 0.05},
        soft,
        True,
    ),
    "gemma3, largest": (
        "gemma3",
        "Gemma3",
        {**SCALED, "head_dim": 32, "num_hidden_layers": 62, "initializer_range": 0.05},
        None,
        True,
    ),
    "gemma3": ("gemma3", "Gemma3", {**SCALED, "num_hidden_layers": 7}, None, True),
    "gemma3, linear": (
        "gemma3",
        "Gemma3",
        {
            **SCALED,
            "num_hidden_layers": 7,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL},
        },
        gemma3_locals,
        True,
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_computes_what_llama_cpp_and_transformers_do(case: str, tmp_path: Path) -> None:
    kind, name, changes, change, same_model = FILES[case]
    size = len(trained())
    model = random_model(name, **(WIDE | {"vocab_size": size, "rms_norm_eps": 1e-5} | changes))
    path = write(model, tmp_path / "tiny.gguf", kind, change or (lambda *_: None))
    packed = packed_models.load_gguf(path)
    ids = np.random.default_rng(0).integers(0, size, 40).tolist()
    ours = logits(packed.architecture, packed.tensors, ids)
    theirs = llama_cpps(path, ids)
    close = 3e-2 if kind.startswith("gemma") else 1e-3  # llama.cpp looks GELU up in float16
    assert np.abs(ours - theirs).max() < close * theirs.std()
    if same_model:
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        assert np.abs(ours - expected).max() < 1e-4 * expected.std()


def in_order(tensor: Any, heads: int | None) -> Any:
    """The rows of a file's tensor as transformers has them; heads: of queries or keys whose neighbours rotate."""
    rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist())
    if heads is None:
        return rows
    half = len(rows) // heads // 2
    places = [h * 2 * half + 2 * j + side for h in range(heads) for side in range(2) for j in range(half)]
    return rows[places]


def expected(file: Path, model: Any) -> dict[str, tuple[set[str], Any]]:
    """Types in the file and dequantised rows of each packed matrix."""
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}

    def made(*names: str) -> tuple[set[str], list[Any]]:
        parts = [in_order(tensors[f"{n}.weight"], heads.get(n.split(".")[-1])) for n in names]
        return {tensors[f"{n}.weight"].tensor_type.name for n in names}, parts

    found = {"embedding": made("token_embd"), "head": made("output")}
    for i in range(model.config.num_hidden_layers):
        found[f"{i}.qkv"] = made(*(f"blk.{i}.attn_{x}" for x in "qkv"))
        found[f"{i}.attention_out"] = made(f"blk.{i}.attn_output")
        found[f"{i}.down"] = made(f"blk.{i}.ffn_down")
        kinds, (gate, up) = made(f"blk.{i}.ffn_gate", f"blk.{i}.ffn_up")
        found[f"{i}.gate_up"] = kinds, [weights.gate_up(gate, up)]
    return {name: (kinds, np.concatenate(parts)) for name, (kinds, parts) in found.items()}


@pytest.mark.parametrize("kind", gguf_files.WHOLE + gguf_files.QUANTISED)
def test_weights_are_taken_as_they_are_where_the_engine_has_their_type(kind: str, tmp_path: Path) -> None:
    tokenizer = trained()
    model = random_model(
        "Llama",
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
    )
    file = gguf_files.export(prepared(tokenizer, model), tmp_path / "tiny.gguf", kind)
    packed = packed_models.load_gguf(file)
    for name, (kinds, rows) in expected(file, model).items():
        matrix = packed.tensors[name]
        assert isinstance(matrix, weights.Matrix)
        if kinds <= set(weights.TYPES):
            assert {matrix.type} == kinds, name
            assert np.array_equal(weights.unpack(matrix), rows), name
        else:
            assert equal(matrix, weights.pack(rows, "Q8_0")), name
    if kind in weights.TYPES:
        assert packed.tensors["1.gate_up"].type == kind  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_no_block_is_quantised_anew(kind: str, tmp_path: Path) -> None:
    """These would come out otherwise: no quantisation makes them."""
    of = getattr(gguf.GGMLQuantizationType, kind)
    block, size = gguf.GGML_QUANT_SIZES[of]
    rng = np.random.default_rng(0)

    def other(_: Metadata, tensors: dict[str, Any]) -> None:
        for name, array in tensors.items():
            if "attn_q." in name or "attn_k." in name or "attn_v." in name or "ffn_" in name and array.ndim == 2:
                blocks = rng.integers(0, 256, (len(array), array.shape[1] // block, size), np.uint8)
                blocks[..., :2] = np.full(blocks.shape[:2], 0.01, np.float16)[..., None].view(np.uint8)
                tensors[name] = (blocks.reshape(len(array), -1), of)

    model = random_model("Llama", vocab_size=len(trained()), num_hidden_layers=2)
    file = write(model, tmp_path / "tiny.gguf", "llama", other)
    tensors = packed_models.load_gguf(file).tensors
    for name, (kinds, rows) in expected(file, model).items():
        if kinds == {kind}:
            matrix = tensors[name]
            assert isinstance(matrix, weights.Matrix) and matrix.type == kind
            assert np.array_equal(weights.unpack(matrix), rows), name
            assert not equal(matrix, weights.pack(rows, matrix.type)), name


def test_a_matrix_of_several_types_has_the_one_that_holds_them(tmp_path: Path) -> None:
    def mixed(_: Metadata, tensors: dict[str, Any]) -> None:
        q4 = gguf.GGMLQuantizationType.Q4_0
        tensors["blk.0.attn_k.weight"] = tensors["blk.0.attn_k.weight"].astype(np.float16)
        tensors["blk.1.ffn_up.weight"] = (
            gguf.quants.quantize(tensors["blk.1.ffn_up.weight"], q4),
            q4,
        )

    model = random_model("Llama", vocab_size=len(trained()), num_hidden_layers=2)
    file = write(model, tmp_path / "tiny.gguf", "llama", mixed)
    tensors, rows = packed_models.load_gguf(file).tensors, expected(file, model)
    for name, kind in (("0.qkv", "F32"), ("1.gate_up", "Q8_0"), ("0.down", "F32")):
        assert equal(tensors[name], weights.pack(rows[name][1], kind)), name  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ what is kept, what is refused


def test_the_next_start_needs_no_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("Llama", vocab_size=len(trained()))
    file = write(model, tmp_path / "tiny.gguf", "llama")
    packed = packed_models.load_gguf(file)
    monkeypatch.setattr(packed_gguf, "read", None)
    assert same(packed_models.load_gguf(file), packed)
    start = f"import sys; from pastalm.models import packed_models; packed_models.load_gguf({str(file)!r})"
    check = "assert not {'torch', 'transformers', 'gguf', 'llama_cpp'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{start}; {check}"], check=True)


def setting(key: str, value: Any) -> Change:
    def change(metadata: Metadata, _: Any) -> None:
        metadata[key] = value

    return change


def without(key: str) -> Change:
    def change(metadata: Metadata, tensors: dict[str, Any]) -> None:
        (metadata if key in metadata else tensors).pop(key)

    return change


def with_tensor(name: str, *shape: int) -> Change:
    def change(_: Metadata, tensors: dict[str, Any]) -> None:
        tensors[name] = np.zeros(shape, np.float32)

    return change


REFUSED: list[tuple[str, Change, str]] = [
    ("granite", lambda *_: None, "'granite'"),
    ("llama", setting("expert_count", 8), "expert_count of 8"),
    ("llama", setting("logit_scale", 0.5), "logit_scale"),
    ("llama", setting("attention.sliding_window", 64), "attention.sliding_window of 64"),
    ("llama", setting("attention.head_count_kv", [2, 2, 1, 1]), "differs from layer to layer"),
    ("llama", setting("rope.scaling.type", "longrope"), "rope.scaling.factor"),
    ("llama", setting("rope.dimension_count", 8), "rope.dimension_count"),
    ("llama", setting("rope.scaling.attn_factor", 2.0), "attn_factor of 2.0"),
    ("llama", setting("feed_forward_length", 100), "100 wide"),
    ("llama", setting("feed_forward_length", 64), "ffn_gate"),
    ("llama", without("block_count"), "has no block_count"),
    ("llama", without("blk.2.attn_v.weight"), "no blk.2.attn_v.weight"),
    ("llama", without("token_embd.weight"), "no token_embd.weight"),
    ("llama", with_tensor("blk.0.attn_sinks.weight", 4), "tensor blk.0.attn_sinks.weight"),
    ("llama", with_tensor("blk.0.ffn_up.bias", 96), "tensor blk.0.ffn_up.bias"),
    ("llama", with_tensor("blk.1.attn_q.weight", 32, 64), "blk.1.attn_q.weight has the shape"),
    ("gemma2", without("attention.sliding_window"), "attention.sliding_window"),
]


@pytest.mark.parametrize(("kind", "change", "said"), REFUSED)
def test_what_is_not_certain_is_refused(kind: str, change: Change, said: str, tmp_path: Path) -> None:
    if kind == "gemma2":
        model = random_model("Gemma2", vocab_size=len(trained()), **SCALED)
    else:
        model = random_model("Llama", vocab_size=len(trained()))
    file = write(model, tmp_path / "tiny.gguf", kind, change)
    with pytest.raises(CapabilityError, match=said) as raised:
        packed_models.load_gguf(file)
    assert "\n" not in str(raised.value)


TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
}


@pytest.mark.parametrize(
    "change",
    [
        {"model": "llama"},
        {"pre": "tekken"},
        {"pre": "default"},
        {"tokens": ["a", "b", "ab", "ab"]},
        {"token_type": [1]},
        {"merges": ["a c"]},
        {"add_eos_token": True},
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused(change: dict[str, Any]) -> None:
    gguf_tokenizers.from_metadata(TOKENS)
    with pytest.raises(CapabilityError, match="tokenizer"):
        gguf_tokenizers.from_metadata(TOKENS | {f"tokenizer.ggml.{key}": value for key, value in change.items()})


def test_what_is_no_gguf_file_is_an_error(tmp_path: Path) -> None:
    model = random_model("Llama", vocab_size=len(trained()))
    whole = write(model, tmp_path / "tiny.gguf", "llama").read_bytes()
    for broken in (b"", b"no GGUF at all", whole[:30], whole[: len(whole) // 2], whole[:-100]):
        (tmp_path / "broken.gguf").write_bytes(broken)
        with pytest.raises(ModelError, match="broken.gguf") as raised:
            packed_models.load_gguf(tmp_path / "broken.gguf")
        assert "\n" not in str(raised.value)
    with pytest.raises(ModelError, match="no GGUF file"):
        packed_models.load_gguf(tmp_path / "missing.gguf")


# ------------------------------------------------------------------------------ the embedded model


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Loaded, Packed]:
    if not (adapters.SHIPPED / downloads.EMBEDDED / "adapter_config.json").is_file():
        pytest.skip("no adapter ships in this tree")
    folder = tmp_path_factory.mktemp("embedded")
    file = gguf_files.export(loading.load(dtype="float32"), folder / "q4_0.gguf", "Q4_0")
    with pytest.MonkeyPatch().context() as patched:
        patched.setenv("PASTALM_CACHE", str(folder))
        return file, gguf_files.load(file), packed_models.load_gguf(file)


@given(text=TEXTS)
@ONCE
def test_the_embedded_models_ids_are_llama_cpps(embedded: tuple[Path, Loaded, Packed], text: str) -> None:
    _, theirs, ours = embedded
    assert list(ours.vocabulary.encode(text)) == list(theirs.vocabulary.encode(text))
    messages = [{"role": "user", "content": text}]
    assert chat_template.chat_prompt(ours.loaded, messages) == chat_template.chat_prompt(theirs, messages)


def test_the_embedded_model_ends_as_in_llama_cpp(embedded: tuple[Path, Loaded, Packed]) -> None:
    """Which takes the name of a repository, a token for code, for an end too."""
    _, theirs, ours = embedded
    assert theirs.vocabulary.eos - ours.vocabulary.eos == {ours.tokenizer.convert_tokens_to_ids("<reponame>")}
    assert ours.vocabulary.eos <= theirs.vocabulary.eos


def test_the_embedded_models_weights_are_the_files(embedded: tuple[Path, Loaded, Packed]) -> None:
    file, _, ours = embedded
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    for i, name, heads in ((0, "attn_q", 9), (29, "attn_k", 3)):
        tensor = tensors[f"blk.{i}.{name}.weight"]
        rows = in_order(tensor, heads)
        start = 576 if name == "attn_k" else 0
        packed = weights.unpack(ours.tensors[f"{i}.qkv"])  # type: ignore[arg-type]
        assert np.array_equal(packed[start : start + len(rows)], rows)
    assert ours.tensors["12.down"].type == "Q4_0"  # type: ignore[union-attr]
    table = tensors["token_embd.weight"]
    assert equal(ours.tensors["embedding"], weights.pack(in_order(table, None), "Q8_0"))
