"""A model is saved before it is measured, into a new folder; what fails loses nothing."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import tiny
from support import QUICK, Done, at, call, content, full_disk, raising, reloaded, results, succeed
from support import weights as saved_weights
from torch import Tensor

from lib.methods.sparsegpt import SparseGPT
from lib.packed.linear import SparseLinear
from lib.run import load
from lib.run.flags import build_parser
from lib.util.files import check_new_folder

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def given(tmp_path: Path) -> list[object]:
    model = tiny.write_model(tmp_path / "model", tiny.tiny_llama(num_hidden_layers=3))
    texts = tiny.write_texts(tmp_path / "укр")
    pruned = ["--prune_method", "sparsegpt", "--calibration_data", texts, "--save_model", "new"]
    return ["--model", model, *pruned, *QUICK, "--save", "out"]


def check_saved(done: Done, *words: str) -> None:
    """The run failed in one line that holds the words, and the pruned model is there, alone."""
    assert done.status == 1, done
    lines = [line for line in done.complaints if line.startswith("error: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.err
    assert "saved: new" in done.out and "# model, pruned by" in Path("new/README.md").read_text()
    assert sum(int((weight == 0).sum()) for weight in saved_weights("new").values()) > 1000
    assert not Path("new.partial").exists()


@pytest.mark.parametrize(
    "content", ["it is a file", "it holds thesis.tex", "a disk is mounted", "it is a link. Name "]
)
def test_a_target_that_is_not_new_is_refused_at_once(
    content: str, given: list, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content == "it is a file":
        Path("new").write_text("thesis")
    elif content == "it holds thesis.tex":
        write_thesis("new")
    elif content.startswith("it is a link"):  # the folder beside it would be on a small disk
        Path("disk").mkdir()
        Path("new").symlink_to("disk")
    else:  # as in a container: nothing can be renamed to it
        Path("new").mkdir()
        monkeypatch.setattr(Path, "is_mount", lambda path: path == Path("new"))
    [line] = call(*given).complaints
    assert line.startswith(f"error: --save_model new: {content}")


def test_an_empty_folder_is_a_target(given: list) -> None:
    Path("new").mkdir()
    before = Path("new").stat().st_mtime_ns
    check_new_folder("--save_model", "new")  # another rank may look into it at this moment
    assert Path("new").stat().st_mtime_ns == before
    succeed(*given[: given.index("--save")])
    assert saved_weights("new") and results("out/model-sparsegpt-unstructured-0.5")["perplexity"]


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--eval_only", "dense"),
        ("--recover 99", "recovered"),
        ("--quantize q4_0 --recover 99", "q4_0"),
        ("--recover 99 --teacher m", "pruned-before"),
        ("--prune_method wanda --sparsity_type 2:4", "wanda-2of4"),
        ("--prune_method wanda --sparsity_ratio 0.7", "wanda-unstructured-0.7"),
    ],
)
def test_results_without_a_name_are_called_as_the_run(flags: str, name: str) -> None:
    parsed = build_parser().parse_args(["--model", "a/m", *flags.split()])
    assert parsed.default_save == f"out/m-{name}"
    assert name.startswith(parsed.name.replace(" ", "-"))


def test_what_comes_to_lie_at_the_target_meanwhile_stays(given: list) -> None:
    with at("prune", 3, lambda: write_thesis("new")):
        done = call(*given)
    [line] = [line for line in done.complaints if line.startswith("error: ")]
    assert "--save_model new: " in line and line.endswith("The complete model is in new.partial.")
    assert list(content("new")) == ["thesis.tex"] and saved_weights("new.partial")


def write_thesis(folder: str) -> None:
    Path(folder).mkdir()
    Path(folder, "thesis.tex").write_text("mine")


@pytest.mark.parametrize("kept", ["kept", "new.partial"])
def test_blocks_in_files_become_shards_once_all_is_written(
    kept: str, given: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("lib.run.save.write_tokenizer_model", fail)
        done = call(*given, "--resume", kept, "--offload_folder", "away")
    assert done.status == 1 and len(list(Path(kept).glob("block-*"))) == 3
    assert Path("new.partial").exists() == (kept == "new.partial")
    assert call(*given, "--resume", kept).status == 0 and not Path(kept).exists()
    assert [name for name in content("new") if "safetensors" in name] == ["model.safetensors"]


@pytest.mark.parametrize("flag", ["--save", "--save_model", "--resume"])
def test_places_that_can_not_be_written(flag: str, given: list, no_weights: None) -> None:
    Path("file").write_text("kept")
    done = call(*given, flag, "file/below")  # no folder can be made there, not even by root
    assert done.status == 1 and f"{flag} file/below: it cannot be written" in done.complaints[0]
    assert Path("file").read_text() == "kept"


def test_what_fails_before_saving_keeps_the_blocks_and_continues(given: list) -> None:
    succeed(*given)
    Path("new").rename("whole")
    with raising(MemoryError("none left"), "prune", 2):
        done = call(*given)
    assert done.status == 1 and "out of memory" in done.complaints[0]
    assert "add --resume new.partial to continue" in done.out and not Path("new").exists()
    assert len(list(Path("new.partial").glob("block-*"))) == 2
    again = call(*given)  # nothing of it is overwritten
    assert again.status == 1 and "--resume new.partial" in again.complaints[0]
    succeed(*given, "--resume", "new.partial")
    assert content("new")["model.safetensors"] == content("whole")["model.safetensors"]
    assert not Path("new.partial").exists() and "job.json" not in content("new")


@pytest.mark.parametrize("words", ["0.5 was requested", "differ"])
def test_a_linear_with_too_few_zeros_and_a_wrong_packed_product_are_not_saved(
    words: str, given: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prune_(self: SparseGPT, weights: list[Tensor], *_: object) -> None:
        for weight in weights:
            weight.add_(1)

    own = SparseLinear.forward
    if words == "differ":
        monkeypatch.setattr(SparseLinear, "forward", lambda self, x: 1.05 * own(self, x))
    else:
        monkeypatch.setattr(SparseGPT, "prune_", prune_)
    done = call(*given, "--replace_sparse_layers")
    assert done.status == 1 and words in done.complaints[0]
    assert not Path("new").exists() and list(Path("new.partial").glob("block-*"))


@pytest.mark.parametrize("step", ["evaluate", "record", "run_tasks"])
def test_what_fails_after_saving_leaves_the_model(
    step: str, given: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_) -> None:
        raise OSError(28, "No space left on device", step)

    monkeypatch.setattr(f"lib.run.steps.{step}", fail)
    monkeypatch.setattr("lib.run.check.check_tasks", lambda *_: None)
    check_saved(call(*given, "--tasks", "arc"), "No space left", step)
    assert Path("out/results.json").exists() == (step == "run_tasks")


@pytest.mark.parametrize("flag", ["--resume", "--offload_folder"])
def test_tasks_leave_no_folder_of_the_run(
    flag: str, given: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the dense model is loaded again for them."""
    found = {"arc": {"acc,none": 0.5}}
    monkeypatch.setattr("lib.run.tasks.run_tasks", lambda *_, **__: found)
    monkeypatch.setattr("lib.run.check.check_tasks", lambda *_: None)
    where = given.index("--save_model")
    succeed(*given[:where], *given[where + 2 :], flag, "kept", "--tasks", "arc")
    assert results()["dense_tasks"] == found and not list(Path().glob("kept*"))


def test_a_disk_too_small_for_the_state_of_a_training(
    given: list, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given += ["--recover", 512]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100_000))
    [line] = call(*given).complaints
    assert "--save_model new.partial: training needs up to" in line and "98 KiB" in line
    assert line.endswith("Make room, or name a folder on another disk.")
    assert not Path("new.partial").exists()


def test_a_full_disk_while_saving_keeps_the_blocks(given: list) -> None:
    with full_disk("prune", 3, size=30_000):
        done = call(*given)
    assert done.status == 1 and len(done.complaints) == 1
    assert not Path("new").exists() and len(list(Path("new.partial").glob("block-*"))) == 3
    assert call(*given, "--resume", "new.partial").status == 0 and saved_weights("new")


@pytest.mark.parametrize("kept", ["kept", "new.partial"])
def test_killed_while_it_saves_it_loses_nothing(kept: str, given: list, tmp_path: Path) -> None:
    succeed(*given)
    Path("new").rename("whole")
    given += ["--resume", kept]
    for moment in ("save tokenizer", "rename"):
        fault = f"{moment} 0:SIGKILL"
        assert processes.run(given, tmp_path, fault).status == -signal.SIGKILL
    [line] = call(*given).complaints
    assert line.endswith(
        "new.partial is the complete model of a run that was killed. Rename it to new."
    )
    stage = content("new.partial")
    assert stage["model.safetensors"] == content("whole")["model.safetensors"]
    assert stage.keys() == content("whole").keys()  # with the card


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_run_that_is_ended_leaves_blocks_and_no_model(
    sent: str, given: list, tmp_path: Path
) -> None:
    done = processes.run(given, tmp_path, f"prune 2:{sent}")
    signals = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -signal.SIGKILL}
    assert done.status == signals[sent] and not Path("new").exists()
    assert len(list(Path("new.partial").glob("block-*"))) == 2


def test_an_interrupt_behind_the_saved_model_says_how_to_measure_it(given: list) -> None:
    with raising(KeyboardInterrupt(), "eval"):
        done = call(*given)
    assert done.status == 130 and saved_weights("new")
    [line] = [line for line in done.out.splitlines() if "not evaluated" in line]
    assert line.startswith(
        "new is complete, but not evaluated. To do that: python main.py --model new"
    )
    argv = shlex.split(line.partition("main.py ")[2])
    succeed(*argv, *QUICK, "--save", "measured")
    assert list(results("measured")["perplexity"]) == ["укр"]


def test_results_of_another_run_are_moved_aside(given: list) -> None:
    succeed(*given)
    first = Path("out/results.json").read_bytes()
    Path("out/log_thesis.txt").write_text("mine")
    Path("out/log_wanda.1.txt").write_text("method\tmoved aside before")
    given[given.index("new")] = "newer"
    done = call(*given, "--seed", 1)
    assert done.status == 0 and "results.1.json" in done.out
    assert Path("out/results.1.json").read_bytes() == first
    assert Path("out/log_sparsegpt.1.txt").exists() and Path("out/log_wanda.1.txt").exists()
    assert "mine" in {file.read_text() for file in Path("out").glob("log_thesis*")}
    assert results()["seed"] == 1
    given[given.index("newer")] = "newest"
    assert call(*given, "--seed", 1).status == 0  # the same run: its results are replaced
    assert not Path("out/results.2.json").exists()


@pytest.mark.parametrize(
    "flags",
    ["--quantize q4_0", "--prune_method admm --allocation error --sparsity_ratio 0.6"],
)
@pytest.mark.parametrize("blocks", ["in a folder of the run", "fetched by itself"])
def test_a_model_whose_blocks_were_fetched_can_be_loaded(
    flags: str, blocks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OUT.partial holds files of every stage; only those of the last one are the model's."""
    model = tiny.write_model(tmp_path / "model", tiny.tiny_llama(num_hidden_layers=3).bfloat16())
    texts = ["--eval_data", tiny.write_texts(tmp_path / "uk", train=60)]
    argv = ["--model", model, *flags.split(), "--calibration_data", "uk", *texts, *QUICK]
    if blocks == "fetched by itself":  # on a card with little memory, or by two ranks
        plan = load.plan_memory
        monkeypatch.setattr(load, "plan_memory", lambda job: (True, plan(job)[1]))
    else:
        argv += ["--resume", "new.partial", "--offload_folder", "away"]
    succeed(*argv, "--save", "out", "--save_model", "new")
    reloaded("new", "out", *texts)
