"""What --resume refuses and what it does again; tests/test_matrix.py compares bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import processes
import pytest
import tiny
from support import (
    QUICK,
    at,
    call,
    content,
    counted,
    mistake,
    program_of,
    results,
    succeed,
    weights,
)
from torch import equal

pytestmark = pytest.mark.usefixtures("at_place")
GIVEN = ["--model", "model", "--prune_method", "sparsegpt", "--calibration_data", "uk", *QUICK]
BLOCKS, SOLVED = 4, 4  # q, k and v share an input, gate and up another


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model", tiny.tiny_llama(num_hidden_layers=BLOCKS))
    tiny.write_texts(folder / "uk", test=3)
    tiny.write_texts(folder / "en", train=tiny.sentences(20, seed=9), test=3)
    return folder


@pytest.fixture
def argv(tmp_path: Path) -> list:
    saved = ["--save_model", tmp_path / "model", "--save", tmp_path / "out"]
    return [*GIVEN, *saved, "--resume", tmp_path / "kept"]


@pytest.fixture(scope="module")
def killed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run has kept that was killed after two blocks."""
    folder = tmp_path_factory.mktemp("killed") / "kept"
    argv = [*GIVEN, "--save_model", folder / "model", "--resume", folder]
    assert processes.run(argv, place, "prune 2:SIGKILL").status < 0
    return folder


@pytest.fixture
def begun(argv: list, killed: Path, tmp_path: Path) -> list:
    """Flags of that run."""
    shutil.copytree(killed, tmp_path / "kept")
    return argv


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("whole")
    argv = [*GIVEN, "--save", folder / "out", "--save_model", folder / "model"]
    assert processes.run(argv, place).status == 0
    return weights(folder / "model")


def check_same(folder: Path, whole: dict) -> None:
    resumed = weights(folder / "model")
    assert all(equal(resumed[name], tensor) for name, tensor in whole.items())


def refused(folder: Path, argv: list, *more: object) -> str:
    """In one line about the folder, which stays as it is; the problem."""
    kept = content(folder / "kept")
    error = mistake(*argv, *more)
    left = content(folder / "kept")
    assert {**left, ".lock": ""} == {**kept, ".lock": ""}  # which a killed run leaves
    assert error.what == f"--resume {folder / 'kept'}"
    return error.problem


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("--sparsity_type 2:4", "--sparsity_type"),
        ("--seed 1", "--seed 0, not 1"),
        ("--calibration_data en", "windows of --calibration_data"),
        ("--nsamples 5", "--nsamples"),
        ("--dtype bfloat16", "--dtype"),
    ],
)
def test_changed_flags_are_refused(change: str, word: str, begun: list, tmp_path: Path) -> None:
    assert word in refused(tmp_path, begun, *change.split())


def test_another_source_of_the_method_is_refused(
    begun: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks by two algorithms do not become one model."""
    monkeypatch.setattr("lib.methods.sparsegpt.SparseGPT.revision", 99)
    assert "--prune_method" in refused(tmp_path, begun)


def test_a_folder_of_an_earlier_version_is_refused(begun: list, tmp_path: Path) -> None:
    file = tmp_path / "kept/job.json"
    job = json.loads(file.read_text("utf-8"))
    del job["version of langprune"]
    file.write_text(json.dumps(job))
    assert "before 0.4" in refused(tmp_path, begun)


def test_one_changed_byte_of_the_weights_is_refused(begun: list, tmp_path: Path) -> None:
    copied = shutil.copytree("model", tmp_path / "elsewhere")
    file = copied / "model.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-4097] + bytes([before[-4097] ^ 1]) + before[-4096:])
    assert "weights of --model" in refused(tmp_path, begun, "--model", copied)


def test_finished_blocks_are_not_pruned_again_wherever_the_model_lies(
    begun: list, whole: dict, tmp_path: Path
) -> None:
    copied = shutil.copytree("model", tmp_path / "elsewhere")  # on another disk, for instance
    with counted("solve") as solved:
        succeed(*begun, "--model", copied, "--offload_folder", tmp_path / "away")
    check_same(tmp_path, whole)
    assert not (tmp_path / "kept").exists() and not (tmp_path / "away").exists()
    assert len(solved) == 2 * SOLVED


@pytest.mark.parametrize(
    "damage", ["cut", pytest.param("empty", marks=pytest.mark.full), "of another run"]
)
def test_a_damaged_block_is_done_again(
    damage: str, begun: list, whole: dict, tmp_path: Path, place: Path
) -> None:
    file = tmp_path / "kept" / "block-00001.safetensors"
    data = file.read_bytes()
    if damage == "of another run":
        other = [*begun[:-1], tmp_path / "other", "--seed", "1"]
        other[other.index("--save_model") + 1] = tmp_path / "other-model"
        assert processes.run(other, place, "prune 2:SIGKILL").status < 0
        shutil.copy(tmp_path / "other" / file.name, file)
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    with counted("solve") as solved:
        done = succeed(*begun)
    assert file.name in done.out and len(solved) == 3 * SOLVED
    check_same(tmp_path, whole)


def test_another_batch_size_goes_on_and_is_said(begun: list, tmp_path: Path) -> None:
    """It may be what memory allows; sums of other batches are rounded otherwise."""
    done = succeed(*begun, "--batch_size", "1")
    assert "--batch_size 32, continued with 1" in done.out
    measuring = results(tmp_path / "out")["fingerprint"]["measuring"]
    assert measuring["--batch_size"] == 1  # which a sweep tells from other runs


def test_only_a_runs_own_files_are_removed(begun: list, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    mine = ("thesis.partial", "block-of-text.partial", "block-notes.safetensors")
    for name in mine:
        (kept / name).write_text("mine")
    for name in ("block-00001.partial", ".job.json.partial"):  # cut off while it was written
        (kept / name).write_text("half")
    (kept / "folder.partial").mkdir()
    (kept / "block-00009.partial").mkdir()
    succeed(*begun, "--seed", "0")
    left = {path.name for path in kept.iterdir()}
    assert left == {*mine, "folder.partial", "block-00009.partial"}


def test_folders_that_are_not_a_runs(argv: list, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / ".job.json.partial").write_text("{")  # of a run that was killed at its first step
    (kept / "letter.txt").write_text("dear")
    assert "letter.txt" in refused(tmp_path, argv)
    (kept / "letter.txt").rename(kept / "job.json")
    assert "job.json" in refused(tmp_path, argv)


def test_only_one_run_at_a_time(argv: list, tmp_path: Path) -> None:
    second = []
    with at("prune", 1, lambda: second.append(call(*argv))):
        succeed(*argv)
    [one] = second
    assert one.status == 1 and f"--resume {tmp_path / 'kept'}: " in one.complaints[0]


@pytest.mark.full
def test_what_the_dense_models_states_depend_on(tmp_path: Path) -> None:
    """A sweep that goes on in another way must not compare with what it computed before."""
    kept = 0
    for more, new in (
        ([], 1),
        (["--seed", 1], 0),
        (["--sparsity_ratio", "0.7"], 0),
        (["--load_bit", 8], 1),
        (["--dtype", "bfloat16"], 1),
        (["--eval_data", "en"], 1),
    ):
        where = ["--save", tmp_path / str(kept), *more]
        (tmp_path / str(kept)).mkdir(exist_ok=True)
        succeed(tmp_path / "shared", "--", *GIVEN, *where, program=program_of("sweep.run"))
        kept += new
        assert len(list((tmp_path / "shared").glob("dense-*"))) == kept, more
