"""What a run leaves beside the model: results.json's common part, the log, the summary."""

from __future__ import annotations

import math
import platform
from contextlib import suppress
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
    import torch

    from lib.model.pretrained import footprint, parameter_bytes

    args, method, device = job.args, job.args.prune_method, job.device
    dtype = runner.save_dtype or runner.model.dtype
    if device.type == "cpu":
        about = f"{torch.get_num_threads()} threads"
    else:
        about = torch.get_device_module(device).get_device_name(device)
    if args.teacher or (job.quantises and not args.quantize):
        done = "pruned before"
    else:
        done = args.quantize or ("recovered" if args.recover else "dense")
    return {
        "model": args.model,
        "method": method or done,
        "sparsity_type": args.sparsity_type if method else None,
        "sparsity_ratio": args.sparsity_ratio if method else None,
        "flags": vars(args),
        "seed": args.seed,
        "versions": {"langprune": lib.__version__} | versions(),
        "device": f"{device} ({about})",
        "processor": processor(),
        "footprint": {"before": footprint(runner.model)},
        "dense_bytes": None if args.teacher else parameter_bytes(runner.model, dtype),
        "fingerprint": job.fingerprint,
    }


def processor() -> str:
    """Return the name of the processor, whose kind decides how sums are rounded."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def finish_results(job: Job, runner: BlockRunner) -> None:
    """Add what is known at the end."""
    from lib.model.pretrained import footprint
    from lib.vocabulary import NOTE, vocabulary_record

    results = job.results
    results |= {"bos": job.texts.bos, "calibration": job.texts.calibration}
    if vocabulary := vocabulary_record(job.vocabulary, job.config):
        results["vocabulary"] = vocabulary | {"note": NOTE}
    results["footprint"]["after"] = footprint(runner.model)
    results |= {"seconds": job.seconds, "peak_memory": peak_memory(job.device)}


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
    method, vocabulary, tests = results["method"], results.get("vocabulary"), results["evaluation"]
    columns = {"method": method, "actual_sparsity": f"{results['sparsity']['overall']:.4f}"}
    measures = {"bits_per_byte": "bits_per_byte"} if vocabulary else {}
    for name, figure in (measures | {"ppl": "perplexity"}).items():
        columns[f"{name}_test"] = f"{tests[0][figure]:.4f}"
        if len(tests) > 1:
            columns |= {f"{name}_{test['name']}": f"{test[figure]:.4f}" for test in tests}
    lines = ["\t".join(columns), "\t".join(columns.values())]
    lines += [f"# {vocabulary['note']}"] if vocabulary else []
    write_text(folder / f"log_{method.replace(' ', '_')}.txt", "\n".join(lines) + "\n")


def keep_other_results(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Move the results of another run in the folder aside."""
    from lib.run.results import RESULTS, read_results

    try:
        before = read_results(folder)["fingerprint"]
        same = all(before[name] == fingerprint[name] for name in ("pruning", "measuring"))
    except (OSError, ValueError, LookupError, TypeError):
        same = False
    if not same:
        logs = [f for f in folder.glob("log_*.txt") if f.read_bytes().startswith(b"method\t")]
        for file in [folder / RESULTS, *logs, folder / "recovery.png"]:
            move_aside(file)


def print_summary(results: dict[str, Any]) -> None:
    """Print the summary of a run, one fact a line; its last line ends with a perplexity."""
    kind = results["sparsity_type"]
    if smaller := results.get(kind):
        pruned = (
            f"{smaller['after']} of {smaller['before']} {kind} are left in each block, "
            f"{smaller['weights_after'] / smaller['weights_before']:.4f} of the blocks' weights"
        )
    else:
        pruned = f"{results['sparsity']['overall']:.4f} of the blocks' weights are zero"
    variant = " (variant)" if results["flags"]["use_variant"] else ""
    memory = results["peak_memory"]
    times = ", ".join(f"{step} {value:.1f} s" for step, value in results["seconds"].items())
    device = f", device {gib(memory['device'])}" if memory["device"] else ""
    lines = [f"{results['method']}{variant}: {pruned}"]
    lines.append(f"time: {times}; peak memory: host {gib(memory['host'])}{device}")
    for test in results["evaluation"]:
        lines += _test_lines(test)
    for each in results["completions"]:
        lines.append(f"{one_line(each['test'])}: {one_line(each['prompt'])!r}")
        lines += [
            f"  {name}: {one_line(each[name])!r}" for name in ("dense", "model") if name in each
        ]
    if vocabulary := results.get("vocabulary"):
        lines.append(vocabulary["note"])
        for test in results["evaluation"]:
            lines.append(f"bits per byte {one_line(test['name'])}: {test['bits_per_byte']:.4f}")
    recovery = results.get("recovery")
    for test in results["evaluation"]:
        name, value = one_line(test["name"]), test["perplexity"]
        if recovery:
            dense, before = (recovery[key][test["name"]] for key in ("dense", "before"))
            was_pruned = results["sparsity_type"] or results["method"] == "pruned before"
            pruned = f" pruned {before:.4f}," if was_pruned else ""
            lines.append(f"{name}: dense {dense:.4f},{pruned} recovered {value:.4f}")
        elif dense := test.get("dense"):
            some = "" if "bits_per_byte" in dense else f" on {test['compared_windows']} windows"
            lines.append(f"{name}: dense {dense['perplexity']:.4f}{some}")
        lines.append(f"perplexity {name}: {value:.4f}")
    print(*lines, sep="\n")


def _test_lines(test: dict[str, Any]) -> list[str]:
    """Lines on a test set: its size, bits per byte, errors, and divergence from the dense model."""
    name = one_line(test["name"])
    line = f"{name}: {test['windows']} windows, {test['tokens']} tokens, "
    line += f"{test['bits_per_byte']:.4f} bits per byte"
    if math.isfinite(test["standard_error"]):  # nan for a single window
        line += f", standard error of the perplexity {test['standard_error']:.2f}"
    if "kl" not in test:
        return [line]
    kl, same = (_with_error(test, *of) for of in (("kl", ".4f"), ("top1_agreement", ".2%")))
    return [
        line,
        f"{name}: KL {kl} nats a token from the dense model, the same most likely token at {same} "
        f"of the positions of {test['compared_windows']} windows",
    ]


def _with_error(test: dict[str, Any], key: str, form: str) -> str:
    """Format a figure of a test set, with its standard error if it has one: `0.123 ± 0.004`."""
    error = test.get(f"{key}_standard_error")
    has_error = error is not None and math.isfinite(error)
    return f"{test[key]:{form}}" + (f" ± {error:{form}}" if has_error else "")
