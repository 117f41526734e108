"""Loads GGUF files through llama.cpp, and exports prepared models as GGUF.

A loaded model uses llama.cpp's tokenizer and the file's chat template. An exported file contains base and adapter
merged. The six tag tokens are CONTROL tokens, and the sequential marker is metadata, so asynchronous decoding needs
only this file.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pastalm.core.vocabulary import TAG_TOKENS, Tags, Vocabulary
from pastalm.errors import CapabilityError, ModelError, RequestError
from pastalm.models import lossless
from pastalm.models.loading import Loaded
from pastalm.records.xml import Scanner

MARKER_KEY = "pastalm.sequential_marker"
WHOLE = ("F32", "F16", "BF16")
"""Weight types that are written directly; llama.cpp quantises an F16 file to the others."""
QUANTISED = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0")


# ------------------------------------------------------------------------------ loading

_FIRST = 1024
"""Number of tokens among which SentencePiece has its byte tokens."""


@dataclass(frozen=True, slots=True)
class _Special:
    content: str
    special: bool = True


class GgufTokenizer:
    """llama.cpp's tokenizer of a loaded file, with the methods of transformers' tokenizers that prompts need.

    model: a LlamaCppModel.
    """

    def __init__(self, model: Any) -> None:
        import llama_cpp

        self._api, self._vocabulary = llama_cpp, model.vocabulary
        self._size: int = model.vocabulary_size
        template = llama_cpp.llama_model_chat_template(model.pointer, None)
        self.chat_template: str | None = template.decode() if template else None
        self.added_tokens_decoder = {
            i: _Special(self.spelling(i))
            for i in range(self._size)
            if llama_cpp.llama_vocab_is_control(self._vocabulary, i)
        }
        sentencepiece = llama_cpp.llama_vocab_type(self._vocabulary) == llama_cpp.LLAMA_VOCAB_TYPE_SPM
        self._prefixes = sentencepiece and self._bytes(self.encode("a", special=False)) != b"a"
        self._alone = self._separate_texts() if sentencepiece else {}
        """Ids of texts that are encoded separately from the text around them, by spelling."""
        self._apart = re.compile(f"({lossless.any_of(set(self._alone)).pattern})")

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(self.piece, ids))

    def _separate_texts(self) -> dict[str, list[int]]:
        """The sign for a space, which must not become a space, and added words, after which one would be inserted."""
        sign = [self._byte(byte) for byte in lossless.SPACE.encode()]
        alone = {} if None in sign else {lossless.SPACE: [i for i in sign if i is not None]}
        if self._prefixes:
            word = self._api.LLAMA_TOKEN_ATTR_USER_DEFINED
            words = (i for i in range(self._size) if self._api.llama_vocab_get_attr(self._vocabulary, i) & word)
            alone |= {self.spelling(i): [i] for i in words}
        return alone

    def _byte(self, byte: int) -> int | None:
        """The byte token of a byte; None if the vocabulary has none."""
        special = self._api.LLAMA_TOKEN_ATTR_BYTE
        spelled = f"<0x{byte:02X}>".encode()
        for i in range(min(self._size, _FIRST)):
            if self._api.llama_vocab_get_text(self._vocabulary, i) == spelled:
                return i if self._api.llama_vocab_get_attr(self._vocabulary, i) & special else None
        return None

    def text_ids(self, text: str) -> list[int]:
        """Token ids whose pieces are exactly the text, without special tokens or an added space."""
        ids: list[int] = []
        for i, part in enumerate(self._apart.split(text)):
            if i % 2:
                ids += self._alone[part]
            elif part:
                ids += self._continued(part)
        return ids

    def _continued(self, text: str) -> list[int]:
        if not self._prefixes:
            return self.encode(text, special=False)
        # the byte 0 never merges: tokens before it are the space that llama.cpp adds
        ids = self.encode("\0" + text, special=False)
        return ids[next(at for at, token in enumerate(ids) if self.piece(token) == b"\0") + 1 :]

    def spelling(self, token: int) -> str:
        text: bytes = self._api.llama_vocab_get_text(self._vocabulary, token)
        return text.decode(errors="replace")

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text. With `special`, the spelling of a special token becomes that token."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        n = self._api.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), False, special)
        if n < 0:
            raise RequestError("llama.cpp cannot tokenize this text")
        return ids[:n]

    def piece(self, token: int) -> bytes:
        """The bytes of a token; b"" for a special one."""
        buffer = ctypes.create_string_buffer(256)
        n = self._api.llama_token_to_piece(self._vocabulary, token, buffer, len(buffer), 0, False)
        return buffer.raw[:n] if n > 0 else b""

    def is_end(self, token: int) -> bool:
        return bool(self._api.llama_vocab_is_eog(self._vocabulary, token))

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = self.encode(text, special=True)
        first = self._api.llama_vocab_bos(self._vocabulary)
        if add_special_tokens and self._api.llama_vocab_get_add_bos(self._vocabulary):
            ids = [first, *ids]
        return {"input_ids": ids}

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: bool, add_generation_prompt: bool, **more: Any
    ) -> str:
        """The conversation as text. Raises what the template raises.

        messages: at least one.
        tokenize: must be False.
        add_generation_prompt: end with the tokens that start an assistant message.
        more: further variables for the template.
        """
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        ids = {
            "bos_token": self._api.llama_vocab_bos(self._vocabulary),
            "eos_token": self._api.llama_vocab_eos(self._vocabulary),
        }
        names = {name: self.spelling(i) if i >= 0 else "" for name, i in ids.items()}
        formatter = Jinja2ChatFormatter(self.chat_template or "", add_generation_prompt=add_generation_prompt, **names)
        text: str = formatter(messages=[dict(m) for m in messages], **more).prompt
        return text


def load(path: str | Path, *, gpu_layers: int = 0) -> Loaded:
    """Loads a GGUF file for `LlamaCppEngine`. Raises ModelError.

    path: the file.
    gpu_layers: layers on the GPU (-1: all).
    """
    from pastalm.engines.llama_cpp import LlamaCppModel

    model = LlamaCppModel(path, gpu_layers=gpu_layers)
    tokenizer = GgufTokenizer(model)
    specials = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    ids = {name: specials.get(spelling) for name, spelling in TAG_TOKENS.items()}
    tags = None if None in ids.values() else Tags(**ids)  # type: ignore[arg-type]
    vocabulary = Vocabulary(
        size=model.vocabulary_size,
        eos=frozenset(filter(tokenizer.is_end, range(model.vocabulary_size))),
        encode=tokenizer.text_ids,
        piece=tokenizer.piece,
        scanner=Scanner,
        tags=tags,
    )
    return Loaded(
        name=Path(path).name,
        model=model,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        prepared=tags is not None,
        sequential_marker=model.metadata(MARKER_KEY),
        context_length=model.context_length,
    )


# ------------------------------------------------------------------------------ exporting

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
} | {f"self_attn.{part}_proj.{kind}": f"attn_{part}.{kind}" for part in "qkv" for kind in ("weight", "bias")}
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_SPLITS = (
    # llama.cpp's name for a way to split text into words, and a string by which it is recognised
    ("llama-bpe", r"\p{N}{1,3}"),
    ("qwen2", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"),
    ("smollm", '"individual_digits": true'),
    ("gpt-2", '"ByteLevel"'),
)


def _is_gguf(path: Path) -> bool:
    """Whether a file starts like a GGUF file, or is empty."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) in (b"GGUF", b"")


def export(
    loaded: Loaded,
    target: str | Path,
    kind: str = "F16",
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """Writes a loaded model, with its adapter merged, as one GGUF file.

    loaded: the model.
    target: the file.
    kind: weight type, one of WHOLE or QUANTISED.
    progress: called with lines about the progress.

    Raises CapabilityError for a model or type that cannot be written, ModelError if writing fails; no half-written
    file is left then.
    """
    target = Path(target)
    if target.exists() and not _is_gguf(target):
        raise ModelError(f"{target} exists and is not a GGUF file: give another file")
    if kind not in WHOLE + QUANTISED:
        raise CapabilityError(f"unknown weight type {kind!r}: one of {', '.join(WHOLE + QUANTISED)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
            whole = Path(scratch) / "whole.gguf"
            progress("writing the weights")
            _write(loaded, whole, kind if kind in WHOLE else "F16")
            if kind in QUANTISED:
                progress(f"quantising to {kind}")
                whole = _quantised(whole, Path(scratch) / "quantised.gguf", kind)
            os.replace(whole, target)
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error}") from None
    return target


def _write(loaded: Loaded, target: Path, kind: str) -> None:
    import gguf

    config = loaded.model.config
    _check(config)
    writer = gguf.GGUFWriter(target, config.model_type)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(loaded.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(loaded.vocabulary.size)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[kind]))
    if loaded.sequential_marker:
        writer.add_string(MARKER_KEY, loaded.sequential_marker)
    _write_tokenizer(writer, loaded)
    for name, array, as_type in _tensors(loaded.model, kind):
        writer.add_tensor(name, array, raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}


def _check(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type not in _ARCHITECTURES:
        raise CapabilityError(
            f"models of type {config.model_type!r} cannot be written as GGUF here, only {', '.join(_ARCHITECTURES)}"
        )
    if rope.get("rope_type", "default") != "default" or getattr(config, "use_sliding_window", False):
        raise CapabilityError("scaled rotary positions and sliding windows cannot be written as GGUF here")


def _tensors(model: Any, kind: str) -> Iterator[tuple[str, Any, Any]]:
    """Name, array and type of every tensor. Vectors stay in float32, as llama.cpp requires."""
    import gguf
    import torch

    config, tied = model.config, model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        weights = tensor.detach().to("cpu", torch.float32)
        if name in _WHOLE:
            short = _WHOLE[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            short = f"blk.{layer}.{_LAYER[rest]}"
        if config.model_type == "llama" and ".q_proj." in name:
            weights = _interleaved(weights, config.num_attention_heads)
        if config.model_type == "llama" and ".k_proj." in name:
            weights = _interleaved(weights, config.num_key_value_heads)
        if kind == "F32" or weights.dim() == 1:
            yield short, weights.numpy(), None
        elif kind == "F16":
            yield short, weights.numpy().astype(np.float16), None
        else:
            bfloat16 = gguf.GGMLQuantizationType.BF16
            yield short, gguf.quantize(weights.numpy(), bfloat16), bfloat16


def _interleaved(weights: Any, heads: int) -> Any:
    """Rows in llama.cpp's order: it rotates neighbouring dimensions, transformers rotates halves of a head."""
    rows = weights.shape[0] // heads // 2
    return weights.reshape(heads, 2, rows, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def _write_tokenizer(writer: Any, loaded: Loaded) -> None:
    import gguf

    tokenizer = loaded.tokenizer
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if described["model"]["type"] != "BPE" or described["model"].get("byte_fallback"):
        raise CapabilityError("only byte-level BPE tokenizers can be written as GGUF here")
    split = json.dumps(described["pre_tokenizer"], ensure_ascii=False)
    names = (name for name, sign in _SPLITS if sign in split or json.dumps(sign)[1:-1] in split)
    words = {i: t for t, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for i in range(loaded.vocabulary.size):
        if i in added:
            special = added[i].special
            kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
            tokens.append(added[i].content)
        else:
            kinds.append(gguf.TokenType.NORMAL if i in words else gguf.TokenType.UNUSED)
            tokens.append(words.get(i, f"[PAD{i}]"))
    merges = described["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(next(names))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_add_bos_token(False)
    for name in ("bos", "eos", "pad", "unk"):
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    if loaded.vocabulary.eos and tokenizer.eos_token_id not in loaded.vocabulary.eos:
        writer.add_eot_token_id(min(loaded.vocabulary.eos))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _quantised(source: Path, target: Path, kind: str) -> Path:
    import llama_cpp

    from pastalm.engines.llama_cpp import quiet

    quiet()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = os.cpu_count() or 1
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if code:
        raise ModelError(f"llama.cpp cannot quantise this model to {kind}")
    return target
