"""Every check of the first run on a GPU can be done, in small, on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, representative

sys.path.append(str(ROOT / "benchmarks/gpu"))

import first_run  # noqa: E402


@pytest.mark.parametrize("name", representative(first_run.CHECKS, ["products", "load_bit"]))
def test_a_check_in_small(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = first_run.report_of(name, torch.device("cpu"), small=True)
    assert report["result"] == "ok", report


@pytest.mark.parametrize("name", ["two processes", "recovery by two processes"])
def test_a_second_card_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    report = first_run.report_of(name, torch.device("cuda:0"), small=True)
    assert (report["result"], report["figures"]) == ("skipped", "needs two GPUs")


def test_what_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(first_run.CHECKS, "methods", lambda runs: 1 / 0)
    report = first_run.report_of("methods", torch.device("cpu"), small=True)
    assert report["result"] == "failed" and report["figures"].startswith("ZeroDivisionError")
