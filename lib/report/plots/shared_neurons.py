"""Which neurons prunings share, by block: a line for each pair of runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lib.report.comparison import Comparison, MaskCounts
from lib.report.plots import style as plot_style
from lib.report.plots.style import COLOURS, GREY, LINES, MARKERS, pick

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SEED = re.compile(r" \(seed \d+\)$")


def shared_neurons(comparison: Comparison) -> Figure:
    """Draw the share of the kept neurons that both runs of a pair keep, in percent.

    Seeds of one language are dotted and grey, chance is dashed.
    """
    figure = plot_style.figure(8.0, 5.2)
    axes, names = figure.subplots(), _short_names(comparison.runs)
    pairs = [pair for pair in comparison.by_pair if pair[1] not in comparison.noise]
    for index, pair in enumerate(pairs):
        look = {"color": pick(COLOURS, index), "linestyle": pick(LINES, index), "linewidth": 2}
        look |= {"marker": pick(MARKERS, index), "markersize": 8, "mec": "white"}
        label = " and ".join(names[run] for run in pair)
        _draw(axes, comparison.pair_blocks(pair), look | {"label": label})
    for index, pair in enumerate(pair for pair in comparison.by_pair if pair not in pairs):
        look = {"color": GREY, "linestyle": (0, (1, 1)), "linewidth": 1.4}
        label = None if index else "two seeds of one text"
        _draw(axes, comparison.pair_blocks(pair), look | {"label": label})
    chance = {block: cell.between.chance for block, cell in comparison.blocks.items()}
    look = {"color": "black", "linestyle": "--", "linewidth": 1.2, "label": "chance"}
    axes.plot(list(chance), [100 * share for share in chance.values()], **look)
    axes.set_xlabel("block")
    axes.set_ylabel("kept neurons that both keep, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    plot_style.open_axes(axes)
    figure.legend(loc="outside lower center", ncols=3)
    *first, last = names.values()
    plot_style.title(figure, f"Neurons that are kept for {', '.join(first)} and {last}")
    return figure


def _draw(axes, blocks: Mapping[int, MaskCounts], look: Mapping[str, Any]) -> None:
    axes.plot(list(blocks), [100 * counts.shared for counts in blocks.values()], **look)


def _short_names(labels: Sequence[str]) -> dict[str, str]:
    """The labels without their seed, where that still tells them apart."""
    short = [SEED.sub("", label) for label in labels]
    return dict(zip(labels, short if len(set(short)) == len(short) else labels, strict=True))
