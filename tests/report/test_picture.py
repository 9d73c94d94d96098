"""The picture of a report: the figures that are handed to the axes, by made-up runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up import LANGUAGES, results
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.commands.report.pictures import layer_errors, picture
from lib.commands.report.table import tables

KEYS = ["method", "type", "calibrated_on"]


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


def test_errors_of_layers_by_depth_and_kind(pruned: list[dict]) -> None:
    """A panel for each kind and a line for each row; seeds and experts are averaged."""
    for seed, run in enumerate(pruned[1:3]):  # uk and en, one seed each
        run["errors"] = {
            f"model.layers.{block}.mlp.{layer}": (seed + 1) * (block + 1) / 10
            for block in range(2)
            for layer in ("up_proj", "experts.0.down_proj", "experts.1.down_proj")
        }
    runs = {Path(str(number)): run for number, run in enumerate(pruned)}
    (only,) = tables(runs)
    figure = layer_errors(only, KEYS, runs)
    assert [axes.get_title() for axes in figure.axes] == ["mlp.up_proj", "mlp.experts.*.down_proj"]
    for axes in figure.axes:
        lines = {line.get_label(): [*line.get_ydata()] for line in axes.lines}
        assert lines == {"wanda 50% uk": [0.1, 0.2], "wanda 50% en": [0.2, 0.4]}
    for run in pruned:
        run.pop("errors", None)
    assert layer_errors(only, KEYS, runs) is None
