"""What a large language model is told of PASTA-LANG so that it annotates: a description and seven examples.

The examples are answers of our own, marked by hand: a list, an essay in sections, a comparison, code with its
explanation, a derivation that must stay sequential, a short answer without a promise, and an answer that waits
in its middle. Lengths in them are counted anew by whoever reads them (annotate_remote.py does so for answers).
"""

from __future__ import annotations

SYSTEM = """\
You mark which parts of an existing answer could have been written at the same time. You add tags and change nothing else.

The tags:
<promise topic="T" tokens="N"/> stands directly before a part that can be written independently. T names the part in at \
most three words, after the number of the item if it has one. N is roughly how many tokens the part has.
<async>...</async> encloses that part. It stands directly after its promise, with nothing between the two.
<sync/> stands where what follows depends on the parts promised so far, or sums them up.

When is a part independent? Its writer sees the question, everything before the part outside of other <async> parts, and \
the topics of its neighbours. Its writer does not see what other <async> parts say. So a part is not independent if it
- refers to something that another part introduces ("this also", "as above", a pronoun for an entity met elsewhere),
- is a step that uses the result of an earlier step, in a derivation, a calculation, a procedure or code,
- continues a story, a dialogue, a letter or a poem,
- sums up, concludes or compares what other parts say.

Rules:
- Copy the answer exactly, with every space, line break, marker and misspelling. Only tags are added.
- Put a whole item into its <async>: marker, text, and the line breaks after it.
- At least two promises before a <sync/>; neighbouring promises stand directly next to each other. Topics between two \
<sync/> differ.
- Parts of fewer than about 15 tokens are not worth a promise.
- <async> parts do not contain other <async> parts.
- If nothing in the answer is independent, copy it without any tag.
- Write the annotated answer alone: no remarks, no code fence around it."""

EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "How can I make my small balcony greener?",
        "A balcony does not need much to look like a garden. Three things work almost anywhere:\n\n"
        '<promise topic="1. hanging baskets" tokens="40"/><async>1. Hanging baskets: fix two or three of them to the railing '
        "and plant trailing flowers such as petunias, which hide the pots within a few weeks.\n</async>"
        '<promise topic="2. herbs" tokens="30"/><async>2. Herbs: basil, thyme and chives share a single window box, smell '
        "good and end up in your kitchen.\n</async>"
        '<promise topic="3. climbing plants" tokens="40"/><async>3. Climbing plants: a pot of ivy or clematis at the foot of '
        "a trellis covers a bare wall and gives you some shade in summer.\n\n</async>"
        "<sync/>Whatever you choose, check how much weight your balcony may carry before you water all of it at once.",
    ),
    (
        "Write a short essay on the importance of lighthouses.",
        "# Lighthouses\n\nFor two thousand years, lighthouses have told sailors where the land is.\n\n"
        '<promise topic="safety" tokens="50"/><async>## Safety\n\nBefore satellites, a light on a cliff was often the only '
        "warning of a reef. Each tower blinked in its own rhythm, so that a captain who counted the seconds knew which coast "
        "lay ahead.\n\n</async>"
        '<promise topic="engineering" tokens="50"/><async>## Engineering\n\nTowers had to stand where waves break. Builders '
        "learned to dovetail blocks of granite into each other, and glass makers cast lenses that threw the light of one "
        "lamp over thirty kilometres.\n\n</async>"
        '<promise topic="culture" tokens="40"/><async>## Culture\n\nPainters and novelists took the lonely keeper as a figure '
        "for patience, and many towns still carry a lighthouse in their coat of arms.\n\n</async>"
        "<sync/>Few of the towers are needed today; that so many of these are kept alight says how much they meant.",
    ),
    (
        "What is the difference between a violin and a viola?",
        "The two look alike, but they play different roles.\n\n"
        '<promise topic="violin" tokens="40"/><async>**Violin.** The smaller one, tuned G, D, A and E. It carries the melody '
        "in most ensembles, and its music is written in the treble clef.\n\n</async>"
        '<promise topic="viola" tokens="40"/><async>**Viola.** The larger one, tuned C, G, D and A. It fills the middle of '
        "the harmony with a darker tone, and its music is written in the alto clef.\n\n</async>"
        "<sync/>In short: if you want to lead, take the first; if you like to hold things together, the second.",
    ),
    (
        "Show me how to count words in a text file with Python and explain it.",
        "Here is a function that does it:\n\n```python\nfrom collections import Counter\n\ndef count_words(path):\n"
        "    with open(path) as file:\n        return Counter(file.read().lower().split())\n```\n\n"
        '<promise topic="with open" tokens="30"/><async>- `with open(path) as file` opens the file and closes it again, even '
        "if reading it fails.\n</async>"
        '<promise topic="lower split" tokens="30"/><async>- `.lower().split()` makes one list of words out of the text, split '
        "at any white space, with capitals ignored.\n</async>"
        '<promise topic="Counter" tokens="30"/><async>- `Counter` counts how often each word occurs; `.most_common(10)` gives '
        "the ten most frequent ones.\n\n</async>"
        "<sync/>Call it as `count_words('notes.txt')`.",
    ),
    (
        "Derive the formula for the sum of the first n odd numbers.",
        "Write the sum as S = 1 + 3 + 5 + ... + (2n - 1).\n\n1. Written backwards it is S = (2n - 1) + (2n - 3) + ... + 1.\n"
        "2. Adding the two lines term by term gives n pairs, each of which adds up to 2n.\n"
        "3. So 2S = n * 2n, and dividing by 2 gives S = n^2.\n\nFor n = 4 that is 1 + 3 + 5 + 7 = 16 = 4^2.",
    ),
    (
        "What is the boiling point of water on top of Mount Everest?",
        "About 70 °C (158 °F). The air pressure there is only a third of that at sea level, so water boils sooner.",
    ),
    (
        "I have a free weekend in Lisbon. What could I do, and what do you recommend?",
        "There are two kinds of weekend to be had.\n\n"
        '<promise topic="city" tokens="40"/><async>**In the city:** ride tram 28 through Alfama, climb up to the castle for '
        "the view, and spend the evening in a small place with fado singers.\n\n</async>"
        '<promise topic="coast" tokens="40"/><async>**On the coast:** take the train to Cascais, walk along the cliffs to the '
        "Boca do Inferno, and eat grilled sardines by the harbour.\n\n</async>"
        "<sync/>Since you have two days, I would take one for each, and the city first. For that plan:\n\n"
        '<promise topic="tickets" tokens="30"/><async>- Tickets: a Viva Viagem card is valid on trams, metro and the train '
        "to Cascais; load it with a day's credit.\n</async>"
        '<promise topic="shoes" tokens="30"/><async>- Shoes: the pavement of the old town is polished stone and steep, so '
        "leave smooth soles at home.\n\n</async>"
        "<sync/>Have a good time!",
    ),
)
"""(question, annotated answer)."""
