"""Once a model is pruned it is saved, whatever becomes of figures, pictures, tasks and output."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny
from support import QUICK, ROOT, Done, call, results, start, weights

from lib.util.folders import locked_results

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def given(tmp_path: Path) -> list[object]:
    model, texts = tiny.write_model(tmp_path / "model"), tiny.write_texts(tmp_path / "укр")
    pruned = ["--prune_method", "wanda", "--calibration_data", texts, "--save_model", "new"]
    return ["--model", model, *pruned, *QUICK]


def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(name, fails)


def check_saved(done: Done, *words: str) -> None:
    """The run failed in one line that holds the words and says where the pruned model is."""
    assert done.status == 1, done
    [line] = [line for line in done.complaints if line.startswith("error: ")]
    for word in (*words, "the model is saved in new"):
        assert word in line, line
    assert sum(int((weight == 0).sum()) for weight in weights("new").values()) > 1000


def test_a_log_that_can_not_be_written(given: list, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "lib.run.record.write_log", OSError(28, "No space left on device"))
    check_saved(call(*given), "--save out", "No space left on device")
    assert results()["perplexity"]


def test_results_that_can_not_be_written(given: list, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "lib.report.results.write_text", OSError(28, "No space left on device"))
    check_saved(call(*given), "--save out", "No space left on device")


def test_a_task_that_fails(given: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.quality.tasks.check_tasks", lambda *_: None)
    failing(
        monkeypatch, "lib.quality.tasks.run_tasks", ConnectionError("data set can't be downloaded")
    )
    done = call(*given, "--tasks", "arc_easy")
    check_saved(done, "--tasks arc_easy", "data set can't be downloaded")
    assert "Traceback" not in done.err
    assert results()["perplexity"]


def test_a_picture_that_fails(given: list, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "lib.report.plots.recovery.recovery_curve", ValueError("no font"))
    check_saved(call(*given, "--recover", "64"), "recovery.png", "no font")
    assert results()["recovery"]


def test_a_summary_that_fails(given: list, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "lib.run.record.print_summary", ValueError("a defect"))
    check_saved(call(*given), "a defect")
    assert results()["perplexity"]


def test_a_card_that_fails(given: list, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "lib.run.card.model_card", KeyError("a defect"))
    check_saved(call(*given), "card", "a defect")
    assert results()["perplexity"]


@pytest.mark.parametrize("step", ["evaluate", "pack"])
def test_an_evaluation_that_fails(given: list, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    failing(monkeypatch, f"main.{step}", RuntimeError("out of registers"))
    done = call(*given, *(["--replace_sparse_layers"] if step == "pack" else []))
    check_saved(done, "out of registers")
    assert not Path("out/results.json").exists()


def test_a_defect_keeps_its_traceback(given: list, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "main.evaluate", RuntimeError("a defect"))
    assert "Traceback" in call(*given).err


def test_a_model_that_can_not_be_saved_keeps_its_blocks_and_figures(
    given: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "lib.model.pretrained.save_model", OSError(28, "No space left on device"))
    done = call(*given, "--resume", "blocks")
    assert done.status == 1 and len(done.complaints) == 1
    assert "--save_model new: can't be saved" in done.complaints[0]
    assert "saved in" not in done.complaints[0]
    assert results()["perplexity"] and Path("blocks/job.json").is_file()


def test_a_step_that_fails_keeps_the_blocks_where_no_model_is_saved(
    given: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "lib.run.record.write_log", OSError(28, "No space left on device"))
    saves = given.index("--save_model")
    done = call(*given[:saves], *given[saves + 2 :], "--resume", "blocks")
    assert done.status == 1 and "saved in" not in done.complaints[-1]
    assert Path("blocks/job.json").is_file()


@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_has_gone(given: list, both: bool, tmp_path: Path) -> None:
    process = start([str(ROOT / "main.py"), *map(str, given)], tmp_path)
    process.stdout.readline()
    process.stdout.close()
    if both:
        process.stderr.close()
    process.wait(timeout=240)
    assert weights("new") and results()["perplexity"]
    assert process.returncode == 0


@pytest.mark.parametrize("letters", ["ascii", "ascii:strict"])
def test_a_terminal_without_the_letters(given: list, letters: str, tmp_path: Path) -> None:
    argv = [str(ROOT / "main.py"), *map(str, given)]
    process = start(argv, tmp_path, PYTHONIOENCODING=letters)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "perplexity \\u0443\\u043a\\u0440: " in out
    assert weights("new") and list(results()["perplexity"]) == ["укр"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_output_to_a_full_disk(given: list, tmp_path: Path) -> None:
    code = (
        "import os, sys; full = os.open('/dev/full', os.O_WRONLY); os.dup2(full, 1); "
        "import main; from lib.util import command; sys.exit(command.run(main.main))"
    )
    process = start(["-c", code, *map(str, given)], tmp_path)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert json.loads(Path("new/config.json").read_text()) and results()["perplexity"]


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
