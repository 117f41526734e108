"""How a response is sampled: one table of parameters, which Python, the command line and the HTTP server all read.

A row of the table is a field of `SamplingParams`: its name, type and default, and in `Parameter` (`bounds.py`) one line
of help and its bounds. The checks, the options of `pasta generate` and the fields of an HTTP request are made from
these rows, so a new parameter is one row here, and what it does in `engines/sampling.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from pastalm import bounds
from pastalm.bounds import Parameter
from pastalm.core.layout import Policy
from pastalm.core.vocabulary import Vocabulary
from pastalm.errors import RequestError, check_text, complaint

DRAFTERS = ("lookup", "siblings", "promises", "references", "answers")
"""Names of the drafters, see `engines/drafts`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled; names and defaults as vLLM's. Raises RequestError for bad values.

    The help of each field says what it means. Beside that:
    seed: None draws one.
    ignore_eos: the end token of the model's vocabulary does not end the answer.
    min_tokens: counts the main thread's own tokens, and those of the chunks that it has joined. Until then neither
        the end token nor a token of `stop_token_ids` may be sampled, and stop strings are not looked for.
    stop_token_ids: the token that ends the answer is not part of its text.
    """

    n: Annotated[int, Parameter("Answers to each prompt.", ge=1, served_le=128)] = 1
    temperature: Annotated[float, Parameter("0 is greedy.", ge=0, served_le=2)] = 1.0
    top_p: Annotated[float, Parameter("Nucleus sampling; 1: off.", gt=0, le=1)] = 1.0
    top_k: Annotated[int, Parameter("0: off.", ge=-1, off=0, served_le=2**31)] = 0
    min_p: Annotated[float, Parameter("Smallest share of the top probability; 0: off.", ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Parameter("Above 1: against loops; 1: off.", gt=0, served_le=10)] = 1.0
    seed: Annotated[int | None, Parameter("Makes sampling repeatable.", served_ge=-(2**63), served_le=2**63 - 1)] = None
    stop: Annotated[tuple[str, ...] | list[str] | str | None, Parameter("Ends the answer before this text.")] = None
    max_tokens: Annotated[int, Parameter("Limit on all decoded tokens, tags included.", ge=1)] = 16
    logprobs: Annotated[
        int | None, Parameter("Top log-probabilities returned beside each token's own.", ge=0, le=20)
    ] = None
    logit_bias: Annotated[Mapping[int, float] | None, Parameter("Added to the logits of these token ids.")] = None
    ignore_eos: Annotated[bool, Parameter("The model's end token does not end the answer.")] = False
    min_tokens: Annotated[int, Parameter("Tokens before which the answer cannot end.", ge=0, served_le=2**31 - 1)] = 0
    stop_token_ids: Annotated[tuple[int, ...] | list[int] | None, Parameter("Token ids that end the answer.")] = None
    parallelism: Annotated[float, Parameter("Multiplies the odds of forking; 0 turns it off.", ge=0)] = 1.0
    drafts: Annotated[
        str, Parameter(f"Guesses tokens ahead: auto, off, or some of {','.join(DRAFTERS)}. Never changes the answer.")
    ] = "auto"
    references: Annotated[
        tuple[str, ...] | list[str] | None, Parameter("Texts from which the answer may copy; drafts are taken there.")
    ] = None
    processors: Annotated[
        tuple[Any, ...] | list[Any] | None,
        Parameter("Logits processors: names, (name, settings), or Python objects (engines/processors)."),
    ] = None

    schema: Annotated[
        Mapping[str, Any] | None, Parameter("JSON Schema of the answer, whose fields are threads (docs/structured.md).")
    ] = None
    depends: Annotated[
        Mapping[str, Sequence[str]] | None, Parameter("Fields of the schema -> fields that they wait for.")
    ] = None
    tools: Annotated[
        Sequence[Mapping[str, Any]] | None,
        Parameter("Tools that the model may call: each with name, description, parameters (a JSON Schema)."),
    ] = None
    tool_choice: Annotated[
        str, Parameter("auto, none, required (some tool), or the name of the tool that is to be called.")
    ] = "auto"

    def __post_init__(self) -> None:
        if problem := bounds.first_problem(self, parameters().values()) or complaint(self._checks()):
            raise RequestError(problem)
        for stop in self.stop_strings:
            check_text(stop, "a stop string")
        for reference in self.references or ():
            check_text(reference, "a reference")

    def _checks(self) -> Iterator[tuple[bool, str]]:
        """What no bound of one row can say."""
        yield self.min_tokens <= self.max_tokens, "min_tokens must be in 0..max_tokens"
        yield min(self.stop_token_ids or (0,)) >= 0, "stop_token_ids must be token ids"
        yield all(isinstance(stop, str) for stop in self.stop_strings), "stop must be one text or several"
        yield all(self.stop_strings), "a stop string must not be empty"
        named = self.drafts.split(",") if isinstance(self.drafts, str) else [""]
        known = self.drafts in ("auto", "off") or set(named) <= set(DRAFTERS) and len(set(named)) == len(named)
        yield known, f"drafts must be auto, off, or some of {','.join(DRAFTERS)}, not {self.drafts!r}"
        texts = self.references or ()
        yield isinstance(texts, list | tuple) and all(isinstance(t, str) for t in texts), "references must be texts"
        yield all(map(math.isfinite, (self.logit_bias or {}).values())), "the values of logit_bias must be finite"
        yield isinstance(self.processors or (), list | tuple), "processors must be a list"
        message = "a logits processor is a name, (name, settings), a function, or an object with begin()"
        yield all(map(_is_processor, self.processors or ())), message

    @property
    def calls(self) -> bool:
        """Whether the answer may be, or is, a call of a tool."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def structured(self) -> bool:
        """Whether the form of the answer is given."""
        return self.schema is not None or self.calls

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def drafters(self) -> tuple[str, ...]:
        """Names of the drafters that guess, without those that have nothing to guess from."""
        names = DRAFTERS if self.drafts == "auto" else () if self.drafts == "off" else tuple(self.drafts.split(","))
        return tuple(name for name in names if name != "references" or self.references)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _is_processor(given: Any) -> bool:
    if isinstance(given, list | tuple):
        return len(given) == 2 and isinstance(given[0], str) and isinstance(given[1], Mapping)
    return isinstance(given, str) or callable(given) or hasattr(given, "begin")


@cache
def parameters() -> Mapping[str, Parameter]:
    """The table: each row by its name, in the order of `SamplingParams`."""
    return bounds.table(SamplingParams)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One response to decode. id is unique among the engine's unfinished requests.

    seed and choice with the thread's path and token index give every token its own noise.
    logit_bias: the request's, tags' biases included, added before anything else.
    positions: the policy of layout.py.
    reference_token_ids: of each text that the answer may copy from.
    owner: on whose behalf it is; earlier answers serve as drafts for the same owner only.
    vocabulary: of the model, for logits processors that read tokens (None: unknown).
    guide: what a thread writes next, for an engine that guides instead of masking: {"regex": …} or {"json": a schema}.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    choice: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    positions: Policy = "promised"
    reference_token_ids: tuple[tuple[int, ...], ...] = ()
    owner: str = ""
    vocabulary: Vocabulary | None = field(default=None, repr=False, compare=False)
    guide: Callable[[tuple[int, ...]], Any] | None = field(default=None, repr=False, compare=False)
