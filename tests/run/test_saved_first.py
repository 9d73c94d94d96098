"""Once a model is pruned it is saved, whatever becomes of figures, pictures, tasks and output."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO

import pytest
import tiny
from support import LIMIT, QUICK, ROOT, Done, call, full_disk, raising, results, start, weights

import main
from lib.util import command
from lib.util.folders import locked_results

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def given(tmp_path: Path) -> list[object]:
    model, texts = tiny.write_model(tmp_path / "model"), tiny.write_texts(tmp_path / "укр")
    pruned = ["--prune_method", "wanda", "--calibration_data", texts, "--save_model", "new"]
    return ["--model", model, *pruned, *QUICK]


def check_saved(done: Done, *words: str) -> None:
    """The run failed in one line that holds the words and says where the pruned model is."""
    assert done.status == 1, done
    [line] = [line for line in done.complaints if line.startswith("error: ")]
    for word in (*words, "the model is saved in new"):
        assert word in line, line
    assert sum(int((weight == 0).sum()) for weight in weights("new").values()) > 1000


@pytest.mark.parametrize("file", ["log_wanda.txt", "results.json"])
def test_a_log_and_results_that_can_not_be_written(given: list, file: str) -> None:
    Path("out", file).mkdir(parents=True)
    check_saved(call(*given), "--save out", "directory")
    if file == "log_wanda.txt":
        assert results()["perplexity"]


def test_a_task_that_fails(given: list, harness: None) -> None:
    with raising(ConnectionError("data set can't be downloaded"), "step tasks"):
        done = call(*given, "--tasks", "arc_easy")
    check_saved(done, "--tasks arc_easy", "data set can't be downloaded")
    assert "Traceback" not in done.err
    assert results()["perplexity"]


def test_a_picture_that_fails(given: list) -> None:
    with raising(ValueError("no font"), "recovery.png"):
        done = call(*given, "--recover", "64")
    check_saved(done, "recovery.png", "no font")
    assert results()["recovery"]


@pytest.mark.parametrize("step", ["summary", "card"])
def test_a_summary_or_card_that_fails(given: list, step: str) -> None:
    with raising(KeyError("a defect"), step):
        check_saved(call(*given), step, "a defect")
    assert results()["perplexity"]


@pytest.mark.parametrize("event", ["pack", "step eval"])
def test_an_evaluation_that_fails(given: list, event: str) -> None:
    with raising(RuntimeError("out of registers"), event):
        done = call(*given, *(["--replace_sparse_layers"] if event == "pack" else []))
    check_saved(done, "out of registers")
    assert "Traceback" in done.err
    assert not Path("out/results.json").exists()


def test_a_model_that_can_not_be_saved_keeps_its_blocks_and_figures(given: list) -> None:
    with full_disk("step save"):
        done = call(*given, "--resume", "blocks")
    assert done.status == 1 and len(done.complaints) == 1
    assert "--save_model new: can't be saved" in done.complaints[0]
    assert "saved in" not in done.complaints[0]
    assert results()["perplexity"] and Path("blocks/job.json").is_file()


def test_a_step_that_fails_keeps_the_blocks_where_no_model_is_saved(given: list) -> None:
    saves = given.index("--save_model")
    Path("out/log_wanda.txt").mkdir(parents=True)
    done = call(*given[:saves], *given[saves + 2 :], "--resume", "blocks")
    assert done.status == 1 and "saved in" not in done.complaints[-1]
    assert Path("blocks/job.json").is_file()


def test_a_reader_that_has_gone_from_a_terminal_without_the_letters(
    given: list, tmp_path: Path
) -> None:
    argv = [str(ROOT / "main.py"), *map(str, given)]
    process = start(argv, tmp_path, PYTHONIOENCODING="ascii:strict")
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=LIMIT) == 0
    assert weights("new") and results()["perplexity"]


def told(given: list, out: TextIO) -> None:
    """Run main.py in this process with `out` as its terminal; it succeeds and saves."""
    with redirect_stdout(out), redirect_stderr(out):
        assert command.run(main.main, [str(part) for part in given]) == 0
    assert weights("new") and list(results()["perplexity"]) == ["укр"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252", "cp1251", "cp866"])
def test_letters_that_a_terminal_lacks_are_escaped(given: list, encoding: str) -> None:
    """As consoles of Windows, and logs in the C locale."""
    out = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict", write_through=True)
    told(given, out)
    text = out.buffer.getvalue().decode(encoding)
    assert f"perplexity {escaped('укр', encoding)}: " in text


def escaped(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("goes", ["a full disk", "a reader that has gone"])
def test_what_can_not_be_printed_stops_nothing(given: list, goes: str) -> None:
    if goes == "a full disk":
        end = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, end = os.pipe()
        os.close(reader)
    with suppress(OSError), os.fdopen(end, "w", encoding="utf-8", buffering=1) as out:
        told(given, out)


def test_results_that_no_run_wrote_are_not_replaced(given: list) -> None:
    for text in ('{"mine": 1}', "[]", "not JSON"):
        Path("out").mkdir(exist_ok=True)
        Path("out/results.json").write_text(text)
        done = call(*given)
        assert done.status == 1 and len(done.complaints) == 1
        assert "--save out: holds a results.json that no run wrote" in done.complaints[0]
        assert Path("out/results.json").read_text() == text and not Path("new").exists()


def test_files_of_an_earlier_run_do_not_stay_beside_the_results(given: list) -> None:
    assert call(*given, "--recover", "64").status == 0
    Path("out/notes.txt").write_text("mine")
    files = {path.name for path in Path("out").iterdir()}
    assert files == {"log_wanda.txt", "recovery.png", "results.json", "notes.txt"}
    given[given.index("wanda")] = "magnitude"
    assert call(*given).status == 0
    files = {path.name for path in Path("out").iterdir()}
    assert files == {"log_magnitude.txt", "results.json", "notes.txt"}


def test_two_runs_at_once_do_not_share_their_results(given: list) -> None:
    with locked_results("out"):
        done = call(*given)
    assert done.status == 1 and len(done.complaints) == 1
    assert "--save out: another run is going to write it" in done.complaints[0]
    assert not Path("new").exists() and not Path("out").exists()
