"""Checks of `bash launch.sh gpu` in small, on the pretended device."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support import ROOT

sys.path.append(str(ROOT / "tests/bench/gpu"))

import first_run  # noqa: E402


@pytest.mark.parametrize("name", ["methods", "2:4 products", "packed, 4 bits", "fetched blocks"])
def test_a_check_in_small(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = first_run.report_of(name, torch.device("cuda:0"), small=True)
    assert report["result"] == "ok", report
