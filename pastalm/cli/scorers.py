"""Scorers by name, with the options that they are made from. A new scorer is one entry of `SCORERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pastalm.cli.loading import adapter_of, large_model, model_header
from pastalm.cli.options import LargeModelOptions
from pastalm.errors import RequestError

if TYPE_CHECKING:
    from pastalm.eval.quality import Scorer
    from pastalm.records.chat_client import ChatClient


@dataclass(frozen=True)
class ScorerOptions:
    """What scorers are made from.

    model, adapter: the frozen model of pmi.
    judge: name of the large model that judges, at `server`.
    device: where pmi's model runs.
    trust_remote_code: run Python code that comes with pmi's model.
    """

    model: str
    adapter: str
    judge: str | None
    device: str
    server: LargeModelOptions
    trust_remote_code: bool = False

    @cached_property
    def client(self) -> ChatClient[Any]:
        """The client of the judge's server. Raises RequestError."""
        return large_model(self.judge, self.server)

    def usage(self) -> str:
        """The judge's cost so far, to append to a progress line; "" without a judge."""
        client = vars(self).get("client")
        return "" if client is None else f"; {client.usage}"


def _pmi(options: ScorerOptions) -> Scorer:
    from pastalm.eval.quality import PmiScorer
    from pastalm.models import dtypes, loading

    dtype = dtypes.throughput_dtype(options.device)
    adapter = adapter_of(options.adapter)
    return PmiScorer(
        loading.load(
            options.model,
            adapter=adapter,
            dtype=dtype,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
    )


def _reference(options: ScorerOptions) -> Scorer:
    from pastalm.eval.quality import ReferenceScorer

    return ReferenceScorer()


def _judge(options: ScorerOptions) -> Scorer:
    from pastalm.eval.quality import Judge

    return Judge(options.client)


@dataclass(frozen=True, slots=True)
class ScorerEntry:
    """A scorer of the command line.

    make: creates it.
    header: its entries in the header of a file of scores.
    """

    make: Callable[[ScorerOptions], Scorer]
    header: Callable[[ScorerOptions], dict[str, Any]]


SCORERS: Mapping[str, ScorerEntry] = {
    "pmi": ScorerEntry(_pmi, lambda o: model_header(o.model, o.adapter) | {"device": o.device}),
    "reference": ScorerEntry(_reference, lambda _: {}),
    "judge": ScorerEntry(_judge, lambda o: {"judge": o.judge}),
}


def scorer_header(name: str, options: ScorerOptions) -> dict[str, Any]:
    """A scorer's entries in the header of a file of scores. Raises RequestError for an unknown name."""
    if name not in SCORERS:
        *others, last = SCORERS
        raise RequestError(f"unknown scorer {name!r}: use {', '.join(others)} or {last}")
    return SCORERS[name].header(options)
