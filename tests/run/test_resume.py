"""Interrupted runs go on: killed at any block and started again, they end with the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import processes
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from support import QUICK, Done, call, full_disk

from lib.model.work_folder import WorkFolder
from lib.util.errors import UserError

BLOCKS = 4
BASE = ["--model", "model", *QUICK, "--eval_data", "uk", "--save", "out"]
WANDA = ["--prune_method", "wanda", "--calibration_data", "uk"]
SPARSEGPT = ["--prune_method", "sparsegpt", "--calibration_data", "uk"]
CASES = {
    "sparsegpt": [*SPARSEGPT, "--sparsity_type", "2:4"],
    "admm": ["--prune_method", "admm", "--calibration_data", "uk"],
    "no calibration": ["--prune_method", "magnitude"],
    "offloaded": [*WANDA, "--offload", "away"],
    "4 bits": [*SPARSEGPT, "--load_bit", "4"],
    "8 bits": [*WANDA, "--load_bit", "8"],
    "shared weights": [*WANDA, "--model", "tied"],
}
pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model", tiny.tiny_llama(num_hidden_layers=BLOCKS))
    tied = tiny.tiny_llama(num_hidden_layers=BLOCKS, tie_word_embeddings=True)
    tiny.write_model(folder / "tied", tied)
    tiny.write_texts(folder / "uk", test=3)
    return folder


def flags(case: str, folder: Path, *more: object) -> list:
    saved = ["--save_model", folder / "model", "--resume", folder / "kept"]
    return [*BASE, *CASES[case], *saved, *more]


def content(folder: Path) -> dict[str, bytes]:
    """The weights that were saved, by file."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What uninterrupted runs save, without --resume."""
    found = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp("whole")
        argv = [*BASE, *CASES[case], "--save_model", folder / "model"]
        done = processes.run(argv, place)
        assert done.status == 0, done.err
        found[case] = content(folder / "model")
    return found


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "kept").glob("*.safetensors"))


def killed(argv: list, place: Path, block: int) -> None:
    assert processes.run(argv, place, f"{block}:SIGKILL").status == -signal.SIGKILL


def finished(done: Done) -> Done:
    assert done.status == 0, done.err
    return done


@pytest.mark.parametrize("case", CASES)
def test_killed_twice_and_the_same_bytes(
    case: str, whole: dict, place: Path, tmp_path: Path
) -> None:
    argv = flags(case, tmp_path)
    for block in (1, BLOCKS - 1):
        killed(argv, place, block)
        assert len(shards(tmp_path)) == block
        assert not (tmp_path / "model").exists()
    finished(call(*argv))
    assert content(tmp_path / "model") == whole[case]
    assert not (tmp_path / "kept").exists()
    assert not Path("away").exists()


@pytest.mark.parametrize("block", [0, BLOCKS - 1])
def test_killed_at_the_ends(block: int, whole: dict, place: Path, tmp_path: Path) -> None:
    argv = flags("sparsegpt", tmp_path)
    killed(argv, place, block)
    done = finished(call(*argv))
    assert content(tmp_path / "model") == whole["sparsegpt"]
    assert "of the blocks' weights are zero" in done.out


def test_finished_blocks_are_not_pruned_again(
    place: Path, tmp_path: Path, events: list[str]
) -> None:
    argv = flags("sparsegpt", tmp_path)
    killed(argv, place, 3)
    finished(call(*argv))
    solved = [event for event in events if event.startswith("solve ")]
    assert len(solved) == 4 and all("layers.3." in event for event in solved)


@pytest.mark.parametrize("by", ["error", "owl"])
def test_an_allocation_is_not_computed_again(
    by: str, place: Path, tmp_path: Path, events: list[str]
) -> None:
    """On another device it might differ, and then not fit the blocks that were finished."""
    argv = [*BASE, *WANDA, "--sparsity_ratio", "0.6", "--allocation", by]
    finished(call(*argv, "--save_model", tmp_path / "whole"))
    argv += ["--save_model", tmp_path / "model", "--resume", tmp_path / "kept"]
    killed(argv, place, 2)
    assert events.count("step allocate") == 1  # of the whole run; another process was killed
    finished(call(*argv))
    assert events.count("step allocate") == 1
    assert content(tmp_path / "model") == content(tmp_path / "whole")
    assert not (tmp_path / "kept").exists()


def test_another_number_of_processes(whole: dict, place: Path, tmp_path: Path) -> None:
    argv = flags("sparsegpt", tmp_path)
    done = processes.ended(processes.together(3, [argv], place, {0: "2:SIGKILL"}))
    assert done[0].status == -signal.SIGKILL and len(shards(tmp_path)) == 2
    done = processes.ended(processes.together(2, [argv], place, {1: "3:SIGKILL"}))
    assert done[1].status == -signal.SIGKILL and len(shards(tmp_path)) == 3
    finished(call(*argv))
    (saved,) = content(tmp_path / "model").values()
    (tmp_path / "whole").write_bytes(next(iter(whole["sparsegpt"].values())))
    (tmp_path / "resumed").write_bytes(saved)
    before, after = load_file(tmp_path / "whole"), load_file(tmp_path / "resumed")
    differ = sum(int(((before[k] == 0) != (after[k] == 0)).sum()) for k in before)
    assert before.keys() == after.keys()
    # sums by another number of processes differ in their last bits, which seldom moves a zero
    assert differ <= 0.001 * sum(tensor.numel() for tensor in before.values())
    for name, tensor in before.items():
        change = (after[name].float() - tensor.float()).norm()
        assert change <= 0.01 * tensor.float().norm(), name


CHANGES = {
    "--sparsity_ratio": ["--sparsity_type", "unstructured", "--sparsity_ratio", "0.6"],
    "--seed": ["--seed", "1"],
    "--calibration_data": ["--calibration_data", "en"],
    "--nsamples": ["--nsamples", "5"],
    "--model": ["--model", "tied"],
}


@pytest.fixture
def begun(place: Path, tmp_path: Path) -> list:
    """Flags of a run that was killed after its first block."""
    argv = flags("sparsegpt", tmp_path)
    killed(argv, place, 1)
    return argv


def test_changed_flags_are_refused(begun: list, place: Path, tmp_path: Path) -> None:
    tiny.write_texts(place / "en", train=tiny.sentences(20, seed=9), test=3)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    for flag, change in CHANGES.items():
        done = call(*begun, *change)
        assert done.status == 1
        (line,) = done.complaints
        assert line.startswith(f"error: --resume {tmp_path / 'kept'}: was begun with ")
        assert flag in line or flag == "--sparsity_ratio" and "--sparsity_type" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == kept


def test_changed_data_are_refused(begun: list, place: Path) -> None:
    train = place / "uk" / "train.jsonl"
    before = train.read_bytes()
    try:
        train.write_bytes(b"\n".join(reversed(before.splitlines())) + b"\n")
        (line,) = call(*begun).complaints
    finally:
        train.write_bytes(before)
    assert "was begun with windows of --calibration_data" in line


def test_changed_weights_are_refused(begun: list, place: Path) -> None:
    weights = place / "model" / "model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        (line,) = call(*begun).complaints
    finally:
        weights.write_bytes(before)
    assert "was begun with weights of --model" in line


def test_the_way_out_of_too_little_memory_is_open(place: Path, tmp_path: Path) -> None:
    """A smaller batch, as the message of a run out of memory advises."""
    argv = [*BASE, *WANDA, "--save_model", tmp_path / "model", "--resume", tmp_path / "kept"]
    killed(argv, place, 2)
    finished(call(*argv, "--batch_size", 1, "--timeout", 3))
    assert not (tmp_path / "kept").exists()


def test_another_dtype_is_another_result(begun: list) -> None:
    (line,) = call(*begun, "--dtype", "bfloat16").complaints
    assert "--dtype 'float32, saved as float32', now it is 'bfloat16, saved as bfloat16'" in line


def test_places_may_change(begun: list, whole: dict, tmp_path: Path) -> None:
    elsewhere = [
        "--save_model",
        tmp_path / "moved",
        "--save",
        tmp_path / "out",
        "--offload",
        "away",
    ]
    finished(call(*begun, *elsewhere))
    assert content(tmp_path / "moved") == whole["sparsegpt"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "wrong"])
def test_a_damaged_shard_is_done_again(
    damage: str, whole: dict, place: Path, tmp_path: Path
) -> None:
    argv = flags("sparsegpt", tmp_path)
    killed(argv, place, 2)
    file = tmp_path / "kept" / shards(tmp_path)[0]
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-7] ^= 1
    file.write_bytes({"cut": data[: len(data) // 2], "empty": b""}.get(damage, data))
    if damage == "wrong":  # whole, but not what was written
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    done = finished(call(*argv))
    assert f"{file.name} is damaged; its block is computed again" in done.out
    assert content(tmp_path / "model") == whole["sparsegpt"]


def test_a_full_disk_keeps_what_was_finished(whole: dict, place: Path, tmp_path: Path) -> None:
    argv = flags("sparsegpt", tmp_path)
    with full_disk("pruning", 2):
        done = call(*argv)
    assert done.status == 1
    (line,) = done.complaints
    assert line.startswith(f"error: --resume {tmp_path / 'kept'}: block 2 can't be written")
    assert "File too large" in line and "make room" in line
    assert len(shards(tmp_path)) == len(list((tmp_path / "kept").glob("block-*"))) == 2
    assert not (tmp_path / "model").exists()
    finished(call(*argv))
    assert content(tmp_path / "model") == whole["sparsegpt"]


def test_a_folder_with_something_else(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "letter.txt").write_text("dear")
    (line,) = call(*flags("sparsegpt", tmp_path)).complaints
    assert "--resume" in line and "letter.txt" in line
    assert (tmp_path / "kept" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_job_that_can_not_be_read(content: str, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "job.json").write_text(content)
    with pytest.raises(UserError, match="job.json can't be read"):
        WorkFolder("--resume", tmp_path / "kept")


def test_blocks_are_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = WorkFolder("--resume", tmp_path / "kept")
    assert folder.begun is None and not folder.folder.exists()
    folder.begin({"--seed": 0})
    tensors = {"a": torch.randn(3, 4), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}
    folder.write("block-00001", tensors, {"warnings": ["one"]}, "block 1")
    assert folder.read("block-00000", "") is None
    read, facts = folder.read("block-00001", "")
    assert facts == {"warnings": ["one"]}
    for name, tensor in read.items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype
    folder.close()
    again = WorkFolder("--resume", tmp_path / "kept")
    assert again.begun == {"--seed": 0}
    again.clear()
    again.close()
    assert not list(tmp_path.iterdir())


def test_only_one_run_at_a_time(place: Path, tmp_path: Path) -> None:
    """The second is told so before it reads a weight, whatever the first has written by then."""
    folder = WorkFolder("--resume", tmp_path / "kept")
    try:
        done = call(*flags("sparsegpt", tmp_path))
    finally:
        folder.close()
    (line,) = done.complaints
    assert line.startswith(f"error: --resume {tmp_path / 'kept'}: another run uses it")


def test_a_block_of_another_run_is_not_taken(whole: dict, place: Path, tmp_path: Path) -> None:
    """Were it to get into the folder, as by a copy."""
    for seed, name in ((1, "other"), (0, "own")):
        argv = flags("sparsegpt", tmp_path / name, "--seed", seed)
        (tmp_path / name).mkdir()
        killed(argv, place, 2)
    file = shards(tmp_path / "own")[1]
    (tmp_path / "own" / "kept" / file).write_bytes(
        (tmp_path / "other" / "kept" / file).read_bytes()
    )
    done = finished(call(*argv))
    assert f"{file} is of a run with other flags; its block is computed again" in done.out
    assert content(tmp_path / "own" / "model") == whole["sparsegpt"]


def test_what_there_was_to_report_of_a_block_is_reported_by_the_run_that_resumes(
    place: Path, tmp_path: Path
) -> None:
    """Here: experts that too few tokens reached."""
    tiny.write_model(place / "mixtral", tiny.ARCHITECTURES["Mixtral"]())
    common = [*BASE, *SPARSEGPT, "--model", "mixtral", "--nsamples", "1"]
    whole = finished(call(*common, "--save_model", tmp_path / "whole/model"))
    argv = [*common, "--resume", tmp_path / "kept", "--save_model", tmp_path / "resumed/model"]
    killed(argv, place, 1)
    again = finished(call(*argv))
    cards = [tmp_path / name / "model/README.md" for name in ("whole", "resumed")]
    cards = [card.read_text("utf-8") for card in cards]
    assert cards[0] == cards[1]
    assert "- pruned by wanda, too few tokens were routed to them: " in cards[1]
    reports = [
        [line for line in done.out.splitlines() if line.startswith(("pruned", "left dense"))]
        for done in (whole, again)
    ]
    assert reports[0] == reports[1] and any("too few tokens" in line for line in reports[0])


def test_another_version_of_the_program_resumes_only_where_it_is_told_to(
    whole: dict, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = flags("sparsegpt", tmp_path)
    killed(argv, place, 2)
    monkeypatch.setattr("lib.run.fingerprint.code_digest", lambda: "of tomorrow")
    done = call(*argv)
    assert done.status == 1 and len(done.complaints) == 1
    for word in (f"--resume {tmp_path / 'kept'}", "another version", "--resume_anyway"):
        assert word in done.complaints[0]
    assert len(shards(tmp_path)) == 2
    done = finished(call(*argv, "--resume_anyway"))
    assert "continued by another version of this program" in done.out
    assert content(tmp_path / "model") == whole["sparsegpt"]


def test_nothing_but_the_version_may_differ(place: Path, tmp_path: Path) -> None:
    argv = flags("sparsegpt", tmp_path)
    killed(argv, place, 2)
    done = call(*argv, "--seed", 5, "--resume_anyway")
    assert done.status == 1 and "was begun with --seed 0, now it is 5" in done.complaints[0]


def test_a_copy_of_the_model_on_another_disk_resumes(
    whole: dict, place: Path, tmp_path: Path
) -> None:
    argv = flags("sparsegpt", tmp_path)
    killed(argv, place, 2)
    copied = shutil.copytree(place / "model", tmp_path / "elsewhere")
    for file in copied.iterdir():
        os.utime(file)
    finished(call(*argv, "--model", copied))
    assert content(tmp_path / "model") == whole["sparsegpt"]
