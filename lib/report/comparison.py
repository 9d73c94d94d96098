"""How much several masks have in common: counted per matrix, added up by block and linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.report.masks import Checkpoint, pruned_matrices
from lib.report.names import Place, place
from lib.util.errors import UserError
from lib.util.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

FIELDS = ("weights", "kept", "overlap", "chance", "noise", "excess")


@dataclass
class Count:
    """What two masks share, in weights; of one matrix, or added up over several."""

    weights: int = 0
    kept_first: int = 0
    kept_second: int = 0
    both: int = 0
    expected: float = 0.0  # of `both`, were the masks independent within each matrix

    def __iadd__(self, other: Count) -> Count:
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
        """What `shared` would be for independent masks of the same sparsity."""
        return 2 * self.expected / max(1, self.kept_first + self.kept_second)


def count(first: Tensor, second: Tensor) -> Count:
    """Count what two boolean tensors, True where a weight is kept, have in common."""
    weights, a, b = first.numel(), int(first.sum()), int(second.sum())
    return Count(weights, a, b, int((first & second).sum()), a * b / weights)


@dataclass
class Cell:
    """What masks share between the runs, and between seeds where those were given."""

    between: Count = field(default_factory=Count)
    seeds: Count = field(default_factory=Count)

    @property
    def noise(self) -> float | None:
        return self.seeds.shared if self.seeds.weights else None

    @property
    def excess(self) -> float | None:
        """By how much less the runs share than two seeds do."""
        return None if self.noise is None else self.noise - self.between.shared

    def shares(self) -> dict[str, float | None]:
        """The figures under the names they have in the files, FIELDS."""
        c = self.between
        figures = (c.weights, c.kept, c.shared, c.chance, self.noise, self.excess)
        return dict(zip(FIELDS, figures, strict=True))


@dataclass
class Comparison:
    """Every figure of a comparison; the sums are over all pairs of runs."""

    runs: list[str]
    noise: list[str]
    matrices: dict[str, Cell]
    pairs: dict[tuple[str, str], Count]

    def by(self, key: Callable[[Place], Any]) -> dict[Any, Cell]:
        """Cells added up by what `key` makes of a matrix's (block, linear)."""
        found: dict[Any, Cell] = {}
        for name, cell in self.matrices.items():
            sums = found.setdefault(key(place(name)), Cell())
            sums.between += cell.between
            sums.seeds += cell.seeds
        return found

    @property
    def blocks(self) -> dict[int, Cell]:
        return self.by(lambda where: where[0])

    @property
    def linears(self) -> dict[str, Cell]:
        return self.by(lambda where: where[1])

    @property
    def title(self) -> str:
        return f"What the masks of {', '.join(self.runs[:-1])} and {self.runs[-1]} share"

    @property
    def whole(self) -> Cell:
        return self.by(lambda _: None)[None]

    def most_specific(self) -> list[tuple[int, Cell]]:
        """Blocks, those that differ most between the runs first."""
        blocks = self.blocks
        worth = {b: c.between.shared if c.excess is None else -c.excess for b, c in blocks.items()}
        return [(block, blocks[block]) for block in sorted(blocks, key=lambda b: (worth[b], b))]


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
        checkpoints = [Checkpoint(path, files) for path in (*runs, *noise)]
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
                    counted = count(kept[i], kept[j])
                    sums = cell.between if j < len(runs) else cell.seeds
                    sums += counted
                    pair = result.pairs.setdefault((labels[i], labels[j]), Count())
                    pair += counted
    if not result.matrices:
        raise UserError(f"RUN {runs[0]}: no matrix has zeros in all RUNs; name pruned models")
    return result


def _check_seeds(pairs: Sequence[tuple[Checkpoint, Checkpoint]]) -> None:
    for run, other in pairs:
        known = run.calibration is not None and other.calibration is not None
        if known and run.calibration != other.calibration:
            raise UserError(
                f"--noise {other.path}: calibrated on {other.calibration}, but {run.path} on "
                f"{run.calibration}; give the RUNs with another seed, in the order of the RUNs"
            )


def _labels(checkpoints: Sequence[Checkpoint]) -> list[str]:
    labels = [checkpoint.label for checkpoint in checkpoints]
    if len(set(labels)) < len(labels):
        labels = [str(checkpoint.path) for checkpoint in checkpoints]
    return labels
