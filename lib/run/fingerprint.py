"""The fingerprint of a run: two runs with the same fingerprint give the same bytes.

An interrupted run is resumed only under the same fingerprint, all processes of one job must have
the same, and a sweep reruns a run whose fingerprint has changed. lib/run/flags.py declares which
flags count: those that change the result count by value, those that name a model or texts by the
content that they name; a path never counts.
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
    """Return what decides the weights (`pruning`), and what else decides the figures (`measuring`).

    Each section is {name in messages: value}, with values that JSON can hold.
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
    pruning |= _model_digests("--model", args, job.config)
    measuring["tokenizer and generation settings of --model"] = settings_digest(
        args.model, job.config
    )
    if job.teacher_config:
        pruning |= _model_digests("--teacher", args, job.teacher_config)
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
        f"windows of --eval_data {test.name}": test.facts["digest"][:16] for test in texts.tests
    }
    if args.abilities or args.fidelity:
        measuring["seed of questions"] = job.question_seed
    if args.include_path:
        measuring["--include_path"] = _tasks_digest(Path(args.include_path))
    if args.pairs:
        measuring["--pairs"] = hashlib.sha256(Path(args.pairs).read_bytes()).hexdigest()[:16]
    quantised = args.load_bit or stored_bits(job.config)
    packages = (*PACKAGES, "bitsandbytes") if quantised else PACKAGES
    pruning |= {f"version of {name}": versions()[name] for name in packages}
    pruning[CODE] = code_digest()
    sections = {"pruning": pruning, "measuring": measuring}
    return json.loads(json.dumps(sections, default=str))


def _tasks_digest(folder: Path) -> str:
    """Return the digest of a folder of tasks: content of YAML and Python files, sizes of others."""
    hasher = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        code = file.suffix in (".yaml", ".yml", ".py")
        hasher.update(str(file.relative_to(folder)).encode())
        hasher.update(file.read_bytes() if code else str(file.stat().st_size).encode())
    return hasher.hexdigest()[:16]


def _model_digests(flag: str, args: Namespace, config: Any) -> dict[str, str]:
    """Return the digests of the model that `flag` names."""
    name = getattr(args, flag.removeprefix("--"))
    facts = {
        f"config of {flag}": config_digest(config),
        f"weights of {flag}": weights_digest(name, config),
    }
    if args.trust_remote_code and Path(name).is_dir():
        facts[f"code of {flag}"] = files_digest(Path(name).glob("*.py"))
    return facts


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {name: both values} of all entries in which two sections differ."""
    return {
        name: (before.get(name), now.get(name))
        for name in {**now, **before}
        if before.get(name) != now.get(name)
    }
