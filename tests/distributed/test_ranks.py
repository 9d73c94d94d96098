"""Several ranks of which one fails: all end, and one line says why. tests/test_matrix.py compares
what ranks leave with what one process leaves."""

from __future__ import annotations

import re
import signal
import sys
from contextlib import closing
from pathlib import Path

import pytest
import support
import tiny
import torch
from processes import ended, kept_port, together
from support import FAILED, QUICK, ROOT, call, content, results, start, succeed, weights
from torch import equal

from lib.util import ranks
from lib.util.errors import UserError
from lib.util.processes import TURN_SECONDS
from lib.util.ranks import DistContext

TERMINATED = 128 + signal.SIGTERM
BASE = [*QUICK, "--eval_data", "uk", "--calibration_data", "uk"]
CASES = {
    "wanda": "llama --prune_method wanda",
    "sparsegpt": "llama --prune_method sparsegpt --sparsity_type 4:8",
    "packed": "llama --prune_method wanda --sparsity_type 2:4 --replace_sparse_layers",
    "trained": "llama --prune_method wanda --recover 512 --batch_size 1",
    "trained experts": "mixtral --prune_method wanda --recover 512 --recover_rank 4",
    "trained, q4_0": "llama --quantize q4_0 --recover 512",
}
pytestmark = pytest.mark.usefixtures("at_place")


def flags(case: str, where: Path | str) -> list:
    model, *rest = CASES[case].split()
    saved = ["--save", f"{where}/run", "--save_model", f"{where}/model"]
    return ["--model", model, *BASE, *rest, *saved]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "llama", tiny.tiny_llama(num_hidden_layers=3))
    tiny.write_model(folder / "mixtral", tiny.ARCHITECTURES["Mixtral"]())
    tiny.write_texts(folder / "uk", test=3)
    return folder


def complaints(done: list) -> list[str]:
    return [line for one in done for line in one.complaints]


def same_zeros(one: Path | str, two: Path | str) -> bool:
    """Whether nearly all zeros of two models are in the same places."""
    before, after = weights(one), weights(two)
    differ = sum(int(((before[k] == 0) != (after[k] == 0)).sum()) for k in before)
    return differ <= 1e-3 * sum(tensor.numel() for tensor in before.values())


# --- launchers


@pytest.mark.full
def test_accelerate_launch(place: Path, tmp_path: Path) -> None:
    succeed(*flags("wanda", tmp_path / "alone"))
    argv = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
    argv += ["--main_process_port", 0, ROOT / "main.py", *flags("wanda", tmp_path / "two")]
    done = support.ended(start([sys.executable, *argv], place))
    assert done.status == 0, done.err
    assert done.out.count("saved: ") == done.out.count("perplexity uk: ") == 1
    one, two = (results(tmp_path / name / "run")["perplexity"] for name in ("alone", "two"))
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.full
def test_two_launchers_as_on_two_machines(place: Path, tmp_path: Path) -> None:
    succeed(*flags("trained", tmp_path / "alone"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2]
    with kept_port() as port:
        torchrun += ["--master_addr", "127.0.0.1", "--master_port", port.getsockname()[1]]
        job = [ROOT / "main.py", *flags("trained", tmp_path / "two")]
        launched = [start([*torchrun, "--node_rank", rank, *job], place) for rank in range(2)]
        done = [support.ended(one) for one in launched]
    assert [one.status for one in done] == [0, 0], [one.err for one in done]
    assert ["ranks share the trained weights" in one.out for one in done] == [True, False]
    one, two = (results(tmp_path / name / "run")["perplexity"] for name in ("alone", "two"))
    assert two == pytest.approx(one, rel=1e-3)


def test_launchers_that_start_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in dict(MASTER_PORT="29500", RANK="0", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="MASTER_ADDR"):
        DistContext(torch.device("cpu"))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_are_out_of_reach(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first waits in vain for the second to come; the second finds nobody at the port."""
    monkeypatch.setattr(ranks, "JOINING", ranks.timedelta(seconds=1))
    with closing(kept_port()) as port:
        place = dict(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1")
        for name, value in (place | dict(MASTER_PORT=port.getsockname()[1])).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=f"rank {rank} cannot reach"):
            DistContext(torch.device("cpu"))


def test_a_lack_of_memory_is_no_rank_that_has_ended() -> None:
    first = DistContext(torch.device("cpu"), alone=True)
    with pytest.raises(torch.OutOfMemoryError), first.collective():
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.full
def test_the_first_goes_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tasks of lm-eval it loads the dense model again, when the others have ended."""
    monkeypatch.setattr(DistContext, "barrier", lambda self: None)
    monkeypatch.setattr(ranks.torch_dist, "destroy_process_group", lambda: None)
    first = DistContext(torch.device("cpu"), alone=True)
    first.size = first.local_size = 2
    first.close()
    assert first.all_gather_object(5) == [5] and first.shard(8) == slice(0, 8)


# --- what is continued


@pytest.mark.full
def test_a_run_is_continued_by_another_number_of_ranks(place: Path, tmp_path: Path) -> None:
    argv = [*flags("sparsegpt", tmp_path), "--resume", tmp_path / "kept"]
    done = ended(together(3, [argv], place, {0: "prune 1:SIGKILL"}))
    assert done[0].status == -signal.SIGKILL
    done = ended(together(2, [argv], place, {1: "prune 2:SIGKILL"}))
    assert done[1].status == -signal.SIGKILL
    succeed(*argv)
    assert not (tmp_path / "kept").exists()
    succeed(*flags("sparsegpt", tmp_path / "alone"))
    assert same_zeros(tmp_path / "alone/model", tmp_path / "model")


@pytest.mark.full
def test_a_rank_that_dies_ends_all_and_the_training_goes_on(place: Path, tmp_path: Path) -> None:
    done = ended(together(2, [flags("trained", tmp_path / "whole")], place))
    assert [one.status for one in done] == [0, 0], [one.err for one in done]
    kept = tmp_path / "kept"
    argv = [*flags("trained", tmp_path), "--resume", kept]
    for number in (0, 1):  # before and after its part is written
        fault = {1: f"save training {number}:SIGKILL"}
        done = ended(together(2, [argv], place, fault))
        assert [one.status for one in done] == [FAILED, -signal.SIGKILL]
        assert re.match(GONE, done[0].complaints[-1])
    assert len(list(kept.glob("recovery-*-of-00002-1.safetensors"))) == 2
    for size in (1, 3):
        done = ended(together(size, [argv], place)) if size > 1 else [call(*argv)]
        [line] = complaints(done)
        assert "WORLD_SIZE 2" in line
    done = ended(together(2, [argv], place))
    assert [one.status for one in done] == [0, 0], [one.err for one in done]
    assert not kept.exists()
    first, second = (weights(at / "model") for at in (tmp_path / "whole", tmp_path))
    assert all(equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.full
@pytest.mark.parametrize("case", ["trained experts", "trained, q4_0"])
def test_the_same_ranks_leave_the_same_bytes(case: str, place: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        done = ended(together(2, [flags(case, tmp_path / name)], place))
        assert [one.status for one in done] == [0, 0], [one.err for one in done]
    first, second = (content(tmp_path / name / "model") for name in ("one", "two"))
    assert first | {"README.md": ""} == second | {"README.md": ""}


@pytest.mark.full
def test_no_file_is_moved_while_another_rank_reads_it(place: Path, tmp_path: Path) -> None:
    """Here the second compares packed blocks when the first is ready to save them."""
    done = ended(together(2, [flags("packed", tmp_path)], place, {1: "prune 3:late"}))
    assert [one.status for one in done] == [0, 0], [one.err for one in done]


# --- where one fails

GONE = r"error: rank 0 of \d: (rank 1|another rank) has ended or does not answer \(.*"


def test_a_killed_rank_ends_the_others(place: Path, tmp_path: Path) -> None:
    done = ended(together(3, [flags("wanda", tmp_path)], place, {1: "prune 1:SIGKILL"}))
    assert [one.status for one in done] == [FAILED, -signal.SIGKILL, TERMINATED]
    [line] = complaints(done)
    assert re.match(GONE, line) and not (tmp_path / "model").exists()


def test_without_a_launcher_the_others_end_by_themselves(place: Path, tmp_path: Path) -> None:
    faults = {0: "prune 2:SIGKILL"}
    workers = together(2, [flags("wanda", tmp_path)], place, faults, agent=False)
    done = [one.end() for one in workers]
    assert [one.status for one in done] == [-signal.SIGKILL, FAILED]
    [line] = complaints(done)
    assert line.startswith("error: rank 1 of 2: rank 0 has ended")


def test_a_defect_shows_one_traceback(place: Path, tmp_path: Path) -> None:
    faults = {0: "prune 1:defect", 1: "prune 1:defect"}
    done = ended(together(2, [flags("wanda", tmp_path)], place, faults))
    assert [one.status for one in done] == [FAILED, TERMINATED]
    assert [one.err.count("RuntimeError: defect") for one in done] == [1, 0]


@pytest.mark.parametrize("how", ["no solution", "defect"])
def test_an_error_of_one_rank_is_reported_once(how: str, place: Path, tmp_path: Path) -> None:
    """The second solves its share of the linear layers while the first waits for it."""
    faults = {1: f"solve 0:{how}"}
    done = ended(together(2, [flags("wanda", tmp_path)], place, faults))
    assert [one.status for one in done] == [FAILED, TERMINATED]
    assert not done[1].complaints
    if how == "defect":
        assert "Traceback" in done[0].err and "RuntimeError: defect" in done[0].complaints[-1]
    else:
        [line] = done[0].complaints
        assert re.fullmatch(r"error: model\.layers\.0\..*: no solution: as the test asks\.", line)


# --- what is refused, before any change


@pytest.mark.parametrize("more", ["--seed 5", "--recover_rank 2"])
def test_ranks_with_other_flags_are_refused(more: str, place: Path, tmp_path: Path) -> None:
    done = ended(together(2, [flags("trained", tmp_path)], place, own={1: more.split()}))
    assert [one.status for one in done] == [FAILED, TERMINATED]
    [line] = complaints(done)
    assert line.startswith(f"error: {more.split()[0]}: rank ")
    assert not list(tmp_path.iterdir())


def test_more_ranks_than_experts_are_refused(place: Path, tmp_path: Path) -> None:
    done = ended(together(5, [flags("trained experts", tmp_path)], place))
    [line] = {line for one in done for line in one.complaints}
    assert line.startswith("error: WORLD_SIZE 5: ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.full)])
def test_what_one_can_not_hold_all_refuse(rank: int, place: Path, tmp_path: Path) -> None:
    faults = {rank: "check memory 0:no room for training"}
    done = ended(together(2, [flags("trained", tmp_path)], place, faults))
    assert done[0].status == FAILED and complaints(done) == [
        "error: no room for training: as the test asks."
    ]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_a_rank_does_not_see_is_refused(place: Path, tmp_path: Path) -> None:
    """As on two machines without a disk of both."""
    argv = [*flags("trained", tmp_path), "--resume", tmp_path / "kept"]
    done = ended(together(2, [argv], place, {1: "at once 0:blind"}, each=1))
    assert done[0].status == FAILED
    [line] = set(complaints(done))
    assert line.startswith(f"error: --resume {tmp_path / 'kept'}: rank 1 ")
    assert not list((tmp_path / "kept").glob("*.json"))


def test_compress_is_one_process(place: Path) -> None:
    left = {path.name for path in place.iterdir()}
    argv = "llama small --data uk --device cpu".split()
    done = ended(together(2, [argv], place, program="lib.commands.compress.__main__"))
    assert done[0].status == FAILED
    [line] = complaints(done)
    assert line.startswith("error: WORLD_SIZE 2: compress ")
    assert {path.name for path in place.iterdir()} == left


def test_mistakes_in_flags_are_told_by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert call("--model", "llama", *BASE).status == 2
        assert call("--model", "none/such/model", *BASE, "--eval_only").status == FAILED
    assert waited == [TURN_SECONDS] * 2
