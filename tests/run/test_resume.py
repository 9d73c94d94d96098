"""What --resume refuses and what it does again; tests/test_equivalence.py compares bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import processes
import pytest
import tiny
from safetensors.torch import load_file
from support import QUICK, call, content, succeed, weights

from lib.methods.sparsegpt import SparseGPT
from lib.model.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("at_place")

GIVEN = ["--model", "model", "--prune_method", "sparsegpt", "--calibration_data", "uk", *QUICK]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model", tiny.tiny_llama(num_hidden_layers=4))
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
    assert processes.run(argv, place, "pruning 2:SIGKILL").status < 0
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
    return load_file(folder / "model" / "model.safetensors")


def check_same(folder: Path, whole: dict) -> None:
    resumed = weights(folder / "model")
    assert all((resumed[name] == tensor).all() for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("--sparsity_type 2:4", "--sparsity_type"),
        ("--seed 1", "--seed 0, now it is 1"),
        ("--calibration_data en", "windows of --calibration_data"),
        ("--nsamples 5", "--nsamples"),
        ("--dtype bfloat16", "--dtype 'float32, saved as float32'"),
    ],
)
def test_changed_flags_are_refused(change: str, word: str, begun: list, tmp_path: Path) -> None:
    kept = content(tmp_path / "kept")
    kept.pop(".lock")  # of the run that was killed
    done = call(*begun, *change.split())
    assert done.status == 1 and len(done.complaints) == 1
    assert f"--resume {tmp_path / 'kept'}: was begun with " in done.complaints[0]
    assert word in done.complaints[0]
    assert content(tmp_path / "kept") == kept


def test_another_source_of_the_method_is_refused(
    begun: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks by two algorithms do not become one model."""
    monkeypatch.setattr(SparseGPT, "revision", SparseGPT.revision + 1)
    done = call(*begun)
    assert done.status == 1 and len(done.complaints) == 1
    assert "was begun with source of --prune_method 'revision 1, source " in done.complaints[0]
    assert "now it is 'revision 2, source " in done.complaints[0]


def test_one_changed_byte_of_the_weights_is_refused(begun: list, tmp_path: Path) -> None:
    copied = shutil.copytree("model", tmp_path / "elsewhere")
    file = copied / "model.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-4097] + bytes([before[-4097] ^ 1]) + before[-4096:])
    done = call(*begun, "--model", copied)
    assert done.status == 1 and "was begun with weights of --model" in done.complaints[0]


def test_finished_blocks_are_not_pruned_again_wherever_the_model_lies(
    begun: list, whole: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved, own = [], SparseGPT.prune_
    monkeypatch.setattr(
        SparseGPT, "prune_", lambda self, *args, **kw: solved.append(1) or own(self, *args, **kw)
    )
    copied = shutil.copytree("model", tmp_path / "elsewhere")  # on another disk, for instance
    succeed(*begun, "--model", copied, "--offload", tmp_path / "away")
    check_same(tmp_path, whole)
    assert not (tmp_path / "kept").exists() and not (tmp_path / "away").exists()
    assert len(solved) == 2 * 4  # of two blocks: q, k and v share an input, gate and up another


@pytest.mark.parametrize("damage", ["cut", "empty", "of another run"])
def test_a_damaged_block_is_done_again(
    damage: str, begun: list, whole: dict, tmp_path: Path, place: Path
) -> None:
    file = tmp_path / "kept" / "block-00001.safetensors"
    data = file.read_bytes()
    if damage == "of another run":
        other = [*begun[:-1], tmp_path / "other", "--seed", "1"]
        other[other.index("--save_model") + 1] = tmp_path / "other-model"
        assert processes.run(other, place, "pruning 2:SIGKILL").status < 0
        shutil.copy(tmp_path / "other" / file.name, file)
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    done = succeed(*begun)
    assert f"{file.name} is " in done.out and "it is made again" in done.out
    check_same(tmp_path, whole)


def test_folders_that_are_not_a_runs(argv: list, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "letter.txt").write_text("dear")
    [line] = call(*argv).complaints
    assert f"--resume {kept}: holds letter.txt" in line
    (kept / "letter.txt").rename(kept / "job.json")
    [line] = call(*argv).complaints
    assert "job.json can't be read" in line and (kept / "job.json").read_text() == "dear"


def test_only_one_run_at_a_time(argv: list, tmp_path: Path) -> None:
    folder = RunFolder("--resume", tmp_path / "kept")
    try:
        [line] = call(*argv).complaints
    finally:
        folder.close()
    assert f"--resume {tmp_path / 'kept'}: another run uses it" in line
