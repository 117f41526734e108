"""One span a request, with OpenTelemetry's attributes for generative AI; nothing of what was said."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as conventions

from tests.server.serving import HELLO, TIPS_TEXT, eventually, playing, serving

KNOWN = {value for name, value in vars(conventions).items() if name.startswith("GEN_AI_")}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield kept
    provider.shutdown()


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    assert eventually(spans.get_finished_spans, 10)
    (found,) = spans.get_finished_spans()
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span(spans: InMemorySpanExporter, stream: bool) -> None:
    with serving(playing()) as served:
        reply = served.client.chat.completions.create(
            model="played", messages=HELLO, stream=stream, temperature=0.5, seed=7, stop=["never"]
        )
        text = "".join(c.choices[0].delta.content or "" for c in reply) if stream else reply.choices[0].message.content
        found = only(spans)
    assert text == TIPS_TEXT
    said = dict(found.attributes or {})
    assert found.name == "chat played" and found.status.is_ok is not False
    assert {name for name in said if name.startswith("gen_ai.")} <= KNOWN
    assert said["gen_ai.operation.name"] == "chat"
    assert said["gen_ai.request.temperature"] == 0.5 and said["gen_ai.request.seed"] == 7
    assert said["gen_ai.response.finish_reasons"] == ("stop",)
    assert 0 < said["pasta.critical_path"] < said["gen_ai.usage.output_tokens"]  # type: ignore[operator]
    assert said["pasta.threads"] == 3
    assert not any("Sleep" in str(value) or "hello" in str(value) for value in said.values())


def test_a_client_that_leaves_is_in_the_status(spans: InMemorySpanExporter) -> None:
    with serving(playing("word " * 1500, step_seconds=0.01)) as served:
        stream = served.client.chat.completions.create(model="played", messages=HELLO, stream=True, max_tokens=1800)
        next(iter(stream))
        stream.close()
        found = only(spans)
    assert not found.status.is_ok
    assert "error.type" in dict(found.attributes or {})
