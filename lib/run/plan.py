"""The steps of a run, derived once from the flags. Other modules read the plan, not the flags.

A plan holds what is removed (vocabulary; weights, neurons or experts), how it is chosen, how long
the model is trained, and the format of the result. This module imports neither torch nor
transformers.
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

PRUNED_BEFORE = "pruned before"  # method of a run on an already pruned model


@dataclass(frozen=True)
class Plan:
    """The steps of a run besides evaluation; a step that is left out is None or False."""

    trims: bool  # --trim_vocabulary
    method: str | None  # chooses weights, neurons or experts; None: nothing is pruned
    variant: bool  # Wanda's variant
    method_args: list[str] | None  # NAME=VALUE
    kind: str  # --sparsity_type, one of lib/methods/sparsity.py's TYPES
    sparsity: Sparsity
    allocation: str
    tokens: int | None  # training tokens
    teacher: str | None  # dense model of an already pruned one
    format: str  # final format of the linear layers, a name of lib/packed/formats.py
    packs: bool
    measures_only: bool
    names_text: bool  # calibration text was named explicitly

    @classmethod
    def of(cls, args: argparse.Namespace) -> Plan:
        """Return the plan of flags that lib/run/flags.py has accepted."""
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
        """`neurons` or `experts` if whole ones are removed, else None."""
        return self.kind if self.method and self.kind in SMALLER else None

    @property
    def method_class(self) -> type[PruningMethod]:
        """The method with its parameters. Raises UserError if it does not support the flags."""
        return method_of(self.method, self.variant, self.method_args, self.kind)

    @property
    def observes(self) -> bool:
        """Whether pruning reads calibration text."""
        if not self.method:
            return False
        method, measured = self.method_class, self.allocation in ("error", "owl")
        return method.observes or method.needs_gradients or measured

    @property
    def quantizes(self) -> bool:
        """Whether linear layers are quantized with calibration text."""
        if self.format == "16" or self.measures_only:
            return False
        asked = not self.packs or self.names_text
        return bool(asked or self.observes or self.tokens)

    @property
    def calibrated(self) -> bool:
        """Whether pruning or quantization reads calibration text."""
        return self.observes or self.quantizes

    @property
    def reads_train(self) -> bool:
        """Whether the run reads the training text of the calibration sources."""
        return bool(self.calibrated or self.tokens)

    @property
    def changes(self) -> bool:
        """Whether weights of the blocks change, so that the run can be continued."""
        return bool(self.method or self.tokens or self.quantizes)

    @property
    def has_dense(self) -> bool:
        """Whether the result is compared with a dense model: the model itself, or its teacher."""
        return bool(self.method or self.tokens or self.teacher or self.fake_quantizes)

    @property
    def fake_quantizes(self) -> bool:
        """Whether the result is a plain 16-bit checkpoint with weights on the q4_0 grid."""
        return self.format != "16" and not self.packs

    @property
    def trains_all(self) -> bool:
        """Whether all linear layers of the blocks are trained, not only those with zeros."""
        return bool(self.removes or self.fake_quantizes or not (self.method or self.teacher))

    @property
    def name(self) -> str:
        """The label of the run in results.json and the log."""
        if self.method:
            return label(self.method)
        if self.teacher or (self.quantizes and self.packs):
            return PRUNED_BEFORE
        if self.fake_quantizes:
            return self.format
        return "recovered" if self.tokens else "dense"

    def default_save(self, model: str) -> str:
        """Return the default of --save for a --model."""
        parts = [Path(model).name or "model", self.name.replace(" ", "-")]
        if self.method:
            parts.append(self.kind.replace(":", "of"))
            parts += [f"{self.sparsity.ratio:g}"] if self.kind in RATIO_TYPES else []
        return f"out/{'-'.join(parts)}"
