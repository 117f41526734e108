"""Speculative decoding without a draft model: drafts are copied from known text and verified. Lossless.

- Prompt lookup (Saxena, "Prompt lookup decoding", 2023): what followed the last few tokens earlier, in the prompt or
  in the answer so far, is the draft.
- LLMA (Yang et al., "Inference with reference: lossless acceleration of large language models", 2023): what followed
  them in given references is.

One forward pass verifies a draft: its tokens are accepted up to the first that differs from the greedy prediction. The
answer is therefore the same as with sequential greedy decoding. The speedup depends on how much of it can be copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from pastalm.answering import Task
from pastalm.core.language import Text
from pastalm.core.params import SamplingParams
from pastalm.errors import CapabilityError
from pastalm.llm import LLM
from pastalm.records import answers
from pastalm.records.answers import Answer
from pastalm.records.documents import render
from pastalm.records.prompts import Prompt
from pastalm.records.transcripts import linear_tokens

SEQUENTIAL = SamplingParams(temperature=0, parallelism=0)

Propose = Callable[[Sequence[int]], Sequence[int]]
"""Prompt and answer so far -> tokens that may come next."""


def lookup(tokens: Sequence[int], source: Sequence[int], *, longest: int, shortest: int, draft: int) -> list[int]:
    """Up to `draft` tokens that followed the last occurrence in `source` of the longest run of tokens, from
    `shortest` to `longest`, that `tokens` ends with; [] if there is none."""
    for size in range(min(longest, len(tokens)), shortest - 1, -1):
        tail = list(tokens[-size:])
        for start in range(len(source) - size - 1, -1, -1):
            if list(source[start : start + size]) == tail:
                return list(source[start + size : start + size + draft])
    return []


@dataclass(frozen=True, slots=True)
class DraftedAnswer:
    """An answer decoded with drafts.

    tokens: of the answer, with the end token if it was sampled.
    passes: forward passes, including the prompt's.
    first: seconds to the first token.
    """

    tokens: list[int]
    passes: int
    first: float


Greedy = Callable[[int, Sequence[int]], Sequence[int]]
"""(number of cached tokens, new tokens) -> the greedy prediction after each new token."""


def verify(
    greedy: Greedy, prompt: Sequence[int], propose: Propose, *, max_tokens: int, ends: frozenset[int]
) -> DraftedAnswer:
    """Greedy decoding that verifies drafts.

    greedy: the model.
    prompt: token ids.
    propose: gives drafts.
    max_tokens: limit of the answer.
    ends: ids that end the answer.
    """
    started = time.perf_counter()
    tokens = [greedy(0, prompt)[-1]]
    first, passes = time.perf_counter() - started, 1
    while tokens[-1] not in ends and len(tokens) < max_tokens:
        draft = list(propose([*prompt, *tokens]))[: max_tokens - len(tokens) - 1]
        predictions = greedy(len(prompt) + len(tokens) - 1, [tokens[-1], *draft])
        passes += 1
        accepted = next((i for i, token in enumerate(draft) if token != predictions[i]), len(draft))
        for token in predictions[: accepted + 1]:
            tokens.append(token)
            if token in ends:
                break
    return DraftedAnswer(tokens, passes, first)


@torch.inference_mode()
def decode(
    model: Any, prompt: Sequence[int], propose: Propose, *, max_tokens: int, ends: frozenset[int], never: Sequence[int]
) -> DraftedAnswer:
    """`verify` with a transformers model.

    model: of transformers.
    prompt, propose, max_tokens, ends: as in `verify`.
    never: ids that must not be sampled.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    banned = torch.tensor(list(never), dtype=torch.long, device=model.device)

    def greedy(cached: int, fed: Sequence[int]) -> list[int]:
        if surplus := cache.get_seq_length() - cached:  # tokens of a rejected draft
            cache.crop(-surplus)
        logits = model(
            input_ids=torch.tensor([list(fed)], device=model.device),
            position_ids=torch.arange(cached, cached + len(fed), device=model.device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=len(fed) if cached else 1,
        ).logits[0]
        logits[:, banned] = -torch.inf
        predictions: list[int] = logits.argmax(-1).tolist()
        return predictions

    return verify(greedy, prompt, propose, max_tokens=max_tokens, ends=ends)


def along(prompt: Sequence[int], tokens: Sequence[int], propose: Propose, *, max_tokens: int) -> DraftedAnswer:
    """`verify` for a known greedy answer, to count the passes that it would take.

    prompt, propose, max_tokens: as in `verify`.
    tokens: the answer.
    """

    def greedy(cached: int, fed: Sequence[int]) -> list[int]:
        begin = max(0, cached + 1 - len(prompt))
        return [*tokens[begin : begin + len(fed)], *[-1] * len(fed)][: len(fed)] if cached else [tokens[0]]

    return verify(greedy, prompt, propose, max_tokens=min(max_tokens, len(tokens)), ends=frozenset())


@dataclass(slots=True)
class Copying:
    """A system that decodes with copied drafts.

    name: of the system.
    llm: the baseline's model.
    source: "prompt": prompt lookup; "references": LLMA, from the prompt's references.
    longest, shortest: number of tokens that must match.
    draft: number of tokens that are copied.

    Raises CapabilityError for a model that does not run on transformers.
    """

    name: str
    llm: LLM
    source: Literal["prompt", "references"] = "prompt"
    longest: int = 3
    shortest: int = 2
    draft: int = 10

    def __post_init__(self) -> None:
        if not hasattr(self.llm.loaded.model, "get_decoder"):
            raise CapabilityError("copying verifies drafts by transformers: choose that engine, and no GGUF file")

    def answer(self, prompt: Prompt, max_tokens: int) -> Answer:
        """See `System`. Critical path: forward passes."""
        started = time.perf_counter()
        decoded = self.decode(prompt, max_tokens)
        seconds = time.perf_counter() - started
        return self._answer(prompt, decoded, first_seconds=round(decoded.first, 4), seconds=round(seconds, 4))

    def task(self, prompt: Prompt, max_tokens: int) -> Task[Answer]:
        """See `System`. The engine decodes the answer sequentially, and the passes that copying would have taken are
        counted. Times are not measured."""
        prompt_ids, params = self.prompt_ids(prompt), replace(SEQUENTIAL, max_tokens=max_tokens)
        response = self.llm.driver.submit(prompt_ids, params, positions=self.llm.positions, keep_events=False)
        yield [response]
        tokens = [one.token for one in linear_tokens(response.transcript)]
        return self._answer(prompt, along(prompt_ids, tokens, self._proposer(prompt), max_tokens=max_tokens))

    def _answer(self, prompt: Prompt, decoded: DraftedAnswer, **seconds: float) -> Answer:
        vocabulary = self.llm.loaded.vocabulary
        ended = decoded.tokens[-1] in vocabulary.eos
        text = vocabulary.text(decoded.tokens[:-1] if ended else decoded.tokens)
        return answers.to(
            prompt,
            sequential=True,
            annotated=render((Text(text),)) if text else "",
            tokens=len(decoded.tokens),
            critical_path=decoded.passes,
            steps=decoded.passes,
            finish_reason="stop" if ended else "length",
            **seconds,
        )

    def _proposer(self, prompt: Prompt) -> Propose:
        references = [self.llm.loaded.vocabulary.encode(text) for text in prompt.references]

        def propose(tokens: Sequence[int]) -> Sequence[int]:
            for source in [tokens] if self.source == "prompt" else references:
                continuation = lookup(tokens, source, longest=self.longest, shortest=self.shortest, draft=self.draft)
                if continuation:
                    return continuation
            return []

        return propose

    def decode(self, prompt: Prompt, max_tokens: int) -> DraftedAnswer:
        """The answer's tokens, those of sequential greedy decoding."""
        vocabulary = self.llm.loaded.vocabulary
        return decode(
            self.llm.loaded.model,
            self.prompt_ids(prompt),
            self._proposer(prompt),
            max_tokens=max_tokens,
            ends=frozenset(vocabulary.eos),
            never=vocabulary.tags.ids if vocabulary.tags else (),
        )

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of the prompt, rendered as for sequential decoding."""
        return self.llm.encode([{"role": "user", "content": prompt.text}], SEQUENTIAL)
