"""Makes an adapter smaller, and measures the effect.

    python runs/smaller_adapters.py make ORIGINAL:SMALLER… --megabytes 2.9
    python runs/smaller_adapters.py measure PROMPTS.jsonl NAME=ORIGINAL:SMALLER…

The result is plain PEFT: LoRA with a rank for each layer (`rank_pattern`), its factors in float8_e4m3fn, which PEFT
reads as float32. A layer keeps the directions of its change dW that matter most for the loss. With x the layer's inputs
and g the loss's gradients at its outputs, both measured on `own.jsonl.xz`, these are the largest singular values of
E[gg']^1/2 dW E[xx']^1/2 (Kronecker-factored Fisher information: Martens and Grosse, ICML 2015). The bytes are given to
the directions, of any layer, with the largest gain for each byte.
"""

from __future__ import annotations

import json
import lzma
import math
import random
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from pastalm import LLM, SamplingParams
from pastalm.core.language import Text
from pastalm.core.vocabulary import TAG_TOKENS
from pastalm.eval.intervals import mean
from pastalm.models import dtypes, loading
from pastalm.models.chat_template import encode_chat
from pastalm.models.loading import Loaded
from pastalm.records import answers, prompts
from pastalm.records.answers import Answer
from pastalm.records.documents import strip
from pastalm.train.dataset import collate, pack_sampled, read_annotated
from pastalm.train.loss import token_log_probs
from pastalm.train.packing import Packed, pack

OWN = Path(__file__).parent / "own.jsonl.xz"
STORED = torch.float8_e4m3fn
A, B = ".lora_A.weight", ".lora_B.weight"
DAMPING = 0.01
"""Of a second moment's mean diagonal, added to it: what the sample does not show is not worth nothing."""

app = typer.Typer(add_completion=False, help=__doc__)


@dataclass(slots=True)
class Moments:
    """Second moments of a layer's inputs [n, n] and of the loss's gradients at its outputs [m, m], summed."""

    inputs: Tensor
    gradients: Tensor


@dataclass(frozen=True, slots=True)
class Factored:
    """What an adapter adds to a layer's weights, b @ a with b [m, k] and a [k, n], and what of it matters. left [m, m],
    right [n, n]: the roots of its moments; rows [k, n]: its principal directions, the largest singular value first;
    values [k]: those."""

    b: Tensor
    a: Tensor
    left: Tensor
    right: Tensor
    rows: Tensor
    values: Tensor

    @property
    def entries(self) -> int:
        """Of both factors, for each direction."""
        return len(self.b) + self.a.shape[1]


@app.command()
def make(
    pairs: Annotated[list[str], typer.Argument(metavar="ORIGINAL:SMALLER…", help="folders")],
    megabytes: Annotated[float, typer.Option(help="of adapter_model.safetensors, at most; 1 MB is 10^6 bytes")] = 2.9,
    tokens: Annotated[int, typer.Option(help="to measure the layers on")] = 3_000,
) -> None:
    """Writes smaller adapters with the cards of the originals. Of several, what matters is measured on the
    first: adapters of one base model see nearly the same inputs."""
    folders = [tuple(map(Path, pair.split(":", 1))) for pair in pairs]
    moments = measured(loading.load(adapter=str(folders[0][0]), dtype="float32"), tokens)
    for source, out in folders:
        write(source, out, moments, int(megabytes * 1e6))


def write(source: Path, out: Path, moments: dict[str, Moments], size: int) -> None:
    """The smaller form of one adapter, of so many bytes at most, into a folder; prints a line about it."""
    tensors = load_file(source / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    if config["rank_pattern"] or config["alpha_pattern"]:
        raise typer.BadParameter(f"{source} is a smaller adapter already: give the one that was trained")
    layers = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    others = {name: value for name, value in tensors.items() if not name.endswith((A, B))}
    scaling = config["lora_alpha"] / config["r"]
    factored = {name: factor(scaling * tensors[name + B], tensors[name + A], moments[_module(name)]) for name in layers}
    header = 200 * len(tensors)  # of safetensors, a line a tensor
    left = size - header - sum(value.nbytes for value in others.values())
    ranks = allocated(factored, left)
    made: dict[str, Tensor] = dict(others)
    for name, rank in ranks.items():
        a, b = rounded(factored[name], rank)
        made[name + A], made[name + B] = a.contiguous(), b.contiguous()
    out.mkdir(parents=True, exist_ok=True)
    for card in ("pasta.json", "train.json"):
        (out / card).write_bytes((source / card).read_bytes())
    (out / "README.md").write_text(described((source / "README.md").read_text(), config["r"], ranks))
    usual = statistics.mode(ranks.values())
    config |= {"r": usual, "lora_alpha": 1}  # PEFT multiplies by lora_alpha and divides by the layer's rank
    config["rank_pattern"] = {_module(name): rank for name, rank in ranks.items() if rank != usual}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(made, out / "adapter_model.safetensors", metadata={"format": "pt"})
    lost = sum(missed(one, made[name + B].double() / ranks[name], made[name + A]) for name, one in factored.items())
    lost = math.sqrt(lost / sum(float(one.values.square().sum()) for one in factored.values()))
    written = (out / "adapter_model.safetensors").stat().st_size
    typer.echo(
        f"{out}: {written} bytes, ranks {min(ranks.values())} to {max(ranks.values())}, weighted error {lost:.3f}"
    )


def described(card: str, rank: int, ranks: dict[str, int]) -> str:
    """The card of the original, with how its smaller form is stored."""
    stored = f"stored at {min(ranks.values())} to {max(ranks.values())} in float8 by `runs/smaller_adapters.py`"
    return card.replace(f"LoRA (rank {rank}, all linear layers)", f"LoRA (all linear layers, rank {rank}, {stored})")


def _module(name: str) -> str:
    return name.removeprefix("base_model.model.")


def measured(loaded: Loaded, tokens: int) -> dict[str, Moments]:
    """The moments of all linear layers of the decoder over answers of `own.jsonl.xz`, at the tokens of the model's own
    choice (Fisher information takes what the model would say, not what the text says)."""
    wanted = {name: layer for name, layer in loaded.model.model.named_modules() if isinstance(layer, torch.nn.Linear)}
    found = {f"model.{name}": Moments(torch.zeros(layer.in_features, layer.in_features),
                                      torch.zeros(layer.out_features, layer.out_features))
             for name, layer in wanted.items()}  # fmt: skip
    for name, layer in wanted.items():
        _watch(layer, found[f"model.{name}"])
    loaded.model.get_input_embeddings().register_forward_hook(lambda _, __, embedded: embedded.requires_grad_())
    torch.manual_seed(0)
    for packed in _calibration(loaded, tokens):
        inputs = collate([packed])
        given = {key: inputs[key] for key in ("input_ids", "position_ids", "attention_mask")}
        logits = loaded.model(**given, use_cache=False).logits[0].float()
        said = torch.distributions.Categorical(logits=logits.detach()).sample()
        torch.nn.functional.cross_entropy(logits, said, reduction="sum").backward()
    return found


def _watch(layer: torch.nn.Linear, moments: Moments) -> None:
    def add(into: Tensor, rows: Tensor) -> None:
        flat = rows.detach().reshape(-1, rows.shape[-1])
        into.addmm_(flat.T, flat)

    def forward(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        add(moments.inputs, inputs[0])
        output.register_hook(lambda gradient: add(moments.gradients, gradient))

    layer.register_forward_hook(forward)


def _calibration(loaded: Loaded, tokens: int) -> Iterator[Packed]:
    """Answers as the adapter was trained on them: with tags, or in one piece."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file, lzma.open(OWN) as packed_rows:
        shutil.copyfileobj(packed_rows, file)
        file.flush()
        rows = [row for row in read_annotated(Path(file.name)) if row.tokens >= 40]
    random.Random(0).shuffle(rows)
    marker, seen = loaded.sequential_marker, 0
    for i, row in enumerate(rows):
        tagged = marker is not None and row.chunks > 0
        if marker is not None and not tagged and i % 3:  # those that fork are a third of all
            continue
        ids = encode_chat(loaded.tokenizer, loaded.vocabulary, [{"role": "user", "content": row.prompt}])
        document = row.document if tagged else (Text(strip(row.document)),)
        one = pack(ids, document, loaded.vocabulary, "promised", eos=min(loaded.vocabulary.eos))
        seen += len(one)
        yield one
        if seen >= tokens:
            return


def factor(b: Tensor, a: Tensor, moments: Moments) -> Factored:
    """The change b @ a of a layer, b [m, k], a [k, n], in its principal directions."""
    left, right = root(moments.gradients), root(moments.inputs)
    a, b = a.double(), b.double()
    v, s = torch.linalg.qr((a @ right).T)
    _, values, turned = torch.linalg.svd(torch.linalg.qr(left.T @ b, mode="r").R @ s.T)
    # the rows that, seen through `right`, are the principal directions
    rows = torch.linalg.solve_triangular(right, turned @ v.T, upper=False, left=False)
    return Factored(b, a, left, right, rows, values)


def root(moment: Tensor) -> Tensor:
    """The lower Cholesky factor of a second moment."""
    moment = moment.double()
    moment = moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.double)
    return torch.linalg.cholesky(moment)


def allocated(factored: dict[str, Factored], size: int) -> dict[str, int]:
    """The rank of each layer, one at least, so that the factors have so many entries in all."""
    ranks = dict.fromkeys(factored, 1)
    left = size - sum(one.entries for one in factored.values())
    worth = [(float(value) ** 2 / one.entries, name) for name, one in factored.items() for value in one.values[1:]]
    for _, name in sorted(worth, reverse=True):
        if (cost := factored[name].entries) <= left:
            ranks[name] += 1
            left -= cost
    return ranks


def rounded(one: Factored, rank: int) -> tuple[Tensor, Tensor]:
    """Factors A [rank, n] and B [m, rank] in the stored type, their product rank times the change: A is rounded
    first, B is then the best for that A, and the size of each direction is shared between both."""
    rows = one.rows[:rank]
    share = ((rank * _fitted(one, rows)).square().mean(0) / rows.square().mean(1)) ** 0.25
    a = (rows * share[:, None]).to(STORED)
    return a, (rank * _fitted(one, a.double())).to(STORED)


def _fitted(one: Factored, rows: Tensor) -> Tensor:
    """The columns [m, k] that make the most of given rows [k, n]: least squares as `right` weighs them."""
    return one.b @ torch.linalg.lstsq((rows @ one.right).T, (one.a @ one.right).T).solution.T


def missed(one: Factored, b: Tensor, a: Tensor) -> float:
    """How far b @ a is from the layer's change, squared, as the layer is weighed."""
    columns = one.left.T @ torch.cat([one.b, -b.double()], dim=1)
    rows = torch.cat([one.a, a.double()]) @ one.right
    # the norm of a product of thin factors is that of their triangles'
    triangles = torch.linalg.qr(columns, mode="r").R @ torch.linalg.qr(rows.T, mode="r").R.T
    return float(triangles.square().sum())


@app.command()
def measure(
    source: Annotated[Path, typer.Argument(help="prompts")],
    pairs: Annotated[list[str], typer.Argument(metavar="NAME=ORIGINAL:SMALLER…")],
    limit: int = 50,
    max_tokens: int = 512,
    dtype: Annotated[str, typer.Option(help="of the native engine's weights")] = "q8_0",
) -> None:
    """Prints a line for each adapter: greedy answers of the native engine to the same prompts, drawn at random; means
    with 95 % bootstrap intervals over prompts. difference: smaller less original, prompt by prompt. theoretical: tokens
    of the text, and its end, over the critical path. identical: answers that are the same text. perplexity: of the
    original's answers under each, teacher-forced."""
    asked = prompts.read(source)
    random.Random(0).shuffle(asked)
    typer.echo("| adapter | forks | theoretical | tokens | malformed | cut off | identical | perplexity |")
    typer.echo("| --- " * 8 + "|")
    for pair in pairs:
        name, _, folders = pair.partition("=")
        original, _, smaller = folders.partition(":")
        rows = [_answered(folder, asked[:limit], max_tokens, dtype) for folder in (original, smaller)]
        losses = [_losses(folder, rows[0]) for folder in (original, smaller)]
        same = mean([float(a.text == b.text) for a, b in zip(*rows, strict=True)])
        for label, own, lost in zip((name, f"{name}, smaller"), rows, losses, strict=True):
            typer.echo(f"| {label} | {' | '.join(_cells(own))} | {same.mean:.2f} | {math.exp(lost):.3f} |")
        forks = mean([float(bool(b.chunks)) - float(bool(a.chunks)) for a, b in zip(*rows, strict=True)])
        speed = mean([_theoretical(b) / _theoretical(a) for a, b in zip(*rows, strict=True)], "geometric")
        typer.echo(f"| {name}, difference | {forks} | times {speed} | | | | | {losses[1] - losses[0]:+.3f} nats |")


@dataclass(frozen=True, slots=True)
class Row:
    """One answer: `text_tokens` with the end, as one sequence would decode it."""

    answer: Answer
    text_tokens: int

    @property
    def text(self) -> str:
        return self.answer.text

    @property
    def chunks(self) -> tuple[str, ...]:
        return self.answer.chunks


def _answered(adapter: str, asked: list[prompts.Prompt], max_tokens: int, dtype: str) -> list[Row]:
    llm = LLM(engine="native", adapter=adapter, dtype=dtype, max_num_seqs=16)
    whole = llm.loaded.sequential_marker is None  # it was trained without tags
    params = SamplingParams(temperature=0, max_tokens=max_tokens, parallelism=0 if whole else 1)
    outputs = llm.chat([[{"role": "user", "content": prompt.text}] for prompt in asked], params)
    found = [output.outputs[0].transcript for output in outputs]
    return [
        Row(
            answers.to(prompt, sequential=whole, **answers.figures(said), **answers.sampled(said)),
            len(llm.loaded.vocabulary.encode(said.text)) + 1,
        )
        for prompt, said in zip(asked, found, strict=True)
    ]


def _losses(adapter: str, rows: list[Row]) -> float:
    """Nats a token of answers, teacher-forced."""
    loaded = loading.load(adapter=adapter, dtype=dtypes.throughput_dtype("cpu"))
    total, tokens, eos = 0.0, 0, min(loaded.vocabulary.eos)
    for answer in (row.answer for row in rows):
        ids = encode_chat(loaded.tokenizer, loaded.vocabulary, [{"role": "user", "content": answer.prompt}])
        packed, _ = pack_sampled(ids, answer, loaded.vocabulary, "promised", eos=eos)
        with torch.inference_mode():
            likelihoods, _ = token_log_probs(loaded.model, collate([packed]))
        total -= float(likelihoods.sum())
        tokens += len(likelihoods)
    return total / tokens


def _theoretical(row: Row) -> float:
    return row.text_tokens / row.answer.critical_path


def _cells(rows: list[Row]) -> list[str]:
    malformed = [any(tag in row.text for tag in TAG_TOKENS.values()) for row in rows]
    cut = [row.answer.finish_reason == "length" for row in rows]
    return [
        str(mean([float(bool(row.chunks)) for row in rows])),
        str(mean([_theoretical(row) for row in rows], "geometric")),
        f"{mean([row.answer.tokens for row in rows]).mean:.0f}",
        f"{mean(malformed).mean:.2f}",
        f"{mean(cut).mean:.2f}",
    ]


if __name__ == "__main__":
    app()
