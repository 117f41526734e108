"""Builds a tokenizer from GGUF metadata, without llama.cpp: known kinds of byte-level BPE, and SentencePiece's BPE.

Ids are the same as llama.cpp's, with one exception: Qwen was trained with composed characters (NFC), and llama.cpp does
not compose them. Other kinds of tokenizers raise CapabilityError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from pastalm.errors import CapabilityError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3")
"""Kinds that encode a word that is a token as that token, regardless of merges, and start texts with BOS."""
SPLITS: dict[str, str | None] = {
    **dict.fromkeys((*_LLAMA3, "smaug-bpe"), _WORDS % "{1,3}"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _WORDS % ""),
    "gpt-2": None,
    "smollm": None,
}
"""How each known kind of byte-level BPE splits a text into words; None: as GPT-2, which `tokenizers` has built in."""
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
    *("<|end_of_text|>", "<end_of_utterance>", "<EOT>", "_<EOT>"),
}
"""Spellings that llama.cpp treats as the end of an answer, regardless of the metadata."""


def from_metadata(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The description of a ChatTokenizer, and the ids that end an answer."""
    settings = _Metadata(metadata)
    if settings.model == "gpt2" and settings.pre in SPLITS:
        backend = _byte_level(settings)
    elif settings.model == "llama":
        backend = _sentence_pieces(settings)
    else:
        raise _refuse(f"is a {settings.model!r}, split as {settings.pre!r}")
    kinds = settings.kinds
    control = [settings.tokens[i] for i in sorted(settings.control)]
    backend.add_special_tokens([_added(token, special=True) for token in control])
    words = [t for i, t in enumerate(settings.tokens) if kinds[i] == _USER_DEFINED and i not in settings.control]
    backend.add_tokens([_added(token, special=False) for token in words])
    _add_bos(backend, settings)
    description = {
        "backend": backend.to_str(),
        "chat_template": metadata.get("tokenizer.chat_template"),
        "special_tokens": {f"{_NAMES[n]}_token": settings.tokens[i] for n, i in settings.special_ids.items()},
        "all_special_ids": sorted(settings.control),
    }
    return description, sorted(settings.ends)


def _refuse(reason: str) -> CapabilityError:
    return CapabilityError(f"the native engine cannot run this GGUF file: its tokenizer {reason}")


class _Metadata:
    """The metadata of a tokenizer."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.model, self.pre = self.get("model"), self.get("pre", "default")
        self.tokens: list[str] = self.get("tokens", [])
        self.kinds: list[int] = self.get("token_type", [])
        if len(set(self.tokens)) != len(self.tokens) or len(self.kinds) != len(self.tokens):
            raise _refuse("has a duplicate token, or tokens without a type")
        if self.get("add_eos_token", False):
            raise _refuse("puts an end token after every text")

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    @cached_property
    def control(self) -> set[int]:
        """Ids of tokens that are not text."""
        ends = {i for i, token in enumerate(self.tokens) if token in _ENDS and self.kinds[i] != _UNUSED}
        return ends | {i for i, kind in enumerate(self.kinds) if kind in (_CONTROL, _UNKNOWN)}

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Ids of the tokens with a role, such as "bos"."""
        ids = {name: self.get(f"{name}_token_id") for name in _NAMES}
        return {name: i for name, i in ids.items() if i is not None and i < len(self.tokens)}

    @cached_property
    def ends(self) -> set[int]:
        ids = {self.get(f"{name}_token_id") for name in ("eos", "eot", "eom")} - {None}
        return ids | {i for i in self.control if self.tokens[i] in _ENDS}

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Ids by token, without unused entries of the table."""
        pairs = zip(self.tokens, self.kinds, strict=True)
        return {token: i for i, (token, kind) in enumerate(pairs) if kind != _UNUSED}


def _added(token: str, *, special: bool) -> Any:
    from tokenizers import AddedToken

    return AddedToken(token, special=special, normalized=False)


def _core(settings: _Metadata, merges: list[tuple[str, str]], **options: Any) -> Any:
    from tokenizers import Tokenizer, models

    try:
        return Tokenizer(models.BPE(settings.vocabulary, merges, **options))
    except Exception as error:
        raise _refuse(f"is inconsistent ({error})") from None


def _byte_level(settings: _Metadata) -> Any:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    merges = [(m[: m.index(" ", 1)], m[m.index(" ", 1) + 1 :]) for m in settings.get("merges", [])]
    tokenizer = _core(settings, merges, ignore_merges=settings.pre in _LLAMA3)
    split = SPLITS[settings.pre]
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if split is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(split), behavior="isolated"))
    elif settings.pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if settings.pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentence_pieces(settings: _Metadata) -> Any:
    """Merges are ordered by the score of their result. A character without a token is encoded as bytes."""
    from tokenizers import decoders, normalizers

    scores = settings.get("scores", [])
    if len(scores) != len(settings.tokens):
        raise _refuse("has no scores")
    merges = sorted(_merges(settings), key=lambda merge: -scores[settings.vocabulary["".join(merge)]])
    tokenizer = _core(settings, merges, byte_fallback=True)
    spaces: list[Any] = [normalizers.Replace(" ", "\u2581")]
    if settings.get("add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("\u2581"))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _merges(settings: _Metadata) -> Iterator[tuple[str, str]]:
    """Every pair of tokens that together make a token."""
    no_text = settings.control | {i for i, kind in enumerate(settings.kinds) if kind == _BYTE}
    words = {token: i for token, i in settings.vocabulary.items() if i not in no_text}
    for word in words:
        for at in range(1, len(word)):
            if word[:at] in words and word[at:] in words:
                yield word[:at], word[at:]


def _add_bos(backend: Any, settings: _Metadata) -> None:
    """Makes the tokenizer put BOS before every text, if the metadata say so."""
    from tokenizers import processors

    if (
        settings.get("add_bos_token", settings.pre in _LLAMA3 or settings.model == "llama")
        and "bos" in settings.special_ids
    ):
        i = settings.special_ids["bos"]
        first = {"id": "BOS", "ids": [i], "tokens": [settings.tokens[i]]}
        backend.post_processor = processors.TemplateProcessing(single=["BOS", "$A"], special_tokens=[first])
