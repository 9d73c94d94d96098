"""What a user names becomes a source and its texts, or one line that says why not."""

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
from tiny import sentences, write_texts

from lib.data import documents
from lib.data.documents import Corpus, check_corpus, locations, read_line
from lib.data.sources import AGAIN, BUILT_IN, JOINED, ONCE, has_test, parse_source, parse_sources
from lib.run.flags import build_parser
from lib.run.windows import named_corpora, same_texts
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
    corpus = source if isinstance(source, Corpus) else Corpus(source)
    return list(corpus.documents(split))


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
    assert "only some sources" in message(parse_sources, ["c4=1", "ubertext"], FLAG, mixture=True)
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
    b'{"title": "a", "id": 1}': "no column 'text', only title, id. Name one with --column",
    b'{"text": ["user"]}': "'text' is of type list, not a string. Name a column",
    b'{"text": "\\ud800"}': "half of a surrogate pair",
    b'{"text": "\xff"}': "not UTF-8",
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
    """JSON lines before tables before plain text, and files named train* before others."""
    (tmp_path / "valid.doc").write_text("")
    for split in ("train", "test"):
        line = message(check_corpus, Corpus(parse_source(str(tmp_path), FLAG)), split)
        assert "neither train*.jsonl" in line and "valid.doc" in line
    for name, content, texts in [
        ("readme.md", "one", ["one"]),
        (".hidden.txt", "none", ["one"]),
        ("b.txt", "two", ["two"]),
        ("c.TXT", "one", ["two\n\none"]),  # as one text
        ("test.txt", "none", ["two\n\none"]),
        ("b.csv", "text\nthree", ["three"]),
        ("a.jsonl", rows("four"), ["four"]),
        ("train.txt", "five", ["five"]),
        ("train.tsv", "id\ttext\n1\tsix", ["six"]),
        ("train_0.jsonl", rows("seven"), ["seven"]),
    ]:
        (tmp_path / name).write_text(content)
        source = parse_source(str(tmp_path), FLAG)
        assert read(source) == texts
        assert source.draw == (ONCE if name.endswith(("v", "l")) else JOINED)
    assert read(source, "test") == ["none"] and has_test(source)


def test_tables(tmp_path):
    """As spreadsheets write them: a BOM, Windows' line ends, ";" or tabs, breaks in quotes."""
    content = 'id,body\n1,"one, ""two""\nthree"\n\n2,ґ\n'
    for name, separator, end in [
        ("a.csv", ",", "\n"),
        ("b.csv", ";", "\r\n"),
        ("c.tsv", "\t", "\r\n"),
    ]:
        written = content.replace(",", separator).replace("\n", end)
        (tmp_path / name).write_bytes(written.encode("utf-8-sig" if name == "b.csv" else "utf-8"))
        source = parse_source(str(tmp_path / name), FLAG, column="body")
        assert read(source) == [f'one{separator} "two"\nthree', "ґ"]
    line = message(read, parse_source(str(tmp_path / "b.csv"), FLAG))
    assert "line 3: there is no column 'text', only id, body. Name one with --column" in line
    for name, column in [("o/s", "body"), ("o/s:::own", "own"), ("ubertext", "text")]:
        assert parse_source(name, FLAG, column="body").column == column


SEPARATED = {  # what spreadsheets and their users write, the text as `text`
    "sep.csv": 'sep=;\r\nid;text\r\n1;"a, b; c"\r\n',
    "SEP.CSV": '"sep=|"\nid|text\n1|a, b\n',
    "pipe.csv": "id|text\n1|a, b\n",
    "quoted.csv": '"name, first, last";text\nO;a, b\n',
    "commas.tsv": "text\na, b; c\n",
    "one.csv": 'text\n"a, b"\n',
}


@pytest.mark.parametrize("name", SEPARATED)
def test_separators(tmp_path, name):
    (tmp_path / name).write_text(SEPARATED[name])
    (text,) = read(parse_source(str(tmp_path / name), FLAG))
    assert text in ("a, b", "a, b; c") and (";" in text) == ("; c" in SEPARATED[name])


RAGGED = {
    "text\nодин\nдва, три, чотири\n": "it has 3 fields, separated by ',', and the header has 1",
    "id,text,label\n1,a,b\n2,a, b,c\n": "line 3: it has 4 fields, separated by ',', and the header",
    "sep=;\nid;text\n1;a;b\n": "line 3: it has 3 fields, separated by ';', and the header has 2.",
    'text;id\n"a\nb";1\nc;2;\n': "line 4: it has 3 fields, separated by ';', and the header has 2.",
    "a sentence\nand, another\n": "no column 'text', only a sentence. Name one",
}


@pytest.mark.parametrize("content", RAGGED)
def test_a_row_with_more_fields_than_the_header_ends_it(tmp_path, content):
    """An unquoted comma would cut the text there."""
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    line = message(read, parse_source(str(tmp_path / "a.csv"), FLAG))
    assert "a.csv, " in line and RAGGED[content] in line
    assert "no column" in line or line.endswith("Quote the texts, or give .txt or .jsonl.")


def test_a_folder_tells_what_is_read_and_what_is_left(tmp_path):
    def line(split="train"):
        return read_line(Corpus(parse_source(str(tmp_path), FLAG)), split).removeprefix(
            f"{FLAG} {tmp_path}: "
        )

    for number in range(12):
        (tmp_path / f"{number:02}.TXT").write_text("слово " * 10)
    (tmp_path / "Readme.md").write_text("about")
    (tmp_path / "LICENSE.txt").write_text("free")
    (tmp_path / "more").mkdir()
    left = "left out: LICENSE.txt, Readme.md, more/"
    assert line() == f"12 files, {12 * 60 + 22} characters read; {left}"
    (tmp_path / "meta.csv").write_text("text\nслово\n")
    left = ", ".join(f"{number:02}.TXT" for number in range(8))
    assert line() == f"1 file, 5 characters read; left out: {left}, and 7 more"


def test_splits_are_whole_words_of_names(tmp_path):
    names = {
        "train": ["Train.jsonl", "uk_train-00.JSONL", "training.jsonl", "train2.jsonl"],
        "test": ["TEST.jsonl", "uk.test.jsonl", "tests.jsonl", "test_1.jsonl", "test-set.jsonl"],
        "other": ["testament.jsonl", "trainer.jsonl", "contest.jsonl", "protests.jsonl"],
    }
    for split, files in names.items():
        for file in files:
            (tmp_path / file).write_text(rows(split))
    source = parse_source(str(tmp_path), FLAG)
    assert set(read(source)) == {"train"} and set(read(source, "test")) == {"test"}
    assert "left out: contest.jsonl, protests.jsonl, testament" in read_line(
        Corpus(source), "train"
    )
    assert "5 files, 20 characters" in read_line(Corpus(source), "test")
    for file in names["train"]:
        (tmp_path / file).unlink()
    assert read(parse_source(str(tmp_path), FLAG)) == ["other"] * 4


ENCODED = {
    "cp1251": "Привіт, світе! Сьогодні ми йдемо до «лісу».",
    "koi8-u": "Привіт, світе! Сьогодні ми йдемо до лісу.",
    "utf-16": "Привіт, світе!",
    "cp1250": "Zażółć gęślą jaźń. Příliš žluťoučký kůň, árvíztűrő tükör.",
}


@pytest.mark.parametrize("encoding", ENCODED)
def test_another_encoding_is_refused(tmp_path, encoding):
    for name, form in {"a.txt": "{}", "a.csv": "text\n{}", "a.jsonl": '{{"text": "{}"}}\n'}.items():
        (tmp_path / name).write_bytes(form.format(ENCODED[encoding]).encode(encoding))
        line = message(read, parse_source(str(tmp_path / name), FLAG))
        assert name in line and "it is not UTF-8" in line


# --- a tenth held apart


def parts(path):
    source = parse_source(f"{path}:test", FLAG)
    return read(source), read(source, "test")


def test_a_tenth_is_held_apart_by_digest(tmp_path):
    file, texts = tmp_path / "a.jsonl", sentences(95)
    file.write_text(rows(*texts))
    train, test = parts(file)
    assert len(test) == 10 and sorted(train + test) == sorted(texts)
    file.write_text(rows(*reversed(texts), *test))  # in another order, and some twice
    again = parts(file)
    assert set(again[0]) == set(train) and sorted(again[1]) == sorted(2 * test)
    assert parts(tmp_path) == again and read(parse_source(str(tmp_path), FLAG), "test") == again[1]
    (tmp_path / "test.jsonl").write_text(rows("own"))
    assert parts(tmp_path) == ([*reversed(texts), *test], ["own"])


def test_a_long_text_is_cut_into_documents_before(tmp_path):
    texts, book = sentences(200), tmp_path / "book.txt"
    for separator in ("\n\n", "\n", " "):
        book.write_text(separator.join(texts))
        (train,), test = parts(book)
        assert all(2000 <= len(piece) < 4000 and piece not in train for piece in test)
        assert sorted(" ".join([train, *test]).split()) == sorted(" ".join(texts).split())
    book.write_text(texts[0])
    assert "characters, too few" in message(parts, book)


def test_who_is_measured_on_a_tenth_is_trained_on_the_others(tmp_path):
    file, folder, other = (str(tmp_path / name) for name in ("a.txt", "uk", "other"))
    Path(file).write_text("\n\n".join(sentences(200)))
    (write_texts(folder) / "test.jsonl").unlink()
    write_texts(other)

    def named(*flags):
        args = build_parser().parse_args(["--model", "m", "--prune_method", "wanda", *flags])
        corpora = named_corpora(args)
        parted = [corpus.parted for corpus in corpora.calibration]
        return parted, [test.source.text for test in corpora.tests]

    given = ["--calibration_data", file, folder]
    assert named(*given) == ([True, True], [f"{file}:test", f"{folder}:test"])
    assert named(*given, "--eval_data", other) == ([False, False], [other])
    rest = ["--calibration_data", f"{file}:train=2", f"{folder}:train=1"]
    assert named(*rest) == named(*given)
    assert named(*rest, "--eval_data", other) == ([True, True], [other])
    assert named(*given, "--eval_data", file, folder) == ([False, True], [file, folder])
    assert named(*given, other) == ([False] * 3, [other])
    assert named("--prune_on_c4") == named() == ([False], ["ubertext"])
    assert named("--calibration_data", "c4:uk") == ([False], ["c4:uk"])
    assert "no test text" in message(named, "--calibration_data", "owner/name::train")


def test_what_is_measured_is_not_read_for_training(tmp_path):
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
    for flag, (train, test) in product(
        ("--calibration_data", "--vocabulary_data"), [*apart, (b, b), (book, book)]
    ):
        argv = ["--model", "m", "--trim_vocabulary", flag, train, "--eval_data", test]
        args = build_parser().parse_args(argv)
        corpora = named_corpora(args)
        local = [corpus for corpus in corpora.vocabulary if corpus.source.path]
        trained = [text for corpus in local for text in read(corpus)]
        measured = [text for each in corpora.tests for text in read(each, "test")]
        seen = [text for text in measured if any(text in each or each in text for each in trained)]
        lines = same_texts(corpora.vocabulary, corpora.tests)
        assert trained and bool(seen) == bool(lines) == (train == test)
        assert all(f"--eval_data {test}: {flag} {train} reads this" in line for line in lines)


def parquet_bytes(tmp_path, **columns) -> bytes:
    parquet.write_table(pyarrow.table(columns), tmp_path / "made")
    return (tmp_path / "made").read_bytes()


def test_bad_files_are_named(tmp_path):
    packed = gzip.compress(rows(*"abc" * 100).encode())
    whole = parquet_bytes(tmp_path, text=["текст"] * 50 + list("abcdef"))
    binary = pyarrow.array([b"\xff"]).cast(pyarrow.string(), safe=False)
    for name, content, words in [
        ("a.doc", b"text", ".parquet"),
        ("bad.csv", b'text\n"a"b\n', "bad.csv, line 2: it is not CSV"),
        ("short.jsonl.gz", packed[:-20], "if it is damaged."),
        ("bad.jsonl.gz", packed[:20] + b"\xff\xff\xff" + packed[23:], "if it is damaged."),
        ("empty.parquet", b"", "if it is damaged."),
        ("inside.parquet", whole[:4] + b"\xff" * 36 + whole[40:], "if it is damaged."),
        ("letters.parquet", parquet_bytes(tmp_path, text=binary), "if it is damaged."),
        ("column.parquet", parquet_bytes(tmp_path, id=[1], body=["a"]), "only id, body"),
        ("list.parquet", parquet_bytes(tmp_path, text=[["a"]]), "row 0: 'text' is of type list"),
        ("null.csv", b"id,text\n1\n", "holds no text"),
        ("bad.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("blank.txt", b" \n", "holds no text"),
    ]:
        (tmp_path / name).write_bytes(content)
        line = message(lambda name=name: read(parse_source(str(tmp_path / name), FLAG)))
        assert name in line and words in line


def test_rows_without_a_text_are_left_out_and_counted(tmp_path, caplog):
    table = parquet_bytes(tmp_path, text=["a", None, "b", None])
    for name, content in [
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n{"text": "b"}\n{"text": null}\n'),
        ("a.csv", b"id,text\n1,a\n2\n3,b\n4\n"),
        ("a.parquet", table),
    ]:
        (tmp_path / name).write_bytes(content)
        caplog.clear()
        assert read(parse_source(str(tmp_path / name), FLAG)) == ["a", "b"]
        assert f"{name}: 2 rows without a 'text' are left out" in caplog.text


def test_small_files_that_become_large_ones_are_not_read_whole(tmp_path, caplog, monkeypatch):
    """A text of 1 MB, repeated, would become 60 GB."""
    monkeypatch.setattr(documents, "ROWS_CHARACTERS", 2**22)
    repeated = pyarrow.array(["x" * 10**6]).dictionary_encode().take(pyarrow.array([0] * 60000))
    parquet.write_table(pyarrow.table({"text": repeated}), tmp_path / "a.parquet")
    assert len(read(parse_source(str(tmp_path / "a.parquet"), FLAG))) == 5
    assert "a.parquet: no more than 4194304 characters are read" in caplog.text
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows("one").encode() + b" " * 2**23))
    line = message(read, parse_source(str(tmp_path / "b.jsonl.gz"), FLAG))
    assert "b.jsonl.gz, line 2: it has at least 4194304 bytes. Cut it" in line


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_pipes_and_devices_are_not_read(tmp_path, make):
    make(tmp_path / "a.jsonl")
    line = message(read, parse_source(str(tmp_path), FLAG))
    assert "a.jsonl is a pipe, a device or a broken link. Remove it." in line
    assert "its type is unknown" in message(parse_source, str(tmp_path / "a.jsonl"), FLAG)


# --- the hub


def test_sets_are_loaded_whole_and_pinned(hub):
    hub.sets[(UBERTEXT,)] = {"train": {"text": ["a", "b"]}, "test": {"text": ["c"]}}
    corpus = Corpus(parse_source("ubertext", FLAG))
    texts, revision = corpus.documents("train"), corpus.revision("train")
    assert list(texts) == ["a", "b"] and revision == "c0ffee"
    assert read(parse_source("ubertext", FLAG), "test") == ["c"]
    assert hub.calls[0] == ((UBERTEXT,), {"revision": "c0ffee", "streaming": False})
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
    check_corpus(Corpus(source), "train")
    assert "it holds 1100 rows, and the first 1100 are the test" in message(read, source)


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
    places = locations(Corpus(parse_source(calibration, FLAG)), "train")
    assert bool(places & locations(Corpus(parse_source(test, "--eval_data")), "test")) == shared


def test_what_the_hub_set_lacks(hub):
    hub.sets[("owner/name",)] = {"dev": {"body": ["a"]}, "train": {"body": ["a"], "id": [1]}}
    hub.sets[(UBERTEXT,)] = {"train": {"text": []}}
    for text, words in {
        "owner/name::tset": "no split 'tset', only dev, train",
        "owner/name": "no column 'text', only body, id",
        "owner/name:::id": "row 0: 'id' is of type int",
        "ubertext": "the split 'train' is empty. Name another.",
    }.items():
        assert words in message(check_corpus, Corpus(parse_source(text, FLAG)), "train")


ERRORS = {
    "the Hub cannot be reached (no route). Check the network": HTTPError("no route"),
    "it cannot be loaded (x y). Name another.": DatasetNotFoundError("x\ny"),
    "loaded (BuilderConfig). Name a config as owner/name:CONFIG.": ValueError("BuilderConfig"),
}


@pytest.mark.parametrize(("words", "error"), ERRORS.items())
def test_what_fails_on_the_hub_is_one_line(hub, words, error):
    source = parse_source("owner/name", FLAG)
    hub.error = error
    assert words in message(check_corpus, Corpus(source), "train")


def test_what_was_downloaded_serves_without_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub.unreachable = HTTPError("no route")
    assert "(no route)" in message(check_corpus, Corpus(parse_source("ubertext", FLAG)), "train")
    for name in (UBERTEXT, "owner/name"):
        (tmp_path / f"datasets--{name.replace('/', '--')}").mkdir()
        hub.sets[(name,)] = {"train": {"text": ["a"]}}
    corpus = Corpus(parse_source("ubertext", FLAG))
    texts, revision = corpus.documents("train"), corpus.revision("train")
    assert list(texts) == ["a"] and revision is None
    assert hub.calls == [((UBERTEXT,), {"revision": None, "streaming": False})]
    stream = parse_source("owner/name", FLAG)  # can't come from a cache
    assert "cannot be reached (no route)" in message(check_corpus, Corpus(stream), "train")


def test_a_stream_that_breaks_is_one_line(hub):
    class Stream:
        column_names = ["text"]

        def __iter__(self):
            yield {"text": "a"}
            raise HTTPError("slow")

    hub.sets[("owner/name",)] = {"test": {"text": ["a"]}, "train": Stream()}
    assert "cannot be reached" in message(read, parse_source("owner/name", FLAG))


def test_prompts_of_a_language(hub):
    """Aya's rows are chosen by their language, named as in a tag."""
    codes, asked = ["ukr", "eng", "ukr"], ["Де?", "Where?", "Хто?"]
    columns = {"inputs": asked, "targets": ["Тут.", "Here.", "Я."], "language_code": codes}
    hub.sets[("CohereLabs/aya_dataset",)] = {"train": columns}
    for name in ("aya:uk", "aya:ukr"):
        documents = read(parse_source(name, FLAG))
        assert [each.messages[0]["content"] for each in documents] == ["Де?", "Хто?"]
    assert "is empty" in message(read, parse_source("aya:de", FLAG))
