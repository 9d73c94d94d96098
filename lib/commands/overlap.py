"""The share of weights, neurons or experts that two prunings both keep, and where languages differ.

    python -m lib.commands.overlap RUN_A RUN_B [RUN ...] [--noise RUN_A2 ...] [--out FOLDER]

A RUN is the folder of a saved, pruned model, or the `--save` folder of a run that saved one. For
each pruned matrix it shows the share of the kept weights that both masks keep, and the share that
chance would give; where whole neurons or experts were removed, and RUN is a `--save` folder, the
same of each block's. `--noise` names prunings that differ from RUN_A, RUN_B, ... (in this order) in
nothing but the seed: only a difference larger than theirs is due to the language.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.methods.sparsity import SMALLER
from lib.run import plots
from lib.run.results import NONE, RESULTS, read_results
from lib.util import command
from lib.util.errors import UserError
from lib.util.files import check_writable, write_text
from lib.util.markdown import padded_table
from lib.util.progress import progress

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor

MIN_ZEROS = 0.01  # share of a matrix above which it counts as pruned
COUNTS = ["weights", "kept_a", "kept_b", "both", "chance"]
Matrix = tuple[tuple[int, ...], "Callable[[], Tensor]"]  # its shape, and what is kept of it
NUMBERED = re.compile(r"(?:^|\.)(\d+)\.")


class Masks(NamedTuple):
    """The matrices of one RUN: weights of a checkpoint, or each block's neurons or experts."""

    path: Path
    label: str
    calibration: str | None  # the text, where it is known
    matrices: dict[str, Matrix]


def block_and_linear(name: str) -> tuple[int, str] | None:
    """`model.layers.3.mlp.experts.7.w1.weight` -> (3, `mlp.experts.*.w1`); None outside blocks."""
    match = NUMBERED.search(name)
    if match is None:
        return None
    path = name[match.end() :].removesuffix(".weight")
    return int(match[1]), re.sub(r"(?<![^.])\d+(?![^.])", "*", path).removesuffix(".*")


def read_masks(path: Path, files: ExitStack) -> Masks:
    """Open a RUN; `files` closes it. Raises UserError where it has no masks that can be read."""
    if not path.is_dir():
        raise UserError(f"RUN {path}: no such folder; name a saved model's folder")
    if not (path / RESULTS).is_file() or any(path.glob("*.safetensors")):
        return Masks(path, path.name, None, _saved_matrices(path, path, files))
    results = read_results(path)
    calibration = (results.get("calibration") or {}).get("name") or NONE
    label = f"{calibration} (seed {results.get('seed') or 0})"
    if smaller := results.get(kind := results["sparsity_type"]):
        return Masks(path, label, calibration, _of_blocks(smaller, kind))
    saved = results.get("flags", {}).get("save_model")
    if not saved:
        raise UserError(f"RUN {path}: saved no model; run it again with --save_model")
    name = Path(saved).name
    folder = next(filter(Path.is_dir, [Path(saved), path / name, path.parent / name]), None)
    if folder is None:
        raise UserError(f"RUN {path}: its model {saved} is gone; run it again")
    return Masks(path, label, calibration, _saved_matrices(path, folder, files))


def _of_blocks(smaller: Mapping[str, Any], kind: str) -> dict[str, Matrix]:
    """Return each block's neurons or experts as a matrix (1, number), where some were removed."""
    import torch

    def kept(removed: list[int]) -> Tensor:
        return ~torch.isin(torch.arange(smaller["before"]), torch.tensor(removed)).view(1, -1)

    return {
        f"layers.{block}.{kind}": ((1, smaller["before"]), partial(kept, removed))
        for block, removed in enumerate(smaller["removed"])
        if removed
    }


def _saved_matrices(path: Path, folder: Path, files: ExitStack) -> dict[str, Matrix]:
    """Return the matrices, two- or three-dimensional, in the blocks of a checkpoint."""
    from safetensors import SafetensorError, safe_open

    holder: dict[str, Any] = {}  # {tensor: the open file that holds it}
    config = folder / "config.json"
    try:
        for shard in sorted(folder.glob("*.safetensors")):
            file = files.enter_context(safe_open(shard, framework="pt"))
            holder.update(dict.fromkeys(file.keys(), file))
        settings = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"RUN {path}: can't be read ({error}); save it again") from error
    if not holder:
        raise UserError(f"RUN {path}: holds no *.safetensors; name a saved model's folder")
    packed = (settings.get("quantization_config") or {}).get("linears") or {}
    matrices: dict[str, Matrix] = {}
    for name, file in holder.items():
        shape, (linear, _, part) = tuple(file.get_slice(name).get_shape()), name.rpartition(".")
        if block_and_linear(name) is None or (linear in packed and part != "mask"):
            continue
        if linear in packed:
            rows, width = packed[linear][:2]
            matrices[f"{linear}.weight"] = ((rows, width), partial(_kept, file, name, width))
        elif len(shape) in (2, 3):
            matrices[name] = (shape, partial(_kept, file, name))
    return matrices


def _kept(file: Any, name: str, width: int | None = None) -> Tensor:
    """Return what a weight keeps, or with the `width` of a packed one what its mask keeps."""
    from lib.packed.layout import kept_of

    tensor = file.get_tensor(name)
    return tensor != 0 if width is None else kept_of(tensor, width)


def compare_masks(runs: Sequence[str | Path], noise: Sequence[str | Path] = ()) -> DataFrame:
    """Compare the masks of saved models, tensor by tensor: a line for each pair, block and linear.

    Columns: the labels `a` and `b`; `seeds`, whether the two differ in the seed alone; `block`,
    `linear`, `weights`, `kept_a`, `kept_b`, `both`, and `chance`, the value of `both` for
    independent masks. `noise[k]` is `runs[k]` with another seed. Raises UserError for too few or
    unreadable checkpoints, for other shapes, and where nothing is pruned.
    """
    import pandas

    if len(runs) < 2:
        raise UserError(f"RUN {runs[0]}: one pruning overlaps with nothing; name two or more")
    if len(noise) > len(runs):
        raise UserError(f"--noise: {len(noise)} folders for {len(runs)} RUNs; give one for each")
    lines = []
    with ExitStack() as files:
        masks = [read_masks(Path(path), files) for path in (*runs, *noise)]
        seeds = [(k, len(runs) + k) for k in range(len(noise))]
        for run, other in ((masks[i], masks[j]) for i, j in seeds):
            if run.calibration and other.calibration and run.calibration != other.calibration:
                raise UserError(
                    f"--noise {other.path}: calibrated on {other.calibration}, but {run.path} on "
                    f"{run.calibration}; give the RUNs with another seed, in the order of the RUNs"
                )
        labels = [each.label for each in masks]
        if len(set(labels)) < len(labels):
            labels = [str(each.path) for each in masks]
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
        raise UserError(
            f"RUN {runs[0]}: no matrix has zeros in all RUNs; name pruned models, or where whole "
            "neurons or experts were removed the runs' --save folders"
        )
    keys = ["seeds", "a", "b", "block", "linear"]  # experts of one linear are added up
    return pandas.DataFrame(lines).groupby(keys, sort=False)[COUNTS].sum().reset_index()


def _pruned_matrices(masks: Sequence[Masks]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield (name, a mask of each run) of the matrices that are pruned in all, block by block."""
    shapes = [{name: shape for name, (shape, _) in each.matrices.items()} for each in masks]
    for run, its in zip(masks, shapes, strict=True):
        if differing := shapes[0].items() ^ its.items():
            name = min(differing)[0]
            here, there = (shape.get(name, "missing") for shape in (its, shapes[0]))
            raise UserError(
                f"RUN {run.path}: tensor {name} is {here} here but {there} in {masks[0].path}; "
                "compare prunings of one model"
            )
    with progress(len(shapes[0]), "comparing", "matrix") as advance:
        for name in sorted(shapes[0], key=lambda name: (block_and_linear(name)[0], name)):
            kept = [each.matrices[name][1]() for each in masks]
            advance(1)
            if all((~mask).float().mean() > MIN_ZEROS for mask in kept):
                yield name, kept


def shares(counts: DataFrame, *by: str) -> DataFrame:
    """Return shares of the counts summed `by` columns, with `seeds` where those were compared."""
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
    """Return what the masks are of: Weights, or what whole ones were removed of."""
    kinds = set(counts["linear"])
    return kinds.pop().capitalize() if len(kinds) == 1 and kinds <= set(SMALLER) else "Weights"


def overlap_text(counts: DataFrame) -> str:
    """Return a comparison as Markdown: by pair, by block and by linear."""
    pair = counts["a"] + " and " + counts["b"] + counts["seeds"].map({True: " (seeds)", False: ""})
    tables = {"pair": shares(counts.assign(pair=pair, seeds=False), "pair")}
    tables |= {name: shares(counts, name) for name in ("block", "linear")}
    parts = [f"### {_title(counts)}"]
    for name, table in tables.items():
        body = [[str(key), *map("{:.1%}".format, line)] for key, *line in table.itertuples()]
        parts.append(padded_table([name, *table.columns], body))
    notes = (
        "- kept: share of all; both keep: share of what is kept, mean of the two masks, that both "
        "keep; chance: the same for independent masks."
    )
    if counts["seeds"].any():
        notes += (
            "\n- seeds: share that two seeds of one language both keep; excess: seeds minus both "
            "keep, the part of the difference that is due to the language."
        )
    return "\n\n".join([*parts, notes]) + "\n"


def draw(counts: DataFrame) -> Any:
    """Return the heat map: by block and linear, in points over the seeds where those were compared.

    Of neurons and experts by block and pair.
    """
    column, label = "both keep", "kept by both, %"
    if _unit(counts) != "Weights":
        counts = counts[~counts["seeds"]]
        counts = counts.assign(linear=counts["a"] + "\n" + counts["b"])
    elif counts["seeds"].any():
        column, label = "excess", "seeds share more than languages, points"
    cells = 100 * shares(counts, "block", "linear")[column].unstack(sort=False)
    return plots.overlap(cells, _title(counts), label, difference=column == "excess")


def main(argv: list[str]) -> None:
    parser = command.make_parser("overlap", __doc__, out=True)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="saved model, or its run")
    parser.add_argument(
        "--noise", nargs="+", default=[], metavar="RUN", help="the RUNs with another seed, in order"
    )
    args = parser.parse_args(argv)
    check_writable("--out", args.out)
    counts = compare_masks(args.runs, args.noise)
    out, text = Path(args.out), overlap_text(counts)
    out.mkdir(parents=True, exist_ok=True)
    counts.to_csv(out / "overlap.csv", index=False)
    print(text)
    if plots.can_draw():
        plots.save(draw(counts), out / "overlap.png")
        text += "\n![overlap](overlap.png)\n"
    write_text(out / "overlap.md", text)
    print(f"wrote {out}/overlap.md", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(command.run(main))
