"""A locked folder for the finished parts of a run, so that it can be resumed.

Only this file knows the contents of such a folder:

    job.json, .lock                     the settings that determine the result; the lock of a run
    block-N, quantized-N, changed-N     block N after pruning, quantization, or other changes
    start-N, allocation, recovery       states from which quantization, pruning, training continue
    recovery-R-of-N-S                   the part of rank R, of N in one training, at step S
    converted/                          weights that transformers converted on loading

The safetensors files are written to temporary names and renamed, with a digest of job.json. Only
such files are ever read back or deleted. If blocks are fetched, the last file of each becomes a
shard of the saved model through a second name (lib/model/saving.py), and the folder stays
complete until `clear`. It may be OUT.partial itself: `hand_over` then leaves only the model in it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import UserError, first_line
from .files import PARTIAL, check_writable, exclusive_lock, sync, write_text

JOB, LOCK = "job.json", ".lock"
DECIDED = "decided"  # in job.json: values that the run itself derived from its input
PRUNED, QUANTIZED, CHANGED, START = "block", "quantized", "changed", "start"  # one file per block
ALLOCATION, TYPES, RECOVERY = "allocation", "types", "recovery"


def of_block(prefix: str, index: int) -> str:
    """Return the name of a block's file, without suffix."""
    return f"{prefix}-{index:05d}"


def begun_with(path: str | Path | None, name: str) -> Any:
    """Return the value of `name` in a folder's job.json, or None."""
    try:
        return json.loads((Path(path) / JOB).read_text("utf-8")).get(name) if path else None
    except (OSError, ValueError, AttributeError):  # RunFolder reports the problem
        return None


class RunFolder:
    """Finished blocks in folder `path`, which `flag` named.

    `begun` is the content of job.json without `decided`, None for a new folder. Raises UserError
    if another run uses the folder, or if it holds other files. Call `close` at the end, after
    errors too.
    """

    def __init__(self, flag: str, path: str | Path) -> None:
        self.label, self.path = f"{flag} {path}", Path(path)
        self.digest = ""
        self._lock = ExitStack()
        check_writable(flag, str(path))
        begun = f".{JOB}{PARTIAL}"  # left by a run that was killed as it wrote its first file
        names = sorted({each.name for each in self.path.glob("*")} - {LOCK, begun})
        if names and JOB not in names:
            raise UserError(self.label, f"it holds {names[0]}, but no {JOB}", "Name another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        fix = "Name another folder, or wait for its end"
        held = UserError(self.label, "another run uses it", fix)
        self._lock.enter_context(exclusive_lock(self.path / LOCK, held))
        self.begun: dict[str, Any] | None = None
        self.decided: dict[str, Any] = {}
        if names:
            try:
                self.begun = dict(json.loads((self.path / JOB).read_text("utf-8")))
                self.decided = dict(self.begun.pop(DECIDED, {}))
            except (ValueError, TypeError) as error:
                self._lock.close()
                problem = f"{JOB} cannot be read ({first_line(error)})"
                raise UserError(self.label, problem, "Name another folder") from error

    @classmethod
    def joined(cls, label: str, path: str, digest: str) -> RunFolder:
        """Return the main rank's folder for another rank, which writes its own files there."""
        folder = cls.__new__(cls)
        folder.label, folder.path, folder.digest = label, Path(path), digest
        return folder

    def begin(self, job: Mapping[str, Any], **decided: Any) -> None:
        """Write the settings that determine the result; files of other jobs are not read.

        `decided` stores run-time decisions so that a resumed run repeats them.
        """
        dumps = partial(json.dumps, indent=2, ensure_ascii=False, sort_keys=True)
        self.digest = hashlib.sha256(dumps(job).encode()).hexdigest()
        self.decided |= decided
        write_text(self.path / JOB, dumps({**job, DECIDED: self.decided}))

    def write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
        """Write tensors and plain facts into `name`.safetensors atomically.

        The host holds a copy of one tensor at a time.
        """
        file = self.path / f"{name}.safetensors"
        partial_file = file.with_suffix(PARTIAL)
        header = {"format": "pt", "job": self.digest, "facts": json.dumps(facts)}
        try:
            write_tensors(partial_file, tensors, header)
            sync(partial_file)
            partial_file.replace(file)
        except (SafetensorError, OSError) as error:
            with suppress(OSError):
                partial_file.unlink()
            raise UserError(
                self.label,
                f"{file.name} cannot be written ({first_line(error)})",
                f"Make room, and continue with --resume {self.path}; earlier files are kept",
            ) from error
        return file

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and facts of a file; None if missing, damaged or from another run."""
        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as stored:
                header = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        except (SafetensorError, OSError) as error:
            print(f"{self.label}: {file.name} is damaged ({first_line(error)}) and is made again")
            return None
        if header.get("job") != self.digest:
            print(f"{self.label}: {file.name} belongs to a run with other flags; it is made again")
            return None
        return tensors, json.loads(header["facts"])

    @property
    def converted(self) -> Path:
        """The folder into which transformers writes the weights that it converts on loading."""
        return self.path / "converted"

    def files(self, ending: str = ".safetensors") -> list[Path]:
        """Return the files with work that a run would otherwise repeat."""
        names = [f"{prefix}-[0-9]*" for prefix in (PRUNED, QUANTIZED, CHANGED, START)]
        names += [ALLOCATION, TYPES, RECOVERY, f"{RECOVERY}-[0-9]*"]
        files = (file for name in names for file in self.path.glob(name + ending))
        return [file for file in files if file.is_file()]

    def summary(self, blocks: int) -> str:
        """Describe the finished work on `blocks` blocks."""
        kept = Counter(file.stem.partition("-")[0] for file in self.files())
        steps = {PRUNED: "pruned", QUANTIZED: "quantized"}
        done = [f"{kept[name]} of {blocks} blocks {step}" for name, step in steps.items()]
        return ", ".join(done + ["a training checkpoint"] * bool(kept[RECOVERY]))

    def hand_over(self, other: Path | None) -> dict[str, str]:
        """Leave the folder to the model that was saved in it.

        Files that are still needed move to folder `other`: returns {old path: new path}.
        """
        moved = {str(file): shutil.move(file, other) for file in self.files() if other}
        self.clear()
        return moved

    def clear(self) -> None:
        """Remove the files of runs, and the folder if nothing else is in it; unlock it."""
        if (self.path / JOB).is_file():
            shutil.rmtree(self.converted, ignore_errors=True)
            for file in [*self.files(), *self.files(PARTIAL), self.path / f".{JOB}{PARTIAL}"]:
                file.unlink(missing_ok=True)
            (self.path / JOB).unlink(missing_ok=True)
        self._lock.close()
        with suppress(OSError):  # it has other files, or was removed
            self.path.rmdir()

    def close(self) -> None:
        """Unlock the folder; remove it if no block was finished."""
        if self.files():
            self._lock.close()
        else:
            self.clear()


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of tensors on any device, one after another.

    safetensors itself needs all of them on the host, as much memory as a training has on the
    device. The file is the length of a JSON header, the header, and the tensors' bytes.
    """
    # tensors with wide numbers first, so that each is aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    kinds = {name: torch.empty(0, dtype=one.dtype) for name, one in tensors.items()}
    known, start = json.loads(save(kinds)[8:]), 0  # safetensors' names of their dtypes
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name in names:
        shape, end = list(tensors[name].shape), start + tensors[name].nbytes
        header[name] = {"dtype": known[name]["dtype"], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            held = tensors[name].detach().cpu().contiguous().reshape(-1)
            opened.write(held.view(torch.uint8).numpy())
