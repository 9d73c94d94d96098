"""Windows: the published draws written again plainly, mixtures, streams, test texts."""

import random

import pytest
import torch
from published import published_windows
from support import refused
from tiny import sentences, tiny_tokenizer, write_texts

from lib.data import windows as data
from lib.data.documents import Corpus
from lib.data.hub import TEST_DOCUMENTS
from lib.data.sources import parse_source, parse_sources
from lib.data.windows import WindowSpec

FLAG = "--calibration_data"
SEQLEN = 24


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def mixed(count: int, seed: int = 0) -> list[str]:
    """Texts of very different length, some shorter than a window."""
    draw = random.Random(seed)
    return [sentences(1, draw.random(), draw.choice([1, 4, 10, 15, 25]))[0] for _ in range(count)]


def ids(tokenizer, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt").input_ids


def folder(path, train=30, test=6):
    return parse_source(str(write_texts(path, train, test)), FLAG)


def draw(source, tokenizer, count, seqlen=SEQLEN, seed=0, bos=None):
    spec = WindowSpec(tokenizer, seqlen, bos, seed)
    windows, record = data.calibration_windows([Corpus(source)], spec, count)
    return windows.ids, record


# --- calibration


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["folder", "ubertext", "c4"])
def test_texts_are_drawn_as_published(hub, tmp_path, tokenizer, name, seed):
    texts, again = mixed(30), name == "c4"
    for place in ("allenai/c4", "mshamrai/lang-pruning-uk-uber-text-2"):
        hub.sets[(place,)] = {"train": {"text": texts}, "test": {"text": texts}}
    source = folder(tmp_path / "uk", texts) if name == "folder" else parse_source(name, FLAG)
    count, state = (60 if again else 10), random.getstate()
    windows, record = draw(source, tokenizer, count, seed=seed)
    assert random.getstate() == state  # the global generator is left alone
    expected, rows, starts = published_windows(texts, tokenizer, count, SEQLEN, seed, again)
    assert windows.dtype == torch.int64 and torch.equal(windows, expected)
    (its,) = record["sources"]
    assert (its["rows"], its["starts"]) == (rows, starts)
    assert its["revision"] == (None if name == "folder" else "c0ffee")
    assert record == draw(source, tokenizer, count, seed=seed)[1]


@pytest.mark.parametrize("seed", range(2))
def test_wikitext_is_drawn_as_published(hub, tokenizer, seed):
    texts = ["", " = Title = \n", *mixed(10)]
    column = {"text": texts}
    hub.sets[("Salesforce/wikitext", "wikitext-2-raw-v1")] = {"train": column, "test": column}
    source = parse_source("wikitext2", FLAG)
    windows, _ = draw(source, tokenizer, 8, seed=seed)
    encoded = ids(tokenizer, " ".join(texts))
    random.seed(seed)
    starts = [random.randint(0, encoded.shape[1] - SEQLEN - 1) for _ in range(8)]
    assert torch.equal(windows, torch.stack([encoded[0, i : i + SEQLEN] for i in starts]))
    test = data.test_set(Corpus(source), WindowSpec(tokenizer, SEQLEN))
    assert torch.equal(test.ids, stream_windows(texts, tokenizer, SEQLEN))


def test_text_file_gives_many_windows_but_not_all_the_same(tmp_path, tokenizer):
    text = "\n".join(sentences(5))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    source = parse_source(str(tmp_path / "book.txt"), FLAG)
    count = ids(tokenizer, text).numel()
    most = 4 * (count - SEQLEN) // SEQLEN + 1  # which begin a fourth of a window apart, on average
    windows, record = draw(source, tokenizer, most)
    assert windows.shape == (most, SEQLEN) and len(set(record["sources"][0]["starts"])) > 1
    line = refused(draw, source, tokenizer, most + 1)
    missing = SEQLEN + most * SEQLEN // 4 - count
    assert f"its {count} tokens are {missing} too few for {most + 1} windows of {SEQLEN}" in line
    assert f"Give more text, --nsamples {most} or --seqlen {SEQLEN - 1}." in line
    assert len(draw(source, tokenizer, most + 1, SEQLEN - 1)[0]) > most
    assert "too few for 4 windows" in refused(draw, source, tokenizer, 4, count - 9)


def test_too_few_windows_say_which_length_gives_them(hub, tmp_path, tokenizer):
    texts = ["a", *mixed(12), "b"]
    source = folder(tmp_path / "uk", texts)
    lengths = sorted((ids(tokenizer, text).numel() for text in texts), reverse=True)
    some = sum(length > SEQLEN for length in lengths)
    assert 3 < some < 12 and len(draw(source, tokenizer, some)[0]) == some
    line = refused(draw, source, tokenizer, some + 1)
    fits = lengths[some] - 1
    assert line.startswith(f"{FLAG} {source.text}: its 14 texts fill {some} of {some + 1} windows")
    assert line.endswith(f". Use --seqlen {fits} or --nsamples {some}.")
    assert len(draw(source, tokenizer, some + 1, fits)[0]) == some + 1
    refused(draw, source, tokenizer, some + 1, fits + 1)
    line = refused(draw, source, tokenizer, 15, 10_000)
    assert f"longest has {lengths[0]} tokens. Give longer texts." in line
    hub.sets[("allenai/c4",)] = {"train": {"text": texts}}  # which are drawn more than once
    c4 = parse_source("c4", "--prune_on_c4")
    assert refused(draw, c4, tokenizer, 99, 10_000).endswith(f" Use --seqlen {lengths[0] - 1}.")
    assert len(draw(c4, tokenizer, 99, lengths[0] - 1)[0]) == 99


def test_bos_begins_every_window_once(tmp_path):
    source = folder(tmp_path / "uk", mixed(40))
    for tokenizer in (tiny_tokenizer(add_bos=False), tiny_tokenizer(add_bos=True)):
        windows, record = draw(source, tokenizer, 20, bos=0)
        bare, bare_record = draw(source, tokenizer, 20)
        assert record["sources"] == bare_record["sources"]  # the draws are the same
        assert (windows[:, 0] == 0).all() and not (windows[:, 1:] == 0).any()
        begun = bare[:, 0] == 0
        assert torch.equal(windows[begun], bare[begun])
        assert torch.equal(windows[~begun][:, 1:], bare[~begun][:, :-1])
    assert begun.any() and not begun.all()


# --- mixtures and streams


def test_apportioned_by_largest_remainder():
    assert data.apportion([1, 1, 1], 10) == [4, 3, 3]
    assert data.apportion([0.1, 0.2, 0.7], 10) == [1, 2, 7]
    assert data.apportion([5, 3, 1], 7) == [4, 2, 1]  # 3.89, 2.33, 0.78


def test_mixture_interleaves_what_each_would_give_alone(tmp_path, tokenizer):
    names = [str(write_texts(tmp_path / name, mixed(40, s))) for s, name in enumerate(["uk", "en"])]
    sources = parse_sources([f"{names[0]}=3", f"{names[1]}=1"], FLAG, mixture=True)
    spec = WindowSpec(tokenizer, SEQLEN, seed=1)
    windows, record = data.calibration_windows([*map(Corpus, sources)], spec, 8)
    windows = windows.ids
    uk, _ = draw(sources[0], tokenizer, 6, seed=1)
    en, _ = draw(sources[1], tokenizer, 2, seed=1)
    parts = ["u" if (uk == window).all(1).any() else "e" for window in windows]
    assert "".join(parts) == "uueuuueu"  # six and two, each spread over the whole
    assert torch.equal(windows[[p == "u" for p in parts]], uk)
    assert torch.equal(windows[[p == "e" for p in parts]], en)
    assert record["name"] == "uk=0.75+en=0.25"
    assert [(s["windows"], s["share"]) for s in record["sources"]] == [(6, 0.75), (2, 0.25)]


def test_stream_is_shuffled_with_the_seed(hub, tokenizer):
    texts = mixed(data.BUFFER + 60)
    hub.sets[("allenai/c4", "uk")] = {"train": {"text": texts}, "validation": {"text": texts}}
    source = parse_source("c4:uk", FLAG)
    windows, record = draw(source, tokenizer, 6)
    rows, starts = record["sources"][0]["rows"], record["sources"][0]["starts"]
    assert len(set(rows)) == 6 and rows != sorted(rows)
    for window, row, start in zip(windows, rows, starts, strict=True):
        assert torch.equal(window, ids(tokenizer, texts[row])[0, start : start + SEQLEN])
    assert record == draw(source, tokenizer, 6)[1]
    assert rows != draw(source, tokenizer, 6, seed=1)[1]["sources"][0]["rows"]


def test_stream_reads_no_more_than_it_needs(hub, tokenizer, monkeypatch):
    read = []

    class Endless:
        column_names = ["text"]

        def __iter__(self):
            while True:
                read.append(1)
                yield {"text": sentences(1)[0]}

    hub.sets[("owner/name",)] = {"train": Endless(), "test": {"text": ["a"]}}
    source = parse_source("owner/name", FLAG)
    draw(source, tokenizer, 5)
    assert len(read) == 1 + data.BUFFER + 5  # the first tells whether it is a dialogue
    monkeypatch.setattr(data, "STREAM_LIMIT", 20)
    assert "its 20 texts fill 20 of 30 windows" in refused(draw, source, tokenizer, 30)


# --- test windows


def stream_windows(texts, tokenizer, seqlen, separator="\n\n"):
    encoded = ids(tokenizer, separator.join(texts))
    count = encoded.numel() // seqlen
    return encoded[0, : count * seqlen].view(count, seqlen)


@pytest.mark.parametrize(("bos", "add_bos"), [(None, False), (0, False), (0, True)])
def test_test_text_is_tokenised_as_one(tmp_path, bos, add_bos):
    texts, bare = mixed(20), tiny_tokenizer(add_bos=False)
    source = folder(tmp_path / "uk", test=texts)
    found = data.test_set(Corpus(source), WindowSpec(tiny_tokenizer(add_bos=add_bos), SEQLEN, bos))
    text = "\n\n".join(texts)
    if bos is None:
        expected = stream_windows(texts, bare, SEQLEN)
        assert torch.equal(found.ids, expected)
        predicted = expected[:, 1:]
    else:  # every token of the text is predicted, from BOS on
        expected = stream_windows(texts, bare, SEQLEN - 1)
        assert torch.equal(found.ids[:, 1:], expected) and (found.ids[:, 0] == bos).all()
        predicted = expected
    tokens = bare.convert_ids_to_tokens(predicted.flatten())  # a letter of theirs is a byte
    covered = found.record["bytes"]
    assert covered == pytest.approx(sum(map(len, tokens)), abs=len(expected))  # split letters
    line = refused(data.test_set, Corpus(source), WindowSpec(bare, 10_000))
    assert f"has {ids(bare, text).numel()} tokens, less than one" in line


def test_large_sets_are_measured_in_part(hub, tokenizer, monkeypatch):
    """The first 1,100 documents, or those up to 4 million characters; of these 1 KiB a token."""
    texts = [*sentences(40, words=3), *sentences(TEST_DOCUMENTS - 20, words=12)]
    hub.sets[("allenai/c4",)] = {"validation": {"text": texts}}
    for seqlen, whole in ((200, True), (SEQLEN, False)):
        text = " ".join(texts[:TEST_DOCUMENTS]).encode()
        assert (len(text) < 1024 * seqlen) == whole
        text = text[: 1024 * seqlen].decode(errors="ignore")
        for cut in (tokenizer, tiny_tokenizer(size=259)):
            found = data.test_set(Corpus(parse_source("c4", FLAG)), WindowSpec(cut, seqlen))
            assert torch.equal(found.ids, stream_windows([text], cut, seqlen))
        # the same text, though others make more tokens of it
        assert len(found.ids) > 1.5 * len(stream_windows([text], tokenizer, seqlen))
    monkeypatch.setattr(data, "TEST_CHARACTERS", len(texts[0]) + 1)
    hub.sets[("owner/name",)] = {"train": {"text": texts}}
    found = data.test_set(Corpus(parse_source("owner/name", FLAG)), WindowSpec(tokenizer, 5))
    assert torch.equal(found.ids, stream_windows(texts[:2], tokenizer, 5))


@pytest.mark.parametrize(("bos", "add_bos"), [(None, True), (0, True), (0, False)])
def test_prompts_are_beginnings_of_documents(tmp_path, bos, add_bos):
    tokenizer, texts = tiny_tokenizer(add_bos), [*mixed(20), *sentences(3, words=300)]
    source = folder(tmp_path / "uk", test=texts)
    known = [ids(tokenizer, text)[0].tolist() for text in texts]
    if bos is not None and not add_bos:
        known = [[bos, *one] for one in known]
    long = [one[:12] for one in known if len(one) > 12]  # half a window
    spec = WindowSpec(tokenizer, SEQLEN, bos)
    found = {n: data.test_set(Corpus(source), spec, n) for n in (0, 2, len(long))}
    for count, test in found.items():
        assert torch.equal(test.ids, found[0].ids) and test.record == found[0].record
        assert len(test.prompts) == count
        assert all(map(torch.equal, test.prompts, found[len(long)].prompts))
    assert sorted(ids.tolist() for ids in found[len(long)].prompts) == sorted(long)


def test_prompts_of_a_single_document_are_those_of_its_windows(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("\n".join(sentences(9)), encoding="utf-8")
    source = parse_source(f"{tmp_path}/book.txt", FLAG)
    found = data.test_set(Corpus(source), WindowSpec(tokenizer, SEQLEN), 4)
    begun = {tuple(window[:12].tolist()) for window in found.ids}
    prompts = {tuple(one.tolist()) for one in found.prompts}
    assert len(prompts) == 4 and prompts <= begun
