"""The windows that a model is recovered on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import chats
import pytest
import tiny
import torch
from torch import Tensor

from lib.data import windows as data
from lib.data.documents import Corpus
from lib.data.samples import Windows, as_windows
from lib.data.sources import parse_sources
from lib.data.training import OverlapFilter, TrainingText, training_windows
from lib.data.windows import WindowSpec, tokenize

SEQLEN = 16
pytestmark = pytest.mark.usefixtures("elsewhere")


def drawn(
    texts: list[str],
    count: int,
    seed: int = 0,
    bos: int | None = None,
    tests: Sequence[Tensor] = (),
    seqlen: int = SEQLEN,
    calibration: Tensor | None = None,
) -> TrainingText:
    sources = parse_sources(texts, "--calibration_data", mixture=True)
    spec = WindowSpec(tiny.tiny_tokenizer(), seqlen, bos, seed)
    seen = None if calibration is None else Windows(calibration)
    corpora = [*map(Corpus, sources)]
    return training_windows(corpora, spec, count, [*map(as_windows, tests)], seen)


def rows(windows: Windows | Tensor) -> set[tuple[int, ...]]:
    return {tuple(row.tolist()) for row in as_windows(windows).ids}


def seen(text: TrainingText) -> Tensor:
    return text.windows.ids[text.order]


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    tiny.write_texts("uk", train=tiny.sentences(60, seed=1))
    tiny.write_texts("en", train=tiny.sentences(60, seed=2))
    return ["uk", "en"]


def cut(sentences: list[str], seqlen: int = SEQLEN) -> set[tuple[int, ...]]:
    """Every window that documents can give."""
    found = set()
    for text in sentences:
        ids = tokenize(tiny.tiny_tokenizer(), text)
        found |= rows(ids[: len(ids) // seqlen * seqlen].view(-1, seqlen))
    return found


def test_windows_are_cut_from_documents_by_seed(two: list[str]) -> None:
    text = drawn(["uk"], 20)
    assert seen(text).shape == (20, SEQLEN) and len(text.held_out) == 4
    assert rows(seen(text)) | rows(text.held_out) <= cut(tiny.sentences(60, seed=1))
    assert len(rows(seen(text))) == 20 and not rows(seen(text)) & rows(text.held_out)
    again, other = drawn(["uk"], 20), drawn(["uk"], 20, seed=1)
    assert torch.equal(seen(again), seen(text)) and again.record == text.record
    assert text.record["digest"] != other.record["digest"]
    assert text.record["windows"] == 20 and text.record["sources"][0]["passes"] == 1


def test_held_out_is_what_calibration_has_not_seen(two: list[str]) -> None:
    held_out = rows(drawn(["uk"], 20).held_out)
    calibration = torch.tensor([*held_out])  # with these, the choice would be the same
    other = drawn(["uk"], 20, calibration=calibration)
    assert len(other.held_out) == 4 and not rows(other.held_out) & held_out
    everything = torch.tensor([*cut(tiny.sentences(60, seed=1))])
    assert rows(drawn(["uk"], 20, calibration=everything).held_out) == held_out


def test_dialogues_that_begin_alike_are_told_apart() -> None:
    """All have the same words of a system, longer than a passage."""
    tokenizer, seqlen = chats.tokenizer_with(chats.LLAMA_3), 320
    system = [{"role": "system", "content": " ".join(tiny.WORDS[:12] * 4)}]
    chats.write(Path("chat"), [system + each for each in chats.some(60, words=25)], [])
    sources = parse_sources(["chat"], "--calibration_data")
    spec = WindowSpec(tokenizer, seqlen)
    corpora = [*map(Corpus, sources)]
    first = training_windows(corpora, spec, 20).held_out
    other = training_windows(corpora, spec, 20, calibration=Windows(first.ids)).held_out
    assert len(first) == len(other) == 4 and not rows(first) & rows(other)


def test_a_mixture_by_weight_spread_evenly(two: list[str]) -> None:
    text = drawn(["uk=0.75", "en=0.25"], 40)
    english = cut(tiny.sentences(60, seed=2))
    which = [tuple(row.tolist()) in english for row in seen(text)]
    assert sum(which) == 10
    assert all(sum(which[start : start + 8]) == 2 for start in range(0, 40, 8))
    assert sum(tuple(row.tolist()) in english for row in text.held_out.ids) == 1
    assert [one["share"] for one in text.record["sources"]] == [0.75, 0.25]
    few = drawn(["uk=0.9", "en=0.1"], 40)  # too few for a window to hold out
    assert [one["held_out"] for one in few.record["sources"]] == [4, 0]


def test_a_short_text_is_read_again_in_another_order() -> None:
    tiny.write_texts("few", train=tiny.sentences(4))
    text = drawn(["few"], 200)
    (source,) = text.record["sources"]
    size = len(text.windows)
    assert source["passes"] == -(-200 // size) > 2 and source["windows"] == size
    first, second = text.order[:size].tolist(), text.order[size : 2 * size].tolist()
    assert sorted(first) == sorted(second) == list(range(size)) and first != second
    (out,) = [row for row in tiny.sentences(4) if rows(text.held_out) & cut([row])]
    assert not cut([out]) & rows(text.windows)


def test_held_out_are_whole_documents_or_a_piece_of_a_single_one() -> None:
    texts, seqlen = tiny.sentences(60, seed=1) + tiny.sentences(2, seed=7, words=900), 32
    tiny.write_texts("uk", train=texts)
    owners = {row: number for number, text in enumerate(texts) for row in cut([text], seqlen)}
    for count in (20, 300, 9999):
        text = drawn(["uk"], count, seqlen=seqlen)
        trained, held = ({owners[row] for row in rows(w)} for w in (text.windows, text.held_out))
        assert held and not trained & held and max(held) < 60  # the long ones are trained on
        assert rows(text.held_out) <= cut([texts[number] for number in held], seqlen)
    Path("book.txt").write_text(" ".join(texts))
    text = drawn(["book.txt"], 9999, seqlen=seqlen)
    ids = tokenize(tiny.tiny_tokenizer(), " ".join(texts))
    every = [tuple(row) for row in ids[: len(ids) // seqlen * seqlen].view(-1, seqlen).tolist()]
    places = [every.index(tuple(row)) for row in text.held_out.ids.tolist()]
    assert places == list(range(places[0], places[0] + 16))
    assert not rows(text.held_out) & rows(text.windows)


def test_short_documents_share_a_window() -> None:
    """Whole, but for the last one; where one begins it is not to be foretold."""
    texts = [tiny.sentences(1, seed, words=3 + seed % 4)[0] for seed in range(90)]
    tiny.write_texts("uk", train=texts)
    known = {tuple(tokenize(tiny.tiny_tokenizer(), text).tolist()) for text in texts}
    text = drawn(["uk"], 9999, seqlen=64)
    documents = []
    for windows in (text.windows, text.held_out):
        assert torch.equal(windows.mask, windows.positions > 0)
        for ids, positions in zip(windows.ids.tolist(), windows.positions.tolist(), strict=True):
            starts = [n for n, place in enumerate(positions) if place == 0] + [64]
            documents += [tuple(ids[a:b]) for a, b in itertools.pairwise(starts[:-1])]
            assert positions == [n for a, b in itertools.pairwise(starts) for n in range(b - a)]
    assert len(documents) > 60 and set(documents) <= known


def test_nothing_of_the_test_text_is_trained_on() -> None:
    """Wherever in a document it stands, and however windows fall."""
    seqlen = 64  # chance makes shorter passages alike
    train, test = tiny.sentences(30, 1, words=120), tiny.sentences(3, 5, words=120)
    draw = random.Random(0)
    stolen = [f"{' '.join(draw.choices(tiny.WORDS, k=5))} {text}" for text in test]
    tiny.write_texts("mixed", train=train + stolen, test=test)
    (source,) = parse_sources(["mixed"], "--eval_data")
    known = data.test_set(Corpus(source), WindowSpec(tiny.tiny_tokenizer(), seqlen)).windows
    plain = drawn(["mixed"], 9999, seqlen=seqlen)
    text = drawn(["mixed"], 9999, tests=[known], seqlen=seqlen)
    every, left = (rows(one.windows) | rows(one.held_out) for one in (plain, text))
    dropped = every - left
    assert dropped <= cut(stolen, seqlen) and text.record["sources"][0]["dropped"] == len(dropped)
    # a document's first window may hold too little of the passage to be recognised
    assert len(left - cut(train, seqlen)) <= len(stolen)


def test_with_bos(two: list[str]) -> None:
    text, plain = drawn(["uk"], 20, bos=0), drawn(["uk"], 20)
    for one, other in ((seen(text), seen(plain)), (text.held_out.ids, plain.held_out.ids)):
        assert (one[:, 0] == 0).all()
        begun = other[:, 0] == 0
        assert torch.equal(one[begun], other[begun])
        assert torch.equal(one[~begun, 1:], other[~begun, :-1])


def test_passages_are_found_as_by_a_slow_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.data.training.CHUNK", 7 * SEQLEN)
    generator = torch.Generator().manual_seed(0)
    tests = torch.randint(7, (5, SEQLEN), generator=generator)
    windows = torch.randint(7, (400, SEQLEN), generator=generator)
    windows[::9, 3:11] = tests[torch.arange(len(windows[::9])) % 5, 8:]
    windows[::7, 6:14] = tests[torch.arange(len(windows[::7])) % 5, 1:9]
    for bos, first in ((None, 0), (0, 1)):
        passages = [
            tuple(test[start : start + 8].tolist())
            for test in tests
            for start in range(first, SEQLEN - 7, 8)
        ]
        expected = [
            any(tuple(row[i : i + 8].tolist()) in passages for i in range(SEQLEN - 7))
            for row in windows
        ]
        assert 0 < sum(expected) < 400
        found = OverlapFilter([Windows(tests)], WindowSpec(tiny.tiny_tokenizer(), SEQLEN, bos))
        assert found.found_in(windows).tolist() == expected
    assert not OverlapFilter([], WindowSpec(tiny.tiny_tokenizer(), SEQLEN)).found_in(windows).any()
    assert found.found_in(windows[:0]).tolist() == []
