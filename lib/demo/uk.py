"""Ukrainian stories from a small grammar: declension, agreement, numerals, euphony.

Sentences name a slot and the form they need: `{thing:acc}` is an adjective and a noun in the
accusative, `{hero:купив/купила}` agrees with the hero. All words, endings and sentences stand in
uk.toml: words in their dictionary form with the code of a declension; other forms are derived.
"""

from __future__ import annotations

import random
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.demo.story import tell

WORDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
CASES = "nom gen dat acc ins loc pnom pgen pdat pins ploc voc".split()  # of [declensions]
SOFTENED = {"к": "ц", "г": "з", "х": "с"}  # книга, у книзі


@dataclass(frozen=True)
class Noun:
    """A noun with all its forms; `format(noun, "acc")` gives one, `"він/вона/воно"` agrees."""

    gender: str
    forms: dict[str, str]
    preposition: str = ""

    def __format__(self, spec: str) -> str:
        if "/" in spec:
            choices = spec.split("/")
            return choices[min("mfn".index(self.gender), len(choices) - 1)]
        form = self.forms[spec or "nom"]
        return f"{self.preposition} {form}" if self.preposition and spec == "loc" else form


@dataclass(frozen=True)
class Phrase:
    """An adjective (in its dictionary form) before a noun that it agrees with."""

    adjective: str
    noun: Noun

    def __format__(self, spec: str) -> str:
        if "/" in spec:
            return format(self.noun, spec)
        case = spec or "nom"
        gender = "p" if case.startswith("p") else self.noun.gender
        endings = WORDS["adjectives"]["soft" if self.adjective.endswith("ій") else "hard"]
        ending = endings[gender].split()[CASES.index(case.removeprefix("p"))]
        return f"{self.adjective[:-2]}{ending} {self.noun:{case}}"


@dataclass(frozen=True)
class Count:
    """A number with its noun: один ніж, два ножі, п’ять ножів; `"був/була/було/були"` agrees."""

    number: int
    noun: Noun

    def __format__(self, spec: str) -> str:
        last = self.number if 10 < self.number % 100 < 20 else self.number % 10
        few = 2 <= last <= 4
        if "/" in spec:
            choice = 3 if few else "mfn".index(self.noun.gender) if last == 1 else 2
            return spec.split("/")[choice]
        agreeing = {1: f"{self.noun:один/одна/одне}", 2: f"{self.noun:два/дві/два}"}
        if spec == "figures":
            number = str(self.number)
        else:
            number = agreeing.get(self.number) or WORDS["numbers"][self.number]
        form = "nom" if last == 1 else "pnom" if few else "pgen"
        if last == 1 and spec == "acc":
            number, form = number.replace("одна", "одну"), "acc"
        return f"{number} {self.noun:{form}}"


def noun(entry: str, preposition: str = "") -> Noun:
    """From `слово/код`, `називний>основа/код` (ринок>ринк/m), `слово/код/родовий множини`."""
    head, code, *plural = entry.split("/")
    nominative, _, stem = head.partition(">")
    endings = WORDS["declensions"][code].split()
    stem = stem or (nominative if endings[0] == "-" else nominative[:-1])
    forms = {}
    for case, ending in zip(CASES, endings, strict=True):
        base = stem
        if case in ("dat", "loc") and ending == "і" and stem[-1] in SOFTENED:
            if code[0] == "m":
                ending = "у"  # у парку
            else:
                base = stem[:-1] + SOFTENED[stem[-1]]
        forms[case] = base + ending.replace("-", "")
    forms["nom"] = nominative
    if code[0] == "m":
        forms["acc"] = nominative
    if plural:
        forms["pgen"] = plural[0]
    return Noun(code[0].lower(), forms, preposition)


def document(rng: random.Random, characters: int) -> str:
    """A story of one topic and at least `characters` characters, one paragraph a line."""
    topic = rng.choice(list(WORDS["topics"].values()))
    season = rng.choice(list(WORDS["seasons"]))
    city, river = map(noun, rng.choice(WORDS["cities"]))
    hero, friend = map(noun, rng.sample(WORDS["people"], 2))
    home = noun(rng.choice(WORDS["homes"]), "у")
    story = {"hero": hero, "friend": friend, "season": season}
    story |= {"city": city, "river": river, "home": home}
    story["dear"] = Phrase(rng.choice(topic["adjectives"]), noun(rng.choice(topic["things"])))
    for who, job in zip(("hero", "friend"), rng.sample(topic["jobs"], 2), strict=True):
        story[f"{who}_job"] = noun(job["mf".index(story[who].gender)])

    def fill(template: str) -> str:
        return template.format_map(story | _slots(rng, topic, story))

    return _euphony(tell(rng, characters, WORDS["templates"], fill))


def _slots(rng: random.Random, topic: dict[str, list], story: dict[str, Any]) -> dict[str, Any]:
    """What one sentence draws anew."""
    bare, other = map(noun, rng.sample(topic["things"], 2))
    adjectives = rng.sample(topic["adjectives"], 2)
    preposition, _, place = rng.choice(topic["places"]).partition(" ")
    infinitive, future, imperative = rng.choice(topic["verbs"])
    had, taken = rng.randint(6, 15), rng.randint(1, 5)
    return {
        "thing": Phrase(adjectives[0], bare),
        "other": Phrase(adjectives[1], other),
        "bare": bare,
        "place": noun(place, preposition),
        "do": infinitive,
        "will": future,
        "now": imperative,
        "hero_did": past(infinitive, story["hero"]),
        "friend_did": past(infinitive, story["friend"]),
        "time": rng.choice(WORDS["times"]),
        "weather": rng.choice(WORDS["seasons"][story["season"]]),
        "had": Count(had, bare),
        "taken": Count(taken, bare),
        "left": Count(had - taken, bare),
        "sum": Count(had + taken, bare),
        "price": Count(5 * rng.randint(2, 20), noun(WORDS["currency"])),
    }


def past(infinitive: str, who: Noun) -> str:
    """купити: купив, купила; принести: приніс, принесла; знайти: знайшов, знайшла."""
    stem = infinitive.removesuffix("ти")
    return format(who, WORDS["past"].get(infinitive, f"{stem}в/{stem}ла"))


def _euphony(text: str) -> str:
    """Alternate у and в, з and із by the sounds around them."""
    vowels = "аеиіоуєїюя"
    text = re.sub(rf"(?i)(?<=[{vowels}] )у (?=[^вф{vowels}][{vowels}])", "в ", text)
    text = re.sub(rf"\bу (?=[{vowels}{vowels.upper()}])", "в ", text)
    return re.sub(r"(?i)\bз (?=[зсшщ])", "із ", text)
