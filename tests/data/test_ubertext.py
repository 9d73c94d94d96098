"""The data set builder: dividers, lengths, splits and genres; damage; the upload to a hub."""

from __future__ import annotations

import bz2
import json
from pathlib import Path

import huggingface_hub
import pytest
from support import call, refused

from lib.commands import ubertext
from lib.commands.ubertext import GENRES, build, documents, find_dumps

DIVIDER = "\n\n\n\n"


def long_document(genre: str, number: int) -> str:
    words = "слово " * (20 + number)
    return f"Документ {number}  жанру\t{genre},\n\nз порожнім\u2028рядком\n{words}"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of more than 100 characters, four to train and two to test."""
    for name, value in {"MIN_LENGTH": 100, "TRAIN": 4, "TEST": 2}.items():
        monkeypatch.setattr(ubertext, name, value)


@pytest.fixture
def dumps(tmp_path: Path, short: None) -> Path:
    """Eight long documents of each genre, a short one after each; bz2 but for one."""
    folder = tmp_path / "dumps"
    folder.mkdir()
    for genre in GENRES:
        texts = [text for n in range(8) for text in (long_document(genre, n), "короткий")]
        data = (DIVIDER.join(texts) + "\n").encode()
        name = "wikipedia" if genre == "wiki" else genre
        file = folder / f"ubertext.{name}.filter_rus_gcld+short.text_only.txt"
        if genre == "social":
            file.write_bytes(data)
        else:
            file.with_name(file.name + ".bz2").write_bytes(bz2.compress(data))
    return folder


def rows(folder: Path, split: str) -> list[dict]:
    text = (folder / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_the_first_long_documents_of_every_genre(dumps: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(find_dumps(dumps), out)
    expected = [
        {"text": " ".join(long_document(genre, number).split()), "genre": genre}
        for genre in GENRES
        for number in range(6)
    ]
    assert rows(out, "train") == [row for i, row in enumerate(expected) if i % 6 < 4]
    assert rows(out, "test") == [row for i, row in enumerate(expected) if i % 6 >= 4]
    assert refused(build, find_dumps(dumps), out).startswith(f"OUT {out}: it holds")


def test_dividers_and_lengths(short: None, tmp_path: Path) -> None:
    for text, expected in {
        "a\n\n\nb\n": ["a\nb\n"],  # two blank lines do not divide
        "\n\n\n\na\n\n\n\n\n\nb": ["a\n", "b"],  # nor make more of them documents
        "a\n\nb\n \t\n\n\nc\n": ["a\nb\n", "c\n"],  # white space is a blank line
        "a\n\nb\n\nc\n\nd\n\n\n\ne\n": ["a\nb\nc\nd\n", "e\n"],
    }.items():
        assert list(documents(text.splitlines(keepends=True))) == expected
    dump = tmp_path / "court.txt"
    dump.write_text(DIVIDER.join(["x" * 99, *(letter * 100 for letter in "abcdef"), "z" * 101]))
    build({"court": dump}, tmp_path / "out")
    # counted with line ends, before folding: 100, 101, ...
    assert [row["text"][0] for row in rows(tmp_path / "out", "train")] == [*"abcd"]
    assert [row["text"][0] for row in rows(tmp_path / "out", "test")] == [*"ef"]


def test_bad_dumps(dumps: Path, tmp_path: Path) -> None:
    court = {"court": find_dumps(dumps)["court"]}
    for content, problem in (
        (court["court"].read_bytes()[:-20], "neither UTF-8"),
        ("слово".encode("cp1251") * 99, "neither UTF-8"),
        (DIVIDER.join([long_document("court", 1)] * 5).encode(), "5 documents are longer than 100"),
    ):
        court["court"].write_bytes(content)
        line = refused(build, court, tmp_path / "out")
        assert str(court["court"]) in line and problem in line
    assert [path.name for path in tmp_path.iterdir()] == ["dumps"]
    court["court"].unlink()
    assert "'court'" in refused(find_dumps, dumps)


def test_the_published_numbers(tmp_path: Path) -> None:
    """The command as it is called, with the lengths and counts that were published."""
    for genre in GENRES:
        texts = ["слово " * 1400] * 1051 + ["слово " * 1300] * 2
        (tmp_path / f"{genre}.txt").write_text(DIVIDER.join(texts))
    out = tmp_path / "out"
    done = call(tmp_path, out, program=ubertext.main)
    assert done.status == 0 and "5,000 train, 250 test documents" in done.out
    assert (len(rows(out, "train")), len(rows(out, "test"))) == (5000, 250)
    (tmp_path / "wiki.txt").write_text(DIVIDER.join(texts[2:]))
    (line,) = call(tmp_path, tmp_path / "new", program=ubertext.main).complaints
    assert "wiki.txt: 1,049 documents" in line and not (tmp_path / "new").exists()


def test_the_upload(dumps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, out = [], tmp_path / "out"

    def refuse(*_, **__):
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required.\nmore")

    def upload(_, repo_id, folder_path, repo_type):
        files = sorted(path.name for path in Path(folder_path).iterdir())
        sent.append((repo_id, repo_type, files))

    def push(name: str):
        return call(dumps, out, "--push", name, program=ubertext.main)

    hub = huggingface_hub.HfApi
    monkeypatch.setattr(hub, "whoami", refuse)
    monkeypatch.setattr(hub, "create_repo", lambda _, *name, **how: sent.append((*name, how)))
    monkeypatch.setattr(hub, "upload_folder", upload)
    assert push("texts").status == 2 and push("a/b/c").status == 2
    (line,) = push("me/texts").complaints
    assert "hf auth login" in line and not out.exists() and not sent
    monkeypatch.setattr(hub, "whoami", lambda _: {"name": "me"})
    done = push("me/texts")
    assert done.status == 0 and done.out.endswith("https://huggingface.co/datasets/me/texts\n")
    how = {"repo_type": "dataset", "private": True, "exist_ok": True}
    files = ["test.jsonl", "train.jsonl"]
    assert sent == [("me/texts", how), ("me/texts", "dataset", files)]
    out.rename(tmp_path / "other")
    monkeypatch.setattr(hub, "upload_folder", refuse)
    (line,) = push("me/texts").complaints
    assert "OUT is whole" in line and len(rows(out, "train")) == 20
