"""Windows: the published draws written again plainly, mixtures, streams, test texts."""

import random

import pytest
import torch
from tiny import sentences, tiny_tokenizer, write_texts

from lib.data import windows as data
from lib.data.hub import TEST_DOCUMENTS
from lib.data.sources import parse_source, parse_sources
from lib.util.errors import UserError

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


def published(texts, tokenizer, nsamples, seqlen, seed, again=False):
    """The published loops for UberText and (`again`) C4."""
    random.seed(seed)
    used, windows, rows = [], [], []
    for _ in range(nsamples):
        while True:
            i = random.randint(0, len(texts) - 1)
            if i in used:
                continue
            encoded = ids(tokenizer, texts[i])
            if encoded.shape[1] > seqlen:
                break
        if not again:
            used.append(i)
        rows.append(i)
        start = random.randint(0, encoded.shape[1] - seqlen - 1)
        windows.append(encoded[:, start : start + seqlen])
    return torch.cat(windows), rows


def message(function, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    return str(caught.value)


def folder(path, train=30, test=6):
    return parse_source(str(write_texts(path, train, test)), FLAG)


# --- calibration


@pytest.mark.parametrize("seed", range(5))
def test_folder_is_drawn_like_ubertext(tmp_path, tokenizer, seed):
    texts = mixed(40)
    state = random.getstate()
    source = folder(tmp_path / "uk", texts)
    windows, record = data.calibration_windows([source], tokenizer, 12, SEQLEN, seed)
    assert random.getstate() == state  # the global generator is left alone
    expected, rows = published(texts, tokenizer, 12, SEQLEN, seed)
    assert windows.dtype == torch.int64 and torch.equal(windows, expected)
    assert record["sources"][0]["rows"] == rows and len(set(rows)) == 12
    assert record["tokens"] == 12 * SEQLEN and record["name"] == "uk"
    assert record == data.calibration_windows([source], tokenizer, 12, SEQLEN, seed)[1]
    for window, row, start in zip(windows, rows, record["sources"][0]["starts"], strict=True):
        assert torch.equal(window, ids(tokenizer, texts[row])[0, start : start + SEQLEN])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["ubertext", "c4"])
def test_hub_sets_are_drawn_as_published(hub, tokenizer, name, seed):
    texts, again = mixed(25), name == "c4"
    place = "allenai/c4" if again else "mshamrai/lang-pruning-uk-uber-text-2"
    hub.sets[(place,)] = {"train": {"text": texts}, "test": {"text": texts}}
    count = 60 if again else 10
    found = data.calibration_windows([parse_source(name, FLAG)], tokenizer, count, SEQLEN, seed)
    expected, rows = published(texts, tokenizer, count, SEQLEN, seed, again)
    assert torch.equal(found[0], expected) and found[1]["sources"][0]["rows"] == rows
    assert found[1]["sources"][0]["revision"] == "c0ffee"


@pytest.mark.parametrize("seed", range(5))
def test_wikitext_is_drawn_as_published(hub, tokenizer, seed):
    texts = ["", " = Title = \n", *mixed(10)]
    column = {"text": texts}
    hub.sets[("Salesforce/wikitext", "wikitext-2-raw-v1")] = {"train": column, "test": column}
    source = parse_source("wikitext2", FLAG)
    windows, _ = data.calibration_windows([source], tokenizer, 8, SEQLEN, seed)
    encoded = ids(tokenizer, " ".join(texts))
    random.seed(seed)
    starts = [random.randint(0, encoded.shape[1] - SEQLEN - 1) for _ in range(8)]
    assert torch.equal(windows, torch.stack([encoded[0, i : i + SEQLEN] for i in starts]))
    test = data.test_set(source, tokenizer, SEQLEN)
    assert torch.equal(test.windows, stream_windows(texts, tokenizer, SEQLEN))


def test_text_file_gives_many_windows_but_not_all_the_same(tmp_path, tokenizer):
    text = "\n".join(sentences(5))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    source = parse_source(str(tmp_path / "book.txt"), FLAG)
    count = ids(tokenizer, text).numel()
    most = 4 * count // SEQLEN
    windows, record = data.calibration_windows([source], tokenizer, most, SEQLEN, 0)
    assert windows.shape == (most, SEQLEN) and len(set(record["sources"][0]["starts"])) > 1
    line = message(data.calibration_windows, [source], tokenizer, most + 1, SEQLEN, 0)
    need = -(-(most + 1) * SEQLEN // 4)
    assert f"its {count} tokens are too few for {most + 1} windows of {SEQLEN}, which" in line
    assert (
        f"at least {need}; give a longer text, --nsamples {most} or --seqlen {SEQLEN - 1}" in line
    )
    assert len(data.calibration_windows([source], tokenizer, most + 1, SEQLEN - 1, 0)[0]) > most


def test_too_few_windows_say_which_length_gives_them(hub, tmp_path, tokenizer):
    texts = ["a", *mixed(12), "b"]
    source = folder(tmp_path / "uk", texts)
    lengths = sorted((ids(tokenizer, text).numel() for text in texts), reverse=True)
    some = sum(length > SEQLEN for length in lengths)
    assert 3 < some < 12
    assert len(data.calibration_windows([source], tokenizer, some, SEQLEN, 0)[0]) == some
    line = message(data.calibration_windows, [source], tokenizer, some + 1, SEQLEN, 0)
    fits = lengths[some] - 1
    assert line.startswith(f"{FLAG} {source.text}: its 14 texts can give only {some} windows")
    assert line.endswith(f"{some + 1} are wanted; --seqlen {fits} gives {some + 1} windows")
    assert len(data.calibration_windows([source], tokenizer, some + 1, fits, 0)[0]) == some + 1
    with pytest.raises(UserError):
        data.calibration_windows([source], tokenizer, some + 1, fits + 1, 0)
    line = message(data.calibration_windows, [source], tokenizer, 2, 10_000, 0)
    assert f"the longest has {lengths[0]}; --seqlen {lengths[1] - 1} gives 2 windows" in line
    line = message(data.calibration_windows, [source], tokenizer, 15, 10_000, 0)
    assert f"use --seqlen {lengths[0] - 1} or less and a smaller --nsamples" in line
    line = message(data.calibration_windows, [source], tokenizer, 15, 4, 0)
    assert "use a smaller --nsamples or more texts" in line
    hub.sets[("allenai/c4",)] = {"train": {"text": texts}}  # which are drawn more than once
    c4 = parse_source("c4", "--prune_on_c4")
    line = message(data.calibration_windows, [c4], tokenizer, 99, 10_000, 0)
    assert f"--seqlen {lengths[0] - 1} gives 99 windows" in line
    assert len(data.calibration_windows([c4], tokenizer, 99, lengths[0] - 1, 0)[0]) == 99


def test_bos_begins_every_window_once(tmp_path):
    source = folder(tmp_path / "uk", mixed(40))
    plain, with_bos = tiny_tokenizer(add_bos=False), tiny_tokenizer(add_bos=True)
    for tokenizer in (plain, with_bos):
        windows, record = data.calibration_windows([source], tokenizer, 20, SEQLEN, 0, bos=0)
        bare, bare_record = data.calibration_windows([source], tokenizer, 20, SEQLEN, 0)
        assert record["sources"] == bare_record["sources"]  # the draws are the same
        assert (windows[:, 0] == 0).all() and not (windows[:, 1:] == 0).any()
        begun = bare[:, 0] == 0
        assert torch.equal(windows[begun], bare[begun])
        assert torch.equal(windows[~begun][:, 1:], bare[~begun][:, :-1])
    assert begun.any() and not begun.all()


# --- mixtures


def test_apportioned_by_largest_remainder():
    assert data.apportion([0.75, 0.25], 128) == [96, 32]
    assert data.apportion([1, 1, 1], 10) == [4, 3, 3]
    assert data.apportion([0.1, 0.2, 0.7], 10) == [1, 2, 7]
    assert data.apportion([5, 3, 1], 7) == [4, 2, 1]  # 3.89, 2.33, 0.78
    assert data.apportion([1], 7) == [7]


def test_mixture_interleaves_what_each_would_give_alone(tmp_path, tokenizer):
    names = [str(write_texts(tmp_path / name, mixed(40, s))) for s, name in enumerate(["uk", "en"])]
    sources = parse_sources([f"{names[0]}=3", f"{names[1]}=1"], FLAG, mixture=True)
    windows, record = data.calibration_windows(sources, tokenizer, 8, SEQLEN, 1)
    uk, _ = data.calibration_windows(sources[:1], tokenizer, 6, SEQLEN, 1)
    en, _ = data.calibration_windows(sources[1:], tokenizer, 2, SEQLEN, 1)
    parts = ["u" if (uk == window).all(1).any() else "e" for window in windows]
    assert "".join(parts) == "uueuuueu"  # six and two, each spread over the whole
    assert torch.equal(windows[[p == "u" for p in parts]], uk)
    assert torch.equal(windows[[p == "e" for p in parts]], en)
    assert record["name"] == "uk=0.75+en=0.25"
    assert [s["windows"] for s in record["sources"]] == [6, 2]
    assert [s["share"] for s in record["sources"]] == [0.75, 0.25]


# --- streams


def test_stream_is_shuffled_with_the_seed(hub, tokenizer):
    texts = mixed(data.BUFFER + 60)
    hub.sets[("allenai/c4", "uk")] = {"train": {"text": texts}, "validation": {"text": texts}}
    sources = [parse_source("c4:uk", FLAG)]
    windows, record = data.calibration_windows(sources, tokenizer, 6, SEQLEN, 0)
    rows, starts = record["sources"][0]["rows"], record["sources"][0]["starts"]
    assert len(set(rows)) == 6 and rows != sorted(rows)
    for window, row, start in zip(windows, rows, starts, strict=True):
        assert torch.equal(window, ids(tokenizer, texts[row])[0, start : start + SEQLEN])
    assert record == data.calibration_windows(sources, tokenizer, 6, SEQLEN, 0)[1]
    other = data.calibration_windows(sources, tokenizer, 6, SEQLEN, 1)[1]
    assert rows != other["sources"][0]["rows"]


def test_stream_reads_no_more_than_it_needs(hub, tokenizer, monkeypatch):
    read = []

    class Endless:
        column_names = ["text"]

        def __iter__(self):
            while True:
                read.append(1)
                yield {"text": sentences(1)[0]}

    hub.sets[("owner/name",)] = {"train": Endless(), "test": {"text": ["a"]}}
    sources = [parse_source("owner/name", FLAG)]
    data.calibration_windows(sources, tokenizer, 5, SEQLEN, 0)
    assert len(read) == data.BUFFER + 5
    monkeypatch.setattr(data, "STREAM_LIMIT", 20)
    line = message(data.calibration_windows, sources, tokenizer, 30, SEQLEN, 0)
    assert "its 20 texts can give only 20 windows" in line
    assert "all 20 texts" in message(data.calibration_windows, sources, tokenizer, 1, 10_000, 0)


# --- test windows


def stream_windows(texts, tokenizer, seqlen, separator="\n\n"):
    encoded = ids(tokenizer, separator.join(texts))
    count = encoded.numel() // seqlen
    return encoded[0, : count * seqlen].view(count, seqlen)


def test_test_text_is_tokenised_as_one(tmp_path, tokenizer):
    texts = mixed(20)
    source = folder(tmp_path / "uk", test=texts)
    found = data.test_set(source, tokenizer, SEQLEN)
    assert torch.equal(found.windows, stream_windows(texts, tokenizer, SEQLEN))
    assert found.name == "uk" and found.tokens == found.windows.numel()
    assert found.facts["windows"] == len(found.windows)
    assert found.facts["digest"] == data.digest(found.windows)
    total = ids(tokenizer, "\n\n".join(texts)).numel()
    share = len(found.windows) * (SEQLEN - 1) / total
    assert found.bytes == round(len("\n\n".join(texts).encode()) * share)


@pytest.mark.parametrize("add_bos", [False, True])
def test_test_windows_with_bos(tmp_path, add_bos):
    texts = mixed(20)
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    source = folder(tmp_path / "uk", test=texts)
    found = data.test_set(source, tokenizer, SEQLEN, bos=0)
    windows = found.windows
    assert windows.shape[1] == SEQLEN and (windows[:, 0] == 0).all()
    bare = stream_windows(texts, tiny_tokenizer(add_bos=False), SEQLEN - 1)
    assert torch.equal(windows[:, 1:], bare)
    # every token of the text is predicted, from BOS on
    text = "\n\n".join(texts)
    total = ids(tiny_tokenizer(add_bos=False), text).numel()
    assert found.bytes == found.facts["bytes"] == round(len(text.encode()) * bare.numel() / total)


def test_test_text_shorter_than_a_window(tmp_path, tokenizer):
    source = folder(tmp_path / "uk", test=["сонце"])
    count = ids(tokenizer, "сонце").numel()
    line = message(data.test_set, source, tokenizer, SEQLEN)
    assert f"has {count} tokens" in line and f"--seqlen {count}" in line
    assert len(data.test_set(source, tokenizer, count).windows) == 1


def test_large_sets_are_measured_in_part(hub, tokenizer, monkeypatch):
    """The first 1,100 documents, or those up to 4 million characters; of these 256 windows."""
    texts = sentences(TEST_DOCUMENTS + 20, words=3)
    hub.sets[("allenai/c4",)] = {"validation": {"text": texts}}
    found = data.test_set(parse_source("c4", FLAG), tokenizer, 100)
    windows = stream_windows(texts[:TEST_DOCUMENTS], tokenizer, 100, " ")
    assert len(windows) < 256 and torch.equal(found.windows, windows)
    found = data.test_set(parse_source("c4", FLAG), tokenizer, SEQLEN)
    windows = stream_windows(texts[:TEST_DOCUMENTS], tokenizer, SEQLEN, " ")
    assert len(windows) > 256 and torch.equal(found.windows, windows[:256])
    monkeypatch.setattr(data, "TEST_CHARACTERS", len(texts[0]) + 1)
    hub.sets[("owner/name",)] = {"train": {"text": texts}}
    found = data.test_set(parse_source("owner/name", FLAG), tokenizer, 5)
    assert torch.equal(found.windows, stream_windows(texts[:2], tokenizer, 5))


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("add_bos", [True, False])
def test_prompts_are_beginnings_of_documents(tmp_path, bos, add_bos):
    tokenizer, texts = tiny_tokenizer(add_bos), [*mixed(20), *sentences(3, words=300)]
    source = folder(tmp_path / "uk", test=texts)
    plain = data.test_set(source, tokenizer, SEQLEN, bos)
    known = [ids(tokenizer, text)[0].tolist() for text in texts]
    if bos is not None and not add_bos:
        known = [[bos, *one] for one in known]
    long = [one[:12] for one in known if len(one) > 12]  # half a window
    found = {n: data.test_set(source, tokenizer, SEQLEN, bos, n) for n in (0, 2, 7, len(long))}
    for count, test in found.items():
        assert torch.equal(test.windows, plain.windows) and test.facts == plain.facts
        assert test.prompts.shape == (count, 12)
        assert torch.equal(test.prompts, found[len(long)].prompts[:count])
    assert sorted(found[len(long)].prompts.tolist()) == sorted(long)


def test_prompts_of_a_single_document_are_those_of_its_windows(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("\n".join(sentences(9)), encoding="utf-8")
    source = parse_source(str(tmp_path / "book.txt"), FLAG)
    found = data.test_set(source, tokenizer, SEQLEN, None, 4)
    begun = {tuple(window[:12].tolist()) for window in found.windows}
    prompts = {tuple(one) for one in found.prompts.tolist()}
    assert len(prompts) == 4 and prompts <= begun
