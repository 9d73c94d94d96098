"""The picture of a report: the figures that are handed to the axes, by made-up runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up import LANGUAGES, results
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.commands.report import picture, tables


def table(*runs: dict):
    (only,) = tables({Path(str(number)): run for number, run in enumerate(runs)})
    return only


@pytest.fixture
def pruned() -> list[dict]:
    """Wanda at 50% with two seeds, at 60% and 2:4 once; magnitude has burst on one text."""
    runs = [results("dense", LANGUAGES)]
    for seed, more in enumerate((0.0, 2.0)):
        runs.append(results("wanda", {"uk": 24 + more, "en": 60 + more}, on="uk", seed=seed))
        runs.append(results("wanda", {"uk": 30 + more, "en": 50 + more}, on="en", seed=seed))
    runs.append(results("wanda", {"uk": 28.0, "en": 65.0}, on="uk", ratio=0.6))
    runs.append(results("wanda", {"uk": 33.0, "en": 70.0}, on="uk", kind="2:4"))
    return [*runs, results("magnitude", {"uk": None, "en": 99.0})]


def drawn(figure: Figure, title: str) -> Axes:
    (axes,) = [axes for axes in figure.axes if axes.get_title().startswith(title)]
    return axes


def cells(axes: Axes) -> list[list[str]]:
    """The figures that stand in a heat map."""
    rows, columns = axes.images[0].get_array().shape
    by_place = {text.get_position(): text.get_text() for text in axes.texts}
    return [[by_place.get((j, i), "") for j in range(columns)] for i in range(rows)]


def test_what_each_calibration_text_loses_on_each_test(pruned: list[dict]) -> None:
    figure = picture(table(*pruned))
    axes = drawn(figure, "wanda 50%")
    expected = [["+0.05", "+0.21"], ["+0.11", "+0.11"], ["", "+0.59"]]
    assert cells(axes) == expected  # uk, en, and magnitude by uk, en
    assert [text.get_text() for text in axes.get_yticklabels()] == ["uk", "en", "no text"]
    assert cells(drawn(figure, "wanda 2:4")) == [["+0.13", "+0.30"]]  # calibrated on uk alone
    assert picture(table(*pruned[1:])) is None  # no dense run
    assert picture(table(pruned[0], pruned[1])) is None  # a single text


def test_models_that_are_only_rounded_share_a_panel() -> None:
    """Each has as many zeros as rounding happened to make."""
    runs = [results("dense", LANGUAGES)]
    for language, zeros in (("uk", 0.121), ("en", 0.118)):
        none = dict(kind=None, ratio=None, sparsity={"overall": zeros})
        runs.append(results("q4_0", {"uk": 25.0, "en": 41.0}, on=language, **none))
    assert cells(drawn(picture(table(*runs)), "q4_0 whole")) == [["+0.050", "+0.010"]] * 2
