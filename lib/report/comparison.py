"""Counts of the weights that several masks share: per matrix, summed by block and linear."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.report.masks import PrunedCheckpoint, PrunedNeurons, open_pruned, pruned_matrices
from lib.report.names import BlockLinear, block_and_linear
from lib.util.errors import UserError
from lib.util.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

Pruned = PrunedCheckpoint | PrunedNeurons
Pair = tuple[str, str]  # the labels of two runs
FIELDS = ("weights", "kept", "overlap", "chance", "noise", "excess")  # of a cell, in the files


@dataclass
class MaskCounts:
    """Weights that two masks keep and share, of one matrix or summed over several."""

    weights: int = 0
    kept_first: int = 0
    kept_second: int = 0
    both: int = 0
    expected: float = 0.0  # value of `both` for masks that are independent within each matrix

    def __iadd__(self, other: MaskCounts) -> MaskCounts:
        self.weights += other.weights
        self.kept_first += other.kept_first
        self.kept_second += other.kept_second
        self.both += other.both
        self.expected += other.expected
        return self

    @property
    def kept(self) -> float:
        """Share of the weights that a mask keeps, mean of the two."""
        return (self.kept_first + self.kept_second) / (2 * self.weights)

    @property
    def shared(self) -> float:
        """Share of the kept weights that both keep."""
        return 2 * self.both / max(1, self.kept_first + self.kept_second)

    @property
    def chance(self) -> float:
        """The value of `shared` for independent masks of the same sparsity."""
        return 2 * self.expected / max(1, self.kept_first + self.kept_second)


def count_masks(first: Tensor, second: Tensor) -> MaskCounts:
    """Count what two boolean tensors, True where a weight is kept, have in common."""
    weights, kept_first, kept_second = first.numel(), int(first.sum()), int(second.sum())
    return MaskCounts(
        weights=weights,
        kept_first=kept_first,
        kept_second=kept_second,
        both=int((first & second).sum()),
        expected=kept_first * kept_second / weights,
    )


def _total(counts: Iterable[MaskCounts]) -> MaskCounts:
    total = MaskCounts()
    for each in counts:
        total += each
    return total


@dataclass
class Cell:
    """Counts between the runs, and between seeds where those were given."""

    between: MaskCounts = field(default_factory=MaskCounts)
    seeds: MaskCounts = field(default_factory=MaskCounts)

    @property
    def noise(self) -> float | None:
        return self.seeds.shared if self.seeds.weights else None

    @property
    def excess(self) -> float | None:
        """How much less the runs share than two seeds do."""
        return None if self.noise is None else self.noise - self.between.shared

    def shares(self) -> dict[str, float | None]:
        """The figures by their names in the files."""
        return {
            "weights": self.between.weights,
            "kept": self.between.kept,
            "overlap": self.between.shared,
            "chance": self.between.chance,
            "noise": self.noise,
            "excess": self.excess,
        }


@dataclass
class Comparison:
    """Every figure of a comparison; the sums are over all pairs of runs."""

    runs: list[str]
    noise: list[str]
    matrices: dict[str, Cell]
    by_pair: dict[Pair, dict[str, MaskCounts]]  # of each pair of masks, by matrix

    @property
    def pairs(self) -> dict[Pair, MaskCounts]:
        """Counts of each pair of masks, those of two seeds included."""
        return {pair: _total(counts.values()) for pair, counts in self.by_pair.items()}

    def pair_blocks(self, pair: Pair) -> dict[int, MaskCounts]:
        """Counts of a pair of masks by block."""
        blocks: dict[int, MaskCounts] = {}
        for name, counts in self.by_pair[pair].items():
            sums = blocks.setdefault(block_and_linear(name)[0], MaskCounts())
            sums += counts
        return blocks

    @property
    def unit(self) -> str:
        """What the masks keep or drop: `neurons` or `weights`."""
        return "neurons" if all(name.endswith(".neurons") for name in self.matrices) else "weights"

    def by(self, key: Callable[[BlockLinear], Any]) -> dict[Any, Cell]:
        """Cells summed by `key` of a matrix's (block, linear)."""
        by_key: dict[Any, Cell] = {}
        for name, cell in self.matrices.items():
            sums = by_key.setdefault(key(block_and_linear(name)), Cell())
            sums.between += cell.between
            sums.seeds += cell.seeds
        return by_key

    @property
    def blocks(self) -> dict[int, Cell]:
        return self.by(lambda key: key[0])

    @property
    def linears(self) -> dict[str, Cell]:
        return self.by(lambda key: key[1])

    @property
    def title(self) -> str:
        masks = f"{', '.join(self.runs[:-1])} and {self.runs[-1]}"
        return f"{self.unit.capitalize()} that the masks of {masks} share"

    @property
    def whole(self) -> Cell:
        return self.by(lambda _: None)[None]

    def most_specific(self) -> list[tuple[int, Cell]]:
        """Blocks, those that differ most between the runs first."""
        blocks = self.blocks
        similarity = {
            block: cell.between.shared if cell.excess is None else -cell.excess
            for block, cell in blocks.items()
        }
        order = sorted(blocks, key=lambda block: (similarity[block], block))
        return [(block, blocks[block]) for block in order]


def compare_masks(runs: Sequence[str | Path], noise: Sequence[str | Path] = ()) -> Comparison:
    """Compare the masks of saved models, streaming tensor by tensor.

    `noise[k]` is `runs[k]` with another seed. UserError: too few or unreadable checkpoints, other
    shapes, nothing pruned.
    """
    if len(runs) < 2:
        raise UserError(f"RUN {runs[0]}: one pruning overlaps with nothing; name two or more")
    if len(noise) > len(runs):
        raise UserError(f"--noise: {len(noise)} folders for {len(runs)} RUNs; give one for each")
    with ExitStack() as files:
        checkpoints = [open_pruned(path, files) for path in (*runs, *noise)]
        labels = _labels(checkpoints)
        between = list(combinations(range(len(runs)), 2))
        seeds = [(k, len(runs) + k) for k in range(len(noise))]
        _check_seeds([(checkpoints[i], checkpoints[j]) for i, j in seeds])
        result = Comparison(labels[: len(runs)], labels[len(runs) :], {}, {})
        with progress(len(checkpoints[0].shapes()), "comparing", "matrix") as advance:
            for name, kept in pruned_matrices(checkpoints):
                advance(1)
                if kept is None:
                    continue
                cell = result.matrices[name] = Cell()
                for i, j in between + seeds:
                    counts = count_masks(kept[i], kept[j])
                    sums = cell.between if j < len(runs) else cell.seeds
                    sums += counts
                    result.by_pair.setdefault((labels[i], labels[j]), {})[name] = counts
    if not result.matrices:
        raise UserError(
            f"RUN {runs[0]}: no matrix has zeros in all RUNs; name pruned models, or where whole "
            "neurons were removed the runs' --save folders"
        )
    return result


def _check_seeds(pairs: Sequence[tuple[Pruned, Pruned]]) -> None:
    """UserError where a run and its noise run are known to be calibrated on different texts."""
    for run, other in pairs:
        known = run.calibration is not None and other.calibration is not None
        if known and run.calibration != other.calibration:
            raise UserError(
                f"--noise {other.path}: calibrated on {other.calibration}, but {run.path} on "
                f"{run.calibration}; give the RUNs with another seed, in the order of the RUNs"
            )


def _labels(checkpoints: Sequence[Pruned]) -> list[str]:
    """Short labels, or the paths where those would not be unique."""
    labels = [checkpoint.label for checkpoint in checkpoints]
    if len(set(labels)) < len(labels):
        labels = [str(checkpoint.path) for checkpoint in checkpoints]
    return labels
