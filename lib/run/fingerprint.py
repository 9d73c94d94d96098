"""The fingerprint of a run: everything that determines its weights and figures.

An interrupted run is resumed only with the same fingerprint, and all ranks of a run must have the
same. A sweep skips a run that was finished with it. Flags that change the result count by value;
models and texts count by content, paths do not count. The version of this program counts, and the
revisions of the pruning method, of the quantizer and of figures (by held-out text, training keeps
its best state); a method in a user's file counts by content. On one machine and with as many
threads, the same fingerprint gives the same bytes; another processor or number of threads changes
rounding.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..eval import REVISION
from ..formats.registry import QUANTIZED
from ..methods.gptq import GPTQ
from ..methods.registry import is_file, label, split_file
from ..methods.sparsity import ALLOCATIONS
from ..model.device import dtype_name
from .flags import FIGURES, MODEL, named
from .run import Run

PACKAGES = "torch transformers tokenizers datasets accelerate numpy bitsandbytes".split()
DECIDING = "torch", "transformers", "tokenizers", "numpy"  # versions that may change bytes
VERSION = "version of langprune"
EARLIER = {VERSION: "before 0.4"}  # which did not write it
TRIMS = "--trim_vocabulary"  # an entry of runs that could trim
WITHOUT = {TRIMS: False}  # all others are as today's
WEIGHTS = "*.safetensors"
SETTINGS = "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"  # tokenizer and generation
SETTINGS_BYTES = 2**26  # limit of a settings file; larger files, such as logs, do not count


def fingerprint(run: Run, weights: bool) -> dict[str, dict[str, Any]]:
    """Return what determines the weights (`pruning`), and also the figures (`measuring`).

    Each section is {name in messages: value}, with values that JSON can hold. `weights`: include
    the digest of all bytes of the models' weights, if a run may be resumed or skipped; one rank per
    machine reads them. Every rank must call this.
    """
    flags, windows, dist = run.flags, run.windows, run.dist
    read = {"--model": (flags.model, run.model.config)}
    if run.teacher:
        read["--teacher"] = flags.teacher, run.teacher.config
    digests = None
    if weights and dist.local_rank == 0:
        digests = {f"weights of {flag}": _content(*each, WEIGHTS) for flag, each in read.items()}
    digests = dist.of_machine(digests)
    uncounted = [] if flags.calibrated else named(step="draw")
    counted = [name for name in named(decides=MODEL) if name not in uncounted]
    pruning = {VERSION: __version__} | {f"--{name}": getattr(flags, name) for name in counted}
    pruning |= {
        "--seed": flags.seed if flags.calibrated or windows.training else None,
        "--dtype": f"{dtype_name(run.model.dtype)}, saved as {dtype_name(run.model.save_dtype)}",
        "--seqlen": windows.seqlen,
        "kind of device": run.device.type,
        "windows of --calibration_data": windows.record and windows.record["digest"][:16],
    }
    for flag, each in read.items():
        pruning[f"config of {flag}"] = _content(*each, "config.json", "*.py")
    pruning |= digests or {}
    if windows.training:
        pruning["windows of --recover"] = windows.training.record["digest"][:16]
        pruning["revision of figures"] = REVISION
        if run.schedule.windows > run.schedule.windows_alone:  # more than one process takes
            pruning["windows of a step of --recover"] = run.schedule.windows
    if flags.prune_method:
        pruning["revision of --prune_method"] = flags.method_class.revision
        if is_file(flags.prune_method):
            pruning["--prune_method"] = label(flags.prune_method)
            file, _ = split_file(flags.prune_method)
            pruning["file of --prune_method"] = _digest([Path(file)], named=False)
        if flags.allocation not in ALLOCATIONS:
            pruning["--allocation"] = f"layers {_digest([Path(flags.allocation)], named=False)}"
    if flags.quantizes and flags.format not in QUANTIZED:
        pruning["--quantize"] = f"types {_digest([Path(flags.format)], named=False)}"
    if flags.quantizes:
        pruning["revision of --quantize"] = GPTQ.revision
    pruning |= {f"version of {name}": versions()[name] for name in DECIDING}
    measuring = {f"--{name}": getattr(flags, name) for name in named(decides=FIGURES)}
    measuring["revision of figures"] = REVISION
    measuring["--batch_size"] = run.batch_size  # changes the rounding of sums
    measuring["tokenizer of --model"] = _content(flags.model, run.model.config, *SETTINGS)
    for test in windows.tests:
        measuring[f"windows of --eval_data {test.name}"] = test.record["digest"][:16]
    if flags.include_path:
        files = (path for path in Path(flags.include_path).rglob("*") if path.is_file())
        measuring["--include_path"] = _digest(files)
    sections = {"pruning": pruning, "measuring": measuring}
    return json.loads(json.dumps(sections, default=str))


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the name and both values of the first entry that differs."""
    before, now = WITHOUT | before, WITHOUT | now
    names = (name for name in {**now, **before} if before.get(name) != now.get(name))
    return next(((name, before.get(name), now.get(name)) for name in names), None)


@cache
def versions() -> dict[str, str | None]:
    """Return {package: version}, with `python`; None if a package is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def _content(name: str, config: Any, *patterns: str) -> str:
    """Return the commit of a model on the Hub, or a digest of a folder's weights or settings."""
    folder = Path(name)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None))
    files = {file for each in patterns for file in folder.glob(each) if file.is_file()}
    return _digest(f for f in files if f.match(WEIGHTS) or f.stat().st_size <= SETTINGS_BYTES)


def model_digest(name: str, config: Any) -> str:
    """Return the identity of a model and its tokenizer: the Hub's commit or a folder's digest."""
    return _content(name, config, WEIGHTS, *SETTINGS)


def _digest(files: Iterable[Path], named: bool = True) -> str:
    """Return a digest of all bytes of files, and of their names if `named`; reads in parallel."""
    files, hasher = sorted(files), hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for file, digest in zip(files, pool.map(_file_digest, files), strict=True):
            hasher.update((file.name.encode() + b"\0") * named + digest)
    return hasher.hexdigest()[:16]


def _file_digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
