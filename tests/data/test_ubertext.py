"""The data set builder: dividers, lengths, splits and genres; damage; the upload to a hub."""

import bz2
import json
from pathlib import Path

import huggingface_hub
import pytest
from support import call

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
    with pytest.raises(UserError, match="^OUT .*out: it holds"):
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


def test_longer_means_longer(short, tmp_path):
    dump = tmp_path / "court.txt"
    texts = ["x" * 99, *(letter * 100 for letter in "abcdef"), "z" * 101]
    dump.write_text("\n\n\n\n".join(texts))
    build({"court": dump}, tmp_path / "out")
    # counted with line ends, before folding: 100, 101, ...
    assert [row["text"][0] for row in rows(tmp_path / "out" / "train.jsonl")] == [*"abcd"]
    assert [row["text"][0] for row in rows(tmp_path / "out" / "test.jsonl")] == [*"ef"]


def test_bad_dumps(dumps, tmp_path):
    court = {"court": find_dumps(dumps)["court"]}
    whole = court["court"].read_bytes()
    few = "\n\n\n\n".join([long_document("court", 1)] * 5)
    for content, problem in (
        (whole[:-20], r"court\S+: it is neither UTF-8"),
        ("слово".encode("cp1251") * 99, "neither UTF-8"),
        (few.encode(), r"court\S+: 5 documents are longer than 100 characters, and 6 are needed"),
    ):
        court["court"].write_bytes(content)
        with pytest.raises(UserError, match=problem):
            build(court, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dumps"]
    for path in dumps.glob("*court*"):
        path.unlink()
    with pytest.raises(UserError, match="no file has 'court' in its name"):
        find_dumps(dumps)


def test_the_published_numbers(tmp_path):
    """The command as it is called, with the lengths and counts that were published."""
    for genre in GENRES:
        texts = ["слово " * 1400] * 1051 + ["слово " * 1300] * 2
        (tmp_path / f"{genre}.txt").write_text("\n\n\n\n".join(texts))
    out = tmp_path / "out"
    done = call(tmp_path, out, program=ubertext.main)
    assert done.status == 0 and "5,000 train, 250 test documents" in done.out
    assert (len(rows(out / "train.jsonl")), len(rows(out / "test.jsonl"))) == (5000, 250)
    (tmp_path / "wiki.txt").write_text("\n\n\n\n".join(texts[2:]))
    done = call(tmp_path, tmp_path / "new", program=ubertext.main)
    assert done.status == 1 and len(done.complaints) == 1
    assert "wiki.txt: 1,049 documents" in done.complaints[0] and not (tmp_path / "new").exists()


def test_the_upload(dumps, tmp_path, monkeypatch):
    sent = []

    def refuse(*_, **__):
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required.\nmore")

    def upload(_, repo_id, folder_path, repo_type):
        files = sorted(path.name for path in Path(folder_path).iterdir())
        sent.append((repo_id, repo_type, files))

    def push(*more):
        return call(dumps, tmp_path / "out", "--push", *more, program=ubertext.main)

    hub = huggingface_hub.HfApi
    monkeypatch.setattr(hub, "whoami", refuse)
    monkeypatch.setattr(hub, "create_repo", lambda _, *name, **how: sent.append((*name, how)))
    monkeypatch.setattr(hub, "upload_folder", upload)
    assert push("texts").status == 2 and push("a/b/c").status == 2
    done = push("me/texts")
    assert done.status == 1 and len(done.complaints) == 1 and "hf auth login" in done.err
    assert not (tmp_path / "out").exists() and not sent
    monkeypatch.setattr(hub, "whoami", lambda _: {"name": "me"})
    done = push("me/texts")
    assert done.status == 0 and done.out.endswith("https://huggingface.co/datasets/me/texts\n")
    how = {"repo_type": "dataset", "private": True, "exist_ok": True}
    files = ["test.jsonl", "train.jsonl"]
    assert sent == [("me/texts", how), ("me/texts", "dataset", files)]
    (tmp_path / "out").rename(tmp_path / "other")
    monkeypatch.setattr(hub, "upload_folder", refuse)
    done = push("me/texts")
    assert (
        done.status == 1 and len(done.complaints) == 1 and "OUT is whole. Run hf upload" in done.err
    )
    assert len(rows(tmp_path / "out/train.jsonl")) == 20
