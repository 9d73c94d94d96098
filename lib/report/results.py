"""Finished runs, read back from their `results.json`.

Importing this file imports nothing heavy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lib.util.errors import UserError
from lib.util.files import write_text

RESULTS = "results.json"
NONE = "none"  # calibrated on nothing: the dense model, magnitude

# Flags that a table shows by other means, or that change nothing but speed and place.
_NOT_SETTINGS = frozenset(
    "model seed save save_model cache_dir device batch_size debug resume offload eval_only"
    " prune_method use_variant sparsity_type sparsity_ratio calibration_data prune_on_c4 eval_data"
    " tasks trust_remote_code".split()
)
_DENSE_SETTINGS = frozenset({"load_bit", "dtype"})
PATTERNS = ("unstructured", "4:8", "2:4")  # from the loosest to the strictest


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder; `record` is its results.json."""

    folder: Path
    record: dict[str, Any] = field(repr=False)

    @property
    def error(self) -> str | None:
        """Why the run failed, or None."""
        return self.record.get("error")

    @property
    def model(self) -> str:
        return self.record["model"].rstrip("/")

    @property
    def method(self) -> str:
        variant = self.record.get("flags", {}).get("use_variant")
        return self.record["method"] + (" variant" if variant else "")

    @property
    def setting(self) -> str:
        """`50%`, `2:4`, or `dense`."""
        if self.record["method"] == "dense":
            return "dense"
        kind = self.record["sparsity_type"]
        return f"{self.ratio * 100:g}%" if kind == PATTERNS[0] else kind

    @property
    def ratio(self) -> float:
        return self.record.get("sparsity_ratio") or 0.0

    @property
    def seed(self) -> int:
        return self.record.get("seed") or 0

    @property
    def calibration(self) -> str:
        return (self.record.get("calibration") or {}).get("name") or NONE

    @cached_property
    def tests(self) -> dict[str, dict[str, Any]]:
        """The evaluations by the name of their test set."""
        return {entry["name"]: entry for entry in self.record["evaluation"]}

    @property
    def tasks(self) -> dict[str, float]:
        """`task metric` -> value, of the metrics that are numbers."""
        found = {}
        for task, metrics in (self.record.get("tasks") or {}).items():
            numbers = {m: v for m, v in metrics.items() if isinstance(v, int | float)}
            found.update({f"{task} {metric}": value for metric, value in numbers.items()})
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """The remaining flags that could change a result."""
        flags = self.record.get("flags", {})
        kept = _DENSE_SETTINGS if self.setting == "dense" else flags.keys() - _NOT_SETTINGS
        return {name: flags[name] for name in sorted(kept & flags.keys())}

    @property
    def sources(self) -> tuple[tuple[str, Any], ...]:
        """What was calibrated on, and how large a share each source had."""
        calibration = self.record.get("calibration") or {}
        return tuple((s["source"], s.get("share")) for s in calibration.get("sources", []))


def load_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Every run in the folders given, or below them, in the order of their names.

    UserError: a path that is no folder, holds no run, or whose results.json can't be read.
    """
    files: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"RUN {path}: no such folder; name a run's --save folder or its parent")
        found = [path / RESULTS] if (path / RESULTS).is_file() else sorted(path.rglob(RESULTS))
        if not found:
            raise UserError(f"RUN {path}: holds no {RESULTS}; name a run's --save folder")
        files.update((file.resolve(), file) for file in found)
    return [_load(file) for file in files.values()]


def _load(file: Path) -> Run:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"RUN {file}: not valid JSON ({error}); remove it or run again") from error
    needed = ("model", "method", "evaluation")
    if not isinstance(record, dict):
        raise UserError(f"RUN {file}: not a run's record; remove it or run again")
    missing = [key for key in needed if key not in record and "error" not in record]
    if missing:
        raise UserError(f"RUN {file}: lacks {', '.join(missing)}; remove it or run again")
    return Run(file.parent, record)


def write_results(folder: Path, results: dict[str, Any]) -> Path:
    """results.json, whole or not at all; nan and inf, which JSON does not know, as null."""
    path = folder / "results.json"
    text = json.dumps(_finite(results), indent=2, ensure_ascii=False, default=str, allow_nan=False)
    write_text(path, text + "\n")
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
