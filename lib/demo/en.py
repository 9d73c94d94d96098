"""English documents from a small grammar: articles, plurals, pronouns, numerals, templates.

Templates name a slot and the form they need: `{thing:a}` is `an old lantern`, `{thing:s}` is
`old lanterns`, `{hero:he/she}` agrees with the hero. Words: lib/demo/en_words.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lib.demo import en_words as words

NUMBERS = (
    "no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()


@dataclass(frozen=True)
class Thing:
    """A noun with an optional adjective; `format` gives it with an article or in the plural."""

    noun: str
    adjective: str = ""

    def __format__(self, spec: str) -> str:
        singular = f"{self.adjective} {self.noun}".strip()
        if spec == "a":
            return f"{'an' if singular[0] in 'aeiou' else 'a'} {singular}"
        if spec == "s":
            return f"{self.adjective} {plural(self.noun)}".strip()
        assert not spec, spec
        return singular


@dataclass(frozen=True)
class Person:
    """A name; `"he/she"` agrees, `"s"` is the possessive."""

    name: str
    gender: str

    def __format__(self, spec: str) -> str:
        if "/" in spec:
            return spec.split("/")["mf".index(self.gender)]
        return f"{self.name}’s" if spec == "s" else self.name


@dataclass(frozen=True)
class Count:
    """A number with its noun: `one box`, `two boxes`; `"was/were"` agrees."""

    number: int
    noun: str

    def __format__(self, spec: str) -> str:
        if "/" in spec:
            return spec.split("/")[self.number != 1]
        return f"{NUMBERS[self.number]} {self.noun if self.number == 1 else plural(self.noun)}"


def plural(noun: str) -> str:
    """boats, boxes, berries, loaves."""
    if noun in words.PLURALS:
        return words.PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def document(rng: random.Random, characters: int) -> str:
    """A story of one topic and at least `characters` characters, one paragraph a line."""
    topic = {key: value.split() for key, value in rng.choice(words.TOPICS).items()}
    weather = rng.choice(list(words.WEATHER))
    town, county = rng.choice(words.TOWNS).split("/")
    hero, friend = (Person(*name.split("/")) for name in rng.sample(words.PEOPLE.split(), 2))
    hero_job, friend_job = rng.sample(topic["jobs"], 2)
    story = {"hero": hero, "friend": friend, "town": town, "county": county, "month": weather}
    story |= {"hero_job": Thing(hero_job), "friend_job": Thing(friend_job)}
    story["dear"] = Thing(rng.choice(topic["things"]), rng.choice(topic["adjectives"]))

    def paragraph(templates: tuple[str, ...], sentences: int) -> str:
        chosen = rng.sample(templates, sentences)
        return " ".join(text.format_map(story | _slots(rng, topic, story)) for text in chosen)

    paragraphs = [paragraph(words.OPENINGS, 1)]
    while sum(map(len, paragraphs)) < characters:
        kind = rng.choice(words.KINDS)
        paragraphs.append(paragraph(kind, 1 if kind is words.TALKS else rng.randint(2, 4)))
    return "\n".join([*paragraphs, paragraph(words.ENDINGS, 1)])


def _slots(rng: random.Random, topic: dict[str, list[str]], story: dict) -> dict:
    """What one template draws anew."""
    bare, other = rng.sample(topic["things"], 2)
    adjectives = rng.sample(topic["adjectives"], 2)
    base, past = rng.choice(topic["verbs"]).split("/")
    had, taken = rng.randint(6, 15), rng.randint(1, 5)
    return {
        "thing": Thing(bare, adjectives[0]),
        "other": Thing(other, adjectives[1]),
        "bare": Thing(bare),
        "place": rng.choice(topic["places"]).replace("_", " "),
        "do": base,
        "did": past,
        "time": rng.choice(words.TIMES.split("|")),
        "weather": rng.choice(words.WEATHER[story["month"]].split("|")),
        "had": Count(had, bare),
        "taken": Count(taken, bare),
        "left": Count(had - taken, bare),
        "sum": Count(had + taken, bare),
        "price": 5 * rng.randint(2, 20),
    }
