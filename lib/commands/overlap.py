"""Compare the weights, neurons or experts that prunings keep.
For researchers who ask where languages differ in a model.

    bash launch.sh overlap RUN_A RUN_B [RUN ...] [--noise RUN_A2 ...] [--out FOLDER]

A RUN is the folder of a saved, pruned model, a file of `--save_masks`, or the `--save` folder of a
run that saved either; all are models, or all are masks. The tables show, for each pruned matrix,
the share of kept weights that both masks keep, and the share expected by chance. If neurons or
experts were removed, and RUN is a `--save` folder, they show the same for each block. `--noise`
names prunings that differ from RUN_A, RUN_B, ... (in this order) only in the seed: a difference is
due to the language only if it is larger than theirs.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from ..methods.sparsity import SMALLER
from ..run.results import NONE, RESULTS, read_results
from ..util.cli import make_parser
from ..util.errors import UserError
from ..util.files import check_writable, write_text
from ..util.markdown import padded_table
from ..util.progress import progress
from .report.pictures import heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

MIN_ZEROS = 0.01  # share of a matrix above which it counts as pruned
COUNTS = ["weights", "kept_a", "kept_b", "both", "chance"]
NUMBERED = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Masks:
    """The masks of a RUN, bool: of a matrix's weights, or of a block's neurons or experts (1, n).

    `read` returns one by its name, so that two large models need not fit in memory.
    """

    path: Path
    label: str
    calibration: str | None  # the text, if known
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def block_and_linear(name: str) -> tuple[int, str] | None:
    """`model.layers.3.mlp.experts.7.w1.weight` -> (3, `mlp.experts.*.w1`); None outside blocks."""
    match = NUMBERED.search(name)
    if match is None:
        return None
    path = name[match.end() :].removesuffix(".weight")
    return int(match[1]), re.sub(r"(?<![^.])\d+(?![^.])", "*", path).removesuffix(".*")


def masks_of(path: Path) -> Masks:
    """Return the masks of a RUN. Raises UserError if none can be read."""
    if not path.exists():
        problem = "no such folder or file exists"
        raise UserError(f"RUN {path}", problem, "Name that of a saved model")
    place, label, calibration = path, path.name, None
    results = read_results(path) if (path / RESULTS).is_file() else {}
    flags = results.get("flags", {})
    saved = [*map(Path, filter(None, [flags.get("save_model"), flags.get("save_masks")]))]
    held = {file.name for file in path.glob("*.safetensors")}
    if results and held <= {each.name for each in saved}:
        calibration = (results.get("calibration") or {}).get("name") or NONE
        label = f"{calibration} (seed {results.get('seed') or 0})"
        if smaller := results.get(kind := results.get("sparsity_type")):
            import torch

            units = torch.arange(smaller["before"])
            kept = {
                f"layers.{block}.{kind}": ~torch.isin(units, torch.tensor(removed))[None]
                for block, removed in enumerate(smaller["removed"])
                if removed
            }
            shapes = dict.fromkeys(kept, (1, len(units)))
            return Masks(path, label, calibration, shapes, kept.__getitem__)
        if not saved:
            fix = "Run it again with --save_masks or --save_model"
            raise UserError(f"RUN {path}", "it saved no masks and no model", fix)
        moved = (folder / each.name for folder in (path, path.parent) for each in saved)
        place = next(filter(Path.exists, [*saved, *moved]), None)
        if place is None:
            raise UserError(f"RUN {path}", f"{saved[0]}, which it saved, is gone", "Run it again")
    if place.is_dir():
        return Masks(path, label, calibration, *_saved(path, place))
    from ..model.masks import read_packed, unpacked

    packed = read_packed(place)
    shapes = {name: shape for name, (shape, _) in packed.items()}
    return Masks(path, label, calibration, shapes, lambda name: ~unpacked({"": packed[name]})[""])


def _saved(path: Path, folder: Path) -> tuple[dict, Callable[[str], Tensor]]:
    """Return shapes and a reader of the matrices in a checkpoint's blocks, dense or packed."""
    from safetensors import SafetensorError, safe_open

    from ..packed.layout import kept_of

    config, shapes, files = folder / "config.json", {}, {}
    try:
        settings = json.loads(config.read_text("utf-8")) if config.is_file() else {}
        packed = (settings.get("quantization_config") or {}).get("linears") or {}
        for shard in sorted(folder.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():
                    files[name] = shard, tuple(file.get_slice(name).get_shape())
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"RUN {path}", f"it cannot be read ({error})", "Save it again") from error
    if not files:
        raise UserError(f"RUN {path}", "no *.safetensors are there", "Name a saved model")
    for name, (_, shape) in files.items():
        linear, _, part = name.rpartition(".")
        if block_and_linear(name) is None:
            continue
        if linear in packed and part == "mask":
            shapes[f"{linear}.weight"] = tuple(packed[linear][:2])
        elif linear not in packed and len(shape) in (2, 3):
            shapes[name] = shape

    def kept(name: str) -> Tensor:
        linear = name.removesuffix(".weight")
        stored = f"{linear}.mask" if linear in packed else name
        with safe_open(files[stored][0], framework="pt") as file:
            tensor = file.get_tensor(stored)
        return kept_of(tensor, shapes[name][1]) if linear in packed else tensor != 0

    return shapes, kept


def compare_masks(runs: Sequence[str | Path], noise: Sequence[str | Path] = ()) -> DataFrame:
    """Compare the masks of saved models, with a line for each pair, block and linear layer.

    Columns: the labels `a` and `b`; `seeds`, whether the two differ only in the seed; `block`,
    `linear`, `weights`, `kept_a`, `kept_b`, `both`, and `chance`, the value of `both` for
    independent masks. `noise[k]` is `runs[k]` with another seed. Raises UserError for too few or
    unreadable checkpoints, for different shapes, and if nothing is pruned.
    """
    import pandas

    if len(runs) < 2:
        raise UserError(f"RUN {runs[0]}", "a comparison takes two prunings", "Name two or more")
    if len(noise) > len(runs):
        problem = f"{len(noise)} folders for {len(runs)} RUNs are given"
        raise UserError("--noise", problem, "Give one each")
    masks = [masks_of(Path(path)) for path in (*runs, *noise)]
    seeds = [(k, len(runs) + k) for k in range(len(noise))]
    for run, other in ((masks[i], masks[j]) for i, j in seeds):
        if run.calibration and other.calibration and run.calibration != other.calibration:
            problem = f"calibrated on {other.calibration}, but {run.path} is on {run.calibration}"
            fix = "Give the RUNs with another seed, in the same order"
            raise UserError(f"--noise {other.path}", problem, fix)
        same_seed = run.calibration and run.label == other.label
        if same_seed or run.path.resolve() == other.path.resolve():
            problem = f"its seed is that of {run.path}"
            raise UserError(f"--noise {other.path}", problem, "Give another")
    labels = [each.label for each in masks]
    if len(set(labels)) < len(labels):
        labels = [str(each.path) for each in masks]
    lines = []
    for name, kept in _pruned_matrices(masks):
        block, linear = block_and_linear(name)
        for i, j in [*combinations(range(len(runs)), 2), *seeds]:
            a, b = kept[i], kept[j]
            line = {"a": labels[i], "b": labels[j], "seeds": (i, j) in seeds, "block": block}
            line |= {"linear": linear, "weights": a.numel(), "kept_a": int(a.sum())}
            line |= {"kept_b": int(b.sum()), "both": int((a & b).sum())}
            line["chance"] = line["kept_a"] * line["kept_b"] / line["weights"]
            lines.append(line)
    if not lines:
        fix = "Name pruned models, or the --save folders of runs that removed neurons or experts"
        raise UserError(f"RUN {runs[0]}", "no matrix has zeros in all RUNs", fix)
    keys = ["seeds", "a", "b", "block", "linear"]  # experts of one linear are added up
    return pandas.DataFrame(lines).groupby(keys, sort=False)[COUNTS].sum().reset_index()


def _pruned_matrices(masks: Sequence[Masks]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield (name, masks of all runs) of matrices that are pruned in all runs, block by block."""
    first = masks[0]
    for run in masks:
        if differing := first.shapes.items() ^ run.shapes.items():
            name = min(differing)[0]
            here, there = (each.shapes.get(name, "missing") for each in (run, first))
            problem = f"tensor {name} is {here} here but {there} in {first.path}"
            raise UserError(f"RUN {run.path}", problem, "Compare prunings of one model")
    with progress(len(first.shapes), "comparing", "matrix") as advance:
        for name in sorted(first.shapes, key=lambda name: (block_and_linear(name)[0], name)):
            kept = [each.read(name) for each in masks]
            advance(1)
            if all((~mask).float().mean() > MIN_ZEROS for mask in kept):
                yield name, kept


def shares(counts: DataFrame, *by: str) -> DataFrame:
    """Return shares of the counts summed `by` columns, with `seeds` if those were compared."""
    sums = counts.groupby(["seeds", *by], sort=False)[COUNTS].sum()
    kept = sums["kept_a"] + sums["kept_b"]
    of_all = (kept / (2 * sums["weights"])).to_frame("kept")
    of_all["both keep"] = 2 * sums["both"] / kept.clip(lower=1)
    of_all["chance"] = 2 * sums["chance"] / kept.clip(lower=1)
    between = of_all.loc[False]
    if counts["seeds"].any():
        seeds = of_all.loc[True]["both keep"]
        between = between.assign(seeds=seeds, excess=seeds - between["both keep"])
    return between


def _title(counts: DataFrame) -> str:
    between = counts[~counts["seeds"]]
    *first, last = dict.fromkeys([*between["a"], *between["b"]])
    return f"{_unit(counts)} that the masks of {', '.join(first)} and {last} share"


def _unit(counts: DataFrame) -> str:
    """Return the unit of the masks: Weights, Neurons or Experts."""
    kinds = set(counts["linear"])
    return kinds.pop().capitalize() if len(kinds) == 1 and kinds <= set(SMALLER) else "Weights"


def overlap_text(counts: DataFrame) -> str:
    """Return a comparison as Markdown: by pair, by block and by linear layer."""
    pair = counts["a"] + " and " + counts["b"] + counts["seeds"].map({True: " (seeds)", False: ""})
    tables = {"pair": shares(counts.assign(pair=pair, seeds=False), "pair")}
    tables |= {name: shares(counts, name) for name in ("block", "linear")}
    parts = [f"### {_title(counts)}"]
    for name, table in tables.items():
        body = [[str(key), *map("{:.1%}".format, line)] for key, *line in table.itertuples()]
        parts.append(padded_table([name, *table.columns], body))
    notes = (
        "- kept: share of all. both keep: share of the kept (mean of both masks) that both keep. "
        "chance: the same for independent masks."
    )
    if counts["seeds"].any():
        notes += (
            "\n- seeds: share that two seeds of one language both keep. excess: seeds minus both "
            "keep, the part of the difference that is due to the language."
        )
    return "\n\n".join([*parts, notes]) + "\n"


def draw(counts: DataFrame) -> Figure:
    """Return the heat map by block and linear layer, relative to the seeds if those were compared.

    For neurons and experts it is by block and pair.
    """
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    title, column, label, form, scale = _title(counts), "both keep", "kept by both, %", ".0f", {}
    if _unit(counts) != "Weights":
        counts = counts[~counts["seeds"]]
        counts = counts.assign(linear=counts["a"] + "\n" + counts["b"])
    elif counts["seeds"].any():
        title = "How much more two seeds share than two languages"
        column, label, form = "excess", "percentage points", "+.1f"
    cells = 100 * shares(counts, "block", "linear")[column].unstack(sort=False)
    values = cells.to_numpy()[~cells.isna().to_numpy()]
    low, high = values.min(), values.max()
    if column == "excess":  # colors around zero
        high = max(1e-6, abs(values).max())
        low, scale = -high, {"cmap": "PuOr_r"}
    size = max(7.0, 2.6 + 0.65 * cells.shape[1]), 2.8 + 0.28 * len(cells)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(textwrap.fill(title, int(9 * size[0])), fontsize=12, fontweight="bold")
    axes = figure.subplots()
    image = heat_map(axes, cells, Normalize(low, high), form, **scale)
    axes.set_ylabel("block")
    figure.colorbar(image, ax=axes, label=label)
    return figure


def main(argv: list[str]) -> None:
    parser = make_parser("overlap", __doc__)
    add = parser.add_argument
    add("--out", default="overlap", help="folder for the files (default: overlap)")
    text = "pruned model, folder of its run, or file of its masks"
    add("runs", nargs="+", metavar="RUN", help=text)
    text = "the RUNs with another seed, in order"
    add("--noise", nargs="+", default=[], metavar="RUN", help=text)
    args = parser.parse_args(argv)
    check_writable("--out", args.out)
    counts = compare_masks(args.runs, args.noise)
    out, text = Path(args.out), overlap_text(counts)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "overlap.csv", counts.to_csv(index=False))
    print(text)
    # the same figures give the same bytes
    draw(counts).savefig(out / "overlap.png", dpi=150, metadata={"Software": None})
    write_text(out / "overlap.md", f"{text}\n![overlap](overlap.png)\n")
    print(f"wrote {out}/overlap.md", file=sys.stderr)
