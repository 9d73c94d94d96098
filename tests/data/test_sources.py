"""What a user names becomes a source and its texts, or one line that says why not."""

from __future__ import annotations

import gzip
import json
import os
from itertools import product
from pathlib import Path

import huggingface_hub
import pyarrow
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HTTPError
from pyarrow import parquet
from support import named, refused
from tiny import sentences, write_texts

from lib.data import documents
from lib.data.documents import Corpus, check_corpus, locations, read_line
from lib.data.sources import (
    AGAIN,
    BUILT_IN,
    JOINED,
    ONCE,
    has_test,
    is_in_path,
    parse_source,
    parse_sources,
)
from lib.run.windows import same_texts
from lib.util.errors import UserError, fields_named

FLAG = "--calibration_data"
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


def corpus(text: str | Path, flag: str = FLAG) -> Corpus:
    return Corpus(parse_source(str(text), flag))


def read(source: Corpus | str | Path, split: str = "train") -> list:
    found = source if isinstance(source, Corpus) else corpus(source)
    return list(found.documents(split))


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def put(file: Path, content: str | bytes | dict) -> Path:
    """Write columns as parquet, and text as it is, by gzip where the name says so."""
    if isinstance(content, dict):
        parquet.write_table(pyarrow.table(content), file)
        return file
    data = content.encode() if isinstance(content, str) else content
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def test_names() -> None:
    for text, expected in NAMES.items():
        source = parse_source(text, FLAG)
        found = (source.hub, source.config, source.split, source.column, source.draw, source.stream)
        assert found == expected and source.name == (text.partition("/")[2] or text)
        assert (source.train_file is None) == (text != "c4")
    for name, column in [("o/s", "body"), ("o/s:::own", "own"), ("ubertext", "text")]:
        assert parse_source(name, FLAG, column="body").column == column
    with fields_named(calibration_data="--data"):  # in warnings too
        assert str(parse_source("ubertext", "{--calibration_data}")) == "--data ubertext"
    for text in "nothing|wikipedia|wikipedia:|a b|/no/such|./no|../no|a/b/c|no.jsonl|a/b.txt".split(
        "|"
    ):
        line = refused(parse_source, text, FLAG)
        assert f"{FLAG} {text}: no such" in line
        assert "/" in text or "." in text or all(name in line for name in BUILT_IN)


def test_local_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_texts(tmp_path / "uk")
    assert parse_source(f"{folder}/", FLAG).name == "uk"
    monkeypatch.chdir(folder)
    assert parse_source(".", FLAG).name == "uk"
    assert parse_source("train.jsonl", FLAG).name == "train"
    Path("book.txt").write_text("рядок")
    assert parse_source("book.txt", FLAG).draw == JOINED
    assert has_test(parse_source(".", FLAG)) and not has_test(parse_source("ubertext", FLAG))
    Path("test.jsonl").unlink()
    assert not has_test(parse_source(".", FLAG))
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert parse_source("owner/name", FLAG).hub is None  # what is there goes before the hub
    Path("c4").mkdir()
    assert parse_source("c4", FLAG).hub and parse_source("./c4", FLAG).path


def test_own_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PATH[:column][:train or :test], beside texts that have another."""
    monkeypatch.chdir(tmp_path)
    table = "text;Текст новини;b=c\nодин;два;три\n"
    Path("owner/name").mkdir(parents=True)
    for file in ("my.csv", "my.csv:own.csv", "a=b.csv", "owner/name/any.csv"):
        Path(file).write_text(table)
    for text, texts, weight in (
        ("my.csv", ["один"], None),
        ("my.csv:", ["один"], None),
        ("my.csv:Текст новини", ["два"], None),
        ("my.csv:Текст новини=2", ["два"], 2),
        ("a=b.csv:Текст новини", ["два"], None),
        ("owner/name:Текст новини", ["два"], None),
    ):
        source = parse_source(text, FLAG)
        assert (read(Corpus(source)), source.weight) == (texts, weight)
        assert source.text == (text.partition("=")[0] if weight else text)
    Path("book.txt").write_text("один")
    assert "no column 'body'" in refused(parse_source, "book.txt:body", FLAG)
    assert "no column 'c'" in refused(parse_source, "my.csv:b:c", FLAG)
    assert parse_source("my.csv:own.csv", FLAG).column == "text"  # a whole name goes before
    assert "own.csv:text: no such file" in refused(parse_source, "t/own.csv:text", FLAG)
    own, other = parse_sources(["my.csv:Текст новини", "my.csv:text"], FLAG, column="none")
    assert (own.column, other.column) == ("Текст новини", "text")
    assert (own.name, other.name) == ("my:Текст новини", "my:text")
    assert "twice" in refused(parse_sources, ["my.csv", "my.csv:text"], FLAG)
    assert is_in_path(",", "my.csv:own.csv") and not is_in_path(",", "my.csv:text,my.csv:b")
    Path("many.jsonl").write_text("".join(f'{{"a": "{n}", "b": "{-n}"}}\n' for n in range(40)))
    for text in ("many.jsonl:b:test", "many.jsonl:test:b"):
        held_out = read(text, "test")
        assert len(held_out) == 4 and held_out + read(text) != read("many.jsonl:b")
        assert sorted(held_out + read(text)) == sorted(read("many.jsonl:b"))
    found = named("--prune_method", "wanda", "--calibration_data", "many.jsonl:b")
    assert [read(each, "test") for each in found.tests] == [held_out]
    with pytest.raises(UserError, match="no column 'text', only a, b"):
        read("many.jsonl")


def test_weights_and_names_told_apart(tmp_path: Path) -> None:
    uk, equal = (str(write_texts(tmp_path / name)) for name in ("uk", "a=b"))
    sources = parse_sources([f"{uk}=3", f"{equal}=.5"], FLAG, mixture=True)
    assert [(s.text, s.weight) for s in sources] == [(uk, 3.0), (equal, 0.5)]
    assert parse_source(equal, FLAG).name == "a=b"
    for weight in ("0", "-1", "nan", "inf", "much", ""):
        line = refused(parse_sources, [f"c4={weight}", "ubertext=1"], FLAG, mixture=True)
        assert f"c4={weight}: the weight" in line
    assert "weight" in refused(parse_sources, ["c4=1", "ubertext"], FLAG, mixture=True)
    assert "twice" in refused(parse_sources, ["c4", "c4"], FLAG)
    assert "weight" in refused(parse_sources, ["c4=1"], "--eval_data")
    folders = [str(write_texts(tmp_path / a / "uk")) for a in ("old", "new")]
    assert [s.name for s in parse_sources([*folders, "c4"], FLAG)] == ["old/uk", "new/uk", "c4"]
    assert "twice" in refused(parse_sources, [folders[0], f"{folders[0]}/"], FLAG)


# --- files

LINES = ["один", "два\n\n", "three\u2028four\u0085five\x0bsix\rseven"]  # a row each
NULLS = '{"text": "a"}\n{"text": null}\n{"text": "b"}\n{"text": null}\n'
TABLE = 'id,text\n1,"one, ""two""\nthree"\n\n2,ґ\n'
WINDOWS = TABLE.replace("\n", "\r\n")
READ = [  # name, content, texts; as spreadsheets and their users write them
    ("a.parquet", {"text": LINES}, LINES),
    ("a.jsonl", rows(*LINES), LINES),
    ("a.jsonl.gz", "\n" + rows(*LINES) + "\n", LINES),
    ("a.txt", "\ufeffодин\n\nдва", ["один\n\nдва"]),
    ("a.csv", TABLE, ['one, "two"\nthree', "ґ"]),
    ("semicolons.csv", "\ufeff" + WINDOWS.replace(",", ";"), ['one; "two"\nthree', "ґ"]),
    ("tabs.tsv", WINDOWS.replace(",", "\t"), ['one\t "two"\nthree', "ґ"]),
    ("sep.csv", 'sep=;\r\nid;text\r\n1;"a, b; c"\r\n', ["a, b; c"]),
    ("SEP.CSV", '"sep=|"\nid|text\n1|a, b\n', ["a, b"]),
    ("pipe.csv", "id|text\n1|a, b\n", ["a, b"]),
    ("quoted.csv", '"name, first, last";text\nO;a, b\n', ["a, b"]),
    ("commas.tsv", "text\na, b; c\n", ["a, b; c"]),
    ("one.csv", 'text\n"a, b"\n', ["a, b"]),
    ("null.jsonl", NULLS, ["a", "b"]),
    ("null.csv", "id,text\n1,a\n2\n3,b\n4\n", ["a", "b"]),
    ("null.parquet", {"text": ["a", None, "b", None]}, ["a", "b"]),
    ("a.json", json.dumps([{"text": text} for text in LINES], indent=2), LINES),
    ("bom.json", '\ufeff\n[{"text": "a"},\n{"text": "b"}]\n', ["a", "b"]),
    ("lines.json", rows(*LINES), LINES),
    ("list.jsonl.gz", json.dumps([{"text": text} for text in LINES]), LINES),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "texts"), READ, ids=[name for name, *_ in READ])
def test_files_that_are_read(name, content, texts, tmp_path: Path, caplog) -> None:
    file = put(tmp_path / name, content)
    assert read(file) == read(file, "test") == texts
    assert corpus(file).source.name == name.partition(".")[0]
    assert ("2 rows without a 'text'" in caplog.text) == name.startswith("null")


BINARY = pyarrow.array([b"\xff"]).cast(pyarrow.string(), safe=False)
PACKED = gzip.compress(rows(*"abc" * 100).encode())
BAD_LINE = (rows("fine", "fine\u2028") + "\n").encode()
REFUSED = [  # name, content, what the line holds
    ("a.doc", b"text", ".parquet"),
    *(
        ("a.jsonl.gz", BAD_LINE + line + b"\n", f"line 4: |{words}")
        for line, words in {
            b"{text}": "not JSON",
            b'{"title": "a", "id": 1}': "title, id|--column",
            b'{"text": ["user"]}': "'text' is of type list",
            b'{"text": "\\ud800"}': "surrogate",
            b'{"text": "\xff"}': "not UTF-8",
        }.items()
    ),
    ("bad.csv", b'text\n"a"b\n', "bad.csv, line 2: "),
    ("bad.tsv", 'text\tid\na\t1\n"b" c\t2\n', r"line 3: it is not TSV ('\t' expected|Quote"),
    ("column.csv", "\ufeffid;body\r\n1;a\r\n", "header (the first row)|'text', only id, body"),
    ("column.csv", 'id,body\n1,"a\nb"\n', "--column|column.csv:COLUMN"),
    ("none.csv", f"{'слово ' * 99},b\n1,2\n", f"only {('слово ' * 9)[:40]}…, b. "),
    ("a.json", '[{"text": "a"}, "b"]', "a.json, object 2: it is not an object"),
    ("a.json", '[{"text": "a"}, {"id": 1}]', "json, object 2: |no column 'text', only id"),
    ("a.json", '[{"text": "a"}', "a.json: it is not JSON"),
    ("a.json", '{"rows": [\n{"text": "a"}]}', "a.json, line 1: it is not JSON"),
    ("blank.csv", "id,text\n1\n", "no text"),
    # an unquoted comma would cut the text there
    ("a.csv", "text\nодин\nдва, три, чотири\n", "3 fields, separated by ','|has 1|Quote"),
    ("a.csv", "id,text,label\n1,a,b\n2,a, b,c\n", "line 3: |4 fields, separated by ','|Quote"),
    ("a.csv", "sep=;\nid;text\n1;a;b\n", "line 3: |3 fields, separated by ';'|has 2|Quote"),
    ("a.csv", 'text;id\n"a\nb";1\nc;2;\n', "line 4: |3 fields, separated by ';'|has 2|Quote"),
    ("a.csv", "a sentence\nand, another\n", "'text', only a sentence"),
    ("empty.parquet", b"", "damaged"),
    ("letters.parquet", {"text": BINARY}, "damaged"),
    ("column.parquet", {"id": [1], "body": ["a"]}, "id, body"),
    ("list.parquet", {"text": [["a"]]}, "row 0: |type list"),
    ("bad.txt", b"\xff\xfe\x00", "not UTF-8"),
    ("blank.txt", b" \n", "no text"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), REFUSED)
def test_files_that_are_refused(name, content, words: str, tmp_path: Path) -> None:
    line = refused(lambda: read(put(tmp_path / name, content)))
    assert line.startswith(FLAG) and name in line and all(word in line for word in words.split("|"))


def test_damaged_and_endless_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    whole = put(tmp_path / "a.parquet", {"text": ["текст"] * 50 + list("abcdef")}).read_bytes()
    for name, content in {
        "short.jsonl.gz": PACKED[:-20],
        "bad.jsonl.gz": PACKED[:20] + b"\xff\xff\xff" + PACKED[23:],
        "inside.parquet": whole[:4] + b"\xff" * 36 + whole[40:],
    }.items():
        (tmp_path / name).write_bytes(content)
        line = refused(read, tmp_path / name)
        assert name in line and "damaged" in line
    monkeypatch.setattr(documents, "ROWS_CHARACTERS", 2**22)  # a text repeated would become 60 GB
    repeated = pyarrow.array(["x" * 10**6]).dictionary_encode().take(pyarrow.array([0] * 60000))
    assert len(read(put(tmp_path / "many.parquet", {"text": repeated}))) == 5
    assert "many.parquet: no more than 4194304 characters" in caplog.text
    line = refused(read, put(tmp_path / "b.jsonl.gz", rows("one") + " " * 2**23))
    assert "b.jsonl.gz, line 2: " in line
    (tmp_path / "in").mkdir()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(file := tmp_path / "in/a.jsonl")
        assert "a.jsonl is a pipe" in refused(read, tmp_path / "in")
        refused(parse_source, str(file), FLAG)
        file.unlink()


ENCODED = {
    "cp1251": "Привіт, світе! Сьогодні ми йдемо до «лісу».",
    "koi8-u": "Привіт, світе! Сьогодні ми йдемо до лісу.",
    "utf-16": "Привіт, світе!",
    "cp1250": "Zażółć gęślą jaźń. Příliš žluťoučký kůň, árvíztűrő tükör.",
}


@pytest.mark.parametrize("encoding", ENCODED)
def test_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    for name, form in {"a.txt": "{}", "a.csv": "text\n{}", "a.jsonl": '{{"text": "{}"}}\n'}.items():
        file = put(tmp_path / name, form.format(ENCODED[encoding]).encode(encoding))
        line = refused(read, file)
        assert name in line and "not UTF-8" in line


# --- folders


def test_files_of_a_folder(tmp_path: Path) -> None:
    """JSON lines before tables before plain text, and files named train* before others."""
    (tmp_path / "valid.doc").write_text("")
    for split in ("train", "test"):
        line = refused(check_corpus, corpus(tmp_path), split)
        assert "neither train*.jsonl" in line and "valid.doc" in line
    for name, content, texts in [
        ("readme.md", "one", ["one"]),
        (".hidden.txt", "none", ["one"]),
        ("any.json", '[{"text": "json"}]', ["json"]),
        ("b.txt", "two", ["two"]),
        ("c.TXT", "one", ["two\n\none"]),  # as one text
        ("test.txt", "none", ["two\n\none"]),
        ("b.csv", "text\nthree", ["three"]),
        ("a.jsonl", rows("four"), ["four"]),
        ("train.txt", "five", ["five"]),
        ("train.tsv", "id\ttext\n1\tsix", ["six"]),
        ("train_b.jsonl", rows("8", "9"), ["8", "9"]),
        ("train_a.jsonl", "\n" + rows("1") + "\n" + rows("ґ7").rstrip("\n"), ["1", "ґ7", "8", "9"]),
        ("train_c.jsonl.gz", rows("10"), ["1", "ґ7", "8", "9", "10"]),
    ]:
        put(tmp_path / name, content)
        source = parse_source(str(tmp_path), FLAG)
        assert read(tmp_path) == texts
        assert source.draw == (ONCE if name.endswith(("v", "l", "gz", "n")) else JOINED)
    assert read(tmp_path, "test") == ["none"] and has_test(source)


def test_a_folder_tells_what_is_read_and_what_is_left(tmp_path: Path) -> None:
    def line() -> str:
        return read_line(corpus(tmp_path), "train")

    for number in range(12):
        (tmp_path / f"{number:02}.TXT").write_text("слово " * 10)
    (tmp_path / "Readme.md").write_text("about")
    (tmp_path / "LICENSE.txt").write_text("free")
    (tmp_path / "more").mkdir()
    assert f"12 files, {12 * 60 + 22} characters" in line()
    assert line().endswith(": LICENSE.txt, Readme.md, more/")
    (tmp_path / "meta.csv").write_text("text\nслово\n")
    assert "1 file, 5 characters" in line()
    assert line().endswith(", ".join(f"{number:02}.TXT" for number in range(8)) + ", and 7 more")


def test_splits_are_whole_words_of_names(tmp_path: Path) -> None:
    names = {
        "train": ["Train.jsonl", "uk_train-00.JSONL", "training.jsonl", "train2.jsonl"],
        "test": ["TEST.jsonl", "uk.test.jsonl", "tests.jsonl", "test_1.jsonl", "test-set.jsonl"],
        "other": ["testament.jsonl", "trainer.jsonl", "contest.jsonl", "protests.jsonl"],
    }
    for split, files in names.items():
        for file in files:
            (tmp_path / file).write_text(rows(split))
    assert read(tmp_path) == ["train"] * 4 and read(tmp_path, "test") == ["test"] * 5
    for file in names["train"]:
        (tmp_path / file).unlink()
    assert read(tmp_path) == ["other"] * 4


# --- a tenth held apart


def parts(path: Path) -> tuple[list, list]:
    return read(f"{path}:test"), read(f"{path}:test", "test")


def test_a_tenth_is_held_apart_by_digest(tmp_path: Path) -> None:
    file, texts = tmp_path / "a.jsonl", sentences(95)
    file.write_text(rows(*texts))
    train, test = parts(file)
    assert len(test) == 10 and sorted(train + test) == sorted(texts)
    file.write_text(rows(*reversed(texts), *test))  # in another order, and some twice
    again = parts(file)
    assert set(again[0]) == set(train) and sorted(again[1]) == sorted(2 * test)
    assert parts(tmp_path) == again and read(tmp_path, "test") == again[1]
    (tmp_path / "test.jsonl").write_text(rows("own"))
    assert parts(tmp_path) == ([*reversed(texts), *test], ["own"])


def test_a_long_text_is_cut_into_documents_before(tmp_path: Path) -> None:
    texts, book = sentences(200), tmp_path / "book.txt"
    for separator in ("\n\n", "\n", " "):
        book.write_text(separator.join(texts))
        (train,), test = parts(book)
        assert all(2000 <= len(piece) < 4000 and piece not in train for piece in test)
        assert sorted(" ".join([train, *test]).split()) == sorted(" ".join(texts).split())
    book.write_text(texts[0])
    assert "too few" in refused(parts, book)


def test_who_is_measured_on_a_tenth_is_trained_on_the_others(tmp_path: Path) -> None:
    file, folder, other = (str(tmp_path / name) for name in ("a.txt", "uk", "other"))
    Path(file).write_text("\n\n".join(sentences(200)))
    (write_texts(folder) / "test.jsonl").unlink()
    write_texts(other)

    def parted(*flags: str) -> tuple[list[bool], list[str]]:
        found = named("--prune_method", "wanda", *flags)
        return [c.parted for c in found.calibration], [t.source.text for t in found.tests]

    given = ["--calibration_data", file, folder]
    assert parted(*given) == ([True, True], [f"{file}:test", f"{folder}:test"])
    assert parted(*given, "--eval_data", other) == ([False, False], [other])
    rest = ["--calibration_data", f"{file}:train=2", f"{folder}:train=1"]
    assert parted(*rest) == parted(*given)
    assert parted(*rest, "--eval_data", other) == ([True, True], [other])
    assert parted(*given, "--eval_data", file, folder) == ([False, True], [file, folder])
    assert parted(*given, other) == ([False] * 3, [other])
    assert parted("--prune_on_c4") == parted() == ([False], ["ubertext"])
    assert parted("--calibration_data", "c4:uk") == ([False], ["c4:uk"])
    assert "no test text" in refused(parted, "--calibration_data", "owner/name::train")


def test_what_is_measured_is_not_read_for_training(tmp_path: Path) -> None:
    """Whatever of folder, file, `:test` and `:train` is named, and copies are the same text."""
    few = sentences(4, 5, words=1500)  # which are cut into pieces
    uk, a, b, copy, book = (
        str(tmp_path / name) for name in ("uk", "uk/a.jsonl", "uk/b.jsonl", "copy.jsonl", "c.txt")
    )
    Path(uk).mkdir()
    for file, texts in {a: few, b: sentences(40, 1), copy: few}.items():
        Path(file).write_text(rows(*texts))
    Path(book).write_text("\n\n".join(few))
    apart = [(a, uk), (uk, f"{a}:test"), (b, f"{uk}:test"), (f"{b}:train", uk), (uk, b)]
    apart += product((f"{a}:train", copy), (uk, f"{a}:test", f"{copy}:test"))
    apart += [(book, f"{book}:test")]
    for train, test in [*apart, (b, b), (book, book)]:
        found = named("--calibration_data", train, "--eval_data", test)
        local = [each for each in found.calibration if each.source.path]
        trained = [text for each in local for text in read(each)]
        measured = [text for each in found.tests for text in read(each, "test")]
        seen = [text for text in measured if any(text in each or each in text for each in trained)]
        lines = same_texts(found.calibration, found.tests)
        assert trained and bool(seen) == bool(lines) == (train == test)
        said = f"--eval_data {test}: --calibration_data {train} reads this"
        assert all(said in line for line in lines)


# --- the hub


def test_sets_are_loaded_whole_and_pinned(hub) -> None:
    hub.sets[(UBERTEXT,)] = {"train": {"text": ["a", "b"]}, "test": {"text": ["c"]}}
    ubertext = corpus("ubertext")
    assert read(ubertext) == ["a", "b"] and ubertext.revision("train") == "c0ffee"
    assert read("ubertext", "test") == ["c"]
    assert hub.calls[0] == ((UBERTEXT,), {"revision": "c0ffee", "streaming": False})
    hub.sets[("allenai/c4",)] = {"train": {"text": ["a"]}, "validation": {"text": ["v"]}}
    assert read("c4") == ["a"] and read("c4", "test") == ["v"]
    assert [options["data_files"] for _, options in hub.calls[-2:]] == [
        {"train": "en/c4-train.00000-of-01024.json.gz"},
        {"validation": "en/c4-validation.00000-of-00008.json.gz"},
    ]


def test_a_set_without_test_is_parted(hub) -> None:
    """The first 1,100 documents are the test."""
    texts = [str(number) for number in range(1102)]
    hub.sets[("owner/name", "x")] = {"train": {"text": texts}}
    assert read("owner/name:x") == ["1100", "1101"]
    assert read("owner/name:x", "test")[:2] == ["0", "1"]
    assert len(read("owner/name:x:train")) == 1102
    hub.sets[("owner/name", "x")] = {"train": {"text": texts[:1100]}}
    check_corpus(corpus("owner/name:x"), "train")
    assert "1100 rows" in refused(read, "owner/name:x")


SHARED = [  # calibration text, test text, splits of the set, whether they are the same text
    ("o/s", "o/s", "train", False),  # parted
    ("o/s:c:train", "o/s:c", "train", True),
    ("o/s", "o/s::train", "train test", True),
    ("o/s", "o/s", "train test", False),
    ("o/s::validation", "o/s", "train validation", True),
    ("o/s:c", "o/s:d", "train", False),
    ("c4", "c4", "train validation", False),
]


def test_text_that_is_calibrated_on_and_measured_is_seen(hub) -> None:
    for calibration, test, splits, shared in SHARED:
        for key in [("o/s",), ("o/s", "c"), ("o/s", "d"), ("allenai/c4",)]:
            hub.sets[key] = {split: {"text": ["a"]} for split in splits.split()}
        places = locations(corpus(calibration), "train")
        others = locations(corpus(test, "--eval_data"), "test")
        assert bool(places & others) == shared, calibration


class Breaking:
    """A stream that ends by an error."""

    column_names = ["text"]

    def __iter__(self):
        yield {"text": "a"}
        raise HTTPError("slow")


def test_what_fails_on_the_hub_is_one_line(hub) -> None:
    hub.sets[("owner/name",)] = {"dev": {"body": ["a"]}, "train": {"body": ["a"], "id": [1]}}
    hub.sets[(UBERTEXT,)] = {"train": {"text": []}}
    for text, words in {
        "owner/name::tset": "no split 'tset', only dev, train",
        "owner/name": "no column 'text', only body, id",
        "owner/name:::id": "row 0: 'id' is of type int",
        "ubertext": "the split 'train' is empty",
    }.items():
        assert words in refused(check_corpus, corpus(text), "train")
    hub.sets[("owner/name",)] = {"test": {"text": ["a"]}, "train": Breaking()}
    assert "no such file or folder is here, and the Hub cannot be reached" in refused(
        read, "owner/name"
    )
    for words, error in {
        "cannot be reached (no route)": HTTPError("no route"),
        "it cannot be loaded (x y)": DatasetNotFoundError("x\ny"),
        "owner/name:CONFIG": ValueError("BuilderConfig"),
    }.items():
        hub.error = error
        assert words in refused(check_corpus, corpus("owner/name"), "train")


def test_what_was_downloaded_serves_without_the_hub(hub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub.unreachable = HTTPError("no route")
    line = refused(check_corpus, corpus("ubertext"), "train")
    assert "ubertext: the Hub cannot be reached (no route)" in line  # no file was meant
    for name in (UBERTEXT, "owner/name"):
        (tmp_path / f"datasets--{name.replace('/', '--')}").mkdir()
        hub.sets[(name,)] = {"train": {"text": ["a"]}}
    ubertext = corpus("ubertext")
    assert read(ubertext) == ["a"] and ubertext.revision("train") is None
    whole = (UBERTEXT,), {"revision": None, "streaming": False}
    assert hub.calls and all(call == whole for call in hub.calls)
    stream = corpus("owner/name")  # can't come from a cache
    assert "cannot be reached (no route)" in refused(check_corpus, stream, "train")


def test_prompts_of_a_language(hub) -> None:
    """Aya's rows are chosen by their language, named as in a tag."""
    codes, asked = ["ukr", "eng", "ukr"], ["Де?", "Where?", "Хто?"]
    columns = {"inputs": asked, "targets": ["Тут.", "Here.", "Я."], "language_code": codes}
    hub.sets[("CohereLabs/aya_dataset",)] = {"train": columns}
    for name in ("aya:uk", "aya:ukr"):
        assert [each.messages[0]["content"] for each in read(name)] == ["Де?", "Хто?"]
    assert "is empty" in refused(read, "aya:de")
