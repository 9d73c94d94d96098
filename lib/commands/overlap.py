"""The share of weights, or of neurons, that two prunings both keep, and where languages differ.

    python -m lib.commands.overlap RUN_A RUN_B [RUN ...] [--noise RUN_A2 ...] [--out FOLDER]

A RUN is the folder of a saved, pruned model, or the `--save` folder of a run that saved one. For
each pruned matrix it shows the share of the kept weights that both masks keep, and the share that
chance would give; where whole neurons were removed, and RUN is a `--save` folder, the same of each
block's neurons. `--noise` names prunings that differ from RUN_A, RUN_B, ... (in this order) in
nothing but the seed: only a difference larger than theirs is due to the language.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.run.results import NONE, RESULTS, read_results
from lib.util import command
from lib.util.errors import UserError
from lib.util.files import check_writable, write_text
from lib.util.markdown import padded_table
from lib.util.progress import progress

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor

MASK = ".mask"  # ends the name of the tensor beside the kept values of a packed linear
MIN_ZEROS = 0.01  # share of a matrix above which it counts as pruned
COUNTS = ["weights", "kept_a", "kept_b", "both", "chance"]
NUMBERED = re.compile(r"(?:^|\.)(\d+)\.")


def block_and_linear(name: str) -> tuple[int, str] | None:
    """`model.layers.3.mlp.experts.7.w1.weight` -> (3, `mlp.experts.*.w1`); None outside blocks."""
    match = NUMBERED.search(name)
    if match is None:
        return None
    path = name[match.end() :].removesuffix(".weight")
    return int(match[1]), re.sub(r"(?<![^.])\d+(?![^.])", "*", path).removesuffix(".*")


class Masks:
    """The masks of one RUN, by the name of their matrix: weights of a checkpoint, or neurons.

    A block's neurons are a matrix (1, neurons) by the name `layers.BLOCK.neurons`.
    """

    def __init__(self, path: str | Path, files: ExitStack) -> None:
        self.path = Path(path)
        self.label, self.calibration = self.path.name, None
        self.neurons: Mapping[str, Any] | None = None
        self.packed: dict[str, tuple[int, int]] = {}  # {weight: (out, in)} of packed linears
        self.files: dict[str, Any] = {}  # {tensor: the open file that holds it}
        if not self.path.is_dir():
            raise UserError(f"RUN {path}: no such folder; name a saved model's folder")
        folder = self.path
        if (folder / RESULTS).is_file() and not any(folder.glob("*.safetensors")):
            results = read_results(folder)
            self.calibration = (results.get("calibration") or {}).get("name") or NONE
            self.label = f"{self.calibration} (seed {results.get('seed') or 0})"
            self.neurons = results.get("neurons")
            if self.neurons:
                return
            folder = self._saved_model(results)
        self.packed = self._packed_sizes(folder)
        self._open(folder, files)

    def _saved_model(self, results: Mapping[str, Any]) -> Path:
        saved = results.get("flags", {}).get("save_model")
        if not saved:
            raise UserError(f"RUN {self.path}: saved no model; run it again with --save_model")
        candidates = [Path(saved), self.path / saved, self.path.parent / Path(saved).name]
        folder = next((path for path in candidates if path.is_dir()), None)
        if folder is None:
            raise UserError(f"RUN {self.path}: its model {saved} is gone; run it again")
        return folder

    def _packed_sizes(self, folder: Path) -> dict[str, tuple[int, int]]:
        config = folder / "config.json"
        try:
            text = config.read_text("utf-8") if config.is_file() else "{}"
            linears = (json.loads(text).get("quantization_config") or {}).get("linears")
            if not isinstance(linears, dict):  # dense, or another way of storing weights
                return {}
            return {f"{name}.weight": (size[0], size[1]) for name, size in linears.items()}
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            problem = f"RUN {self.path}: config.json can't be read ({error}); save it again"
            raise UserError(problem) from error

    def _open(self, folder: Path, files: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        for shard in sorted(folder.glob("*.safetensors")):
            try:
                file = files.enter_context(safe_open(shard, framework="pt"))
            except (SafetensorError, OSError) as error:
                problem = f"RUN {self.path}: {shard.name} can't be read ({error}); save it again"
                raise UserError(problem) from error
            self.files.update(dict.fromkeys(file.keys(), file))
        if not self.files:
            raise UserError(f"RUN {self.path}: holds no *.safetensors; name a saved model's folder")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {name: dense shape} of the matrices, two- or three-dimensional, in the blocks."""
        if self.neurons:
            blocks = range(len(self.neurons["removed"]))
            return {f"layers.{index}.neurons": (1, self.neurons["before"]) for index in blocks}
        shapes = {}
        for name, file in self.files.items():
            shape = self.packed.get(name) or tuple(file.get_slice(name).get_shape())
            if block_and_linear(name) and len(shape) in (2, 3) and not name.endswith(MASK):
                shapes[name] = shape
                if f"{name}.absmax" in self.files:
                    raise UserError(
                        f"RUN {self.path}: {name} is stored in 4 bits, where zeros can't be seen; "
                        "save the pruned model unquantised"
                    )
        return shapes

    def kept(self, name: str) -> Tensor:
        """Return the mask of a matrix: True where a weight or neuron is kept."""
        import torch

        if self.neurons:
            kept = torch.ones(1, self.neurons["before"], dtype=torch.bool)
            removed = self.neurons["removed"][block_and_linear(name)[0]]
            kept[0, removed if isinstance(removed, list) else _from_hex(removed)] = False
            return kept
        if name not in self.packed:
            return self.files[name].get_tensor(name) != 0
        from lib.packed.layout import kept_of

        mask = name.removesuffix(".weight") + MASK
        if mask not in self.files:
            raise UserError(f"RUN {self.path}: there is no {mask}; save the packed model again")
        return kept_of(self.files[mask].get_tensor(mask), self.packed[name][1])


def _from_hex(text: str) -> list[int]:
    """Read a set of numbers as earlier versions wrote it: four to a digit, the lowest first."""
    digits = ((place, int(digit, 16)) for place, digit in enumerate(text))
    return [4 * place + bit for place, digit in digits for bit in range(4) if digit >> bit & 1]


def compare_masks(runs: Sequence[str | Path], noise: Sequence[str | Path] = ()) -> DataFrame:
    """Compare the masks of saved models, tensor by tensor: a line for each pair, block and linear.

    Columns: `a` and `b`, the labels of the two; `seeds`, whether they differ in the seed alone;
    `block`, `linear`; `weights` of one of them, `kept_a`, `kept_b`, `both`, and `chance`, the value
    of `both` for masks that are independent within each matrix. `noise[k]` is `runs[k]` with
    another seed. Raises UserError for too few or unreadable checkpoints, for other shapes, and
    where nothing is pruned.
    """
    import pandas

    if len(runs) < 2:
        raise UserError(f"RUN {runs[0]}: one pruning overlaps with nothing; name two or more")
    if len(noise) > len(runs):
        raise UserError(f"--noise: {len(noise)} folders for {len(runs)} RUNs; give one for each")
    lines = []
    with ExitStack() as files:
        masks = [Masks(path, files) for path in (*runs, *noise)]
        seeds = [(k, len(runs) + k) for k in range(len(noise))]
        _check_seeds(masks, seeds)
        labels = [each.label for each in masks]
        if len(set(labels)) < len(labels):
            labels = [str(each.path) for each in masks]
        for name, kept in _pruned_matrices(masks):
            block, linear = block_and_linear(name)
            for i, j in [*combinations(range(len(runs)), 2), *seeds]:
                line = {"a": labels[i], "b": labels[j], "seeds": (i, j) in seeds}
                line |= {"block": block, "linear": linear, "weights": kept[i].numel()}
                line |= {"kept_a": int(kept[i].sum()), "kept_b": int(kept[j].sum())}
                line["both"] = int((kept[i] & kept[j]).sum())
                line["chance"] = line["kept_a"] * line["kept_b"] / line["weights"]
                lines.append(line)
    if not lines:
        raise UserError(
            f"RUN {runs[0]}: no matrix has zeros in all RUNs; name pruned models, or where whole "
            "neurons were removed the runs' --save folders"
        )
    keys = ["seeds", "a", "b", "block", "linear"]  # experts of one linear are added up
    return pandas.DataFrame(lines).groupby(keys, sort=False)[COUNTS].sum().reset_index()


def _check_seeds(masks: Sequence[Masks], seeds: Sequence[tuple[int, int]]) -> None:
    """Raise UserError where a run and its noise run are known to be calibrated on other texts."""
    for run, other in ((masks[i], masks[j]) for i, j in seeds):
        known = run.calibration is not None and other.calibration is not None
        if known and run.calibration != other.calibration:
            raise UserError(
                f"--noise {other.path}: calibrated on {other.calibration}, but {run.path} on "
                f"{run.calibration}; give the RUNs with another seed, in the order of the RUNs"
            )


def _pruned_matrices(all_masks: Sequence[Masks]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield (name, a mask of each run) of the matrices that are pruned in all, block by block."""
    first, *others = shapes = [masks.shapes() for masks in all_masks]
    for masks, its in zip(all_masks[1:], others, strict=True):
        for name in sorted(first.keys() | its.keys()):
            if its.get(name) != first.get(name):
                raise UserError(
                    f"RUN {masks.path}: tensor {name} is {_shape(its.get(name))} here but "
                    f"{_shape(first.get(name))} in {all_masks[0].path}; compare prunings of one "
                    "model"
                )
    with progress(len(shapes[0]), "comparing", "matrix") as advance:
        for name in sorted(first, key=lambda name: (block_and_linear(name)[0], name)):
            kept = [masks.kept(name) for masks in all_masks]
            advance(1)
            if all((~mask).float().mean() > MIN_ZEROS for mask in kept):
                yield name, kept


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape))


def shares(counts: DataFrame, by: str | list[str]) -> DataFrame:
    """Return shares of the counts summed `by` columns.

    `kept` of the weights, mean of both masks; of the kept weights those that `both keep`, and the
    share that `chance` gives; where seeds were compared, the share that those have (`seeds`) and
    how much more that is (`excess`).
    """
    between = _shares(counts[~counts["seeds"]], by)
    if counts["seeds"].any():
        between["seeds"] = _shares(counts[counts["seeds"]], by)["both keep"]
        between["excess"] = between["seeds"] - between["both keep"]
    return between


def _shares(counts: DataFrame, by: str | list[str]) -> DataFrame:
    import pandas

    sums = counts.groupby(by, sort=False)[COUNTS].sum()
    kept = sums["kept_a"] + sums["kept_b"]
    both, chance = (2 * sums[name] / kept.clip(lower=1) for name in ("both", "chance"))
    columns = {"kept": kept / (2 * sums["weights"]), "both keep": both, "chance": chance}
    return pandas.DataFrame(columns)


def _unit(counts: DataFrame) -> str:
    return "neurons" if (counts["linear"] == "neurons").all() else "weights"


def _title(counts: DataFrame) -> str:
    between = counts[~counts["seeds"]]
    *first, last = dict.fromkeys([*between["a"], *between["b"]])
    return f"{_unit(counts).capitalize()} that the masks of {', '.join(first)} and {last} share"


def overlap_text(counts: DataFrame) -> str:
    """Return a comparison as Markdown: by pair, by block and by linear."""
    unit = _unit(counts)
    pair = counts["a"] + " and " + counts["b"] + counts["seeds"].map({True: " (seeds)", False: ""})
    parts = [f"### {_title(counts)}", _table("pair", _shares(counts.assign(pair=pair), "pair"))]
    by = ["block"] if unit == "neurons" else ["block", "linear"]
    parts += [_table(name, shares(counts, name)) for name in by]
    notes = [
        f"- kept: share of the {unit}; both keep: share of the kept {unit}, mean of the two masks, "
        "that both keep; chance: the same for independent masks."
    ]
    if counts["seeds"].any():
        notes.append(
            "- seeds: share that two seeds of one language both keep; excess: seeds minus both "
            "keep, the part of the difference that is due to the language."
        )
    return "\n\n".join([*parts, "\n".join(notes)]) + "\n"


def _table(name: str, found: DataFrame) -> str:
    lines = zip(found.index, found.to_numpy(), strict=True)
    body = [[str(key), *(f"{share:.1%}" for share in line)] for key, line in lines]
    return padded_table([name, *found.columns], body)


def draw(counts: DataFrame) -> Any:
    """Return the heat map: what masks share by block and linear, of neurons by block and pair.

    Where seeds were compared it shows the excess, in points.
    """
    from lib.run import plots

    if _unit(counts) == "neurons":
        named = counts.assign(pair=counts["a"] + "\n" + counts["b"])
        cells = _shares(named, ["block", "pair"])["both keep"].unstack(sort=False)
        return plots.overlap(100 * cells, _title(counts), "kept by both, %")
    found = shares(counts, ["block", "linear"])
    has_seeds = "excess" in found
    cells = 100 * found["excess" if has_seeds else "both keep"].unstack(sort=False)
    short = [name.rpartition(".")[2] for name in cells.columns]
    cells.columns = short if len(set(short)) == len(short) else cells.columns
    label = "seeds share more than languages, points" if has_seeds else "kept by both, %"
    return plots.overlap(cells, _title(counts), label, difference=has_seeds)


def write_overlap(counts: DataFrame, out: str | Path) -> list[Path]:
    """Write overlap.md, .csv and .png into folder `out`; return their paths."""
    from lib.run import plots

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    text, table, picture = (out / f"overlap.{suffix}" for suffix in ("md", "csv", "png"))
    counts.to_csv(table, index=False)
    if not plots.can_draw():
        write_text(text, overlap_text(counts))
        return [text, table]
    write_text(text, f"{overlap_text(counts)}\n![overlap]({picture.name})\n")
    return [text, table, plots.save(draw(counts), picture)]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lib.commands.overlap", description=__doc__.split("\n")[0]
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="saved model, or its run")
    parser.add_argument(
        "--noise", nargs="+", default=[], metavar="RUN", help="the RUNs with another seed, in order"
    )
    parser.add_argument("--out", default="overlap", help="folder for the files (default: overlap)")
    command.add_debug_flag(parser)
    args = parser.parse_args(argv)
    check_writable("--out", args.out)
    counts = compare_masks(args.runs, args.noise)
    for path in write_overlap(counts, args.out):
        print(f"wrote {path}", file=sys.stderr)
    print(overlap_text(counts))


if __name__ == "__main__":
    sys.exit(command.run(main))
