"""The engine over llama.cpp: GGUF files, quantised weights, one unified KV cache, one decode call a step.

Each thread is a llama.cpp sequence. A cell of the cache is visible to a token iff it carries the
token's sequence, so a fork is `seq_cp` of the parent's cells to the child and a join is `seq_cp` of
the child's own cells back: metadata only, nothing is copied. A thread's positions must be
consecutive, hence the policy `overlap` only. (PASTA section 4.)

A fork happens when the child's first token is fed. What its parent wrote later has larger positions
and is left out; tokens of the parent fed in the same call carry both sequences. If no sequence is
free, the child waits. If none can become free, the engine raises EngineError. A thread that joins
waits until all tokens of its children are in the cache, one step at most.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from pastalm.core.events import Event, Finished, Forked, Joined, Path
from pastalm.core.layout import Placed
from pastalm.core.params import Request
from pastalm.engines.base import Capabilities, Schedule
from pastalm.engines.batching import (
    PREFILL_BUDGET,
    PREFILL_CHUNK,
    Batch,
    BatchingEngine,
    Ints,
    RequestState,
    common_prefix,
)
from pastalm.errors import CapabilityError, EngineError, ModelError, RequestError

# without drafts: each further row makes a step of llama.cpp half as slow again (benchmarks/README.md)
CAPABILITIES = Capabilities(name="llama.cpp", weights="GGUF files, quantised too; CPU and GPU", positions=("overlap",))
MAX_SEQUENCES = 256
"""Maximum number of sequences in llama.cpp."""
BATCH = 512
"""Maximum number of tokens in one call."""
CACHE_TYPES = ("F16", "F32", "Q8_0")
CHILDREN = 16
"""Free sequences that a response that may fork needs to start. Further children may have to wait."""

_FAILURES = {1: "the cache has no room", 2: "it was aborted", -1: "the batch is invalid"}


Floats = NDArray[np.float32]

_ERROR_LEVEL = 4
_messages: list[str] = []


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, data: object) -> None:
    """Receives llama.cpp's log. Keeps error messages, which our own errors quote."""
    if level == _ERROR_LEVEL and text.strip():
        _messages.append(" ".join(text.decode(errors="replace").split()))


def _reason() -> str:
    return _messages[0][:200] if _messages else "no reason given"


def quiet() -> None:
    """Keeps llama.cpp's messages off the terminal."""
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))


def repacks() -> bool:
    """Whether llama.cpp repacks quantised weights for this CPU, which makes 4 bits fast.

    False if it was built with its AMX kernels: they crash (ggml-org/llama.cpp issue 20824, seen with 0.3.36), and
    one setting controls both.
    """
    return b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info()


def notes() -> str:
    """How to build a faster llama.cpp than the installed one; "" if that is not possible."""
    flags = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    how = f'CFLAGS="{flags}" CXXFLAGS="{flags}" pip install --force-reinstall --no-cache-dir llama-cpp-python'
    return "" if repacks() else f"built for AMX, whose kernels crash and stay unused; faster: {how}"


class LlamaCppModel:
    """A loaded GGUF file. Its memory is freed when it is closed or garbage-collected.

    path: the file.
    gpu_layers: layers on the GPU (-1: all).

    Raises ModelError if llama.cpp cannot load the file.
    """

    def __init__(self, path: str | FilePath, *, gpu_layers: int = 0) -> None:
        quiet()
        _messages.clear()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        self.on_gpu = gpu_layers != 0 and llama_cpp.llama_supports_gpu_offload()
        params.use_extra_bufts = repacks()
        if not FilePath(path).is_file():
            raise ModelError(f"no GGUF file at {path}")
        self.pointer = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.pointer:
            raise ModelError(f"llama.cpp cannot load {path} ({_reason()}): give a whole GGUF file")
        self._free = weakref.finalize(self, llama_cpp.llama_model_free, self.pointer)
        self._free.atexit = False  # a step may still run
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.pointer)
        self.vocabulary_size: int = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        self.context_length: int = llama_cpp.llama_model_n_ctx_train(self.pointer)

    def metadata(self, key: str) -> str | None:
        """A string of the file's metadata; None if it has no such key."""
        buffer = ctypes.create_string_buffer(4096)
        n = llama_cpp.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return buffer.value.decode() if n >= 0 else None

    def close(self) -> None:
        """Frees the weights. Close the engines that use them first."""
        self._free()
        self.pointer = None


@dataclass(slots=True)
class _Place:
    """The part of the cache that a response uses.

    sequences: of its threads that have started and have not been joined.
    begins: position of the promise's last token, for each child.
    joins: children of syncs that have not been fed yet.
    """

    sequences: dict[Path, int]
    begins: dict[Path, int] = field(default_factory=dict)
    joins: dict[Path, tuple[Path, ...]] = field(default_factory=dict)

    def inherits(self, path: Path, token: Placed) -> bool:
        """Whether a thread below the one of a token sees it from its beginning on."""
        depth = len(token.path)
        return path[:depth] == token.path and token.position <= self.begins.get(path[: depth + 1], -1)

    @property
    def unbegun(self) -> set[Path]:
        return self.begins.keys() - self.sequences.keys()


class _Cache:
    """The unified KV cache: which sequence ids are free, and the calls that move cells between them."""

    def __init__(self, context: Any) -> None:
        self._memory = llama_cpp.llama_get_memory(context)
        self.free = list(range(MAX_SEQUENCES - 1, -1, -1))

    def take(self) -> int:
        return self.free.pop()

    def give(self, sequence: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        self.free.append(sequence)

    def copy(self, source: int, target: int, first: int, stop: int = -1) -> None:
        """The cells of `source` at positions first .. stop - 1 belong to `target` too."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, first, stop)


def _free(model: LlamaCppModel, context: Any, batch: Any) -> None:
    """Frees a context. Its argument `model` keeps the weights alive until then."""
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)


class LlamaCppEngine(BatchingEngine):
    """Decodes all threads of all requests in one decode call per step.

    model: the loaded file.
    max_num_seqs: requests that decode at once.
    max_model_len: cells of each request, at most the model's context length. The cache has max_num_seqs times as many.
    threads: CPU threads (None: OMP_NUM_THREADS, else all).
    cache_type: of keys and values: F16, F32 or Q8_0.
    flash_attention: None: on a GPU, or if the cache is quantised, which needs it. On a CPU it computes in half
        precision, and decoding is up to two and a half times slower (benchmarks/README.md).
    schedule, prefill_chunk, prefill_budget: as in `BatchingEngine`.

    Raises ModelError if the cache cannot be allocated.
    """

    def __init__(
        self,
        model: LlamaCppModel,
        *,
        max_num_seqs: int = 8,
        max_model_len: int = 2048,
        threads: int | None = None,
        cache_type: str = "F16",
        flash_attention: bool | None = None,
        schedule: Schedule | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        prefill_budget: int = PREFILL_BUDGET,
    ) -> None:
        if min(max_num_seqs, max_model_len) < 1:
            raise RequestError("max_num_seqs and max_model_len must be 1 or more")
        if cache_type not in CACHE_TYPES:
            raise CapabilityError(f"unknown cache_type {cache_type!r}: one of {', '.join(CACHE_TYPES)}")
        capacity = min(max_model_len, model.context_length)
        super().__init__(
            replace(
                CAPABILITIES,
                max_model_len=capacity,
                max_num_seqs=max_num_seqs,
                max_position=model.context_length,
            ),
            vocabulary_size=model.vocabulary_size,
            schedule=schedule,
            prefill_chunk=prefill_chunk,
            prefill_budget=prefill_budget,
        )
        params = llama_cpp.llama_context_default_params()
        self._cells = max_num_seqs * capacity
        params.n_ctx = max(self._cells, 2 * MAX_SEQUENCES)  # fewer abort the process
        params.type_k = params.type_v = getattr(llama_cpp, f"GGML_TYPE_{cache_type}")
        if flash_attention is None:
            flash_attention = model.on_gpu or cache_type not in ("F16", "F32")
        params.flash_attn_type = int(flash_attention)
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = MAX_SEQUENCES
        params.n_threads = params.n_threads_batch = threads or _processors()
        params.kv_unified = params.swa_full = params.no_perf = True
        _messages.clear()
        self._context = llama_cpp.llama_init_from_model(model.pointer, params)
        if not self._context:
            raise ModelError(
                f"llama.cpp cannot make a cache of {self._cells} tokens ({_reason()}): lower "
                "max_num_seqs or max_model_len"
            )
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, MAX_SEQUENCES)
        self._free = weakref.finalize(self, _free, model, self._context, self._batch)
        self._free.atexit = False
        self._logit_view: tuple[tuple[int, int], Floats] = (0, 0), np.empty((0, self._size), np.float32)
        self._cache = _Cache(self._context)
        self._places: dict[str, _Place] = {}
        self._remembered: OrderedDict[int, Ints] = OrderedDict()

    def close(self) -> None:
        """Frees the cache. The engine cannot be used any more."""
        self._free()
        self._context = None

    def forget(self) -> None:
        """Clears the prefix cache."""
        while self._remembered:
            self._forget_oldest()

    # ------------------------------------------------------------------ places and prompts

    def _place(self, state: RequestState) -> bool:
        """Takes a sequence for the main thread, if there are cells for everything that the response may decode."""
        forking = state.request.params.parallelism > 0
        sequences = 1 + (CHILDREN if forking else 0)
        free = self._cells - sum(map(_most, self._running.values())) - _most(state)
        full = len(self._running) >= self.capabilities.max_num_seqs
        short = len(self._cache.free) + len(self._remembered) < sequences
        if full or free < 0 or (short and self._running):
            return False
        while self._remembered and (
            sum(map(len, self._remembered.values())) > free or len(self._cache.free) < sequences
        ):
            self._forget_oldest()
        self._take_sequence(state)
        return True

    def _take_sequence(self, state: RequestState) -> None:
        """Takes a sequence and reuses the longest cached prefix of the prompt, at most all but its last token."""
        prompt, n = state.prompt, len(state.prompt)
        own = self._cache.take()
        if self._remembered:
            shared = {s: common_prefix(cached, prompt) for s, cached in self._remembered.items()}
            nearest = max(shared, key=lambda s: shared[s])
            state.cached = min(shared[nearest], n - 1)
            self._remembered.move_to_end(nearest)
            self._cache.copy(nearest, own, 0, state.cached)
        self._places[state.request.id].sequences[()] = own

    def _prefill(self, state: RequestState, stop: int, logits: bool) -> NDArray[np.float32] | None:
        prompt, begin = state.prompt, state.cached
        own = self._places[state.request.id].sequences[()]
        keep = [stop - begin - 1] if logits else []
        rows = self._decode(prompt[begin:stop].tolist(), range(begin, stop), [[own]] * (stop - begin), keep)
        return rows[0].copy() if logits else None

    def _remember(self, state: RequestState, logits: Any) -> None:
        """Keeps a prompt's cells for requests with the same prefix."""
        prompt, own = state.prompt, self._places[state.request.id].sequences[()]
        if not state.prefilled or any(np.array_equal(cached, prompt) for cached in self._remembered.values()):
            return
        if len(self._remembered) >= self.capabilities.max_num_seqs:
            self._forget_oldest()
        used = sum(map(_most, self._running.values())) + sum(map(len, self._remembered.values()))
        if len(self._cache.free) > CHILDREN and used + 2 * len(prompt) <= self._cells:
            sequence = self._cache.take()
            self._cache.copy(own, sequence, 0)
            self._remembered[sequence] = prompt.copy()

    def _forget_oldest(self) -> None:
        self._cache.give(self._remembered.popitem(last=False)[0])

    def _leave(self, state: RequestState) -> None:
        for sequence in self._places.pop(state.request.id).sequences.values():
            self._cache.give(sequence)

    # ------------------------------------------------------------------ events

    def add(self, request: Request) -> None:
        """Takes a request; it waits while there is no room. Raises RequestError if it can never fit."""
        super().add(request)
        self._places[request.id] = _Place({})

    def cancel(self, request_id: str) -> None:
        """Frees the request's sequences at once; unknown ids are ignored."""
        super().cancel(request_id)
        self._places.pop(request_id, None)

    def apply(self, request_id: str, event: Event) -> None:
        """Applies an event. Raises RequestError if it cannot follow the events before."""
        super().apply(request_id, event)
        state = self._running.get(request_id) or self._waiting.get(request_id)
        if state is None:
            return
        place = self._places[request_id]
        if isinstance(event, Forked) and event.path:
            last = state.threads[event.path[:-1]].last
            place.begins[event.path] = int(state.layout.positions[last])
        elif isinstance(event, Joined) and event.children:
            place.joins[event.path] = event.children
        elif isinstance(event, Finished):
            self._reclaim(state, place)

    def _reclaim(self, state: RequestState, place: _Place) -> None:
        """Frees the sequences of finished threads that no thread can join or fork from any more."""
        threads = state.threads
        needed = {token.path for token in state.pending} | {path[:-1] for path in place.unbegun}
        needed |= {child for children in place.joins.values() for child in children}
        for path in [p for p in place.sequences if p and p not in needed]:
            if threads[path].finished and threads[path[:-1]].finished:
                self._cache.give(place.sequences.pop(path))
                del place.begins[path]

    # ------------------------------------------------------------------ decoding

    def _feedable(self, state: RequestState, due: list[Placed]) -> list[Placed]:
        """The due tokens of threads that need not wait for joined children or for a free sequence."""
        place = self._places[state.request.id]
        waiting = {path for path in place.joins if self._awaits(state, path)}
        for path in dict.fromkeys(token.path for token in due):
            if path in place.unbegun:
                if not self._cache.free and self._remembered:
                    self._forget_oldest()
                if self._cache.free:
                    self._begin(place, path)
                else:
                    waiting.add(path)
        return [token for token in due if token.path not in waiting]

    @staticmethod
    def _awaits(state: RequestState, path: Path) -> bool:
        """Whether a thread that joins sees tokens of other threads that have not been fed yet."""
        sees = state.layout.sees(path)
        return any(token.path != path and sees >> token.place & 1 for token in state.pending)

    def _begin(self, place: _Place, path: Path) -> None:
        """Takes a sequence for a child, with the cells that its parent had at the promise."""
        own = place.sequences[path] = self._cache.take()
        self._cache.copy(place.sequences[path[:-1]], own, 0, place.begins[path] + 1)

    def _join(self, place: _Place, path: Path) -> None:
        """Adds the cells of the threads that a thread joins. Frees the sequences of its own children, unless a child
        that has not started yet will fork from one."""
        needed = {child[:-1] for child in place.unbegun}
        for child in place.joins.pop(path):
            self._cache.copy(place.sequences[child], place.sequences[path], place.begins[child] + 1)
            if child[:-1] == path and child not in needed:
                self._cache.give(place.sequences.pop(child))
                del place.begins[child]

    def _forward(self, batch: Batch, keep: list[int]) -> Floats:
        """Logits [len(keep), vocabulary] of one decode call over the due tokens of some requests."""
        tokens: list[int] = []
        positions: list[int] = []
        owners: list[list[int]] = []
        for state, due in batch:
            place = self._places[state.request.id]
            for path in {token.path for token in due} & place.joins.keys():
                self._join(place, path)
            paths = {token.path for token in due}
            for token in due:
                below = [path for path in paths if len(path) > len(token.path) and place.inherits(path, token)]
                tokens.append(token.token)
                positions.append(token.position)
                owners.append([place.sequences[path] for path in (token.path, *below)])
        return self._decode(tokens, positions, owners, keep)

    def _decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        owners: Sequence[Sequence[int]],
        keep: Sequence[int],
    ) -> Floats:
        """Feeds tokens, each to its sequences.

        tokens, positions: of the tokens.
        owners: sequences of each token.
        keep: indices of the tokens whose logits are returned.

        Returns logits [len(keep), vocabulary], valid until the next call. Raises EngineError if llama.cpp fails.
        """
        parts = []
        for start in range(0, len(tokens), BATCH):
            stop = min(start + BATCH, len(tokens))
            kept = [i - start for i in keep if start <= i < stop]
            self._call(tokens[start:stop], positions[start:stop], owners[start:stop], kept)
            if kept:
                parts.append(self._logits(len(kept)))
            if parts and stop < len(tokens):
                parts[-1] = parts[-1].copy()  # the next call overwrites it
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, self._size), np.float32)

    def _logits(self, rows: int) -> Floats:
        """llama.cpp's own logits [rows, vocabulary] of the last call. A new array is made only if they have moved."""
        where = (_logits_at(self._context), rows)
        if where != self._logit_view[0]:
            floats = (ctypes.c_float * (rows * self._size)).from_address(where[0])
            self._logit_view = where, np.ctypeslib.as_array(floats).reshape(rows, self._size)
        return self._logit_view[1]

    def _call(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        owners: Sequence[Sequence[int]],
        keep: Sequence[int],
    ) -> None:
        batch, n = self._batch, len(tokens)
        batch.n_tokens = n
        for i, (token, position, ids) in enumerate(zip(tokens, positions, owners, strict=True)):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, 0
            batch.n_seq_id[i] = len(ids)
            for j, sequence in enumerate(ids):
                batch.seq_id[i][j] = sequence
        for i in keep:
            batch.logits[i] = 1
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            raise EngineError(f"llama.cpp cannot decode: {_FAILURES.get(code, f'error {code}')}")


_logits_at = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(
    ctypes.cast(llama_cpp.llama_get_logits, ctypes.c_void_p).value or 0
)
"""llama.cpp's llama_get_logits, returning an address: the binding would create a pointer object in every step."""


def _processors() -> int:
    """OMP_NUM_THREADS, else all processors. More threads than processors slow decoding by an order of magnitude, since
    llama.cpp's threads wait busily."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdigit() and int(threads) else os.cpu_count() or 1


def _most(state: RequestState) -> int:
    """The largest number of cells that a response can use."""
    return len(state.prompt) + state.request.params.max_tokens
