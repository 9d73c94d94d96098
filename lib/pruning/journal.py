"""Pruned blocks kept as they are done, so that an interrupted run goes on where it stood.

The folder holds job.json (what decides the run's result) and a safetensors file
for each finished block, written beside and renamed, with a checksum of its tensors. The same
command takes them up again; hidden states are computed anew through the finished blocks. Where the
recovery that follows pruning stands is kept in a file of its own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.util.errors import UserError
from lib.util.files import check_output_folder, write_text

JOB = "job.json"
TRAINING = "recovery.safetensors"


class Journal:
    """Finished blocks of one job, in a folder of their own.

    `begun`: what the job in it was begun as (see lib/run/fingerprint.py); None for a new folder.
    UserError where the folder holds something else, or can't be read.
    """

    def __init__(self, folder: str) -> None:
        check_output_folder("--resume", folder, mark=JOB)
        self.folder = Path(folder)
        known = self.folder / JOB
        self.begun: dict[str, Any] | None = _read_job(known, folder) if known.is_file() else None

    def begin(self, job: dict[str, Any]) -> None:
        """Note what the job is, before its first block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / JOB, json.dumps(job, indent=2, ensure_ascii=False))

    def read(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Block `index` as it was pruned, and its notes; None where it is missing or damaged."""
        kept = self._read(self._file(index), "its block is pruned again")
        return kept and (kept[0], json.loads(kept[1].get("notes", "{}")))

    def write(self, index: int, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Keep block `index` and its notes, whole or not at all."""
        what = f"block {index}", "the blocks before it are"
        self._write(self._file(index), tensors, *what, {"notes": json.dumps(notes)})

    def read_training(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Where the recovery stood: tensors and facts; None where it is not there, or damaged."""
        kept = self._read(self.folder / TRAINING, "the recovery begins again")
        return kept and (kept[0], json.loads(kept[1]["facts"]))

    def write_training(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keep where the recovery stands, in place of where it stood before."""
        what = "the recovery's state", "what was kept before is"
        self._write(self.folder / TRAINING, tensors, *what, {"facts": json.dumps(facts)})

    def _read(self, file: Path, then: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}
                known = stored.metadata() or {}
        except (SafetensorError, OSError):
            tensors, known = {}, {}
        if known.get("checksum") == _checksum(tensors):
            return tensors, known
        print(f"--resume {self.folder}: {file.name} is damaged; {then}")
        return None

    def _write(
        self,
        file: Path,
        tensors: dict[str, Tensor],
        what: str,
        rest: str,
        known: dict[str, str] | None = None,
    ) -> None:
        stage = file.with_suffix(".partial")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(tensors, stage, {"checksum": _checksum(tensors)} | (known or {}))
            stage.replace(file)
        except (SafetensorError, OSError) as error:
            stage.unlink(missing_ok=True)
            raise UserError(
                f"--resume {self.folder}: {what} can't be kept ({error}); "
                f"{rest}; make room and run the same command again"
            ) from error

    def remove(self) -> None:
        """After success nothing of it is needed."""
        held = [*self.folder.glob("block-*"), *self.folder.glob("recovery.*")]
        for file in (*held, self.folder / JOB):
            file.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"


def _read_job(file: Path, folder: str) -> dict[str, Any]:
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(
            f"--resume {folder}: {file.name} can't be read ({error}); name another folder"
        ) from error


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
