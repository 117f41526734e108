"""Texts of which every value is known, to measure what is extracted from them.

    python benchmarks/extraction.py make benchmarks/extraction.jsonl     # the committed file

A row is {"id", "text", "schema", "values"}: a text, the JSON Schema of 4 to 12 fields that it states, and their values.
The text is written from templates, each value as it stands in the answer; facts that the schema does not ask for are in
it too. Sentences and names are our own (Apache-2.0).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = 100
SEED = 24
FEWEST, MOST = 4, 12
DISTRACTORS = 3
"""At most so many facts of a text are not asked for."""


@dataclass(frozen=True)
class Fact:
    """Something that a text states in one sentence.

    name: of the field.
    schema: of its value.
    draw: a value.
    sentence: what the text says for a value.
    """

    name: str
    schema: Mapping[str, Any]
    draw: Callable[[random.Random], Any]
    sentence: Callable[[Any], str]


@dataclass(frozen=True)
class Domain:
    """A kind of text: how it begins, and its facts."""

    name: str
    opening: str
    facts: Sequence[Fact]


def words(name: str, pool: str, sentence: str) -> Fact:
    """A text of a pool (joined by |)."""
    return Fact(name, {"type": "string"}, lambda rng: rng.choice(pool.split("|")), lambda value: sentence.format(value))


def choice(name: str, options: str, sentence: str) -> Fact:
    """One of a few values."""
    known = options.split("|")
    schema = {"type": "string", "enum": known}
    return Fact(name, schema, lambda rng: rng.choice(known), lambda value: sentence.format(value))


def whole(name: str, low: int, high: int, sentence: str) -> Fact:
    """An integer."""
    return Fact(name, {"type": "integer"}, lambda rng: rng.randint(low, high), lambda value: sentence.format(value))


def number(name: str, low: int, high: int, sentence: str, digits: int = 1) -> Fact:
    """A number with a fraction; the last digit is never 0, so it has one spelling."""

    def draw(rng: random.Random) -> float:
        scale = 10**digits
        return (rng.randint(low, high) * scale + rng.randrange(0, scale, 10) + rng.randint(1, 9)) / scale

    return Fact(name, {"type": "number"}, draw, lambda value: sentence.format(value))


def flag(name: str, yes: str, no: str) -> Fact:
    """A boolean, and its sentence either way."""
    return Fact(name, {"type": "boolean"}, lambda rng: rng.random() < 0.5, lambda value: yes if value else no)


def day(name: str, sentence: str) -> Fact:
    """A date, as 2027-03-14."""

    def draw(rng: random.Random) -> str:
        return f"{rng.randint(2023, 2029)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"

    return Fact(name, {"type": "string", "format": "date"}, draw, lambda value: sentence.format(value))


def code(name: str, letters: str, sentence: str) -> Fact:
    """An identifier, as KX-4821."""
    schema = {"type": "string", "pattern": f"^{letters}-[0-9]{{4}}$"}
    return Fact(name, schema, lambda rng: f"{letters}-{rng.randint(1000, 9999)}", lambda value: sentence.format(value))


def several(name: str, pool: str, least: int, most: int, sentence: str) -> Fact:
    """A few texts of a pool, in the order in which the text names them."""
    known = pool.split("|")
    schema = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": most + 1}
    return Fact(
        name,
        schema,
        lambda rng: rng.sample(known, rng.randint(least, most)),
        lambda value: sentence.format(_listed(value)),
    )


def nested(name: str, parts: Sequence[Fact], sentence: str) -> Fact:
    """An object; the sentence names its parts."""
    return Fact(
        name,
        _object(parts),
        lambda rng: {part.name: part.draw(rng) for part in parts},
        lambda value: sentence.format(**value),
    )


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _object(facts: Sequence[Fact]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {fact.name: dict(fact.schema) for fact in facts},
        "required": [fact.name for fact in facts],
        "additionalProperties": False,
    }


PEOPLE = (
    "Mira Holt|Tomas Berg|Ana Lindqvist|Peter Okafor|Julia Sandoval|Henrik Maas|Leila Haddad|Simon Frey|Nora Bakker|"
    "David Osei|Clara Weiss|Ivan Petrov|Ruth Amsel|Jonas Keller|Maya Torres|Oskar Lund"
)
CITIES = "Bern|Porto|Leeds|Graz|Turku|Ghent|Malaga|Bergen|Lyon|Cork|Aarhus|Trieste|Utrecht|Bristol"
STREETS = "Mill Lane|Harbour Road|Linden Street|Castle Hill|Station Road|Orchard Avenue|River Walk|Chapel Street"


def _part(make: Callable[..., Fact], *arguments: Any) -> Fact:
    """A part of an object, which its object's sentence names."""
    return make(*arguments, "{}")


ADDRESS = (_part(words, "street", STREETS), _part(whole, "number", 2, 98), _part(words, "city", CITIES))

DOMAINS = (
    Domain(
        "invoice",
        "This is an invoice.",
        (
            code("invoice_number", "INV", "The invoice number is {}."),
            words(
                "supplier", "Northwind Paper|Alder Tools|Bluefin Print|Corner Bakery|Delta Office", "It was sent by {}."
            ),
            words("customer", PEOPLE, "The customer is {}."),
            day("due_date", "Payment is due on {}."),
            whole("quantity", 2, 60, "The number of boxes ordered is {}."),
            number("total", 40, 900, "The total is {} euros.", 2),
            number("tax_percent", 5, 25, "The tax is {} percent."),
            flag("paid", "The invoice has been paid.", "The invoice has not been paid."),
            choice("payment_method", "card|cash|transfer|cheque", "The payment method is {}."),
            nested("address", ADDRESS, "The goods go to number {number}, {street}, in {city}."),
            several("items", "paper|ink|folders|staples|envelopes|labels|pens", 2, 4, "The boxes contain {}."),
            whole("reminders_sent", 0, 5, "Reminders sent so far: {}."),
        ),
    ),
    Domain(
        "hotel",
        "A room has been booked.",
        (
            code("booking_code", "HB", "The booking code is {}."),
            words("guest", PEOPLE, "The guest is {}."),
            words("hotel", "Hotel Aurora|The Old Mill|Seaview Inn|Park Lodge|Villa Rosa", "The hotel is called {}."),
            words("city", CITIES, "It is in {}."),
            day("arrival", "The guest arrives on {}."),
            whole("nights", 1, 14, "The stay is {} nights long."),
            choice("room_type", "single|double|suite|family", "The room type is {}."),
            flag("breakfast", "Breakfast is included.", "Breakfast is not included."),
            number("price_per_night", 50, 300, "One night costs {} euros.", 2),
            whole("floor", 1, 12, "The room is on floor {}."),
            several("extras", "parking|sauna|a cot|late checkout|a bicycle|laundry", 1, 3, "The guest also wants {}."),
            nested(
                "contact",
                (_part(words, "name", PEOPLE), _part(whole, "extension", 100, 999)),
                "Questions go to {name} at the desk, extension {extension}.",
            ),
        ),
    ),
    Domain(
        "job",
        "We are hiring.",
        (
            words("title", "data analyst|bus driver|school nurse|web designer|pastry chef", "The position is {}."),
            words("company", "Harbour Health|Brightside Media|Oak Logistics|Sunfield Foods", "The company is {}."),
            words("city", CITIES, "The office is in {}."),
            whole("salary", 28, 95, "The salary is {} thousand euros a year."),
            whole("hours_per_week", 20, 40, "You work {} hours a week."),
            choice("contract", "permanent|temporary|internship", "The contract is {}."),
            flag("remote", "Working remotely is possible.", "Working remotely is not possible."),
            day("deadline", "Applications are open until {}."),
            several("languages", "English|German|French|Spanish|Dutch|Polish", 1, 3, "You speak {}."),
            whole("years_of_experience", 1, 12, "We ask for {} years of experience."),
            code("reference", "JOB", "Please quote the reference {}."),
            nested(
                "manager",
                (_part(words, "name", PEOPLE), _part(choice, "department", "sales|finance|research|operations")),
                "Your manager is {name} from the {department} department.",
            ),
        ),
    ),
    Domain(
        "recipe",
        "Here is a recipe.",
        (
            words("dish", "lentil soup|apple cake|mushroom pie|fish stew|rice salad", "The dish is {}."),
            words("author", PEOPLE, "It was written down by {}."),
            whole("servings", 2, 12, "It serves {} people."),
            whole("minutes", 15, 120, "It takes {} minutes."),
            choice("difficulty", "easy|medium|hard", "The difficulty is {}."),
            flag("vegan", "The dish is vegan.", "The dish is not vegan."),
            several("ingredients", "onions|carrots|butter|rice|lemons|thyme|garlic|beans", 2, 4, "You need {}."),
            whole("oven_temperature", 120, 240, "The oven is set to {} degrees."),
            number("rating", 1, 4, "Readers rate it {} out of 5."),
            number("cost", 3, 30, "The ingredients cost {} euros.", 2),
            choice("course", "starter|main|dessert", "It is served as a {}."),
            nested(
                "nutrition",
                (_part(whole, "calories", 120, 900), _part(whole, "protein_grams", 3, 60)),
                "A portion has {calories} calories and {protein_grams} grams of protein.",
            ),
        ),
    ),
    Domain(
        "flight",
        "This is a travel confirmation.",
        (
            code("flight_number", "PX", "The flight number is {}."),
            words("passenger", PEOPLE, "The passenger is {}."),
            words("origin", CITIES, "The flight leaves from {}."),
            words("destination", "Oslo|Lisbon|Athens|Dublin|Vienna|Prague|Riga", "The destination is {}."),
            day("date", "The date of travel is {}."),
            choice("travel_class", "economy|premium|business", "The class is {}."),
            whole("bags", 0, 4, "The number of checked bags is {}."),
            number("price", 60, 700, "The ticket costs {} euros.", 2),
            flag("refundable", "The ticket is refundable.", "The ticket is not refundable."),
            whole("duration_minutes", 55, 300, "The flight takes {} minutes."),
            nested(
                "seat",
                (_part(whole, "row", 1, 38), _part(choice, "position", "window|middle|aisle")),
                "The seat is in row {row}, at the {position}.",
            ),
            several("meals", "soup|pasta|a sandwich|fruit|cheese", 1, 3, "On board there is {}."),
        ),
    ),
    Domain(
        "apartment",
        "An apartment is for rent.",
        (
            nested("address", ADDRESS, "It is at number {number}, {street}, in {city}."),
            whole("rooms", 1, 7, "It has {} rooms."),
            number("area", 25, 180, "The area is {} square metres."),
            whole("rent", 400, 2500, "The rent is {} euros a month."),
            whole("deposit", 500, 5000, "The deposit is {} euros."),
            day("available_from", "It is available from {}."),
            flag("pets_allowed", "Pets are allowed.", "Pets are not allowed."),
            flag("furnished", "The apartment is furnished.", "The apartment is not furnished."),
            choice("heating", "gas|electric|district|wood", "The heating is {}."),
            whole("floor", 1, 9, "It is on floor {}."),
            words("landlord", PEOPLE, "The landlord is {}."),
            several("features", "a balcony|a cellar|a lift|a garden|a fireplace", 1, 3, "It comes with {}."),
        ),
    ),
    Domain(
        "bicycle",
        "A used bicycle is for sale.",
        (
            words("brand", "Velora|Northtrail|Pedalio|Swiftline|Roadfox", "The brand is {}."),
            choice("kind", "city|mountain|racing|cargo", "The kind of bicycle is {}."),
            choice("condition", "new|good|fair|poor", "The condition is {}."),
            words("color", "red|dark green|silver|black|pale blue", "The color is {}."),
            whole("gears", 1, 27, "The number of gears is {}."),
            number("weight", 8, 24, "The weight is {} kilograms."),
            whole("price", 60, 1900, "The price is {} euros."),
            flag("electric", "It has an electric motor.", "It has no electric motor."),
            whole("year", 2009, 2026, "It was built in {}."),
            words("seller", PEOPLE, "The seller is {}."),
            several("accessories", "a lock|a bell|a pump|a basket|lights|a child seat", 1, 4, "The seller adds {}."),
            nested(
                "pickup",
                (_part(words, "city", CITIES), _part(choice, "weekday", "Monday|Wednesday|Friday|Sunday")),
                "It can be picked up in {city} on {weekday}.",
            ),
        ),
    ),
    Domain(
        "talk",
        "A talk is announced.",
        (
            words("speaker", PEOPLE, "The speaker is {}."),
            words(
                "topic",
                "sleep in birds|clean rivers|old bridges|city trees|quiet engines",
                "The talk is about {}.",
            ),
            day("date", "It takes place on {}."),
            words("room", "the Blue Hall|the Library|Studio Two|the Winter Garden", "The room is {}."),
            whole("minutes", 20, 90, "It lasts {} minutes."),
            whole("seats", 25, 400, "The number of seats is {}."),
            flag("free", "Entry is free.", "Entry is not free."),
            flag("recorded", "The talk will be recorded.", "The talk will not be recorded."),
            choice("language", "English|German|French|Italian", "The language is {}."),
            choice("level", "beginner|intermediate|expert", "The level is {}."),
            several("guests", "two students|a journalist|the mayor|a pilot|a gardener", 1, 3, "The guests are {}."),
            nested(
                "host",
                (_part(words, "name", PEOPLE), _part(whole, "extension", 100, 999)),
                "The host is {name}, extension {extension}.",
            ),
        ),
    ),
    Domain(
        "weather",
        "This is a weather report.",
        (
            words("station", "Lake Point|Summit House|North Pier|Old Airport", "The station is {}."),
            day("date", "The date is {}."),
            number("temperature", 1, 34, "The temperature is {} degrees."),
            whole("humidity", 20, 99, "The humidity is {} percent."),
            number("rain", 0, 40, "The rain so far is {} millimetres."),
            choice("sky", "clear|cloudy|overcast|foggy", "The sky is {}."),
            flag("frost", "There is frost on the ground.", "There is no frost on the ground."),
            flag("warning", "A storm warning is in force.", "No storm warning is in force."),
            words("observer", PEOPLE, "The observer is {}."),
            whole("pressure", 980, 1040, "The pressure is {} hectopascals."),
            nested(
                "wind",
                (_part(whole, "speed", 1, 90), _part(choice, "direction", "north|east|south|west")),
                "The wind blows at {speed} kilometres an hour from the {direction}.",
            ),
            several("clouds", "cirrus|cumulus|stratus|nimbus", 1, 3, "The clouds seen are {}."),
        ),
    ),
    Domain(
        "parcel",
        "A parcel is on its way.",
        (
            code("tracking_number", "TR", "The tracking number is {}."),
            words("sender", PEOPLE, "The sender is {}."),
            words("carrier", "QuickPost|Blue Van|Citybike|Nordship", "The carrier is {}."),
            choice("status", "waiting|moving|delivered|returned", "The status is {}."),
            number("weight", 1, 28, "It weighs {} kilograms."),
            day("expected", "It is expected on {}."),
            flag("fragile", "The contents are fragile.", "The contents are not fragile."),
            flag("insured", "The parcel is insured.", "The parcel is not insured."),
            whole("attempts", 0, 4, "Attempts to deliver it so far: {}."),
            number("postage", 4, 40, "The postage was {} euros.", 2),
            nested("recipient_address", ADDRESS, "It goes to number {number}, {street}, in {city}."),
            several("contents", "books|a lamp|shoes|two cups|a clock|tea", 1, 3, "Inside are {}."),
        ),
    ),
)


def row(place: int, rng: random.Random) -> dict[str, Any]:
    """Row number `place`; the domains take turns, and the numbers of fields too."""
    domain = DOMAINS[place % len(DOMAINS)]
    wanted = FEWEST + place // len(DOMAINS) % (MOST - FEWEST + 1)
    chosen = rng.sample(range(len(domain.facts)), min(len(domain.facts), wanted + rng.randint(0, DISTRACTORS)))
    values = {i: domain.facts[i].draw(rng) for i in chosen}
    sentences = [domain.facts[i].sentence(values[i]) for i in chosen]
    asked = [domain.facts[i] for i in sorted(chosen[:wanted])]
    return {
        "id": f"{domain.name}-{place // len(DOMAINS) + 1}",
        "text": " ".join([domain.opening, *sentences]),
        "schema": _object(asked),
        "values": {domain.facts[i].name: values[i] for i in sorted(chosen[:wanted])},
    }


def rows(count: int = ROWS, seed: int = SEED) -> list[dict[str, Any]]:
    """The rows, the same for the same seed."""
    rng = random.Random(seed)
    return [row(place, rng) for place in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("make", help="write the rows")
    make.add_argument("target", type=Path)
    arguments = parser.parse_args()
    arguments.target.write_text("".join(json.dumps(each) + "\n" for each in rows()))


if __name__ == "__main__":
    main()
