"""The state of a training run in its folder: settings, checkpoints, log, and reference log-probabilities.

`config.json` records the settings, and the hashes of model, adapter and data (not their paths). A folder whose
`config.json` differs is rejected, or cleared with `overwrite`.
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
"""Files of a run other than config.json."""


def run_settings(config: RunConfig) -> dict[str, Any]:
    """All settings that affect the result, as in `config.json`. Raises DataError, ModelError."""
    settings = config.described()
    for key in settings:
        if isinstance(path := getattr(config, key), Path):
            settings[key] = contents.of_folder(path) if path.is_dir() else contents.of_file(path)
    return settings | {"model": contents.of_model(config.model)}


def claim(config: RunConfig) -> None:
    """Creates the run's folder, or checks that it has the same settings. Raises DataError if it belongs to another run
    or cannot be written; ModelError."""
    out, path = config.out, config.out / "config.json"
    settings = run_settings(config)
    if not config.overwrite:
        _check(path, settings)
    PartialState().wait_for_everyone()  # otherwise one process might read what another writes
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
                f"{path.parent} has {leftover.name} but no {path.name} that says what made it: use another --out"
            ) from None
        return
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise DataError(f"{path} is damaged: use another --out, or --overwrite to start again") from None
    changes = jsonl.differences(recorded, settings) if isinstance(recorded, dict) else ["it is not one of pastalm"]
    if changes:
        raise DataError(
            f"{path.parent} has a run with other settings ({'; '.join(changes)}): use another --out, or "
            "--overwrite to start again"
        )


def _left(out: Path) -> Iterator[Path]:
    """The files of a run in a folder."""
    for pattern in _OURS:
        yield from sorted(out.glob(pattern))


def _clear(path: Path) -> None:
    """Removes the files of an earlier run, its config.json last. Raises DataError if there is no config.json, since the
    files may then be someone else's."""
    leftovers = list(_left(path.parent))
    if leftovers and not path.is_file():
        raise DataError(
            f"{path.parent} has {leftovers[0].name} but no {path.name}, so nothing is deleted: use another --out"
        )
    for path_left in leftovers:
        shutil.rmtree(path_left) if path_left.is_dir() else path_left.unlink()
    path.unlink(missing_ok=True)


def newest(out: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    return next(filter(_is_whole, checkpoints), None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether the file that is written last is complete."""
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (OSError, ValueError):
        return False


def entries(log: Path) -> list[dict[str, Any]]:
    """The complete lines of a log."""
    parsed = []
    with contextlib.suppress(FileNotFoundError):
        for line in log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                parsed.append(json.loads(line))
    return parsed


def cut(log: Path, step: int) -> list[dict[str, Any]]:
    """Removes the entries of a log after a step; returns the others. Raises DataError."""
    remaining = [entry for entry in entries(log) if entry.get("step", 0) <= step]
    try:
        with disk.replacing(log) as file:
            file.writelines(json.dumps(entry).encode() + b"\n" for entry in remaining)
    except OSError as error:
        raise DataError(f"cannot write {log}: {error.strerror}") from None
    return remaining


# ------------------------------------------------------------------------------ reference log-probabilities

_NUMBERS = jsonl.Kind(command="train prefer", name="log-probabilities of a pair", fields=("pair", "log_probs"))


def digest(*packed: Packed) -> str:
    """A hash of packed sequences: tokens, positions, labels and attention masks."""
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
    """Numbers for each key, computed once and stored in `out/reference.jsonl`.

    A batch that is stored only in part is computed again as a whole, so a resumed run gives the same numbers as an
    uninterrupted one.

    config: the run.
    keys: a unique key an item.
    plan: batches of indices into `keys`.
    compute: the numbers of a batch.
    progress: called after each batch with the number of stored items.
    """
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
