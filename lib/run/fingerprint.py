"""The fingerprint of a run: what decides its weights and figures.

An interrupted run is resumed only under the same fingerprint, all ranks of one job must have the
same, and a sweep skips a run that was finished with it. Flags that change the result count by
value, those that name a model or texts by the content that they name; a path never counts, nor
does the version of this program, which is recorded. On one machine and with as many threads the
same fingerprint gives the same bytes; other processors and numbers of threads change rounding. Of
the code that of the pruning method and of the quantizer counts, by revision and source.
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

from ..methods.gptq import GPTQ
from ..methods.registry import is_file, label, source_digest
from ..methods.sparsity import ALLOCATIONS
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
    digest of all bytes of the models' weights, where something is resumed or skipped; one rank of a
    machine reads them. Every rank must call this.
    """
    args, plan, texts, dist = job.args, job.plan, job.texts, job.dist
    read = {"--model": job.config, "--teacher": job.teacher_config}
    read = {flag: (vars(args)[flag[2:]], config) for flag, config in read.items() if config}
    digests = None
    if weights and dist.local_rank == 0:
        digests = {f"weights of {flag}": _content(*each, WEIGHTS) for flag, each in read.items()}
    digests = dist.all_gather_object(digests)[dist.rank - dist.local_rank]
    uncounted = [*NO_RESULT, *FIGURES, *(() if job.plan.calibrated else CALIBRATION)]
    counted = {f"--{name}": value for name, value in vars(args).items() if name not in uncounted}
    pruning = counted | {
        "--seed": args.seed if job.plan.calibrated or texts.training else None,
        "--dtype": f"{dtype_name(job.dtype)}, saved as {dtype_name(job.save_dtype)}",
        "--seqlen": job.seqlen,
        "kind of device": job.device.type,
        "windows of --calibration_data": texts.calibration and texts.calibration["digest"][:16],
    }
    for flag, each in read.items():
        pruning[f"config of {flag}"] = _content(*each, "config.json", "*.py")
    pruning |= digests or {}
    if job.vocabulary:
        pruning["tokens of --trim_vocabulary"] = job.vocabulary.digest
    if texts.training:
        pruning["windows of --recover"] = texts.training.facts["digest"][:16]
        if job.schedule.windows > job.schedule.windows_alone:  # more than a single process takes
            pruning["windows of a step of --recover"] = job.schedule.windows
    if plan.method:
        source = source_digest(plan.method_class, "prune.py", "remove.py")
        pruning["source of --prune_method"] = source
        if is_file(plan.method):
            pruning["--prune_method"] = label(plan.method)
        if plan.allocation not in ALLOCATIONS:
            pruning["--allocation"] = f"layers {_digest([Path(plan.allocation)], named=False)}"
    if plan.rounds:
        pruning["source of --quantize"] = source_digest(GPTQ, "prune.py", "quantize.py")
    pruning |= {f"version of {name}": versions()[name] for name in DECIDING}
    measuring = {f"--{name}": getattr(args, name) for name in FIGURES}
    measuring["--batch_size"] = job.batch_size  # sums of other batches are rounded otherwise
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


def model_digest(name: str, config: Any) -> str:
    """Return what identifies a model with its tokenizer: the hub's commit, or a folder's digest."""
    return _content(name, config, WEIGHTS, *SETTINGS)


def _digest(files: Iterable[Path], named: bool = True) -> str:
    """Return a digest of all bytes of files, and their names if `named`, read side by side."""
    files, hasher = sorted(files), hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for file, digest in zip(files, pool.map(_file_digest, files), strict=True):
            hasher.update((file.name.encode() + b"\0") * named + digest)
    return hasher.hexdigest()[:16]


def _file_digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
