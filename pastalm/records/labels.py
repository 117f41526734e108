"""Labels that say, for each prompt, whether a good answer forks: JSONL, `{id, label}` a line.

one: the answer needs one thread (a fact, a choice, one coherent text, steps that build on each other, a list of names).
may: it can be answered either way.
should: the answer has independent parts of a sentence or more.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from pastalm.errors import DataError
from pastalm.records import jsonl

Label: TypeAlias = Literal["one", "may", "should"]
LABELS: tuple[Label, ...] = get_args(Label)


def read(path: Path, prompts: Iterable[str]) -> dict[str, Label]:
    """The labels of some prompts, by id; prompts that the file does not label are left out.

    path: the file.
    prompts: ids of the prompts.

    Raises DataError for an invalid row or a duplicate id, or if none of the prompts is labelled.
    """
    names: dict[str, Label] = {label: label for label in LABELS}
    labels: dict[str, Label] = {}
    for where, row in jsonl.read(path):
        identity, name = jsonl.string(row, "id", where), jsonl.string(row, "label", where)
        if name not in names:
            raise DataError(f"{where}: unknown label {name!r}: use {', '.join(LABELS)}")
        if identity in labels:
            raise DataError(f"{where}: duplicate id {identity!r}; give each prompt one label")
        labels[identity] = names[name]
    selected = {identity: labels[identity] for identity in prompts if identity in labels}
    if not selected:
        raise DataError(f"{path} labels none of these prompts: give the labels of this file of prompts, by their ids")
    return selected
