"""A command of `compress`: its flags, its folder, and the plan that is kept there."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...run.flags import FLAGS, named, without
from ...run.plan import AUTO
from ...run.results import RESULTS, read_results
from ...util import processes
from ...util.cli import typed
from ...util.files import write_text

if TYPE_CHECKING:
    from ...model.checkpoint import Checkpoint

ANY, PACKED = "any", "packed"  # of --for, beside the formats of export
PACKED_PLAN = "--prune_method admm --sparsity_ratio 0.5 --allocation error "
PACKED_PLAN += "--replace_sparse_layers --quantize int4"
FOLDER = re.compile("[0-9a-f]{12}")  # name of a command's folder in --work_dir
# in the folder of a command: the plan, and folders with the results of main.py
PLAN, DENSE, SMALL = "plan.json", "dense", "compressed"
REHEARSED = "rehearsed.json"  # in the folder of a rehearsal: its flags and seconds


@dataclass
class CompressionPlan:
    """How to make and evaluate the model; decided once and kept in plan.json."""

    common: list[str]  # flags of every run of main.py
    made_by: list[str]  # flags of the run that makes the model
    type: str  # type of the GGUF file
    tests: list[str]
    windows: int  # calibration windows
    tokens: int  # training tokens


@dataclass
class Compression:
    """A command, after all checks that need no weights; only `plan` is decided later."""

    args: argparse.Namespace
    passed_on: list[str]  # flags of main.py
    parsed: argparse.Namespace  # the same, parsed
    command: dict[str, Any]  # all flags, and the identity of the model
    device: str
    checkpoint: Checkpoint
    config: Any
    plan: CompressionPlan | None = None
    began: float = 0.0  # by time.monotonic, less the time of earlier calls

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        if (self.folder / PLAN).is_file():
            kept = json.loads((self.folder / PLAN).read_text("utf-8"))
            self.began -= kept["seconds"]
            self.plan = CompressionPlan(**kept["plan"]) if kept["plan"] else None

    @property
    def folder(self) -> Path:
        """The folder of this command in --work_dir; a changed command has another one."""
        digest = hashlib.sha256(json.dumps(self.command, sort_keys=True).encode())
        return Path(self.args.work_dir, digest.hexdigest()[:12])

    @property
    def gguf(self) -> str | None:
        """OUT.gguf; None for --for packed."""
        return None if PACKED in self.args.target else f"{self.args.out}.gguf"

    @property
    def exports(self) -> dict[str, str]:
        """{folder: format} for each other engine."""
        formats = (each for each in self.args.target if each not in (ANY, PACKED))
        return {f"{self.args.out}-{each}": each for each in formats}

    @property
    def format(self) -> list[str]:
        """The flags of main.py that quantize or prune the weights."""
        if not self.gguf:
            return PACKED_PLAN.split()
        size = ["--megabytes", str(self.args.megabytes)] if self.args.quantize == AUTO else []
        return ["--quantize", self.args.quantize, *size]

    @property
    def rehearsed_format(self) -> list[str]:
        """The same before neurons or experts are removed, when the size may not yet be possible."""
        return ["--quantize", "iq4_nl"] if self.args.quantize == AUTO else self.format

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    def keep(self) -> None:
        """Write plan.json, with the time spent."""
        kept = {"command": self.command, "seconds": time.monotonic() - self.began}
        kept["plan"] = self.plan and asdict(self.plan)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / PLAN, json.dumps(kept, indent=1, ensure_ascii=False))

    def has(self, name: str) -> bool:
        """Return whether a run of main.py has finished."""
        return (self.folder / name / RESULTS).exists()

    def announce(self, what: str) -> float:
        """Print the next step; return the seconds that are left."""
        left = 60 * self.args.minutes - (time.monotonic() - self.began)
        rest = f"; {in_words(left)} of {self.args.minutes} min left"
        print(f"\n{what}{rest if self.args.recover is None else ''}", flush=True)
        return left

    def run_main(self, flags: list[str], name: str, left_out: Sequence[str] = ()) -> dict[str, Any]:
        """Print the command of main.py, run it, and return its results, kept in folder `name`.

        Flags that were passed on follow, see `joined`.
        """
        flags = [*joined(flags, self.passed_on, left_out), "--save", str(self.folder / name)]
        print(f"{typed('prune')} {shlex.join(flags)}", flush=True)
        if status := processes.call("main", *flags):  # main.py has printed why
            raise SystemExit(status)
        self.keep()
        return read_results(self.folder / name)

    def rehearse(
        self, flags: list[str], name: str, left_out: Sequence[str]
    ) -> tuple[dict[str, Any], float]:
        """Return the results of a rehearsal and the seconds that it took, if need be by an
        interrupted command with the same flags."""
        file, start = self.folder / name / REHEARSED, time.monotonic()
        kept = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        if kept.get("flags") != flags or not self.has(name):
            self.run_main(flags, name, left_out)
            kept = {"flags": flags, "seconds": time.monotonic() - start}
            write_text(file, json.dumps(kept))
        return read_results(self.folder / name), kept["seconds"]


def joined(flags: list[str], passed_on: list[str], left_out: Sequence[str] = ()) -> list[str]:
    """Return flags of main.py, then those passed on without `left_out`.

    Flags that need another one that is not there, such as of a method or of training, are left out,
    and flags on the vocabulary where its tokens are chosen.
    """
    chosen = named(step="trim") if "--vocabulary_rows" in flags else []
    flags = [*flags, *without(passed_on, [*left_out, *chosen])]
    names = {word.partition("=")[0].removeprefix("--") for word in flags}
    return without(flags, [one.name for one in FLAGS if one.needs and not names & {*one.needs}])


def in_words(seconds: float) -> str:
    """Return a time in minutes or seconds."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 0):.0f} s"
