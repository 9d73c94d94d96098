"""The share of weights, or of neurons, that two prunings both keep, and where languages differ.

    python -m lib.report.overlap RUN_A RUN_B [RUN ...] [--noise RUN_A2 ...] [--out FOLDER]

A RUN is the folder of a saved, pruned model, or the `--save` folder of a run that saved one. For
each pruned matrix it shows the share of the kept weights that both masks keep, and the share that
chance would give; where whole neurons were removed, and RUN is a `--save` folder, the same of each
block's neurons. `--noise` names prunings that differ from RUN_A, RUN_B, ... (in this order) in
nothing but the seed: only a difference larger than theirs is due to the language.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.report.comparison import (
    FIELDS,
    Cell,
    Comparison,
    MaskCounts,
    Pair,
    compare_masks,
)
from lib.report.markdown import padded_table
from lib.report.names import block_and_linear
from lib.report.plots.mask_overlap import mask_overlap
from lib.report.plots.shared_neurons import shared_neurons
from lib.report.plots.style import can_draw, save_figure
from lib.util import command
from lib.util.files import check_output_folder, write_text


def overlap_text(comparison: Comparison) -> str:
    """The comparison as Markdown: by pair, by block and by linear."""
    pairs = [
        [_pair(comparison, pair), *_percents(counts)] for pair, counts in comparison.pairs.items()
    ]
    unit = comparison.unit
    by_place = [_cells("block", comparison.blocks), _cells("linear", comparison.linears)]
    if unit == "neurons":
        by_place = ["What both keep, by block:", _neurons_by_block(comparison)]
    notes = [
        f"- kept: share of the {unit}; both keep: share of the kept {unit}, mean of the two masks, "
        "that both keep; chance: the same for independent masks."
    ]
    if comparison.noise:
        notes.append(
            "- seeds: share that two seeds of one language both keep; excess: seeds minus both "
            "keep, the part of the difference that is due to the language, in points."
        )
    return "\n\n".join(
        [
            f"### {comparison.title}",
            padded_table(["pair", "kept", "both keep", "chance"], pairs),
            *by_place,
            "\n".join(notes) + "\n",
        ]
    )


def _pair(comparison: Comparison, pair: Pair) -> str:
    return " and ".join(pair) + (" (seeds)" if pair[1] in comparison.noise else "")


def _neurons_by_block(comparison: Comparison) -> str:
    """What each pair of runs both keep, block by block."""
    shares = {pair: comparison.pair_blocks(pair) for pair in comparison.by_pair}
    head = ["block", *(_pair(comparison, pair) for pair in shares), "chance"]
    body = [
        [str(block), *(f"{blocks[block].shared:.1%}" for blocks in shares.values())]
        + [f"{cell.between.chance:.1%}"]
        for block, cell in comparison.blocks.items()
    ]
    return padded_table(head, body)


def _percents(counts: MaskCounts) -> list[str]:
    return [f"{share:.1%}" for share in (counts.kept, counts.shared, counts.chance)]


def _cells(name: str, cells: Mapping[Any, Cell]) -> str:
    head = [name, "kept", "both keep", "chance"]
    noisy = any(cell.noise is not None for cell in cells.values())
    body = []
    for key, cell in cells.items():
        more = [f"{cell.noise:.1%}", f"{100 * cell.excess:+.1f}"] if noisy else []
        body.append([str(key), *_percents(cell.between), *more])
    return padded_table(head + (["seeds", "excess"] if noisy else []), body)


def write_overlap(comparison: Comparison, out: str | Path) -> list[Path]:
    """Write overlap.md, .json, .csv and .png into folder `out`; return their paths."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"overlap.{suffix}" for suffix in ("md", "json", "csv", "png")]
    write_text(paths[0], f"{overlap_text(comparison)}\n![overlap]({paths[3].name})\n")
    write_text(paths[1], json.dumps(_as_json(comparison), indent=2, ensure_ascii=False) + "\n")
    with paths[2].open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["matrix", "block", "linear", *FIELDS])
        for name, cell in comparison.matrices.items():
            writer.writerow([name, *block_and_linear(name), *cell.shares().values()])
    if not can_draw():
        return paths[:3]
    draw = shared_neurons if comparison.unit == "neurons" else mask_overlap
    return [*paths[:3], save_figure(draw(comparison), paths[3])]


def _as_json(comparison: Comparison) -> dict[str, Any]:
    def shares(cells: Mapping[Any, Cell]) -> dict[str, Any]:
        return {str(key): cell.shares() for key, cell in cells.items()}

    return {
        "runs": comparison.runs,
        "noise": comparison.noise,
        "overall": comparison.whole.shares(),
        "pairs": {
            _pair(comparison, pair): _pair_shares(comparison, pair) for pair in comparison.by_pair
        },
        "blocks": shares(comparison.blocks),
        "linears": shares(comparison.linears),
        "matrices": shares(comparison.matrices),
        "most_specific_blocks": [block for block, _ in comparison.most_specific()],
    }


def _pair_shares(comparison: Comparison, pair: Pair) -> dict[str, Any]:
    blocks = comparison.pair_blocks(pair).items()
    return {
        "overlap": comparison.pairs[pair].shared,
        "chance": comparison.pairs[pair].chance,
        "blocks": {str(block): counts.shared for block, counts in blocks},
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lib.report.overlap", description=__doc__.split("\n")[0]
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="saved model, or its run")
    parser.add_argument(
        "--noise", nargs="+", default=[], metavar="RUN", help="the RUNs with another seed, in order"
    )
    parser.add_argument("--out", default="overlap", help="folder for the files (default: overlap)")
    command.add_debug_flag(parser)
    args = parser.parse_args(argv)
    check_output_folder("--out", args.out)
    comparison = compare_masks(args.runs, args.noise)
    for path in write_overlap(comparison, args.out):
        print(f"wrote {path}", file=sys.stderr)
    print(overlap_text(comparison))


if __name__ == "__main__":
    sys.exit(command.run(main))
