"""A server in this process, over scripts or over a tiny random model, and clients of it."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any
from urllib.request import Request, urlopen

import uvicorn
from openai import OpenAI

from pastalm import LLM
from pastalm.core.vocabulary import TAG_TOKENS
from pastalm.engines.base import Engine
from pastalm.engines.scripted import Script, ScriptedEngine
from pastalm.models import lossless, preparing
from pastalm.models.loading import Loaded
from pastalm.server.app import application, listen
from pastalm.server.settings import Settings
from tests.test_models import byte_level

TIPS = (
    'Two tips.\n<promise topic="sleep" tokens="20"/><async>1. Sleep eight hours.\n</async>'
    '<promise topic="food" tokens="30"/><async>2. Eat when you are hungry.\n</async><sync/>Both take practice.'
)
TIPS_TEXT = "Two tips.\n1. Sleep eight hours.\n2. Eat when you are hungry.\nBoth take practice."
HELLO = [{"role": "user", "content": "Say hello."}]


def loaded() -> Loaded:
    """A prepared vocabulary with a chat template, and no weights."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"extra_special_tokens": list(TAG_TOKENS.values())})
    vocabulary = lossless.vocabulary_of(tokenizer, eos=[1])
    return Loaded("played", None, tokenizer, vocabulary, True, "Write the answer in one piece.", 4096)


def playing(*scripts: Script, engine: type[ScriptedEngine] = ScriptedEngine, **options: Any) -> LLM:
    """An LLM that plays scripts, in the order in which requests come."""
    here = loaded()
    options = {"max_model_len": 2048, **options}
    made: Engine = engine(here.vocabulary, scripts or (TIPS,), **options)
    return LLM.over(made, here)


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    llm: LLM

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def metrics(self) -> dict[str, float]:
        """Every value on the page, by name and labels."""
        return metrics(self.url)

    def idle(self) -> bool:
        """Whether nothing is left of any request, in the server, the driver and the engine."""
        left = self.metrics()
        gauges = left["pasta_unfinished_answers"] + left["pasta_running_answers"] + left["pasta_live_threads"]
        return not (gauges or self.llm.driver.running or self.llm.driver.engine.has_unfinished())

    def becomes_idle(self, seconds: float = 20) -> bool:
        return eventually(self.idle, seconds)


def metrics(url: str) -> dict[str, float]:
    """Every value on a server's page of metrics, by name and labels."""
    with urlopen(f"{url}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return {key: float(value) for key, _, value in (x.rpartition(" ") for x in lines if x[0] != "#")}


def eventually(holds: Any, seconds: float = 20) -> bool:
    """Whether it comes to hold in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def serving(llm: LLM, send_buffer: int | None = None, **settings: Any) -> Iterator[Served]:
    """A server of the model "played" on a free port. It must end by itself once nothing runs. send_buffer: bytes
    that the system keeps for a client that does not read."""
    app = application(llm, Settings(**{"name": "played", **settings}))
    listening = listen("127.0.0.1", 0)
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        assert eventually(lambda: server.started)
        yield Served(url, llm)
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
    assert not thread.is_alive(), "the server does not end"


Raw = tuple[int, dict[str, str], Any]
"""Status, headers by lower-case name, body (JSON if it is)."""


def curl(url: str, body: Any = None, *options: str) -> Raw:
    """A request by curl; body: JSON, or text as it is."""
    command = ["curl", "--silent", "--show-error", "--include", "--max-time", "60", url, *options]
    if body is not None:
        sent = body if isinstance(body, str) else json.dumps(body)
        command += ["--header", "Content-Type: application/json", "--data-binary", "@-"]
        done = subprocess.run(command, input=sent.encode(), capture_output=True, check=True)
    else:
        done = subprocess.run(command, capture_output=True, check=True)
    head, _, rest = done.stdout.decode().partition("\r\n\r\n")
    if head.startswith("HTTP/1.1 100"):
        head, _, rest = rest.partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    headers = {k.lower(): v for k, v in (x.split(": ", 1) for x in lines)}
    is_json = headers.get("content-type", "").startswith("application/json")
    return int(status.split()[1]), headers, json.loads(rest) if is_json else rest


def events_of(stream: str) -> list[Any]:
    """The JSON of a text/event-stream's data, `[DONE]` left out but asked for."""
    data = [x.removeprefix("data: ") for x in stream.split("\n") if x.startswith("data: ")]
    assert data[-1] == "[DONE]" or "error" in json.loads(data[-1])
    return [json.loads(x) for x in data if x != "[DONE]"]


def open_stream(url: str, body: Any) -> Any:
    """An open reply, to be read line by line or closed early."""
    sent = json.dumps({"stream": True, **body}).encode()
    return urlopen(Request(url, sent, {"Content-Type": "application/json"}), timeout=60)


def joined(chunks: Sequence[Any], index: int = 0) -> str:
    """The concatenated deltas of a choice of a chat stream."""
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(c["delta"].get("content", "") for c in choices)


# ------------------------------------------------------------------------------ tiny models


def tiny_parts() -> tuple[Any, Any]:
    """A small random model (float64) with tag tokens, the same each time, and its tokenizer. Its weights are large
    enough that greedy answers differ."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_level()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    preparing.prepare(model, tokenizer)
    return model.to(torch.float64).eval(), tokenizer


def tiny(max_num_seqs: int = 4, max_model_len: int = 512, *, native: bool = False) -> LLM:
    """An LLM over the small random model, on transformers in float64 or on the native engine in float32."""
    from pastalm.engines.native.engine import NativeEngine
    from pastalm.engines.native.model import NativeModel
    from pastalm.engines.transformers.engine import TransformersEngine
    from pastalm.models.packed_models import from_model

    model, tokenizer = tiny_parts()
    vocabulary = lossless.vocabulary_of(tokenizer, eos=[1], size=model.get_input_embeddings().weight.shape[0])
    here = Loaded("played", model, tokenizer, vocabulary, True, "Write the answer in one piece.", 2048)
    sizes = {"max_num_seqs": max_num_seqs, "max_model_len": max_model_len}
    if native:
        return LLM.over(NativeEngine(NativeModel(*from_model(model.float(), "F32")), cache_type="F32", **sizes), here)
    return LLM.over(TransformersEngine(model, **sizes), here)


def forking(llm: LLM) -> dict[str, float]:
    """A logit_bias under which a random model forks, joins and ends."""
    tags = llm.loaded.vocabulary.tags
    assert tags is not None
    return {str(tags.promise): 6.0, str(tags.tokens): 5.0, str(tags.sync): 6.0, str(tags.async_close): 4.0, "1": 1.0}
