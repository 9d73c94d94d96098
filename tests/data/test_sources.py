"""What a user names becomes a source and its texts, or one line that says why not."""

import gzip
import json
from types import SimpleNamespace

import huggingface_hub
import pyarrow
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
)
from pyarrow import parquet
from tiny import write_texts

from lib.data.documents import check_source, locations, read_documents
from lib.data.sources import AGAIN, BUILT_IN, JOINED, ONCE, has_test, parse_source, parse_sources
from lib.util.errors import UserError

FLAG = "--calibration_data"


def message(function, *args, **options) -> str:
    """The one line that a mistake gives; it must name the flag."""
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    text = str(caught.value)
    assert "\n" not in text and text.startswith("--")
    return text


def read(source, split="train"):
    return list(read_documents(source, split)[0])


# --- names


UBERTEXT = "mshamrai/lang-pruning-uk-uber-text-2"
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "text", JOINED, False)
NAMES = {  # what is written: hub id, config, split, column, rule of drawing, whether streamed
    "ubertext": (UBERTEXT, None, None, "text", ONCE, False),
    UBERTEXT: (UBERTEXT, None, None, "text", ONCE, False),
    "c4": ("allenai/c4", None, None, "text", AGAIN, False),
    "wikitext2": WIKITEXT,
    "Salesforce/wikitext:wikitext-2-raw-v1": WIKITEXT,
    "c4:uk": ("allenai/c4", "uk", None, "text", ONCE, True),
    "allenai/c4:en": ("allenai/c4", "en", None, "text", ONCE, True),
    "fineweb2:ukr_Cyrl": ("HuggingFaceFW/fineweb-2", "ukr_Cyrl", None, "text", ONCE, True),
    "wikipedia:uk": ("wikimedia/wikipedia", "20231101.uk", None, "text", ONCE, True),
    "owner/name:uk::body": ("owner/name", "uk", None, "body", ONCE, True),
    "owner/name::dev": ("owner/name", None, "dev", "text", ONCE, True),
}


@pytest.mark.parametrize("text", NAMES)
def test_names_of_the_hub(text):
    source = parse_source(text, FLAG)
    found = (source.hub, source.config, source.split, source.column, source.draw, source.stream)
    assert found == NAMES[text] and source.name == (text.partition("/")[2] or text)
    assert (source.train_file is None) == (text != "c4")


def test_local_names(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "uk")
    assert parse_source(f"{folder}/", FLAG).name == "uk"
    monkeypatch.chdir(folder)
    assert parse_source(".", FLAG).name == "uk"
    assert parse_source("train.jsonl", FLAG).name == "train"
    (folder / "book.txt").write_text("рядок")
    assert parse_source("book.txt", FLAG).draw == JOINED
    assert has_test(parse_source(".", FLAG)) and not has_test(parse_source("ubertext", FLAG))
    (folder / "test.jsonl").unlink()
    assert not has_test(parse_source(".", FLAG))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert parse_source("owner/name", FLAG).hub is None  # what is there goes before the hub
    (tmp_path / "c4").mkdir()
    assert parse_source("c4", FLAG).hub and parse_source("./c4", FLAG).path


@pytest.mark.parametrize(
    "text", "nothing|wikipedia|wikipedia:|a b|/no/such|./no|../no|a/b/c|no.jsonl|a/b.txt".split("|")
)
def test_what_is_not_there(text):
    line = message(parse_source, text, FLAG)
    assert f"{FLAG} {text}: no such" in line
    assert "/" in text or "." in text or all(name in line for name in BUILT_IN)


# --- mixtures and names told apart


def test_weights(tmp_path):
    uk, equal = (str(write_texts(tmp_path / name)) for name in ("uk", "a=b"))
    sources = parse_sources([f"{uk}=3", f"{equal}=.5"], FLAG, mixture=True)
    assert [(s.text, s.weight) for s in sources] == [(uk, 3.0), (equal, 0.5)]
    assert parse_source(equal, FLAG).name == "a=b"
    for weight in ("0", "-1", "nan", "inf", "much", ""):
        line = message(parse_sources, [f"c4={weight}", "ubertext=1"], FLAG, mixture=True)
        assert f"c4={weight}: the weight" in line
    assert "every source" in message(parse_sources, ["c4=1", "ubertext"], FLAG, mixture=True)
    assert "twice" in message(parse_sources, ["c4", "c4"], FLAG)
    assert "takes no weight" in message(parse_sources, ["c4=1"], "--eval_data")
    folders = [str(write_texts(tmp_path / a / "uk")) for a in ("old", "new")]
    assert [s.name for s in parse_sources([*folders, "c4"], FLAG)] == ["old/uk", "new/uk", "c4"]
    assert "twice" in message(parse_sources, [folders[0], f"{folders[0]}/"], FLAG)


# --- local files


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def test_files_and_folders(tmp_path):
    (tmp_path / "train_b.jsonl").write_text(rows("3", "4"))
    (tmp_path / "train_a.jsonl").write_text("\n" + rows("1") + "\n" + rows("ґ2").rstrip("\n"))
    (tmp_path / "train_c.jsonl.gz").write_bytes(gzip.compress((rows("5") + "\n").encode()))
    (tmp_path / "train_0.jsonl").write_text("")
    (tmp_path / "test.jsonl").write_text(rows("t"))
    source = parse_source(str(tmp_path), FLAG)
    assert read(source) == ["1", "ґ2", "3", "4", "5"] and read(source, "test") == ["t"]
    texts = ["один", "два\n\n", "three\u2028four\u0085five\x0bsix\rseven"]  # a row each
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=2)
    (tmp_path / "a.jsonl").write_text(rows(*texts), encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows(*texts).encode()))
    for name in ("a.parquet", "a.jsonl", "a.jsonl.gz"):
        source = parse_source(str(tmp_path / name), FLAG)
        assert read(source) == read(source, "test") == texts and source.name == "a"
    (tmp_path / "a.txt").write_text("\ufeffодин\n\nдва", encoding="utf-8")
    assert read(parse_source(str(tmp_path / "a.txt"), FLAG)) == ["один\n\nдва"]


BAD_LINES = {
    b"{text}": "not JSON",
    b'{"title": "a", "id": 1}': "no column 'text'; the row has: title, id",
    b'{"text": null}': "NoneType",
    b'{"text": "\\ud800"}': "half of a surrogate pair",
    b'{"text": "\xff"}': "not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_malformed_lines_name_file_and_line(tmp_path, line):
    (tmp_path / "train_0.jsonl").write_text(rows("fine"))
    bad = rows("fine", "fine\u2028").encode() + b"\n" + line + b"\n"
    file = tmp_path / "train_1.jsonl.gz"
    file.write_bytes(gzip.compress(bad))
    problem = message(read, parse_source(str(tmp_path), FLAG))
    assert f"{file}, line 4: " in problem and BAD_LINES[line] in problem


def test_folders(tmp_path):
    (tmp_path / "valid.jsonl").write_text("")
    source = parse_source(str(tmp_path), FLAG)
    line = message(check_source, source, "train")
    assert "no train*.jsonl" in line and "valid.jsonl" in line
    assert "no test*.jsonl" in message(check_source, source, "test")
    (tmp_path / "train_0.jsonl").write_text("\n\n")
    for look in (check_source, read):
        assert "holds no text" in message(look, source, "train")
    (tmp_path / "train_0.jsonl").write_text("\n" + rows("1") + "{")
    check_source(source, "train")  # which reads the first row of each file
    (tmp_path / "train_1.jsonl").write_text("\n{")
    assert "train_1.jsonl, line 2" in message(check_source, source, "train")


def parquet_bytes(tmp_path, **columns) -> bytes:
    parquet.write_table(pyarrow.table(columns), tmp_path / "made")
    return (tmp_path / "made").read_bytes()


def test_bad_files_are_named(tmp_path):
    packed = gzip.compress(rows(*"abc" * 100).encode())
    whole = parquet_bytes(tmp_path, text=["текст"] * 50 + list("abcdef"))
    binary = pyarrow.array([b"\xff"]).cast(pyarrow.string(), safe=False)
    for name, content, words in [
        ("a.csv", b"text", ".parquet"),
        ("short.jsonl.gz", packed[:-20], "is it damaged?"),
        ("bad.jsonl.gz", packed[:20] + b"\xff\xff\xff" + packed[23:], "is it damaged?"),
        ("empty.parquet", b"", "is it damaged?"),
        ("inside.parquet", whole[:4] + b"\xff" * 36 + whole[40:], "is it damaged?"),
        ("letters.parquet", parquet_bytes(tmp_path, text=binary), "is it damaged?"),
        ("column.parquet", parquet_bytes(tmp_path, id=[1], body=["a"]), "the file has: id, body"),
        ("null.parquet", parquet_bytes(tmp_path, text=["a", None]), "null.parquet, row 1: the"),
        ("bad.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("blank.txt", b" \n", "holds no text"),
    ]:
        (tmp_path / name).write_bytes(content)
        line = message(lambda name=name: read(parse_source(str(tmp_path / name), FLAG)))
        assert name in line and words in line


# --- the hub


def test_sets_are_loaded_whole_and_pinned(hub):
    hub.sets[(UBERTEXT,)] = {"train": {"text": ["a", "b"]}, "test": {"text": ["c"]}}
    texts, revision = read_documents(parse_source("ubertext", FLAG), "train")
    assert list(texts) == ["a", "b"] and revision == "c0ffee"
    assert read(parse_source("ubertext", FLAG), "test") == ["c"]
    assert hub.calls[0] == ((UBERTEXT,), {"revision": "c0ffee"})
    hub.sets[("allenai/c4",)] = {"train": {"text": ["a"]}, "validation": {"text": ["v"]}}
    c4 = parse_source("c4", FLAG)
    assert read(c4) == ["a"] and read(c4, "test") == ["v"]
    assert [options["data_files"] for _, options in hub.calls[2:]] == [
        {"train": "en/c4-train.00000-of-01024.json.gz"},
        {"validation": "en/c4-validation.00000-of-00008.json.gz"},
    ]


def test_a_set_without_test_is_parted(hub):
    """The first 1,100 documents are the test."""
    texts = [str(number) for number in range(1102)]
    hub.sets[("owner/name", "x")] = {"train": {"text": texts}}
    source = parse_source("owner/name:x", FLAG)
    assert read(source) == ["1100", "1101"] and read(source, "test")[:2] == ["0", "1"]
    assert len(read(parse_source("owner/name:x:train", FLAG))) == 1102
    hub.sets[("owner/name", "x")] = {"train": {"text": texts[:1100]}}
    check_source(source, "train")
    assert "holds 1100 rows, of which the first 1100 are the test" in message(read, source)


@pytest.mark.parametrize(
    ("calibration", "test", "splits", "shared"),
    [
        ("o/s", "o/s", "train", False),  # parted
        ("o/s:c:train", "o/s:c", "train", True),
        ("o/s", "o/s::train", "train test", True),
        ("o/s", "o/s", "train test", False),
        ("o/s::validation", "o/s", "train validation", True),
        ("o/s:c", "o/s:d", "train", False),
        ("c4", "c4", "train validation", False),
    ],
)
def test_text_that_is_calibrated_on_and_measured_is_seen(hub, calibration, test, splits, shared):
    for key in [("o/s",), ("o/s", "c"), ("o/s", "d"), ("allenai/c4",)]:
        hub.sets[key] = {split: {"text": ["a"]} for split in splits.split()}
    places = locations(parse_source(calibration, FLAG), "train")
    assert bool(places & locations(parse_source(test, "--eval_data"), "test")) == shared


def test_what_the_hub_set_lacks(hub):
    hub.sets[("owner/name",)] = {"dev": {"body": ["a"]}, "train": {"body": ["a"], "id": [1]}}
    hub.sets[(UBERTEXT,)] = {"train": {"text": []}}
    for text, words in {
        "owner/name::tset": "no split 'tset'; there are: dev, train",
        "owner/name": "no column 'text'; there are: body, id",
        "owner/name:::id": "row 0, column 'id': the text is of type int",
        "ubertext": "the split 'train' is empty; name another",
    }.items():
        assert words in message(check_source, parse_source(text, FLAG), "train")


ANSWER = dict(response=SimpleNamespace(status_code=429, headers={}, request=None))
ERRORS = {
    "the hub refused: 429 Too Many; try": HfHubHTTPError("429 Too Many\nmore", **ANSWER),
    "no such data set on the hub, or it needs": RepositoryNotFoundError("401", **ANSWER),
    "accept their terms": GatedRepoError("403", **ANSWER),
    "the hub can't be reached (no route); check the network": HTTPError("no route"),
    "can't be loaded: x y": DatasetNotFoundError("x\ny"),
    "loaded: BuilderConfig; name a config as owner/name:CONFIG": ValueError("BuilderConfig"),
}


@pytest.mark.parametrize(("words", "error"), ERRORS.items())
def test_what_fails_on_the_hub_is_one_line(hub, words, error):
    source = parse_source("owner/name", FLAG)
    hub.error = error
    assert words in message(check_source, source, "train")


def test_what_was_downloaded_serves_without_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub.unreachable = HTTPError("no route")
    assert "(no route)" in message(check_source, parse_source("ubertext", FLAG), "train")
    for name in (UBERTEXT, "owner/name"):
        (tmp_path / f"datasets--{name.replace('/', '--')}").mkdir()
        hub.sets[(name,)] = {"train": {"text": ["a"]}}
    texts, revision = read_documents(parse_source("ubertext", FLAG), "train")
    assert list(texts) == ["a"] and revision is None
    assert hub.calls == [((UBERTEXT,), {})]
    stream = parse_source("owner/name", FLAG)  # can't come from a cache
    assert "can't be reached (no route)" in message(check_source, stream, "train")
