"""How much several masks have in common: counted per matrix, added up by block and linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.report.names import place
from lib.report.results import RESULTS, load_runs
from lib.util.errors import UserError
from lib.util.progress import progress

if TYPE_CHECKING:
    from torch import Tensor
if TYPE_CHECKING:
    from torch import Tensor


Place = tuple[int, str]  # block, linear
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
    def overlap(self) -> float:
        """Share of the kept weights that both keep."""
        return 2 * self.both / max(1, self.kept_first + self.kept_second)

    @property
    def chance(self) -> float:
        """What `overlap` would be for independent masks of the same sparsity."""
        return 2 * self.expected / max(1, self.kept_first + self.kept_second)


def compare(first: Tensor, second: Tensor) -> Count:
    """Count what two boolean tensors, True where a weight is kept, have in common."""
    weights, a, b = first.numel(), int(first.sum()), int(second.sum())
    return Count(weights, a, b, int((first & second).sum()), a * b / weights)


@dataclass
class Cell:
    """Overlap between the runs, and between seeds where those were given."""

    between: Count = field(default_factory=Count)
    seeds: Count = field(default_factory=Count)

    @property
    def noise(self) -> float | None:
        return self.seeds.overlap if self.seeds.weights else None

    @property
    def excess(self) -> float | None:
        """By how much less the runs share than two seeds do."""
        return None if self.noise is None else self.noise - self.between.overlap

    def record(self) -> dict[str, Any]:
        """The figures as shares, for the files."""
        c = self.between
        return dict(
            zip(
                FIELDS,
                (c.weights, c.kept, c.overlap, c.chance, self.noise, self.excess),
                strict=True,
            )
        )


@dataclass
class Overlap:
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
    def whole(self) -> Cell:
        return self.by(lambda _: None)[None]

    def most_specific(self) -> list[tuple[int, Cell]]:
        """Blocks, those that differ most between the runs first."""
        blocks = self.by(lambda where: where[0])
        worth = {b: c.between.overlap if c.excess is None else -c.excess for b, c in blocks.items()}
        return [(block, blocks[block]) for block in sorted(blocks, key=lambda b: (worth[b], b))]


def overlap(runs: Sequence[str | Path], noise: Sequence[str | Path] = ()) -> Overlap:
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
        result = Overlap(labels[: len(runs)], labels[len(runs) :], {}, {})
        with progress(len(checkpoints[0].shapes()), "comparing", "matrix") as advance:
            for name, kept in pruned_matrices(checkpoints):
                advance(1)
                if kept is None:
                    continue
                cell = result.matrices[name] = Cell()
                for i, j in between + seeds:
                    count = compare(kept[i], kept[j])
                    sums = cell.between if j < len(runs) else cell.seeds
                    sums += count
                    pair = result.pairs.setdefault((labels[i], labels[j]), Count())
                    pair += count
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


def finding(found: Overlap) -> str:
    """The sentence that a picture of the comparison has over it."""
    whole = found.whole
    said = f"{', '.join(found.runs[:-1])} and {found.runs[-1]} share {whole.between.overlap:.1%}"
    said += f" of the weights they keep (chance {whole.between.chance:.1%}"
    said += f", two seeds {whole.noise:.1%})" if whole.noise is not None else ")"
    block, cell = found.most_specific()[0]
    if cell.between.both == cell.between.kept_first == cell.between.kept_second:
        return f"{said}; no block differs"
    if cell.excess is None:
        return f"{said}; block {block} shares least ({cell.between.overlap:.1%})"
    if cell.excess <= 0:
        return f"{said}; no block differs more between languages than between seeds"
    return f"{said}; block {block} is most language-specific ({100 * cell.excess:+.1f} points)"


POSITIONS = "positions"  # the tensor that stands beside the values of a packed 2:4 linear
FEWEST_ZEROS = 0.01  # share of a matrix from which on it counts as pruned


class Checkpoint:
    """A folder of safetensors, sharded or not, or a run folder that names one."""

    def __init__(self, path: str | Path, files: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        self.label = self.path.name
        self.calibration: str | None = None  # known where the path is a run folder
        folder = self._folder()
        self._file_of = {}  # tensor name -> open file
        for shard in sorted(folder.glob("*.safetensors")):
            try:
                file = files.enter_context(safe_open(shard, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"RUN {self.path}: {shard.name} can't be read ({error}); save it again"
                ) from error
            self._file_of.update(dict.fromkeys(file.keys(), file))
        if not self._file_of:
            raise UserError(f"RUN {self.path}: holds no *.safetensors; name a saved model's folder")

    def _folder(self) -> Path:
        if not self.path.is_dir():
            raise UserError(f"RUN {self.path}: no such folder; name a saved model's folder")
        if any(self.path.glob("*.safetensors")) or not (self.path / RESULTS).is_file():
            return self.path
        run = load_runs([self.path])[0]
        saved = run.record.get("flags", {}).get("save_model")
        if not saved:
            raise UserError(f"RUN {self.path}: saved no model; run it again with --save_model")
        self.calibration = run.calibration
        self.label = f"{run.calibration} (seed {run.seed})"
        choices = [Path(saved), self.path / saved, self.path.parent / Path(saved).name]
        found = next((choice for choice in choices if choice.is_dir()), None)
        if found is None:
            raise UserError(f"RUN {self.path}: its model {saved} is gone; run it again")
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The matrices, two- or three-dimensional, inside the numbered blocks, by name.

        A packed 2:4 matrix has the shape of the dense one it stands for.
        """
        found = {}
        for name, file in self._file_of.items():
            shape = tuple(file.get_slice(name).get_shape())
            if place(name) and len(shape) in (2, 3) and not name.endswith(f".{POSITIONS}"):
                packed = self._positions(name) is not None
                found[name] = (shape[0], 2 * shape[1]) if packed else shape
                if f"{name}.absmax" in self._file_of:
                    raise UserError(
                        f"RUN {self.path}: {name} is stored in 4 bits, its zeros can't be told; "
                        "save the pruned model unquantised"
                    )
        return found

    def kept(self, name: str) -> Tensor:
        """True where a weight of this matrix is not zero."""
        weight, positions = self._file_of[name].get_tensor(name), self._positions(name)
        if positions is not None:
            from lib.packed.layout import unpack

            weight = unpack(weight, self._file_of[positions].get_tensor(positions))
        return weight != 0

    def _positions(self, name: str) -> str | None:
        """The tensor that says where the values of a packed 2:4 matrix belong, if it is one."""
        positions = f"{name.rpartition('.')[0]}.{POSITIONS}"
        return positions if name.endswith(".weight") and positions in self._file_of else None


def pruned_matrices(
    checkpoints: Sequence[Checkpoint],
) -> Iterator[tuple[str, list[Tensor] | None]]:
    """(name, what each checkpoint keeps) of each matrix; None for one that is not pruned in all.

    UserError naming the tensor where the checkpoints are not of one shape.
    """
    shapes = [checkpoint.shapes() for checkpoint in checkpoints]
    first = checkpoints[0]
    for checkpoint, mine in zip(checkpoints[1:], shapes[1:], strict=True):
        for name in sorted(shapes[0].keys() | mine.keys()):
            if mine.get(name) != shapes[0].get(name):
                raise UserError(
                    f"RUN {checkpoint.path}: tensor {name} is {_shape(mine.get(name))} here but "
                    f"{_shape(shapes[0].get(name))} in {first.path}; compare prunings of one model"
                )
    for name in sorted(shapes[0], key=lambda name: (place(name)[0], name)):
        masks = [checkpoint.kept(name) for checkpoint in checkpoints]
        pruned = all((~mask).float().mean() > FEWEST_ZEROS for mask in masks)
        yield name, masks if pruned else None


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape))
