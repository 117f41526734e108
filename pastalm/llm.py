"""LLM, the public class: loads a model, encodes prompts and collects outputs. `core/driver.py` decodes."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from pastalm import engine_choice
from pastalm.core.driver import Driver, Response
from pastalm.core.events import Event, FinishReason
from pastalm.core.interpreter import Limits
from pastalm.core.layout import Policy
from pastalm.core.params import SamplingParams
from pastalm.core.transcript import Transcript
from pastalm.core.vocabulary import Vocabulary
from pastalm.engines.base import Engine
from pastalm.errors import ModelError, RequestError, check_text
from pastalm.models.downloads import EMBEDDED
from pastalm.records.transcripts import linear_tokens
from pastalm.structured.structures import Structures, instructions

if TYPE_CHECKING:
    from pastalm.models.chat_template import Rendering
    from pastalm.models.loading import Loaded

Message: TypeAlias = "Mapping[str, str]"
Prompt: TypeAlias = "str | Sequence[int]"


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer.

    index: which of the n answers to the prompt.
    text: the reader's text, without tags.
    token_ids: all tokens in linear order, tags included.
    logprobs: for each token of the text, in document order, {token id: log-probability}; None if not requested.
    finish_reason: why decoding ended.
    transcript: the full record, with annotated text, threads and figures.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: list[dict[int, float]] | None
    finish_reason: FinishReason | None
    transcript: Transcript


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answers to one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    finished: bool = True


class LLM:
    """A model that decodes answers asynchronously. A context manager: leaving it closes the model.

    model: the embedded model's name, a hub name, a folder, or a GGUF file.
    engine: native, transformers or llama.cpp. "auto": native on a CPU if it can run the model (docs/engines.md).
    adapter: "auto" for the adapter shipped for this model, None for no adapter, else a folder.
    dtype: weight type. q8_0 and q4_0 need the native engine. "auto": the engine's default.
    device: "cpu" or a torch device.
    positions: position policy (core/layout.py). None: the engine's first.
    limits: bounds on forking and nesting.
    max_num_seqs: responses decoded at once; more wait.
    max_model_len: cache slots (tokens) a response. None: the model's context, at most 4096.
    compiled: compile steps of a single response with torch.compile; faster after minutes of warm-up (CPU,
        transformers).
    trust_remote_code: run Python code that comes with the model.

    Raises RequestError for invalid options, CapabilityError if the engine does not support the model or an option,
    ModelError if the model cannot be loaded.
    """

    def __init__(
        self,
        model: str = EMBEDDED,
        *,
        engine: str = "auto",
        adapter: str | None = "auto",
        dtype: str = "auto",
        device: str = "cpu",
        positions: Policy | None = None,
        limits: Limits | None = None,
        max_num_seqs: int = 8,
        max_model_len: int | None = None,
        compiled: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        options = engine_choice.Options(
            engine=engine,
            adapter=adapter,
            dtype=dtype,
            device=device,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            compiled=compiled,
            trust_remote_code=trust_remote_code,
        )
        loaded, built_engine = engine_choice.load(model, options)
        self._begin(built_engine, loaded, positions, limits)

    @classmethod
    def over(
        cls,
        engine: Engine,
        loaded: Loaded,
        *,
        positions: Policy | None = None,
        limits: Limits | None = None,
    ) -> LLM:
        """An LLM on an existing engine.

        engine: the engine.
        loaded: the model's tokenizer and vocabulary.
        positions: position policy. None: the engine's first.
        limits: bounds on forking and nesting.
        """
        llm = cls.__new__(cls)
        llm._begin(engine, loaded, positions, limits)
        return llm

    @classmethod
    def remote(
        cls,
        base_url: str,
        model: str | None = None,
        *,
        tokenizer: str | None = None,
        prompted: bool = False,
        positions: Policy | None = None,
        limits: Limits | None = None,
        **options: Any,
    ) -> LLM:
        """An LLM on a server with OpenAI's completions API, such as vLLM, SGLang or llama.cpp (docs/engines.md).

        base_url: the API's address, ending in /v1.
        model: the model's name on the server. None: the only one.
        tokenizer: hub name or folder of its tokenizer and chat template. None: the model's name; if that has no
            tokenizer, only raw prompts can be sent, as text.
        prompted: the model was not finetuned; teach it the tags in the system message.
        positions: position policy. None: the engine's first.
        limits: bounds on forking and nesting.
        options: passed to `engines.completions.discovery.connect`.

        Raises RemoteError if the server cannot be used, ModelError if the tokenizer cannot be loaded.
        """
        from pastalm.engines.completions.discovery import connect
        from pastalm.models import chat_template, loading

        tokenizers: list[Loaded] = []

        def vocabulary(served: str) -> Vocabulary | None:
            try:
                tokenizers.append(loading.load_tokenizer(tokenizer or served, prompted=prompted))
            except ModelError:
                if tokenizer:
                    raise
                return None
            return tokenizers[0].vocabulary

        engine = connect(base_url, model, vocabulary=vocabulary, **options)
        wire_vocabulary = engine.wire.vocabulary
        if not tokenizers:
            words: Any = chat_template.TextTokenizer(None, wire_vocabulary.encode)
            teaching = chat_template.TEACHING if prompted else None
            loaded = loading.Loaded(engine.connection.model, None, words, wire_vocabulary, False, None, 2048, teaching)
        elif wire_vocabulary is tokenizers[0].vocabulary:
            loaded = tokenizers[0]
        else:
            loaded = loading.with_text_prompts(tokenizers[0], wire_vocabulary)
        return cls.over(engine, loaded, positions=positions, limits=limits)

    def _begin(self, engine: Engine, loaded: Loaded, positions: Policy | None, limits: Limits | None) -> None:
        self.positions: Policy = positions or engine.capabilities.positions[0]
        self._parts: tuple[Loaded, Driver] | None = (loaded, self._driver(engine, loaded, limits))

    @staticmethod
    def _driver(engine: Engine, loaded: Loaded, limits: Limits | None) -> Driver:
        offers = engine.capabilities
        masks = offers.processors or not offers.checks
        structure = Structures(loaded.vocabulary, offers.positions, masks=masks, guides=offers.guides)
        return Driver(engine, loaded.vocabulary, limits=limits, structure=structure)

    def _open(self) -> tuple[Loaded, Driver]:
        if self._parts is None:
            raise RequestError("this LLM is closed: create another")
        return self._parts

    @property
    def loaded(self) -> Loaded:
        """The model, its tokenizer and vocabulary. Raises RequestError if the LLM is closed."""
        return self._open()[0]

    @property
    def driver(self) -> Driver:
        """The driver that decodes. Raises RequestError if the LLM is closed."""
        return self._open()[1]

    def close(self) -> None:
        """Cancels all responses and frees the cache and the weights. Can be called more than once."""
        if self._parts is None:
            return
        (loaded, driver), self._parts = self._parts, None
        driver.close()
        if (close := getattr(loaded.model, "close", None)) is not None:
            close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> list[RequestOutput]:
        """Completes raw prompts, all at once.

        prompts: one text, one list of token ids, or a list of these.
        params: sampling parameters. None: the defaults.

        Returns one output a prompt, in order. Raises RequestError, CapabilityError.
        """
        if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
            raise RequestError(f"prompts are texts or lists of token ids, not {type(prompts).__name__}")
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        each: Sequence[Any] = [prompts] if single else prompts
        return self._run([self._encode(p) for p in each], params or SamplingParams(), list(each))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several at once, with the model's chat template.

        messages: one conversation (a list of {"role", "content"}), or a list of conversations.
        params: sampling parameters. None: the defaults.

        Returns one output a conversation, in order. Raises RequestError, CapabilityError, and ModelError if the model
        has no chat template.
        """
        params = params or SamplingParams()
        single = not messages or isinstance(messages, str | bytes | Mapping) or isinstance(messages[0], Mapping)
        many: Sequence[Any] = [messages] if single else messages
        return self._run([self._conversation(m, params) for m in many], params, [None] * len(many))

    def stream(self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None) -> Response:
        """Starts one answer and returns its handle. Iterate over it, with `for` or `async for`, to get its events as
        they happen. Several answers can be streamed at once, also from several threads.

        prompt: text, token ids, or messages.
        params: sampling parameters; n must be 1.

        Raises RequestError, CapabilityError.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise RequestError("a stream decodes one answer; n must be 1")
        return self.submit(prompt, params)

    def astream(self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None) -> AsyncIterator[Event]:
        """As `stream`, for `async for`: steps are made on a thread, and all streams of an event loop share them."""
        return aiter(self.stream(prompt, params))

    def submit(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams,
        *,
        choice: int = 0,
        seed: int | None = None,
        owner: str = "",
        reference_token_ids: Sequence[Sequence[int]] | None = None,
        keep_events: bool = True,
    ) -> Response:
        """Submits one answer to the driver, whose `step` decodes all submitted answers together. For arguments and
        errors see `Driver.submit`."""
        return self.driver.submit(
            self.encode(prompt, params),
            params,
            choice=choice,
            seed=seed,
            positions=self.positions,
            owner=owner,
            reference_token_ids=reference_token_ids,
            keep_events=keep_events,
        )

    def encode(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams,
        *,
        rendering: Rendering | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Token ids of a raw prompt, or of a conversation rendered by the chat template.

        prompt: text, token ids, or messages.
        params: sampling parameters; with parallelism 0, the marker of sequential answers is added.
        rendering: options of the chat template.
        add_special_tokens: whether the tokenizer adds its special tokens (such as BOS) to a raw prompt.

        Raises RequestError for an invalid prompt, ModelError if the model has no chat template.
        """
        chat = isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        if chat:
            return self._conversation(prompt, params, rendering)
        return self._encode(prompt, add_special_tokens)  # type: ignore[arg-type]

    def _encode(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a raw prompt. Tags in it are encoded as plain text, other special tokens as themselves."""
        loaded, _ = self._open()
        if not isinstance(prompt, str):
            tokens: Any = prompt
            listed = isinstance(tokens, Sequence) and not isinstance(tokens, bytes)
            if not listed or not all(isinstance(token, int) for token in tokens):
                raise RequestError(f"a prompt is text, token ids or messages, not {type(prompt).__name__}")
            return list(tokens)
        from pastalm.models import chat_template

        check_text(prompt, "the prompt")
        return chat_template.raw_prompt(
            loaded.tokenizer, loaded.vocabulary, prompt, add_special_tokens=add_special_tokens
        )

    def _conversation(self, messages: Any, params: SamplingParams, rendering: Rendering | None = None) -> list[int]:
        """Token ids of a conversation, up to the start of the answer. The system message gets the sequential marker
        (parallelism 0) or the teaching of a model that was not finetuned. Raises RequestError if it is empty."""
        from pastalm.models import chat_template

        listed = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
        if not listed or not all(isinstance(message, Mapping) for message in messages):
            raise RequestError("messages are dictionaries, each with a role and a content")
        last = messages[-1] if messages else {}
        if not (str(last.get("content") or "").strip() or last.get("role") == "tool" or last.get("tool_calls")):
            raise RequestError("the prompt is empty: give some text")
        for i, message in enumerate(messages):
            for key, value in message.items():
                if isinstance(value, str):
                    check_text(value, f"{key} of message {i}")
        free = params.schema is None and params.tool_choice in ("auto", "none")
        sequential, teaching = self.loaded.sequential_marker, self.loaded.teaching
        marker = (sequential if params.parallelism == 0 else teaching) if free else None
        rendered = params.calls and chat_template.renders_tools(self.loaded.tokenizer)
        if rendered:
            rendering = chat_template.with_tools(rendering, params.tools or ())
        marker = "\n\n".join(filter(None, [marker, instructions(params, tools_rendered=rendered)])) or None
        ids: list[int] = chat_template.chat_prompt(self.loaded, messages, marker=marker, rendering=rendering)
        return ids

    def _run(self, prompts: list[list[int]], params: SamplingParams, texts: list[Any]) -> list[RequestOutput]:
        submitted: list[list[Response]] = []
        references = self.driver.encode_references(params)
        try:
            for ids in prompts:
                seed = random.getrandbits(63) if params.seed is None else params.seed
                submitted.append([])
                for choice in range(params.n):
                    submitted[-1].append(
                        self.driver.submit(
                            ids,
                            params,
                            choice=choice,
                            seed=seed,
                            positions=self.positions,
                            reference_token_ids=references,
                            keep_events=False,
                        )
                    )
            self.driver.run([response for choices in submitted for response in choices])
        finally:
            for choices in submitted:
                for response in choices:
                    response.cancel()
        return [
            RequestOutput(
                request_id=choices[0].request.id,
                prompt=text if isinstance(text, str) else None,
                prompt_token_ids=tuple(ids),
                outputs=[_output(i, response) for i, response in enumerate(choices)],
            )
            for choices, ids, text in zip(submitted, prompts, texts, strict=True)
        ]


def _output(index: int, response: Response) -> CompletionOutput:
    transcript = response.transcript
    scores = None
    if response.request.params.logprobs is not None:
        scores = [{**dict(d.top_logprobs), d.token: d.logprob or 0.0} for _, d in transcript.scored()]
    return CompletionOutput(
        index=index,
        text=transcript.text,
        token_ids=tuple(one.token for one in linear_tokens(transcript)),
        logprobs=scores,
        finish_reason=transcript.finish_reason,
        transcript=transcript,
    )
