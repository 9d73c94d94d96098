"""What --resume refuses and what it does again; tests/test_equivalence.py compares bytes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import tiny
import torch
from safetensors.torch import load_file
from support import QUICK, call, content, results, succeed, weights

from lib.distributed.context import DistContext
from lib.methods.sparsegpt import SparseGPT
from lib.model.run_folder import PRUNED, RunFolder, of_block
from lib.run import fingerprint
from lib.run.check import check
from lib.run.flags import build_parser

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
    return load_file(folder / "model" / "model.safetensors")


def check_same(folder: Path, whole: dict) -> None:
    resumed = weights(folder / "model")
    assert all((resumed[name] == tensor).all() for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("--sparsity_type 2:4", "--sparsity_type"),
        ("--seed 1", "--seed 0, not 1"),
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
    assert f"--resume {tmp_path / 'kept'}: it was begun with " in done.complaints[0]
    assert word in done.complaints[0]
    assert content(tmp_path / "kept") == kept


def test_another_source_of_the_method_is_refused(
    begun: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks by two algorithms do not become one model."""
    monkeypatch.setattr(SparseGPT, "revision", SparseGPT.revision + 1)
    done = call(*begun)
    assert done.status == 1 and len(done.complaints) == 1
    assert "was begun with revision of --prune_method 1, not 2. " in done.complaints[0]


def test_a_folder_of_an_earlier_version_is_refused(begun: list, tmp_path: Path) -> None:
    file = tmp_path / "kept/job.json"
    job = json.loads(file.read_text())
    version = job.pop("version of langprune")
    file.write_text(json.dumps(job | {"source of --prune_method": "revision 1, source 0"}))
    [line] = call(*begun).complaints
    assert f"begun with version of langprune 'before 0.4', not '{version}'. " in line


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
    succeed(*begun, "--model", copied, "--offload_folder", tmp_path / "away")
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
        assert processes.run(other, place, "prune 2:SIGKILL").status < 0
        shutil.copy(tmp_path / "other" / file.name, file)
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    done = succeed(*begun)
    assert file.name in done.out and "is made again" in done.out
    check_same(tmp_path, whole)


def test_another_batch_size_goes_on_and_is_said(begun: list, tmp_path: Path) -> None:
    """It may be what memory allows; sums of other batches are rounded otherwise."""
    done = succeed(*begun, "--batch_size", "1")
    assert "begun with --batch_size 32, continued with 1; " in done.out
    measuring = results(tmp_path / "out")["fingerprint"]["measuring"]
    assert measuring["--batch_size"] == 1  # which a sweep tells from other runs


def test_only_a_runs_own_files_are_removed(tmp_path: Path) -> None:
    folder = RunFolder("--resume", tmp_path / "kept")
    folder.begin({})
    folder.write(of_block(PRUNED, 0), {"weight": torch.zeros(2)}, {})
    mine = ("thesis.partial", "block-of-text.partial", "block-notes.safetensors")
    for name in mine:
        (tmp_path / "kept" / name).write_text("mine")
    for name in ("block-00001.partial", ".job.json.partial"):  # cut off while it was written
        (tmp_path / "kept" / name).write_text("half")
    (tmp_path / "kept" / "folder.partial").mkdir()
    (tmp_path / "kept" / "block-00002.partial").mkdir()
    folder.clear()
    left = {path.name for path in (tmp_path / "kept").iterdir()}
    assert left == {*mine, "folder.partial", "block-00002.partial"}


def test_weights_are_read_by_one_rank_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    args = build_parser().parse_args([str(each) for each in [*GIVEN, "--save", "out"]])
    job = check(args)
    read, own = [], fingerprint._file_digest
    monkeypatch.setattr(fingerprint, "_file_digest", lambda file: read.append(file) or own(file))
    first = fingerprint.fingerprint(job, True)
    assert [file.name for file in read].count("model.safetensors") == 1
    second = DistContext(torch.device("cpu"), alone=True)
    second.rank = second.local_rank = 1
    digests = {"weights of --model": first["pruning"]["weights of --model"]}
    monkeypatch.setattr(second, "all_gather_object", lambda value: [digests, value])
    assert fingerprint.fingerprint(replace(job, dist=second), True) == first
    assert [file.name for file in read].count("model.safetensors") == 1


def test_what_the_dense_models_states_depend_on() -> None:
    """A sweep that goes on in another way must not compare with what it computed before."""
    args = build_parser().parse_args([str(each) for each in [*GIVEN, "--save", "out"]])
    job = check(args)
    keys = {job.dense_key}
    for name in ("--load_bit", "config of --model", "version of torch", "version of transformers"):
        assert name in job.fingerprint["pruning"]
        changed = job.fingerprint["pruning"] | {name: "other"}
        keys.add(replace(job, fingerprint=job.fingerprint | {"pruning": changed}).dense_key)
    assert len(keys) == 5
    other = job.fingerprint["pruning"] | {"--prune_method": "wanda", "--sparsity_ratio": 0.7}
    assert replace(job, fingerprint=job.fingerprint | {"pruning": other}).dense_key in keys


def test_folders_that_are_not_a_runs(argv: list, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "letter.txt").write_text("dear")
    [line] = call(*argv).complaints
    assert f"--resume {kept}: it holds letter.txt" in line
    (kept / "letter.txt").rename(kept / "job.json")
    [line] = call(*argv).complaints
    assert "job.json cannot be read" in line and (kept / "job.json").read_text() == "dear"


def test_only_one_run_at_a_time(argv: list, tmp_path: Path) -> None:
    folder = RunFolder("--resume", tmp_path / "kept")
    try:
        [line] = call(*argv).complaints
    finally:
        folder.close()
    assert f"--resume {tmp_path / 'kept'}: another run uses it" in line
