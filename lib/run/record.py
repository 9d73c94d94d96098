"""What a run leaves beside the model: results.json's common part, the log, the summary."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lib
from lib.run.fingerprint import versions
from lib.util.command import one_line
from lib.util.files import move_aside, write_text
from lib.util.host import gib, peak_memory

if TYPE_CHECKING:
    from lib.data.windows import TestSet
    from lib.model.blocks import BlockRunner
    from lib.run.job import Job


def base_results(job: Job, runner: BlockRunner) -> dict[str, Any]:
    """Return what is known of a run before its first step; see lib/run/results.py."""
    from lib.model.pretrained import footprint, parameter_bytes

    args, method = job.args, job.args.prune_method
    if args.teacher or (job.quantises and not args.quantize):
        done = "pruned before"
    else:
        done = args.quantize or ("recovered" if args.recover else "dense")
    return {
        "model": args.model,
        "method": method or done,
        "sparsity_type": args.sparsity_type if method else None,
        "sparsity_ratio": args.sparsity_ratio if method else None,
        "options": {"variant": args.use_variant} if method == "wanda" else {},
        "flags": vars(args),
        "seed": args.seed,
        "versions": {"langprune": lib.__version__} | versions(),
        "device": device_name(job.device),
        "processor": processor(),
        "footprint": {"before": footprint(runner.model)},
        "dense_bytes": parameter_bytes(runner.model, runner.save_dtype or runner.model.dtype),
        "fingerprint": job.fingerprint,
    }


def finish_results(job: Job, runner: BlockRunner) -> None:
    """Add what is known at the end."""
    from lib.model.pretrained import footprint
    from lib.vocabulary import NOTE, vocabulary_record

    results = job.results
    results |= {"bos": job.texts.bos, "calibration": job.texts.calibration}
    if vocabulary := vocabulary_record(job.vocabulary, job.config):
        results["vocabulary"] = vocabulary | {"note": NOTE}
    results["bits_per_byte"] = {
        each["name"]: each["bits_per_byte"] for each in results["evaluation"]
    }
    results["footprint"]["after"] = footprint(runner.model)
    results |= {"seconds": job.seconds, "peak_memory": peak_memory(job.device)}


def device_name(device: Any) -> str:
    """Describe a device, such as `cuda:0 (NVIDIA H100)` or `cpu (2 threads)`."""
    import torch

    if device.type == "cpu":
        return f"{device} ({torch.get_num_threads()} threads)"
    return f"{device} ({torch.get_device_module(device).get_device_name(device)})"


def processor() -> str:
    """Describe the processor, whose kind decides how sums are rounded."""
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def evaluation_record(test: TestSet, figures: dict[str, float]) -> dict[str, Any]:
    """Return the record of a test set: what it is, and its figures (lib/eval.py)."""
    record = test.facts | {name: figures[name] for name in figures if "nats" not in name}
    record["bits_per_byte"] = figures["nats"] / math.log(2) / test.bytes
    if "dense_nats" in figures:
        nats = figures["dense_nats"]
        record["dense"] = {"perplexity": math.exp(nats) if nats < 700 else math.inf}
        if figures["compared_windows"] == len(test.windows):
            predicted = test.windows.numel() - len(test.windows)
            record["dense"]["bits_per_byte"] = nats * predicted / math.log(2) / test.bytes
    return record


def write_log(folder: Path, results: dict[str, Any]) -> None:
    """Write log_METHOD.txt in wanda's format: names, then one line of values, tab-separated.

    `ppl_test` is the first test set; where there are several, each follows as `ppl_NAME`. Where the
    vocabulary was trimmed, bits per byte come before them, and a third line says why.
    """
    method, vocabulary = results["method"], results.get("vocabulary")
    names, values = ["method", "actual_sparsity"], [method]
    values.append(f"{results['sparsity']['overall']:.4f}")
    measures = {"bits_per_byte": results["bits_per_byte"]} if vocabulary else {}
    for name, by_test in (measures | {"ppl": results["perplexity"]}).items():
        figures = {"test": next(iter(by_test.values()))} | (by_test if len(by_test) > 1 else {})
        names += [f"{name}_{test}" for test in figures]
        values += [f"{value:.4f}" for value in figures.values()]
    lines = ["\t".join(names), "\t".join(values)]
    lines += [f"# {vocabulary['note']}"] if vocabulary else []
    path = folder / f"log_{method.replace(' ', '_')}.txt"
    write_text(path, "\n".join(lines) + "\n")


def keep_other_results(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Move the results of another run in the folder aside."""
    from lib.run.results import RESULTS, read_results

    try:
        before = read_results(folder).get("fingerprint")
    except (OSError, ValueError, AttributeError):
        before = None
    sections = ("pruning", "measuring")
    same = before and all(before.get(name) == fingerprint[name] for name in sections)
    if not same:
        for file in [folder / RESULTS, *folder.glob("log_*.txt"), folder / "recovery.png"]:
            move_aside(file)


def print_summary(results: dict[str, Any]) -> None:
    """Print the summary of a run, one fact a line; its last line ends with a perplexity."""
    variant = " (variant)" if results["options"].get("variant") else ""
    lines = [f"{results['method']}{variant}: {_share_pruned(results)}", _cost_line(results)]
    for test in results["evaluation"]:
        lines += _test_lines(test)
    for each in results["completions"]:
        lines.append(f"{one_line(each['test'])}: {one_line(each['prompt'])!r}")
        lines += [
            f"  {name}: {one_line(each[name])!r}" for name in ("dense", "model") if name in each
        ]
    if vocabulary := results.get("vocabulary"):
        lines.append(vocabulary["note"])
        for name, value in results["bits_per_byte"].items():
            lines.append(f"bits per byte {one_line(name)}: {value:.4f}")
    recovery = results.get("recovery")
    for test in results["evaluation"]:
        name, value = one_line(test["name"]), test["perplexity"]
        if recovery:
            dense, before = (recovery[key][test["name"]] for key in ("dense", "before"))
            was_pruned = results["sparsity_type"] or results["method"] == "pruned before"
            pruned = f" pruned {before:.4f}," if was_pruned else ""
            lines.append(f"{name}: dense {dense:.4f},{pruned} recovered {value:.4f}")
        elif "dense" in test:
            some = f" on {test['compared_windows']} windows" * (
                "bits_per_byte" not in test["dense"]
            )
            lines.append(f"{name}: dense {test['dense']['perplexity']:.4f}{some}")
        lines.append(f"perplexity {name}: {value:.4f}")
    print(*lines, sep="\n")


def _share_pruned(results: dict[str, Any]) -> str:
    if neurons := results.get("neurons"):
        return (
            f"{neurons['after']} of {neurons['before']} neurons are left in each MLP, "
            f"{neurons['weights_after'] / neurons['weights_before']:.4f} of the blocks' weights"
        )
    return f"{results['sparsity']['overall']:.4f} of the blocks' weights are zero"


def _cost_line(results: dict[str, Any]) -> str:
    memory = results["peak_memory"]
    times = ", ".join(f"{step} {value:.1f} s" for step, value in results["seconds"].items())
    line = f"time: {times}; peak memory: host {gib(memory['host'])}"
    return line + (f", device {gib(memory['device'])}" if memory["device"] else "")


def _test_lines(test: dict[str, Any]) -> list[str]:
    """Lines on a test set: its size, bits per byte, errors, and divergence from the dense model."""
    name = one_line(test["name"])
    parts = [f"{test['windows']} windows, {test['tokens']} tokens"]
    parts.append(f"{test['bits_per_byte']:.4f} bits per byte")
    if math.isfinite(test["standard_error"]):  # nan for a single window
        parts.append(f"standard error of the perplexity {test['standard_error']:.2f}")
    lines = [f"{name}: {', '.join(parts)}"]
    if "kl" in test:
        lines.append(
            f"{name}: KL {with_error(test, 'kl')} nats a token from the dense model, the same most "
            f"likely token at {with_error(test, 'top1_agreement', percent=True)} of the positions "
            f"of {test['compared_windows']} windows"
        )
    return lines


def with_error(test: dict[str, Any], key: str, percent: bool = False) -> str:
    """Format a figure of a test set, with its standard error if it has one: `0.123 ± 0.004`."""
    value, error = test[key], test.get(f"{key}_standard_error")
    form = ".2%" if percent else ".4f"
    has_error = error is not None and math.isfinite(error)
    return f"{value:{form}}" + (f" ± {error:{form}}" if has_error else "")
