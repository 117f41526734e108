"""Samples logits that are torch tensors, on their device, by the rules of `engines/sampling.py`.

On a CPU the rows are passed to `ArraySampler` without a copy. bfloat16 and float16 become float32 first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pastalm.core.events import TokenSet
from pastalm.core.params import SamplingParams
from pastalm.engines import sampling
from pastalm.engines.processors.base import ThreadProcessor
from pastalm.engines.processors.bias import Bias
from pastalm.engines.processors.chain import processed
from pastalm.engines.processors.penalty import RepetitionPenalty
from pastalm.engines.sampling import ArraySampler, Draw, Sampled
from pastalm.errors import PastaError

CANDIDATES = 1024
"""Number of largest logits that are considered first in truncated rows: nearly always enough, and much less to sort."""

_PLAIN = Draw(SamplingParams(temperature=0))
"""In place of a row that is lost."""

P = TypeVar("P", bound=ThreadProcessor)

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIXERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise, float64 [rows, ids], of keys [rows] and ids [1 or rows, ids], both int64.

    The same as `sampling.gumbel`. torch's integers are signed, so a logical shift needs a mask.
    """
    x = keys[:, None] + (ids + 1) * _GOLDEN
    for shift, mixer in zip((30, 27), _MIXERS, strict=True):
        x = (x ^ _shifted(x, shift)) * mixer
    uniform = (_shifted(x ^ _shifted(x, 31), 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class TensorSampler:
    """Samples rows of logits over `vocabulary_size` ids, on their device."""

    def __init__(self, vocabulary_size: int) -> None:
        self._size = vocabulary_size
        self._arrays = ArraySampler(vocabulary_size)
        self._masks: OrderedDict[tuple[TokenSet, torch.device], Tensor] = OrderedDict()

    def stack(self, rows: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(rows))

    def copy(self, row: Tensor) -> Tensor:
        return row.clone()

    def __call__(self, logits: Tensor, draws: Sequence[Draw]) -> list[Sampled]:
        raw = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        if raw.device.type == "cpu":
            return self._arrays(raw.detach().numpy(), draws)
        return self.on_device(raw, draws)

    def on_device(self, raw: Tensor, draws: Sequence[Draw]) -> list[Sampled]:
        """A token for each row, computed by torch."""
        shaped, lost = _shaped(raw, draws)
        lost |= {i: sampling.NOTHING_ALLOWED for i, d in enumerate(draws) if self._nothing_allowed(d.allowed)}
        if lost:
            draws = [_PLAIN if i in lost else draw for i, draw in enumerate(draws)]
        sampled = self._rows(raw, shaped, draws)
        return [Sampled(-1, lost=lost[i]) if i in lost else each for i, each in enumerate(sampled)]

    def _nothing_allowed(self, allowed: TokenSet | None) -> bool:
        if allowed is None or (allowed.inverted and len(allowed.ids) < self._size):
            return False
        inside = sum(0 <= token < self._size for token in allowed.ids)
        return inside == (self._size if allowed.inverted else 0)

    def _rows(self, raw: Tensor, shaped: Tensor, draws: Sequence[Draw]) -> list[Sampled]:
        """A token for each row. shaped: as the processors left the rows."""
        tokens = [0] * len(draws)
        if any(draw.params.greedy for draw in draws):
            tokens = shaped.argmax(-1).tolist()
        # a greedy row's largest logit is nearly always allowed: masks are made for the others only
        rest = [i for i, d in enumerate(draws) if not d.params.greedy or not _allows(d, tokens[i])]
        if rest:
            rows = shaped[torch.tensor(rest, device=raw.device)]
            for i, token in zip(rest, self._sampled(rows, [draws[i] for i in rest]), strict=True):
                tokens[i] = token
        return _collected(raw, tokens, draws)

    def _sampled(self, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
        """A token for each row, from its allowed ids."""
        logits = self._masked(logits, draws)
        tokens: list[int] = logits.argmax(-1).tolist()
        hot = [i for i, draw in enumerate(draws) if not draw.params.greedy]
        if hot:
            rows = logits[torch.tensor(hot, device=logits.device)]
            drawn = _drawn(rows, [draws[i] for i in hot]).tolist()
            for i, token in zip(hot, drawn, strict=True):
                tokens[i] = token
        return [sampling.admitted(t, d.allowed) for t, d in zip(tokens, draws, strict=True)]

    def _masked(self, logits: Tensor, draws: Sequence[Draw]) -> Tensor:
        if all(draw.allowed is None for draw in draws):
            return logits
        banned = torch.stack([self._banned(draw.allowed, logits.device) for draw in draws])
        return logits.masked_fill(banned, -torch.inf)

    def _banned(self, allowed: TokenSet | None, device: torch.device) -> Tensor:
        """[vocabulary] bool: the ids outside `allowed`."""
        allowed = allowed if allowed is not None else TokenSet(frozenset(), inverted=True)
        mask = self._masks.get((allowed, device))
        if mask is None:
            inside = [token for token in allowed.ids if 0 <= token < self._size]
            banned = np.full(self._size, not allowed.inverted)
            banned[inside] = allowed.inverted
            mask = self._masks[allowed, device] = torch.from_numpy(banned).to(device)
            if len(self._masks) > sampling.MASKS:
                self._masks.popitem(last=False)
        self._masks.move_to_end((allowed, device))
        return mask


def _allows(draw: Draw, token: int) -> bool:
    return draw.allowed is None or token in draw.allowed


def _shaped(raw: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, dict[int, str]]:
    """The logits as the processors leave them, and why rows are lost whose processors failed. A bias and a penalty that
    come first are applied to all rows at once on the device, the processors behind them row by row on the CPU."""
    left = [list(draw.processors) for draw in draws]
    logits = _biased(raw, _first(left, Bias))
    logits = _penalised(logits, _first(left, RepetitionPenalty))
    behind = [i for i, processors in enumerate(left) if processors]
    lost: dict[int, str] = {}
    if not behind:
        return logits, lost
    where = torch.tensor(behind, device=logits.device)
    rows = logits[where].detach().cpu().numpy()
    for n, i in enumerate(behind):
        try:
            rows[n] = processed(tuple(left[i]), draws[i].visible, rows[n])
        except PastaError as error:
            lost[i] = str(error)
    return logits.index_copy(0, where, torch.from_numpy(rows).to(logits.device)), lost


def _first(left: list[list[ThreadProcessor]], kind: type[P]) -> list[tuple[int, P]]:
    """Takes from each row the processor that is next, if it is of this kind; with the row's index."""
    return [(i, next_) for i, row in enumerate(left) if row and isinstance(next_ := row[0], kind) and row.pop(0)]


def _biased(logits: Tensor, biases: Sequence[tuple[int, Bias]]) -> Tensor:
    """Logits with what the biases of some rows add."""
    if not biases:
        return logits
    rows = np.repeat([i for i, _ in biases], [len(bias.ids) for _, bias in biases])
    ids = np.concatenate([bias.ids for _, bias in biases])
    added = np.concatenate([bias.added for _, bias in biases])
    where = torch.from_numpy(np.stack([rows, ids])).to(logits.device)
    return logits.index_put(
        (where[0], where[1]), torch.from_numpy(added).to(logits.device, logits.dtype), accumulate=True
    )


def _penalised(logits: Tensor, penalties: Sequence[tuple[int, RepetitionPenalty]]) -> Tensor:
    """Logits of seen ids divided (if positive) or multiplied by the penalty of their row."""
    if not penalties:
        return logits
    lengths = [len(penalty.ids) for _, penalty in penalties]
    ids = torch.from_numpy(np.concatenate([penalty.ids for _, penalty in penalties])).to(logits.device)
    owner = torch.from_numpy(np.repeat([i for i, _ in penalties], lengths)).to(logits.device)
    factors = np.repeat([penalty.penalty for _, penalty in penalties], lengths)
    factor = torch.from_numpy(factors).to(logits.device, logits.dtype)
    before = logits[owner, ids]
    return logits.index_put((owner, ids), torch.where(before > 0, before / factor, before * factor))


def _drawn(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """One id for each row, drawn by Gumbel-max from the truncated distribution; the largest where the temperature is
    so small that scaled logits are not finite."""
    hottest = torch.finfo(logits.dtype).max
    scaled = logits / logits.new_tensor([min(d.params.temperature, hottest) for d in draws])[:, None]
    tokens = logits.argmax(-1)
    for truncating in (False, True):
        rows = [i for i, d in enumerate(draws) if sampling.truncates(d.params) == truncating]
        if rows:
            where = torch.tensor(rows, device=logits.device)
            drawn = (_among_few if truncating else _among_all)(scaled[where], [draws[i] for i in rows])
            tokens[where] = drawn
    return torch.where(scaled.amax(-1).isfinite(), tokens, logits.argmax(-1))


def _among_all(scaled: Tensor, draws: Sequence[Draw]) -> Tensor:
    ids = torch.arange(scaled.shape[-1], device=scaled.device)[None]
    return (scaled.double() + gumbel(_keys(draws, scaled), ids)).argmax(-1)


def _among_few(scaled: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Considers the few largest logits, which nearly always suffice; sorts the other rows whole."""
    tokens, complete = _among_largest(scaled, draws, min(CANDIDATES, scaled.shape[-1]))
    rest = [i for i, whole in enumerate(complete.tolist()) if not whole]
    if rest:
        where = torch.tensor(rest, device=scaled.device)
        tokens[where], _ = _among_largest(scaled[where], [draws[i] for i in rest], scaled.shape[-1])
    return tokens


def _among_largest(scaled: Tensor, draws: Sequence[Draw], width: int) -> tuple[Tensor, Tensor]:
    """A token for each row, from what top-k, top-p and min-p leave of its `width` largest logits; and whether these
    include everything that they leave."""
    size = scaled.shape[-1]
    values, ids = _descending(scaled, width)
    likelihood = (values.double() - values[:, :1]).exp()
    tops = [min(d.params.top_k, size) if d.params.top_k > 0 else size for d in draws]
    top = torch.tensor(tops, device=scaled.device)[:, None]
    keep = torch.arange(width, device=scaled.device) < top
    total = torch.where(
        top < size,
        (likelihood * keep).sum(-1, keepdim=True),
        (scaled.double() - values[:, :1]).exp().sum(-1, keepdim=True),
    )
    share = total.new_tensor([d.params.top_p for d in draws])[:, None]
    before = torch.nn.functional.pad(likelihood.cumsum(-1)[:, :-1], (1, 0))
    keep &= (before < share * total) | (share == 1)
    floor = total.new_tensor([d.params.min_p for d in draws]).log()[:, None]
    keep &= values.double() >= values[:, :1].double() + floor
    # further logits may be as large as the last one
    complete = ~(keep & (values == values[:, -1:])).any(-1) & ((top <= width) | (top == size))[:, 0]
    scores = (values.double() + gumbel(_keys(draws, scaled), ids)).masked_fill(~keep, -torch.inf)
    return ids.gather(1, scores.argmax(-1, keepdim=True))[:, 0], complete


def _descending(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Each row's largest values and their ids, the largest first; of equal values the smaller id first."""
    if width == values.shape[-1]:
        ordered = values.sort(dim=-1, descending=True, stable=True)
        return ordered.values, ordered.indices
    ids = values.topk(width, sorted=False).indices.sort(-1).values
    ordered = values.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return ordered.values, ids.gather(1, ordered.indices)


def _keys(draws: Sequence[Draw], beside: Tensor) -> Tensor:
    return torch.tensor([d.key for d in draws], device=beside.device)


def _collected(raw: Tensor, tokens: Sequence[int], draws: Sequence[Draw]) -> list[Sampled]:
    """The sampled tokens, with log-probabilities for the rows that request them."""
    sampled = [Sampled(token) for token in tokens]
    requested = [i for i, draw in enumerate(draws) if draw.params.logprobs is not None]
    if not requested:
        return sampled
    rows = torch.tensor(requested, device=raw.device)
    logprobs = raw[rows].log_softmax(-1)
    own_ids = torch.tensor([tokens[i] for i in requested], device=raw.device)
    own = logprobs.gather(1, own_ids[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(max(draws[i].params.logprobs or 0 for i in requested))
    for i, logprob, top_ids, top in zip(requested, own, ids.tolist(), values.tolist(), strict=True):
        n = draws[i].params.logprobs
        pairs = tuple(zip(top_ids[:n], top[:n], strict=True))
        sampled[i] = Sampled(sampled[i].token, logprob, pairs)
    return sampled
