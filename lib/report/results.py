"""What a run leaves behind, `results.json`: written and read here, so that both agree.

`write_results` writes the file of one run, `load_runs` finds those of many, and a `Run` answers
what tables and pictures ask. Importing this file imports nothing heavy.
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
STRICTNESS = ("unstructured", "4:8", "2:4")  # sparsity types, from the loosest to the strictest


def write_results(folder: Path, results: dict[str, Any]) -> Path:
    """results.json, whole or not at all; nan and inf, which JSON does not know, as null."""
    path = folder / RESULTS
    text = json.dumps(_finite(results), indent=2, ensure_ascii=False, default=str, allow_nan=False)
    write_text(path, text + "\n")
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, eq=False)
class Run:
    """One run: its folder, and what its results.json holds."""

    folder: Path
    results: dict[str, Any] = field(repr=False)

    @property
    def error(self) -> str | None:
        """Why the run failed, or None."""
        return self.results.get("error")

    @property
    def model(self) -> str:
        return self.results["model"].rstrip("/")

    @property
    def method(self) -> str:
        variant = self.results.get("flags", {}).get("use_variant")
        name = self.results["method"] + (" variant" if variant else "")
        return name + (" + recovery" if "recovery" in self.results else "")

    @property
    def target(self) -> str:
        """The sparsity asked for: `50%`, `2:4`, or `dense`; what it has if it was pruned before."""
        if self.results["method"] == "dense":
            return "dense"
        kind = self.results["sparsity_type"]
        if kind is None:  # pruned before
            return f"{self.results['sparsity']['overall']:.0%}"
        return f"{self.ratio * 100:g}%" if kind == STRICTNESS[0] else kind

    @property
    def ratio(self) -> float:
        if self.results["method"] != "dense" and self.results.get("sparsity_type") is None:
            return self.results.get("sparsity", {}).get("overall", 0.0)
        return self.results.get("sparsity_ratio") or 0.0

    @property
    def seed(self) -> int:
        return self.results.get("seed") or 0

    @property
    def settings(self) -> dict[str, Any]:
        """The flags that change a result and show in nothing else that a table says of a run."""
        return self.results.get("settings", {})

    @property
    def vocabulary(self) -> dict[str, Any]:
        """Of a model whose vocabulary was trimmed: `rows`, `rows_before`, `note` and more."""
        return self.results.get("vocabulary") or {}

    @property
    def calibration(self) -> str:
        return (self.results.get("calibration") or self._recovered_on).get("name") or NONE

    @property
    def _recovered_on(self) -> dict[str, Any]:
        return self.results.get("recovery", {}).get("text", {})

    @property
    def sources(self) -> tuple[tuple[str, Any], ...]:
        """What was calibrated on, and how large a share each source had."""
        calibration = self.results.get("calibration") or self._recovered_on
        return tuple((s["source"], s.get("share")) for s in calibration.get("sources", []))

    @cached_property
    def tests(self) -> dict[str, dict[str, Any]]:
        """The evaluations by the name of their test set."""
        return {entry["name"]: entry for entry in self.results["evaluation"]}

    @property
    def tasks(self) -> dict[str, float]:
        """`task metric` -> value, of the metrics that are numbers."""
        found = {}
        for task, metrics in (self.results.get("tasks") or {}).items():
            numbers = {m: v for m, v in metrics.items() if isinstance(v, int | float)}
            found.update({f"{task} {metric}": value for metric, value in numbers.items()})
        return found


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
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"RUN {file}: not valid JSON ({error}); remove it or run again") from error
    needed = ("model", "method", "evaluation")
    if not isinstance(results, dict):
        raise UserError(f"RUN {file}: not a run's results; remove it or run again")
    missing = [key for key in needed if key not in results and "error" not in results]
    if missing:
        raise UserError(f"RUN {file}: lacks {', '.join(missing)}; remove it or run again")
    return Run(file.parent, results)
