"""The folder of `--offload`: a part of it for each process, with room, emptied at the end."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import modeling_utils

from lib.errors import UserError
from lib.parallel import Team
from lib.save import check_room


@contextmanager
def own_folder(path: str, team: Team) -> Iterator[str]:
    """A folder in `path` for this process alone, empty, that goes when the block ends.

    So does `path` if nothing else is in it. What a killed run left in it is removed. UserError
    where another run uses it.
    """
    folder = Path(path) / f"process-{team.rank}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "in-use").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--offload {path}: another run uses it; name another folder") from None
        if team.watch:
            team.watch.leftovers.append(folder)
        for left in folder.glob("*.safetensors"):
            left.unlink()
        try:
            yield str(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # not empty: it holds more than this
                Path(path).rmdir()


@contextmanager
def unmapped() -> Iterator[None]:
    """Inside, transformers reads checkpoints instead of mapping them into memory.

    It goes through all weights once, also those that stay on disk; pages that are mapped would all
    stay resident until it is done.
    """
    mapped = modeling_utils.safe_open

    def read(*args, **kwargs):
        return mapped(*args, **kwargs | {"backend": "pread"})

    modeling_utils.safe_open = read
    try:
        yield
    finally:
        modeling_utils.safe_open = mapped


def check_offload_room(
    path: str,
    model: str,
    skeleton: nn.Module,
    blocks_name: str,
    loaded: torch.dtype,
    rounding: torch.dtype,
) -> None:
    """UserError where the disk of `path` can't hold the pruned blocks.

    Besides these, in `rounding`, weights that stand under another name in the files of a local
    `model` (experts that are fused on loading) are written there as they are `loaded`.
    """
    stored = _names(model)
    needed = 0
    for name, parameter in skeleton.get_submodule(blocks_name).named_parameters():
        needed += parameter.numel() * rounding.itemsize
        if stored and f"{blocks_name}.{name}" not in stored:
            needed += parameter.numel() * loaded.itemsize
    check_room("--offload", path, needed)


def _names(model: str) -> set[str]:
    names: set[str] = set()
    for file in Path(model).glob("*.safetensors") if Path(model).is_dir() else ():
        with safe_open(file, "pt") as stored:
            names.update(stored.keys())
    return names
