"""Several processes on one job: what one would have done, and an end for all when one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, ROOT, Done, call, start
from processes import LIMIT, ended, free_port, together
from safetensors.torch import load_file

from lib.dist import team as parallel
from lib.dist.team import Team, local_device
from lib.util import command
from lib.util import launch as launcher
from lib.util.errors import UserError

BASE = [*QUICK, "--nsamples", "7", "--eval_data", "uk"]
WANDA = ["--prune_method", "wanda", "--calibration_data", "uk"]
SPARSEGPT = ["--prune_method", "sparsegpt", "--calibration_data", "uk"]
MAGNITUDE = ["--prune_method", "magnitude"]
CASES = {
    "wanda": ["llama", *WANDA],
    "wanda 2:4": ["llama", *WANDA, "--sparsity_type", "2:4"],
    "sparsegpt": ["llama", *SPARSEGPT],
    "sparsegpt 4:8": ["llama", *SPARSEGPT, "--sparsity_type", "4:8"],
    "admm": ["llama", "--prune_method", "admm", "--calibration_data", "uk"],
    "magnitude": ["llama", *MAGNITUDE],
    "experts": ["mixtral", *WANDA],
    "experts by sparsegpt": ["mixtral", *SPARSEGPT, "--sparsity_type", "2:4"],
    "one window": ["llama", *WANDA, "--nsamples", "1"],
    "offloaded": ["llama", *WANDA, "--offload", "away"],
    "quantised": ["llama", *SPARSEGPT, "--load_bit", "8"],
}
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--main_process_port", str(free_port())]
EXACT = ("wanda", "wanda 2:4", "magnitude", "experts", "one window", "offloaded")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "llama", tiny.tiny_llama(num_hidden_layers=3))
    tiny.write_model(folder / "mixtral", tiny.ARCHITECTURES["Mixtral"]())
    tiny.write_texts(folder / "uk", test=3)
    tiny.write_texts(folder / "en", train=tiny.sentences(20, seed=9), test=3)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def flags(case: str, where: str, save: bool = True) -> list[str]:
    model, *rest = CASES[case]
    saved = ["--save_model", f"{where}/{case}/model"] if save else []
    return ["--model", model, *BASE, *rest, "--save", f"{where}/{case}/run", *saved]


def results(case: str, where: str) -> dict:
    return json.loads(Path(where, case, "run", "results.json").read_text("utf-8"))


def weights(case: str, where: str) -> dict[str, torch.Tensor]:
    return load_file(Path(where, case, "model", "model.safetensors"))


@pytest.fixture(scope="module")
def alone(place: Path) -> str:
    """Where one process has left all cases."""
    before = os.getcwd()
    os.chdir(place)
    try:
        for case in CASES:
            done = call(*flags(case, "alone"))
            assert done.status == 0, done.err
    finally:
        os.chdir(before)
    return "alone"


@pytest.fixture(scope="module", params=[2, 3])
def shared(request: pytest.FixtureRequest, place: Path, alone: str) -> tuple[str, list[Done]]:
    """Where several processes have left them, and what these said."""
    where = f"by {request.param}"
    return where, ended(together(request.param, [flags(case, where) for case in CASES], place))


@pytest.mark.parametrize("case", CASES)
def test_as_one_process(case: str, alone: str, shared: tuple[str, list[Done]]) -> None:
    where, done = shared
    assert [one.status for one in done] == [0] * len(done), [one.err for one in done]
    one, many = results(case, alone), results(case, where)
    assert many["perplexity"]["uk"] == pytest.approx(one["perplexity"]["uk"], rel=5e-3)
    assert many["sparsity"]["overall"] == pytest.approx(one["sparsity"]["overall"], abs=1e-4)
    assert many["calibration"] == one["calibration"]
    if case in EXACT:
        before, after = weights(case, alone), weights(case, where)
        assert before.keys() == after.keys()
        differ = sum(int(((before[k] == 0) != (after[k] == 0)).sum()) for k in before)
        assert differ <= 1e-4 * sum(tensor.numel() for tensor in before.values())


def test_one_process_prints_and_the_others_are_silent(shared: tuple[str, list[Done]]) -> None:
    _, (first, *others) = shared
    assert first.out.count("saved: ") == len(CASES)
    assert first.out.count("perplexity uk: ") == len(CASES)
    assert [(one.out, one.err) for one in others] == [("", "")] * len(others)
    assert not Path("away").exists()


def complaints(done: list[Done]) -> list[str]:
    return [line for one in done for line in one.complaints]


def nothing_saved(folder: Path, case: str = "wanda") -> None:
    left = folder / case
    assert not left.exists() or not list(left.iterdir()), list(left.rglob("*"))


def test_a_killed_worker_ends_the_others(place: Path, tmp_path: Path) -> None:
    argv = [*flags("offloaded", str(tmp_path)), "--offload", str(tmp_path / "away")]
    done = ended(together(3, [argv], place, {1: "1:SIGKILL"}))
    assert [one.status for one in done] == [command.FAILED, -signal.SIGKILL, command.FAILED]
    assert complaints(done) == ["error: process 1 of 3 is gone or hangs at block 1; all end"]
    nothing_saved(tmp_path, "offloaded")
    assert [path.name for path in tmp_path.glob("away/*")] == ["process-1"]  # by its own next run


def test_the_first_process_killed_ends_the_others(place: Path, tmp_path: Path) -> None:
    done = ended(together(2, [flags("wanda", str(tmp_path))], place, {0: "2:SIGKILL"}))
    assert [one.status for one in done] == [-signal.SIGKILL, command.FAILED]
    assert complaints(done) == ["error: process 0 of 2 is gone; process 1 ends at block 2"]
    nothing_saved(tmp_path)


def test_a_stopped_worker_ends_the_others(place: Path, tmp_path: Path) -> None:
    first, second = together(2, [flags("wanda", str(tmp_path))], place, {1: "0:SIGSTOP"})
    done = first.end()
    assert done.status == command.FAILED
    assert done.complaints == ["error: process 1 of 2 is gone or hangs at block 0; all end"]
    os.kill(second.process.pid, signal.SIGCONT)  # wakes up alone, and goes too
    done = second.end()
    assert done.status == command.FAILED and "Traceback" not in done.err
    nothing_saved(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_who_fails_tells_it_and_the_others_go_quietly(
    rank: int, place: Path, tmp_path: Path
) -> None:
    done = ended(together(2, [flags("wanda", str(tmp_path))], place, {rank: "1:no such luck"}))
    assert [one.status for one in done] == [command.FAILED] * 2
    assert done[rank].complaints == complaints(done) == ["error: no such luck"]
    nothing_saved(tmp_path)


def test_a_defect_shows_one_traceback(place: Path, tmp_path: Path) -> None:
    done = ended(
        together(2, [flags("wanda", str(tmp_path))], place, {0: "1:defect", 1: "1:defect"})
    )
    assert [one.status for one in done] == [command.FAILED] * 2
    assert sorted(one.err.count("RuntimeError: defect") for one in done) == [0, 1]


def test_different_flags_are_found_at_the_start(place: Path, tmp_path: Path) -> None:
    argv = ["--model", "llama", *BASE, "--eval_only", "--save", tmp_path / "run"]
    done = ended(together(2, [argv], place, own={1: ["--seed", "5"]}))
    assert [one.status for one in done] == [command.FAILED] * 2
    (line,) = complaints(done)
    assert line.startswith("error: --seed: process ") and "has 5" in line and "has 0" in line
    assert not (tmp_path / "run").exists()


def test_different_facts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    team = Team(torch.device("cpu"), alone=True)
    facts = {"calibration windows": "ab", "packages": {"torch": "2.0"}}
    team.agree(facts)
    for name, other in {"calibration windows": "cd", "packages": {"torch": "2.1"}}.items():
        monkeypatch.setattr(team, "gathered", lambda mine, n=name, o=other: [mine, mine | {n: o}])
        with pytest.raises(UserError, match=f"{name}: process 0 has .*, process 1 has"):
            team.agree(facts)


def launched(launcher: list, argv: list, folder: Path) -> Done:
    """main.py under a real launcher, with two processes."""
    process = start(["-m", *launcher, *map(str, argv)], folder)
    out, err = process.communicate(timeout=LIMIT)
    return Done(process.returncode, out, err)


def test_torchrun_and_a_killed_worker(place: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport worker\n"
        "fault = '1:SIGKILL' if os.environ['RANK'] == '1' else ''\n"
        "worker.work([sys.argv[1:]], [{}], fault, '.', '/dev/stdout', '/dev/stderr')\n"
    )
    done = launched([*TORCHRUN, str(program)], flags("wanda", str(tmp_path)), place)
    assert done.status == 1
    said = [line for line in done.complaints if line.startswith("error:")]
    assert said == ["error: process 1 of 2 is gone or hangs at block 1; all end"], done.err
    nothing_saved(tmp_path)
    assert str(program) not in subprocess.run(["ps", "axww"], capture_output=True, text=True).stdout


def test_torchrun_and_a_mistake(place: Path, tmp_path: Path) -> None:
    argv = [*flags("wanda", str(tmp_path)), "--seqlen", "999"]
    done = launched([*TORCHRUN, str(ROOT / "main.py")], argv, place)
    assert done.status == 1
    assert [line for line in done.complaints if "--seqlen 999" in line] == [
        "error: --seqlen 999: the model's window ends at 128 tokens"
    ]


def test_accelerate_launch(place: Path, alone: str) -> None:
    done = launched([*ACCELERATE, str(ROOT / "main.py")], flags("wanda", "accelerate"), place)
    assert done.status == 0, done.err
    assert done.out.count("saved: ") == 1
    one, two = results("wanda", alone), results("wanda", "accelerate")
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)


def test_mistakes_in_flags_are_told_by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert call("--model", "llama", *BASE).status == 2
        assert call("--model", "none/such/model", *BASE, "--eval_only").status == command.FAILED
    assert waited == [launcher.TURN_SECONDS] * 2


def test_accelerate_that_starts_one_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="--num_processes: .* --multi_gpu"):
        Team(torch.device("cpu"))


def test_the_store_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(parallel, "JOIN_SECONDS", 1)
    start = time.monotonic()
    with pytest.raises(UserError, match="process 1 can't reach the others at MASTER_ADDR"):
        Team(torch.device("cpu"))
    assert time.monotonic() - start < 20


def test_gpus_are_counted_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert local_device(torch.device("cpu")) == torch.device("cpu")
    assert local_device(torch.device("cuda", 0)) == torch.device("cuda", 2)
    assert local_device(torch.device("cuda", 1)) == torch.device("cuda", 3)
    with pytest.raises(UserError, match="--device cuda:2: process 2 .* needs cuda:4"):
        local_device(torch.device("cuda", 2))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_windows_and_solves_are_shared_out_evenly(size: int) -> None:
    team = Team(torch.device("cpu"), alone=True)
    team.size = size
    shares = []
    for team.rank in range(size):
        shares.append(range(7)[team.share(7)])
    assert [window for share in shares for window in share] == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    costs = [5.0, 3, 3, 2, 2, 1]
    owners = team.owners(costs)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(size)]
    assert len(owners) == 6 and max(loads) <= sum(costs) / size + max(costs)
