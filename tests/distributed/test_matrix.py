"""Runs of every kind by two ranks: a model that loads, or one line before any change."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from processes import ended, together
from support import QUICK, reloaded
from support import RUNS_OF_EVERY_KIND as RUNS

from lib.util.command import FAILED

BASE = [*QUICK, "--calibration_data", "uk", "--eval_data", "uk"]
pytestmark = pytest.mark.usefixtures("at_place")


def flags(case: str) -> list[str]:
    saved = ["--save", f"{case}/run", "--save_model", f"{case}/model"]
    return ["--model", *RUNS[case].split(), *BASE, *saved]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "llama")
    tiny.write_model(folder / "mixtral", tiny.ARCHITECTURES["Mixtral"]())
    tiny.write_texts(folder / "uk", test=3)
    return folder


@pytest.fixture(scope="module")
def made(place: Path) -> None:
    done = ended(together(2, [flags(case) for case in RUNS], place))
    assert [one.status for one in done] == [0, 0], [one.err for one in done]


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("case", RUNS)
def test_a_run(case: str) -> None:
    reloaded(f"{case}/model", f"{case}/run", *BASE, rel=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_can_not_hold_all_refuse(rank: int, place: Path) -> None:
    left = {path.name for path in place.iterdir()}
    argv = [*flags("q4_0 trained"), "--save_model", "new"]
    faults = {rank: "check memory 0:no room for training"}
    done = ended(together(2, [argv], place, faults))
    assert done[0].status == FAILED
    assert sum((one.complaints for one in done), []) == ["error: no room for training"]
    assert {path.name for path in place.iterdir()} == left


def test_compress_is_one_process(place: Path) -> None:
    left = {path.name for path in place.iterdir()}
    argv = "llama small --data uk --device cpu".split()
    done = ended(together(2, [argv], place, program="lib.commands.compress.__main__"))
    assert done[0].status == FAILED
    [line] = sum((one.complaints for one in done), [])
    assert "compress runs as one process. Start it without torchrun" in line
    assert {path.name for path in place.iterdir()} == left
