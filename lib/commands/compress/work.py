"""A command of `compress`: its flags, the facts that its steps follow from, and its work folder.

The folder belongs to one command. steps.json in it has the facts, and how each step has ended.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...run.flags import given
from ...run.results import RESULTS
from ...util import processes
from ...util.cli import NOTHING, typed
from ...util.errors import UserError
from ...util.files import partial_of, write_text
from .recipe import Step

if TYPE_CHECKING:
    from ...model.checkpoint import Checkpoint

# in the work folder; RUN and BLOCKS are results and state of main.py
STEPS, DIALOGUES, TRIMMED = "steps.json", "dialogues.jsonl", "trimmed"
RUN, BLOCKS, TABLE, FIGURES = "compressed", "blocks", "compressed.md", "figures.json"
STAGED = ("trim", "export")  # commands that write OUT.partial first
ANY, PACKED = "any", "packed"  # of --for, beside the formats of export


@dataclass
class Facts:
    """What the steps follow from besides the flags; found once."""

    texts: list[tuple[str, float | None]]  # calibration texts, with weights
    tests: list[str]
    chats: bool  # dialogues are among the texts
    seqlen: int
    nsamples: int  # calibration windows
    eval_windows: int  # of each test text
    date: str | None  # written by the chat template
    prompts: list[str] = field(default_factory=list)  # that a chat model answers; []: none
    fill: int = 0  # tokens of these dialogues
    smaller: dict[str, str] | None = None  # flags that remove parts for --megabytes, once decided


@dataclass
class Compression:
    """A command, after the checks of its flags; `begin` of the command sets the last fields."""

    args: argparse.Namespace
    words: list[str]  # of the command, as typed
    passed_on: list[str]  # flags of main.py
    parsed: argparse.Namespace  # the same, parsed
    device: str = ""
    checkpoint: Checkpoint | None = None
    config: Any = None
    facts: Facts | None = None
    identity: dict[str, Any] = field(default_factory=dict)  # all flags, and the model's digest
    ended: dict[str, int | None] = field(default_factory=dict)  # {begun step: its exit status}
    values: dict[str, str] = field(default_factory=dict)  # of the script's variables

    @property
    def line(self) -> str:
        """The command, as typed."""
        return f"{typed('compress')} {shlex.join(self.words)}"

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
    def column(self) -> str | None:
        """--column, if it was given."""
        return self.parsed.column if given(self.parsed, "column") else None

    @property
    def results(self) -> Path:
        """The results of the run that makes the model."""
        return Path(self.inside(RUN), RESULTS)

    @property
    def is_unfinished(self) -> bool:
        """Whether this run was killed, perhaps while it saved."""
        from ...util.resume import JOB  # imports torch

        return Path(self.inside(BLOCKS), JOB).exists()

    def inside(self, name: str) -> str:
        """Return a path in the work folder."""
        return str(Path(self.args.work_dir, name))

    def open(self) -> None:
        """Read steps.json. Raises UserError if another command has begun the folder."""
        file = Path(self.inside(STEPS))
        if not file.is_file():
            return
        kept = json.loads(file.read_text("utf-8"))
        if kept["identity"] != self.identity:
            problem = f"it has the work of {kept['command']}"
            if kept["command"] == self.line:
                problem = "MODEL's files have changed since it was begun"
            fix = "Name another --work_dir, or remove this one"
            raise UserError(f"--work_dir {self.args.work_dir}", problem, fix)
        self.facts, self.ended = Facts(**kept["facts"]), kept["ended"]

    def keep(self) -> None:
        """Write steps.json."""
        kept = {"command": self.line, "identity": self.identity, "ended": self.ended}
        kept["facts"] = asdict(self.facts)
        Path(self.args.work_dir).mkdir(parents=True, exist_ok=True)
        text = json.dumps(kept, indent=1, ensure_ascii=False)
        write_text(Path(self.inside(STEPS)), text)

    def is_done(self, step: Step) -> bool:
        """Return whether a step is finished, and set its variable."""
        nothing = step.variable and self.ended.get(step.name) == NOTHING
        if step.variable:
            self.values[step.variable] = step.otherwise if nothing else step.made
        if nothing or step.name not in self.ended:
            return bool(nothing)
        if step.name == "model" and (self.is_unfinished or not self.results.exists()):
            return False
        return Path(step.made).exists() and not (step.grows and self.ended[step.name] != 0)

    def do(self, step: Step, place: str) -> bool:
        """Do a step in a process of its own, unless it is finished; return whether it succeeded.

        `place` says which of the steps it is.
        """
        if self.is_done(step):
            return True
        print(f"\n[{place}] {step.about}\n{step.line}", flush=True)
        if step.name == "model":
            self._take_back()
        elif step.name in self.ended and step.command in STAGED:
            shutil.rmtree(partial_of(step.made), ignore_errors=True)  # left by a killed process
        self.ended[step.name] = None
        self.keep()
        module = "main" if step.command == "prune" else f"commands.{step.command}"
        self.ended[step.name] = status = processes.call(module, *step.words)
        self.keep()
        if step.needed and not self.is_done(step):
            raise SystemExit(status)  # the step has printed why
        return not status

    def _take_back(self) -> None:
        """Let a model that was saved, but not recorded, be saved again from the blocks' states."""
        out = Path(self.args.out)
        stage = partial_of(out)
        if self.is_unfinished:
            if (out / "config.json").exists():
                out.rename(stage)
            (stage / "README.md").unlink(missing_ok=True)  # it marks a complete model
        self.results.unlink(missing_ok=True)
