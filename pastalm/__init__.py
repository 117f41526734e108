"""PASTA: language models that decode the independent parts of an answer at the same time.

The public names; everything else may change.
"""

from pastalm.engine import SamplingParams
from pastalm.errors import (
    CapabilityError,
    DataError,
    EngineError,
    LanguageError,
    ModelError,
    PastaError,
    RequestError,
)
from pastalm.interpreter import Limits
from pastalm.llm import LLM, CompletionOutput, RequestOutput
from pastalm.transcript import Transcript

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
