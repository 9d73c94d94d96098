"""How much the masks of two prunings have in common, and where they differ by language.

    python -m lib.report.overlap RUN_A RUN_B [RUN ...] [--noise RUN_A2 ...] [--out FOLDER]

A RUN is the folder of a saved, pruned model, or the `--save` folder of a run that saved one. For
each pruned matrix: which share of the kept weights both masks keep, against what chance would
give. With `--noise`, prunings that differ from RUN_A, RUN_B, ... (in this order) in nothing but the
seed: what they share is the floor against which a difference between languages counts.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.report.comparison import FIELDS, Cell, Comparison, Count, compare_masks
from lib.report.markdown import padded_table
from lib.report.names import place
from lib.report.plots.overlap import draw
from lib.report.plots.style import can_draw
from lib.util import command
from lib.util.files import check_output_folder, write_text


def text(found: Comparison) -> str:
    """The comparison as Markdown: by pair, by block and by linear."""
    pairs = [
        [f"{a} and {b}" + (" (seeds)" if b in found.noise else ""), *_percents(count)]
        for (a, b), count in found.pairs.items()
    ]
    return "\n\n".join(
        [
            f"### {found.title}",
            padded_table(["pair", "kept", "both keep", "chance"], pairs),
            _cells("block", found.blocks),
            _cells("linear", found.linears),
            "- kept: share of the weights; both keep: share of those kept by either run's mask, on "
            "average, that both keep; chance: the same for independent masks.\n"
            "- seeds: what two seeds of one language both keep; excess: seeds less both keep, the "
            "part of the difference that the language makes, in points.\n",
        ]
    )


def _percents(count: Count) -> list[str]:
    return [f"{share:.1%}" for share in (count.kept, count.shared, count.chance)]


def _cells(name: str, cells: Mapping[Any, Cell]) -> str:
    head = [name, "kept", "both keep", "chance"]
    noisy = any(cell.noise is not None for cell in cells.values())
    body = []
    for key, cell in cells.items():
        more = [f"{cell.noise:.1%}", f"{100 * cell.excess:+.1f}"] if noisy else []
        body.append([str(key), *_percents(cell.between), *more])
    return padded_table(head + (["seeds", "excess"] if noisy else []), body)


def write_overlap(found: Comparison, out: str | Path) -> list[Path]:
    """Write overlap.md, .json, .csv and .png into folder `out`; return their paths."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"overlap.{suffix}" for suffix in ("md", "json", "csv", "png")]
    write_text(paths[0], f"{text(found)}\n![overlap]({paths[3].name})\n")
    write_text(paths[1], json.dumps(_as_json(found), indent=2, ensure_ascii=False) + "\n")
    with paths[2].open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["matrix", "block", "linear", *FIELDS])
        for name, cell in found.matrices.items():
            writer.writerow([name, *place(name), *cell.shares().values()])
    return [*paths[:3], *([draw(found, paths[3])] if can_draw() else [])]


def _as_json(found: Comparison) -> dict[str, Any]:
    def shares(cells: Mapping[Any, Cell]) -> dict[str, Any]:
        return {str(key): cell.shares() for key, cell in cells.items()}

    return {
        "runs": found.runs,
        "noise": found.noise,
        "overall": found.whole.shares(),
        "blocks": shares(found.blocks),
        "linears": shares(found.linears),
        "matrices": shares(found.matrices),
        "most_specific_blocks": [block for block, _ in found.most_specific()],
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lib.report.overlap", description=__doc__.split("\n")[0]
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="saved model, or the run that did")
    parser.add_argument(
        "--noise", nargs="+", default=[], metavar="RUN", help="the RUNs with another seed, in order"
    )
    parser.add_argument("--out", default="overlap", help="folder for the files (default: overlap)")
    command.add_debug_flag(parser)
    args = parser.parse_args(argv)
    check_output_folder("--out", args.out)
    found = compare_masks(args.runs, args.noise)
    for path in write_overlap(found, args.out):
        print(f"wrote {path}", file=sys.stderr)
    print(text(found))


if __name__ == "__main__":
    sys.exit(command.run(main))
