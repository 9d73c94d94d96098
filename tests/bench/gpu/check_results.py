"""Runs of main.py: the same weights whichever way they go, memory as estimated, files that load."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import made
import torch
from measure import reset_peak
from sizes import NotHere, Size
from steps import ROOT, SAID, Step, in_own_process

from lib.run import memory
from lib.util.host import peak_host_memory

METHODS = ("wanda", "sparsegpt", "admm")
SAME = 1e-3  # of a perplexity, where a saved model is loaded again
ESTIMATE = 1.5  # times what was told, that a run may take


def prune_all(device: str, size: Size) -> dict[str, str]:
    """Digests of a little model, pruned by every method."""
    flags, found = made.flags_of("little", size, device), {}
    for method in METHODS:
        for kind in ("unstructured", "2:4"):
            with made.scratch(size) as folder:
                asked = ["--prune_method", method, "--sparsity_type", kind]
                made.ran(*flags, *asked, "--save_model", str(folder / "model"))
                found[f"{method}, {kind}"] = made.digest(folder / "model")
    return found


def check_blocking(device: str, size: Size) -> dict[str, Any]:
    """Every launch waited for gives the bytes of a run without waiting: nothing is read early."""
    step = Step("prune_all", "check_results:prune_all", 0)
    reports = {}
    for value in "01":
        settings = {"CUDA_LAUNCH_BLOCKING": value}
        reports[value] = in_own_process(step, device, size, 120, settings)
        report = reports[value]
        assert report["result"] == "ok", f"{report['reason']}\n{report.get('said')}"
    own, blocking = (reports[value]["figures"] for value in "01")
    other = [name for name, bytes_ in own.items() if blocking[name] != bytes_]
    assert not other, f"other weights where launches are waited for: {', '.join(other)}"
    return {"runs with the same bytes": len(own), "s": reports["0"]["seconds"]}


def check_model(device: str, size: Size, method: str) -> dict[str, Any]:
    """A model from folder to folder; memory told beforehand beside what was taken."""
    there = torch.device(device)
    flags = made.flags_of("large", size, device, Path(size.model) if size.model else None)
    reset_peak(there)
    with made.scratch(size) as folder:
        target = str(folder / "model")
        said, results = made.ran(*flags, "--prune_method", method, "--save_model", target)
        found = {"perplexity": made.perplexity(results), "zeros": results["sparsity"]["overall"]}
        found |= {f"s, {name}": value for name, value in results["seconds"].items()}
        *on_device, on_host = made.estimates(said)
        found["GiB, host: told"] = on_host
        found["GiB, host: taken"] = peak_host_memory() / 2**30
        if on_device:
            found["GiB, device: told"] = on_device[0]
            found["GiB, device: reserved"] = torch.cuda.max_memory_reserved(there) / 2**30
            found["GiB, device: allocated"] = torch.cuda.max_memory_allocated(there) / 2**30
            taken = found["GiB, device: allocated"]
            assert taken < ESTIMATE * on_device[0], f"{taken:.2f} GiB, told {on_device[0]:.2f}"
        again = made.perplexity(made.ran(*flags, "--eval_only", "--model", target)[1])
    assert abs(again - found["perplexity"]) < SAME * again, f"loaded again it has {again}"
    return found


def check_fetched(device: str, size: Size) -> dict[str, Any]:
    """Blocks and hidden states on the host, or blocks on disk: the weights of a resident model."""
    own = memory.check_memory
    ways: dict[str, tuple[dict, list[str]]] = {"resident": ({}, []), "from disk": ({}, ["disk"])}
    if torch.device(device).type == "cuda":  # a CPU's blocks are on the host anyway
        ways["states on the host"] = ({"state_device": torch.device("cpu")}, [])
        ways["blocks on the host"] = ({"state_device": torch.device("cpu"), "fetched": True}, [])
    found: dict[str, Any] = {}
    flags = made.flags_of("medium", size, device)
    for method in METHODS:
        digests: dict[str, str] = {}
        for way, (changes, disk) in ways.items():
            memory.check_memory = lambda *given, changed=changes: replace(own(*given), **changed)
            with made.scratch(size) as folder:
                asked = ["--prune_method", method, "--save_model", str(folder / "model")]
                asked += ["--offload", str(folder / "away")] if disk else []
                _, results = made.ran(*flags, *asked)
                digests[way] = made.digest(folder / "model")
            found[f"s, {method}, {way}"] = results["seconds"]["prune"]
        other = [way for way, value in digests.items() if value != digests["resident"]]
        assert not other, f"{method}: other weights with {', '.join(other)}"
    return found


def check_load_bit(device: str, size: Size, bits: int) -> dict[str, Any]:
    """A model in 4 or 8 bits, pruned, saved and loaded again."""
    if not find_spec("bitsandbytes"):
        raise NotHere("bitsandbytes is not installed")
    found: dict[str, Any] = {}
    flags = [*made.flags_of("medium", size, device)]
    for method in ("wanda", "sparsegpt"):
        with made.scratch(size) as folder:
            asked = ["--load_bit", str(bits), "--prune_method", method]
            target = str(folder / "model")
            _, results = made.ran(*flags, *asked, "--save_model", target)
            again = made.perplexity(made.ran(*flags, "--eval_only", "--model", target)[1])
        value = made.perplexity(results)
        found |= {f"perplexity, {method}": value, f"s, {method}": results["seconds"]["prune"]}
        found[f"zeros, {method}"] = results["sparsity"]["overall"]
        assert abs(again - value) < 10 * SAME * value, f"{method}: {value}, loaded again {again}"
    return found


def check_second_device(device: str, size: Size) -> dict[str, Any]:
    """`--device cuda:1`: the weights of the first, and nothing on the first."""
    if torch.device(device).type != "cuda" or torch.cuda.device_count() < 2:
        raise NotHere("needs two GPUs")
    index = torch.device(device).index or 0
    other = (index + 1) % torch.cuda.device_count()
    step, found = Step("prune_all", "check_results:prune_all", 0), {}
    reports = [in_own_process(step, f"cuda:{i}", size, 120) for i in (index, other)]
    for report in reports:
        assert report["result"] == "ok", f"{report['reason']}\n{report.get('said')}"
    first, second = (report["figures"] for report in reports)
    different = [name for name in first if first[name] != second[name]]
    assert not different, f"other weights on cuda:{other}: {', '.join(different)}"
    made.ran(*made.flags_of("little", size, f"cuda:{other}"), "--prune_method", "sparsegpt")
    found["MiB on the first device"] = torch.cuda.memory_allocated(index) / 2**20
    assert not found["MiB on the first device"]
    return {"runs with the same bytes": len(first)} | found


def check_sweep(device: str, size: Size) -> dict[str, Any]:
    """Three runs in one process, one after another: none finds the memory of those before taken."""
    model, text = made.model_of("medium", size), made.text_of("medium", size)
    *_, seqlen, windows = made.shape_of("medium", size)
    with made.scratch(size) as folder:
        flags = ["--models", str(model), "--methods", *METHODS, "--types", "unstructured"]
        flags += ["--calibration", str(text), "--out", str(folder / "runs"), "--"]
        flags += ["--device", device, "--seqlen", str(seqlen), "--nsamples", str(windows)]
        command = [sys.executable, "-m", "lib.commands.sweep", *flags]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        spent = time.perf_counter() - start
        finished = len(list((folder / "runs").rglob("results.json")))
        outputs = [file.read_text("utf-8") for file in (folder / "runs").rglob("output.txt")]
    print(done.stdout[-SAID:], done.stderr[-SAID:], flush=True)
    assert done.returncode == 0, (done.stderr.strip().splitlines() or ["no word"])[-1]
    assert finished == 1 + len(METHODS), f"{finished} runs have results"
    told = [f"{made.estimates(one)[0]:.2f}" for one in outputs]
    return {"runs": finished, "s": spent, "GiB told": " ".join(told)}


def check_recovery(device: str, size: Size) -> dict[str, Any]:
    """`--recover` after 2:4: no zero is lost, nothing is worse, and twice the same weights."""
    there = torch.device(device)
    *_, seqlen, windows = made.shape_of("medium", size)
    flags = made.flags_of("medium", size, device)
    asked = ["--prune_method", "sparsegpt", "--sparsity_type", "2:4"]
    asked += ["--recover", str(windows * seqlen)]
    digests = []
    for _ in range(2):
        reset_peak(there)
        with made.scratch(size) as folder:
            said, results = made.ran(*flags, *asked, "--save_model", str(folder / "model"))
            digests.append(made.digest(folder / "model"))
    told = results["recovery"]
    found = {"perplexity": made.perplexity(results), "zeros": results["sparsity"]["overall"]}
    found["before"] = next(iter(told["before"].values()))
    found["dense"] = next(iter(told["dense"].values()))
    found["tokens/s"] = told["tokens"] / told["seconds"]
    if there.type == "cuda":
        found["GiB, device: told"] = made.estimates(said)[0]
        found["GiB, device: reserved"] = torch.cuda.max_memory_reserved(there) / 2**30
    assert found["zeros"] >= 0.5
    assert digests[0] == digests[1], f"other weights at the second time; {found}"
    return found
