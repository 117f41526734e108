"""Verbs of models: pull, export, env."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pastalm.cli.command import app, verb
from pastalm.cli.loading import adapter_of, fetch
from pastalm.cli.options import Adapter, AsJson, Model, TrustRemoteCode
from pastalm.cli.terminal import busy, print_json, quiet_libraries
from pastalm.engines import registry
from pastalm.models.downloads import EMBEDDED

PACKAGES = (
    "torch", "transformers", "peft", "gguf", "safetensors", "llama-cpp-python", "trl", "datasets", "openai",
)  # fmt: skip
"""Whose versions `pasta env` shows."""


@verb(app)
def pull(name: Annotated[str, typer.Argument(help="The embedded model or a hub name.")] = EMBEDDED) -> None:
    """Fetch a model's weights into the cache; prints their folder."""
    print(fetch(name))


@verb(app)
def export(
    target: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    kind: Annotated[
        str, typer.Option("--gguf", help="Weight type: F32, F16, BF16, Q8_0, Q6_K, Q4_K_M, Q4_0, …")
    ] = "F16",
    model: Model = EMBEDDED,
    adapter: Adapter = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a model and its adapter as one GGUF file, which llama.cpp runs."""
    from pastalm.models import gguf_files, loading

    quiet_libraries()
    with busy(f"loading {model}") as progress:
        loaded = loading.load(model, adapter=adapter_of(adapter), dtype="float32", trust_remote_code=trust_remote_code)
        path = gguf_files.export(loaded, target, kind.upper(), progress=progress)
    print(f"{path} ({path.stat().st_size / 1e6:.0f} MB)", file=sys.stderr)


@verb(app)
def env(as_json: AsJson = False) -> None:
    """What is installed here, what each engine supports, and which models are in the cache."""
    quiet_libraries()
    facts = _facts()
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            print(key)
            for name, detail in value.items():
                print(f"  {name:<22} {detail}")
        else:
            print(f"{key:<24} {value}")


def _facts() -> dict[str, Any]:
    import platform

    import pastalm

    return {
        "pastalm": pastalm.__version__,
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "bfloat16 on the CPU": _bfloat16(),
        "packages": {name: _version(name) for name in PACKAGES},
        "engines": registry.describe(),
        "models": _models(),
    }


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _bfloat16() -> str:
    from pastalm.models import dtypes

    try:
        return "yes" if dtypes.cpu_has_bfloat16() else "no: float32 is the default"
    except ModuleNotFoundError:
        return "unknown: torch is not installed"


def _models() -> dict[str, str]:
    """Models in the cache, and adapters that ship with the package."""
    from pastalm.models import adapters, downloads

    folder = downloads.cache_folder()
    lines = {path.parent.name: str(path.parent) for path in sorted(folder.glob("*/model.safetensors"))}
    lines.setdefault(EMBEDDED, "not fetched yet: pasta pull")
    for config in sorted(adapters.SHIPPED.glob("*/adapter_config.json")):
        lines[f"adapter for {config.parent.name}"] = "ships with the package"
    return lines
