"""A step of `compress`: a command that a reader could type, also as lines of a shell script.

A step may end with the status NOTHING: trimming costs too much, or a model writes too few
dialogues. Then its variable of the script has another value for the steps after it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...util.cli import NOTHING, typed

WIDTH = 76  # of a line of the script


class Shell(str):
    """A word of the script that the shell expands, such as "$model"."""

    def __str__(self) -> Shell:
        return self


@dataclass(frozen=True)
class Step:
    """A command, and the file or folder that it makes."""

    name: str
    about: str
    command: str
    words: Sequence[str]
    made: str
    variable: str = ""  # its value is `made`, or `otherwise` after the status NOTHING
    otherwise: str = ""
    needed: bool = True  # otherwise the other steps follow its failure
    grows: bool = False  # what it makes is there before it is complete

    @property
    def line(self) -> str:
        """The command in a shell, on several lines if it is long."""
        groups = [typed(self.command)]  # a flag with its values
        for word in self.words:
            word = word if isinstance(word, Shell) else shlex.quote(word)
            groups += [word] if word.startswith("--") else []
            groups[-1] += "" if word.startswith("--") else f" {word}"
        lines = groups[:1]
        for group in groups[1:]:
            fits = len(lines[-1]) + len(group) < WIDTH
            lines = [*lines[:-1], f"{lines[-1]} {group}"] if fits else [*lines, f"    {group}"]
        return " \\\n".join(lines)

    @property
    def script(self) -> str:
        """The lines of the script."""
        if not self.variable:
            return f"# {self.about}\n{self.line}{'' if self.needed else ' || failed=1'}"
        value, other = (f"{self.variable}={shlex.quote(v)}" for v in (self.made, self.otherwise))
        line = f"{self.line} ||\n    {{ [ $? = {NOTHING} ] || exit 1; {other}; }}"
        return f"# {self.about}\n{value}\n{line}"


def script(command: str, steps: Iterable[Step], end: str = "") -> str:
    """Return the shell script of a command's steps; `end` is a last comment."""
    steps = [*steps]
    parts = [f"#!/bin/sh\n# {command}\nset -e", *(step.script for step in steps)]
    parts += [f"# {end}"] if end else []
    parts += ["exit ${failed:-0}"] if any(not step.needed for step in steps) else []
    return "\n\n".join(parts)
