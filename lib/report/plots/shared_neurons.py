"""Which neurons prunings share, by block: a line for each pair of runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib.report.comparison import Comparison
from lib.report.plots import style as plot_style
from lib.report.plots.style import COLOURS, GREY, LINES, MARKERS, pick

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def shared_neurons(comparison: Comparison) -> Figure:
    """Draw the share of the kept neurons that both runs of a pair keep, in percent.

    Seeds of one language are grey, and chance, that of the first pair, is dotted.
    """
    figure = plot_style.figure(8.0, 5.2)
    axes, series = figure.subplots(), 0
    for pair in comparison.by_pair:
        blocks = comparison.pair_blocks(pair)
        look = {
            "linewidth": 1.4,
            "color": GREY,
            "linestyle": (0, (1, 1)),
            "label": " and ".join(pair),
        }
        if pair[1] not in comparison.noise:
            look |= {"linewidth": 2, "color": pick(COLOURS, series), "mec": "white"}
            look |= {"linestyle": pick(LINES, series), "marker": pick(MARKERS, series)}
            look |= {"markersize": 8}
            series += 1
        axes.plot(list(blocks), [100 * each.shared for each in blocks.values()], **look)
    chance = {block: cell.between.chance for block, cell in comparison.blocks.items()}
    look = {"color": "black", "linestyle": "--", "linewidth": 1.2, "label": "chance"}
    axes.plot(list(chance), [100 * share for share in chance.values()], **look)
    axes.set_xlabel("block")
    axes.set_ylabel("kept neurons that both keep, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    plot_style.open_axes(axes)
    figure.legend(loc="outside lower center", ncols=2)
    plot_style.title(figure, comparison.title)
    return figure
