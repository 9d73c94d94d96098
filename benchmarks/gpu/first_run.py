"""The first run on a GPU: what must hold there, one check after another, each in its own process.

    python benchmarks/gpu/first_run.py                       # on one card with 24 GB or more
    python benchmarks/gpu/first_run.py --only published      # one of them, or some
    python benchmarks/gpu/first_run.py --device cpu --small  # what a CPU can do of it, in small

Apart from `published`, which repeats published figures if the hub can be reached, nothing needs
network, text or model. A check that fails, crashes or hangs is a line with its reason, and the rest
goes on. `gpu.json` in --save holds figures and tracebacks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import tiny  # noqa: E402
import torch  # noqa: E402
from measure import medians, random_llama  # noqa: E402
from support import whole  # noqa: E402
from torch.utils.collect_env import get_pretty_env_info  # noqa: E402
from transformers import AutoConfig  # noqa: E402

import main as command_line  # noqa: E402
from lib.methods.sparsity import Sparsity  # noqa: E402
from lib.packed.linear import SparseLinear  # noqa: E402
from lib.run.memory import memory_of  # noqa: E402
from lib.util.errors import UserError  # noqa: E402

LIMIT, PUBLISHED_LIMIT = 600, 4 * 3600  # seconds of a check
SAME = 1e-3  # of a perplexity, where a model is loaded again
# on two devices, where sums in another order decide near ties: of a mask, of a perplexity
EQUAL, NEAR = 0.98, 1e-2
PAPERS = "meta-llama/Llama-2-7b-hf"  # one of the paper's models
# its perplexity on WikiText-2, half of the weights pruned on C4, as Wanda's authors publish it
WIKITEXT = {"dense": 5.12, "magnitude": 14.89, "wanda": 6.42, "sparsegpt": 6.51}
REPEATED = 0.03  # of a published perplexity; other kernels and versions round differently


class NotHere(Exception):
    """What a check needs is not on this machine; the message says what."""


class Runs:
    """Runs of main.py in this process, on a LLaMA of random weights, in a folder of their own."""

    def __init__(self, device: torch.device, small: bool, folder: Path) -> None:
        self.device, self.small, self.folder, self.number = device, small, folder, 0
        self.text, seqlen = str(folder / "text"), 32 if small else 2048
        sizes = (64, 192, 3, 320) if small else (2048, 6144, 6, 32_000)
        model = random_llama(*sizes, seqlen, bos_token_id=0)
        tiny.write_model(folder / "dense", model.bfloat16())
        texts = (tiny.sentences(count, seed, max(40, seqlen)) for count, seed in ((72, 0), (4, 1)))
        tiny.write_texts(self.text, *texts)
        self.flags = [
            "--device",
            str(device),
            "--completions",
            "0",
            "--calibration_data",
            self.text,
        ]
        self.flags += ["--seqlen", str(seqlen), "--nsamples", "6" if small else "64"]

    def run(self, *flags: str) -> dict[str, Any]:
        """Return results.json; a run with --model is of that one and saves nothing."""
        self.number += 1
        out = self.folder / f"run-{self.number}"
        model = ["--model", str(self.folder / "dense"), "--save_model", str(out / "model")]
        given = [] if "--model" in flags else model
        command_line.main([*self.flags, *given, *flags, "--save", str(out / "out")])
        return json.loads((out / "out/results.json").read_text("utf-8"))

    def run_by_two(self, *flags: str) -> dict[str, Any]:
        """The same by two processes: on two GPUs, or on this CPU."""
        if self.device.type != "cpu" and torch.cuda.device_count() < 2:
            raise NotHere("needs two GPUs")
        self.number += 1
        out = self.folder / f"run-{self.number}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node=2", ROOT / "main.py", *self.flags, *flags]
        command += ["--model", self.folder / "dense", "--save_model", out / "model"]
        subprocess.run([*map(str, command), "--save", str(out / "out")], check=True)
        return json.loads((out / "out/results.json").read_text("utf-8"))

    def perplexity(self, *flags: str) -> float:
        return next(iter(self.run(*flags)["perplexity"].values()))

    def saved(self) -> dict[str, torch.Tensor]:
        """Return the tensors that the last run saved, as transformers finds them."""
        return whole(self.folder / f"run-{self.number}/model")

    def loaded_again(self, *flags: str) -> dict[str, Any]:
        """Run, and compare perplexity with that of the saved model."""
        results = self.run(*flags)
        own = next(iter(results["perplexity"].values()))
        saved = str(self.folder / f"run-{self.number}/model")
        again = self.perplexity("--model", saved, "--eval_only")
        assert abs(own - again) < SAME * own, f"perplexity {own}, loaded again {again}"
        return {"perplexity": own, "s": results["seconds"], "bytes": results["peak_memory"]}


def check_methods(runs: Runs) -> dict[str, Any]:
    """Every method by a few windows in float32: what a CPU prunes and measures."""
    found: dict[str, Any] = {}
    few = ["--dtype", "float32", "--seqlen", "32" if runs.small else "512", "--nsamples", "6"]
    for method in ("wanda", "sparsegpt", "admm"):
        way, zeros, perplexities = [*few, "--prune_method", method], [], []
        for device in (str(runs.device), "cpu"):
            perplexities.append(runs.perplexity(*way, "--device", device))
            zeros.append({name: weight == 0 for name, weight in runs.saved().items()})
        equal = [(mask == zeros[1][name]).double().mean().item() for name, mask in zeros[0].items()]
        found[method] = {"perplexity": perplexities, "equal masks, least": min(equal)}
        assert min(equal) > EQUAL, found
        assert abs(perplexities[0] - perplexities[1]) < NEAR * perplexities[1], found
    return found


@torch.no_grad()
def check_products(runs: Runs) -> dict[str, Any]:
    """Products by a 2:4 weight: dense, unpacked at each forward, and by torch's 2:4 kernels."""
    width, rows = (64, 128) if runs.small else (4096, 11008)
    there = {"device": runs.device, "dtype": torch.bfloat16}
    dense = torch.nn.Linear(width, rows, bias=False, **there)
    dense.weight[Sparsity.parse("2:4", 0.5).mask(dense.weight.abs())] = 0
    unpacked, by_torch = (SparseLinear.from_linear(dense) for _ in range(2))
    unpacked.mode = "dense"
    ways: dict[str, Callable] = {"dense": dense, "unpacked": unpacked}
    if by_torch.semi_structure_():
        ways["2:4"] = by_torch
    found = {"2:4": by_torch.refused or by_torch.semi_structured.BACKEND}
    for tokens in (1, 16, 512, 4096):
        x = torch.randn(tokens, width, **there)
        wanted = x.double() @ dense.weight.double().T
        for name, way in ways.items():
            off = ((way(x) - wanted).abs().max() / wanted.abs().max()).item()
            assert off < 0.02, f"{name}, {tokens} tokens: off by {off:.2g}"
        calls = {name: partial(way, x) for name, way in ways.items()}
        spent = medians(calls, runs.device, rounds=5, repeats=1 if runs.small else 10)
        found |= {f"us, {name}, {tokens} tokens": 1e6 * each for name, each in spent.items()}
        found[f"fastest, {tokens} tokens"] = min(spent, key=spent.get)
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    same_names = one.keys() == other.keys()
    return same_names and all(torch.equal(each, other[name]) for name, each in one.items())


def same_bytes(*ways: list[str]) -> Callable[[Runs], dict[str, Any]]:
    """Make a check that each of the ways, done one after another, saves the same."""

    def check(runs: Runs) -> dict[str, Any]:
        away = str(runs.folder / "away")
        spent, saved = [], []
        for way in ways:
            spent.append(runs.run(*(away if word == "@away" else word for word in way))["seconds"])
            saved.append(runs.saved())
            assert same(saved[0], saved[-1]), "the runs have saved other weights"
        return {"s": spent}

    return check


def check_load_bit(runs: Runs) -> dict[str, Any]:
    if not find_spec("bitsandbytes"):
        raise NotHere("bitsandbytes is not installed")
    ways = {bits: ["--load_bit", bits, "--prune_method", "wanda"] for bits in "48"}
    return {f"{bits} bits": runs.loaded_again(*way) for bits, way in ways.items()}


def check_two(runs: Runs) -> dict[str, Any]:
    """Two processes on two GPUs save the bytes of one."""
    runs.run_by_two(*WANDA)
    by_two = runs.saved()
    runs.run(*WANDA)
    assert same(by_two, runs.saved()), "two processes save other weights than one"
    return {}


def check_two_recovery(runs: Runs) -> dict[str, Any]:
    """Two processes on two GPUs share out the training, and have the losses of one."""
    way = [*WANDA, "--recover", "2048", "--seqlen", "32" if runs.small else "128"]
    two, one = runs.run_by_two(*way), runs.run(*way)
    curves = [[each["loss"] for each in found["recovery"]["curve"]] for found in (two, one)]
    config = AutoConfig.from_pretrained(runs.folder / "dense")
    planned = memory_of(config, " ".join(way), free=1e12, ranks=2)
    found = {"losses": curves, "peak of each of two": two["peak_memory"]}
    found |= {"peak of one": one["peak_memory"], "planned for each": planned.total("train")}
    for shared, alone in zip(*curves, strict=True):
        assert abs(shared - alone) < SAME * alone, found
    return found


def check_published(runs: Runs) -> dict[str, Any]:
    """Perplexities of the paper's model by method, calibration set and test set."""
    sets = {"UberText": "ubertext", "C4": "c4", "WikiText-2": "wikitext2"}
    common = ["--model", PAPERS, "--seqlen", "4096", "--nsamples", "128"]
    if runs.small:  # the same on what is here
        sets = {name: runs.text for name in ("UberText", "C4")}
        common = ["--model", str(runs.folder / "dense")]
    common += ["--eval_data", *dict.fromkeys(sets.values())]
    try:
        rows = {"dense": runs.run(*common, "--eval_only")["perplexity"]}
    except UserError as error:  # no network, or the model's licence was not accepted
        raise NotHere(str(error)) from error
    for method in ("magnitude", "wanda", "sparsegpt"):
        for name in ("UberText", "C4"):
            way = ["--prune_method", method, "--calibration_data", sets[name]]
            rows[f"{method}, {name}"] = runs.run(*common, *way)["perplexity"]
    for method, published in {} if runs.small else WIKITEXT.items():
        own = rows["dense" if method == "dense" else f"{method}, C4"]["wikitext2"]
        assert abs(own - published) < REPEATED * published, f"{method}: {own}, not {published}"
    return rows


WANDA = ["--prune_method", "wanda", "--sparsity_type", "2:4"]
ADMM = ["--prune_method", "admm", "--sparsity_type", "2:4"]
RECOVERED = [*WANDA, "--recover", "2048"]
EIGHT_BITS = [*RECOVERED, "--recover_optimizer", "adamw8bit"]
BY_ERROR = ["--prune_method", "sparsegpt", "--allocation", "error"]
PACKED = [*WANDA, "--replace_sparse_layers"]
CHECKS: dict[str, Callable[[Runs], dict[str, Any]]] = {
    "methods": check_methods,
    "products": check_products,
    "packed, 16 bits": lambda runs: runs.loaded_again(*PACKED),
    "packed, 4 bits": lambda runs: runs.loaded_again(*PACKED, "--quantize", "int4"),
    "fetched blocks": same_bytes(ADMM, [*ADMM, "--offload_folder", "@away"]),
    "recovery, twice": same_bytes(RECOVERED, RECOVERED),
    "recovery by 8 bits, twice": same_bytes(EIGHT_BITS, EIGHT_BITS),
    "allocation, twice": same_bytes(BY_ERROR, BY_ERROR),
    "load_bit": check_load_bit,
    "two processes": check_two,
    "recovery by two processes": check_two_recovery,
    "published": check_published,
}


def report_of(name: str, device: torch.device, small: bool) -> dict[str, Any]:
    """Do a check in this process; whatever it raises is in the report."""
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = CHECKS[name](Runs(device, small, Path(folder)))
        report = {"result": "ok", "figures": figures}
    except NotHere as why:
        report = {"result": "skipped", "figures": str(why)}
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        report = {"result": "failed", "figures": reason, "traceback": traceback.format_exc()}
    return report | {"seconds": round(time.perf_counter() - start, 1)}


def in_own_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--device", args.device, "--report", name]
    command += ["--small"] if args.small else []
    limit = PUBLISHED_LIMIT if name == "published" else LIMIT
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"result": "failed", "figures": f"not done after {limit} s", "seconds": limit}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        reason = f"its process ended with status {done.returncode}: {last}"
        return {"result": "failed", "figures": reason, "seconds": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda:0", help="cuda:N or cpu (default: cuda:0)")
    parser.add_argument("--small", action="store_true", help="small sizes, as a CPU can do them")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="NAME")
    parser.add_argument("--save", default="out/gpu", help="folder for gpu.json (default: out/gpu)")
    parser.add_argument("--report", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device was found; what a CPU can do: --device cpu --small")
    if args.report:
        print(json.dumps(report_of(args.report, device, args.small), default=str))
        return
    file = Path(args.save, "gpu.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": get_pretty_env_info()}
    print("| check | result | s | figures, or why not |\n|---|---|---|---|", flush=True)
    for name in args.only:
        found[name] = report = in_own_process(name, args)
        file.write_text(json.dumps(found, indent=1), "utf-8")
        figures = json.dumps(report["figures"]).replace("|", "/")
        print(f"| {name} | {report['result']} | {report['seconds']} | {figures} |", flush=True)
    failed = [name for name in args.only if found[name]["result"] == "failed"]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; tracebacks are in {file}")


if __name__ == "__main__":
    main()
