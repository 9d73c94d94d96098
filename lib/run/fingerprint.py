"""What decides a result, in one place: two runs with the same fingerprint give the same bytes.

An interrupted run goes on only under the same fingerprint (lib/model/work_folder.py), the processes
of one job must have the same, and a sweep does a run again where it differs from the one that is
kept. What a flag counts for stands beside it, in lib/run/flags.py: values of flags that change the
result, and what stands behind those that name an input; never where something is kept.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.model.access import weight_files
from lib.model.pretrained import dtype_name, pick_dtype, saved_dtype
from lib.model.quantised import stored_bits
from lib.run.flag import RESULT
from lib.run.flags import FLAGS
from lib.util.versions import versions

if TYPE_CHECKING:
    from lib.run.job import Job

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")
LIBRARY = Path(__file__).parents[1]
CODE = ("distributed", "methods", "data", "model", "packed", "pruning")
CODE += ("vocabulary.py", "prune.py", "recover.py", "eval.py", "sparse.py", "util/token_ids.py")
TIMES = "times of the weight files"  # differ between machines that hold the same files


def fingerprint(job: Job) -> dict[str, dict[str, Any]]:
    """What decides the weights (`pruning`) and what more decides the figures (`measuring`).

    Each is {what it is called in a message: its value}, plain enough for JSON.
    """
    args = job.args
    pruning, measuring = {}, {}
    for name, flag in FLAGS.items():
        if flag.role == RESULT and (job.calibrated or flag.group != "calibration"):
            section = measuring if flag.group == "evaluation" else pruning
            section[f"--{name}"] = getattr(args, name)
    working = dtype_name(pick_dtype(args.dtype, job.config, job.device))
    saved = dtype_name(saved_dtype(args.dtype, job.config))
    pruning["--dtype"] = f"{working}, saved as {saved}"
    pruning["--seqlen"] = job.seqlen
    pruning |= _of_model("--model", args.model, job.config)
    if job.teacher_config:
        pruning |= _of_model("--teacher", args.teacher, job.teacher_config)
    if job.vocabulary:
        pruning["tokens of --trim_vocabulary"] = job.vocabulary.digest
    texts = job.texts
    pruning["windows of --calibration_data"] = (
        texts.calibration and texts.calibration["digest"][:16]
    )
    if texts.training:
        pruning["--seed"] = args.seed
        pruning["windows of --recover"] = texts.training.facts["digest"][:16]
    measuring |= {
        f"windows of --eval_data {one.name}": one.facts["digest"][:16] for one in texts.tests
    }
    if args.abilities or args.fidelity:
        measuring["seed of questions"] = job.question_seed
    if args.include_path:
        measuring["--include_path"] = _of_tasks(Path(args.include_path))
    if args.pairs:
        measuring["--pairs"] = hashlib.sha256(Path(args.pairs).read_bytes()).hexdigest()[:16]
    quantised = args.load_bit or stored_bits(job.config)
    packages = (*PACKAGES, "bitsandbytes") if quantised else PACKAGES
    pruning |= {f"version of {name}": versions()[name] for name in packages}
    pruning["code of lib/"] = code_digest()
    plain = {"pruning": pruning, "measuring": measuring}
    return json.loads(json.dumps(plain, default=str))


def _of_tasks(folder: Path) -> str:
    """Digest of a folder of tasks: what its YAML and Python files hold, sizes of the others."""
    whole = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        code = file.suffix in (".yaml", ".yml", ".py")
        whole.update(str(file.relative_to(folder)).encode())
        whole.update(file.read_bytes() if code else str(file.stat().st_size).encode())
    return whole.hexdigest()[:16]


def _of_model(flag: str, name: str, config: Any) -> dict[str, str]:
    """What stands behind a flag that names a model."""
    files = weight_files(name)
    sizes = {file: size for file, (size, _) in files.items()}
    times = {file: time for file, (_, time) in files.items()}
    return {
        f"config of {flag}": _digest(_config(config)),
        f"weights of {flag}": getattr(config, "_commit_hash", None) or _digest(sizes),
        TIMES if flag == "--model" else f"{TIMES} of {flag}": _digest(times),
    }


def difference(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first thing in which two sections differ, with both values; None where in nothing."""
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            return name, before.get(name), now.get(name)
    return None


@cache
def code_digest() -> str:
    """Of the source files that take part in a result."""
    whole = hashlib.sha256()
    for part in CODE:
        place = LIBRARY / part
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            whole.update(f"{file.relative_to(LIBRARY).as_posix()}\n".encode())
            whole.update(file.read_bytes())
    return whole.hexdigest()[:16]


def _config(config: Any) -> dict[str, Any]:
    """The model's config without where it was found and by what it was written."""
    known = config.to_dict()
    return {k: v for k, v in known.items() if k not in ("_name_or_path", "transformers_version")}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
