"""What a run leaves in `--save`: log_METHOD.txt in wanda's form, results.json, and a summary."""

from __future__ import annotations

import math
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.report.completion_tables import terminal_lines
from lib.run.flags import settings
from lib.util.files import write_text
from lib.util.host import gib, peak_memory
from lib.util.terminal import one_line

if TYPE_CHECKING:
    from torch import Tensor

    from lib.data.windows import TestSet
    from lib.eval import Perplexity
    from lib.recover import Recovered, TrainSchedule
    from lib.run.job import Job, LoadedModel
    from lib.sparse import PackedSize

PACKAGES = "torch transformers tokenizers datasets accelerate numpy bitsandbytes".split()


def versions() -> dict[str, str | None]:
    """Of Python and the packages that decide the result; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def device_name(device: Any) -> str:
    """Such as `cuda:0 (NVIDIA H100)` or `cpu (2 threads)`."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def results_of(job: Job, loaded: LoadedModel, found: dict[str, Any]) -> dict[str, Any]:
    """What stands in results.json.

    `found`: what pruning and evaluation gave, as `sparsity`, `evaluation` and, where there are
    any, `allocation`, `tasks`, `recovery`, `completions` and `packed`. Where the vocabulary was
    trimmed, now or before, bits per byte come first.
    """
    from lib.model.pretrained import footprint
    from lib.vocabulary import told_of

    args, method_spec = job.args, job.method_spec
    tests = found["evaluation"]
    vocabulary = told_of(job.vocabulary, job.config)
    bits = {test["name"]: test["bits_per_byte"] for test in tests}
    further = {
        name: found[name]
        for name in ("tasks", "recovery", "completions", "packed")
        if found.get(name)
    }
    allocation = {"allocation": found["allocation"]} if found.get("allocation") else {}
    return {
        "model": args.model,
        "method": args.prune_method or ("pruned before" if job.schedule else "dense"),
        "sparsity_type": args.sparsity_type if method_spec else None,
        "sparsity_ratio": args.sparsity_ratio if method_spec else None,
        "options": method_spec.settings if method_spec else {},
        **allocation,
        "flags": vars(args),
        "settings": settings(args),
        "seed": args.seed,
        "versions": versions(),
        "device": device_name(job.device),
        "bos": job.texts.bos,
        "calibration": job.texts.calibration,
        **({"vocabulary": vocabulary, "bits_per_byte": bits} if vocabulary else {}),
        "evaluation": tests,
        **further,
        "perplexity": {test["name"]: test["perplexity"] for test in tests},
        "sparsity": found["sparsity"],
        "seconds": job.seconds,
        "peak_memory": peak_memory(job.device),
        "footprint": {"before": loaded.footprint, "after": footprint(loaded.model)},
        "fingerprint": job.fingerprint,
    }


def evaluation_record(test: TestSet, measured: Perplexity) -> dict[str, Any]:
    """What stands in results.json of a test set."""
    record = test.facts | {
        "perplexity": measured.value,
        "standard_error": measured.standard_error,
        "bits_per_byte": measured.bits_per_byte(test.bytes),
    }
    if divergence := measured.divergence:
        record |= {
            "kl": divergence.kl,
            "kl_standard_error": divergence.kl_standard_error,
            "top1_agreement": divergence.top1_agreement,
            "top1_agreement_standard_error": divergence.top1_agreement_standard_error,
            "compared_windows": divergence.windows,
        }
    return record


def divergence_line(test: dict[str, Any]) -> str:
    """How far the model is from the dense one on a test set, for the terminal."""
    return (
        f"{one_line(test['name'])}: KL {test['kl']:.4f} nats a token from the dense model, the "
        f"same most likely token at {test['top1_agreement']:.1%} of the positions of "
        f"{test['compared_windows']} windows"
    )


def packing_record(size: PackedSize, left: int, before: Tensor, after: Tensor) -> dict[str, Any]:
    """What stands in results.json of packing: sizes as saved, and how far logits `before` and
    `after` it differ, relative to their norm."""
    from lib.sparse import relative_difference

    return {
        "bits": size.bits,
        "linears": size.linears,
        "left_dense": left,
        "bytes": size.packed,
        "dense_bytes": size.dense,
        "difference": relative_difference(before, after),
    }


def packed_line(packed: dict[str, Any]) -> str:
    """What packing made of the linears, for the terminal."""
    share = packed["bytes"] / packed["dense_bytes"]
    line = f"packed linears as saved: {gib(packed['bytes'])}, {share:.3f} of their dense size"
    if packed["bits"] == 8:
        line += f"; 8 bits change the logits by {packed['difference']:.2%}"
    return line


def recovery_record(
    job: Job, schedule: TrainSchedule, done: Recovered, dense: list[float], pruned: list[float]
) -> dict[str, Any]:
    """What stands in results.json of a recovery.

    `dense`, `pruned`: perplexities of the teacher, and before, on what was held out and on every
    test set.
    """
    names = [test.name for test in job.texts.tests]
    return {
        "tokens": done.tokens,
        "seconds": done.seconds,
        "steps": schedule.steps,
        "windows": schedule.windows,
        "rate": schedule.rate,
        "rank": schedule.rank,
        "cross_entropy": schedule.share,
        "weights": done.trained,
        "teacher": job.args.teacher or job.args.model,
        "text": job.texts.training.facts,
        "curve": done.curve,
        "kept": done.curve[done.best],
        "held_out": {"dense": dense[0], "before": pruned[0]},
        "dense": dict(zip(names, dense[1:], strict=True)),
        "before": dict(zip(names, pruned[1:], strict=True)),
    }


def write_log(folder: Path, results: dict[str, Any]) -> Path:
    """log_METHOD.txt: names, then one line of values, tab-separated.

    `ppl_test` is the first test set; where there are several, each follows as `ppl_NAME`. Where the
    vocabulary was trimmed, bits per byte stand before them, and a third line says why.
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
    return path


def print_summary(results: dict[str, Any]) -> None:
    """What a user wants to know at the end; the last line ends with a perplexity."""
    seconds, memory = results["seconds"], results["peak_memory"]
    spent = ", ".join(f"{step} {value:.1f} s" for step, value in seconds.items())
    options = ", ".join(f"{name} {value}" for name, value in results["options"].items())
    method = results["method"] + (f" ({options})" if options else "")
    print(f"{method}: {results['sparsity']['overall']:.4f} of the blocks' weights are zero")
    print(f"time: {spent}; peak memory: host {gib(memory['host'])}", end="")
    print(f", device {gib(memory['device'])}" if memory["device"] else "")
    for test in results["evaluation"]:
        size = f"{test['windows']} windows, {test['tokens']} tokens"
        print(
            f"{one_line(test['name'])}: {size}, {test['bits_per_byte']:.4f} bits per byte", end=""
        )
        error = test["standard_error"]  # nan for a single window
        print(f", standard error of the perplexity {error:.2f}" if math.isfinite(error) else "")
        if "kl" in test:
            print(divergence_line(test))
    for line in terminal_lines(results.get("completions", [])):
        print(line)
    recovery = results.get("recovery")
    if vocabulary := results.get("vocabulary"):
        print(vocabulary["note"])
        for name, value in results["bits_per_byte"].items():
            print(f"bits per byte {one_line(name)}: {value:.4f}")
    for name, value in results["perplexity"].items():
        if recovery:
            dense, before = recovery["dense"][name], recovery["before"][name]
            print(
                f"{one_line(name)}: dense {dense:.4f}, pruned {before:.4f}, recovered {value:.4f}"
            )
        print(f"perplexity {one_line(name)}: {value:.4f}")
