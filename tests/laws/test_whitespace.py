"""Nothing runs into a chunk: where one ends and more follows, the text before ends in white space, in what training is
made of as in what is decoded; and the same text is read from the answer, the stream, its trace and its linear form."""

from __future__ import annotations

import io

from hypothesis import given, settings
from hypothesis import strategies as st

from pastalm.cli.view import Plain
from pastalm.core.interpreter import Limits
from pastalm.core.language import AsyncClose, Text
from pastalm.core.params import SamplingParams
from pastalm.core.transcript import Transcript
from pastalm.llm import LLM
from pastalm.records.documents import Document, linearize, nest, parse, strip
from pastalm.records.traces import from_json, to_json
from pastalm.train.structure import annotate
from tests.server.serving import playing
from tests.strategies import documents


def apart(document: Document) -> bool:
    """Whether white space stands between every chunk's end and what follows it."""
    marks, text = linearize(document), ""
    ends = []
    for mark in marks:
        if isinstance(mark, Text):
            text += mark.text
        elif isinstance(mark, AsyncClose):
            ends.append(len(text))
    return all(end == len(text) or text[end - 1 : end + 1].strip() != text[end - 1 : end + 1] for end in ends if end)


heads = st.sampled_from(["Tips:", "Here are some.", "", "# Tips", "**Tips**"])
marks = st.sampled_from(["{n}. ", "{n}) ", "- ", "* ", "## Part {n}\n\n", "**Part {n}**: ", "{n}. **Tip**: "])
bodies = st.lists(
    st.sampled_from(["Sleep eight hours and rise at dawn.", "Venmo", "Eat fresh greens and oats!", "(see above)"]),
    min_size=1,
    max_size=5,
).map(" ".join)
gaps = st.sampled_from(["\n", "\n\n", " \n", "\n \n", "\r\n", " ", "", "\t", "\u00a0", "\u2028"])


@st.composite
def answers(draw: st.DrawFn) -> str:
    """Lists and sections as models write them, also such as run together."""
    mark, parts = draw(marks), draw(st.lists(bodies, min_size=2, max_size=5))
    gap = draw(gaps)
    whole = [f"{body} {'It helps most people. ' * 6}".rstrip() for body in parts]
    items = gap.join(mark.format(n=i) + body for i, body in enumerate(whole, 1))
    return draw(heads) + draw(gaps) + items + draw(st.sampled_from(["", "\n", "\n\nAll of it takes time."]))


@settings(max_examples=150)
@given(answers())
def test_training_data_keeps_chunks_apart(response: str) -> None:
    document = annotate(response, lambda text: len(text) // 4 + 1)
    assert strip(document) == response
    assert apart(document)


@settings(max_examples=60)
@given(documents(depth=2, size=4), st.integers(1, 120), st.booleans())
def test_what_is_read_is_the_same_everywhere(script: Document, most: int, sequential: bool) -> None:
    llm: LLM = playing(script)
    llm.driver.limits = Limits(max_position=None)
    out = io.StringIO()
    plain, lines, shown = Plain(out), [], ""
    params = SamplingParams(temperature=0, max_tokens=most, parallelism=float(not sequential))
    stream = llm.stream("x", params)
    for event in stream:
        plain.apply(event)
        lines.append(to_json(event))
        shown += stream.transcript.certain(start=len(shown))
    plain.close()
    transcript = stream.transcript
    assert transcript.finished and apart(nest(transcript.marks()))
    text = transcript.text
    assert shown == text and out.getvalue().removesuffix("\n") == text.removesuffix("\n")
    assert strip(parse(transcript.annotated)) == text == Transcript(map(from_json, lines)).text


def test_the_law_can_fail() -> None:
    assert not apart(parse('<promise topic="a" tokens="10"/><async>Venmo</async>3. Can I'))
    assert apart(parse('<promise topic="a" tokens="10"/><async>Venmo\n</async>3. Can I'))
