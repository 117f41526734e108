"""An adapter plus what training changed in another: BASE + SHARE (AFTER - BEFORE), as plain PEFT.

    python runs/add_change.py BASE BEFORE AFTER OUT --rank 16 --share 0.4

The changes dW of each layer are added (task arithmetic: Ilharco et al., ICLR 2023) and cut to their largest singular
values; the rows of the tags are added as they are. BEFORE is the adapter that the run which made AFTER began with.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

A, B = ".lora_A.weight", ".lora_B.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("base", "before", "after", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--share", type=float, default=1.0, help="of the change that is added")
    chosen = parser.parse_args()
    share = chosen.share
    base, before, after = (_Adapter(folder) for folder in (chosen.base, chosen.before, chosen.after))
    signed = ((1.0, base), (-share, before), (share, after))
    out: dict[str, Tensor] = {}
    kept = total = 0.0
    for key in base.tensors:
        if key.endswith(B):
            continue
        if not key.endswith(A):
            out[key] = sum(s * one.tensors[key].float() for s, one in signed)
            continue
        layer = key.removesuffix(A)
        factors = [(s, *one.factors(layer)) for s, one in signed]
        u, values, v = _svd(
            torch.cat([s * b for s, b, _ in factors], dim=1), torch.cat([a for _, _, a in factors], dim=0)
        )
        total += float((values**2).sum())
        values = values[: chosen.rank]
        kept += float((values**2).sum())
        root = values.sqrt()
        out[layer + B] = u[:, : chosen.rank] * root / base.scale(layer)
        out[layer + A] = root[:, None] * v[: chosen.rank]
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "pasta.json"):
        shutil.copy(chosen.base / name, chosen.out / name)
    record = json.loads((chosen.base / "train.json").read_text())
    added = json.loads((chosen.after / "train.json").read_text())
    record |= {"stage": f"{record['stage']}, plus a change of {added['stage']}", "added": added, "share": share}
    (chosen.out / "train.json").write_text(json.dumps(record, indent=2) + "\n")
    save_file({k: v.contiguous().to(torch.bfloat16) for k, v in out.items()}, chosen.out / "adapter_model.safetensors")
    print(f"rank {chosen.rank} keeps {kept / total:.4f} of the squared change")


class _Adapter:
    def __init__(self, folder: Path) -> None:
        self.tensors = load_file(folder / "adapter_model.safetensors")
        self.config = json.loads((folder / "adapter_config.json").read_text())

    def scale(self, layer: str) -> float:
        """What PEFT multiplies B A with."""
        name = layer.removeprefix("base_model.model.")
        rank = (self.config.get("rank_pattern") or {}).get(name, self.config["r"])
        return float((self.config.get("alpha_pattern") or {}).get(name, self.config["lora_alpha"]) / rank)

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """B, times PEFT's scale, [out, r] and A [r, in] of a layer; of no rank if the adapter leaves it as it is."""
        a, b = self.tensors[layer + A].float(), self.tensors[layer + B].float()
        return b * self.scale(layer), a


def _svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of B A, by their small factors."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, values, vh = torch.linalg.svd(rb @ ra.T)
    return qb @ u, values, vh @ qa.T


if __name__ == "__main__":
    main()
