"""What the flags of a run mean: its steps besides evaluation, derived from the flags alone.

`Flags` holds the flags as argparse has parsed them. Its properties say what is removed (weights,
neurons or experts), how it is chosen, and the format of the result. This module imports neither
torch nor transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.registry import PACKING
from ..methods.registry import label, method_of
from ..methods.sparsity import RATIO_TYPES, SMALLER, Passes, Sparsity
from ..util.cli import Parser, typed, underscored
from ..util.errors import UserError

if TYPE_CHECKING:
    from ..methods.base import PruningMethod

PRUNED_BEFORE = "pruned before"  # method of a run on an already pruned model
# flags of earlier versions, for which `trim` is a command of its own
RETIRED = "--trim_vocabulary", "--vocabulary_data", "--vocabulary_price", "--vocabulary_rows"
TRIM = "Run {} MODEL SMALL --data TEXTS, then {} with --model SMALL"


def packed(flags: Mapping[str, Any]) -> bool:
    """Return whether the model is saved packed; --quantize int4 implies it."""
    return bool(flags.get("replace_sparse_layers") or flags.get("quantize") in PACKING)


def retired(words: Iterable[str]) -> UserError | None:
    """Return the mistake in words of a command line that would trim the vocabulary."""
    for word in underscored(words):
        if (flag := word.partition("=")[0]) in RETIRED:
            problem = "trimming is a command of its own"
            return UserError(flag, problem, TRIM.format(typed("trim"), "this"))
    return None


class Flags(argparse.Namespace):
    """The flags of a run, which lib/run/flags.py has accepted."""

    @property
    def sparsity(self) -> Sparsity:
        return Sparsity.parse(self.sparsity_type, self.sparsity_ratio)

    @property
    def format(self) -> str:
        """The final format of the linear layers: a name of lib/formats/registry.py or a file."""
        return self.quantize or "16"

    @property
    def packs(self) -> bool:
        """Whether the model is saved packed."""
        return packed(vars(self))

    @property
    def names_text(self) -> bool:
        """Whether calibration text was named explicitly."""
        return bool(self.calibration_data or self.prune_on_c4)

    @property
    def removes(self) -> str | None:
        """`neurons` or `experts` if whole ones are removed, else None."""
        return self.sparsity_type if self.prune_method and self.sparsity_type in SMALLER else None

    @property
    def method_class(self) -> type[PruningMethod]:
        """The method with its parameters. Raises UserError if it does not support the flags."""
        return method_of(self.prune_method, self.use_variant, self.method_args, self.sparsity_type)

    @property
    def observes(self) -> bool:
        """Whether pruning reads calibration text."""
        if not self.prune_method:
            return False
        method = self.method_class
        return method.observes or any(Passes.of(self.allocation, method))

    @property
    def quantizes(self) -> bool:
        """Whether linear layers are quantized with calibration text."""
        if self.format == "16" or self.eval_only:
            return False
        asked = not self.packs or self.names_text
        return bool(asked or self.observes or self.recover)

    @property
    def calibrated(self) -> bool:
        """Whether pruning or quantization reads calibration text."""
        return self.observes or self.quantizes

    @property
    def reads_train(self) -> bool:
        """Whether the run reads the training text of the calibration sources."""
        return bool(self.calibrated or self.recover)

    @property
    def changes(self) -> bool:
        """Whether weights of the blocks change, so that the run can be continued."""
        return bool(self.prune_method or self.recover or self.quantizes)

    @property
    def has_dense(self) -> bool:
        """Whether the result is compared with a dense model: the model itself, or its teacher."""
        return bool(self.prune_method or self.recover or self.teacher or self.fake_quantizes)

    @property
    def fake_quantizes(self) -> bool:
        """Whether the result is a plain 16-bit checkpoint with weights on llama.cpp's grids."""
        return self.format != "16" and not self.packs

    @property
    def trains_all(self) -> bool:
        """Whether all linear layers of the blocks are trained, not only those with zeros."""
        return bool(self.removes or self.fake_quantizes or not (self.prune_method or self.teacher))

    @property
    def name(self) -> str:
        """The label of the run in results.json and the log."""
        if self.prune_method:
            return label(self.prune_method)
        if self.teacher or (self.quantizes and self.packs):
            return PRUNED_BEFORE
        if self.fake_quantizes:
            return Path(self.format).stem
        return "recovered" if self.recover else "dense"

    @property
    def default_save(self) -> str:
        """The default of --save."""
        parts = [Path(self.model).name or "model", self.name.replace(" ", "-")]
        if self.prune_method:
            parts.append(self.sparsity_type.replace(":", "of"))
            parts += [f"{self.sparsity.ratio:g}"] if self.sparsity_type in RATIO_TYPES else []
        return f"out/{'-'.join(parts)}"


class FlagParser(Parser):
    """Parses the command line of main.py into `Flags`."""

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        if mistake := retired(words):
            self.error(str(mistake))
        return super().parse_known_args(words, Flags() if namespace is None else namespace)
