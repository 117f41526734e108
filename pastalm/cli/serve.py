"""The verb of the server: serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pastalm.cli.command import NoEffect, app, verb
from pastalm.cli.loading import fetch, load_llm
from pastalm.cli.options import MaxModelLen, RemoteOptions, RunOptions, ThreadOptions
from pastalm.cli.terminal import quiet_libraries, say
from pastalm.core.params import parameters
from pastalm.models.downloads import EMBEDDED

if TYPE_CHECKING:
    from pastalm.server.settings import Settings


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Who may ask, how much, and what a request gets that does not say."""

    host: Annotated[str, typer.Option(help="0.0.0.0 is every interface; then give an API key.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="0 picks a free port.", min=0, max=65535)] = 8000
    name: Annotated[str | None, typer.Option(help="Name of the model for clients (default: that of MODEL).")] = None
    api_key: Annotated[str | None, typer.Option(envvar="PASTA_API_KEY", help="Key that clients must send.")] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of web pages that may send requests, * for any; may be repeated."),
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name besides localhost that a server on loopback accepts, * for any; may be repeated."),
    ] = None
    max_num_seqs: Annotated[int, typer.Option(help="Answers decoded at once.", min=1)] = 8
    max_queue: Annotated[int, typer.Option(help="Answers that may wait for a place; further ones get status 429.")] = 64
    max_model_len: MaxModelLen = None
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of one prompt.")] = None
    max_tokens: Annotated[int, typer.Option(help="Token limit of a chat request that gives none.")] = 1024
    max_body: Annotated[int, typer.Option(help="Bytes of a request.")] = 1 << 20
    timeout: Annotated[float, typer.Option(help="Seconds for a request, waiting included.")] = 600.0
    client_timeout: Annotated[
        float, typer.Option(help="Seconds for a client to send its body, or to read a chunk.")
    ] = 30.0
    parallelism: Annotated[
        float, typer.Option(help="For requests that give none: multiplies the odds of forking; 0 turns it off.")
    ] = 1.0
    drafts: Annotated[str, typer.Option(help=f"For requests that give none. {parameters()['drafts'].help}")] = "auto"
    logits_processors: Annotated[
        str, typer.Option(help="Names of logits processors that requests may use, joined by commas.")
    ] = ""
    thread_target: Annotated[
        int, typer.Option(help="With more live threads than this, new requests do not fork (0: no limit).")
    ] = 32

    def settings(self, model: str) -> Settings:
        """Settings of the server. Raises RequestError."""
        from pastalm.server.settings import Settings

        return Settings(
            name=self.name or Path(model).name,
            api_key=self.api_key,
            parallelism=self.parallelism,
            drafts=self.drafts,
            logits_processors=tuple(name for name in self.logits_processors.split(",") if name),
            thread_target=self.thread_target,
            max_queue=self.max_queue,
            max_tokens=self.max_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            max_body=self.max_body,
            client_timeout=self.client_timeout,
            timeout=self.timeout,
            cors_origins=tuple(self.cors_origin or ()),
            hosts=tuple(self.allowed_host or ()),
        )


@verb(
    app,
    no_effect=[
        NoEffect(("max_model_len",), lambda a: a["base_url"] is not None, "with --base-url, whose server has its own")
    ],
)
def serve(
    options: ServeOptions,
    threads: ThreadOptions,
    run: RunOptions,
    remote: RemoteOptions,
    model: Annotated[str, typer.Argument(help="The embedded model, a hub name, a folder, or a GGUF file.")] = EMBEDDED,
) -> None:
    """Serve a model over HTTP, as OpenAI's API does; SIGTERM or Ctrl-C finishes what runs."""
    from pastalm.server import app as server

    settings = options.settings(model)
    quiet_libraries()
    with server.listen(options.host, options.port) as socket:
        if remote.base_url is None:
            fetch(model)
        llm = load_llm(
            model,
            run,
            threads,
            remote,
            max_num_seqs=options.max_num_seqs,
            max_model_len=options.max_model_len,
        )
        host = f"[{options.host}]" if ":" in options.host else options.host
        say(f"{settings.name} on http://{host}:{socket.getsockname()[1]}/v1")
        server.serve(llm, settings, socket)
