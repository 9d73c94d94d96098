"""The outputs of a run besides the model: common part of results.json, log, and summary."""

from __future__ import annotations

import math
import platform
import re
import shlex
import subprocess
from itertools import count
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.windows import TestSet
from ..eval import exp
from ..model.blocks import BlockRunner
from ..model.device import checkpoint_dtype
from ..model.saving import footprint, parameter_bytes
from ..model.skeleton import auto_class
from ..util.errors import UserError, one_line
from ..util.files import write_text
from ..util.host import gib, peak_memory
from ..util.processes import ROOT
from .figures import figures_table, notes
from .fingerprint import versions
from .flags import command_words
from .results import LOSSES, RESULTS, read_results
from .run import Run
from .trimmed import vocabulary_record


def base_results(run: Run, runner: BlockRunner) -> dict[str, Any]:
    """Return the results that are known before the first step; see lib/run/results.py."""
    flags, device = run.flags, run.device
    dtype = checkpoint_dtype(run.model.config)  # dtype on the disk
    if device.type == "cpu":
        threads = torch.get_num_threads()
        about = f"{threads} thread{'s' * (threads > 1)}"
    else:
        about = torch.get_device_module(device).get_device_name(device)
    vocabulary = vocabulary_record(run.model)
    return (
        {
            "model": flags.model,
            "method": flags.name,
            "sparsity_type": flags.sparsity_type if flags.prune_method else None,
            "sparsity_ratio": flags.sparsity.ratio if flags.prune_method else None,
            "loaded_by": auto_class(run.model.config).__name__,
            "flags": vars(flags),
            "command": shlex.join(command_words(vars(flags))),
            "seed": flags.seed,
            "date": flags.date,
            "versions": {"langprune": __version__} | versions(),
            "device": f"{device} ({about})",
            "processor": processor(),
            "footprint": {"before": footprint(runner.model)},
            "dense_bytes": None if flags.teacher else parameter_bytes(runner.model, dtype),
            "fingerprint": run.fingerprint,
        }
        | commit()
        | ({"vocabulary": vocabulary} if vocabulary else {})
    )


def commit() -> dict[str, Any]:
    """Return the commit of the checkout, and whether its code differs; {} if there is none."""
    if not (ROOT / ".git").exists():  # installed, perhaps inside another checkout
        return {}
    words = "git status --porcelain=v2 --branch -- main.py lib".split()
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or another user's folder
        return {}
    first, *others = done.stdout.splitlines()  # # branch.oid HASH
    changed = any(not line.startswith("#") for line in others)
    return {"commit": {"hash": first.split()[-1], "changed": changed}}


def processor() -> str:
    """Return the name of the processor, which affects how sums are rounded."""
    linux = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", linux.read_text()) if linux.exists() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def finish_results(run: Run, runner: BlockRunner) -> None:
    """Add windows, memory, timing and footprint to the results, once all is measured."""
    results = run.results
    results |= {"bos": run.windows.bos, "calibration": run.windows.record}
    results["footprint"]["after"] = footprint(runner.model)
    results |= {"seconds": run.seconds, "peak_memory": peak_memory(run.device)}


def evaluation_record(
    test: TestSet, figures: dict[str, Any], only_compared: bool = False
) -> dict[str, Any]:
    """Return the record of a test set: its description and its figures (lib/eval.py)."""
    names = (name for name in figures if "nats" not in name and name != "by_window")
    record = test.record | {name: figures[name] for name in names}
    if not only_compared or figures["compared_windows"] == len(test.windows):
        record["bits_per_byte"] = figures["nats"] / math.log(2) / record["bytes"]
    if "dense_nats" in figures:
        dense, model = (figures[name] for name in ("dense_nats", "model_nats"))
        record["dense"] = {"perplexity": exp(dense)}
        if figures["compared_windows"] == len(test.windows):
            bits = figures["dense_sum_nats"] / math.log(2)
            record["dense"]["bits_per_byte"] = bits / record["bytes"]
        else:  # counterpart of the dense model's perplexity
            record["compared_perplexity"] = exp(model)
    return record


def write_log(folder: Path, results: dict[str, Any]) -> None:
    """Write log_METHOD.txt in wanda's format: names, then one line of values, tab-separated.

    `ppl_test` is the first test set; if there are several, each follows as `ppl_NAME`. If the
    vocabulary was trimmed, bits per byte come first. Lines with `#` compare all figures with the
    dense model's.
    """
    method, vocabulary, tests = results["method"], results.get("vocabulary"), results["evaluation"]
    columns = {"method": method, "actual_sparsity": f"{results['sparsity']['overall']:.4f}"}
    measures = {"bits_per_byte": "bits_per_byte"} if vocabulary else {}
    for name, figure in (measures | {"ppl": "perplexity"}).items():
        columns[f"{name}_test"] = f"{tests[0][figure]:.4f}"
        if len(tests) > 1:
            columns |= {f"{name}_{test['name']}": f"{test[figure]:.4f}" for test in tests}
    lines = ["\t".join(columns), "\t".join(columns.values())]
    lines += [f"# {line}" for line in figures_table(results).splitlines()]
    lines += [f"# {vocabulary['note']}"] if vocabulary else []
    write_text(folder / f"log_{method.replace(' ', '_')}.txt", "\n".join(lines) + "\n")


def keep_other_results(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Rename the results of another run in the folder to NAME.1.SUFFIX, or the next free number."""
    try:
        before = read_results(folder).get("fingerprint")
    except UserError:  # there are no results
        before = None
    if before != fingerprint:
        logs = (f for f in folder.glob("log_*.txt") if "." not in f.stem)  # not renamed yet
        logs = [f for f in logs if f.read_bytes().startswith(b"method\t")]
        for file in filter(Path.exists, [folder / RESULTS, folder / LOSSES, *logs]):
            others = (file.with_name(f"{file.stem}.{n}{file.suffix}") for n in count(1))
            other = file.rename(next(path for path in others if not path.exists()))
            print(f"{file}: it belongs to another run and was renamed to {other.name}")


def print_summary(results: dict[str, Any]) -> None:
    """Print the summary of a run; its last line ends with a perplexity."""
    variant = " (variant)" if results["flags"]["use_variant"] else ""
    memory = results["peak_memory"]
    times = ", ".join(f"{step} {value:.1f} s" for step, value in results["seconds"].items())
    device = f", device {gib(memory['device'])}" if memory["device"] else ""
    lines = [f"{results['method']}{variant}", *notes(results)]
    lines.append(f"time: {times}; peak memory: host {gib(memory['host'])}{device}")
    for each in results["completions"]:
        lines.append(f"{one_line(each['test'])}: {one_line(each['prompt'])!r}")
        lines += [
            f"  {name}: {one_line(each[name])!r}" for name in ("dense", "model") if name in each
        ]
    named = {one_line(test["name"]): test for test in results["evaluation"]}
    for name, test in named.items():
        of = f" of {test['of_windows']}" if "of_windows" in test else ""
        lines.append(f"{name}: {test['windows']}{of} windows, {test['tokens']} tokens")
    lines += [figures_table(results), f"log and results: {results['flags']['save']}"]
    lines += [f"perplexity {name}: {test['perplexity']:.4f}" for name, test in named.items()]
    print(*lines, sep="\n")
