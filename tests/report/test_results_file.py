"""results.json: what runs write is what `Results` documents, and is read as it was written."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, NotRequired, get_args, get_origin, get_type_hints

import pytest
import tiny
from support import QUICK, call, results

from lib.report.results import FailedRun, Measured, Results, load_runs, write_results

BASE = ["--model", "model", *QUICK, "--prompts", "3", "--eval_data", "uk"]
EVERYTHING = ["--prune_method", "wanda", "--calibration_data", "uk", "--sparsity_type", "2:4"]
EVERYTHING += ["--recover", "640", "--trim_vocabulary", "--replace_sparse_layers"]
RUNS = {
    "dense": ["--eval_only"],
    "everything": [*EVERYTHING, "--save_model", "saved"],
    "by owl": ["--prune_method", "wanda", "--calibration_data", "uk", "--allocation", "owl"],
    "by error": ["--prune_method", "magnitude", "--calibration_data", "uk"]
    + ["--allocation", "error"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model", tiny.tiny_llama())
    tiny.write_texts(folder / "uk")
    return folder


def mismatches(value: Any, kind: Any, where: str = "results") -> list[str]:
    """Where a value read from JSON is not of a type; a float may be null."""
    origin, of = get_origin(kind), get_args(kind)
    if origin is NotRequired:
        return mismatches(value, of[0], where)
    if origin in (types.UnionType, typing.Union):
        each = [mismatches(value, one, where) for one in of]
        return [] if [] in each else each[0]
    if origin is dict:
        assert of[0] is str
        items = value.items() if isinstance(value, dict) else [("not a dictionary", value)]
        return [line for key, v in items for line in mismatches(v, of[1], f"{where}.{key}")]
    if origin is list:
        items = value if isinstance(value, list) else ["not a list"]
        return [line for v in items for line in mismatches(v, of[0], f"{where}[]")]
    if typing.is_typeddict(kind):
        if not isinstance(value, dict):
            return [f"{where}: {value!r} is no {kind}"]
        hints = get_type_hints(kind, include_extras=True)
        optional = {key for key, hint in hints.items() if get_origin(hint) is NotRequired}
        optional |= set() if kind.__total__ else hints.keys()
        optional |= Measured.__annotations__.keys() if kind is Results else set()
        lines = [f"{where}.{key}: missing" for key in hints.keys() - value.keys() - optional]
        lines += [f"{where}.{key}: not documented" for key in value.keys() - hints.keys()]
        known = ((key, hint) for key, hint in hints.items() if key in value)
        return lines + [m for k, h in known for m in mismatches(value[k], h, f"{where}.{k}")]
    if kind is Any or (kind is float and (value is None or type(value) in (int, float))):
        return []
    return [] if isinstance(value, kind or type(None)) else [f"{where}: {value!r} is no {kind}"]


@pytest.mark.usefixtures("at_place")
@pytest.mark.parametrize("name", RUNS)
def test_runs_write_what_is_documented(name: str, tmp_path: Path) -> None:
    done = call(*BASE, *RUNS[name], "--save", tmp_path)
    assert done.status == 0, done.err
    written = results(tmp_path)
    assert mismatches(written, Results) == []
    if name == "everything":
        parts = {"recovery", "packed", "vocabulary", "completions", "bits_per_byte", "calibration"}
        assert parts <= written.keys()
        saved = sum(file.stat().st_size for file in Path("saved").iterdir())
        assert written["saved_bytes"] == saved - Path("saved/manifest.json").stat().st_size


def test_the_check_itself() -> None:
    failed = {"model": "m", "method": "wanda", "flags": {}, "error": "kaputt"}
    assert mismatches(failed, FailedRun) == []
    assert mismatches(failed | {"more": 1}, FailedRun) == ["results.more: not documented"]
    assert mismatches(failed | {"error": 3}, FailedRun) == [f"results.error: 3 is no {str}"]
    del failed["error"]
    assert mismatches(failed, FailedRun) == ["results.error: missing"]


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    record = {"model": "m", "method": "wanda", "evaluation": []}
    path = write_results(tmp_path, record | {"perplexity": {"uk": float("inf")}})
    assert results(path.parent) == record | {"perplexity": {"uk": None}}
    (run,) = load_runs([tmp_path])
    assert run.error is None and run.settings == {}
