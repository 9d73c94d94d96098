"""The rule that chooses tokens, against the tokenizers themselves and brute force."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import kinds
import numpy as np
import pytest
from kinds import EN, KINDS, UK
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lib.vocabulary import choice as token_choice
from lib.vocabulary.choice import choose, likely_order, worth_their_rows
from lib.vocabulary.kinds import Vocabulary
from lib.vocabulary.tokenizer_json import TrimmableTokenizer

TEXTS = kinds.texts(UK, 80, 1) + kinds.texts(EN, 10, 2)


def counted(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    counts = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.int64)
    for each in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
        np.add.at(counts, each.ids, 1)
    return counts


def cut_by(tokens: TrimmableTokenizer, kept: set[int], texts: list[str]) -> list[list[str]]:
    """Texts cut by a tokenizer of these tokens alone."""
    smaller = Tokenizer.from_str(json.dumps(tokens.trimmed_json(sorted(kept))))
    return [smaller.encode(text, add_special_tokens=False).tokens for text in texts]


def test_it_needs_neither_torch_nor_a_tokenizer() -> None:
    code = "import sys, lib.vocabulary.choice, lib.vocabulary.kinds\n"
    code += "print({'torch', 'transformers', 'tokenizers', 'numpy'} & sys.modules.keys())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "set()\n"


@pytest.mark.parametrize("kind", KINDS)
def test_a_removed_token_is_cut_as_the_tokenizer_cuts_it(kind: str) -> None:
    tokens = TrimmableTokenizer(KINDS[kind](), "m")
    vocabulary, level = tokens.vocabulary(), tokens.is_byte_level
    data = tokens.data | {"normalizer": None, "pre_tokenizer": None}
    checked = 0
    for index, token in vocabulary.tokens.items():
        pieces = [vocabulary.tokens[piece] for piece in vocabulary.pieces(index)]
        if index in vocabulary.required or len(token) < 2 or not pieces:
            continue
        tokens.data = tokens.file = data
        (cut,) = cut_by(tokens, vocabulary.tokens.keys() - {index}, [token])
        if "".join(cut) == token:  # bytes for letters that are no tokens
            assert len(pieces) == len(cut) and (tokens.kind == "Unigram" or pieces == cut)
            checked += 1
    assert checked > (100 if level else 60)


MERGING = [kind for kind in KINDS if kind != "byte fallback"]  # whose merges make no words


@pytest.mark.parametrize("kind", MERGING)
def test_tokens_and_rise_are_those_of_a_smaller_tokenizer(kind: str) -> None:
    """Used tokens are cut alike, held-out text into about as many as is said."""
    tokenizer = KINDS[kind]()
    tokens = TrimmableTokenizer(tokenizer, "m")
    vocabulary, apart = tokens.vocabulary(), TEXTS[2:]
    counts, held_out = counted(tokenizer, TEXTS), counted(tokenizer, apart)
    choice = choose(vocabulary, counts, held_out)
    whole = [tokenizer.tokenize(text) for text in TEXTS]
    assert cut_by(tokens, set(choice.ids), TEXTS) == whole
    first = choose(vocabulary, counts - held_out, held_out * 0, rows=1)  # required tokens alone
    for index in np.flatnonzero(counts - held_out):
        first.ids.extend(vocabulary.with_parts(int(index), set(first.ids)))
    cut = cut_by(tokens, set(first.ids), apart)
    rise = sum(map(len, cut)) / held_out.sum() - 1
    assert choice.rise == pytest.approx(rise, rel=0.3, abs=0.01) and rise > 0.02


def brute_force(
    vocabulary: Vocabulary, counts: np.ndarray, held_out: np.ndarray, price: float
) -> int:
    """The rows of the best beginning of the order, by cutting every held-out token each time."""

    def pieces(index: int, kept: set[int]) -> int:
        if index in kept:
            return 1
        cut = vocabulary.pieces(index) if index in vocabulary.tokens else ()
        return sum(pieces(each, kept) for each in cut) or len(
            vocabulary.tokens.get(index, "").encode()
        )

    kept: set[int] = set()
    for index in [*vocabulary.basic, *np.flatnonzero(counts).tolist()]:
        kept |= vocabulary.with_parts(index, kept)
    kept |= vocabulary.special
    order, likely = likely_order(vocabulary, counts)
    added = [i for i in order if i not in kept][:likely]
    best, known = (np.inf, 0), set(kept)
    for index in [None, *added]:
        kept |= set() if index is None else vocabulary.with_parts(index, kept)
        takes = [1 if i in kept else pieces(i, known) for i in range(len(held_out))]
        cost = 1e6 * (held_out @ takes) / held_out.sum() + price * len(kept - known)
        best = min(best, (round(cost, 6), len(kept - known)))
    return best[1]


@pytest.mark.parametrize("make", [kinds.byte_level, kinds.unigram])
def test_rows_are_added_as_long_as_they_save_their_price(
    make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make(600)
    vocabulary = TrimmableTokenizer(tokenizer, "m").vocabulary()
    counts, held_out = counted(tokenizer, TEXTS[:1]), counted(tokenizer, TEXTS[1:])
    monkeypatch.setattr(token_choice, "PRICES", [1])
    prices = [0, 1e3, 3e3, 1e4, 3e4, 1e5, 1e6]
    added = [worth_their_rows(vocabulary, counts, held_out, price)[1] for price in prices]
    assert added == [brute_force(vocabulary, counts, held_out, price) for price in prices]
    assert added == sorted(added, reverse=True) and len(set(added)) > 1 and not added[-1]


def test_no_cliff() -> None:
    """One document more changes the rows by little, whatever text there is."""
    tokenizer = kinds.byte_level(1200)
    vocabulary = TrimmableTokenizer(tokenizer, "m").vocabulary()
    texts, rows = kinds.texts(UK, 200, 3), []
    for count in range(100, 200, 5):
        part = texts[:count]
        choice = choose(vocabulary, counted(tokenizer, part), counted(tokenizer, part[9::10]))
        rows.append(len(choice.ids))
    assert max(abs(one - other) for one, other in pairwise(rows)) <= 64


def test_a_budget_keeps_required_tokens_then_frequent_ones() -> None:
    tokenizer = kinds.byte_level()
    vocabulary = TrimmableTokenizer(tokenizer, "m").vocabulary()
    counts = counted(tokenizer, TEXTS)
    chosen = [set(choose(vocabulary, counts, counts, rows=n).ids) for n in (64, 320, 384)]
    required = {i for r in vocabulary.required for i in vocabulary.with_parts(r, set())}
    assert chosen[0] == required < chosen[1] < chosen[2]
    assert [len(ids) for ids in chosen[1:]] == [320, 384]
    often = np.argsort(-counts)[:10].tolist()
    assert chosen[1].issuperset(often) and not chosen[0].issuperset(often)
