"""The demo from the first story to the picture, on a model that hardly learns."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from support import content, launched, raising

from lib.data.documents import open_documents
from lib.data.sources import parse_source
from lib.demo import demo
from lib.demo.demo import SMALL, Scale
from lib.demo.model import train_model
from lib.demo.text import read_stories, write_texts
from lib.util import command
from lib.util.errors import UserError
from lib.util.events import listening
from lib.util.folders import staged_folder

FOLDER = Path("demo")
ROWS = {("dense", "–", "none")}
ROWS |= {
    (method, kind, language)
    for method in ("wanda", "admm")
    for kind in ("50%", "2:4")
    for language in ("uk", "en")
}
ROWS |= {("admm + recovery", "2:4", language) for language in ("uk", "en")}


def run_demo(scale: Scale = SMALL, **options: bool) -> str:
    """Run the demo and return its output."""
    with redirect_stdout(io.StringIO()) as out:
        demo.demo(FOLDER, scale, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a demo that ran to its end; its output is in output.txt."""
    folder = tmp_path_factory.mktemp("place")
    said = launched(["demo", "--small"], folder)
    (folder / "output.txt").write_text(said, encoding="utf-8")
    return folder


@pytest.mark.usefixtures("at_place")
def test_table_and_picture():
    report = (FOLDER / "report.md").read_text("utf-8")
    figures, *completions = report.split("\n### Completions: ")
    lines = [line for line in figures.splitlines() if line.startswith("| ")][2:]
    rows = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in lines]
    assert len(rows) == len(ROWS) and set(rows) == ROWS
    assert "![pruning cost](pruning_cost.png)" in report
    assert [part.partition("\n")[0] for part in completions] == ["uk", "en"]
    assert all(part.count("\n| ") == len(ROWS) + 2 for part in completions)
    assert (FOLDER / "pruning_cost.png").read_bytes().startswith(b"\x89PNG")
    output = Path("output.txt").read_text("utf-8")
    assert "table: demo/report.md\npicture: demo/pruning_cost.png\ndone in " in output
    assert all(line in output for line in lines)


@pytest.mark.usefixtures("at_place")
def test_runs_are_of_the_texts_and_windows_asked_for():
    files = list((FOLDER / "runs").rglob("results.json"))
    assert len(files) == len(ROWS)
    for file in files:
        run = json.loads(file.read_text("utf-8"))
        assert list(run["perplexity"]) == ["uk", "en"]
        assert run["flags"]["device"] == "cpu" and run["flags"]["nsamples"] == SMALL.windows


@pytest.mark.usefixtures("at_place")
def test_a_second_start_does_nothing_again():
    before = content(FOLDER)
    assert "kept from before" in run_demo()
    assert content(FOLDER) == before  # every results.json says how many seconds its run took


@pytest.mark.usefixtures("elsewhere")
def test_runs_of_another_model_are_not_kept():
    scale = dataclasses.replace(SMALL, methods=("magnitude",), types=("unstructured",))
    run_demo(scale)
    before = content(FOLDER / "runs" / "model")
    run_demo(dataclasses.replace(scale, training=dataclasses.replace(SMALL.training, seed=1)))
    after = content(FOLDER / "runs" / "model")
    assert before.keys() == after.keys()
    results = [name for name in before if name.endswith("results.json")]
    assert len(results) == 2 and not any(before[name] == after[name] for name in results)


@pytest.mark.usefixtures("elsewhere")
def test_interrupted_training_and_runs():
    with raising(KeyboardInterrupt(), "training", 1), pytest.raises(KeyboardInterrupt):
        run_demo()
    assert not content(FOLDER)

    threads = []

    def stop(event: str, _: int) -> None:
        if event.startswith("run "):
            threads.append(torch.get_num_threads())
            raise KeyboardInterrupt

    torch.set_num_threads(2)
    try:
        with listening(stop), pytest.raises(KeyboardInterrupt):
            run_demo()
        threads.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(1)
    assert threads == [1, 2]
    model = content(FOLDER / "model")
    with listening(stop), pytest.raises(KeyboardInterrupt):
        run_demo()
    assert content(FOLDER / "model") == model


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        ("demo", "--folder demo: is a file"),
        ("demo/thesis.txt", "--folder demo: holds thesis.txt, but no demo"),
        ("demo/uk/train.jsonl", "--folder demo: holds uk, but no demo"),
        ("demo/model", "--folder demo: holds model, but no demo"),
        ("demo/model/config.json", "--folder demo: holds model, but no demo"),
        ("demo/model/training.json", "--folder demo: holds model, but no demo"),
    ],
)
def test_what_is_not_a_demo_is_left_alone(file, complaint):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("mine")
    before = content(".")
    with pytest.raises(UserError, match=complaint):
        run_demo()
    assert content(".") == before


@pytest.mark.usefixtures("elsewhere")
def test_a_saved_model_beside_own_texts_is_no_demo():
    with staged_folder(FOLDER / "model") as stage:  # with a manifest, as main.py saves
        (stage / "config.json").write_text("{}")
        (stage / "training.json").write_text('{"steps": 9}')
    (FOLDER / "uk").mkdir()
    (FOLDER / "uk/train.jsonl").write_text('{"text": "mine"}\n')
    before = content(".")
    with pytest.raises(UserError, match="--folder demo: holds model, but no demo; name a new"):
        run_demo()
    assert content(".") == before


@pytest.mark.usefixtures("elsewhere")
def test_a_file_of_the_user_in_the_model_folder_is_left_alone():
    train_model(FOLDER / "model", read_stories(2), SMALL.training)
    (FOLDER / "model/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes.txt"):
        run_demo()
    assert (FOLDER / "model/notes.txt").read_text() == "mine"


def test_stories_are_whole_and_share_no_letter():
    stories = read_stories(525)
    assert all(len(set(texts)) == 525 for texts in stories.values())
    for text in [*stories["uk"], *stories["en"]]:
        assert len(text) >= 1600 and re.search(r"[.!?”]$", text)
        assert not re.search(r"[{}<>|/_]|  | [.,?!]", text)
    assert not re.search("[A-Za-z]", "".join(stories["uk"]))
    assert not re.search("[А-Яа-яІіЇїЄєҐґ]", "".join(stories["en"]))


def test_texts_are_written_as_main_reads_them(tmp_path):
    stories = read_stories(9)
    write_texts(tmp_path, stories, 2)
    for language, texts in stories.items():
        source = parse_source(str(tmp_path / language), "--eval_data")
        for split, part in (("train", texts[:7]), ("test", texts[7:])):
            with open_documents(source, split) as (documents, _):
                assert list(documents) == part


@pytest.mark.usefixtures("elsewhere")
def test_flags_reach_the_demo(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(demo, "demo", lambda *given: calls.append(given))
    assert command.run(demo.main, []) == 0
    assert command.run(demo.main, ["--folder", "there", "--fresh", "--debug", "--small"]) == 0
    assert calls == [(FOLDER, Scale(), False, False), (Path("there"), SMALL, True, True)]
    assert capsys.readouterr().out.count("done in ") == 2
