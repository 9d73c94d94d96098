"""The data set builder: dividers, lengths, splits and genres; resuming; damage."""

import bz2
import json

import pytest
from support import start

from lib.data import ubertext
from lib.data.sources import parse_source
from lib.data.ubertext import GENRES, Rules, build, documents, find_dumps
from lib.util import command
from lib.util.errors import UserError

RULES = Rules(3, False, min_length=100, train=4, test=2)


def long_document(genre, number):
    return f"Документ {number}  жанру\t{genre},\n\nз порожнім рядком\n" + "слово " * (20 + number)


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


def test_the_first_long_documents_of_every_genre(dumps, tmp_path):
    out = tmp_path / "out"
    build(find_dumps(dumps, GENRES), out, RULES)
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


def test_published_defaults():
    args = ubertext.parser().parse_args(["dumps", "out"])
    assert ubertext.rules_of(args, ubertext.parser()) == Rules(3, False, 8192, 1000, 50)
    assert tuple(args.genres) == ("court", "fiction", "news", "social", "wiki")


@pytest.mark.parametrize(
    ("text", "divider", "expected"),
    [
        ("a\n\n\n\nb\n", 3, ["a\n", "b\n"]),
        ("a\n\n\nb\n", 3, ["a\nb\n"]),  # two blank lines do not divide
        ("\n\n\n\na\n\n\n\n\n\nb", 3, ["a\n", "b"]),  # nor do more of them make empty documents
        ("a\n\nb\n \t\n\n\nc\n", 3, ["a\nb\n", "c\n"]),  # white space alone is a blank line
        ("a\n\nb\n\nc\n", 1, ["a\n", "b\n", "c\n"]),
        ("a\n\n<|end|>\nb\n<|end|>\n", "<|end|>", ["a\n", "b\n"]),
        ("", 3, []),
    ],
)
def test_dividers(text, divider, expected):
    assert list(documents(text.splitlines(keepends=True), divider)) == expected


def test_the_published_count_adds_blank_lines_up():
    lines = "a\n\nb\n\nc\n\nd\n\n\n\ne\n".splitlines(keepends=True)
    assert list(documents(lines, 3, add_up=True)) == ["a\nb\nc\n", "d\n", "e\n"]
    assert list(documents(lines, 3)) == ["a\nb\nc\nd\n", "e\n"]


def test_longer_means_longer(tmp_path):
    dump = tmp_path / "court.txt"
    dump.write_text("x" * 99 + "\n\n\n\n" + "y" * 100 + "\n\n\n\n" + "z" * 101)
    build({"court": dump}, tmp_path / "out", RULES)
    # counted with line ends, before folding: 100, 101, 101
    assert [row["text"][0] for row in rows(tmp_path / "out" / "train.jsonl")] == ["y", "z"]
    assert (tmp_path / "out" / "test.jsonl").read_text() == ""


def test_an_interrupted_build_goes_on_and_ends_the_same(dumps, tmp_path, monkeypatch):
    found = find_dumps(dumps, GENRES)
    build(found, tmp_path / "whole", RULES)
    opened = []

    def counted(path):
        opened.append(path.name.split(".")[1])
        return genuine(path)

    def interrupted(lines, divider, add_up):
        for number, document in enumerate(documents(lines, divider, add_up)):
            if opened[-1] == "news" and number == 5:
                raise KeyboardInterrupt
            yield document

    genuine = ubertext.open_dump
    monkeypatch.setattr(ubertext, "open_dump", counted)
    with monkeypatch.context() as patched:
        patched.setattr(ubertext, "documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(found, tmp_path / "out", RULES)
    assert not (tmp_path / "out").exists()
    opened.clear()
    build(found, tmp_path / "out", RULES)
    assert opened == ["news", "social", "wikipedia"]
    for name in ("train.jsonl", "test.jsonl", "build.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    opened.clear()
    build(found, tmp_path / "out", RULES)  # there already
    assert opened == []
    with pytest.raises(UserError, match="holds something else"):
        build(found, tmp_path / "out", Rules(3, False, 100, 3, 2))


def test_other_flags_redo_finished_genres(dumps, tmp_path, monkeypatch):
    found = find_dumps(dumps, GENRES)
    monkeypatch.setattr(ubertext, "_join", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(found, tmp_path / "out", RULES)
    monkeypatch.undo()
    build(found, tmp_path / "out", Rules(3, False, 100, 2, 1))
    assert len(rows(tmp_path / "out" / "train.jsonl")) == 2 * len(GENRES)


def test_any_files_as_genres(tmp_path):
    folder = tmp_path / "dumps"
    folder.mkdir()
    for name in ("poems.txt", "letters.v2.txt"):
        (folder / name).write_text("word " * 30)
    assert list(find_dumps(folder, ["*"])) == ["letters", "poems"]
    assert list(find_dumps(folder, ["poem"])) == ["poem"]


def test_bad_dumps(dumps, tmp_path):
    with pytest.raises(UserError, match="no file with 'letters' in the name"):
        find_dumps(dumps, ["letters"])
    with pytest.raises(UserError, match="several files with 'ubertext'"):
        find_dumps(dumps, ["ubertext"])
    with pytest.raises(UserError, match="no such folder"):
        find_dumps(tmp_path / "nowhere", GENRES)
    court = find_dumps(dumps, ["court"])
    with pytest.raises(UserError, match="longest has"):
        build(court, tmp_path / "out", Rules(3, False, 10**6, 4, 2))
    whole = court["court"].read_bytes()
    for damaged in (whole[:-20], whole[:60] + b"????" + whole[64:]):
        court["court"].write_bytes(damaged)
        with pytest.raises(UserError, match=r"court\S+: damaged bz2"):
            build(court, tmp_path / "out", RULES)
    court["court"].write_bytes("слово".encode("cp1251") * 99)
    with pytest.raises(UserError, match="not UTF-8"):
        build(court, tmp_path / "out", RULES)
    assert not (tmp_path / "out").exists()


def test_too_few_documents_are_told(dumps, tmp_path, capsys):
    build(find_dumps(dumps, ["court"]), tmp_path / "out", Rules(3, False, 100, 7, 5))
    assert "only 7 training and 1 test documents" in capsys.readouterr().err


def test_the_command(dumps, tmp_path):
    given = [str(dumps), str(tmp_path / "out"), "--min_length=100", "--train=4", "--test=2"]
    process = start(["-m", "lib.data.ubertext", *given], tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "20 train, 10 test documents of 5 genres" in out


def test_mistakes_are_one_line(dumps, tmp_path, capsys):
    nowhere, out = str(tmp_path / "nowhere"), str(tmp_path / "out")
    assert command.run(ubertext.main, [nowhere, out]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: FOLDER_OF_DUMPS {nowhere}: ") and err.count("\n") == 1
    no_blank_lines = ("--divider=---", "--published_divider")
    for flags in (
        ["--train=0"],
        ["--test=0"],
        ["--divider=0"],
        ["--min_length=-1"],
        no_blank_lines,
    ):
        with pytest.raises(SystemExit) as left:
            ubertext.main([str(dumps), out, *flags])
        assert left.value.code == 2
    assert not (tmp_path / "out").exists()
