"""Loads models and connects to servers for verbs, and describes them for the headers of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pastalm.cli.options import LargeModelOptions, RemoteOptions, RunOptions, ThreadOptions
from pastalm.cli.terminal import busy, quiet_libraries
from pastalm.errors import ModelError, RequestError
from pastalm.models.downloads import EMBEDDED

if TYPE_CHECKING:
    from pastalm import LLM
    from pastalm.core.layout import Policy
    from pastalm.records.chat_client import ChatClient


def fetch(name: str) -> Path:
    """The folder of a model, downloaded if it is not in the cache; of a GGUF file its path. Raises ModelError."""
    from pastalm.models import downloads

    if (file := Path(name)).suffix == ".gguf":
        if not file.is_file():
            raise ModelError(f"no GGUF file at {name}")
        return file
    quiet_libraries()
    with busy(f"looking for {name}") as progress:
        return downloads.pull(name, progress=progress)


def load_llm(
    model: str,
    run: RunOptions,
    threads: ThreadOptions | None = None,
    remote: RemoteOptions | None = None,
    *,
    max_num_seqs: int = 1,
    max_model_len: int | None = None,
) -> LLM:
    """Loads a model, or connects to the server that runs it.

    model: as `LLM` takes it; at a server, the model's name there.
    run: engine, adapter, dtype, device.
    threads, remote: None if the verb has no such options.
    max_num_seqs: answers decoded at once.
    max_model_len: tokens of a prompt and its answer together (None: the model's, 4096 at most).

    Raises RequestError, CapabilityError, ModelError, RemoteError.
    """
    from pastalm import LLM, Limits
    from pastalm.core.layout import POLICIES

    threads, remote = threads or ThreadOptions(), remote or RemoteOptions()
    if threads.positions is not None and threads.positions not in POLICIES:
        raise RequestError(f"unknown positions {threads.positions!r}: {', '.join(POLICIES)}")
    positions: Policy | None = threads.positions
    limits = Limits(max_threads=threads.max_threads)
    if remote.base_url is not None:
        return _connect(model, run, remote, positions=positions, limits=limits, max_num_seqs=max_num_seqs)
    if remote.tokenizer is not None or remote.prompted:
        raise RequestError("--tokenizer and --prompted go with --base-url")
    with busy(f"loading {model}"):
        return LLM(
            model,
            engine=run.engine,
            trust_remote_code=run.trust_remote_code,
            adapter=adapter_of(run.adapter),
            dtype=run.dtype,
            positions=positions,
            limits=limits,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            device=run.device,
        )


def _connect(model: str, run: RunOptions, remote: RemoteOptions, *, max_num_seqs: int, **options: Any) -> LLM:
    from pastalm import LLM

    if (run.adapter, run.dtype, run.device, run.engine) != ("auto", "auto", "cpu", "auto"):
        raise RequestError("the server has its weights: leave out --adapter, --dtype, --device and --engine")
    if max_num_seqs > 1:
        options["max_num_seqs"] = max_num_seqs
    with busy(f"connecting to {remote.base_url}"):
        return LLM.remote(
            remote.base_url or "",
            None if model == EMBEDDED else model,
            tokenizer=remote.tokenizer,
            prompted=remote.prompted,
            **options,
        )


def adapter_of(adapter: str) -> str | None:
    """The value of --adapter for `LLM`: `none` becomes None."""
    return None if adapter == "none" else adapter


def large_model(model: str | None, options: LargeModelOptions) -> ChatClient[Any]:
    """A client of the server whose large model annotates or judges; OPENAI_API_KEY is its key. Raises RequestError."""
    from pastalm.records.chat_client import ChatClient, Usage

    if options.base_url is None or model is None:
        raise RequestError(
            "give --base-url (of an OpenAI-compatible server) and --model (to judge: --judge), one of its models"
        )
    if options.concurrency < 1:
        raise RequestError("concurrency must be 1 or more")
    usage = Usage(prices=(options.price_in, options.price_out))
    return ChatClient(options.base_url, model, concurrency=options.concurrency, usage=usage)


def token_counter(model: str) -> Callable[[str], int]:
    """Counts the tokens of a text under a model's vocabulary, without loading the model. Raises ModelError."""
    path = fetch(model) / "tokenizer.json"
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise ModelError(f"cannot read the tokenizer of {model} ({path}): {error}") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def tokenizer_header(model: str) -> dict[str, Any]:
    """Name and hash of the tokenizer that counts tokens, for the header of a file."""
    from pastalm.models import contents

    return {"tokenizer": contents.of_file(fetch(model) / "tokenizer.json") | {"name": Path(model).name}}


def model_header(model: str, adapter: str) -> dict[str, Any]:
    """Name and hash of a model and its adapter, for the header of a file."""
    from pastalm.models import contents

    fetch(model)
    return {"model": contents.of_model(model), "adapter": contents.of_adapter(model, adapter_of(adapter))}
