"""What a model is by its contents: no other change counts, and none is missed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pastalm.errors import DataError, ModelError
from pastalm.models import contents

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Old enough that what it holds is remembered."""
    made = tmp_path / "run" / "adapter"
    made.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "pasta.json", "train.json", "README.md"):
        (made / name).write_bytes(name.encode() * 99)
        os.utime(made / name, (1e9, 1e9))
    return made


def test_an_adapter_is_what_it_says_not_where_it_lies(folder: Path, tmp_path: Path) -> None:
    told = contents.of_folder(folder)
    assert told["name"] == "run" and len(told["sha256"]) == 64
    shutil.copytree(folder, tmp_path / "other")
    assert contents.of_folder(tmp_path / "other") == {"name": "other", "sha256": told["sha256"]}
    for name in ("train.json", "README.md"):
        (folder / name).write_text("trained for another hour")
    assert contents.of_folder(folder) == told


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "pasta.json"])
def test_one_byte_is_another_adapter_whatever_the_clock_says(folder: Path, name: str) -> None:
    before = contents.of_folder(folder)
    assert contents.of_folder(folder) == before
    changed = bytearray((folder / name).read_bytes())
    changed[5] ^= 1
    (folder / name).write_bytes(changed)
    os.utime(folder / name, (1e9, 1e9))
    assert contents.of_folder(folder)["sha256"] != before["sha256"]


def test_what_was_read_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_SETTLED", -1.0)  # as if its files had lain there for long
    before = contents.of_folder(folder)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("it is read again"))
    assert contents.of_folder(folder) == before


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        contents.of_file(tmp_path / "none")
    with pytest.raises(ModelError, match="no model folder"):
        contents.of_model(str(tmp_path / "none"))
    with pytest.raises(ModelError, match="no adapter at"):
        contents.of_adapter("smollm2-135m-instruct", str(tmp_path))
    assert contents.of_adapter("smollm2-135m-instruct", None) is None
