"""The demo from the first story to the picture, on a model that hardly learns."""

from __future__ import annotations

import dataclasses
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from support import content

from lib.demo import demo
from lib.demo import model as demo_model
from lib.demo.demo import Scale
from lib.demo.model import Training
from lib.util import command
from lib.util.errors import UserError

SMALL = Scale(
    Training(vocabulary=300, window=32, width=16, inner=32, blocks=1, heads=2, batch=4, steps=2),
    train=10,
    test=1,
    windows=8,
    recovery=64,
)
FOLDER = Path("demo")
ROWS = {("dense", "–", "none")}
ROWS |= {("magnitude", kind, "none") for kind in ("50%", "2:4")}
ROWS |= {
    (method, kind, language)
    for method in ("wanda", "sparsegpt", "admm")
    for kind in ("50%", "2:4")
    for language in ("uk", "en")
}
ROWS |= {
    (f"{method} + recovery", "2:4", language)
    for method in ("sparsegpt", "admm")
    for language in ("uk", "en")
}


def said(scale: Scale = SMALL, **options: bool) -> str:
    """What the demo writes to the terminal."""
    with redirect_stdout(io.StringIO()) as out:
        demo.demo(FOLDER, scale, **options)
    return out.getvalue()


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a demo that ran to its end; what it said is in said.txt."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        Path("said.txt").write_text(said(), encoding="utf-8")
    return folder


@pytest.mark.usefixtures("at_place")
def test_table_and_picture():
    report = (FOLDER / "report.md").read_text("utf-8")
    figures, *words = report.split("\n### What they say: ")
    lines = [line for line in figures.splitlines() if line.startswith("| ")][2:]
    rows = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in lines]
    assert len(rows) == len(ROWS) and set(rows) == ROWS
    assert "![pruning cost](pruning_cost.png)" in report
    assert [part.partition("\n")[0] for part in words] == ["uk", "en"]
    assert all(part.count("\n| ") == len(ROWS) + 2 for part in words)
    assert (FOLDER / "pruning_cost.png").read_bytes().startswith(b"\x89PNG")
    output = Path("said.txt").read_text("utf-8")
    assert output.endswith("table: demo/report.md\npicture: demo/pruning_cost.png\n")
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
    assert "kept from before" in said()
    assert content(FOLDER) == before  # every results.json says how many seconds its run took


@pytest.mark.usefixtures("elsewhere")
def test_runs_of_another_model_are_not_kept(monkeypatch):
    monkeypatch.setattr(demo, "METHODS", ("magnitude",))
    monkeypatch.setattr(demo, "TYPES", ("unstructured",))
    said()
    before = content(FOLDER / "runs" / "model")
    said(dataclasses.replace(SMALL, training=dataclasses.replace(SMALL.training, seed=1)))
    after = content(FOLDER / "runs" / "model")
    assert before.keys() == after.keys()
    results = [name for name in before if name.endswith("results.json")]
    assert len(results) == 2 and not any(before[name] == after[name] for name in results)


@pytest.mark.usefixtures("elsewhere")
def test_interrupted_training_and_runs(monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(demo_model, "_draw", interrupted)
        said()
    assert not content(FOLDER)

    threads = []

    def stopped(*_):
        threads.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "sweep", stopped)
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            said()
        threads.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(1)
    assert threads == [1, 2]
    model = content(FOLDER / "model")
    with pytest.raises(KeyboardInterrupt):
        said()
    assert content(FOLDER / "model") == model


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        ("demo", "--folder demo: is a file"),
        ("demo/thesis.txt", "--folder demo: holds thesis.txt, but no demo"),
        ("demo/uk/train.jsonl", "--folder demo: holds uk, but no demo"),
        ("demo/model", "--folder demo/model: is a file"),
        (
            "demo/model/config.json",
            "--folder demo/model: holds config.json, which no earlier run wrote",
        ),
    ],
)
def test_what_is_not_a_demo_is_left_alone(file, complaint):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("mine")
    before = content(".")
    with pytest.raises(UserError, match=complaint):
        said()
    assert content(".") == before


@pytest.mark.usefixtures("elsewhere")
def test_flags_reach_the_demo(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(demo, "demo", lambda *given: calls.append(given))
    assert command.run(demo.main, []) == 0
    assert command.run(demo.main, ["--folder", "there", "--fresh", "--debug"]) == 0
    assert calls == [(FOLDER, Scale(), False, False), (Path("there"), Scale(), True, True)]
    assert capsys.readouterr().out.count("done in ") == 2
