"""The declaration of one flag of main.py: its role, its values, and the runs that it is for.

The parser, the checks, the fingerprint, the sweep and the README's table all read it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lib.methods.sparsity import NEURONS, UNSTRUCTURED

RESULT = "result"  # another value is another result
INPUT = "input"  # names a model or texts, whose content counts and not their path
SHOWN = "shown"  # changes what is shown of a result; no weight and no figure depends on it
SPEED = "speed"  # changes time and memory alone, up to rounding
PLACE = "place"  # where something is computed or stored


@dataclass(frozen=True)
class Span:
    """The range of a numeric flag; its ends are included unless `open` names them."""

    least: float = -math.inf
    most: float = math.inf
    open: str = ""  # `least`, `most`, or both

    def __contains__(self, value: float) -> bool:
        above = self.least < value if "least" in self.open else self.least <= value
        below = value < self.most if "most" in self.open else value <= self.most
        return above and below  # nan is neither

    def __str__(self) -> str:
        lower = "above" if "least" in self.open else "at least"
        if self.most == math.inf:
            return f"{lower} {self.least:g}"
        if lower == "at least":
            below = "below " if "most" in self.open else ""
            return f"from {self.least:g} to {below}{self.most:g}"
        return f"{lower} {self.least:g} and {'below' if 'most' in self.open else 'at most'} " + (
            f"{self.most:g}"
        )


@dataclass(frozen=True)
class Flag:
    """One flag. A run that it does not fit is refused; a sweep leaves it out of such a run."""

    name: str  # without dashes
    group: str  # under which --help shows it
    role: str
    help: str  # without its default, its choices and what is declared below
    default: Any = None
    default_text: str | None = None  # of a default that only the run can know
    options: Mapping[str, Any] = field(default_factory=dict)  # more for argparse's add_argument
    span: Span | None = None
    needs: tuple[str, ...] = ()  # other flags; one of them must be given
    unmet: str | None = None  # the message if none is given, in place of their names
    excludes: Mapping[str, str] = field(default_factory=dict)  # other flags, and why not both
    methods: tuple[str, ...] = ()  # methods that it is for; () for all runs
    pruning: bool = False  # only for runs that prune
    observing: tuple[Any, ...] = ()  # values that are for methods which look at activations
    types: tuple[str, ...] = ()  # sparsity types that it is for; () for all runs
    unstructured: bool = False  # only for types in which rows and blocks may differ in their zeros
    dense: bool = True  # fits a sweep's run of the dense model too
    method_option: str | None = None  # the method's option that it sets
    in_sweep: bool = True  # it may follow the `--` of a sweep, which sets the others itself
    recorded: bool = False  # results.json has a field of its own for it

    @property
    def is_switch(self) -> bool:
        return self.options.get("action") == "store_true"

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Declare the flag to argparse."""
        default = {} if self.is_switch else {"default": self.default}
        help_text = self.help + self._notes()
        group.add_argument(f"--{self.name}", **default, **self.options, help=help_text)

    def is_given(self, args: argparse.Namespace) -> bool:
        """Return whether it has another value than its default."""
        return getattr(args, self.name) != (False if self.is_switch else self.default)

    def shown(self, args: argparse.Namespace) -> str:
        """Return the flag as the user gave it."""
        value = getattr(args, self.name)
        if self.is_switch:
            return f"--{self.name}"
        if isinstance(value, list | tuple):
            value = (",".join if self.name == "tasks" else " ".join)(value)
        return f"--{self.name} {value:g}" if isinstance(value, float) else f"--{self.name} {value}"

    def misfit(self, args: argparse.Namespace, flags: Mapping[str, Flag]) -> str | None:
        """Return why the flag does not fit this run; None if it fits, or is not given."""
        if not self.is_given(args):
            return None
        given, method, kind = self.shown(args), args.prune_method, args.sparsity_type
        model = method or "the dense model"
        if self.methods and method not in self.methods:
            return f"{given}: is for {' and '.join(self.methods)}, not for {model}"
        if self.pruning and not method:
            return f"{given}: is for --prune_method, which is not given"
        if getattr(args, self.name) in self.observing and not _observes(method):
            return f"{given}: looks at activations, which {model} does not"
        if self.types and not (method and kind in self.types):
            return f"{given}: is for --sparsity_type {' and '.join(self.types)}, not for " + (
                kind if method else model
            )
        if self.unstructured and kind == NEURONS:
            return f"{given}: is for --sparsity_type {UNSTRUCTURED}, not for {kind}"
        if self.unstructured and kind != UNSTRUCTURED:
            return f"{given}: with --sparsity_type {kind} every row has the same share of zeros"
        if self.needs and not any(flags[name].is_given(args) for name in self.needs):
            names = " or ".join(f"--{name}" for name in self.needs)
            return f"{given}: {self.unmet or f'is for {names}, which is not given'}"
        return None

    def mistake(self, args: argparse.Namespace, flags: Mapping[str, Flag]) -> str | None:
        """Return what is wrong with the flag, alone or beside another; None if nothing is."""
        value = getattr(args, self.name)
        if value == "" or (isinstance(value, list) and "" in value):
            return f"--{self.name} '': is empty; give a value, or leave the flag out"
        if self.span and value is not None and value not in self.span:
            return f"{self.shown(args)}: must be {self.span}"
        for name, reason in self.excludes.items() if self.is_given(args) else ():
            if flags[name].is_given(args):
                return f"{self.shown(args)}: {reason}; leave out {flags[name].shown(args)}"
        return None

    def conditions(self) -> list[str]:
        """Describe which runs and values the flag is for, in words."""
        parts = [" and ".join(self.methods) + " only"] if self.methods else []
        parts += [" and ".join(self.types) + " only"] if self.types else []
        parts += [f"{UNSTRUCTURED} only"] if self.unstructured else []
        needs = " or ".join(f"--{name}" for name in self.needs)
        parts += [f"with {needs}"] if self.needs and not self.unmet else []
        return parts + ([str(self.span)] if self.span else [])

    def default_shown(self) -> str | None:
        """Return the default as the help shows it; None if the flag is off without a value."""
        if self.default_text:
            return self.default_text
        if self.default is None or self.is_switch:
            return None
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def _notes(self) -> str:
        default = self.default_shown()
        notes = self.conditions() + ([f"default: {default}"] if default else [])
        return f" ({'; '.join(notes)})" if notes else ""

    def table_row(self) -> str:
        """Return the flag's row in a Markdown table: flag, default, meaning."""
        default = self.default_shown()
        if self.options.get("required"):
            default = "required"
        elif self.is_switch:
            default = "off"
        elif default is None:
            default = "none"
        elif not self.default_text:
            default = f"`{default}`"
        choices = ", ".join(f"`{choice}`" for choice in self.options.get("choices", ()))
        notes = "; ".join(self.conditions() + ([f"one of {choices}"] if choices else []))
        text = self.help + (f" ({notes})" if notes else "")
        cells = f"`--{self.name}`", default, text
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _observes(method: str | None) -> bool:
    from lib.methods.registry import MethodSpec

    return bool(method) and MethodSpec(method).cls.observes
