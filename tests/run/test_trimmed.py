"""A model whose vocabulary `trim` has made smaller: pruned, saved, measured on the whole one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from support import QUICK, call, mistake, raising, results, succeed, trimmed

from lib.run.trimmed import LIST
from lib.util.resume import JOB

pytestmark = pytest.mark.usefixtures("at_place")
WANDA = ["--calibration_data", "uk", "--prune_method", "wanda", "--sparsity_type", "2:4"]
RECOVER = ["--calibration_data", "uk", "--recover", 8 * 256, "--recover_lr", "0.01"]
EVALUATE = ["--eval_only", "--eval_data", "uk"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model", tiny.tiny_llama(vocab_size=tiny.ROWS).bfloat16())
    tiny.write_model(folder / "other", tiny.tiny_llama(vocab_size=tiny.ROWS, intermediate_size=48))
    tiny.write_texts(folder / "uk", train=40, test=8)
    small = trimmed(folder / "model", folder / "small", folder / "uk")
    listed = json.loads((small / LIST).read_text("utf-8"))
    assert len(listed["ids"]) < len(listed["rows"]) < tiny.ROWS  # some rows have no token
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        succeed("--model", "small", *QUICK, *WANDA, "--save_model", "pruned", "--save", "out")
    return folder


def losses(folder: Path, *argv: object) -> list[float]:
    """Held-out losses of the pruned model in training."""
    succeed("--model", "pruned", *QUICK, *RECOVER, *argv, "--save", folder)
    return [each["loss"] for each in results(folder)["recovery"]["curve"]]


def test_what_is_made_of_it_says_so(place: Path) -> None:
    assert Path("pruned", LIST).read_bytes() == Path("small", LIST).read_bytes()
    listed, found = json.loads(Path("small", LIST).read_text("utf-8")), results("out")["vocabulary"]
    assert found["rows"] == len(listed["rows"]) and found["rows_before"] == tiny.ROWS
    assert found["digest"] == listed["record"]["digest"] and found["model"] == "model"
    card = Path("pruned/README.md").read_text("utf-8")
    assert f"{len(listed['rows'])} of {tiny.ROWS} rows of the vocabulary of model." in card
    assert "its vocabulary trimmed" in card and "trimmed" in card.partition("\n---\n")[0]


def test_the_whole_original_teaches_as_its_trimmed_form(tmp_path: Path) -> None:
    whole, same = (losses(tmp_path / "out", "--teacher", name) for name in ("model", "small"))
    assert whole == same
    succeed("--model", "small", *QUICK, *EVALUATE, "--teacher", "model", "--save", tmp_path / "out")
    (test,) = results(tmp_path / "out")["evaluation"]
    assert test["kl"] == 0 and test["dense"]["bits_per_byte"] == test["bits_per_byte"]


def test_another_models_teacher_is_refused(tmp_path: Path) -> None:
    """Also without the list, and with that of another vocabulary."""
    argv = ["--model", "pruned", *QUICK, *RECOVER, "--save", tmp_path / "out", "--teacher"]
    assert "mlp" in str(mistake(*argv, "other"))
    without = shutil.copytree("pruned", tmp_path / "pruned")
    argv[1] = without
    listed = json.loads((without / LIST).read_text("utf-8"))
    listed["ids"][3:5] = listed["ids"][4:2:-1]
    (without / LIST).write_text(json.dumps(listed), "utf-8")
    assert "its vocabulary differs" in str(mistake(*argv, "model"))
    (without / LIST).unlink()
    assert f"which has no {LIST} of trim" in str(mistake(*argv, "model"))
    (without / LIST).write_text("[", "utf-8")
    assert f"{LIST} cannot be loaded" in str(mistake(*argv, "model"))


def test_a_run_that_was_begun_by_trimming_is_not_continued(tmp_path: Path) -> None:
    """One that could have trimmed and did not is."""
    argv = ["--model", "small", *QUICK, *WANDA, "--resume", tmp_path / "kept"]
    argv += ["--save", tmp_path / "out"]
    with raising(MemoryError("none left"), "prune", 1):
        assert call(*argv).status == 1
    job = tmp_path / "kept" / JOB
    begun = json.loads(job.read_text("utf-8"))

    def with_flag(value: bool) -> None:
        job.write_text(json.dumps(begun | {"--trim_vocabulary": value}), "utf-8")

    with_flag(True)
    line = str(mistake(*argv))
    assert "was begun with --trim_vocabulary. Run " in line and "trim MODEL SMALL --data" in line
    with_flag(False)
    assert "finished before: 1 of" in succeed(*argv).out
