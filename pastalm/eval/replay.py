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
from pastalm.engines.mask_rows import mask_row
from pastalm.engines.native.weights import Matrix, Tensors, unpack


@dataclass(frozen=True, slots=True)
class Chosen:
    """A sampled token.

    after: index in the row of the token before it.
    token: its id.
    allowed: ids that it was chosen from (None: all).
    """

    after: int
    token: int
    allowed: TokenSet | None = None


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One forward pass.

    ids: [n].
    chosen: the tokens to check.
    positions: [n] (None: 0 to n - 1).
    visible: [n, n], row sees column (None: causal).
    """

    ids: list[int]
    chosen: list[Chosen]
    positions: list[int] | None = None
    visible: NDArray[np.bool_] | None = None

    @classmethod
    def plain(cls, prompt: Sequence[int], tokens: Sequence[int], allowed: TokenSet | None = None) -> ForwardPass:
        """The pass for tokens that were sampled one after another, each from the same ids."""
        return cls([*prompt, *tokens], [Chosen(len(prompt) + i - 1, token, allowed) for i, token in enumerate(tokens)])


def replay(model: Any, prompt: Sequence[int], events: Iterable[Event], policy: Policy = "promised") -> list[float]:
    """The gap of each token that the model chose in a greedily decoded response (largest allowed logit minus its own).

    model: of transformers, with weights that are not packed.
    prompt: token ids.
    events: of the response.
    policy: position policy. `serial` needs a forward pass for each part of a thread between syncs, the others one.
    """
    events = list(events)
    rows = _serial_passes(prompt, events) if policy == "serial" else [_whole(prompt, events, policy)]
    return [gap for row in rows for gap in gaps(model, row)]


@torch.inference_mode()
def gaps(model: Any, row: ForwardPass) -> list[float]:
    """The gap of each chosen token of a forward pass: the largest allowed logit minus its own."""
    positions = None if row.positions is None else torch.tensor([row.positions])
    mask = None if row.visible is None else torch.from_numpy(row.visible)[None, None]
    logits = model(
        input_ids=torch.tensor([row.ids]), position_ids=positions, attention_mask=mask, use_cache=False
    ).logits[0]
    return [_gap(logits[chosen.after].float(), chosen) for chosen in row.chosen]


@torch.inference_mode()
def load_unpacked(model: Any, tensors: Tensors) -> None:
    """Copies the values of packed matrices into a transformers model like Llama, in place.

    The native engine is compared with it, on the same weights.
    """
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
"""The transformers modules whose rows a packed matrix of a layer contains, in order."""


def summary(gaps: Sequence[float]) -> str:
    """One line about many gaps."""
    parts = [f"{np.mean(np.array(gaps) <= limit):.4%} within {limit:g}" for limit in (0, 1e-3, 0.5)]
    return f"{len(gaps)} tokens replayed, {', '.join(parts)}; largest gap {max(gaps):.4g}"


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
            rows.append(mask_row(placed.sees, length))
            last[placed.path] = len(ids) - 1
    n = len(ids)
    return ForwardPass(ids, chosen, positions, np.stack(rows)[:, :n])


def _serial_passes(prompt: Sequence[int], events: Sequence[Event]) -> Iterator[ForwardPass]:
    allowed = {id(event): mask for event, mask in zip(events, _allowed(events), strict=True)}
    for context, own in decoded_rows(prompt, events):
        chosen = [
            Chosen(len(context) + i - 1, token, allowed[id(event)])
            for i, (token, event) in enumerate(own)
            if event is not None and not event.replaced
        ]
        yield ForwardPass([*context, *(token for token, _ in own)], chosen)


def _allowed(events: Sequence[Event]) -> list[TokenSet | None]:
    """For each event, the ids that its thread could choose from."""
    allowed_now: dict[Path, TokenSet | None] = {}
    allowed = []
    for event in events:
        allowed.append(allowed_now.get(event.path))
        allowed_now[event.path] = event.allowed
    return allowed


def decoded_rows(
    prompt: Sequence[int], events: Iterable[Event]
) -> Iterator[tuple[list[int], list[tuple[int, Decoded | None]]]]:
    """The causal rows of a response under `serial`, one for each part of a thread between syncs.

    Each is the tokens before that part, and its own tokens with their events (None: forced).
    """
    layout = SerialLayout(prompt)
    open_rows: dict[Path, tuple[list[int], list[tuple[int, Decoded | None]]]] = {}
    for event in events:
        if isinstance(event, Joined) and event.path in open_rows:
            yield open_rows.pop(event.path)
        layout.apply(event)
        if isinstance(event, Forked | Joined):
            open_rows[event.path] = (layout.row(event.path), [])
        elif isinstance(event, Decoded | Finished):
            own = open_rows[event.path][1]
            if isinstance(event, Decoded):
                own.append((event.token, event))
            own += [(token, None) for token in event.forced]
    yield from open_rows.values()
