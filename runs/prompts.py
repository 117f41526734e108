"""Makes prompts under the project's own licence: frames and subjects, combined at random.

    python runs/prompts.py 1800 > prompts.jsonl      # {id, prompt, source, licence} a line

A little more than half ask for something with parts (tips, aspects, comparisons, sections). The others ask for something
without parts (a fact, a story, a poem, a sum, a rewriting, a function), so that a model also learns when not to fork.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator

SKILLS = """sleeping better|learning a new language|saving money on groceries|speaking in public|writing clear emails
growing tomatoes at home|training a puppy|running a first marathon|cooking for one person|making new friends in a new city
reading more books|taking better photographs|preparing for a job interview|working from home|reducing food waste
keeping houseplants alive|learning to swim as an adult|organising a small kitchen|studying for an exam|playing the guitar
teaching children about money|commuting by bicycle|negotiating a salary|hosting a dinner party|drawing portraits
managing stress at work|starting a vegetable garden|travelling on a small budget|giving useful feedback|leading a remote team
writing a short story|meditating every day|baking bread|learning to code|keeping a diary|hiking in the mountains
caring for an ageing parent|buying a used car|running a book club|repairing old furniture|brewing good coffee
moving to another country|building a personal website|staying focused during long meetings|sewing clothes
choosing a houseplant|raising backyard chickens|learning chess|volunteering in a community|recording a podcast""".replace(
    "\n", "|"
).split("|")

THINGS = """solar panels|electric cars|public libraries|the printing press|social media|video games|online courses
bees|coral reefs|the Roman Empire|the water cycle|vaccines|cloud computing|artificial intelligence|3D printing|vegetarian diets
wind power|nuclear energy|the internet|school uniforms|remote work|city parks|team sports|classical music|jazz|tea|chocolate
the moon|volcanoes|rainforests|glaciers|honey|bridges|lighthouses|robots in factories|self-driving cars|paper books|smartphones
credit cards|renting a home|public transport|open-source software|databases|programming languages|machine translation
the human heart|sleep|exercise|sugar|plastic packaging|recycling|tourism|zoos|museums|democracy|inflation|insurance""".replace(
    "\n", "|"
).split("|")

PAIRS = """cats and dogs|tea and coffee|trains and aeroplanes|novels and short stories|Python and JavaScript|city life and country life
paper books and e-readers|running and swimming|renting and buying a home|solar and wind power|oil paint and watercolour
laptops and desktop computers|violins and guitars|crocodiles and alligators|weather and climate|bacteria and viruses
SQL and NoSQL databases|electric and petrol cars|butter and olive oil|chess and go|public and private schools
working from home and working in an office|gas and electric stoves|frogs and toads|stocks and bonds|wool and cotton
comets and asteroids|a democracy and a monarchy|yoga and pilates|podcasts and radio""".replace("\n", "|").split("|")

PLACES = """Lisbon|Kyoto|Iceland|Mexico City|Vienna|New Zealand|Morocco|the Scottish Highlands|Vancouver|Istanbul|Peru|Singapore
Copenhagen|Kenya|the Greek islands|Seoul|Norway|Buenos Aires|Jordan|Vietnam""".replace("\n", "|").split("|")

TRADES = """a small bakery|a bicycle repair shop|a language school|a bookshop|a dog-walking service|a mobile app for gardeners
a yoga studio|a coffee roastery|a second-hand clothes shop|a community theatre|a board game café|an online art class""".replace(
    "\n", "|"
).split("|")

NUMBERS = ("three", "four", "five", "six", "seven")

STRUCTURED = {
    "skill": (
        "Give me {n} tips for {x}.",
        "What are {n} common mistakes people make when {x}?",
        "How can I get better at {x}?",
        "List {n} benefits of {x}.",
        "What should a beginner know about {x}?",
        "Write an article about {x} with a section for each of its main aspects.",
        "What tools or materials help with {x}, and what is each of them for?",
        "Suggest {n} ways to stay motivated when {x}.",
        "Which myths about {x} are wrong? Explain each.",
    ),
    "thing": (
        "What are the advantages and disadvantages of {x}?",
        "List {n} interesting facts about {x}.",
        "Explain {x} under these headings: history, how it works, why it matters.",
        "What are the main types of {x}? Describe each in a few sentences.",
        "How does the subject of {x} look to an economist, an engineer and a historian?",
        "Give {n} reasons why {x} matters.",
        "Write a short essay about {x} in three titled sections.",
        "What questions should one ask about {x}, and how would you answer them?",
        "Describe how {x} affects health, money and the environment.",
    ),
    "pair": (
        "Compare {x}.",
        "What are the main differences between {x}?",
        "Describe the strengths and weaknesses of {x}.",
        "Which suits whom: {x}? Go through cost, effort and enjoyment.",
    ),
    "place": (
        "Suggest {n} things to do in {x}.",
        "Describe the food, the landscape and the culture of {x}.",
        "What should I pack and know before travelling to {x}?",
        "What is each season like in {x}?",
    ),
    "trade": (
        "Suggest {n} ways to find the first customers for {x}.",
        "Give me {n} name ideas for {x} and explain each.",
        "What are the biggest risks of opening {x}, and how can each be reduced?",
        "Which roles are needed to run {x}, and what does each do?",
    ),
}

PLAIN = {
    "skill": (
        "In one sentence, why is {x} worth the effort?",
        "Write a short story about someone who is {x}.",
        "Write a short poem about {x}.",
        "Rewrite this sentence so that it sounds more friendly: 'You should think about {x}.'",
        "Write a two-sentence message to a friend who is {x}.",
    ),
    "thing": (
        "What does '{x}' mean? Answer in two sentences.",
        "Explain {x} to a five-year-old in one short paragraph.",
        "Write one paragraph on why people disagree about {x}.",
        "Write a haiku about {x}.",
        "Tell me a short story in which {x} plays a part.",
    ),
    "place": (
        "Write a postcard from {x}.",
        "Which language is spoken in {x}?",
        "Write a short paragraph that makes someone want to visit {x}.",
    ),
    "trade": ("Write a slogan for {x}.", "Write a short e-mail that announces {x} to the neighbours."),
}

FACTS = """What is the capital of {x}?|Which continent is {x} on?|What is the currency of {x}?"""
COUNTRIES = [
    "Portugal",
    "Japan",
    "Canada",
    "Kenya",
    "Brazil",
    "Sweden",
    "Egypt",
    "India",
    "Australia",
    "Chile",
    "Poland",
    "Thailand",
]

FUNCTIONS = """reverses a string|counts the vowels of a word|checks whether a number is prime|finds the largest number of a list
merges two sorted lists|removes duplicates from a list|converts Celsius to Fahrenheit|checks whether a word is a palindrome
counts how often each word occurs in a text|computes the factorial of a number""".replace("\n", "|").split("|")

SUBJECTS = {"skill": SKILLS, "thing": THINGS, "pair": PAIRS, "place": PLACES, "trade": TRADES}


def _structured() -> Iterator[str]:
    for kind, frames in STRUCTURED.items():
        for frame, subject in itertools.product(frames, SUBJECTS[kind]):
            for n in NUMBERS if "{n}" in frame else ("",):
                yield frame.format(x=subject, n=n)


def _plain(rng: random.Random) -> Iterator[str]:
    for kind, frames in PLAIN.items():
        for frame, subject in itertools.product(frames, SUBJECTS[kind]):
            yield frame.format(x=subject)
    for frame, country in itertools.product(FACTS.split("|"), COUNTRIES):
        yield frame.format(x=country)
    for what, language in itertools.product(FUNCTIONS, ("Python", "JavaScript", "Java")):
        yield f"Write a {language} function that {what}."
    for _ in range(150):
        a, b, c = rng.randint(3, 40), rng.randint(2, 12), rng.randint(1, 9)
        yield rng.choice(
            (
                f"A box holds {a} apples. How many apples are in {b} boxes if {c} apples are taken out?",
                f"What is {a} times {b} plus {c}? Show the steps.",
                f"A train runs {a} km in {b} hours and then rests for {c} hours. What is its mean speed while it runs?",
                f"Solve for x: {b}x + {c} = {a * b + c}.",
            )
        )


def prompts(count: int, seed: int = 0, structured: float = 0.6) -> list[str]:
    """That many distinct prompts, `structured` of them with parts to ask for."""
    rng = random.Random(seed)
    with_parts, without = sorted(set(_structured())), sorted(set(_plain(rng)))
    many = min(round(count * structured), len(with_parts))
    chosen = rng.sample(with_parts, many) + rng.sample(without, min(count - many, len(without)))
    rng.shuffle(chosen)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    for i, prompt in enumerate(prompts(chosen.count, chosen.seed)):
        row = {"id": f"own-{chosen.seed}-{i}", "prompt": prompt, "source": "pastalm prompts", "licence": "Apache-2.0"}
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
