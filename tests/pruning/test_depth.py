"""A reader who follows a run to a mask passes few functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from support import QUICK, ROOT, succeed

import main
from lib.methods import sparsity

CALLS = 7


def path_from_run() -> list[str]:
    """The functions of lib/ that are called below `main.run`, the outermost first."""
    frame, names = sys._getframe(1), []
    while frame and frame.f_code is not main.run.__code__:
        if Path(frame.f_code.co_filename).is_relative_to(ROOT / "lib"):
            names.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return names[::-1]


def watched(function: Callable, paths: list[list[str]]) -> Callable:
    def call(*args: object, **options: object) -> object:
        paths.append([*path_from_run(), function.__qualname__])
        return function(*args, **options)

    return call


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt", "admm"])
def test_a_mask_is_seven_calls_from_main_run(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`main.run` does not count; `Sparsity.mask`, which alone makes masks of scores, does."""
    tiny.write_model(tmp_path / "model")
    tiny.write_texts(tmp_path / "uk", train=30, test=4)
    monkeypatch.chdir(tmp_path)
    masks: list[list[str]] = []
    selections: list[list[str]] = []
    monkeypatch.setattr(sparsity.Sparsity, "mask", watched(sparsity.Sparsity.mask, masks))
    lowest = watched(sparsity.lowest_per_row, selections)
    monkeypatch.setattr(sparsity, "lowest_per_row", lowest)
    argv = "--model", "model", "--calibration_data", "uk", "--prune_method", method
    succeed(*argv, *QUICK)
    assert masks and all(path[0] == "prune" for path in masks)
    assert max(map(len, masks)) <= CALLS, max(masks, key=len)
    if method == "wanda":  # down to the selection of the lowest scores
        assert max(map(len, selections)) <= CALLS, max(selections, key=len)
