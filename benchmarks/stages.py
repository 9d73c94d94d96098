"""Stages of a benchmark: runs of main.py, each done once, on what earlier ones have saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import main as command_line

Run = Callable[[list[str]], object]  # what takes main.py's flags and runs it


@dataclass(frozen=True)
class Stage:
    """A run of main.py: its name, what it is called in the table, and its flags."""

    name: str
    heading: str
    flags: list[str]


def do(
    stage: Stage,
    folder: Path,
    passed_on: Sequence[str],
    run: Run = command_line.main,
) -> None:
    """Do a stage with the flags `passed_on` too, unless `folder` shows that it was done before."""
    here = folder / stage.name
    saved = "--save_model" not in stage.flags or (here / "model").is_dir()
    if saved and (here / "results.json").is_file():
        print(f"{stage.name}: done before", flush=True)
        return
    flags = [*stage.flags, "--save", str(here), *passed_on]
    print(f"{stage.name}: main.py {' '.join(flags)}", flush=True)
    run(flags)
