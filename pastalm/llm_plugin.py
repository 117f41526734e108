"""A plugin for `llm` (llm.datasette.io): `llm install pastalm`, then `llm -m pasta "…"`.

Streams the reader's text in document order. With a schema (`llm -m pasta --schema "name, age int" "…"`) it is JSON,
whose fields are threads. Logs token counts and the critical path with the answer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import llm
from pydantic import Field, create_model

from pastalm.core.driver import Response
from pastalm.core.params import SamplingParams
from pastalm.engine_choice import missing
from pastalm.errors import PastaError
from pastalm.llm import LLM
from pastalm.models.downloads import EMBEDDED
from pastalm.text_options import DEFAULTS, offered, takes_texts


@llm.hookimpl
def register_models(register: Any) -> None:
    """Registers the embedded model under its own name and as `pasta`. The option `model` selects another."""
    register(Pasta(), aliases=("pasta",))


class _ModelOptions(llm.Options):
    """How the model is loaded, as in `pasta generate`."""

    model: str = Field(EMBEDDED, description="The embedded model, a hub name, a folder, or a GGUF file")
    engine: str = Field("auto", description="native, transformers, llama.cpp, or auto: native on a CPU")
    adapter: str = Field("auto", description="A folder, none, or auto: the adapter shipped with pastalm")


def _sampling_fields() -> dict[str, Any]:
    """Fields of the sampling parameters, from their rows in core/params.py. SamplingParams checks their bounds."""
    return {
        name: (
            str | None if takes_texts(row) else row.kind,
            Field(DEFAULTS.get(name, row.default), description=row.help),
        )
        for name, row in offered().items()
    }


def _sampling_params(options: Any) -> SamplingParams:
    """The parameters of an answer. A parameter that is a list of texts has at most one here. Raises RequestError."""
    values = {name: getattr(options, name) for name in offered()}
    texts = {name: [values[name]] for name, row in offered().items() if takes_texts(row) and values[name] is not None}
    return SamplingParams(**values | texts)


_Options = create_model("Options", __base__=_ModelOptions, **_sampling_fields())


class Pasta(llm.Model):
    """A model decoded asynchronously on this machine."""

    model_id = f"pasta-{EMBEDDED}"
    can_stream = True
    supports_schema = True

    Options = _Options  # type: ignore[assignment]  # llm declares it as a nested class

    def __init__(self) -> None:
        self._key: tuple[str, str, str] | None = None
        self._loaded: LLM | None = None
        self._lock = threading.RLock()
        """Held for every step: `llm` may call from several threads."""

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """Yields the text as soon as it can no longer change. Raises llm.ModelError."""
        options = prompt.options
        try:
            params = replace(_sampling_params(options), schema=prompt.schema)
            with self._lock:
                decoding = self._llm(options.model, options.engine, options.adapter).stream(
                    _messages(prompt, conversation), params
                )
            yield from self._texts(decoding)
            transcript = decoding.transcript
        except PastaError as error:
            raise llm.ModelError(str(error)) from None
        except ModuleNotFoundError as error:
            raise llm.ModelError(missing(error)) from None
        response.set_usage(
            input=len(decoding.prompt_token_ids),
            output=transcript.tokens,
            details={"critical_path": transcript.critical_path, "passes": transcript.passes},
        )
        response.response_json = {"annotated": transcript.annotated, "finish_reason": transcript.finish_reason}

    def _texts(self, decoding: Response) -> Iterator[str]:
        """Yields the answer's text as soon as it can no longer change. Closing the generator cancels the answer."""
        events, transcript, shown = iter(decoding), decoding.transcript, 0
        stops = decoding.request.params.stop_strings
        try:
            while True:
                with self._lock:
                    ended = next(events, None) is None
                    text = transcript.certain(stops, start=shown)
                if text:
                    yield text
                    shown += len(text)
                if ended:
                    return
        finally:
            with self._lock:
                decoding.cancel()

    def _llm(self, model: str, engine: str, adapter: str) -> LLM:
        """The loaded model if it is this one; else loads this one, and closes the other unless it is decoding."""
        key = (model, engine, adapter)
        if self._loaded is None or key != self._key:
            previous, self._loaded = self._loaded, None
            if previous is not None and not previous.driver.running:
                previous.close()
            adapter_name = None if adapter == "none" else adapter
            self._loaded, self._key = LLM(model, engine=engine, adapter=adapter_name, max_num_seqs=1), key
        return self._loaded


def _messages(prompt: Any, conversation: Any) -> list[dict[str, str]]:
    """The conversation so far, the reader's text of its answers, and the prompt."""
    messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
    for response in conversation.responses if conversation is not None else ():
        messages.append({"role": "user", "content": response.prompt.prompt})
        messages.append({"role": "assistant", "content": response.text_or_raise()})
    return [*messages, {"role": "user", "content": prompt.prompt}]
