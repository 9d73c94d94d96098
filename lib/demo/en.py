"""English stories from a small grammar: articles, plurals, pronouns, numerals.

Sentences name a slot and the form they need: `{thing:a}` is `an old lantern`, `{thing:s}` is `old
lanterns`, `{hero:he/she}` agrees with the hero. All words and sentences stand in en.toml.
"""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.demo.story import tell

WORDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


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
        number = WORDS["numbers"][self.number]
        return f"{number} {self.noun if self.number == 1 else plural(self.noun)}"


def plural(noun: str) -> str:
    """boats, boxes, berries, loaves."""
    if noun in WORDS["plurals"]:
        return WORDS["plurals"][noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def document(rng: random.Random, characters: int) -> str:
    """A story of one topic and at least `characters` characters, one paragraph a line."""
    topic = rng.choice(list(WORDS["topics"].values()))
    month = rng.choice(list(WORDS["weather"]))
    town, county = rng.choice(WORDS["towns"])
    people = [Person(name, gender) for gender, names in WORDS["people"].items() for name in names]
    hero, friend = rng.sample(people, 2)
    story = {"hero": hero, "friend": friend, "town": town, "county": county, "month": month}
    story["hero_job"], story["friend_job"] = map(Thing, rng.sample(topic["jobs"], 2))
    story["dear"] = Thing(rng.choice(topic["things"]), rng.choice(topic["adjectives"]))

    def fill(template: str) -> str:
        return template.format_map(story | _slots(rng, topic, month))

    return tell(rng, characters, WORDS["templates"], fill)


def _slots(rng: random.Random, topic: dict[str, list], month: str) -> dict[str, Any]:
    """What one sentence draws anew."""
    bare, other = rng.sample(topic["things"], 2)
    adjectives = rng.sample(topic["adjectives"], 2)
    base, past = rng.choice(topic["verbs"])
    had, taken = rng.randint(6, 15), rng.randint(1, 5)
    return {
        "thing": Thing(bare, adjectives[0]),
        "other": Thing(other, adjectives[1]),
        "bare": Thing(bare),
        "place": rng.choice(topic["places"]),
        "do": base,
        "did": past,
        "time": rng.choice(WORDS["times"]),
        "weather": rng.choice(WORDS["weather"][month]),
        "had": Count(had, bare),
        "taken": Count(taken, bare),
        "left": Count(had - taken, bare),
        "sum": Count(had + taken, bare),
        "price": 5 * rng.randint(2, 20),
    }
