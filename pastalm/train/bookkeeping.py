"""Which run a folder holds, by contents: what was asked of it, how far it came, and what it has computed before.

`config.json` says what was asked: the settings, and of model, adapter and data what is in them, not where they lie. A
folder whose `config.json` says something else is refused, or cleared where `overwrite` is set.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from pastalm.errors import DataError
from pastalm.models import contents
from pastalm.records import disk, jsonl

if TYPE_CHECKING:
    from pastalm.train.packing import Packed
    from pastalm.train.run import RunConfig

_OURS = ("checkpoint-*", "adapter", "model", "log.jsonl", "loss.png", "reference.jsonl")
"""What a run leaves beside config.json."""


def run_settings(config: RunConfig) -> dict[str, Any]:
    """What decides what a run trains, as `config.json` has it. Raises DataError, ModelError."""
    settings = config.described()
    for key in settings:
        if isinstance(path := getattr(config, key), Path):
            settings[key] = contents.of_folder(path) if path.is_dir() else contents.of_file(path)
    return settings | {"model": contents.of_model(config.model)}


def claim(config: RunConfig) -> None:
    """Makes the folder, or finds it to be of the same run. Raises DataError where it is of another, or cannot be
    written; ModelError."""
    out, path = config.out, config.out / "config.json"
    settings = run_settings(config)
    if not config.overwrite:
        _check(path, settings)
    PartialState().wait_for_everyone()  # else one process might read what another writes
    try:
        if PartialState().is_main_process:
            out.mkdir(parents=True, exist_ok=True)
            if config.overwrite:
                _clear(path)
            with disk.replacing(path) as file:
                file.write((json.dumps(settings, indent=2) + "\n").encode())
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}") from None
    PartialState().wait_for_everyone()


def _check(path: Path, settings: dict[str, Any]) -> None:
    try:
        recorded = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        if leftover := next(_left(path.parent), None):
            raise DataError(
                f"{path.parent} holds {leftover.name} and no {path.name} that says what made it: use another --out"
            ) from None
        return
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise DataError(f"{path} is not whole: use another --out, or --overwrite to start anew") from None
    changes = jsonl.differences(recorded, settings) if isinstance(recorded, dict) else ["it is not one of pastalm"]
    if changes:
        raise DataError(
            f"{path.parent} holds a run of another configuration ({'; '.join(changes)}): use another --out, or "
            "--overwrite to start anew"
        )


def _left(out: Path) -> Iterator[Path]:
    """What a run has left in a folder."""
    for pattern in _OURS:
        yield from sorted(out.glob(pattern))


def _clear(path: Path) -> None:
    """Removes what an earlier run left, its configuration last. Raises DataError where nothing says that it is."""
    leftovers = list(_left(path.parent))
    if leftovers and not path.is_file():
        raise DataError(
            f"{path.parent} holds {leftovers[0].name} and no {path.name}, so it is left alone: use another --out"
        )
    for path_left in leftovers:
        shutil.rmtree(path_left) if path_left.is_dir() else path_left.unlink()
    path.unlink(missing_ok=True)


def newest(out: Path) -> Path | None:
    """The newest whole checkpoint, if there is one."""
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    return next(filter(_is_whole, checkpoints), None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether its last file was written to its end."""
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (OSError, ValueError):
        return False


def entries(log: Path) -> list[dict[str, Any]]:
    """The lines of a log that are whole."""
    parsed = []
    with contextlib.suppress(FileNotFoundError):
        for line in log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                parsed.append(json.loads(line))
    return parsed


def cut(log: Path, step: int) -> list[dict[str, Any]]:
    """The entries of a log up to a step, which alone are left in it. Raises DataError."""
    remaining = [entry for entry in entries(log) if entry.get("step", 0) <= step]
    try:
        with disk.replacing(log) as file:
            file.writelines(json.dumps(entry).encode() + b"\n" for entry in remaining)
    except OSError as error:
        raise DataError(f"cannot write {log}: {error.strerror}") from None
    return remaining


# ------------------------------------------------------------------------------ numbers that were computed before

_NUMBERS = jsonl.Kind(command="train prefer", name="log-probabilities of a pair", fields=("pair", "log_probs"))


def digest(*packed: Packed) -> str:
    """A hash of sequences as a model gets them: tokens, positions, labels and who sees whom."""
    hasher = hashlib.sha256()
    for one in packed:
        for field in fields(one):
            value = getattr(one, field.name)
            hasher.update(
                field.name.encode() + (value.tobytes() if hasattr(value, "tobytes") else repr(value).encode())
            )
    return hasher.hexdigest()


def remembered(
    config: RunConfig,
    keys: Sequence[str],
    plan: Sequence[Sequence[int]],
    compute: Callable[[Sequence[int]], Sequence[Sequence[float]]],
    progress: Callable[[int], None],
) -> list[list[float]]:
    """Numbers for each key, kept in `out/reference.jsonl` under it. plan: places in `keys` that are computed together;
    of a batch of which only some are there, all are computed again, in the same company, so that a run that was cut off
    comes to the same numbers. compute: the numbers of a batch. progress: is told how many are there after each."""
    settings = run_settings(config)
    results = jsonl.Results(
        config.out / "reference.jsonl", _NUMBERS, {key: settings[key] for key in ("model", "start", "full", "device")}
    )
    numbers = {str(row["pair"]): list(row["log_probs"]) for _, row in results.rows}
    PartialState().wait_for_everyone()
    with results if PartialState().is_main_process else contextlib.nullcontext() as file:
        for batch in plan:
            if any(keys[i] not in numbers for i in batch):
                for i, values in zip(batch, compute(batch), strict=True):
                    if keys[i] not in numbers:
                        numbers[keys[i]] = list(values)
                        if file is not None:
                            file.write({"pair": keys[i], "log_probs": list(values)})
            progress(len(numbers))
    return [numbers[key] for key in keys]
