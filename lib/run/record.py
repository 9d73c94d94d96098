"""The records of a run: results.json, log_METHOD.txt in wanda's format, and the summary."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.methods.registry import METHODS, MethodSpec
from lib.run.flags import settings
from lib.util.files import write_text
from lib.util.host import gib, peak_memory
from lib.util.terminal import one_line
from lib.util.versions import versions

MODELS = {"dense": "dense model", "model": "this model"}

if TYPE_CHECKING:
    from torch import Tensor

    from lib.data.windows import TestSet
    from lib.eval import Perplexity
    from lib.pruning.neurons import NeuronsPruned
    from lib.recover import Recovered, TrainSchedule
    from lib.run.job import Job, LoadedModel
    from lib.sparse import PackedSize


def device_name(device: Any) -> str:
    """Describe a device, such as `cuda:0 (NVIDIA H100)` or `cpu (2 threads)`."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def results_of(job: Job, loaded: LoadedModel, measured: dict[str, Any]) -> dict[str, Any]:
    """Return the results.json record of a run; empty parts of `measured` are left out."""
    from lib.model.pretrained import footprint
    from lib.vocabulary import vocabulary_record

    args, method_spec = job.args, job.method_spec
    pruned_before = job.has_dense or job.rounding
    tests = measured["evaluation"]
    trimmed: dict[str, Any] = {}
    if vocabulary := vocabulary_record(job.vocabulary, job.config):
        bits = {test["name"]: test["bits_per_byte"] for test in tests}
        trimmed = {"vocabulary": vocabulary, "bits_per_byte": bits}  # before perplexity
    return {
        "model": args.model,
        "method": args.prune_method or ("pruned before" if pruned_before else "dense"),
        "sparsity_type": args.sparsity_type if method_spec else None,
        "sparsity_ratio": args.sparsity_ratio if method_spec else None,
        "options": method_spec.settings if method_spec else {},
        "flags": vars(args),
        "settings": settings(args),
        "seed": args.seed,
        "versions": versions(),
        "device": device_name(job.device),
        **({"products": loaded.products} if loaded.products else {}),
        "bos": job.texts.bos,
        "calibration": job.texts.calibration,
        **trimmed,
        **{key: value for key, value in measured.items() if value},
        "perplexity": {test["name"]: test["perplexity"] for test in tests},
        "seconds": job.seconds,
        "peak_memory": peak_memory(job.device),
        "footprint": {"before": loaded.footprint, "after": footprint(loaded.model)},
        "fingerprint": job.fingerprint,
    }


def evaluation_record(test: TestSet, measured: Perplexity) -> dict[str, Any]:
    """Return the record of a test set, with the divergence from the dense model if there is one."""
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


def neurons_record(
    pruned: NeuronsPruned, field: str, multiple: int, sizes: tuple[int, int]
) -> dict[str, Any]:
    """Return the record of removed neurons.

    `sizes` are the bytes of the model as saved, before and after.
    """
    neurons = set(range(pruned.width))
    return {
        "before": pruned.width,
        "after": pruned.left,
        "multiple": multiple,
        "field": field,
        "weights_before": pruned.weights_before,
        "weights_after": pruned.weights_after,
        "bytes_before": sizes[0],
        "bytes_after": sizes[1],
        "removed": [sorted(neurons.difference(kept)) for kept in pruned.kept],
    }


def packing_record(
    size: PackedSize, left_dense: int, before: Tensor, after: Tensor
) -> dict[str, Any]:
    """Return the record of packing: sizes as saved, and how far the logits differ.

    `before` and `after` are logits of the same tokens, before and after packing.
    """
    from lib.sparse import relative_difference

    return {
        "bits": size.bits,
        "linears": size.linears,
        "left_dense": left_dense,
        "bytes": size.packed,
        "dense_bytes": size.dense,
        "difference": relative_difference(before, after),
    }


def packed_embeddings_record(
    model: Any, modules: list[str], dtype: Any, before: Tensor, after: Tensor
) -> dict[str, Any]:
    """Return the record of a model's packed `modules`, compared with dense ones in `dtype`.

    `before` and `after` are logits of the same tokens, before and after packing.
    """
    from lib.sparse import relative_difference

    packed = [model.get_submodule(name) for name in modules]
    untied = [module for module in packed if not module.tied]
    return {
        "bits": 8,
        "modules": modules,
        "bytes": sum(module.weight.nbytes + module.scale.nbytes for module in untied),
        "dense_bytes": sum(module.weight.numel() * dtype.itemsize for module in untied),
        "difference": relative_difference(before, after),
    }


def packed_embeddings_line(record: dict[str, Any]) -> str:
    """Return the terminal's line on the size of the packed embedding and head."""
    share = record["bytes"] / record["dense_bytes"]
    return (
        f"packed {' and '.join(record['modules'])} as saved: {gib(record['bytes'])}, {share:.3f} "
        f"of their dense size; {record['bits']} bits change the logits by "
        f"{record['difference']:.2%}"
    )


def packed_line(packed: dict[str, Any]) -> str:
    """Return the terminal's line on the size of the packed linears."""
    share = packed["bytes"] / packed["dense_bytes"]
    line = f"packed linears as saved: {gib(packed['bytes'])}, {share:.3f} of their dense size"
    if packed["bits"] < 16:
        line += f"; {packed['bits']} bits change the logits by {packed['difference']:.2%}"
    return line


def recovery_record(
    job: Job,
    schedule: TrainSchedule,
    recovered: Recovered,
    *,
    dense: list[float],
    pruned: list[float],
) -> dict[str, Any]:
    """Return the record of a recovery.

    `dense` and `pruned` are perplexities of the teacher and of the model before the recovery: first
    on the held-out training text, then on every test set.
    """
    names = [test.name for test in job.texts.tests]
    return {
        "tokens": recovered.tokens,
        "seconds": recovered.seconds,
        "steps": schedule.steps,
        "windows": schedule.windows,
        "rate": schedule.rate,
        "rank": schedule.rank,
        "cross_entropy": schedule.share,
        "weights": recovered.trained,
        "teacher": job.args.teacher or job.args.model,
        "text": job.texts.training.facts,
        "curve": recovered.curve,
        "kept": recovered.curve[recovered.best],
        "held_out": {"dense": dense[0], "before": pruned[0]},
        "dense": dict(zip(names, dense[1:], strict=True)),
        "before": dict(zip(names, pruned[1:], strict=True)),
    }


def changed_options(results: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the method that differ from its defaults."""
    method = results["method"]
    defaults = MethodSpec(method).settings if method in METHODS else {}
    return {name: v for name, v in results["options"].items() if v != defaults.get(name)}


def method_in_words(results: dict[str, Any]) -> str:
    """Describe the method, such as `wanda`, `wanda (variant)` or `admm (blend 0.5)`."""
    options = changed_options(results).items()
    words = [name if value is True else f"{name} {value}" for name, value in options]
    return results["method"] + (f" ({', '.join(words)})" if words else "")


def write_log(folder: Path, results: dict[str, Any]) -> Path:
    """Write log_METHOD.txt: names, then one line of values, tab-separated.

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
    return path


def print_summary(results: dict[str, Any]) -> None:
    """Print the summary of a run; its last line ends with a perplexity."""
    print(*summary_lines(results), sep="\n")


def _share_pruned(results: dict[str, Any]) -> str:
    """Say how much of the blocks was pruned."""
    if neurons := results.get("neurons"):
        return (
            f"{neurons['after']} of {neurons['before']} neurons are left in each MLP, "
            f"{neurons['weights_after'] / neurons['weights_before']:.4f} of the blocks' weights"
        )
    return f"{results['sparsity']['overall']:.4f} of the blocks' weights are zero"


def summary_lines(results: dict[str, Any]) -> list[str]:
    """Return the terminal summary of a run, one fact per line."""
    lines = [f"{method_in_words(results)}: {_share_pruned(results)}", _cost_line(results)]
    for test in results["evaluation"]:
        lines += [_test_line(test), *([_divergence_line(test)] if "kl" in test else [])]
    lines += completion_lines(results.get("completions", []))
    if vocabulary := results.get("vocabulary"):
        lines.append(vocabulary["note"])
        lines += [
            f"bits per byte {one_line(name)}: {value:.4f}"
            for name, value in results["bits_per_byte"].items()
        ]
    recovery = results.get("recovery")
    for test, value in results["perplexity"].items():
        name = one_line(test)
        if recovery:
            dense, before = recovery["dense"][test], recovery["before"][test]
            lines.append(f"{name}: dense {dense:.4f}, pruned {before:.4f}, recovered {value:.4f}")
        lines.append(f"perplexity {name}: {value:.4f}")
    return lines


def _cost_line(results: dict[str, Any]) -> str:
    memory = results["peak_memory"]
    times = ", ".join(f"{step} {value:.1f} s" for step, value in results["seconds"].items())
    line = f"time: {times}; peak memory: host {gib(memory['host'])}"
    return line + (f", device {gib(memory['device'])}" if memory["device"] else "")


def _test_line(test: dict[str, Any]) -> str:
    """Return the line on a test set: its size, bits per byte, and the error of its perplexity."""
    parts = [
        f"{test['windows']} windows, {test['tokens']} tokens",
        f"{test['bits_per_byte']:.4f} bits per byte",
    ]
    if math.isfinite(test["standard_error"]):  # nan for a single window
        parts.append(f"standard error of the perplexity {test['standard_error']:.2f}")
    return f"{one_line(test['name'])}: {', '.join(parts)}"


def _divergence_line(test: dict[str, Any]) -> str:
    """Return the line on the divergence from the dense model on a test set."""
    return (
        f"{one_line(test['name'])}: KL {with_error(test, 'kl')} nats a token from the dense model, "
        f"the same most likely token at {with_error(test, 'top1_agreement', percent=True)} of the "
        f"positions of {test['compared_windows']} windows"
    )


def completion_lines(completions: list[dict[str, Any]], width: int = 100) -> list[str]:
    """Return the first prompt of each test set and a line for each model, cut to `width`."""
    lines = []
    for entry in {entry["test"]: entry for entry in reversed(completions)}.values():
        texts = [(one_line(entry["test"]), entry["prompt"] + " ...")]
        texts += [(f"  {name}", entry[key]) for key, name in MODELS.items() if key in entry]
        for name, text in texts:
            line = one_line(text)
            lines.append(f"{name}: {line if len(line) <= width else line[:width] + ' ...'}")
    return lines


def with_error(test: dict[str, Any], key: str, percent: bool = False) -> str:
    """Format a figure of a test set, with its standard error if it has one: `0.123 ± 0.004`."""
    value, error = test[key], test.get(f"{key}_standard_error")
    form = ".2%" if percent else ".4f"
    has_error = error is not None and math.isfinite(error)
    return f"{value:{form}}" + (f" ± {error:{form}}" if has_error else "")
