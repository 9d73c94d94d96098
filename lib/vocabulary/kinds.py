"""Vocabularies of tokenizers by kind: how the text of each token is cut if the token is removed.

Plain Python without torch, transformers and tokenizers, for tokenizer.json and GGUF files alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from ..data.languages import script_of

BYTE_TOKENS = {f"<0x{number:02X}>" for number in range(256)}
# byte-level tokenizers write each byte as a letter: printable ones of Latin-1 as themselves
PRINTABLE = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)}
OTHERS = [number for number in range(256) if number not in PRINTABLE]
BYTE_OF_LETTER = {chr(number): number for number in PRINTABLE}
BYTE_OF_LETTER |= {chr(256 + place): number for place, number in enumerate(OTHERS)}
BLANK = "▁"  # a blank, as SentencePiece writes it
RESERVED = re.compile(
    r"(?i)\W+((\w+_)?(unused|reserved)(_special)?(_token)?|placeholder|extra_id|special)_?\d+\W+"
)


def is_reserved(token: str) -> bool:
    """Return whether a token's name says that nothing uses it yet, such as `<unused42>`.

    Other tokens with a number, such as `<row_2_col_3>` of a picture, may be written by code.
    """
    return bool(RESERVED.fullmatch(token))


def ranks_of(merges: Iterable[Sequence[str]]) -> dict[tuple[str, str], int]:
    """Return {merge: rank}; of a merge that is listed twice, the first rank."""
    ranks: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(tuple(merge), rank)
    return ranks


@dataclass
class Vocabulary:
    """Tokens that are matched whole, as special ones; the kinds below know how others are cut.

    `tokens` are as the tokenizer writes them, by id. All texts need the `basic` ones, bytes and the
    sign for a blank; `reasons` say which others are always kept, and why. `special` ones, and those
    without a row, are kept only if a text uses them or for a reason.
    """

    tokens: Mapping[int, str]
    basic: Set[int] = frozenset()
    reasons: dict[str, Set[int]] = field(default_factory=dict)
    special: Set[int] = frozenset()
    byte_level: bool = False  # each letter of a token is a byte
    has_bytes: bool = True  # else letters that are no tokens are unknown

    @property
    def required(self) -> set[int]:
        """The tokens that are kept whatever the texts use."""
        return set(self.basic).union(*self.reasons.values())

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in self.tokens.items()}

    @cached_property
    def texts(self) -> dict[int, str]:
        """The text of each token; "" for a byte, or a part of a letter."""
        return {index: self._text(token) for index, token in self.tokens.items()}

    @cached_property
    def scripts(self) -> dict[int, str | None]:
        """The script of most letters of each ordinary token; None without letters."""
        texts = self.texts.items()
        return {index: script_of(text) for index, text in texts if index not in self.special}

    def letter(self, index: int) -> str:
        """Return a token's text without a mark for its place in a word."""
        return self.tokens[index]

    def _text(self, token: str) -> str:
        if self.byte_level and BYTE_OF_LETTER.keys() >= set(token):
            token = bytes(BYTE_OF_LETTER[letter] for letter in token).decode(errors="replace")
        return "" if token in BYTE_TOKENS or "\ufffd" in token else token

    def parts(self, index: int) -> tuple[int, ...]:
        """Return the tokens that a token is merged from, and needs; () if it needs none."""
        return ()

    def pieces(self, index: int) -> tuple[int, ...]:
        """Return the tokens that a removed token's text is cut into; () if these are bytes."""
        return self.parts(index)

    def with_parts(self, index: int, kept: Set[int]) -> set[int]:
        """Return a token and the tokens that it needs, without those in `kept`."""
        new, left = set(), [index]
        while left:
            index = left.pop()
            if index not in kept and index not in new:
                new.add(index)
                left += self.parts(index)
        return new


@dataclass
class Bpe(Vocabulary):
    """Byte-pair encoding; `ranks` are the merges, of which the lowest comes first."""

    ranks: Mapping[tuple[str, str], float] = field(default_factory=dict)
    _cuts: dict[int, tuple[tuple[int, ...], bool]] = field(default_factory=dict, repr=False)

    def rank(self, first: str, second: str) -> float | None:
        """Return the rank of a merge; None if these two are not merged."""
        return self.ranks.get((first, second))

    def parts(self, index: int) -> tuple[int, ...]:
        cut, is_merged = self._cut(index)
        return cut if is_merged else ()

    def pieces(self, index: int) -> tuple[int, ...]:
        return self._cut(index)[0]

    def _cut(self, index: int) -> tuple[tuple[int, ...], bool]:
        """Return the two tokens of a token's last merge, and True.

        If the merges do not make the token from its letters, return what they do make, and False.
        """
        if index in self._cuts:
            return self._cuts[index]
        pieces = last = [*self.tokens[index]]
        ranks = [self.rank(*pair) for pair in pairwise(pieces)]
        while known := [rank for rank in ranks if rank is not None]:
            place, last = ranks.index(min(known)), [*pieces]
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
            del ranks[place]
            for each in range(max(0, place - 1), min(place + 1, len(ranks))):
                ranks[each] = self.rank(pieces[each], pieces[each + 1])
        is_merged = len(pieces) < len(last) == 2
        cut = tuple(map(self.ids.get, last if is_merged else pieces))
        self._cuts[index] = (() if None in cut or cut == (index,) else cut), is_merged
        return self._cuts[index]


@dataclass
class Unigram(Vocabulary):
    """Unigram: a text is cut into the tokens with the highest sum of `scores`, (tokens,) by id."""

    scores: Mapping[int, float] = field(default_factory=dict)

    def pieces(self, index: int) -> tuple[int, ...]:
        text = self.tokens[index]
        best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # of each beginning of the text
        for end in range(1, len(text) + 1):
            cuts = [
                (best[start][0] + self.scores[piece], (*best[start][1], piece))
                for start in range(end)
                if (piece := self.ids.get(text[start:end], index)) != index and piece in self.scores
            ]
            best.append(max(cuts, default=(-math.inf, ())))
        return best[-1][1]


@dataclass
class Scored(Bpe):
    """BPE whose merges are not listed: any two pieces that make a token, by falling `scores`.

    It is SentencePiece's BPE, as llama.cpp reads it (`llama` in a GGUF file).
    """

    scores: Mapping[int, float] = field(default_factory=dict)

    def rank(self, first: str, second: str) -> float | None:
        index = self.ids.get(first + second)
        return None if index is None else -self.scores[index]


@dataclass
class WordPiece(Vocabulary):
    """WordPiece: a word is cut into the longest tokens from its beginning on.

    As in a GGUF file, tokens at the beginning of a word have "▁" before them, others nothing.
    """

    def letter(self, index: int) -> str:
        return self.tokens[index].removeprefix("▁")

    def pieces(self, index: int) -> tuple[int, ...]:
        text, place, cut = self.tokens[index], 0, []
        while place < len(text):
            ends = range(len(text), place, -1)
            found = (self.ids.get(text[place:end], index) for end in ends)
            piece = next((each for each in found if each != index), None)
            if piece is None:  # the whole word becomes unknown, which is one token
                return ()
            cut.append(piece)
            place += len(self.tokens[piece])
        return tuple(cut)
