"""Checks a decoded answer against one plain forward pass of the model (SPEC "equal").

For each token, the gap between its logit and the largest allowed logit. For greedy decoding it must be 0, for any
schedule, engine or server; the tolerance is 1e-3 in float32 and 0.5 in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pastalm.core.events import Decoded, Event, Finished, Forked, Joined, Path, TokenSet
from pastalm.core.layout import Layout, Policy
from pastalm.engines.completions.serial import SerialLayout
from pastalm.engines.native.weights import Matrix, Tensors, unpack


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token that a model chose: after which place of its row, and among which ids (None: any)."""

    after: int
    token: int
    allowed: TokenSet | None = None


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One forward pass. ids, positions: [n]; visible: [n, n], row sees column (None: causal)."""

    ids: list[int]
    chosen: list[Chosen]
    positions: list[int] | None = None
    visible: NDArray[np.bool_] | None = None

    @classmethod
    def plain(cls, prompt: Sequence[int], tokens: Sequence[int], allowed: TokenSet | None = None) -> ForwardPass:
        """Tokens that were chosen one after another, each among the same ids."""
        return cls([*prompt, *tokens], [Chosen(len(prompt) + i - 1, token, allowed) for i, token in enumerate(tokens)])


def replay(model: Any, prompt: Sequence[int], events: Iterable[Event], policy: Policy = "promised") -> list[float]:
    """Of each token of a greedily decoded response that was the model's choice, the distance of its logit from the
    largest that was allowed. model: of transformers, not laid out for decoding. `serial` takes a pass a stretch, the
    others one in all."""
    events = list(events)
    rows = _stretches(prompt, events) if policy == "serial" else [_whole(prompt, events, policy)]
    return [gap for row in rows for gap in gaps(model, row)]


@torch.inference_mode()
def gaps(model: Any, row: ForwardPass) -> list[float]:
    """Of each token chosen in a row, in their order, the distance of its logit from the largest that was allowed."""
    positions = None if row.positions is None else torch.tensor([row.positions])
    mask = None if row.visible is None else torch.from_numpy(row.visible)[None, None]
    logits = model(
        input_ids=torch.tensor([row.ids]), position_ids=positions, attention_mask=mask, use_cache=False
    ).logits[0]
    return [_gap(logits[chosen.after].float(), chosen) for chosen in row.chosen]


@torch.inference_mode()
def load_unpacked(model: Any, tensors: Tensors) -> None:
    """Gives a transformers model of the Llama kind the matrices that packed ones stand for, in place: what the native
    engine computes is then to be compared with float activations over the same weights."""
    modules = dict(model.named_modules())
    whole = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Matrix):
            continue
        rows, (layer, _, part) = unpack(tensor), name.rpartition(".")
        if part in whole:
            targets = [whole[part]]
        else:
            targets = [modules[f"model.layers.{layer}.{inner}"] for inner in _INSIDE[part]]
        if part == "gate_up":
            rows = rows.reshape(-1, 2, 32, rows.shape[1]).swapaxes(0, 1).reshape(rows.shape)
        for target, own in zip(targets, np.split(rows, np.cumsum([len(t.weight) for t in targets])[:-1]), strict=True):
            target.weight.copy_(torch.from_numpy(own))


_INSIDE = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""transformers' modules that a packed matrix of a layer holds, in its order."""


def summary(gaps: Sequence[float]) -> str:
    """One line about many gaps."""
    parts = [f"{np.mean(np.array(gaps) <= limit):.4%} within {limit:g}" for limit in (0, 1e-3, 0.5)]
    return f"{len(gaps)} tokens replayed, {', '.join(parts)}; largest distance from the largest logit {max(gaps):.4g}"


def _gap(logits: torch.Tensor, chosen: Chosen) -> float:
    allowed_logits = logits
    if chosen.allowed is not None:
        inside = torch.zeros(len(logits), dtype=torch.bool)
        inside[list(chosen.allowed.ids)] = True
        allowed_logits = logits[~inside if chosen.allowed.inverted else inside]
    return float(allowed_logits.max() - logits[chosen.token])


def _whole(prompt: Sequence[int], events: Sequence[Event], policy: Policy) -> ForwardPass:
    length = len(prompt) + sum(isinstance(e, Decoded) + len(getattr(e, "forced", ())) for e in events)
    layout = Layout(len(prompt), length, policy)
    ids, positions = list(prompt), list(range(len(prompt)))
    rows = [np.arange(length) <= i for i in range(len(prompt))]
    last: dict[Path, int] = {(): len(prompt) - 1}
    chosen = []
    allowed = _allowed(events)
    for i, event in enumerate(events):
        if isinstance(event, Decoded) and not event.replaced:
            chosen.append(Chosen(last[event.path], event.token, allowed[i]))
        for placed in layout.apply(event):
            ids.append(placed.token)
            positions.append(placed.position)
            rows.append(placed.row)
            last[placed.path] = len(ids) - 1
    n = len(ids)
    return ForwardPass(ids, chosen, positions, np.stack(rows)[:, :n])


def _stretches(prompt: Sequence[int], events: Sequence[Event]) -> Iterator[ForwardPass]:
    allowed = {id(event): mask for event, mask in zip(events, _allowed(events), strict=True)}
    for context, own in decoded_rows(prompt, events):
        chosen = [
            Chosen(len(context) + i - 1, token, allowed[id(event)])
            for i, (token, event) in enumerate(own)
            if event is not None and not event.replaced
        ]
        yield ForwardPass([*context, *(token for token, _ in own)], chosen)


def _allowed(events: Sequence[Event]) -> list[TokenSet | None]:
    """Of each event, what its thread might say next before it."""
    now: dict[Path, TokenSet | None] = {}
    before = []
    for event in events:
        before.append(now.get(event.path))
        now[event.path] = event.allowed
    return before


def decoded_rows(
    prompt: Sequence[int], events: Iterable[Event]
) -> Iterator[tuple[list[int], list[tuple[int, Decoded | None]]]]:
    """Of a decoded response under `serial`, what each stretch of a thread between syncs read before it began, and its
    own tokens, each with the event that decoded it (None: it was forced): what a plain causal model must be asked to
    replay it."""
    layout = SerialLayout(prompt)
    begun: dict[Path, tuple[list[int], list[tuple[int, Decoded | None]]]] = {}
    for event in events:
        if isinstance(event, Joined) and event.path in begun:
            yield begun.pop(event.path)
        layout.apply(event)
        if isinstance(event, Forked | Joined):
            begun[event.path] = (layout.row(event.path), [])
        elif isinstance(event, Decoded | Finished):
            own = begun[event.path][1]
            if isinstance(event, Decoded):
                own.append((event.token, event))
            own += [(token, None) for token in event.forced]
    yield from begun.values()
