"""The structural annotator: text is kept, topics are good, only independent parts are promised."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pastalm.core.language import MAX_LENGTH, Promise, Sync, Text, round_length, topic_key
from pastalm.records.documents import Async, Document, parse, render, strip
from pastalm.train.structure import MAX_GROUP, annotate, critical_path, for_one_thread


def words(text: str) -> int:
    """A stand-in for a tokenizer, one with a small vocabulary."""
    return round(len(text) / 3) if len(text) > 4 else len(text.split())


def promises(document: Document) -> list[Promise]:
    return [node for node in document if isinstance(node, Promise)]


def topics(document: Document) -> list[str]:
    return [promise.topic for promise in promises(document)]


def chunks(document: Document) -> list[str]:
    return [strip(node.body) for node in document if isinstance(node, Async)]


def groups(document: Document) -> list[list[str]]:
    """Topics of the promises between one sync and the next."""
    found: list[list[str]] = [[]]
    for node in document:
        if isinstance(node, Sync):
            found.append([])
        elif isinstance(node, Promise):
            found[-1].append(node.topic)
    return found


def annotated(response: str, prompt: str = "") -> Document:
    document = annotate(response, words, prompt=prompt)
    assert strip(document) == response
    assert strip(parse(render(document))) == response
    return document


LONG = "and that is explained here at some length so that writing it apart is worth the trouble"

# ---------------------------------------------------------------------------------- properties

fragments = st.sampled_from(
    [
        "Here are some tips:",
        "Overall, it helps.",
        "# Travel",
        "## Food and drink",
        "**Rest**",
        "**Sleep**: nights are for sleeping, " + LONG,
        "Advantages:",
        "Disadvantages:",
        "Day 1: Harbour walk and museum",
        "Day 2: Old town",
        "Step 1: Open the box",
        "[Header]",
        "II. Methods",
        "2.1 Scope",
        "Physics\n-------",
        "First, the engine is loud, " + LONG,
        "Second, the brakes are weak, " + LONG,
        "One reason is the price, " + LONG,
        "Another reason is the weight, " + LONG,
        "```python\n1. not a list\n# nor a heading\n```",
        "```",
        "| a | b |\n| - | - |",
        '<promise topic="x" tokens="10"/><async>typed</async><sync/>',
        "It also rains.",
        "Then it stops.",
        "",
        "   ",
        "Sam: hello there",
        "日本語のテキスト。",
    ]
)
names = st.sampled_from(
    [
        "Drink water",
        "Walk daily",
        "**Read books**",
        "Sleep",
        "Deal with",
        "Look For A",
        "LOOK FOR",
        "A part of the",
        "Where to",
        "Vitamin A",
        "The",
        "it",
        "Café",
        "C++",
        "\u200b",
        "",
    ]
)
items = st.builds(
    lambda mark, name, sep, tail: f"{mark}{name}{sep}{tail}",
    st.sampled_from(["1. ", "2. ", "3) ", "10. ", "- ", "* ", "\u2022 ", "  - ", "\t* ", "1."]),
    names,
    st.sampled_from([": ", " - ", " ", ":\n   - sub item\n", "\n\n   "]),
    st.sampled_from([LONG, "short", "this one is in the middle, " + LONG, "x = 3 * 4", ""]),
)
responses = st.lists(st.tuples(st.one_of(fragments, items), st.sampled_from(["\n", "\n\n", ""]))).map(
    lambda pairs: "".join(a + b for a, b in pairs)
)


ENDLESS = "a|an|the|of|to|in|on|at|by|for|from|with|into|and|or|but|as|your|their|is|are|that|which"
OPEN_ENDS = {form for word in ENDLESS.split("|") for form in (word, word.title(), word.upper())} - {"A"}
"""Words after which a topic is not at its end. "A" may be a letter, as in "Vitamin A"."""


@settings(max_examples=400, deadline=None)
@given(st.one_of(responses, st.text(), st.text(alphabet="1.-*#: \n\r\tab<`|")))
def test_any_text_is_kept_and_every_document_is_well_formed(response: str) -> None:
    document = annotate(response, words)
    assert strip(document) == response
    assert strip(parse(render(document))) == response
    assert parse(render(document)) == document


@settings(max_examples=400, deadline=None)
@given(responses)
def test_promises_are_valid_distinct_few_and_worth_it(response: str) -> None:
    document = annotate(response, words)
    for group in groups(document):
        assert len(set(map(topic_key, group))) == len(group) <= MAX_GROUP
        assert len(group) != 1
    for promise, chunk in zip(promises(document), chunks(document), strict=True):
        assert promise.tokens == round_length(words(chunk))
        assert words(chunk) <= MAX_LENGTH
        assert not set("\"'*`\n<>") & set(promise.topic)
        assert promise.topic.split()[-1] not in OPEN_ENDS
    if promises(document):
        assert critical_path(document, words) < words(response)


@settings(max_examples=300, deadline=None)
@given(responses)
def test_text_after_a_group_waits_for_it_unless_it_is_a_title(response: str) -> None:
    document = annotate(response, words)
    for before, node, after in zip(document, document[1:], (*document[2:], None), strict=False):
        if isinstance(before, Async) and isinstance(node, Text):
            assert isinstance(after, Promise), "only the title of a group may follow another at once"
            assert len(node.text.split("\n")) <= 6
    assert not document or not isinstance(document[-1], Sync)
    assert not document or not isinstance(document[0], Sync)


# -------------------------------------------------------------------------------- what is found

TIPS = {
    "Drink water": "Water keeps the mind clear during long afternoons and carries nutrients.",
    "Walk daily": "Half an hour outside every day strengthens the heart and lifts a low mood.",
    "Sleep enough": "Eight hours of rest let memories settle and give muscles time to repair.",
}


def listed(marker: str, form: str = "{name}: {text}", sep: str = "\n") -> str:
    """TIPS as a list; `{n}` in the marker counts."""
    return sep.join(
        marker.format(n=n) + form.format(name=name, text=text) for n, (name, text) in enumerate(TIPS.items(), 1)
    )


@pytest.mark.parametrize("marker", ["{n}. ", "{n}) ", "- ", "* ", "\u2022 ", "1. "])
@pytest.mark.parametrize("form", ["{name}: {text}", "**{name}**: {text}", "**{name}:** {text}"])
@pytest.mark.parametrize("sep", ["\n", "\n\n"])
def test_items_of_a_list(marker: str, form: str, sep: str) -> None:
    body = listed(marker, form, sep)
    document = annotated(f"Some tips:\n\n{body}\n\nOverall, small habits count.")
    counts = "{n}" in marker
    assert topics(document) == [f"{n}. {name}" if counts else name for n, name in enumerate(TIPS, 1)]
    assert "".join(chunks(document)) == body + "\n\n"
    assert document[0] == Text("Some tips:\n\n")
    assert document[-2:] == (Sync(), Text("Overall, small habits count."))


def test_a_response_that_ends_with_its_group_needs_no_sync() -> None:
    document = annotated("Some tips:\n\n" + listed("- ") + "\n")
    assert Sync() not in document
    assert isinstance(document[-1], Async)


def test_an_item_holds_its_sub_bullets_its_paragraphs_and_its_code() -> None:
    items = [
        "1. Option red\n   - cheap to make and easy to find in any shop\n   - fades in the sun\n\n",
        "2. Option blue\n   - costs more but lasts for many years outdoors\n   - hard to mix\n\n",
        "3. Option green\n\n   ```\n   4. inside code\n   ```\n   Needs two coats on walls.\n",
    ]
    document = annotated("Options:\n\n" + "".join(items))
    assert chunks(document) == items


def test_the_last_item_takes_the_shape_of_the_others() -> None:
    items = [f"{n}. {name}:\n\n{text}\n\n" for n, (name, text) in enumerate(TIPS.items(), 1)]
    document = annotated("Tips:\n\n" + "".join(items) + "Anything else is a bonus for your week.")
    assert chunks(document) == items


SECTIONS = {
    "Climate": "Summers are dry and hot, winters are mild, and most rain falls in late autumn.",
    "Local food": "Bakeries open early, markets sell cheese and olives, and dinner starts at nine.",
    "Getting around": "Trams cross the centre every ten minutes, and bicycles are for hire.",
}


@pytest.mark.parametrize(
    "form",
    [
        "## {name}\n\n{text}\n\n",
        "**{name}**\n{text}\n\n",
        "**{name}:**\n\n{text}\n\n",
        "{name}:\n{text}\n\n",
        "[{name}]\n\n{text}\n\n",
        "{name}\n------\n{text}\n\n",
        "**{name}**: {text}\n\n",
        "{name}: {text}\n\n",
    ],
)
def test_titled_sections(form: str) -> None:
    parts = [form.format(name=name, text=text) for name, text in SECTIONS.items()]
    document = annotated("A portrait of the town.\n\n" + "".join(parts) + "Overall, it is worth a visit.")
    assert topics(document) == list(SECTIONS)
    assert chunks(document) == parts
    assert Sync() in document


def test_days_are_named_by_number_and_place() -> None:
    days = [
        "Day 1: Harbour\nWalk along the piers, eat fish, and watch the boats come in at dusk.\n\n",
        "Day 2: Museums\nSpend the morning with paintings and the afternoon with old machines.\n\n",
        "Day 3: Mountains\nTake the early bus, climb to the chapel, and picnic above the lake.\n\n",
    ]
    document = annotated("A plan:\n\n" + "".join(days))
    assert topics(document) == ["Day 1 Harbour", "Day 2 Museums", "Day 3 Mountains"]


def test_enumerated_paragraphs() -> None:
    reasons = [
        "First, cotton breathes well, which keeps the skin dry even on very humid days.\n\n",
        "Second, wool holds warmth when wet, so sailors have relied on it for centuries.\n\n",
        "Third, linen dries quickly, which makes washing on a journey much less of a chore.\n\n",
    ]
    document = annotated("Fabrics differ a lot.\n\n" + "".join(reasons) + "In short, choose well.")
    assert chunks(document) == reasons


def test_a_title_between_two_groups_joins_them() -> None:
    good = "".join(f"- {n}: {t}\n" for n, t in TIPS.items())
    bad = "".join(f"- {n}: {t}\n" for n, t in SECTIONS.items())
    document = annotated(f"It helps to do this:\n\n{good}\nTravel comforts:\n\n{bad}")
    assert Sync() not in document
    assert len(promises(document)) == 6
    document = annotated(f"It helps to do this:\n\n{good}\nThat was one side; here is more:\n\n{bad}")
    assert document.count(Sync()) == 1


def test_groups_are_parted_where_they_grow_too_long() -> None:
    nouns = "apples bread carrots dates eggs figs garlic honey ice jam kale lemons milk nuts oats "
    nouns += "pears quinces rice salt tea"
    body = "".join(
        f"- {noun}: bought fresh every week at the small market behind the old town hall\n" for noun in nouns.split()
    )
    found = groups(annotated("Shopping:\n\n" + body))
    assert [len(group) for group in found] == [10, 10]


def test_topics_say_what_the_item_is_about() -> None:
    body = (
        "1. Partner with local restaurants and small vendors who cannot market themselves today.\n"
        "2. Offer packaging that survives long journeys on uneven roads and in heavy rain.\n"
        "3. The quality of IT support decides how happy customers are with the whole service.\n"
    )
    found = topics(annotate("Ideas:\n\n" + body, lambda text: 2 * len(text.split())))
    assert found == ["1. Partner local restaurants", "2. Offer packaging survives", "3. quality IT support"]


@pytest.mark.parametrize("form", ["{n}. {lead}: {text}", "{n}) **{lead}** - {text}", "{n}. {lead} {text}"])
@pytest.mark.parametrize(
    "lead", ["Eat", "Eat a balanced diet", "Deal with the", "Look for a new and better job", "Vitamin {n}"]
)
def test_a_number_takes_no_word_from_the_topic(form: str, lead: str) -> None:
    texts = [
        "apples and pears from the old orchard every single morning before the school bus arrives.",
        "soup with fresh herbs from the balcony whenever the evenings turn cold and grey again.",
        "bread that was baked at home on a quiet Sunday with flour from the mill next door.",
    ]
    body = "".join(form.format(n=n, lead=lead.format(n="ABC"[n - 1]), text=t) + "\n" for n, t in enumerate(texts, 1))
    plain = topics(annotated("Ideas:\n\n" + re.sub(r"(?m)^\d[.)]", "-", body)))
    assert len(plain) == 3
    assert topics(annotated("Ideas:\n\n" + body)) == [f"{n}. {topic}" for n, topic in enumerate(plain, 1)]


def test_topics_that_would_be_the_same_are_told_apart() -> None:
    body = "".join(
        f"- Use a strong password for {thing}, and change it whenever somebody leaves the team\n"
        for thing in ["banking", "mail", "shopping"]
    )
    found = topics(annotated("Rules:\n\n" + body))
    assert len({topic.casefold() for topic in found}) == 3


# ------------------------------------------------------------------------- what is left alone

DEPENDENT = [
    "It also keeps the joints moving, which many people forget when they sit all day long.",
    "This makes the effect of the morning walk last until the evening for most people.",
    "Then the body is ready for a longer run through the park with a friend or two.",
    "Finally, everything comes together and the whole routine needs no more effort at all.",
    "However, none of it helps without patience over at least a couple of months or more.",
    "Stretching: As mentioned above, the muscles should be warm before anything else is done.",
    "Stretching: Repeat the previous exercise with the other leg and hold it a little longer.",
    "Stretching: Use the result of step 2 and hold the position for about half a minute.",
    "Runners also profit from it, whatever their age and whatever the distance they choose.",
    "Stretching: Once you have finished that, sit down slowly and relax your shoulders well.",
    "Stretching: Do the same as before, only slower and with both hands on the ground.",
    "Conclusion: small habits are what counts, more than any single effort in a year.",
]


@pytest.mark.parametrize("sentence", DEPENDENT)
def test_an_item_that_leans_on_another_is_written_after_the_sync(sentence: str) -> None:
    document = annotated(f"Some tips:\n\n{listed('- ')}\n- {sentence}\n")
    assert topics(document) == list(TIPS)
    assert isinstance(document[-1], Text)
    assert document[-2] == Sync()


def test_a_list_of_which_most_items_lean_is_left_alone() -> None:
    body = "\n".join(f"- {sentence}" for sentence in DEPENDENT[:6])
    assert not promises(annotated(f"Some notes:\n\n{listed('- ')}\n{body}\n"))


@pytest.mark.parametrize(
    ("response", "prompt"),
    [
        ("Yes.", ""),
        ("1. Red\n2. Blue\n3. Green\n4. Yellow", "Name four colours"),
        (
            "Follow these steps:\n\n1. Open the settings page in the right corner of the window.\n"
            "2. Choose the account that should receive the messages from now on.\n"
            "3. Save the form and wait for the message that confirms the change.\n",
            "",
        ),
        (
            "1. Preheat the oven to 200 degrees and line a large tray with paper.\n"
            "2. Whisk flour, sugar and eggs in a bowl until there are no lumps left.\n"
            "3. Simmer the berries for ten minutes with two tablespoons of water.\n",
            "Give me a recipe",
        ),
        (
            "1. First, write down everything that you spend during one ordinary week.\n"
            "2. Group the numbers by kind, such as food, rent, travel and pleasure.\n"
            "3. Look for the two largest groups and think about what could shrink.\n",
            "",
        ),
        (
            "1. Distance: the train covers 60 * 3 = 180 km in the first three hours.\n"
            "2. Rest: 300 - 180 = 120 km are left, so x = 120 is what we need now.\n"
            "3. Time: 120 / 40 = 3 hours more, so the answer is 6 hours in total.\n",
            "How long does the journey take?",
        ),
        (
            "1. Load the data:\n```python\nrows = load('a.csv')\n```\nThis reads all the rows.\n"
            "2. Count the rows:\n```python\nprint(len(rows))\n```\nThis prints how many.\n"
            "3. Plot the rows:\n```python\nplot(rows)\n```\nThis shows them at once.\n",
            "Show me the data",
        ),
        (
            "The fox left the den at dawn and looked for something to eat in the snow.\n\n"
            "Near the river the fox met a hare who was too clever to be caught that day.\n\n"
            "At night the fox came home hungry and dreamt of the summer that was over.\n",
            "Write a story about a fox",
        ),
        (
            "[Verse 1]\nThe road is long and the night is cold\n\n[Chorus]\nWe sing along to the "
            "end\n\n[Verse 2]\nThe lamp is low and the fire is warm\n\n[Bridge]\nHold on to me",
            "",
        ),
        (
            "Anna: I thought you had left the city for good after what happened last year.\n\n"
            "Boris: Not at all, I only moved to the other side of the river, near the mill.\n\n"
            "Anna: Then we should meet more often and talk about the garden you once had.\n\n"
            "Boris: With pleasure, although the garden has become a car park, as you know.\n",
            "",
        ),
        (
            "Name: Mira Holt, known to her friends as the quiet one of the three sisters\n\n"
            "Age: Thirty-four, though most people in the harbour take her for much younger\n\n"
            "Occupation: Repairs clocks in a small shop that once belonged to an uncle\n",
            "Invent somebody",
        ),
        (
            "Step 1: Understand the question\nThe reader wants to know when it was built.\n\n"
            "Step 2: Look it up\nThe bridge was built between 1880 and 1884 by two brothers.\n\n"
            "Step 3: Give the answer\nThe bridge was built in four years and opened in 1884.\n",
            "When was the bridge built?",
        ),
        (
            "```\n1. Drink water: it keeps the mind clear during long afternoons at the desk\n"
            "2. Walk daily: half an hour outside every day strengthens the heart a lot\n"
            "3. Sleep enough: eight hours of rest let memories settle over the night\n```\n",
            "",
        ),
        (
            "| Tip | Why |\n| --- | --- |\n"
            "| - Drink water | it keeps the mind clear during long afternoons at the desk |\n"
            "| - Walk daily | half an hour outside every day strengthens the heart a lot |\n"
            "| - Sleep enough | eight hours of rest let memories settle over the night |\n",
            "",
        ),
        (
            "Cats sleep for most of the day because hunting costs them so much energy.\n\n"
            "Their eyes are made for dusk, when mice and birds come out to feed.\n\n"
            "Most owners notice that the animal grows lively just before sunset.\n",
            "Tell me about cats",
        ),
    ],
)
def test_parts_that_depend_on_each_other_are_left_alone(response: str, prompt: str) -> None:
    assert annotated(response, prompt) == (Text(response),)


RECIPE = (
    "1. Preheat the oven to 200 degrees and line a large tray with paper from the roll.\n"
    "2. Whisk flour, sugar and eggs in a bowl until there are no lumps left in the batter.\n"
    "3. Simmer the berries for ten minutes with two tablespoons of water and some lemon juice.\n"
)


@pytest.mark.parametrize(
    ("response", "prompt", "alone"),
    [
        (RECIPE, "Give me a recipe", True),
        ("1. Red\n2. Blue\n3. Green\n4. Yellow", "Name four colours", True),
        ("Some tips:\n\n" + listed("- "), "Give me tips", False),
        (f"{RECIPE}\n\n## Tips\n\n{listed('- ')}", "Give me a recipe", False),
        ("Some notes:\n\n" + "\n".join(f"- {sentence}" for sentence in DEPENDENT[:6]), "Any notes?", False),
        ("No list at all.", "", False),
    ],
)
def test_what_is_one_threads_to_write_is_known(response: str, prompt: str, alone: bool) -> None:
    assert for_one_thread(response, words, prompt=prompt) is alone


@settings(max_examples=200, deadline=None)
@given(responses)
def test_what_is_promised_is_not_one_threads_to_write(response: str) -> None:
    assert not (promises(annotate(response, words)) and for_one_thread(response, words))


def test_explained_steps_with_names_stand_on_their_own() -> None:
    response = "Follow these steps:\n\n" + listed("{n}. ", "**{name}**: {text}")
    assert len(promises(annotated(response))) == 3


def test_a_part_too_long_for_a_promise_stays_in_the_main_thread() -> None:
    long = "- History: " + "the town grew slowly around its harbour and its church. " * 60
    document = annotated(f"Notes:\n\n{listed('- ')}\n{long}\n")
    assert topics(document) == list(TIPS)


def test_a_last_title_without_its_text_is_not_promised() -> None:
    parts = [f"{n}. {name}\n\n{text}\n\n" for n, (name, text) in enumerate(SECTIONS.items(), 1)]
    document = annotated("".join(parts) + "4. History\n\nFinally, the past explains the walls.")
    assert topics(document) == [f"{n}. {name}" for n, name in enumerate(SECTIONS, 1)]


def test_topics_hold_no_links_and_no_numbers_of_headings() -> None:
    parts = [f"### **{n}. {name}**\n\n{text}\n\n" for n, (name, text) in enumerate(SECTIONS.items(), 1)]
    assert topics(annotated("".join(parts))) == list(SECTIONS)
    links = "".join(
        f"- {name} (<https://www.example.org/{i}/about-us-and-more>)\n"
        for i, name in enumerate(["Harbour Trust", "Garden Circle", "Tower Friends"])
    )
    assert not any("www" in t or "example" in t for t in topics(annotated("Clubs:\n\n" + links)))


def test_conclusions_are_not_promised() -> None:
    parts = "".join(f"## {name}\n\n{text}\n\n" for name, text in SECTIONS.items())
    document = annotated(parts + "## Conclusion\n\nAll in all, the town rewards a slow visit.\n")
    assert topics(document) == list(SECTIONS)
    assert document[-2] == Sync()


def test_the_critical_path_counts_tags_and_the_longest_chunk() -> None:
    document: Document = (
        Text("aa"),
        Promise("x", 10),
        Async((Text("aaaa"),)),
        Promise("y", 10),
        Async((Text("aaaaaaaaaaaa"),)),
        Sync(),
        Text("a"),
    )
    # 2, then two tags of 3 + 1 + 2, the second chunk of 1 + 12 + 1, the sync, one more
    assert critical_path(document, len) == 2 + 6 + 6 + 14 + 1 + 1
