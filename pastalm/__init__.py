"""PASTA: language models that decode the independent parts of an answer at the same time.

The public names; everything else may change.
"""

from pastalm.core.interpreter import Limits
from pastalm.core.params import SamplingParams
from pastalm.core.transcript import Transcript
from pastalm.errors import (
    CapabilityError,
    DataError,
    EngineError,
    LanguageError,
    ModelError,
    PastaError,
    RequestError,
)
from pastalm.llm import LLM, CompletionOutput, RequestOutput

__all__ = [
    "LLM",
    "CapabilityError",
    "CompletionOutput",
    "DataError",
    "EngineError",
    "LanguageError",
    "Limits",
    "ModelError",
    "PastaError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "Transcript",
]
__version__ = "0.1.0"
