"""What a run does, decided once from its flags: whoever wants to know asks this, not the flags.

A plan says what goes (vocabulary; weights, neurons or experts), how that is chosen, what is trained
and on which grid, and what the model becomes. This module imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..methods.registry import label, method_of
from ..methods.sparsity import RATIO_TYPES, SMALLER, Sparsity
from .flags import packed

if TYPE_CHECKING:
    from ..methods.base import PruningMethod

PRUNED_BEFORE = "pruned before"  # what results call a run that takes up another's model


@dataclass(frozen=True)
class Plan:
    """A run's steps, besides evaluation; what a step does not need is None or False."""

    trims: bool  # the vocabulary
    method: str | None  # by which weights, neurons or experts are chosen; None: none go
    variant: bool  # of Wanda
    method_args: list[str] | None  # NAME=VALUE
    kind: str  # of what goes: one of lib/methods/sparsity.py's TYPES
    sparsity: Sparsity
    allocation: str
    tokens: int | None  # to train on
    teacher: str | None  # the dense model of one that was pruned before
    format: str  # of the linears in the end, a name of lib/packed/formats.py
    packs: bool
    measures_only: bool
    names_text: bool  # calibration text is given, so that what needs none reads it too

    @classmethod
    def of(cls, args: argparse.Namespace) -> Plan:
        """Read flags that lib/run/flags.py has found no mistake in."""
        return cls(
            trims=args.trim_vocabulary,
            method=args.prune_method,
            variant=args.use_variant,
            method_args=args.method_args,
            kind=args.sparsity_type,
            sparsity=Sparsity.parse(args.sparsity_type, args.sparsity_ratio),
            allocation=args.allocation,
            tokens=args.recover,
            teacher=args.teacher,
            format=args.quantize or "16",
            packs=packed(vars(args)),
            measures_only=args.eval_only,
            names_text=bool(args.calibration_data or args.prune_on_c4),
        )

    @property
    def removes(self) -> str | None:
        """`neurons` or `experts` where whole ones go."""
        return self.kind if self.method and self.kind in SMALLER else None

    @property
    def method_class(self) -> type[PruningMethod]:
        """The method, with its parameters. UserError where it can't do what the flags ask of it."""
        return method_of(self.method, self.variant, self.method_args, self.kind)

    @property
    def observes(self) -> bool:
        """Whether pruning reads calibration text."""
        if not self.method:
            return False
        method, measured = self.method_class, self.allocation in ("error", "owl")
        return method.observes or method.needs_gradients or measured

    @property
    def rounds(self) -> bool:
        """Whether linears are rounded on calibration text, for which alone none need be read."""
        if self.format == "16" or self.measures_only:
            return False
        asked = not self.packs or self.names_text
        return bool(asked or self.observes or self.tokens)

    @property
    def calibrated(self) -> bool:
        """Whether pruning or rounding reads calibration text."""
        return self.observes or self.rounds

    @property
    def reads_train(self) -> bool:
        """Whether the run reads the train text of the calibration sources."""
        return bool(self.calibrated or self.tokens)

    @property
    def changes(self) -> bool:
        """Whether weights of the blocks change, so that the run can be continued."""
        return bool(self.method or self.tokens or self.rounds)

    @property
    def has_dense(self) -> bool:
        """Whether there is a dense model to compare with: the model itself, or its teacher."""
        return bool(self.method or self.tokens or self.teacher or self.narrows)

    @property
    def narrows(self) -> bool:
        """Whether the model is saved in 16 bits because its format is told by these alone."""
        return self.format != "16" and not self.packs

    @property
    def trains_all(self) -> bool:
        """Whether all linears of the blocks are trained, not only those with zeros."""
        return bool(self.removes or self.narrows or not (self.method or self.teacher))

    @property
    def name(self) -> str:
        """What results and log call the run: its method, or else what else it does."""
        if self.method:
            return label(self.method)
        if self.teacher or (self.rounds and self.packs):
            return PRUNED_BEFORE
        if self.narrows:
            return self.format
        return "recovered" if self.tokens else "dense"

    def default_save(self, model: str) -> str:
        """Return the folder of the results of `--model` where --save is not given."""
        parts = [Path(model).name or "model", self.name.replace(" ", "-")]
        if self.method:
            parts.append(self.kind.replace(":", "of"))
            parts += [f"{self.sparsity.ratio:g}"] if self.kind in RATIO_TYPES else []
        return f"out/{'-'.join(parts)}"
