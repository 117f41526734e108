"""What many tests share. No test asserts speed, so no random example has a deadline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from hypothesis import settings

from pastalm import models
from pastalm.errors import ModelError

with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401 - torch's compiler needs its distutils, and fails if Python's came first

settings.register_profile("pastalm", deadline=None)
settings.load_profile("pastalm")


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of a module's own, in which small models are packed; the embedded one's weights are in it."""
    folder = tmp_path_factory.mktemp("cache")
    with contextlib.suppress(ModelError):  # it cannot be had here: tests that need it say so
        (folder / models.EMBEDDED).symlink_to(models.pull())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PASTALM_CACHE", str(folder))
        yield
