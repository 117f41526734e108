"""Loads the C library of the native engine and declares its interface (`src/pastalm.h`).

`library()` loads it once in a process. If that fails, it raises CapabilityError with the message of `unavailable()`.
The structures have the fields of the header in the same order. Pointers to arrays are plain addresses
(`array.ctypes.data`): the caller keeps the arrays alive, contiguous and of the header's type. Calls release the GIL.

PASTALM_LIBRARY is the path of another library to load, such as one built with a sanitizer.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from pastalm.errors import CapabilityError

ABI = 3
"""The version of the interface that this module declares (PASTALM_ABI)."""
PAGE = 16
WEIGHT_TYPES = {"Q4_0": 0, "Q8_0": 1, "BF16": 2, "F32": 3, "F16": 4}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}

_FOLDER = Path(__file__).parent
_REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir pastalm"


class Matrix(ctypes.Structure):
    """A packed matrix. `data` is an address."""

    _fields_ = [
        ("data", c_void_p),
        ("bytes", c_int64),
        ("type", c_int32),
        ("outputs", c_int32),
        ("inputs", c_int32),
    ]


class Vector(ctypes.Structure):
    """float32 values. A `count` of 0 means that the model has no such vector."""

    _fields_ = [("data", c_void_p), ("count", c_int64)]


class Layer(ctypes.Structure):
    """The weights of a layer, its rotary table and its attention window."""

    _fields_ = [
        ("qkv", Matrix),
        ("attention_out", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("input_norm", Vector),
        ("qkv_bias", Vector),
        ("attention_out_bias", Vector),
        ("q_norm", Vector),
        ("k_norm", Vector),
        ("attention_post_norm", Vector),
        ("mlp_norm", Vector),
        ("mlp_post_norm", Vector),
        ("rope", c_int32),
        ("window", c_int32),
    ]


class Rope(ctypes.Structure):
    """A rotary table."""

    _fields_ = [("inverse_frequencies", Vector), ("factor", c_float)]


class Config(ctypes.Structure):
    """A model without its layers."""

    _fields_ = [
        ("layers", c_int32),
        ("hidden", c_int32),
        ("intermediate", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("vocabulary", c_int32),
        ("ropes", c_int32),
        ("activation", c_int32),
        ("threads", c_int32),
        ("epsilon", c_float),
        ("embedding_scale", c_float),
        ("attention_scale", c_float),
        ("attention_softcap", c_float),
        ("logit_softcap", c_float),
        ("embedding", Matrix),
        ("head", Matrix),
        ("norm", Vector),
    ]


class Group(ctypes.Structure):
    """Tokens of one request in a step. `visible`, `order` and `share` are addresses."""

    _fields_ = [
        ("first", c_int32),
        ("count", c_int32),
        ("base", c_int32),
        ("pages", c_int32),
        ("visible", c_void_p),
        ("order", c_void_p),
        ("share", c_void_p),
    ]


STRUCTURES = {
    "pastalm_matrix": Matrix,
    "pastalm_vector": Vector,
    "pastalm_layer": Layer,
    "pastalm_rope": Rope,
    "pastalm_config": Config,
    "pastalm_group": Group,
}
"""The structures by their names in the header."""

SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "pastalm_abi": (c_int32, []),
    "pastalm_error": (c_char_p, []),
    "pastalm_kernels": (c_char_p, []),
    "pastalm_use_kernels": (c_int32, [c_char_p]),
    "pastalm_model_new": (c_void_p, [POINTER(Config), POINTER(Layer), POINTER(Rope)]),
    "pastalm_model_free": (None, [c_void_p]),
    "pastalm_pool_new": (c_void_p, [c_void_p, c_int64, c_int32]),
    "pastalm_pool_free": (None, [c_void_p]),
    "pastalm_pool_bytes": (c_int64, [c_void_p]),
    "pastalm_pool_copy": (c_int32, [c_void_p, c_int64, c_int64, c_int64]),
    "pastalm_pool_clear": (c_int32, [c_void_p, c_int64, c_int64]),
    "pastalm_step": (
        c_int32,
        [c_void_p, c_void_p, c_int32, c_void_p, c_void_p, c_void_p]
        + [c_int32, POINTER(Group), c_int32, c_void_p, c_void_p, c_void_p],
    ),
}
"""Result and argument types of each function in the header."""


def library() -> ctypes.CDLL:
    """The library. Raises CapabilityError if it cannot be loaded."""
    loaded = load()
    if loaded is None:
        raise CapabilityError(f"the native engine is not available: {unavailable()}")
    return loaded


def load() -> ctypes.CDLL | None:
    """The library; None if it cannot be loaded."""
    return _loaded()[0]


def unavailable() -> str:
    """Why the library cannot be loaded and what to do, in one line; "" if it is loaded."""
    return _loaded()[1]


def error() -> str:
    """The error message of the last failed call in this thread."""
    message: bytes = library().pastalm_error()
    return message.decode(errors="replace")


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    own_path = os.environ.get("PASTALM_LIBRARY")
    path = Path(own_path) if own_path else _FOLDER / "libpastalm.so"
    if not path.is_file():
        return None, f"PASTALM_LIBRARY is {path}, which is not a file" if own_path else _missing()
    try:
        loaded = ctypes.CDLL(str(path.resolve()))
        abi = loaded.pastalm_abi()
        if abi != ABI:
            return None, f"{path} has version {abi} of the interface, not {ABI}: {_again()}"
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as failure:
        return None, f"{path} cannot be loaded ({' '.join(str(failure).split())}): {_again()}"
    return loaded, ""


def _missing() -> str:
    """Why there is no library: the message of a failed build, or that none was run."""
    reason = _FOLDER / "not_built.txt"
    if not reason.is_file():
        return f"{_FOLDER / 'libpastalm.so'} is missing: {_again()}"
    message = " ".join(reason.read_text(encoding="utf-8").split())
    compiler = "apt-get install g++, then " if message.startswith("no C++ compiler") else ""
    return f"{message} when pastalm was installed: {compiler}{_again()}"


def _again() -> str:
    """The command that builds it: in a checkout, or with pip."""
    return "make native" if (_FOLDER / "src").is_dir() else _REINSTALL
