"""The data set builder: dividers, lengths, splits and genres; damage, and what is not its own."""

import bz2
import json

import pytest

from lib.commands import ubertext
from lib.commands.ubertext import GENRES, build, documents, find_dumps
from lib.util.errors import UserError


def long_document(genre, number):
    words = "слово " * (20 + number)
    return f"Документ {number}  жанру\t{genre},\n\nз порожнім\u2028рядком\n{words}"


@pytest.fixture
def short(monkeypatch):
    """Documents of more than 100 characters, four to train and two to test."""
    for name, value in {"MIN_LENGTH": 100, "TRAIN": 4, "TEST": 2}.items():
        monkeypatch.setattr(ubertext, name, value)


@pytest.fixture
def dumps(tmp_path, short):
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
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_the_first_long_documents_of_every_genre(dumps, tmp_path):
    out = tmp_path / "out"
    build(find_dumps(dumps), out)
    expected = [
        {"text": " ".join(long_document(genre, number).split()), "genre": genre}
        for genre in GENRES
        for number in range(6)
    ]
    assert rows(out / "train.jsonl") == [row for i, row in enumerate(expected) if i % 6 < 4]
    assert rows(out / "test.jsonl") == [row for i, row in enumerate(expected) if i % 6 >= 4]
    with pytest.raises(UserError, match="^OUT .*out: holds"):
        build(find_dumps(dumps), out)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\n\nb\n", ["a\nb\n"]),  # two blank lines do not divide
        ("\n\n\n\na\n\n\n\n\n\nb", ["a\n", "b"]),  # nor make more of them documents
        ("a\n\nb\n \t\n\n\nc\n", ["a\nb\n", "c\n"]),  # white space is a blank line
        ("a\n\nb\n\nc\n\nd\n\n\n\ne\n", ["a\nb\nc\nd\n", "e\n"]),
    ],
)
def test_dividers(text, expected):
    assert list(documents(text.splitlines(keepends=True))) == expected


def test_longer_means_longer(short, tmp_path, capsys):
    dump = tmp_path / "court.txt"
    dump.write_text("x" * 99 + "\n\n\n\n" + "y" * 100 + "\n\n\n\n" + "z" * 101)
    build({"court": dump}, tmp_path / "out")
    # counted with line ends, before folding: 100, 101, 101
    assert [row["text"][0] for row in rows(tmp_path / "out" / "train.jsonl")] == ["y", "z"]
    assert (tmp_path / "out" / "test.jsonl").read_text() == ""
    assert "2 train, 0 test documents" in capsys.readouterr().out


def test_bad_dumps(dumps, tmp_path):
    court = {"court": find_dumps(dumps)["court"]}
    whole = court["court"].read_bytes()
    for content, problem in (
        (whole[:-20], r"court\S+: neither UTF-8"),
        ("слово".encode("cp1251") * 99, "neither UTF-8"),
        (b"a b", "no document is longer"),
    ):
        court["court"].write_bytes(content)
        with pytest.raises(UserError, match=problem):
            build(court, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dumps"]
    for path in dumps.glob("*court*"):
        path.unlink()
    with pytest.raises(UserError, match="no file with 'court' in the name"):
        find_dumps(dumps)


def test_the_command(tmp_path, capsys):
    for genre in GENRES:
        (tmp_path / f"{genre}.txt").write_text("\n\n\n\n".join(["слово " * 1400] * 3))
    ubertext.main([str(tmp_path), str(tmp_path / "out")])
    assert "15 train, 0 test documents" in capsys.readouterr().out
    assert len(rows(tmp_path / "out/train.jsonl")) == 15
