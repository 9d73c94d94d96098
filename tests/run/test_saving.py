"""A model is saved before it is measured, into a new folder; what fails loses nothing."""

from __future__ import annotations

import shlex
import shutil
import signal
from pathlib import Path

import processes
import pytest
import tiny
from support import (
    QUICK,
    Done,
    at,
    call,
    content,
    full_disk,
    mistake,
    packed_product,
    raising,
    results,
    succeed,
    weights,
)

FULL = OSError(28, "No space left on device")
pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model", tiny.tiny_llama(num_hidden_layers=3))
    tiny.write_texts(folder / "укр")
    return folder


@pytest.fixture
def given(place: Path) -> list[object]:
    pruned = ["--prune_method", "sparsegpt", "--calibration_data", place / "укр"]
    return ["--model", place / "model", *pruned, "--save_model", "new", *QUICK, "--save", "out"]


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    pruned = ["--prune_method", "sparsegpt", "--calibration_data", place / "укр", *QUICK]
    saved = ["--save_model", folder / "model", "--save", folder / "out"]
    succeed("--model", place / "model", *pruned, *saved)
    return folder / "model"


def check_saved(done: Done, *words: str) -> None:
    """The run failed in one line that holds the words, and the pruned model is there, alone."""
    assert done.status == 1, done
    [line] = [line for line in done.complaints if line.startswith("error: ")]
    assert all(word in line for word in words), done.err
    assert "# model, pruned by" in Path("new/README.md").read_text()
    assert sum(int((weight == 0).sum()) for weight in weights("new").values()) > 1000
    assert not Path("new.partial").exists()


def blocks(folder: str) -> int:
    return len(list(Path(folder).glob("block-*")))


@pytest.mark.parametrize("held", ["a file", "a thesis", "a disk", "a link"])
def test_a_target_that_is_not_new_is_refused_at_once(
    held: str, given: list, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if held == "a file":
        Path("new").write_text("thesis")
    elif held == "a thesis":
        write_thesis("new")
    elif held == "a link":  # the folder beside it would be on a small disk
        Path("disk").mkdir()
        Path("new").symlink_to("disk")
    else:  # as in a container: nothing can be renamed to it
        Path("new").mkdir()
        monkeypatch.setattr(Path, "is_mount", lambda path: path == Path("new"))
    before = content(".")
    assert mistake(*given).what == "--save_model new"
    assert content(".") == before


def write_thesis(folder: str) -> None:
    Path(folder).mkdir()
    Path(folder, "thesis.tex").write_text("mine")


@pytest.mark.parametrize("flag", ["--save", "--save_model", "--resume"])
def test_places_that_can_not_be_written(flag: str, given: list, no_weights: None) -> None:
    Path("file").write_text("kept")
    # no folder can be made there, not even by root
    assert mistake(*given, flag, "file/below").what == f"{flag} file/below"
    assert Path("file").read_text() == "kept"


def test_an_empty_folder_is_a_target(given: list) -> None:
    Path("new").mkdir()
    succeed(*given[: given.index("--save")])
    assert weights("new") and results("out/model-sparsegpt-unstructured-0.5")["perplexity"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--eval_only", "dense"),
        ("--recover 99", "recovered"),
        ("--quantize q4_0 --recover 99", "q4_0"),
        ("--prune_method wanda --sparsity_type 2:4", "wanda-2of4"),
        ("--prune_method wanda --sparsity_ratio 0.7", "wanda-unstructured-0.7"),
    ],
)
def test_results_without_a_name_are_called_as_the_run(flags: str, name: str, place: Path) -> None:
    texts = ["--eval_data", place / "укр"]
    texts += [] if "--eval_only" in flags else ["--calibration_data", place / "укр"]
    succeed("--model", place / "model", *QUICK, *flags.split(), *texts)
    assert [path.name for path in Path("out").iterdir()] == [f"model-{name}"]


def test_what_comes_to_lie_at_the_target_meanwhile_stays(given: list) -> None:
    with at("prune", 3, lambda: write_thesis("new")):
        error = mistake(*given)
    assert error.what == "--save_model new" and "new.partial" in error.fix
    assert list(content("new")) == ["thesis.tex"] and weights("new.partial")


@pytest.mark.parametrize("kept", ["kept", pytest.param("new.partial", marks=pytest.mark.full)])
def test_blocks_in_files_become_shards_once_all_is_written(
    kept: str, given: list, whole: Path
) -> None:
    with raising(FULL, "save tokenizer"):
        done = call(*given, "--resume", kept, "--offload_folder", "away")
    assert done.status == 1 and blocks(kept) == 3
    assert Path("new.partial").exists() == (kept == "new.partial")
    succeed(*given, "--resume", kept)
    assert not Path(kept).exists() and not Path("away").exists()
    assert content("new")["model.safetensors"] == content(whole)["model.safetensors"]
    assert [name for name in content("new") if "safetensors" in name] == ["model.safetensors"]


def test_what_fails_before_saving_keeps_the_blocks_and_continues(given: list, whole: Path) -> None:
    with raising(MemoryError("none left"), "prune", 2):
        done = call(*given)
    assert done.status == 1 and len(done.complaints) == 1
    assert "--resume new.partial" in done.out and not Path("new").exists()
    assert blocks("new.partial") == 2
    assert "--resume new.partial" in str(mistake(*given))  # nothing of it is overwritten
    succeed(*given, "--resume", "new.partial")
    assert content("new")["model.safetensors"] == content(whole)["model.safetensors"]
    assert not Path("new.partial").exists() and "job.json" not in content("new")


IDLE = """
from lib.methods.base import PruningMethod


class Idle(PruningMethod):
    def prune_(self, weights, sparsities):
        pass
"""


@pytest.mark.parametrize("what", ["zeros", "product"])
def test_a_linear_with_too_few_zeros_and_a_wrong_packed_product_are_not_saved(
    what: str, given: list
) -> None:
    Path("own.py").write_text(IDLE)
    own = ["--prune_method", "own.py:Idle"] if what == "zeros" else []
    with packed_product(factor=1.05):
        error = mistake(*given, *own, "--replace_sparse_layers")
    assert ("0.5 was requested" in str(error)) == (what == "zeros")
    assert not Path("new").exists() and blocks("new.partial")


@pytest.mark.parametrize("what", ["measuring", "recording"])
def test_what_fails_after_saving_leaves_the_model(what: str, given: list) -> None:
    with raising(FULL, "eval") if what == "measuring" else full_disk("eval", size=100):
        done = call(*given)
    check_saved(done, "No space left" if what == "measuring" else "out/")
    assert not Path("out/results.json").exists()


@pytest.mark.full
@pytest.mark.parametrize("flag", ["--resume", "--offload_folder"])
def test_tasks_leave_no_folder_of_the_run(
    flag: str, given: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the dense model is loaded again for them."""
    found = {"arc": {"acc,none": 0.5}}
    monkeypatch.setattr("lib.run.lm_eval.run_tasks", lambda *_, **__: found)
    monkeypatch.setattr("lib.run.check.check_tasks", lambda *_: None)
    where = given.index("--save_model")
    succeed(*given[:where], *given[where + 2 :], flag, "kept", "--tasks", "arc")
    assert results()["dense_tasks"] == found and not list(Path().glob("kept*"))


def test_a_disk_too_small_for_the_state_of_a_training(
    given: list, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = shutil.disk_usage(".")._replace(free=300_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: small)
    error = mistake(*given, "--recover", 512)
    assert error.what == "--save_model new.partial" and "293 KiB" in str(error)
    assert not Path("new.partial").exists()


def test_a_disk_too_small_for_the_model(
    given: list, whole: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(each.numel() * each.itemsize for each in weights(whole).values())
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=free))
    free = size - 1
    error = mistake(*given)
    assert error.what == "--save_model new" and not Path("new.partial").exists()
    for free, more in (  # noqa: B007 -- read by the lambda above
        (size, []),
        (size // 2, ["--load_bit", "8"]),
    ):
        with pytest.raises(pytest.fail.Exception, match="weights were read"):
            call(*given, *more)


def test_a_full_disk_while_saving_keeps_the_blocks(given: list) -> None:
    with full_disk("prune", 3, size=30_000):
        done = call(*given)
    assert done.status == 1 and len(done.complaints) == 1
    assert not Path("new").exists() and blocks("new.partial") == 3
    succeed(*given, "--resume", "new.partial")
    assert weights("new")


@pytest.mark.parametrize("kept", [pytest.param("kept", marks=pytest.mark.full), "new.partial"])
def test_killed_while_it_saves_it_loses_nothing(
    kept: str, given: list, whole: Path, tmp_path: Path
) -> None:
    given += ["--resume", kept]
    for moment in ("save tokenizer", "rename"):
        done = processes.run(given, tmp_path, f"{moment} 0:SIGKILL")
        assert done.status == -signal.SIGKILL
    assert "complete" in str(mistake(*given))
    left = content("new.partial")
    assert left["model.safetensors"] == content(whole)["model.safetensors"]
    assert left.keys() == content(whole).keys()  # with the card


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_run_that_is_ended_leaves_blocks_and_no_model(
    sent: str, given: list, tmp_path: Path
) -> None:
    done = processes.run(given, tmp_path, f"prune 2:{sent}")
    signals = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -signal.SIGKILL}
    assert done.status == signals[sent] and not Path("new").exists()
    assert blocks("new.partial") == 2


def test_an_interrupt_behind_the_saved_model_says_how_to_measure_it(given: list) -> None:
    with raising(KeyboardInterrupt(), "eval"):
        done = call(*given)
    assert done.status == 130 and weights("new")
    [line] = [line for line in done.out.splitlines() if "main.py --model new" in line]
    argv = shlex.split(line.partition("main.py ")[2])
    succeed(*argv, *QUICK, "--save", "measured")
    assert list(results("measured")["perplexity"]) == ["укр"]


def test_results_of_another_run_are_moved_aside(given: list) -> None:
    succeed(*given)
    first = Path("out/results.json").read_bytes()
    Path("out/log_thesis.txt").write_text("mine")
    Path("out/log_wanda.1.txt").write_text("method\tmoved aside before")
    given[given.index("new")] = "newer"
    succeed(*given, "--seed", 1)
    assert Path("out/results.1.json").read_bytes() == first
    assert Path("out/log_sparsegpt.1.txt").exists() and Path("out/log_wanda.1.txt").exists()
    assert "mine" in {file.read_text() for file in Path("out").glob("log_thesis*")}
    assert results()["seed"] == 1
    given[given.index("newer")] = "newest"
    succeed(*given, "--seed", 1)  # the same run: its results are replaced
    assert not Path("out/results.2.json").exists()
