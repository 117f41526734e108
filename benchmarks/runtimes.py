"""A step of 1 to 16 threads on other runtimes and weight types: what could be faster than the engines here.

    pip install openvino nncf onnxruntime onnx onnxscript     # those that are missing are left out
    python benchmarks/runtimes.py --gguf q4_0.gguf --gguf q8_0.gguf

One forward of q tokens after 512, as a step of q threads is; medians of some tens. `linear layers` are
the products with weights alone, as many and as large as the embedded model's, from random weights. On
OpenVINO and ONNX Runtime the model is a graph whose inputs are the cache's keys and values and whose
outputs are those of the new tokens. Nothing here is used by the engines: it says what they might use.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forkjoin import LlamaCpp, Plan
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from pastalm.models import downloads, loading

TOKENS = (1, 2, 4, 8, 16)
PREFIX = 512
Row = tuple[str, list[float], str]


def timed(call: Callable[..., Any], *args: Any) -> float:
    """Milliseconds of call(*args), median without the first calls."""
    seconds = []
    for _ in range(25):
        start = time.perf_counter()
        call(*args)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[3:])


# ------------------------------------------------------------------------------ linear layers

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
LAYERS, HEAD = 30, (49152, 576)


def _products(product: Callable[..., Any], xs: list[torch.Tensor], weights: list[Any]) -> None:
    for x, w in zip(xs, weights, strict=True):
        product(x, w)


def linears() -> Iterator[Row]:
    """The products of a step, by what holds the weights."""
    mkldnn, functional = torch.ops.mkldnn, torch.nn.functional

    def int8(w: torch.Tensor) -> Any:
        scale = w.abs().amax(1) / 127
        return (w / scale[:, None]).round().to(torch.int8), scale.bfloat16()

    def int4(w: torch.Tensor) -> Any:
        ids = torch.randint(0, 16, w.shape, dtype=torch.int32)
        scales = torch.rand(w.shape[1] // 32, w.shape[0], 2, dtype=torch.bfloat16)
        return torch._convert_weight_to_int4pack_for_cpu(ids, 1), scales

    def dynamic(w: torch.Tensor) -> Any:
        ids, scale = int8(w)
        packed = torch.ops.onednn.qlinear_prepack(ids, [4, w.shape[1]])
        return packed, scale.float(), torch.zeros(w.shape[0], dtype=torch.long)

    def quantised(x: torch.Tensor, w: Any) -> Any:
        scale = x.abs().max().item() / 127
        ids = (x / scale + 128).round().to(torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(ids, scale, 128, *w, None, 1.0, 0, torch.bfloat16, "none", [], "")

    kinds: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "bfloat16, plain": (lambda w: w.bfloat16(), functional.linear),
        "bfloat16, packed (ours)": (
            lambda w: mkldnn._reorder_linear_weight(w.bfloat16(), 4),
            lambda x, w: mkldnn._linear_pointwise(x, w, None, "none", [], ""),
        ),
        "int8, torch._weight_int8pack_mm": (int8, lambda x, w: torch._weight_int8pack_mm(x, *w)),
        "int4, torch._weight_int4pack_mm_for_cpu": (
            int4,
            lambda x, w: torch._weight_int4pack_mm_for_cpu(x, w[0], 32, w[1]),
        ),
        "int8 by int8, oneDNN": (dynamic, quantised),
    }
    for name, (make, product) in kinds.items():
        shapes = [*SHAPES * LAYERS, HEAD]
        weights = [make(0.02 * torch.randn(*shape)) for shape in shapes]
        row: list[float] = []
        for q in TOKENS:
            xs = {n: torch.randn(q, n, dtype=torch.bfloat16) for n in (576, 1536)}
            with torch.inference_mode():
                row.append(timed(_products, product, [xs[n] for _, n in shapes], weights))
        yield f"linear layers: {name}", row, ""


# ------------------------------------------------------------------------------ the model as a graph


class _NewLayer(CacheLayerMixin):  # type: ignore[no-untyped-call,misc]
    """Keeps the new keys and values of a forward."""

    is_sliding = False

    def lazy_initialization(self, *_: Any) -> None:
        self.is_initialized = True

    def update(self, key: Any, value: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.keys, self.values = key, value
        return key, value

    def get_mask_sizes(self, _: int) -> tuple[int, int]:
        return 0, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def _attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    scaling: float,
    pasts: Any = (),
    **_: Any,
) -> tuple[Any, None]:
    key = torch.cat([pasts[2 * module.layer_idx], key], 2)
    value = torch.cat([pasts[2 * module.layer_idx + 1], value], 2)
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    folded = query.reshape(1, key.shape[1], -1, query.shape[3])
    out = torch.nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=mask.repeat(1, 1, groups, 1), scale=scaling
    )
    return out.reshape(1, heads, -1, query.shape[3]).transpose(1, 2).contiguous(), None


class Graph(torch.nn.Module):  # type: ignore[misc]
    """(ids, positions, mask, cached keys and values) -> (logits, new keys and values)."""

    def __init__(self) -> None:
        super().__init__()
        AttentionInterface.register("graph", _attention)
        AttentionMaskInterface.register("graph", sdpa_mask)
        self.model = loading.load(downloads.EMBEDDED, dtype="float32").model.eval()
        self.config = self.model.config
        self.config._attn_implementation = "graph"

    def forward(self, ids: Any, positions: Any, mask: Any, *pasts: Any) -> Any:
        cache = Cache(layers=[_NewLayer() for _ in range(self.config.num_hidden_layers)])
        out = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            pasts=pasts,
        )
        return (out.logits, *(x for layer in cache.layers for x in (layer.keys, layer.values)))

    def inputs(self, q: int) -> list[torch.Tensor]:
        """Of a step of q tokens after PREFIX; the cache is the model's own of some prompt."""
        heads, head_dim = (
            self.config.num_key_value_heads,
            self.config.hidden_size // self.config.num_attention_heads,
        )
        empty = [torch.zeros(1, heads, 0, head_dim)] * (2 * self.config.num_hidden_layers)
        prompt = torch.tensor([Plan(PREFIX).prompt()])
        positions = torch.arange(PREFIX)[None]
        causal = torch.full((PREFIX, PREFIX), -torch.inf).triu(1)[None, None]
        with torch.inference_mode():
            _, *pasts = self(prompt, positions, causal, *empty)
        mask = torch.zeros(1, 1, q, PREFIX + q)
        mask[0, 0, :, PREFIX:].fill_(-torch.inf).fill_diagonal_(0)
        cached = [past.contiguous() for past in pasts]
        return [torch.arange(300, 300 + q)[None], torch.full((1, q), PREFIX), mask, *cached]


def _agreement(graph: Graph, feeds: list[torch.Tensor], logits: Any) -> str:
    with torch.inference_mode():
        want = graph(*feeds)[0]
    return f"logits off by {float((torch.as_tensor(np.asarray(logits)) - want).abs().max()):.2f}"


def _steps(
    graph: Graph, feeds: dict[int, list[torch.Tensor]], infer: Callable[[list[Any]], Any]
) -> tuple[list[float], str]:
    """Milliseconds by q, and how far the logits of the last are off; infer: arrays in, outputs out."""
    row, agreement = [], ""
    for q in TOKENS:
        arrays = [x.numpy() for x in feeds[q]]
        row.append(timed(infer, arrays))
        agreement = _agreement(graph, feeds[q], infer(arrays)[0])
    return row, agreement


def _run_session(session: Any, arrays: list[Any]) -> Any:
    names = (x.name for x in session.get_inputs())
    return session.run(None, dict(zip(names, arrays, strict=True)))


def openvino() -> Iterator[Row]:
    try:
        import nncf
        import openvino as ov
    except ModuleNotFoundError as error:
        print(f"left out: {error.name} is not installed")
        return
    graph = Graph()
    feeds = {q: graph.inputs(q) for q in TOKENS}
    with torch.no_grad():
        whole = ov.convert_model(graph, example_input=tuple(x.clone() for x in feeds[4]))
    shape = [
        1,
        graph.config.num_key_value_heads,
        -1,
        graph.config.hidden_size // graph.config.num_attention_heads,
    ]
    shapes = [[1, -1], [1, -1], [1, 1, -1, -1], *[shape] * (len(feeds[1]) - 3)]
    whole.reshape({i: ov.PartialShape(s) for i, s in enumerate(shapes)})
    modes = nncf.CompressWeightsMode
    kinds = {
        "float32": (None, {}, "f32"),
        "bfloat16": (None, {}, "bf16"),
        "int8 weights": (modes.INT8_SYM, {}, "f32"),
        "int4 weights": (modes.INT4_SYM, {"group_size": 64, "ratio": 1.0}, "f32"),
    }
    for name, (mode, options, hint) in kinds.items():
        model = nncf.compress_weights(whole.clone(), mode=mode, **options) if mode else whole
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": os.cpu_count(),
            "INFERENCE_PRECISION_HINT": hint,
        }
        if mode:
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 64
        request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
        infer = partial(request.infer, share_inputs=True, share_outputs=True)
        yield f"OpenVINO: {name}", *_steps(graph, feeds, infer)


def onnx() -> Iterator[Row]:
    try:
        import onnx
        import onnxruntime
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    except ModuleNotFoundError as error:
        print(f"left out: {error.name} is not installed")
        return
    graph = Graph()
    feeds = {q: graph.inputs(q) for q in TOKENS}
    tokens, past = (
        torch.export.Dim("tokens", min=1, max=64),
        torch.export.Dim("past", min=2, max=4096),
    )
    wide = torch.export.Dim("wide", min=2, max=4160)
    shapes = (
        {1: tokens},
        {1: tokens},
        {2: tokens, 3: wide},
        tuple({2: past} for _ in feeds[4][3:]),
    )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            graph,
            tuple(feeds[4]),
            path,
            dynamo=True,
            dynamic_shapes=shapes,
            external_data=True,
            verbose=False,
        )
        four = Path(folder) / "four.onnx"
        quantizer = MatMulNBitsQuantizer(onnx.load(path), block_size=32, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(str(four), use_external_data_format=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = os.cpu_count() or 1
        for name, file in (("float32", path), ("int4 weights, int8 products", four)):
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            yield f"ONNX Runtime: {name}", *_steps(graph, feeds, partial(_run_session, session))


# ------------------------------------------------------------------------------ llama.cpp


def gguf(paths: list[Path]) -> Iterator[Row]:
    for path in paths:
        for flash in (False, True):
            system = LlamaCpp(path, PREFIX + 2 * max(TOKENS) * 64, flash=flash)
            row: list[float] = [1e3 * statistics.median(system.run(Plan(PREFIX, 40, 4), q).branches) for q in TOKENS]
            yield f"llama.cpp: {path.stem}{', flash attention' if flash else ''}", row, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, action="append", default=[])
    parser.add_argument("--only", choices=["linears", "openvino", "onnx", "gguf"])
    args = parser.parse_args()
    looks: dict[str, Callable[[], Iterator[Row]]] = {
        "linears": linears,
        "gguf": lambda: gguf(args.gguf),
        "openvino": openvino,
        "onnx": onnx,
    }
    print("| ms a step of | " + " | ".join(f"{q}" for q in TOKENS) + " | |")
    print("| --- |" + " --- |" * (len(TOKENS) + 1))
    for name, look in looks.items():
        if args.only in (None, name):
            for label, row, note in look():
                cells = [f"{x:.1f}" for x in row]
                print(f"| {label} | {' | '.join(cells)} | {note} |", flush=True)


if __name__ == "__main__":
    main()
