"""What a run leaves behind, `results.json`: its keys, written and read here, so that both agree.

`Results` documents every key. `write_results` writes the file of one run, `load_runs` reads those
of many, and a `Run` answers what tables and pictures ask. Importing this file imports nothing
heavy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from lib.util.errors import UserError
from lib.util.files import write_text

RESULTS = "results.json"
ERROR = "error.json"  # of a run of a sweep whose last try failed, beside figures of an earlier one
NONE = "none"  # calibrated on nothing: the dense model, magnitude
NEURONS = "neurons"  # the sparsity type of whole ones
STRICTNESS = ("unstructured", "4:8", "2:4")  # sparsity types, from the loosest to the strictest


class SourceRecord(TypedDict):
    """A text source and how many windows it gave to calibration or recovery."""

    name: str
    source: str  # as it was given
    revision: str | None  # of a hub set
    windows: int
    share: float  # of all windows
    rows: NotRequired[list[int]]  # calibration: the document of each window, and where it starts
    starts: NotRequired[list[int]]
    held_out: NotRequired[int]  # recovery: windows measured on; passes over the rest; windows that
    passes: NotRequired[int]  # were dropped because a test set contains them
    dropped: NotRequired[int]


class WindowsRecord(TypedDict):
    """The windows that a method calibrated on, or that recovery trained on."""

    name: str
    sources: list[SourceRecord]
    windows: int
    seqlen: int  # tokens of a window
    bos: int | None  # the id that begins every window
    digest: str  # of the token ids
    tokens: NotRequired[int]  # calibration: in all windows
    held_out: NotRequired[int]  # recovery: windows


class EvaluationRecord(TypedDict):
    """A test set, and what the model reached on it; figures that are not finite are null."""

    name: str
    source: str
    revision: str | None
    windows: int
    seqlen: int
    tokens: int
    bytes: int  # UTF-8, of the text behind the tokens that are predicted
    bos: int | None
    digest: str
    perplexity: float
    standard_error: float  # of the perplexity, over windows; null for a single window
    bits_per_byte: float
    kl: NotRequired[float]  # nats a token, from the dense model
    kl_standard_error: NotRequired[float]
    top1_agreement: NotRequired[float]  # share of positions with the dense model's first choice
    top1_agreement_standard_error: NotRequired[float]
    compared_windows: NotRequired[int]  # on which `kl` and `top1_agreement` were measured


class SparsityRecord(TypedDict):
    """Measured shares of zeros."""

    overall: float  # of the weights of all linears of the decoder blocks
    linears: dict[str, float]


class CurvePoint(TypedDict):
    """Where the recovery stood after some tokens; `loss` is null before the first step."""

    tokens: int
    perplexity: float  # of the training text held out
    loss: float | None


class RecoveryRecord(TypedDict):
    """The training of the kept weights; perplexities by test set are those before it."""

    tokens: int
    seconds: float
    steps: int
    windows: int  # of a step
    rate: float  # at the peak
    rank: int | None
    cross_entropy: float  # share of the loss
    weights: int  # trained
    teacher: str
    text: WindowsRecord
    curve: list[CurvePoint]
    kept: CurvePoint  # the best one, whose weights the model has
    held_out: dict[str, float]  # perplexity of the training text held out: `dense`, `before`
    dense: dict[str, float]
    before: dict[str, float]


class PackingRecord(TypedDict):
    """The packed linears as they are saved."""

    bits: int  # of a kept value; 16 means the dtype of the checkpoint
    linears: int
    left_dense: int  # linears
    bytes: int
    dense_bytes: int  # of the same linears, dense
    difference: float  # |packed logits - dense logits| / |dense logits|, on one window


class PackedEmbeddingsRecord(TypedDict):
    """Embedding and output head as integers, as they are saved."""

    bits: int
    modules: list[str]
    bytes: int
    dense_bytes: int  # of the same matrices, dense; one where the two are tied
    difference: float  # |packed logits - logits before| / |logits before|, on one window


class NeuronsRecord(TypedDict):
    """Whole neurons that were removed from each MLP of the blocks."""

    before: int  # neurons of each MLP
    after: int
    multiple: int
    field: str  # of the config, that holds their number
    weights_before: int  # of the blocks
    weights_after: int
    bytes_before: int  # of the whole model, in the dtype it is saved in
    bytes_after: int
    removed: list[str]  # of each block, a bit for each neuron, by lib/util/bits.py


class VocabularyRecord(TypedDict):
    """A trimmed vocabulary; of one that was trimmed by an earlier run only the first three."""

    note: str
    rows: int  # of the embedding
    rows_before: int
    tokens: NotRequired[int]
    tokens_before: NotRequired[int]
    used: NotRequired[int]  # tokens that the texts use
    reserved: NotRequired[int]  # reserved special tokens that were dropped
    counted: NotRequired[int]  # tokens of the texts
    documents: NotRequired[int]
    characters: NotRequired[int]
    sources: NotRequired[list[str]]
    digest: NotRequired[str]
    seconds: NotRequired[float]
    bytes_dropped: NotRequired[int]
    logits_differ: NotRequired[float]
    tests: NotRequired[list[dict[str, Any]]]  # name, documents, alike, tokens_before, tokens, rise


class Completion(TypedDict):
    """A prompt from a test document, and how models continue it greedily."""

    test: str
    prompt: str
    dense: NotRequired[str]
    model: NotRequired[str]  # what the run has made of it


class AnswersRecord(TypedDict):
    """A model's answers to questions: shares, with their 95% intervals."""

    accuracy: float  # share of questions whose right option is the likeliest
    accuracy_interval: list[float]
    said: NotRequired[float]  # share of questions whose right option greedy decoding gives
    said_interval: NotRequired[list[float]]


class FlipsRecord(TypedDict):
    """Questions of which one model alone gives the right answer."""

    lost: int  # the dense one
    gained: int  # the other one
    p: float  # of McNemar's exact test


class AbilityRecord(TypedDict):
    """Questions of one kind about one text, and how models answer them."""

    text: str  # a test set, or the file of --pairs
    name: str  # last word, continuation or pairs
    questions: int
    digest: str  # of the questions
    chance: float
    model: AnswersRecord
    dense: NotRequired[AnswersRecord]
    flips: NotRequired[FlipsRecord]
    said_flips: NotRequired[FlipsRecord]


class DepthRecord(TypedDict):
    """Of one test set, whose first `windows` windows were measured after each pruned block."""

    name: str
    windows: int
    kl: list[float]  # from the dense model, nats a token, by block
    top1_agreement: list[float]  # share of positions, by block


class FidelityRecord(TypedDict):
    """Greedy completions of beginnings of one test set. Each model's figures are shares: of lines
    in the `language`, of letters in a `foreign_script`, of `known_words`, of `repeated_4grams` and
    of `distinct_2grams`; null where there is nothing to measure them by."""

    text: str
    beginnings: int
    tokens: int  # of a completion, at most
    language: str | None  # of the text, as an ISO code
    scripts: list[str]  # of the text
    model: dict[str, float | None]
    dense: NotRequired[dict[str, float | None]]
    reference: dict[str, float | None]  # of how the text itself goes on


class Measured(TypedDict, total=False):
    """What the steps of a run measure, one after another."""

    allocation: list[float] | dict[str, float]  # sparsity asked for, by block or linear
    notes: list[str]  # what of the model was pruned in another way, or not at all, and why
    depth: list[DepthRecord]
    sparsity: SparsityRecord
    neurons: NeuronsRecord
    recovery: RecoveryRecord
    packed: PackingRecord
    packed_embeddings: PackedEmbeddingsRecord
    evaluation: list[EvaluationRecord]
    completions: list[Completion]
    abilities: list[AbilityRecord]
    fidelity: list[FidelityRecord]
    tasks: dict[str, dict[str, float]]  # of lm-eval: {task: {metric: value}}


class Results(Measured):
    """results.json of a run; the keys of `Measured` are there where the run has them."""

    model: str
    method: str  # a pruning method, `dense`, or `pruned before`
    sparsity_type: str | None  # None where nothing was pruned
    sparsity_ratio: float | None
    options: dict[str, Any]  # of the method, given or by default
    flags: dict[str, Any]  # of the command line, all
    settings: dict[str, Any]  # flags that change a result and have no key of their own
    seed: int
    versions: dict[str, str | None]
    device: str
    products: NotRequired[str]  # bfloat16, where the passes rounded float32 operands to it
    bos: int | None
    calibration: WindowsRecord | None
    vocabulary: NotRequired[VocabularyRecord]
    bits_per_byte: NotRequired[dict[str, float]]  # by test set, where the vocabulary was trimmed
    perplexity: dict[str, float]  # by test set
    seconds: dict[str, float]  # by step
    peak_memory: dict[str, Any]  # bytes: `host`, `device`; in a sweep `of`, what they include
    footprint: dict[str, int]  # bytes of the model in memory, `before` and `after`
    saved_bytes: NotRequired[int]  # all files of --save_model
    fingerprint: dict[str, dict[str, Any]]


class FailedRun(TypedDict):
    """error.json of a run that a sweep could not finish."""

    model: str
    method: str
    flags: dict[str, Any]
    error: str


def write_results(folder: Path, results: Mapping[str, Any]) -> Path:
    """Write results.json whole or not at all; nan and inf, which JSON lacks, become null."""
    path = folder / RESULTS
    text = json.dumps(_finite(results), indent=2, ensure_ascii=False, default=str, allow_nan=False)
    write_text(path, text + "\n")
    return path


def write_error(folder: Path, failure: FailedRun) -> Path:
    """Write error.json; results.json stays as it is."""
    path = folder / ERROR
    write_text(path, json.dumps(failure, indent=2, ensure_ascii=False, default=str) + "\n")
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
    results: Results | FailedRun = field(repr=False)

    failure: str | None = None  # why its last try failed; it may have figures of an earlier one

    @property
    def error(self) -> str | None:
        """Why the run has no figures, or None."""
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
        """The target sparsity: `50%`, `2:4`, or `dense`; the measured one if pruned before."""
        if self.results["method"] == "dense":
            return "dense"
        kind = self.results["sparsity_type"]
        if kind is None:  # pruned before
            return f"{self.results['sparsity']['overall']:.0%}"
        if kind == NEURONS:
            return f"{self.ratio * 100:g}% neurons"
        return f"{self.ratio * 100:g}%" if kind == STRICTNESS[0] else kind

    @property
    def ratio(self) -> float:
        if self.results["method"] != "dense" and self.results.get("sparsity_type") is None:
            return self.results.get("sparsity", {}).get("overall", 0.0)
        return self.results.get("sparsity_ratio") or 0.0

    @property
    def removed(self) -> float:
        """Share of the blocks' weights that the run pruned: as asked for, or gone with neurons."""
        neurons = self.results.get("neurons")
        return 1 - neurons["weights_after"] / neurons["weights_before"] if neurons else self.ratio

    @property
    def seed(self) -> int:
        return self.results.get("seed") or 0

    @property
    def settings(self) -> dict[str, Any]:
        """The flags that change a result and have no column of their own in a table."""
        return self.results.get("settings", {})

    @property
    def vocabulary(self) -> VocabularyRecord | dict[str, Any]:
        """The record of a trimmed vocabulary; empty for a whole one."""
        return self.results.get("vocabulary") or {}

    @property
    def calibration(self) -> str:
        return (self.results.get("calibration") or self._recovered_on).get("name") or NONE

    @property
    def _recovered_on(self) -> WindowsRecord | dict[str, Any]:
        return self.results.get("recovery", {}).get("text", {})

    @property
    def sources(self) -> tuple[tuple[str, Any], ...]:
        """The sources that were calibrated or recovered on, with their shares."""
        calibration = self.results.get("calibration") or self._recovered_on
        return tuple((s["source"], s.get("share")) for s in calibration.get("sources", []))

    @cached_property
    def tests(self) -> dict[str, EvaluationRecord]:
        """The evaluations by the name of their test set."""
        return {entry["name"]: entry for entry in self.results["evaluation"]}

    @property
    def tasks(self) -> dict[str, float]:
        """{`task metric`: value} of the metrics that are numbers."""
        values = {}
        for task, metrics in (self.results.get("tasks") or {}).items():
            numbers = {m: v for m, v in metrics.items() if isinstance(v, int | float)}
            values.update({f"{task} {metric}": value for metric, value in numbers.items()})
        return values


def load_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Load every run in the folders, or below them, in the order of their names.

    UserError: a path that is no folder, holds no run, or whose results.json can't be read.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"RUN {path}: no such folder; name a run's --save folder or its parent")
        inside = _run_folders(path)
        if not inside:
            raise UserError(f"RUN {path}: holds no {RESULTS}; name a run's --save folder")
        folders.update((folder.resolve(), folder) for folder in inside)
    return [_load(folder) for folder in folders.values()]


def _run_folders(path: Path) -> list[Path]:
    names = (RESULTS, ERROR)
    if any((path / name).is_file() for name in names):
        return [path]
    return sorted({file.parent for name in names for file in path.rglob(name)})


def _load(folder: Path) -> Run:
    file, error = folder / RESULTS, folder / ERROR
    failed = _read(error, "error") if error.is_file() else None
    reason = failed and str(failed["error"])
    results = _read(file, "model", "method", "evaluation") if file.is_file() else failed
    return Run(folder, results, reason)


def _read(file: Path, *needed: str) -> Any:
    """A run's results.json or error.json. UserError where it can't be read or lacks a field."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"RUN {file}: not valid JSON ({error}); remove it or run again") from error
    if not isinstance(content, dict):
        raise UserError(f"RUN {file}: not a run's results; remove it or run again")
    missing = [name for name in needed if name not in content]
    if missing:
        raise UserError(f"RUN {file}: lacks {', '.join(missing)}; remove it or run again")
    return content
