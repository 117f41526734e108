"""Chooses the engine for a model and loads both.

With engine="auto", CPUs get the native engine. If it cannot run the model, transformers does (llama.cpp for a GGUF
file), and a warning says why. An engine that is named explicitly raises instead. GPUs, compiled steps, float16 and
float64 always go to transformers. If the model is already packed, the native engine imports neither torch nor
transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeAlias

from pastalm.engines import registry
from pastalm.engines.base import Engine
from pastalm.errors import CapabilityError, ModelError, RequestError, complaint
from pastalm.models.loading import Loaded

if TYPE_CHECKING:
    from pastalm.engines.native.weights import WeightType

log = logging.getLogger("pastalm")

ENGINES = ("auto", *registry.LOADABLE)
_PACKED: Mapping[str, WeightType] = {
    "q8_0": "Q8_0", "q4_0": "Q4_0", "bfloat16": "BF16", "float16": "F16", "float32": "F32",
}  # fmt: skip
"""The native engine's weight type, by dtype."""
_QUANTISED = ("q8_0", "q4_0")
DTYPES = ("auto", *_PACKED, "float64")
MAX_MODEL_LEN = 4096
"""Default for an engine's max_model_len; less if the model's context is shorter."""
_EXTRAS = {
    **dict.fromkeys(("tokenizers", "safetensors", "jinja2", "gguf", "huggingface_hub"), "native"),
    **dict.fromkeys(("fastapi", "uvicorn", "sse_starlette", "prometheus_client"), "server"),
    **dict.fromkeys(("trl", "datasets", "accelerate"), "train"),
    "openai": "remote",
    "llama_cpp": "llama-cpp",
}
"""The extra that installs an optional module; `transformers` for all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to run a model. The fields are the arguments of `LLM`."""

    engine: str = "auto"
    adapter: str | None = "auto"
    dtype: str = "auto"
    device: str = "cpu"
    max_num_seqs: int = 8
    max_model_len: int | None = None
    compiled: bool = False
    trust_remote_code: bool = False

    def length(self, loaded: Loaded) -> int:
        return self.max_model_len or min(loaded.context_length, MAX_MODEL_LEN)


Opened: TypeAlias = "tuple[Loaded, Engine]"


def load(model: str, options: Options) -> Opened:
    """Loads a model and the engine that runs it.

    Raises RequestError for unknown or contradictory options, CapabilityError if the engine does not support the model
    or an option, ModelError if the model cannot be loaded.
    """
    gguf = model.endswith(".gguf")
    if problem := complaint(_option_checks(options, gguf)):
        raise RequestError(problem)
    name = _engine_name(options, gguf)
    if problem := complaint(_engine_checks(name, options, gguf)):
        raise CapabilityError(problem)
    try:
        return _LOADERS[name](model, options)
    except CapabilityError as error:
        fallback = _fallback(gguf)
        if options.engine != "auto" or name == fallback or options.dtype in _QUANTISED:
            raise
        log.warning("%s; %s runs it", error, fallback)
    return _LOADERS[fallback](model, options)


def _engine_name(options: Options, gguf: bool) -> str:
    if options.engine != "auto":
        return options.engine
    native = options.device == "cpu" and not options.compiled and options.dtype not in ("float16", "float64")
    return "native" if native else _fallback(gguf)


def _fallback(gguf: bool) -> str:
    return "llama.cpp" if gguf else "transformers"


def _option_checks(options: Options, gguf: bool) -> Iterator[tuple[bool, str]]:
    """(valid, message) of the options, for any engine."""
    yield options.engine in ENGINES, f"unknown engine {options.engine!r}: {', '.join(ENGINES)}"
    yield options.dtype in DTYPES, f"unknown dtype {options.dtype!r}: {', '.join(DTYPES)}"
    neither = options.adapter in ("auto", None) and options.dtype == "auto"
    yield not gguf or neither, "a GGUF file has its adapter merged and its weight type fixed: give neither"


def _engine_checks(engine: str, options: Options, gguf: bool) -> Iterator[tuple[bool, str]]:
    """(valid, message) of the options, for one engine."""
    if engine == "transformers":
        yield not gguf, "transformers does not run GGUF files: choose native or llama.cpp"
        yield options.dtype not in _QUANTISED, f"{options.dtype} is for the native engine, which runs on CPUs"
        return
    if engine == "native":
        yield (
            options.device == "cpu",
            f"the native engine runs on CPUs, not on {options.device}: change engine or device",
        )
        yield options.dtype != "float64", "the native engine has no float64: choose transformers for it"
    if engine == "llama.cpp":
        yield gguf, "llama.cpp runs GGUF files: make one with pasta export"
    yield not options.compiled, f"{engine} has no compiled=True: use it with the transformers engine"


# ------------------------------------------------------------------------------ one loader an engine of the registry


def _native(model: str, options: Options) -> Opened:
    from pastalm.engines.native import library
    from pastalm.engines.native.engine import NativeEngine
    from pastalm.engines.native.model import NativeModel
    from pastalm.models import packed_models

    library.library()  # fail before the slow packing if the library is missing
    try:
        if model.endswith(".gguf"):
            packed = packed_models.load_gguf(model)
        else:
            weights = _PACKED.get(options.dtype, packed_models.DEFAULT)
            packed = packed_models.load(model, adapter=options.adapter, weights=weights)
    except ModuleNotFoundError as error:
        if model.endswith(".gguf") and find_spec("llama_cpp"):
            raise CapabilityError(f"the native engine cannot pack {model}: {missing(error)}") from None
        raise ModelError(f"{model} is not packed for this CPU yet, which needs more once: {missing(error)}") from None
    engine = NativeEngine(
        NativeModel(packed.architecture, packed.tensors),
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.length(packed.loaded),
        cache_type="F32" if options.dtype == "float32" else "BF16",
    )
    return packed.loaded, engine


def _transformers(model: str, options: Options) -> Opened:
    from pastalm.engines.transformers.engine import TransformersEngine
    from pastalm.models import loading

    loaded = loading.load(
        model,
        adapter=options.adapter,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    engine = TransformersEngine(
        loaded.model,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.length(loaded),
        pack=True,
        compiled=options.compiled,
    )
    return loaded, engine


def _llama_cpp(model: str, options: Options) -> Opened:
    from pastalm.engines.llama_cpp import LlamaCppEngine
    from pastalm.models import gguf_files

    loaded = gguf_files.load(model, gpu_layers=0 if options.device == "cpu" else -1)
    engine = LlamaCppEngine(loaded.model, max_num_seqs=options.max_num_seqs, max_model_len=options.length(loaded))
    return loaded, engine


_LOADERS: Mapping[str, Callable[[str, Options], Opened]] = {
    "native": _native,
    "transformers": _transformers,
    "llama.cpp": _llama_cpp,
}


def missing(error: ModuleNotFoundError) -> str:
    """The error message for a module that is not installed: which extra installs it."""
    return f"{error.name} is missing: pip install 'pastalm[{_EXTRAS.get(error.name or '', 'transformers')}]'"
