"""Losses over packed sequences: log-probabilities of labelled tokens, and the losses of the three stages: a weighted
mean, BoNBoN, and that of the decision to fork."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pastalm.core.vocabulary import Tags, Vocabulary
from pastalm.models import logits
from pastalm.train.packing import IGNORED


def token_log_probs(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log p of each labelled token [m] and its row in the batch [m], in float32 (float64 for a float64 model). inputs:
    from `collate`."""
    labels = inputs["labels"][:, 1:]
    labelled = labels != IGNORED
    forward_inputs = {key: inputs[key] for key in ("input_ids", "position_ids")} | {
        "attention_mask": masks(model, inputs)
    }
    scores = logits.at(model, forward_inputs, torch.nn.functional.pad(labelled, (0, 1)))
    return -torch.nn.functional.cross_entropy(scores, labels[labelled], reduction="none"), labelled.nonzero()[:, 0]


def masks(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """The mask [B, 1, n, n] in the form that the model's attention needs: bool for sdpa, blocks for FlexAttention, else
    floats to add to the scores. A dict by layer type if some layers have a sliding window (by position)."""
    config = logits.unwrapped(model).config.get_text_config(decoder=True)
    visible, positions = inputs["attention_mask"], inputs["position_ids"]
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)

    def formed(mask: Tensor) -> Any:
        kind = config._attn_implementation
        if kind == "flex_attention":
            return _blocks(mask)
        return mask if kind == "sdpa" else _added(mask, _floats(model))

    if not window or kinds == {"full_attention"}:
        return formed(visible)
    near = (positions[:, None, :, None] - positions[:, None, None, :]) < window
    if "sliding_attention" not in kinds:
        return formed(visible & near)
    return {kind: formed(visible & near if kind == "sliding_attention" else visible) for kind in kinds}


def _floats(model: Any) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _blocks(mask: Tensor) -> Any:
    """The mask [B, 1, n, n] as FlexAttention's BlockMask, which skips blocks that are masked entirely."""
    from torch.nn.attention.flex_attention import create_block_mask

    visible, n = mask[:, 0], mask.shape[-1]
    return create_block_mask(lambda b, h, q, k: visible[b, q, k], len(mask), None, n, n, device=str(mask.device))


def log_probs(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """log p of each answer, summed over its labels, nats [B]."""
    each, rows = token_log_probs(model, inputs)
    return each.new_zeros(len(inputs["input_ids"])).index_add(0, rows, each)


def weighted_loss(
    model: Any,
    inputs: Mapping[str, Tensor],
    tags: Tags,
    tag_weight: float,
    average: Callable[[Tensor], Tensor] = lambda own: own,
    *,
    ends: Tensor | None = None,
    end_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted mean loss over labelled tokens, the loss of each [m], and whether each is a decision token [m].

    The loss is the negative log-likelihood; for rows marked `unlikely` it is the unlikelihood loss.

    model: of transformers.
    inputs: from `collate`.
    tags: ids of the tag tokens.
    tag_weight: weight of decision tokens: tags, and what follows a promise.
    average: averages a number over the processes that share a batch, so that the mean of their losses is the loss of
        the whole batch.
    ends: ids of the tokens that end a sentence.
    end_weight: weight of the tokens that follow one of `ends`; of two weights the larger one counts.
    """
    each, rows = token_log_probs(model, inputs)
    losses = torch.where(inputs["unlikely"][rows], unlikelihood(-each), -each)
    decision = decisions(inputs, tags)
    weights = torch.where(decision, tag_weight, 1.0)
    if ends is not None:
        weights = torch.where(_follows(inputs, ends), weights.clamp_min(end_weight), weights)
    return (losses * weights).sum() / average(weights.sum()), losses.detach(), decision


def sentence_ends(vocabulary: Vocabulary) -> Tensor:
    """The ids of the tokens that end a sentence. What follows one decides whether a chunk goes on."""
    marks = (b".", b"!", b"?")
    return torch.tensor([i for i in range(vocabulary.size) if vocabulary.piece(i)[-1:] in marks])


def _follows(inputs: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Whether each labelled token [m] stands right after one of some ids."""
    labelled = inputs["labels"][:, 1:] != IGNORED
    return torch.isin(inputs["input_ids"][:, :-1][labelled], ids.to(labelled.device))


def decisions(inputs: Mapping[str, Tensor], tags: Tags) -> Tensor:
    """Whether each labelled token [m] is a decision: a tag, or what follows a promise. inputs: from `collate`."""
    labels = inputs["labels"][:, 1:]
    labelled = labels != IGNORED
    ids = torch.tensor(tags, device=labels.device)
    return torch.isin(labels[labelled], ids) | (inputs["input_ids"][:, :-1][labelled] == tags.promise_end)


def unlikelihood(losses: Tensor) -> Tensor:
    """-log(1 - p) of tokens whose -log p is given (Welleck et al. 2020, equation 5)."""
    return -torch.log(-torch.expm1(-losses.clamp_min(1e-6)))


def fork_losses(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Stage 3's loss of each row [B]: the sum over its labels of -log p, or of -log(1 - p) in rows marked `unlikely`,
    times the row's weight. inputs: from `collate`, and weights [B]."""
    each, rows = token_log_probs(model, inputs)
    losses = torch.where(inputs["unlikely"][rows], unlikelihood(-each), -each)
    return losses.new_zeros(len(inputs["input_ids"])).index_add(0, rows, losses) * inputs["weights"]


def bonbon(policy: Tensor, reference: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """The BoNBoN loss of each pair [B] and its margin in nats [B] (PASTA section 5.3; Gui et al. 2024).

    policy: log p of y+ and y- [B, 2] under the model.
    reference: the same under p0.
    alpha: weight of the term that teaches y+ itself.
    beta: 1/beta is the target margin.
    """
    margin = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
    return -alpha * policy[:, 0] + (1 - alpha) * (margin - 1 / beta) ** 2, margin
