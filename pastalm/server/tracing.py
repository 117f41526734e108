"""One OpenTelemetry span for each request.

Attributes follow its conventions for generative AI (`gen_ai.*`); `pasta.parallelism`, `pasta.critical_path`,
`pasta.passes`, `pasta.drafted`, `pasta.accepted` and `pasta.threads` are added. Prompts and answers are not recorded.
Spans cost nothing unless an SDK is configured:

    opentelemetry-instrument pasta serve MODEL
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.util.types import AttributeValue

from pastalm.core.params import SamplingParams
from pastalm.server.answers import ServedAnswer


@contextmanager
def span(operation: str, model: str, params: SamplingParams) -> Iterator[Span]:
    """A span around a request. An exception becomes its status.

    operation: chat or text_completion.
    model: the model's name for clients.
    params: of the request.
    """
    span_attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "pastalm",
        "gen_ai.request.model": model,
        "gen_ai.request.choice.count": params.n,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.stop_sequences": params.stop_strings,
        "pasta.parallelism": params.parallelism,
    }
    if params.seed is not None:
        span_attributes["gen_ai.request.seed"] = params.seed
    tracer = trace.get_tracer("pastalm")
    with tracer.start_as_current_span(
        f"{operation} {model}",
        kind=SpanKind.SERVER,
        attributes=span_attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as request_span:
        try:
            yield request_span
        except BaseException as error:
            request_span.set_attribute("error.type", type(error).__name__)
            request_span.set_status(StatusCode.ERROR)
            raise


def answered(request_span: Span, model: str, prompt_tokens: int, answers: Sequence[ServedAnswer]) -> None:
    """Sets a span's attributes for the answers. If one is unfinished (the client disconnected, or its stream ended with
    an error), the span has failed.

    request_span: from `span`.
    model: the model's name for clients.
    prompt_tokens: tokens of all prompts.
    answers: one for each choice.
    """
    each = [answer.transcript for answer in answers]
    if not all(t.finished for t in each):
        request_span.set_attribute("error.type", "unfinished")
        request_span.set_status(StatusCode.ERROR)
    request_span.set_attributes(
        {
            "gen_ai.response.model": model,
            "gen_ai.response.finish_reasons": [t.finish_reason or "abort" for t in each],
            "gen_ai.usage.input_tokens": prompt_tokens,
            "gen_ai.usage.output_tokens": sum(t.tokens for t in each),
            "pasta.critical_path": max(t.critical_path for t in each),
            "pasta.passes": sum(t.passes for t in each),
            "pasta.drafted": sum(t.drafted.total() for t in each),
            "pasta.accepted": sum(t.accepted.total() for t in each),
            "pasta.threads": sum(len(t.threads) for t in each),
        }
    )
