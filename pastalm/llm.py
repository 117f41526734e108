"""LLM: prompts in, answers out. It loads a model, encodes prompts and collects outputs; `driver` decodes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from pastalm import loading
from pastalm.core.driver import Driver, Response
from pastalm.core.engine import Engine, SamplingParams
from pastalm.core.events import FinishReason
from pastalm.core.interpreter import Limits
from pastalm.core.layout import Policy
from pastalm.core.transcript import Transcript
from pastalm.core.vocabulary import Vocabulary
from pastalm.errors import ModelError, RequestError, check_text
from pastalm.models import EMBEDDED

if TYPE_CHECKING:
    from pastalm.models import Loaded, Rendering

Message: TypeAlias = "Mapping[str, str]"
Prompt: TypeAlias = "str | Sequence[int]"


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer. token_ids: linear order, tags too. logprobs: one {token id: log-probability} a
    token of the text, in document order, if they were asked for."""

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
    """A model that answers asynchronously.

    model: the embedded model's name, a hub name, a folder, or a GGUF file. engine: native, transformers or llama.cpp;
    "auto" is native on a CPU, wherever that can run the model (`loading`, docs/engines.md). adapter: "auto" takes the
    one that ships for this model, None none, else a folder. dtype: of the weights; q8_0 and q4_0 are native's, "auto"
    is what each engine is good at. positions: the policy of layout.py (None: the engine's first). max_num_seqs:
    responses at once; more wait. max_model_len: slots each may fill (None: the model's, 4096 at most). compiled: steps
    of one response as torch.compile makes them on a CPU, faster after minutes (transformers). trust_remote_code: code
    that comes with the model may run. A context manager, which closes it. Raises ModelError, CapabilityError,
    RequestError.
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
        options = loading.Options(
            engine=engine,
            adapter=adapter,
            dtype=dtype,
            device=device,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            compiled=compiled,
            trust_remote_code=trust_remote_code,
        )
        loaded, made = loading.load(model, options)
        self._begin(made, loaded, positions, limits)

    @classmethod
    def over(
        cls,
        engine: Engine,
        loaded: Loaded,
        *,
        positions: Policy | None = None,
        limits: Limits | None = None,
    ) -> LLM:
        """One over an engine that was made elsewhere. loaded: its vocabulary and tokenizer."""
        made = cls.__new__(cls)
        made._begin(engine, loaded, positions, limits)
        return made

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
        """One over a server of OpenAI's completions API: vLLM, SGLang, llama.cpp's (docs/engines.md).

        model: its name there (None: the only one). tokenizer: where its tokenizer and chat template are, a hub name or
        a folder (None: the model's name; where there is none by it, only raw prompts can be sent, as text). prompted:
        the model was not finetuned and is taught the tags in its system message. options: of
        `engines.openai.connect`. Raises RemoteError, ModelError.
        """
        from pastalm import models
        from pastalm.engines.completions.engine import connect

        found: list[Loaded] = []

        def vocabulary(served: str) -> Vocabulary | None:
            try:
                found.append(models.load_tokenizer(tokenizer or served, prompted=prompted))
            except ModelError:
                if tokenizer:
                    raise
                return None
            return found[0].vocabulary

        engine = connect(base_url, model, vocabulary=vocabulary, **options)
        spoken = engine.wire.vocabulary
        if not found:
            words: Any = models.TextTokenizer(None, spoken.encode)
            teaching = models.TEACHING if prompted else None
            loaded = models.Loaded(engine.connection.model, None, words, spoken, False, None, 2048, teaching)
        elif spoken is found[0].vocabulary:
            loaded = found[0]
        else:
            loaded = models.in_pieces(found[0], spoken)
        return cls.over(engine, loaded, positions=positions, limits=limits)

    def _begin(self, engine: Engine, loaded: Loaded, positions: Policy | None, limits: Limits | None) -> None:
        self.positions: Policy = positions or engine.capabilities.positions[0]
        self._parts: tuple[Loaded, Driver] | None = (loaded, Driver(engine, loaded.vocabulary, limits=limits))

    def _open(self) -> tuple[Loaded, Driver]:
        if self._parts is None:
            raise RequestError("this LLM was closed: make another")
        return self._parts

    @property
    def loaded(self) -> Loaded:
        """The model and what goes with it. Raises RequestError once it is closed."""
        return self._open()[0]

    @property
    def driver(self) -> Driver:
        """What it decodes with. Raises RequestError once it is closed."""
        return self._open()[1]

    def close(self) -> None:
        """Cancels what decodes, and frees cache and weights where Python does not; may be called again."""
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
        """Completes raw prompts (text, or token ids), all at once; outputs in their order."""
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
        """Answers one conversation, or several at once, through the model's chat template."""
        params = params or SamplingParams()
        single = not messages or isinstance(messages, str | bytes | Mapping) or isinstance(messages[0], Mapping)
        many: Sequence[Any] = [messages] if single else messages
        return self._run([self._conversation(m, params) for m in many], params, [None] * len(many))

    def stream(self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None) -> Response:
        """Begins one answer (n must be 1): iterate over it for its events as they happen, with `for` or `async for`.
        Answers may be streamed side by side, from several threads too. Raises RequestError, CapabilityError."""
        params = params or SamplingParams()
        if params.n != 1:
            raise RequestError("a stream decodes one answer; n must be 1")
        return self.submit(prompt, params)

    def submit(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams,
        *,
        choice: int = 0,
        seed: int | None = None,
        keep_events: bool = True,
    ) -> Response:
        """Hands one answer to the driver, whose `step` decodes it beside all others; arguments and errors as
        `Driver.submit`'s."""
        return self.driver.submit(
            self.encode(prompt, params),
            params,
            choice=choice,
            seed=seed,
            positions=self.positions,
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
        """Token ids of a raw prompt, or of a conversation as the chat template has it. rendering: of a conversation.
        add_special_tokens: whether a raw prompt begins with what the tokenizer puts before a text. Raises
        RequestError, ModelError."""
        chat = isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        if chat:
            return self._conversation(prompt, params, rendering)
        return self._encode(prompt, add_special_tokens)  # type: ignore[arg-type]

    def _encode(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a raw prompt. A tag's spelling in it is text, other special tokens are themselves."""
        if not isinstance(prompt, str):
            tokens: Any = prompt
            listed = isinstance(tokens, Sequence) and not isinstance(tokens, bytes)
            if not listed or not all(isinstance(token, int) for token in tokens):
                raise RequestError(f"a prompt is text, token ids or messages, not {type(prompt).__name__}")
            return list(tokens)
        from pastalm import models

        check_text(prompt, "the prompt")
        return models.raw_prompt(
            self.loaded.tokenizer, self.loaded.vocabulary, prompt, add_special_tokens=add_special_tokens
        )

    def _conversation(self, messages: Any, params: SamplingParams, rendering: Rendering | None = None) -> list[int]:
        """Token ids of a conversation up to where the answer begins, with the marker of sequential answers where
        the model has one and `params` asks for that, else with what the model has to be taught. Raises RequestError
        for an empty one."""
        from pastalm import models

        listed = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
        if not listed or not all(isinstance(message, Mapping) for message in messages):
            raise RequestError("messages are dictionaries, each with a role and a content")
        if not messages or not str(messages[-1].get("content", "")).strip():
            raise RequestError("the prompt is empty: say something")
        for i, message in enumerate(messages):
            for key, value in message.items():
                if isinstance(value, str):
                    check_text(value, f"{key} of message {i}")
        marker = self.loaded.sequential_marker if params.parallelism == 0 else self.loaded.teaching
        ids: list[int] = models.chat_prompt(self.loaded, messages, marker=marker, rendering=rendering)
        return ids

    def _run(self, prompts: list[list[int]], params: SamplingParams, texts: list[Any]) -> list[RequestOutput]:
        submitted: list[list[Response]] = []
        try:
            for ids in prompts:
                seed = random.getrandbits(63) if params.seed is None else params.seed
                submitted.append([])
                for choice in range(params.n):
                    submitted[-1].append(
                        self.driver.submit(
                            ids, params, choice=choice, seed=seed, positions=self.positions, keep_events=False
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
        scores = [{**dict(d.top_logprobs), d.token: d.logprob or 0.0} for d in transcript.logprobs()]
    return CompletionOutput(
        index=index,
        text=transcript.text,
        token_ids=tuple(token for _, token in transcript.linear_tokens()),
        logprobs=scores,
        finish_reason=transcript.finish_reason,
        transcript=transcript,
    )
