"""Masks read back from saved, pruned models: which weights are not zero, matrix by matrix.

Of runs that removed whole neurons: which neurons are left, block by block, from their results.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from lib.report.names import block_and_linear
from lib.report.results import RESULTS, Run, load_runs
from lib.util.bits import from_hex
from lib.util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MASK = "mask"  # the tensor beside the kept values of a packed linear
MIN_ZEROS = 0.01  # share of a matrix above which it counts as pruned


class PrunedCheckpoint:
    """A folder of safetensors, sharded or not, or a run folder that names one."""

    def __init__(self, path: str | Path, files: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        self.label = self.path.name
        self.calibration: str | None = None  # known where the path is a run folder
        folder = self._folder()
        self._packed = _packed_sizes(folder)
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
        saved = run.results.get("flags", {}).get("save_model")
        if not saved:
            raise UserError(f"RUN {self.path}: saved no model; run it again with --save_model")
        self.calibration = run.calibration
        self.label = f"{run.calibration} (seed {run.seed})"
        candidates = [Path(saved), self.path / saved, self.path.parent / Path(saved).name]
        folder = next((path for path in candidates if path.is_dir()), None)
        if folder is None:
            raise UserError(f"RUN {self.path}: its model {saved} is gone; run it again")
        return folder

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the matrices, two- or three-dimensional, inside the numbered blocks.

        The shape of a packed matrix is that of the dense one.
        """
        shapes = {}
        for name, file in self._file_of.items():
            shape = self._packed.get(name) or tuple(file.get_slice(name).get_shape())
            if block_and_linear(name) and len(shape) in (2, 3) and not name.endswith(f".{MASK}"):
                shapes[name] = shape
                if f"{name}.absmax" in self._file_of:
                    raise UserError(
                        f"RUN {self.path}: {name} is stored in 4 bits, where zeros can't be seen; "
                        "save the pruned model unquantised"
                    )
        return shapes

    def kept(self, name: str) -> Tensor:
        """The mask of a matrix: True where a weight is not zero, or where a packed one keeps it."""
        if name not in self._packed:
            return self._file_of[name].get_tensor(name) != 0
        from lib.packed.layout import kept_of

        mask = f"{name.rpartition('.')[0]}.{MASK}"
        if mask not in self._file_of:
            raise UserError(f"RUN {self.path}: there is no {mask}; save the packed model again")
        return kept_of(self._file_of[mask].get_tensor(mask), self._packed[name][1])


class PrunedNeurons:
    """A run folder that says which neurons of each block were removed; a PrunedCheckpoint to ask.

    A block's neurons are a matrix (1, neurons) by the name `layers.BLOCK.neurons`.
    """

    def __init__(self, run: Run) -> None:
        self.path = run.folder
        self.calibration = run.calibration
        self.label = f"{run.calibration} (seed {run.seed})"
        self._neurons = run.results["neurons"]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        count = len(self._neurons["removed"])
        return {f"layers.{index}.neurons": (1, self._neurons["before"]) for index in range(count)}

    def kept(self, name: str) -> Tensor:
        """The mask of a block's neurons (1, neurons): True where one is left."""
        import torch

        block, _ = block_and_linear(name)
        mask = torch.ones(1, self._neurons["before"], dtype=torch.bool)
        mask[0, sorted(from_hex(self._neurons["removed"][block]))] = False
        return mask


def open_pruned(path: str | Path, files: ExitStack) -> PrunedCheckpoint | PrunedNeurons:
    """The masks of a saved model's folder or of a run's; `files` closes what is opened."""
    folder = Path(path)
    if (folder / RESULTS).is_file() and not any(folder.glob("*.safetensors")):
        run = load_runs([folder])[0]
        if "neurons" in run.results:
            return PrunedNeurons(run)
    return PrunedCheckpoint(path, files)


def _packed_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """{weight: (out, in)} of the linears that are packed according to a checkpoint's config."""
    config = folder / "config.json"
    if not config.is_file():
        return {}
    try:
        quantization = json.loads(config.read_text("utf-8")).get("quantization_config") or {}
        linears = quantization.get("linears")
        if not isinstance(linears, dict):  # another way of storing weights
            return {}
        return {f"{name}.weight": (size[0], size[1]) for name, size in linears.items()}
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise UserError(
            f"RUN {folder}: config.json can't be read ({error}); save it again"
        ) from error


def pruned_matrices(
    checkpoints: Sequence[PrunedCheckpoint | PrunedNeurons],
) -> Iterator[tuple[str, list[Tensor] | None]]:
    """Yield (name, one mask for each checkpoint); None for a matrix that is not pruned in all.

    UserError: a tensor's shape differs between the checkpoints.
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
    for name in sorted(shapes[0], key=lambda name: (block_and_linear(name)[0], name)):
        masks = [checkpoint.kept(name) for checkpoint in checkpoints]
        pruned = all((~mask).float().mean() > MIN_ZEROS for mask in masks)
        yield name, masks if pruned else None


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape))
