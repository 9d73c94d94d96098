"""A folder for a run's blocks, which the run locks and marks with a file.

`--resume` keeps finished blocks and the state of a recovery in one, `--offload` the blocks that a
device or a machine has no room for. It holds job.json, which says what the run's result depends on,
and a safetensors file for each block. A file is written beside its place and renamed, with a
checksum of its tensors and a digest of job.json; only such files are ever read back or deleted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.util.errors import UserError
from lib.util.files import check_output_folder, write_text
from lib.util.locks import exclusive_lock

JOB = "job.json"
CONVERTED = "converted"  # where transformers writes weights that it converts on loading
NAMES = ("block-*", "rounded-*", "allocation", "recovery", "rest", f"{CONVERTED}/*")
OWN = ("*.partial", *(f"{name}.safetensors" for name in NAMES))


class WorkFolder:
    """A locked folder, `path` or `name` in it; `flag` is the one that named it, for messages.

    `begun` is the content of job.json, None for a new folder. Raises UserError if another run uses
    the folder, if it holds other files, or if job.json can't be read. Call `close` at the end,
    after errors too.
    """

    def __init__(self, flag: str, path: str | Path, name: str = "", locks: bool = True) -> None:
        self.label = f"{flag} {path}"
        self.folder = Path(path) / name
        self.digest = ""
        self._lock = ExitStack()
        self.begun: dict[str, Any] | None = None
        if not locks:
            return
        self.folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        lock = self.folder.with_name(f".{self.folder.name}.lock")
        held = f"{self.label}: another run uses it; name another folder, or wait for its end"
        self._lock.enter_context(exclusive_lock(lock, held))
        try:
            check_output_folder(flag, str(self.folder), mark=JOB)
            self.begun = self._read_job()
        except BaseException:
            self.close()
            raise

    @classmethod
    def of_another(cls, flag: str, path: str | Path, name: str = "") -> WorkFolder:
        """Open a folder that another process has locked, to read its files."""
        return cls(flag, path, name, locks=False)

    def close(self) -> None:
        """Unlock the folder; remove it if it has no files."""
        if self.digest and not self.size():
            self.clear()
        self._lock.close()

    def begin(self, job: Mapping[str, Any]) -> None:
        """Write what the run's result depends on; files of other jobs are not read."""
        self.folder.mkdir(exist_ok=True)
        text = json.dumps(job, indent=2, ensure_ascii=False, sort_keys=True)
        write_text(self.folder / JOB, text)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def size(self) -> int:
        """Return the bytes of the run's files in the folder."""
        files = (file for pattern in OWN for file in self.folder.glob(pattern))
        return sum(file.stat().st_size for file in files)

    def write(
        self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], what: str
    ) -> Path:
        """Write tensors and plain facts into `name`.safetensors, whole or not at all."""
        file = self.folder / f"{name}.safetensors"
        stage = file.with_suffix(".partial")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header = {"digest": self.digest, "facts": json.dumps(facts)}
        header["checksum"] = _checksum(tensors, header)
        try:
            save_file(tensors, stage, header)
            stage.replace(file)
        except (SafetensorError, OSError) as error:
            stage.unlink(missing_ok=True)
            raise UserError(
                f"{self.label}: {what} can't be written ({error}); what was written before it is "
                "kept, make room and run the same command again, or name a folder on another disk"
            ) from error
        return file

    def read(self, name: str, then: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and facts of a file; None if it is missing, damaged or of another run.

        For a damaged file or that of another run a line says so, and what happens `then`.
        """
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            return None
        tensors, header = {}, {}
        with suppress(SafetensorError, OSError), safe_open(file, "pt") as stored:
            header = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        if header.get("checksum") != _checksum(tensors, header):
            print(f"{self.label}: {file.name} is damaged; {then}")
        elif header["digest"] != self.digest:
            print(f"{self.label}: {file.name} is of a run with other flags; {then}")
        else:
            return tensors, json.loads(header["facts"])
        return None

    def clear(self) -> None:
        """Remove the files of runs, and the folder if nothing else is in it."""
        for pattern in OWN if (self.folder / JOB).is_file() else ():
            for file in self.folder.glob(pattern):
                file.unlink(missing_ok=True)
        (self.folder / JOB).unlink(missing_ok=True)
        for folder in (self.folder / CONVERTED, self.folder):
            with suppress(OSError):  # it is missing, or has other files
                folder.rmdir()

    def _read_job(self) -> dict[str, Any] | None:
        file = self.folder / JOB
        if not file.is_file():
            return None
        try:
            job = json.loads(file.read_text("utf-8"))
            if not isinstance(job, dict):
                raise ValueError("it holds no object")
        except ValueError as error:
            raise UserError(
                f"{self.label}: {file.name} can't be read ({error}); name another folder"
            ) from error
        return job


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    digest.update(f"{header.get('digest')} {header.get('facts')}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
