"""What a model knows of a prompt before it answers: whether one thread is right or the answer should fork.

    python runs/fork_probe.py TRAIN.jsonl LABELS.jsonl TEST.jsonl TEST_LABELS.jsonl --adapter ADAPTER

A logistic regression on the hidden state of a layer at a prompt's last token, fitted to the prompts of TRAIN that are
labelled `one` or `should`, for each of a few layers: the area under its curve on those of TEST, and the share of `one`
that it takes for `should` where it finds as many of `should` as are wanted. Teaching the decision can hardly do better.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pastalm.models import loading
from pastalm.models.chat_template import chat_prompt
from pastalm.models.loading import Loaded
from pastalm.records import labels, prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("train", "train_labels", "test", "test_labels"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--adapter", default="auto")
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 15, 20, 25, 30])
    parser.add_argument("--strength", type=float, default=0.01, help="inverse of the regularisation")
    parser.add_argument("--should", type=float, default=0.8, help="share of `should` that is to be found")
    parser.add_argument("--limit", type=int, help="prompts of each file, for a try")
    chosen = parser.parse_args()
    loaded = loading.load(adapter=chosen.adapter, dtype="bfloat16")
    fitted, known = states(loaded, chosen.train, chosen.train_labels, chosen.layers, chosen.limit)
    tested, true = states(loaded, chosen.test, chosen.test_labels, chosen.layers, chosen.limit)
    print(f"fitted to {len(known)} prompts, {known.sum()} `should`; tested on {len(true)}, {true.sum()} `should`")
    for i, layer in enumerate(chosen.layers):
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=chosen.strength, class_weight="balanced", max_iter=1000)
        )
        scores = model.fit(fitted[:, i], known).decision_function(tested[:, i])
        bound = np.quantile(scores[true], 1 - chosen.should, method="lower")
        print(
            f"layer {layer}: area {roc_auc_score(true, scores):.3f}, `one` at {chosen.should} of `should`: "
            f"{(scores[~true] >= bound).mean():.3f}"
        )


@torch.inference_mode()
def states(
    loaded: Loaded, file: Path, marks: Path, layers: list[int], limit: int | None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Hidden states [prompts, layers, width] behind the prompts of a file, and which of these should fork."""
    prompt_of = {prompt.id: prompt for prompt in prompts.read(file)}
    label_of = labels.read(marks, prompt_of)
    ids = [i for i in prompt_of if label_of.get(i, "may") != "may"][:limit]
    rows = []
    for identity in ids:
        tokens = chat_prompt(loaded, [{"role": "user", "content": prompt_of[identity].text}])[:1024]
        hidden = loaded.model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states
        rows.append(torch.stack([hidden[layer][0, -1].float() for layer in layers]).numpy())
    return np.stack(rows), np.array([label_of[i] == "should" for i in ids])


if __name__ == "__main__":
    main()
