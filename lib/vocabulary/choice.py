"""Choose the tokens that a text needs: the rule of vocabulary trimming, from counts alone.

Every token that the text uses is kept, with the tokens that it is merged from. A small text does
not use all tokens of its language, so unused ones are added, the most likely first, by a price: as
long as a row saves at least `price` tokens per million of held-out text. Which tokens save how much
is known without another pass over the text: a removed token is cut as the vocabulary says
(lib/vocabulary/kinds.py). Plain Python.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data.languages import script_of
from ..util.errors import UserError, first_line
from ..util.quirks import MISLEADING_ROWS
from .kinds import Vocabulary

if TYPE_CHECKING:
    import numpy as np

REVISION = 6  # incremented when the same counts give other tokens
MOST_ROWS = 0.9  # share of rows above which trimming saves too little
PRICE = 0.2  # tokens per million of held-out text that a row saves at least
PRICES = [2 ** (step / 4) for step in range(-4, 5)]  # factors: the mean of what they ask for
UNLIKELY = 3e-8  # expected share of a token in a text below which it is not worth a row
COMMON_LETTER = 1e-4  # least share of the texts' tokens with a letter for the letter to be common
COMMON_SCRIPT = 1e-3  # least share of the texts' tokens in a script for its letters to stay
MULTIPLE = 64  # granularity of rows, for fast matrix products on GPUs


class Choice(NamedTuple):
    """The tokens to keep."""

    ids: list[int]
    used: int  # number of tokens that the text uses
    likely: int  # number of unused tokens that are worth their rows
    rise: float | None  # of held-out text's tokens without these, a share; None: none held out


def choose(
    vocabulary: Vocabulary,
    counts: np.ndarray,
    held_out: np.ndarray,
    *,
    price: float = PRICE,
    rows: int | None = None,
    n_unnamed: int = 0,
) -> Choice:
    """Return the tokens to keep by how often a text has each, `counts` (ids,).

    `held_out` (ids,) are the counts of a part of the text, a tenth of its documents: without it,
    the other tokens show what the language lacks. If nothing was held out, all likely tokens are
    kept. How many are worth their rows depends on the texts alone, not on the tokens that are
    required for other reasons. Tokens fill the rows up to a multiple of MULTIPLE, less `n_unnamed`
    rows without a token.

    With `rows`, so many rows are kept instead: all required tokens, even if they are more, then
    used ones by falling count, then likely ones.
    """
    if not vocabulary.has_bytes:
        vocabulary.basic |= letters_of(vocabulary, counts)
    order, likely = likely_order(vocabulary, counts)
    used, rise = _used(vocabulary, counts), None
    if held_out.any():
        rise, likely = worth_their_rows(vocabulary, counts - held_out, held_out, price)
    kept, limit = with_parts(vocabulary, vocabulary.required), (rows or 0) - n_unnamed
    if rows is None:
        ordinary = with_parts(vocabulary, [*vocabulary.basic, *used])
        kept |= _fill_(vocabulary, ordinary, order, len(ordinary) + likely)
        limit = round_up(len(kept) + n_unnamed) - n_unnamed
    _fill_(vocabulary, kept, order, limit)
    return Choice(sorted(kept), len(used), likely, rise)


def _fill_(vocabulary: Vocabulary, kept: set[int], order: Iterable[int], limit: int) -> set[int]:
    """Add the first tokens of an order to `kept`, with their parts, up to a `limit`."""
    for index in order:
        if len(kept) >= limit:
            break
        new = vocabulary.with_parts(index, kept)
        kept |= new if len(kept) + len(new) <= limit else set()
    return kept


def read_list(
    flag: str, file: str, tokens: Mapping[int, str], name: str, needed: Set[int]
) -> dict[str, Any]:
    """Return `ids`, `rows` and `record` of the list that another run has written.

    Raises UserError with the flag unless each of its tokens has the same text here, in the model
    `name`, and it has the `needed` ids.
    """
    what = f"{flag} {file}"
    try:
        kept = json.loads(Path(file).read_text("utf-8"))
        same = [tokens.get(index) for index in kept["ids"]] == kept["tokens"]
        kept["rows"], kept["record"]  # a whole list has them
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "Name the vocabulary.json of an earlier run"
        raise UserError(what, f"it cannot be read ({first_line(error)})", fix) from error
    if not same:
        problem = f"its tokens are not those of {name}"
        raise UserError(what, problem, "Name one of a model with the same vocabulary")
    if missing := needed.difference(kept["ids"]):
        problem = f"it lacks {tokens[min(missing)]!r}, which {name} needs"
        raise UserError(what, problem, "Trim this model first, and keep its list")
    return kept


def worth_their_rows(
    vocabulary: Vocabulary, counts: np.ndarray, held_out: np.ndarray, price: float
) -> tuple[float, int]:
    """Return the rise in tokens of held-out text by the tokens of other text, and how many to add.

    `counts` (ids,) are those of the other text. A token saves the pieces that it would be cut into,
    as often as held-out text has it. For a price, the number maximizes the tokens saved less the
    price of the rows: the last rows save at least their price, and any further ones less. Where the
    price is near the mean saving of a stretch, a few tokens decide about thousands of rows; the
    number is therefore the mean of those for prices from half to twice the given one.
    """
    order, likely = likely_order(vocabulary, counts)
    kept = with_parts(vocabulary, [*vocabulary.basic, *_used(vocabulary, counts)])
    kept |= vocabulary.special  # matched whole, and kept if any text uses them
    missing = [index for index in _used(vocabulary, held_out) if index not in kept]
    saves = {i: held_out[i].item() * (_n_pieces(vocabulary, i, kept) - 1) for i in missing}
    total = held_out.sum().item()
    rise = sum(saves.values()) / total
    rows, saved = [0], [0]  # after each token that is added
    for index in order:
        if len(rows) > likely or price * PRICES[0] * rows[-1] > 1e6 * rise:
            break  # further rows cost more than all that can be saved
        if index not in kept:
            new = vocabulary.with_parts(index, kept)
            kept |= new
            rows.append(rows[-1] + len(new))
            saved.append(saved[-1] + sum(saves.get(each, 0) for each in new))
    best = []
    for factor in PRICES:
        costs = [price * factor * n - 1e6 / total * s for n, s in zip(rows, saved, strict=True)]
        best.append(rows[costs.index(min(costs))])
    return rise, round(sum(best) / len(best))


def _n_pieces(vocabulary: Vocabulary, index: int, kept: Set[int]) -> int:
    """Return the number of `kept` tokens into which a token's text is cut."""
    count, left = 0, [index]
    while left:
        index = left.pop()
        pieces = () if index in kept else vocabulary.pieces(index)
        bytes_ = len(vocabulary.tokens[index].encode())
        count += 0 if pieces else 1 if index in kept else max(1, bytes_)
        left += pieces
    return count


def _used(vocabulary: Vocabulary, counts: np.ndarray) -> list[int]:
    """Return the tokens with counts (ids,) above 0; ids without a token do not count."""
    return [index for index in counts.nonzero()[0].tolist() if index in vocabulary.tokens]


def with_parts(vocabulary: Vocabulary, ids: Iterable[int]) -> set[int]:
    """Return tokens with all tokens that they are merged from."""
    kept: set[int] = set()
    for index in ids:
        kept |= vocabulary.with_parts(index, kept)
    return kept


def likely_order(vocabulary: Vocabulary, counts: np.ndarray) -> tuple[list[int], int]:
    """Return the used and ordinary tokens, by falling count and then most likely first, and how
    many of the unused are likely.

    A tokenizer learns its most frequent tokens first. By Zipf's law, the token of rank r among
    the N of a script thus has about 1 / (r ln N) of that script's share of the text. Tokens with
    letters that are not common in the text, and those below UNLIKELY, come last.
    """
    texts, scripts = vocabulary.texts, vocabulary.scripts
    n_letters: Counter[str] = Counter()
    shares: Counter[str | None] = Counter()  # by script; None: no letters
    used = [(index, counts[index].item()) for index in _used(vocabulary, counts)]
    for index, n in used:
        shares[scripts.get(index)] += n
        for letter in set(texts[index]):
            n_letters[letter] += n
    total = sum(shares.values())
    common = {letter for letter, n in n_letters.items() if n >= COMMON_LETTER * total}
    by_count = [index for index, _ in sorted(used, key=lambda item: (-item[1], item[0]))]
    ranks: Counter[str | None] = Counter()
    sizes = Counter(scripts.values())
    expected: dict[int, float] = {}
    for index, script in sorted(scripts.items()):
        ranks[script] += 1
        zipf = ranks[script] * math.log(sizes[script] + 1)
        known = bool(texts[index]) and common.issuperset(texts[index])
        expected[index] = shares[script] / total / zipf if known and total else 0.0
    unused = sorted(scripts.keys() - set(by_count), key=lambda i: (-expected[i], i))
    return by_count + unused, sum(expected[index] >= UNLIKELY for index in unused)


def letters_of(vocabulary: Vocabulary, counts: np.ndarray) -> set[int]:
    """Return the single characters that may occur in any text in the scripts of a text, by its
    counts (ids,)."""
    scripts = common_scripts(vocabulary.tokens, counts)
    letters = ((index, vocabulary.letter(index)) for index in vocabulary.tokens)
    return {i for i, letter in letters if len(letter) == 1 and belongs(letter, scripts)}


def common_scripts(tokens: Mapping[int, str], counts: np.ndarray) -> set[str | None]:
    """Return the scripts of a text by its counts (ids,), and None for what is no letter."""
    shares: Counter[str | None] = Counter()
    for index in counts.nonzero()[0].tolist():
        shares[script_of(tokens.get(index, ""))] += counts[index].item()
    least = COMMON_SCRIPT * sum(shares.values())
    return {script for script, n in shares.items() if n >= least} | {None}


def belongs(letter: str, scripts: Set[str | None]) -> bool:
    """Return whether a single character may occur in any text in `scripts`.

    Letters, digits and marks do by the script in their Unicode names; ASCII and other signs do in
    all scripts, but neither emoji and the like nor private and unassigned characters.
    """
    kind = unicodedata.category(letter)
    if letter.isascii() or letter.isalpha():
        return letter.isascii() or script_of(letter) in scripts
    if kind[0] == "M" or kind == "Nd":
        names = re.findall("[A-Z]+", unicodedata.name(letter, ""))
        return not {"COMBINING", *scripts}.isdisjoint(names)
    return kind not in ("So", "Co", "Cn")


def round_up(rows: int) -> int:
    """Return the next multiple of MULTIPLE that is not in MISLEADING_ROWS."""
    rounded = rows + -rows % MULTIPLE
    return rounded + MULTIPLE if rounded in MISLEADING_ROWS else rounded
