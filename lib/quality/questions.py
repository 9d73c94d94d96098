"""Questions from plain text, each with one right option, for any language with words.

`last_words`: the last word of a sentence, after the text before it (as LAMBADA, arXiv 1606.06031),
among words of the same text that are as long and about as frequent. `continuations`: what follows
a sentence (as HellaSwag, arXiv 1905.07830, without its adversaries), among what follows others.
`read_pairs`: sentences given in pairs, of which one is right. The same texts and seed give the same
questions, whatever the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.quality.scripts import script_of
from lib.util.errors import UserError

QUESTIONS = 300  # of each kind, where the text has so many
CHOICES = 4
CONTEXT = 200  # characters before the options, at most
LEAST_CONTEXT = 60
CONTINUATION = 80  # characters of a continuation, at most
LEAST_CONTINUATION = 50
LEAST_LETTERS = 4  # of a last word
CHARACTERS = 4_000_000  # of the texts that questions are made from

WORD = re.compile(r"[^\W\d_]+(?:[-'’ʼ][^\W\d_]+)*")
LAST_WORD = re.compile(r"(?<=\s)([^\W\d_]+(?:[-'’ʼ][^\W\d_]+)*)[.!?…]+(?=\s|$)")
SENTENCE_END = re.compile(r"[.!?…]+[\"'»”)\]]*\s+(?=[^\W\d_])")


@dataclass(frozen=True)
class Question:
    """A context and its options, of which the first is right."""

    context: str
    options: tuple[str, ...]


def digest(questions: Sequence[Question]) -> str:
    """Return the first 16 digits of the SHA-256 of all texts of the questions."""
    texts = [[question.context, *question.options] for question in questions]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def last_words(texts: Sequence[str], seed: int, count: int = QUESTIONS) -> list[Question]:
    """Make at most `count` questions for the last word of a sentence, among CHOICES words.

    All four are of one script, have the same number of letters and occur about as often: their
    counts have the same logarithm of base 2, rounded down.
    """
    texts = _first(texts)
    counts = Counter(word for text in texts for word in WORD.findall(text) if word.islower())

    def kind(word: str) -> tuple[str, int, int]:
        return script_of(word[0]), len(word), counts[word].bit_length()

    alike = defaultdict(list)
    for word in sorted(counts):
        alike[kind(word)].append(word)
    places = [
        (number, match.start(1), match.group(1))
        for number, text in enumerate(texts)
        for match in LAST_WORD.finditer(text)
        if match.group(1).islower() and len(match.group(1)) >= LEAST_LETTERS
    ]
    draw = random.Random(seed)
    draw.shuffle(places)
    questions: list[Question] = []
    for number, start, word in places:
        if len(questions) == count:
            break
        context = _context(texts[number], start)
        others = [other for other in alike[kind(word)] if other != word]
        if len(context) < LEAST_CONTEXT or len(others) < CHOICES - 1:
            continue
        options = [word, *draw.sample(others, CHOICES - 1)]
        questions.append(Question(context, tuple(f" {option}" for option in options)))
    return questions


def continuations(texts: Sequence[str], seed: int, count: int = QUESTIONS) -> list[Question]:
    """Make at most `count` questions for what follows a sentence, among CHOICES continuations.

    The wrong ones are from other texts, or where there are too few from elsewhere in the text.
    """
    texts = _first(texts)
    places = [
        (number, match.end(), following)
        for number, text in enumerate(texts)
        for match in SENTENCE_END.finditer(text)
        if (following := _following(text, match.end()))
    ]
    draw = random.Random(seed)
    draw.shuffle(places)
    enough_texts = len({number for number, *_ in places}) >= CHOICES
    questions: list[Question] = []
    for number, start, following in places:
        if len(questions) == count:
            break
        context = _context(texts[number], start)
        if len(context) < LEAST_CONTEXT:
            continue
        others = _others(places, draw, number if enough_texts else None, following)
        if len(others) < CHOICES - 1:
            continue
        questions.append(Question(context, tuple(f" {text}" for text in [following, *others])))
    return questions


def _others(
    places: Sequence[tuple[int, int, str]], draw: random.Random, number: int | None, right: str
) -> list[str]:
    """Draw up to CHOICES - 1 continuations other than `right`, and not of text `number`."""
    others: list[str] = []
    for place in draw.sample(range(len(places)), min(len(places), 50 * CHOICES)):
        other, _, following = places[place]
        if other != number and following != right and following not in others:
            others.append(following)
            if len(others) == CHOICES - 1:
                break
    return others


def _first(texts: Sequence[str]) -> list[str]:
    """Return the first of the texts, up to CHARACTERS."""
    first, length = [], 0
    for text in texts:
        first.append(text)
        length += len(text)
        if length >= CHARACTERS:
            break
    return first


def _context(text: str, end: int) -> str:
    """Return the text before `end`, from the beginning of a word on, without outer blanks."""
    start = max(0, end - CONTEXT)
    before = text[start:end]
    if start:
        _, _, before = before.partition(" ")
    return before.strip()


def _following(text: str, start: int) -> str | None:
    """Return whole words of the line from `start` on, up to CONTINUATION characters."""
    line = text[start : start + CONTINUATION + 1].split("\n")[0]
    if len(line) > CONTINUATION:
        line = line.rpartition(" ")[0]
    line = line.strip()
    return line if len(line) >= LEAST_CONTINUATION else None


def read_pairs(path: str) -> list[Question]:
    """Read the pairs of a file of JSON lines with `good` and `bad`. Raises UserError for others.

    Every text ends with a line break, without which a truncated text would be likelier.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--pairs {path}: can't be read ({error})") from None
    questions = [
        _pair(line, f"--pairs {path}: line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not questions:
        raise UserError(f"--pairs {path}: holds no pair; write a line for each")
    return questions


def _pair(line: str, place: str) -> Question:
    form = 'write {"good": "...", "bad": "..."}'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}); {form}") from None
    texts = [row.get(key) for key in ("good", "bad")] if isinstance(row, dict) else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{place}: needs two texts; {form}")
    if texts[0].strip() == texts[1].strip():
        raise UserError(f"{place}: both texts are the same; leave the pair out")
    return Question("", tuple(f"{text.strip()}\n" for text in texts))
