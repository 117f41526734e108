"""One fork-join plan on every system: the cost of threads, compared with the usual alternatives.

    python benchmarks/forkjoin.py                          # the embedded model, transformers
    python benchmarks/forkjoin.py --gguf answer-q8_0.gguf  # and llama.cpp with that file
    python benchmarks/forkjoin.py --native Q4_0 Q8_0 --gguf answer-q4_0.gguf --no-transformers --prefix 2048
    python benchmarks/forkjoin.py --compiled               # and our engine with torch.compile
    python benchmarks/forkjoin.py --openai http://127.0.0.1:8000/v1   # and a vLLM server of the same model
    python benchmarks/forkjoin.py --device cuda --shape gemma-7b      # random weights of that shape on a GPU

The plan: a prefix of 512 tokens (`--prefix`), k branches of 128 tokens each, a join, and 32 tokens after it. Token ids
are fixed and end tokens ignored, so the model's own choices do not matter. Systems that cannot join stop after the
branches. Every round runs all systems at one k, one after the other; figures are medians over rounds with minimum and
maximum. `forward` is the model's forward pass alone, on the inputs of our engine's last step (on CUDA the replay of its
graph); it is the limit for a step. `of theory` is the speedup of our whole plan over as many tokens decoded one by one,
divided by the speedup that the critical path allows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.request import Request as Request_
from urllib.request import urlopen

import numpy as np
import random_llama

from pastalm.core.events import Blocked, Decoded, Finished, Forked, Joined
from pastalm.core.params import Request, SamplingParams
from pastalm.engines.base import Engine
from pastalm.models import downloads, loading

THREADS = (1, 2, 3, 4, 8, 16)
BATCH = 512
"""Maximum number of tokens in one call of llama.cpp."""


@dataclass(frozen=True)
class Plan:
    """Tokens of the prefix, of each branch, and after the join."""

    prefix: int = 512
    branch: int = 128
    after: int = 32

    def token(self, i: int, branch: int = 0) -> int:
        return 200 + (7 * i + 131 * branch) % 1000

    def prompt(self) -> list[int]:
        return [self.token(i) for i in range(self.prefix)]


@dataclass(frozen=True)
class Timing:
    """Times of a plan.

    branches: seconds of each step of the branches; only their mean if the system has no steps.
    whole: seconds of the plan after its prefix (None: the system cannot join).
    cache: bytes of keys and values at the end of the branches, if known.
    steps: of the whole plan.
    """

    branches: list[float]
    whole: float | None
    cache: int | None = None
    steps: int = 0


class System(Protocol):
    name: str

    def run(self, plan: Plan, threads: int) -> Timing: ...


class Ours:
    """One of our engines, driven by events as by an interpreter."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self.engine = name, engine

    def run(self, plan: Plan, threads: int) -> Timing:
        engine, name = self.engine, "plan"
        positions = engine.capabilities.positions[0]
        params = SamplingParams(temperature=0, max_tokens=threads * plan.branch + plan.after + 64, drafts="off")
        engine.add(Request(id=name, prompt_token_ids=tuple(plan.prompt()), params=params, positions=positions))
        engine.apply(name, Forked(path=()))
        engine.step()
        engine.apply(name, Decoded(path=(), token=plan.token(0)))
        children = [(i,) for i in range(threads)]
        for path in children:
            promised = plan.branch // 10 * 10
            engine.apply(name, Forked(path=path, promised=promised, forced=(plan.token(0, path[0]),)))
        engine.apply(name, Blocked(path=()))
        begun, steps = time.perf_counter(), []
        for i in range(1, plan.branch):
            start = time.perf_counter()
            engine.step()
            for path in children:
                engine.apply(name, Decoded(path=path, token=plan.token(i, path[0])))
            steps.append(time.perf_counter() - start)
        cache = self._cache_bytes(name)
        for path in children:
            engine.apply(name, Finished(path=path))
        engine.apply(name, Joined(path=(), children=tuple(children), forced=(plan.token(1),)))
        count = 0
        while count < plan.after:
            for _ in engine.step():
                count += 1
                engine.apply(name, Decoded(path=(), token=plan.token(count)))
        whole = time.perf_counter() - begun
        engine.apply(name, Finished(path=()))
        return Timing(steps[2:], whole, cache, len(steps) + plan.after)

    def in_turn(self, plan: Plan, tokens: int) -> float:
        """Seconds to decode as many tokens one by one after the prefix."""
        engine, name = self.engine, "in turn"
        positions = engine.capabilities.positions[0]
        params = SamplingParams(temperature=0, max_tokens=tokens + 8, drafts="off")
        engine.add(Request(id=name, prompt_token_ids=tuple(plan.prompt()), params=params, positions=positions))
        engine.apply(name, Forked(path=()))
        engine.step()
        engine.apply(name, Decoded(path=(), token=plan.token(0)))
        begun = time.perf_counter()
        for i in range(1, tokens + 1):
            engine.step()
            engine.apply(name, Decoded(path=(), token=plan.token(i)))
        seconds = time.perf_counter() - begun
        engine.apply(name, Finished(path=()))
        return seconds

    def _cache_bytes(self, name: str) -> int | None:
        pool, running = getattr(self.engine, "_pool", None), self.engine._running[name]  # type: ignore
        if pool is None:
            return None
        if hasattr(pool, "slot_bytes"):
            return pool.slot_bytes * running.layout.used
        a_slot = sum(layer.keys[0, :, 0].nbytes + layer.values[0, :, 0].nbytes for layer in pool.layers)
        return a_slot * running.layout.used


class Forward:
    """The model's forward pass alone, on the last inputs from our engine with as many tokens."""

    name = "forward"

    def __init__(self, engine: Any) -> None:
        self._model = engine._model
        self._recorder = engine._model = _Recorder(engine._model)

    def run(self, plan: Plan, threads: int) -> Timing:
        import torch

        from pastalm.engines.transformers.attention import ATTENTION, attending

        inputs = self._recorder.inputs[threads]
        steps = []
        with torch.inference_mode(), attending(self._model.config, ATTENTION):
            inputs["past_key_values"].plan = inputs["plan"]
            for _ in range(40):
                start = time.perf_counter()
                self._model(**inputs)
                steps.append(time.perf_counter() - start)
            inputs["past_key_values"].plan = None
        return Timing(steps[2:], None)


class Replay:
    """The captured step alone that our engine replays for as many tokens."""

    name = "forward"

    def __init__(self, engine: Any) -> None:
        self._graphs = engine._graphs

    def run(self, plan: Plan, threads: int) -> Timing:
        import torch

        read = plan.prefix + threads * plan.branch
        fitting = [shape for shape in self._graphs._steps if shape.tokens >= threads and shape.width >= read]
        last = min(fitting, key=lambda shape: (shape.tokens, shape.width))
        steps = []
        with torch.inference_mode():
            for _ in range(40):
                torch.cuda.synchronize()
                start = time.perf_counter()
                self._graphs._steps[last].run()
                torch.cuda.synchronize()
                steps.append(time.perf_counter() - start)
        return Timing(steps[2:], None)


class _Recorder:
    """A model that keeps the inputs of its last forward for each number of tokens."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.inputs: dict[int, dict[str, Any]] = {}

    def __call__(self, **inputs: Any) -> Any:
        self.inputs[inputs["input_ids"].shape[1]] = inputs
        return self._model(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Generate:
    """transformers' `generate`: k rows of a batch, the prefix computed once and its cache repeated."""

    name = "transformers generate"

    def __init__(self, model: Any) -> None:
        self._model = model

    def run(self, plan: Plan, threads: int) -> Timing:
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        prompt = torch.tensor([plan.prompt()], device=self._model.device)
        with torch.inference_mode():
            self._model(input_ids=prompt[:, :-1], past_key_values=cache, use_cache=True)
            if threads > 1:
                cache.batch_repeat_interleave(threads)
            start = time.perf_counter()
            self._model.generate(
                input_ids=prompt.repeat(threads, 1),
                attention_mask=torch.ones_like(prompt).repeat(threads, 1),
                past_key_values=cache,
                do_sample=False,
                max_new_tokens=plan.branch,
                min_new_tokens=plan.branch,
                pad_token_id=0,
            ).tolist()  # a GPU is waited for
            seconds = time.perf_counter() - start
        cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return Timing([seconds / plan.branch], None, cache_bytes)


class LlamaCpp:
    """llama.cpp through its low-level API: k independent sequences that share the prefix, greedy; or one sequence
    (`force`). Flash attention computes in half precision on a CPU, and is much slower."""

    name = "llama.cpp sequences"

    def __init__(self, path: Path, length: int, *, flash: bool = False) -> None:
        import llama_cpp

        from pastalm.engines.llama_cpp import LlamaCppModel

        self._api = llama_cpp
        self._model = LlamaCppModel(path)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = length, BATCH, BATCH, 32
        params.kv_unified = params.no_perf = True
        params.flash_attn_type = int(flash)
        params.n_threads = params.n_threads_batch = os.cpu_count()
        self._context = llama_cpp.llama_init_from_model(self._model.pointer, params)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def _decode(self, tokens: list[int], positions: list[int], seqs: list[int], last: int) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, seq) in enumerate(zip(tokens, positions, seqs, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = seq, i >= len(tokens) - last
        if self._api.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp cannot decode")

    def _best(self, rows: int) -> Any:
        pointer = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(rows, self._model.vocabulary_size)).argmax(-1)

    def force(self, prompt: list[int], tokens: list[int]) -> float:
        """Seconds to decode given tokens one by one after a prompt, each after an argmax, prefill included."""
        start = time.perf_counter()
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        for begin in range(0, len(prompt), BATCH):
            part = prompt[begin : begin + BATCH]
            positions = list(range(begin, begin + len(part)))
            self._decode(part, positions, [0] * len(part), 1)
        for i, token in enumerate(tokens):
            self._best(1)
            self._decode([token], [len(prompt) + i], [0], 1)
        return time.perf_counter() - start

    def run(self, plan: Plan, threads: int) -> Timing:
        api = self._api
        memory = api.llama_get_memory(self._context)
        api.llama_memory_clear(memory, True)
        n, prompt = plan.prefix, plan.prompt()
        for begin in range(0, n, BATCH):
            part = prompt[begin : begin + BATCH]
            self._decode(part, list(range(begin, begin + len(part))), [0] * len(part), 1)
        for k in range(1, threads):
            api.llama_memory_seq_cp(memory, 0, k, 0, -1)
        steps = []
        for i in range(plan.branch):
            start = time.perf_counter()
            tokens = [plan.token(i, k) for k in range(threads)]
            self._decode(tokens, [n + i] * threads, list(range(threads)), threads)
            self._best(threads)
            steps.append(time.perf_counter() - start)
        return Timing(steps[2:], None)


class LlamaCppGenerate:
    """llama-cpp-python's own `Llama.generate`, greedy, as its users call it. One sequence only."""

    name = "llama.cpp generate"
    most = 1

    def __init__(self, path: Path, length: int) -> None:
        import llama_cpp

        n = os.cpu_count()
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=length, n_batch=BATCH, n_threads=n, n_threads_batch=n, verbose=False
        )

    def run(self, plan: Plan, threads: int) -> Timing:
        steps: list[float] = []
        start = time.perf_counter()
        for _ in self._llama.generate(plan.prompt(), temp=0.0, repeat_penalty=1.0):
            steps.append(time.perf_counter() - start)
            start = time.perf_counter()
            if len(steps) == plan.branch:
                break
        return Timing(steps[2:], None)


class Completions:
    """An OpenAI-compatible server that takes token ids and `ignore_eos` (vLLM): k requests at once, whose prefix is in
    its cache from an earlier request."""

    name = "vLLM, requests"

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        with urlopen(f"{self._url}/models", timeout=30) as reply:
            self._model = json.load(reply)["data"][0]["id"]

    def _complete(self, prompt: list[int], tokens: int) -> None:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urlopen(Request_(f"{self._url}/completions", data, kind), timeout=600) as reply:
            used = json.load(reply)["usage"]["completion_tokens"]
        if used != tokens:
            raise RuntimeError(f"the server wrote {used} tokens, not {tokens}")

    def run(self, plan: Plan, threads: int) -> Timing:
        self._complete(plan.prompt(), 1)
        prompts = [[*plan.prompt(), plan.token(0, k)] for k in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            list(pool.map(lambda prompt: self._complete(prompt, plan.branch), prompts))
            seconds = time.perf_counter() - start
        return Timing([seconds / plan.branch], None)


# ------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Row:
    """A system at one k.

    ms, low, high: milliseconds of a branch step: median, minimum and maximum over rounds of each round's median.
    branch_tokens_per_second: of all branches.
    ratio: the same over that of the same system at the first k.
    whole_tokens_per_second: of the branches and the tokens after the join.
    cache_mb: MiB of keys and values at the end of the branches.
    of_theory: realized over theoretical speedup of the whole plan.
    """

    system: str
    threads: int
    ms: float
    low: float
    high: float
    branch_tokens_per_second: float
    ratio: float
    whole_tokens_per_second: float | None
    cache_mb: float | None
    of_theory: float | None = None


def measure(systems: list[System], plan: Plan, rounds: int, threads: tuple[int, ...]) -> Iterator[Row]:
    """Yields a row for each system and each k."""
    first: dict[str, float] = {}
    for k in threads:
        able = [s for s in systems if k <= getattr(s, "most", k) and k in getattr(s, "only", threads)]
        timings: dict[str, list[Timing]] = {s.name: [] for s in able}
        for turn in range(rounds):
            order = able if turn % 2 == 0 else able[::-1]
            for system in sorted(order, key=lambda s: s.name == "forward"):
                timings[system.name].append(system.run(plan, k))
        tokens = k * plan.branch + plan.after
        for system in able:
            medians = [statistics.median(t.branches) for t in timings[system.name]]
            wholes = [t.whole for t in timings[system.name] if t.whole is not None]
            ms = 1e3 * statistics.median(medians)
            speed = 1e3 * k / ms
            first.setdefault(system.name, speed)
            whole = statistics.median(wholes) if wholes else None
            last = timings[system.name][-1]
            of_theory = None
            if isinstance(system, Ours) and whole is not None and k > 1:
                of_theory = system.in_turn(plan, tokens) / whole / (tokens / last.steps)
            yield Row(
                system=system.name,
                threads=k,
                ms=ms,
                low=1e3 * min(medians),
                high=1e3 * max(medians),
                branch_tokens_per_second=speed,
                ratio=speed / first[system.name],
                whole_tokens_per_second=None if whole is None else tokens / whole,
                cache_mb=None if last.cache is None else last.cache / 2**20,
                of_theory=of_theory,
            )


def on_gpu(args: argparse.Namespace, length: int) -> list[System]:
    """Our engine with graphs, and its replay alone; at the first and last k also without graphs, and `generate`."""
    from pastalm.engines.transformers.engine import TransformersEngine

    if args.shape:
        model = random_llama.make(args.shape, args.device)
    else:
        model = loading.load(args.model, dtype=args.dtype, device=args.device).model
    engine = TransformersEngine(model, max_num_seqs=1, max_model_len=length)
    systems: list[System] = [Ours("ours, CUDA graphs", engine), Replay(engine)]
    if not args.shape:
        eager = Ours("ours, eager", TransformersEngine(model, max_num_seqs=1, max_model_len=length, graphs=False))
        systems += [eager, Generate(model)]
        for system in systems[2:]:
            system.only = (args.threads[0], args.threads[-1])  # type: ignore[attr-defined]
    for k in args.threads:  # captures
        systems[0].run(Plan(), k)
    return systems


def processor() -> str:
    """The name of the processor, and its number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return f"{match[1] if match else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def native(model: str, kind: str, length: int) -> Engine:
    """The native engine for one request.

    model: a name, a folder, or a GGUF file.
    kind: type of the weights; a GGUF file keeps its own.
    length: tokens of a request.
    """
    from pastalm.engines.native.engine import NativeEngine
    from pastalm.engines.native.model import NativeModel
    from pastalm.models import packed_models

    packed = packed_models.load_gguf(model) if model.endswith(".gguf") else packed_models.load(model, weights=kind)
    return NativeEngine(NativeModel(packed.architecture, packed.tensors), max_num_seqs=1, max_model_len=length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=downloads.EMBEDDED)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=random_llama.SHAPES, help="random weights instead of --model")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--native", nargs="+", default=[], help="weight types for the native engine")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--compiled", action="store_true", help="and our engine compiled (minutes)")
    parser.add_argument("--openai", help="base URL of a vLLM server of the same model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--systems", nargs="+", help="of the systems only these, by name")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    args = parser.parse_args()
    plan, systems = Plan(prefix=args.prefix), list[System]()
    length = plan.prefix + max(args.threads) * plan.branch + plan.after + 128
    if args.device != "cpu":
        systems += on_gpu(args, length)
    elif not args.no_transformers:
        from pastalm.engines.transformers.engine import TransformersEngine

        loaded = loading.load(args.model, dtype=args.dtype)
        systems.append(Generate(loading.load(args.model, dtype=args.dtype).model))
        engine = TransformersEngine(loaded.model, max_num_seqs=1, max_model_len=length, pack=True)
        systems.append(Ours("ours, transformers", engine))
        systems.append(Forward(engine))
        if args.compiled:
            model = loading.load(args.model, dtype=args.dtype).model
            engine = TransformersEngine(model, max_num_seqs=1, max_model_len=length, compiled=True)
            systems.append(Ours("ours, compiled", engine))
            for k in args.threads:
                systems[-1].run(Plan(prefix=32, branch=4, after=2), k)
    for kind in args.native:
        systems.append(Ours(f"ours, native {kind}", native(args.model, kind, length)))
    if args.gguf:
        from pastalm.engines.llama_cpp import LlamaCppEngine, LlamaCppModel

        ours = LlamaCppEngine(LlamaCppModel(args.gguf), max_num_seqs=1, max_model_len=length)
        systems += [Ours("ours, llama.cpp", ours), LlamaCpp(args.gguf, length)]
        systems.append(LlamaCppGenerate(args.gguf, length))
    if args.openai:
        systems.append(Completions(args.openai))
    if args.systems:
        systems = [system for system in systems if system.name in args.systems]
    head = "system", "k", "ms a step (range)", "tokens/s, branches", "over k = 1", "whole plan", "KV, MB", "of theory"
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    rows = []
    for row in measure(systems, plan, args.rounds, tuple(args.threads)):
        rows.append(asdict(row))
        whole, held = ("" if x is None else f"{x:.0f}" for x in (row.whole_tokens_per_second, row.cache_mb))
        of_theory = "" if row.of_theory is None else f"{row.of_theory:.2f}"
        print(
            f"| {row.system} | {row.threads} | {row.ms:.1f} ({row.low:.1f} to {row.high:.1f}) "
            f"| {row.branch_tokens_per_second:.0f} | {row.ratio:.2f} | {whole} | {held} | {of_theory} |",
            flush=True,
        )
    if args.device != "cpu":
        import torch

        held = torch.cuda.max_memory_allocated() / 1e9
        print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, peak {held:.1f} GB of its memory")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\n{processor()}, peak memory {peak:.0f} MB")
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
