"""A run that was broken off ends as one that was not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pastalm.train import run


def assert_resumes(
    train: Callable[..., Path], config: Any, out: Path, monkeypatch: pytest.MonkeyPatch, *, places: int = 7
) -> None:
    """Of a run in `config.out` and one in `out` that is broken off at its first checkpoint and started again.
    places: binary ones in which they agree; bfloat16, in which adapters are saved, has eight."""
    whole = load_file(train(config, str) / "adapter_model.safetensors")
    again = replace(config, out=out)

    def broken_off(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.Log, "on_save", broken_off)
        with pytest.raises(KeyboardInterrupt):
            train(again, str)
    resumed = load_file(train(again, str) / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    apart = {name: float((whole[name].float() - resumed[name].float()).abs().max()) for name in whole}
    worst = max(float(x.float().abs().max()) for x in whole.values()) * 2**-places
    assert max(apart.values()) <= worst, apart
