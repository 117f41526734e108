"""SHA-256 hashes of files and models, cached as long as a file's size and times stay the same.

Each file is read once (about a second for 2 GB). The hashes are stored in `packed/hashes.json` of the cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from pastalm.errors import DataError, ModelError
from pastalm.models import adapters, downloads
from pastalm.records import disk

PARTS = {".json", ".safetensors", ".bin", ".jinja", ".model", ".txt"}
"""Suffixes of files that belong to a model or an adapter."""
_RECORDS = {"train.json", "trainer_state.json"}
"""Files about the training, which do not change the model."""
_SETTLED = 2.0
"""Seconds after a change of a file in which a further change might not alter its time."""


def of_model(name: str) -> dict[str, str]:
    """{name, sha256} of a model: the embedded one, a hub name, a folder or a GGUF file. Raises ModelError."""
    path = Path(name) if name.endswith(".gguf") else downloads.pull(name)
    return _of(path, Path(name).name if Path(name).exists() else name)


def of_adapter(model: str, adapter: str | None) -> dict[str, str] | None:
    """{name, sha256} of the adapter that `loading.load` merges; None if there is none. Raises ModelError."""
    if model.endswith(".gguf"):
        return None  # its adapter is merged
    folder = adapters.adapter_folder(model, adapter)
    return None if folder is None else of_folder(folder)


def of_folder(folder: Path) -> dict[str, str]:
    """{name, sha256} of a folder with an adapter or a whole model. Raises ModelError."""
    return _of(folder, _name(folder))


def of_file(path: Path) -> dict[str, str]:
    """{name, sha256} of a file. Raises DataError."""
    try:
        return {"name": path.name, "sha256": _sha256(files(path))}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _name(folder: Path) -> str:
    """The name of a folder; that of the training run if the folder is inside one."""
    path = folder.resolve()
    return path.parent.name if path.name in ("adapter", "model") else path.name


def _of(path: Path, name: str) -> dict[str, str]:
    try:
        return {"name": name, "sha256": _sha256([entry for entry in files(path) if entry[0] not in _RECORDS])}
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None


def _sha256(entries: list[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def files(path: Path) -> list[tuple[str, str]]:
    """Names and hashes of a model's files in a folder, or of one file. Raises OSError."""
    if path.is_dir():
        paths = {f.name: f for f in sorted(path.iterdir()) if f.suffix in PARTS and f.is_file()}
    else:
        paths = {"": path}
    memory = downloads.cache_folder() / "packed" / "hashes.json"
    try:
        cache: dict[str, list[Any]] = json.loads(memory.read_text())
    except (OSError, ValueError):
        cache = {}
    before = dict(cache)
    hashed = [(name, _digest(file, cache)) for name, file in paths.items()]
    if cache != before:
        with contextlib.suppress(OSError), disk.replacing(memory) as opened:  # without it, files are hashed again
            opened.write(json.dumps(cache).encode())
    return hashed


def _digest(file: Path, cache: dict[str, list[Any]]) -> str:
    """The hash of a file's contents, from the cache if it is up to date; else computed and cached."""
    stat, key = file.stat(), str(file.resolve())
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    if cache.get(key, [])[:3] == state:
        return str(cache[key][3])
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    cache.pop(key, None)
    if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED:
        cache[key] = [*state, digest]
    return digest
