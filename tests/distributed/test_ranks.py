"""Several ranks do what one would have done; where one fails, all end and one line says why."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path

import pytest
import support
import tiny
import torch
from processes import case_flags, ended, kept_port, together
from support import QUICK, ROOT, call, reloaded, results, start, succeed, weights

from lib.distributed import context
from lib.distributed.context import DistContext
from lib.util import command
from lib.util.command import FAILED
from lib.util.errors import UserError

TERMINATED = 128 + signal.SIGTERM
BASE = [*QUICK, "--nsamples", "7", "--eval_data", "uk", "--calibration_data", "uk"]
CASES = {
    "wanda": "llama --prune_method wanda --completions 3",
    "sparsegpt 4:8": "llama --prune_method sparsegpt --sparsity_type 4:8",
    "admm by error": "llama --prune_method admm --sparsity_ratio 0.6 --allocation error",
    "experts": "mixtral --prune_method wanda",
    "one window": "llama --prune_method wanda --nsamples 1",
    "offloaded": "llama --prune_method wanda --offload_folder away",
    "packed": "llama --prune_method wanda --sparsity_type 2:4 --replace_sparse_layers",
    "quantized": "llama --prune_method sparsegpt --load_bit 8",
    "recovered": "llama --prune_method wanda --recover 512",
    "never called": "mamba --prune_method wanda --recover 512",  # one of its linears
}
flags = partial(case_flags, CASES, BASE)
FILES = ("wanda", "offloaded", "packed", "recovered")  # where machines matter
EXACT = ("wanda", "experts", "one window", "offloaded", "packed")
SECOND_IS_GONE = r"error: rank 0 of \d: (rank 1|another rank) has ended or does not answer \(.*"
pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "llama", tiny.tiny_llama(num_hidden_layers=3))
    tiny.write_model(folder / "mixtral", tiny.ARCHITECTURES["Mixtral"]())
    tiny.write_model(folder / "mamba", tiny.HYBRIDS["Mamba"]())
    tiny.write_texts(folder / "uk", test=3)
    return folder


@pytest.fixture(scope="module")
def alone(place: Path) -> str:
    """Where one process has left all cases."""
    before = os.getcwd()
    os.chdir(place)
    try:
        for case in CASES:
            succeed(*flags(case, "alone"))
    finally:
        os.chdir(before)
    return "alone"


def left_by_ranks(size: int, each: int, cases: Collection[str], place: Path) -> str:
    """Where several ranks, so many on a machine, leave some cases."""
    where = f"{size} by {each}"
    done = ended(together(size, [flags(case, where) for case in cases], place, each=each))
    assert [one.status for one in done] == [0] * size, [one.err for one in done]
    assert done[0].out.count("\nsaved: ") == done[0].out.count("perplexity uk: ") == len(cases)
    assert [(one.out, one.err) for one in done[1:]] == [("", "")] * (size - 1)
    assert not (place / "away").exists()
    return where


@pytest.fixture(scope="module")
def three(place: Path, alone: str) -> str:
    return left_by_ranks(3, 3, CASES, place)


@pytest.fixture(scope="module")
def machines(place: Path, alone: str) -> str:
    return left_by_ranks(2, 1, FILES, place)


@pytest.mark.parametrize("case", CASES)
def test_three_ranks_do_as_one_process(case: str, alone: str, three: str) -> None:
    check_alike(case, alone, three)


@pytest.mark.parametrize("case", FILES)
def test_so_do_two_machines(case: str, alone: str, machines: str) -> None:
    check_alike(case, alone, machines)


def check_alike(case: str, alone: str, shared: str) -> None:
    one, many = (results(f"{place}/{case}/run") for place in (alone, shared))
    assert many["perplexity"]["uk"] == pytest.approx(one["perplexity"]["uk"], rel=5e-3)
    for name in ("kl", "top1_agreement"):
        (a,), (b,) = ([entry[name] for entry in found["evaluation"]] for found in (one, many))
        # int8 products quantize inputs by the batch, which other ranks cut otherwise
        rounding = 2e-2 if case == "quantized" else 2e-3
        assert b == pytest.approx(a, rel=2e-2, abs=rounding), name
    assert many["calibration"] == one["calibration"]
    dense = [[entry["dense"] for entry in found["completions"]] for found in (one, many)]
    assert dense[0] == dense[1] and len(dense[0]) == (3 if case == "wanda" else 0)
    # int8 products again
    rel = 2e-2 if case == "quantized" else 1e-5
    reloaded(f"{shared}/{case}/model", f"{shared}/{case}/run", "--eval_data", "uk", rel=rel)
    before, after = weights(f"{alone}/{case}/model"), weights(f"{shared}/{case}/model")
    assert before.keys() == after.keys()
    differ = sum(int(((before[k] == 0) != (after[k] == 0)).sum()) for k in before)
    # sums by another number of ranks differ in their last bits, which seldom moves a zero
    share = 1e-4 if case in EXACT else 5e-3
    assert differ <= share * sum(tensor.numel() for tensor in before.values())


def test_accelerate_launch(place: Path, alone: str) -> None:
    argv = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
    argv += ["--main_process_port", 0, ROOT / "main.py", *flags("wanda", "accelerate")]
    done = support.ended(start([sys.executable, *argv], place))
    assert done.status == 0, done.err
    assert done.out.count("saved: ") == done.out.count("perplexity uk: ") == 1
    one, two = results("alone/wanda/run"), results("accelerate/wanda/run")
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)


def test_a_run_is_continued_by_another_number_of_ranks(
    place: Path, alone: str, tmp_path: Path
) -> None:
    argv = [*flags("sparsegpt 4:8", tmp_path), "--resume", tmp_path / "kept"]
    done = ended(together(3, [argv], place, {0: "prune 1:SIGKILL"}))
    assert done[0].status == -signal.SIGKILL
    done = ended(together(2, [argv], place, {1: "prune 2:SIGKILL"}))
    assert done[1].status == -signal.SIGKILL
    assert call(*argv).status == 0 and not (tmp_path / "kept").exists()
    before, after = (weights(at / "sparsegpt 4:8/model") for at in (place / alone, tmp_path))
    differ = sum(int(((before[k] == 0) != (after[k] == 0)).sum()) for k in before)
    assert differ <= 0.001 * sum(tensor.numel() for tensor in before.values())


def test_no_file_is_moved_while_another_rank_reads_it(place: Path, tmp_path: Path) -> None:
    """Here the second compares packed blocks when the first is ready to save them."""
    done = ended(together(2, [flags("packed", tmp_path)], place, {1: "prune 3:late"}))
    assert [one.status for one in done] == [0, 0], [one.err for one in done]


# --- where one fails


def complaints(done: list) -> list[str]:
    return [line for one in done for line in one.complaints]


def test_a_killed_rank_ends_the_others(place: Path, tmp_path: Path) -> None:
    done = ended(together(3, [flags("wanda", tmp_path)], place, {1: "prune 1:SIGKILL"}))
    assert [one.status for one in done] == [FAILED, -signal.SIGKILL, TERMINATED]
    [line] = complaints(done)
    assert re.match(SECOND_IS_GONE, line)
    assert not (tmp_path / "wanda" / "model").exists()


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
        assert re.fullmatch(r"error: model\.layers\.0\..*: no solution", line)


def test_different_flags_are_noticed_at_the_start(place: Path, tmp_path: Path) -> None:
    done = ended(together(2, [flags("wanda", tmp_path)], place, own={1: ["--seed", "5"]}))
    assert [one.status for one in done] == [FAILED, TERMINATED]
    [line] = complaints(done)
    assert line.startswith("error: --seed: rank ") and "has 5" in line and "has 0" in line


def test_mistakes_in_flags_are_told_by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert call("--model", "llama", *BASE).status == 2
        assert call("--model", "none/such/model", *BASE, "--eval_only").status == FAILED
    assert waited == [command.TURN_SECONDS] * 2


def test_launchers_that_start_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="MASTER_ADDR None.*Start all with torchrun"):
        DistContext(torch.device("cpu"))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_are_out_of_reach(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first waits in vain for the second to come; the second finds nobody at the port."""
    monkeypatch.setattr(context, "JOINING", context.timedelta(seconds=1))
    with kept_port() as port:
        place = dict(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1")
        for name, value in (place | dict(MASTER_PORT=port.getsockname()[1])).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=f"rank {rank} cannot reach the others at MASTER"):
            DistContext(torch.device("cpu"))


def test_the_first_goes_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tasks of lm-eval it loads the dense model again, when the others have ended."""
    monkeypatch.setattr(DistContext, "barrier", lambda self: None)
    monkeypatch.setattr(context.torch_dist, "destroy_process_group", lambda: None)
    first = DistContext(torch.device("cpu"), alone=True)
    first.size = first.local_size = 2
    first.close()
    assert first.all_gather_object(5) == [5] and first.shard(8) == slice(0, 8)
