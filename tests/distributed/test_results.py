"""Several processes do what one would have done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from jobs import CASES, flags
from processes import ACCELERATE, ended, launched, together
from safetensors.torch import load_file
from support import ROOT, Done, call, results

EXACT = ("wanda", "wanda 2:4", "magnitude", "experts", "one window", "offloaded")
pytestmark = pytest.mark.usefixtures("at_place")


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
    one, many = (results(f"{place}/{case}/run") for place in (alone, where))
    assert many["perplexity"]["uk"] == pytest.approx(one["perplexity"]["uk"], rel=5e-3)
    for name in ("kl", "top1_agreement"):
        (a,), (b,) = ([entry[name] for entry in found["evaluation"]] for found in (one, many))
        # int8 products quantise inputs by the batch, which other processes cut otherwise
        rounding = 2e-2 if case == "quantised" else 2e-3
        assert b == pytest.approx(a, rel=2e-2, abs=rounding), name
    assert many["sparsity"]["overall"] == pytest.approx(one["sparsity"]["overall"], abs=1e-4)
    assert many["calibration"] == one["calibration"]
    said = [[entry["dense"] for entry in found.get("completions", [])] for found in (one, many)]
    assert said[0] == said[1] and len(said[0]) == (3 if case == "wanda" else 0)
    before, after = weights(case, alone), weights(case, where)
    assert before.keys() == after.keys()
    differ = sum(int(((before[k] == 0) != (after[k] == 0)).sum()) for k in before)
    if case in EXACT:
        assert differ <= 1e-4 * sum(tensor.numel() for tensor in before.values())


def test_one_process_prints_and_the_others_are_silent(shared: tuple[str, list[Done]]) -> None:
    _, (first, *others) = shared
    assert first.out.count("\nsaved: ") == len(CASES)
    assert first.out.count("perplexity uk: ") == len(CASES)
    assert [(one.out, one.err) for one in others] == [("", "")] * len(others)
    assert not Path("away").exists()


def test_accelerate_launch(place: Path, alone: str) -> None:
    done = launched([*ACCELERATE, ROOT / "main.py", *flags("wanda", "accelerate")], place)
    assert done.status == 0, done.err
    assert done.out.count("saved: ") == 1
    one, two = results("alone/wanda/run"), results("accelerate/wanda/run")
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)
