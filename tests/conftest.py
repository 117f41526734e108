"""What many tests share. No test asserts speed, so no random example has a deadline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pastalm.errors import ModelError
from pastalm.models import checkpoints, downloads, preparing

with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401 - torch's compiler needs its distutils, and fails if Python's came first

settings.register_profile("pastalm", deadline=None)
settings.load_profile("pastalm")


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of a module's own, in which small models are packed; the embedded one's weights are in it."""
    folder = tmp_path_factory.mktemp("cache")
    with contextlib.suppress(ModelError):  # it cannot be had here: tests that need it say so
        (folder / downloads.EMBEDDED).symlink_to(downloads.pull())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PASTALM_CACHE", str(folder))
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random model that was given the tag tokens: it forks at random."""
    from tests.test_models import byte_level, small_model  # torch, which most tests need not import

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_level()
    model = small_model(len(tokenizer))
    preparing.prepare(model, tokenizer)
    model.generation_config.eos_token_id = 1
    checkpoints.save(model, tokenizer, folder)
    return folder
