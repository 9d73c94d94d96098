"""What decides a result, in one place: two runs with the same fingerprint give the same bytes.

An interrupted run is resumed only under the same fingerprint, the processes of one job must have
the same, and a sweep runs again what has another one than it had. Which flags count is declared in
lib/run/flags.py: those that change the result count by their values, those that name a model or
texts by the content that they name; a path never counts.
"""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.model.pretrained import dtype_name, pick_dtype, saved_dtype
from lib.model.quantised import stored_bits
from lib.run.code_digest import code_digest, files_digest
from lib.run.flag import RESULT
from lib.run.flags import FLAGS
from lib.run.model_digest import config_digest, settings_digest, weights_digest
from lib.util.versions import versions

if TYPE_CHECKING:
    from lib.run.job import Job

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")
CODE = "code of the program"


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
    pruning |= _of_model("--model", args, job.config)
    measuring["tokenizer and generation settings of --model"] = settings_digest(
        args.model, job.config
    )
    if job.teacher_config:
        pruning |= _of_model("--teacher", args, job.teacher_config)
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
    pruning[CODE] = code_digest()
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


def _of_model(flag: str, args: Namespace, config: Any) -> dict[str, str]:
    """What is behind a flag that names a model."""
    name = getattr(args, flag.removeprefix("--"))
    facts = {
        f"config of {flag}": config_digest(config),
        f"weights of {flag}": weights_digest(name, config),
    }
    if args.trust_remote_code and Path(name).is_dir():
        facts[f"code of {flag}"] = files_digest(Path(name).glob("*.py"))
    return facts


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: both values} of all in which two sections differ."""
    return {
        name: (before.get(name), now.get(name))
        for name in {**now, **before}
        if before.get(name) != now.get(name)
    }
