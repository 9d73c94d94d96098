"""The data set builder: dividers, lengths, splits and genres; damage, and what is not its own."""

import bz2
import json
from functools import partial

import pytest
from support import content, launched, raising

from lib.data import ubertext
from lib.data.sources import parse_source
from lib.data.ubertext import GENRES, Rule, documents, find_dumps
from lib.util import command
from lib.util.errors import UserError


def long_document(genre, number):
    return f"Документ {number}  жанру\t{genre},\n\nз порожнім рядком\n" + "слово " * (20 + number)


build = partial(ubertext.build, rule=Rule(min_length=100, train=4, test=2))


@pytest.fixture
def dumps(tmp_path):
    """Eight long documents of each genre, a short one after each; bz2 but for one."""
    folder = tmp_path / "dumps"
    folder.mkdir()
    for genre in GENRES:
        texts = []
        for number in range(8):
            texts += [long_document(genre, number), "короткий"]
        text = "\n\n\n\n".join(texts) + "\n"
        name = "wikipedia" if genre == "wiki" else genre
        path = folder / f"ubertext.{name}.filter_rus_gcld+short.text_only.txt"
        if genre == "social":
            path.write_text(text, encoding="utf-8")
        else:
            path.with_name(path.name + ".bz2").write_bytes(bz2.compress(text.encode()))
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_published_rule():
    assert ubertext.DIVIDER == 3 and Rule() == Rule(min_length=8192, train=1000, test=50)
    assert GENRES == ("court", "fiction", "news", "social", "wiki")


def test_the_first_long_documents_of_every_genre(dumps, tmp_path):
    out = tmp_path / "out"
    build(find_dumps(dumps), out)
    expected = [
        {"text": " ".join(long_document(genre, number).split()), "genre": genre}
        for genre in GENRES
        for number in range(6)
    ]
    train = [row for i, row in enumerate(expected) if i % 6 < 4]
    test = [row for i, row in enumerate(expected) if i % 6 >= 4]
    assert rows(out / "train.jsonl") == train
    assert rows(out / "test.jsonl") == test
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dumps", "out"]
    assert parse_source(str(out), "--calibration_data").path == out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\n\n\nb\n", ["a\n", "b\n"]),
        ("a\n\n\nb\n", ["a\nb\n"]),  # two blank lines do not divide
        ("\n\n\n\na\n\n\n\n\n\nb", ["a\n", "b"]),  # nor do more of them make empty documents
        ("a\n\nb\n \t\n\n\nc\n", ["a\nb\n", "c\n"]),  # white space alone is a blank line
        ("", []),
    ],
)
def test_dividers(text, expected):
    assert list(documents(text.splitlines(keepends=True))) == expected


def test_the_published_count_adds_blank_lines_up():
    lines = "a\n\nb\n\nc\n\nd\n\n\n\ne\n".splitlines(keepends=True)
    assert list(documents(lines, add_up=True)) == ["a\nb\nc\n", "d\n", "e\n"]
    assert list(documents(lines)) == ["a\nb\nc\nd\n", "e\n"]


def test_longer_means_longer(tmp_path):
    dump = tmp_path / "court.txt"
    dump.write_text("x" * 99 + "\n\n\n\n" + "y" * 100 + "\n\n\n\n" + "z" * 101)
    build({"court": dump}, tmp_path / "out")
    # counted with line ends, before folding: 100, 101, 101
    assert [row["text"][0] for row in rows(tmp_path / "out" / "train.jsonl")] == ["y", "z"]
    assert (tmp_path / "out" / "test.jsonl").read_text() == ""


def test_an_interrupted_build_leaves_nothing_and_an_earlier_one_stays(dumps, tmp_path):
    with raising(KeyboardInterrupt(), "documents", 2), pytest.raises(KeyboardInterrupt):
        build(find_dumps(dumps), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    build(find_dumps(dumps), tmp_path / "out")
    train = tmp_path / "out" / "train.jsonl"
    before, written = content(tmp_path / "out"), train.read_bytes()
    with raising(KeyboardInterrupt(), "documents", 2), pytest.raises(KeyboardInterrupt):
        build(find_dumps(dumps), tmp_path / "out")
    assert content(tmp_path / "out") == before
    build(find_dumps(dumps), tmp_path / "out")
    assert train.read_bytes() == written


@pytest.mark.parametrize("name", ["out/mine.txt", "out.partial/mine.txt"])
def test_files_of_the_user_stay(dumps, tmp_path, name):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("mine")
    if name.startswith("out/"):
        with pytest.raises(UserError, match="^OUT .*out: holds mine.txt"):
            build(find_dumps(dumps), tmp_path / "out")
    else:
        build(find_dumps(dumps), tmp_path / "out")
    assert (tmp_path / name).read_text() == "mine"


def test_bad_dumps(dumps, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_dumps(tmp_path / "nowhere")
    court = {"court": find_dumps(dumps)["court"]}
    whole = court["court"].read_bytes()
    for damaged in (whole[:-20], whole[:60] + b"????" + whole[64:]):
        court["court"].write_bytes(damaged)
        with pytest.raises(UserError, match=r"court\S+: damaged bz2"):
            build(court, tmp_path / "out")
    court["court"].write_bytes("слово".encode("cp1251") * 99)
    with pytest.raises(UserError, match="not UTF-8"):
        build(court, tmp_path / "out")
    (dumps / "court.txt").write_text("")
    with pytest.raises(UserError, match="several files with 'court'"):
        find_dumps(dumps)
    court["court"].unlink()
    (dumps / "court.txt").write_text("a b")
    with pytest.raises(UserError, match="longest has 3"):
        build(find_dumps(dumps), tmp_path / "out")
    (dumps / "court.txt").unlink()
    with pytest.raises(UserError, match="no file with 'court' in the name"):
        find_dumps(dumps)
    assert not (tmp_path / "out").exists()


def test_too_few_documents_are_reported(dumps, tmp_path, capsys):
    rule = Rule(min_length=100, train=7, test=5)
    build({"court": find_dumps(dumps)["court"]}, tmp_path / "out", rule=rule)
    assert "only 7 training and 1 test documents" in capsys.readouterr().err


def test_the_command(dumps, tmp_path):
    for path in dumps.iterdir():
        path.unlink()
    for genre in GENRES:
        (dumps / f"{genre}.txt").write_text("\n\n\n\n".join(["слово " * 1400] * 3))
    out = launched(["ubertext", dumps, "out"], tmp_path)
    assert "15 train, 0 test documents of 5 genres" in out
    assert len(rows(tmp_path / "out/train.jsonl")) == 15


def test_mistakes_are_one_line(tmp_path, capsys):
    nowhere, out = str(tmp_path / "nowhere"), str(tmp_path / "out")
    assert command.run(ubertext.main, [nowhere, out]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: FOLDER_OF_DUMPS {nowhere}: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
