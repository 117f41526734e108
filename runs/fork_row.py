"""Fits an adapter's row of `<|promise|>` to labels that say which prompts ask for parts; nothing else is changed.

    python runs/fork_row.py ADAPTER OUT --samples ANSWERS.jsonl --labels LABELS.jsonl

With h the final hidden state at a place of the main thread, and m what the model thinks there (the logit of a promise
less the logsumexp of all others), the change d of the row minimises the logistic loss of m + d h: a first promise is
right where the label is not `one`, a later one wherever it was sampled, and what was not a promise stays so. ANSWERS
are what the adapter sampled (`pasta sample`). A quarter of the prompts is held out, and what the fit does to them is
printed; the fit that is kept uses all.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pastalm.models import loading
from pastalm.models.chat_template import encode_chat
from pastalm.models.logits import unwrapped
from pastalm.records import answers, labels
from pastalm.train.dataset import pack_sampled

LONGEST = 100
"""Tokens of the main thread that are looked at."""
NEAR = -5.0
"""Places where a promise is less likely than this, in nats, do not matter."""
ROW = "embed_tokens.token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, slots=True)
class Places:
    """n places of one answer. hidden [n, width], margin [n], promised [n] bool: what was sampled. right [n] bool: what
    is to be learnt. first: index of the first promise; None: the answer does not fork."""

    prompt: str
    label: str
    hidden: Tensor
    margin: Tensor
    promised: Tensor
    right: Tensor
    first: int | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=Path, nargs="+", required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--choices", type=int, default=3, help="answers to each prompt that are used")
    parser.add_argument("--decay", type=float, nargs="+", default=[0.01, 0.001], help="last: the one kept")
    parser.add_argument("--places", type=Path, help="file to keep the hidden states in, or to read them from")
    chosen = parser.parse_args()
    if chosen.places is not None and chosen.places.exists():
        places = [Places(**row) for row in torch.load(chosen.places)]
    else:
        places = _places(chosen.adapter, chosen.samples, chosen.labels, chosen.choices)
        if chosen.places is not None:
            torch.save([{name: getattr(p, name) for name in Places.__slots__} for p in places], chosen.places)
    ids = sorted({p.prompt for p in places})
    held = set(ids[::4])
    fitting, testing = [p for p in places if p.prompt not in held], [p for p in places if p.prompt in held]
    width = places[0].hidden.shape[1]
    print(f"before: {_summary(testing, torch.zeros(width))}")
    for decay in chosen.decay:
        change = _fit(fitting, decay)
        print(f"decay {decay}: held out {_summary(testing, change)}; fitted {_summary(fitting, change)}", flush=True)
    change = _fit(places, chosen.decay[-1])
    shutil.copytree(chosen.adapter, chosen.out, dirs_exist_ok=True)
    weights = load_file(chosen.out / "adapter_model.safetensors")
    key = next(key for key in weights if key.endswith(ROW))
    rows = weights[key].float()
    print(f"norm of the row {rows[0].norm():.3f}, of its change {change.norm():.3f}")
    rows[0] += change
    weights[key] = rows.to(weights[key].dtype)
    save_file(weights, chosen.out / "adapter_model.safetensors")
    if (record := chosen.out / "train.json").is_file():
        text = json.loads(record.read_text())
        size = sum(map(_size, places))
        text["fork_row"] = {
            "samples": [file.name for file in chosen.samples],
            "decay": chosen.decay[-1],
            "places": size,
        }
        record.write_text(json.dumps(text, indent=2) + "\n")


def _size(one: Places) -> int:
    return len(one.margin)


@torch.inference_mode()
def _places(adapter: Path, samples: list[Path], marks: Path, choices: int) -> list[Places]:
    loaded = loading.load(adapter=str(adapter), dtype="bfloat16")
    model: Any = unwrapped(loaded.model)
    tags = loaded.vocabulary.tags
    assert tags is not None
    rows = [row for file in samples for row in answers.read(file) if row.choice < choices]
    label_of = labels.read(marks, [row.id for row in rows])
    out = []
    for row in rows:
        if row.id not in label_of:
            continue
        prompt = encode_chat(loaded.tokenizer, loaded.vocabulary, [{"role": "user", "content": row.prompt}])
        packed, sampled = pack_sampled(prompt, row, loaded.vocabulary, "promised", eos=min(loaded.vocabulary.eos))
        if not sampled:
            continue
        ids = packed.input_ids.tolist()
        main_thread = next((i for i, path in enumerate(packed.paths) if path), len(ids))
        end = min(ids.index(tags.sync) if tags.sync in ids[:main_thread] else main_thread, len(prompt) + LONGEST)
        # up to its first sync a main thread sees nothing but itself
        hidden = model.model(
            input_ids=torch.tensor([ids[:end]]),
            position_ids=torch.from_numpy(packed.position_ids[:end])[None],
            use_cache=False,
        ).last_hidden_state[0, len(prompt) - 1 : end - 1]
        scores = model.lm_head(hidden).float()
        promise = scores[:, tags.promise].clone()
        scores[:, tags.promise] = -torch.inf
        margin = promise - scores.logsumexp(-1)
        promised = torch.tensor([token == tags.promise for token in ids[len(prompt) : end]])
        near = promised | (margin > NEAR)
        right = promised.clone()
        index = next((i for i, yes in enumerate(promised.tolist()) if yes), None)
        if index is not None and label_of[row.id] == "one":
            right[index] = False
        first = None if index is None else int(near[:index].sum())
        out.append(
            Places(row.id, label_of[row.id], hidden[near].float(), margin[near], promised[near], right[near], first)
        )
    return out


def _fit(places: list[Places], decay: float) -> Tensor:
    """The change of the row [width]. decay: of its squared norm, times the mean squared norm of a hidden state."""
    hidden = torch.cat([p.hidden for p in places]).clone()
    margin = torch.cat([p.margin for p in places]).clone()
    right = torch.cat([p.right for p in places]).float()
    size = float((hidden**2).sum(-1).mean())
    change = torch.zeros(hidden.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([change], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(margin + hidden @ change, right)
        loss = loss + decay * size * (change**2).sum() / 100
        loss.backward()
        return loss

    optimizer.step(closure)
    return change.detach()


def _summary(places: list[Places], change: Tensor) -> str:
    """By label, the share of first promises, and for the later ones, that are still likelier than not."""
    kept: dict[str, list[bool]] = {"one": [], "may": [], "should": [], "later": [], "others": []}
    for one in places:
        yes = (one.margin + one.hidden @ change > 0).tolist()
        for i, said in enumerate(one.promised.tolist()):
            kind = "others" if not said else one.label if i == one.first else "later"
            kept[kind].append(yes[i])
    return ", ".join(f"{kind} {sum(v) / max(1, len(v)):.2f} of {len(v)}" for kind, v in kept.items())


if __name__ == "__main__":
    main()
