"""Pictures: the figures that are handed to the axes, by hand-made runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.report.comparison import Cell, Comparison, MaskCounts
from lib.report.plots.choice_against_saying import choice_against_saying
from lib.report.plots.cost import pruning_cost
from lib.report.plots.cross_language import cross_language
from lib.report.plots.depth import kl_by_depth
from lib.report.plots.mask_overlap import mask_overlap
from lib.report.plots.perplexity import perplexity_against_sparsity
from lib.report.plots.recovery import recovery_curve
from lib.report.plots.shared_neurons import shared_neurons
from lib.report.plots.sparsity_by_linear import sparsity_by_linear
from lib.report.results import Run
from lib.report.tables import Table, comparable_tables
from lib.report.write import PICTURES

LINEARS = [f"model.layers.{b}.{k}" for b in (0, 1) for k in ("self_attn.q_proj", "mlp.up_proj")]


def run(
    method: str,
    perplexity: dict[str, float],
    *,
    on: str | None = None,
    kind: str = "unstructured",
    ratio: float = 0.5,
    seed: int = 0,
    shares: list[float] | None = None,
) -> Run:
    dense = method == "dense"
    linears = dict(zip(LINEARS, shares or [ratio] * 4, strict=True))
    results = {
        "model": "models/tiny",
        "method": method,
        "sparsity_type": None if dense else kind,
        "sparsity_ratio": None if dense else ratio,
        "seed": seed,
        "calibration": on and {"name": on, "sources": []},
        "evaluation": [{"name": k, "digest": k, "perplexity": v} for k, v in perplexity.items()],
        "sparsity": {"overall": 0.0 if dense else ratio, "linears": linears},
    }
    return Run(Path(method), results)


@pytest.fixture
def table() -> Table:
    """Two languages; wanda at 50% with two seeds, at 2:4 once; magnitude at 60%; one burst."""
    runs = [run("dense", {"uk": 20.0, "en": 40.0})]
    for seed, more in enumerate((0.0, 2.0)):
        runs.append(run("wanda", {"uk": 24.0 + more, "en": 60.0 + more}, on="uk", seed=seed))
        runs.append(run("wanda", {"uk": 30.0 + more, "en": 50.0 + more}, on="en", seed=seed))
    shares = [0.4, 0.5, 0.5, 0.6]
    runs.append(run("wanda", {"uk": 33.0, "en": 70.0}, on="uk", kind="2:4", shares=shares))
    runs.append(run("magnitude", {"uk": math.inf, "en": 99.0}, ratio=0.6))
    (only,) = comparable_tables(runs)
    return only


def points(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """{marker: (x, y) of its marks}, rounded, without error bars and helping lines."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in axes.lines:
        if line.get_marker() in "osX":
            xy = zip(line.get_xdata(), line.get_ydata(), strict=True)
            found.setdefault(line.get_marker(), []).extend((round(x, 3), y) for x, y in xy)
    return found


def dashed(axes: Axes, axis: int) -> list[float]:
    """Where the dense model is drawn."""
    lines = [line for line in axes.lines if line.get_linestyle() == "--"]
    return [line.get_xydata()[0][axis] for line in lines if line.get_color() == "#555555"]


def heats(axes: Axes) -> list[list[float | None]]:
    """The values of a heat map, None where blank."""
    (image,) = axes.images
    return image.get_array().tolist()


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def panels(figure: Figure) -> list[Axes]:
    """The panels of a picture, without colour bars."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def test_perplexity_against_sparsity(table: Table) -> None:
    figure = perplexity_against_sparsity(table)
    uk, en = panels(figure)
    assert figure.get_suptitle() == "tiny: perplexity against sparsity"
    assert uk.get_title() == "measured on uk (dense 20)"
    assert dashed(uk, 1) == [20.0] and dashed(en, 1) == [40.0]
    by_target = {y: x for marks in points(uk).values() for x, y in marks}
    assert by_target.keys() == {25.0, 31.0, 33.0}  # means over seeds; what is infinite is left out
    assert by_target[25.0] < by_target[31.0] == 50 < by_target[33.0]  # beside each other; 2:4
    assert {y for marks in points(en).values() for _, y in marks} == {61.0, 51.0, 70.0, 99.0}
    assert uk.get_yscale() == "log" and uk.get_xlabel() == "weights pruned, %"
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend == [
        "calibrated on uk",
        "calibrated on en",
        "no calibration",
        "magnitude",
        "wanda",
        "2:4, any method",
        "dense",
    ]


def test_whole_neurons_have_a_line_of_their_own_at_the_weights_that_went() -> None:
    runs = [run("dense", {"uk": 20.0}), run("wanda", {"uk": 30.0}, on="uk")]
    for ratio, share, value in ((0.25, 0.2, 24.0), (0.5, 0.4, 28.0)):
        runs.append(run("wanda", {"uk": value}, on="uk", kind="neurons", ratio=ratio))
        runs[-1].results["neurons"] = {"weights_before": 1000, "weights_after": 1000 - 1000 * share}
    (only,) = comparable_tables(runs)
    figure = perplexity_against_sparsity(only)
    (uk,) = panels(figure)
    lines = [line.get_xydata().tolist() for line in uk.lines if line.get_marker() == "o"]
    assert lines == [[[50, 30]], [[pytest.approx(20), 24], [pytest.approx(40), 28]]]
    labels = [label.get_text() for label in uk.get_xticklabels()]
    assert sorted(labels) == ["20", "40", "50"]
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend[-2:] == ["whole neurons, any method", "dense"]


def test_pruning_cost(table: Table) -> None:
    uk, en = panels(pruning_cost(table))
    assert [tick.get_text() for tick in uk.get_yticklabels()] == ["wanda 50%", "wanda 2:4"]
    assert dashed(uk, 0) == [20.0]
    assert points(uk) == {"o": [(25.0, 0), (33.0, 1)], "s": [(31.0, 0)]}
    assert texts(uk) == ["+25%", f"own text saves {1 - 25 / 31:.1%}", "+65%"]
    assert texts(en) == [f"{51 / 40 - 1:+.0%}", f"own text saves {1 - 51 / 61:.1%}", "+75%"]


def test_what_calibration_on_another_language_costs(table: Table) -> None:
    figure = cross_language(table)
    half, two_of_four = panels(figure)
    assert half.get_title() == "wanda 50%" and two_of_four.get_title() == "wanda 2:4"
    assert [label.get_text() for label in half.get_yticklabels()] == ["uk", "en"]
    rises = [[25 / 20, 61 / 40], [31 / 20, 51 / 40]]  # calibrated on x measured on
    for line, expected in zip(heats(half), rises, strict=True):
        assert line == pytest.approx([100 * (ratio - 1) for ratio in expected])
    assert sorted(texts(half)) == ["+25.0", "+27.5", "+52.5", "+55.0"]
    assert heats(two_of_four)[1] == [None, None]


def test_sparsity_of_the_linears(table: Table) -> None:
    (axes,) = panels(sparsity_by_linear(table))  # of the one row that is not constant
    assert axes.get_title() == "wanda 2:4\ncalibrated on uk"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q_proj", "up_proj"]
    assert heats(axes) == [pytest.approx([-10, 0]), pytest.approx([0, 10])]
    assert texts(axes) == ["40", "50", "50", "60"]


def test_recovery() -> None:
    curve = [{"tokens": 0, "perplexity": 90.0}, {"tokens": 512, "perplexity": math.nan}]
    curve.append({"tokens": 1024, "perplexity": 50.0})
    recovery = {"curve": curve, "tokens": 1024, "held_out": {"dense": 30.0, "before": 90.0}}
    recovery |= {"dense": {"uk": 20.0}, "before": {"uk": 80.0}}
    made = {"model": "models/tiny", "method": "admm", "sparsity_type": "2:4"}
    made |= {"sparsity_ratio": 0.5, "recovery": recovery, "perplexity": {"uk": 40.0}}
    figure = recovery_curve(made)
    held_out, uk = panels(figure)
    assert figure.get_suptitle() == "tiny, admm 2:4: recovery by training"
    title = recovery_curve(made | {"sparsity_type": "neurons"}).get_suptitle()
    assert title == "tiny, admm 50% neurons: recovery by training"
    assert points(held_out) == {"o": [(0, 90.0), (1024, 50.0)]}
    assert points(uk) == {"s": [(0, 80.0), (1024, 40.0)]}
    assert dashed(held_out, 1) == [30.0] and dashed(uk, 1) == [20.0]
    assert uk.get_title() == "measured on uk\n(dense 20)" and texts(uk) == ["80", "40"]


def test_what_masks_share() -> None:
    def cell(shared: int, seeds: int) -> Cell:
        counts = [MaskCounts(20, 10, 10, both, 5.0) for both in (shared, seeds)]
        return Cell(*counts)

    cells = dict(zip(LINEARS, (cell(6, 9), cell(7, 9), cell(8, 9), cell(9, 8)), strict=True))
    figure = mask_overlap(Comparison(["uk", "en"], ["uk2"], cells, {}))
    runs, seeds, excess = panels(figure)
    assert figure.get_suptitle() == "Weights that the masks of uk and en share"
    assert heats(runs) == [pytest.approx([60, 70]), pytest.approx([80, 90])]
    assert heats(seeds) == [pytest.approx([90, 90]), pytest.approx([90, 80])]
    assert heats(excess) == [pytest.approx([30, 20]), pytest.approx([10, -10])]
    (alone,) = panels(
        mask_overlap(
            Comparison(["uk", "en"], [], {LINEARS[0]: Cell(MaskCounts(20, 10, 10, 6, 5.0))}, {})
        )
    )
    assert heats(alone) == [pytest.approx([60])]


def test_what_neurons_pairs_share_by_block() -> None:
    """A line for each pair, then chance; the seeds of one language are grey."""
    names = ["layers.0.neurons", "layers.1.neurons"]

    def counts(*both: int) -> dict[str, MaskCounts]:
        shared = zip(names, both, strict=True)
        return {name: MaskCounts(20, 10, 10, each, 5.0) for name, each in shared}

    runs, again = ["uk (seed 0)", "en (seed 0)", "half (seed 0)"], "uk (seed 1)"
    by_pair = {(runs[0], runs[1]): counts(6, 4), (runs[0], runs[2]): counts(8, 7)}
    by_pair[runs[0], again] = counts(9, 9)
    cells = {name: Cell(MaskCounts(40, 20, 20, 14, 10.0)) for name in names}
    comparison = Comparison(runs, [again], cells, by_pair)
    (axes,) = panels(figure := shared_neurons(comparison))
    assert figure.get_suptitle() == "Neurons that are kept for uk, en and half"
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {
        "uk and en": [[0, 60], [1, 40]],
        "uk and half": [[0, 80], [1, 70]],
        "two seeds of one text": [[0, 90], [1, 90]],
        "chance": [[0, 50], [1, 50]],
    }
    assert [line.get_color() for line in axes.lines].count("#555555") == 1


def test_what_is_chosen_against_what_is_written() -> None:
    def ability(chosen: float, written: float) -> dict:
        model = {"accuracy": chosen, "said": written}
        dense = {"accuracy": 0.9, "said": 0.5}
        kind = {"text": "uk", "name": "last word", "questions": 300, "chance": 0.25}
        return kind | {"model": model, "dense": dense}

    runs = [run("dense", {"uk": 20.0, "en": 40.0})]
    runs += [run("wanda", {"uk": 30.0, "en": 60.0}, on="uk", seed=seed) for seed in (0, 1)]
    for made, shares in zip(runs[1:], ((0.6, 0.1), (0.8, 0.2)), strict=True):
        made.results["abilities"] = [ability(*shares)]
    (table,) = comparable_tables(runs)
    (axes,) = panels(choice_against_saying(table))  # none for en, of which nothing was asked
    marks = {line.get_marker(): tuple(line.get_xydata()[0]) for line in axes.lines}
    assert marks == {"*": pytest.approx((90, 50)), "o": pytest.approx((70, 15))}
    assert axes.get_title() == "questions from uk" and texts(axes) == ["50%"]


def test_divergence_by_depth_is_the_mean_over_seeds() -> None:
    runs = [run("dense", {"uk": 20.0, "en": 40.0})]
    runs += [run("wanda", {"uk": 30.0, "en": 60.0}, on="uk", seed=seed) for seed in (0, 1)]
    for made, curve in zip(runs[1:], ([0.1, 0.4, 0.5], [0.3, 0.6, 1.5]), strict=True):
        made.results["depth"] = [{"name": "uk", "kl": curve}]
    (table,) = comparable_tables(runs)
    (axes,) = panels(kl_by_depth(table))  # none for en, which was not measured
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [
        pytest.approx(point) for point in ([1, 0.2], [2, 0.5], [3, 1.0])
    ]
    assert axes.get_title() == "measured on uk"


def test_nothing_to_draw() -> None:
    (only,) = comparable_tables([run("dense", {"uk": 20.0})])
    for draw in PICTURES.values():
        assert draw(only) is None
