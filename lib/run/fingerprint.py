"""The fingerprint of a run: what decides its weights and figures.

An interrupted run is resumed only under the same fingerprint, all ranks of one job must have the
same, and a sweep skips a run that was finished with it. Flags that change the result count by
value, those that name a model or texts by the content that they name; a path never counts, nor
does the version of this program, which is recorded. On one machine and with as many threads the
same fingerprint gives the same bytes; other processors and numbers of threads change rounding.
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

from ..model.pretrained import dtype_name
from .flags import FIGURES, NO_RESULT
from .job import Job

PACKAGES = "torch transformers tokenizers datasets accelerate numpy bitsandbytes".split()
DECIDING = "torch", "transformers", "tokenizers", "numpy"  # versions that may change bytes
WEIGHTS = "*.safetensors"
SETTINGS = "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"  # of tokenizer and generation
SETTINGS_BYTES = 2**26  # of one at most, more than any tokenizer has; a log beside it may be larger
CALIBRATION = "seed", "nsamples"


def fingerprint(job: Job, weights: bool) -> dict[str, dict[str, Any]]:
    """Return what decides the weights (`pruning`), and what else decides the figures (`measuring`).

    Each section is {name in messages: value}, with values that JSON can hold. `weights`: with the
    digest of all bytes of the models' weights, where something is resumed or skipped.
    """
    args, texts = job.args, job.texts
    uncounted = [*NO_RESULT, *FIGURES, *(() if job.plan.calibrated else CALIBRATION)]
    counted = {f"--{name}": value for name, value in vars(args).items() if name not in uncounted}
    pruning = counted | {
        "--seed": args.seed if job.plan.calibrated or texts.training else None,
        "--dtype": f"{dtype_name(job.dtype)}, saved as {dtype_name(job.save_dtype)}",
        "--seqlen": job.seqlen,
        "kind of device": job.device.type,
        "config of --model": _content(args.model, job.config, "config.json", "*.py"),
        "weights of --model": _content(args.model, job.config, WEIGHTS) if weights else None,
        "windows of --calibration_data": texts.calibration and texts.calibration["digest"][:16],
    }
    if job.teacher_config:
        teacher = weights and _content(args.teacher, job.teacher_config, WEIGHTS)
        pruning["weights of --teacher"] = teacher
    if job.vocabulary:
        pruning["tokens of --trim_vocabulary"] = job.vocabulary.digest
    if texts.training:
        pruning["windows of --recover"] = texts.training.facts["digest"][:16]
        if job.schedule.windows > job.schedule.windows_alone:  # more than a single process takes
            pruning["windows of a step of --recover"] = job.schedule.windows
    pruning |= {f"version of {name}": versions()[name] for name in DECIDING}
    measuring = {f"--{name}": getattr(args, name) for name in FIGURES}
    measuring["tokenizer of --model"] = _content(args.model, job.config, *SETTINGS)
    for test in texts.tests:
        measuring[f"windows of --eval_data {test.name}"] = test.facts["digest"][:16]
    if args.include_path:
        files = (path for path in Path(args.include_path).rglob("*") if path.is_file())
        measuring["--include_path"] = _digest(files)
    sections = {"pruning": pruning, "measuring": measuring}
    return json.loads(json.dumps(sections, default=str))


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return name and both values of the first entry in which two sections differ."""
    names = (name for name in {**now, **before} if before.get(name) != now.get(name))
    return next(((name, before.get(name), now.get(name)) for name in names), None)


@cache
def versions() -> dict[str, str | None]:
    """{package: version}, with `python`; None for what is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def _content(name: str, config: Any, *patterns: str) -> str:
    """Return the commit of a model on the hub, or a digest of a folder's weights or settings."""
    folder = Path(name)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None))
    files = {file for each in patterns for file in folder.glob(each) if file.is_file()}
    return _digest(f for f in files if f.match(WEIGHTS) or f.stat().st_size <= SETTINGS_BYTES)


def _digest(files: Iterable[Path]) -> str:
    """Return a digest of the names and all bytes of files, which are read side by side."""
    files, hasher = sorted(files), hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for file, digest in zip(files, pool.map(_file_digest, files), strict=True):
            hasher.update(file.name.encode() + b"\0" + digest)
    return hasher.hexdigest()[:16]


def _file_digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
