"""Ukrainian documents from a small grammar: declension, agreement, numerals, templates.

Words stand in their dictionary form with a declension code; every other form is derived. Templates
name a slot and the form they need: `{thing:acc}` is an adjective and a noun in the accusative,
`{hero:купив/купила}` agrees with the hero. Words: lib/demo/uk_words.py.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from lib.demo import uk_words as words

CASES = "nom gen dat acc ins loc pnom pgen pdat pins ploc voc".split()
# The endings in the order of CASES. An upper-case code is a living being: accusative = genitive.
DECLENSIONS = {
    "fa": "а и і у ою і и - ам ами ах о",
    "fj": "а і і у ею і і - ам ами ах о",
    "fy": "я і і ю ею і і ь ям ями ях е",
    "fi": "я ї ї ю єю ї ї й ям ями ях є",
    "m": "- у у - ом і и ів ам ами ах е",
    "ma": "- а у - ом і и ів ам ами ах е",
    "ms": "ь я ю ь ем і і ів ям ями ях ю",
    "mj": "й ю ю й єм ї ї їв ям ями ях ю",
    "mr": "- я ю - ем і і ів ям ями ях ю",
    "mz": "- а у - ем і і ів ам ами ах у",
    "Ma": "- а ові а ом ові и ів ам ами ах е",
    "Mo": "о а ові а ом ові и ів ам ами ах е",
    "Ms": "ь я еві я ем еві і ів ям ями ях ю",
    "Mr": "- я еві я ем еві і ів ям ями ях ю",
    "Mj": "й я єві я єм єві ї їв ям ями ях ю",
    "no": "о а у о ом і а - ам ами ах о",
    "ne": "е я ю е ем і я ів ям ями ях е",
}
ADJECTIVES = {
    "m": "ий ого ому ий им ому",
    "f": "а ої ій у ою ій",
    "n": "е ого ому е им ому",
    "p": "і их им і ими их",
}
SOFT_ADJECTIVES = {
    "m": "ій ього ьому ій ім ьому",
    "f": "я ьої ій ю ьою ій",
    "n": "є ього ьому є ім ьому",
    "p": "і іх ім і іми іх",
}
NUMBERS = (
    "нуль один два три чотири п’ять шість сім вісім дев’ять десять одинадцять дванадцять "
    "тринадцять чотирнадцять п’ятнадцять шістнадцять сімнадцять вісімнадцять дев’ятнадцять двадцять"
).split()
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
        table = SOFT_ADJECTIVES if self.adjective.endswith("ій") else ADJECTIVES
        ending = table[gender].split()[CASES.index(case.removeprefix("p"))]
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
            number = agreeing.get(self.number) or NUMBERS[self.number]
        form = "nom" if last == 1 else "pnom" if few else "pgen"
        if last == 1 and spec == "acc":
            number, form = number.replace("одна", "одну"), "acc"
        return f"{number} {self.noun:{form}}"


def noun(entry: str, preposition: str = "") -> Noun:
    """From `слово/код`, `називний>основа/код` (ринок>ринк/m), `слово/код/родовий множини`."""
    head, code, *plural = entry.split("/")
    nominative, _, stem = head.partition(">")
    endings = DECLENSIONS[code].split()
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
    topic = {key: value.split() for key, value in rng.choice(words.TOPICS).items()}
    season = rng.choice(list(words.SEASONS))
    city, river = rng.choice(words.CITIES.split()).split("|")
    hero, friend = rng.sample(words.PEOPLE.split(), 2)
    story = {"hero": noun(hero), "friend": noun(friend), "season": season}
    home = noun(rng.choice(words.HOMES.split()), "у")
    story |= {"city": noun(city), "river": noun(river), "home": home}
    story["dear"] = Phrase(rng.choice(topic["adjectives"]), noun(rng.choice(topic["things"])))
    for who, job in zip(("hero", "friend"), rng.sample(topic["jobs"], 2), strict=True):
        story[f"{who}_job"] = noun(job.split("|")["mf".index(story[who].gender)])

    def paragraph(templates: tuple[str, ...], sentences: int) -> str:
        chosen = rng.sample(templates, sentences)
        return " ".join(text.format_map(story | _slots(rng, topic, story)) for text in chosen)

    paragraphs = [paragraph(words.OPENINGS, 1)]
    while sum(map(len, paragraphs)) < characters:
        kind = rng.choice(words.KINDS)
        paragraphs.append(paragraph(kind, 1 if kind is words.TALKS else rng.randint(2, 4)))
    return _euphony("\n".join([*paragraphs, paragraph(words.ENDINGS, 1)]))


def _slots(rng: random.Random, topic: dict[str, list[str]], story: dict) -> dict:
    """What one template draws anew."""
    bare, other = map(noun, rng.sample(topic["things"], 2))
    adjectives = rng.sample(topic["adjectives"], 2)
    preposition, place = rng.choice(topic["places"]).split(":")
    infinitive, future, imperative = rng.choice(topic["verbs"]).split("|")
    had, taken = rng.randint(6, 15), rng.randint(1, 5)
    slots = {
        "thing": Phrase(adjectives[0], bare),
        "other": Phrase(adjectives[1], other),
        "bare": bare,
        "place": noun(place, preposition),
        "do": infinitive,
        "will": future,
        "now": imperative,
        "time": rng.choice(words.TIMES.split("|")),
        "weather": rng.choice(words.SEASONS[story["season"]].split("|")),
        "had": Count(had, bare),
        "taken": Count(taken, bare),
        "left": Count(had - taken, bare),
        "sum": Count(had + taken, bare),
        "price": Count(5 * rng.randint(2, 20), noun("гривня/fy/гривень")),
    }
    for who in ("hero", "friend"):
        slots[f"{who}_did"] = past(infinitive, story[who])
    return slots


def past(infinitive: str, who: Noun) -> str:
    """купити: купив, купила; принести: приніс, принесла; знайти: знайшов, знайшла."""
    irregular = {"принести": "приніс/принесла", "знайти": "знайшов/знайшла"}
    return format(who, irregular.get(infinitive, f"{infinitive[:-2]}в/{infinitive[:-2]}ла"))


def _euphony(text: str) -> str:
    """Alternate у and в, з and із by the sounds around them."""
    vowels = "аеиіоуєїюя"
    text = re.sub(rf"(?i)(?<=[{vowels}] )у (?=[^вф{vowels}][{vowels}])", "в ", text)
    text = re.sub(rf"\bу (?=[{vowels}{vowels.upper()}])", "в ", text)
    return re.sub(r"(?i)\bз (?=[зсшщ])", "із ", text)
