"""The first run on a GPU: what must hold there, one check after another, each in its own process.

    bash launch.sh gpu                           # on one card with 24 GB or more
    bash launch.sh gpu --resume                  # again what was not done, or failed
    bash launch.sh gpu --device cpu --small      # what a CPU can do of it, in small

Needs no network, text or model. A check that fails, crashes or hangs is a line with its reason, and
the rest goes on. `gpu.json` in --save holds versions, figures and tracebacks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/bench")]

import tiny  # noqa: E402
import torch  # noqa: E402
from measure import medians, random_llama  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import main as command_line  # noqa: E402
from lib.methods.admm import Admm, stiff_inverse  # noqa: E402
from lib.methods.gram import add_upper_gram_, mirror_  # noqa: E402
from lib.methods.sparsegpt import factorise  # noqa: E402
from lib.methods.sparsity import lowest_overall, lowest_per_row, n_of_m  # noqa: E402
from lib.methods.wanda import Wanda  # noqa: E402
from lib.packed.linear import SparseLinear  # noqa: E402

LIMIT = 600  # seconds of a check
CLOSE, SAME = 1e-4, 1e-3  # of the largest value; of a perplexity, where a model is loaded again


class NotHere(Exception):
    """What a check needs is not on this machine; the message says what."""


def check_machine(device: torch.device, small: bool) -> dict[str, Any]:
    names = "torch transformers accelerate bitsandbytes numpy".split()
    found = {name: metadata.version(name) for name in names if find_spec(name)}
    found["python"] = platform.python_version()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found["card"] = f"{torch.cuda.device_count()} x {card.name}, {card.major}.{card.minor}"
        found["GiB, free"] = torch.cuda.mem_get_info(device)[0] / 2**30
        found["CUDA"] = torch.version.cuda
    return found


def activations(tokens: int, width: int, device: torch.device, seed: int) -> torch.Tensor:
    """Return bfloat16 inputs (tokens, in), related to each other, a few of them large."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, device=device)
    x += torch.randn(tokens, 1, generator=generator, device=device)
    x[:, ::97] *= 30
    return x.bfloat16()


def check_sums(device: torch.device, small: bool) -> dict[str, Any]:
    """Statistics of the methods against float64."""
    tokens, width = (128, 200) if small else (8192, 11008)
    x, dense = (activations(tokens, width, device, seed) for seed in (0, 1))
    wanda, admm = Wanda(width, device), Admm(width, device)
    wanda.observe(x)
    admm.observe(x, dense=dense)
    exact = x.double()
    sums = {
        "Wanda": (wanda.square_sum, exact.square().sum(0)),
        "X^T X": (admm.hessian.triu(), (exact.T @ exact).triu()),
        "input errors": (admm.input_error_gram, (dense.double() - exact).T @ exact),
    }
    off = {name: largest_off(own, wanted) for name, (own, wanted) in sums.items()}
    assert max(off.values()) < CLOSE, off
    calls = {"ms, X^T X": lambda: add_upper_gram_(admm.hessian, x)}
    return off | {name: 1e3 * s for name, s in medians(calls, device, 5).items()}


def largest_off(own: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((own - wanted).abs().max() / wanted.abs().max()).item()


def check_factors(device: torch.device, small: bool) -> dict[str, Any]:
    """SparseGPT's factor and ADMM's inverse, by what they make of vectors."""
    width = 96 if small else 16384
    hessian = torch.zeros(width, width, device=device)
    for seed in range(2):
        add_upper_gram_(hessian, activations(width, width, device, seed))
    tries = torch.randn(width, 4, device=device, dtype=torch.float64)
    factor, scale, dead = factorise(hessian, 0.01)
    assert not dead.any()
    mirror_(hessian)
    damping = 0.01 * hessian.diagonal().mean().double()
    inner = (factor.double().T @ tries) * scale.double().square()[:, None]
    wanted = hessian.double() @ tries + damping * tries
    off = {"factor": largest_off(factor.double() @ inner, wanted)}
    norms = hessian.diagonal().sqrt()
    hessian.div_(norms).div_(norms[:, None]).diagonal().add_(0.1)
    stiff = hessian.double() @ tries + 0.5 * tries
    off["inverse"] = largest_off(stiff_inverse(hessian, 0.5).double() @ stiff, tries)
    assert max(off.values()) < 10 * CLOSE, off
    return off


def check_masks(device: torch.device, small: bool) -> dict[str, Any]:
    """Masks with many ties are those of a CPU."""
    rows, width = (48, 96) if small else (8192, 28672)
    score = torch.rand(rows, width, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    there, half = score.to(device), rows * width // 2
    assert torch.equal(lowest_overall(there, half).cpu(), lowest_overall(score, half))
    assert torch.equal(lowest_per_row(there, width // 2).cpu(), lowest_per_row(score, width // 2))
    assert torch.equal(n_of_m(there, 2, 4).cpu(), n_of_m(score, 2, 4))
    return {"entries": score.numel()}


@torch.no_grad()
def check_products(device: torch.device, small: bool) -> dict[str, Any]:
    """Products by packed 2:4 weights beside dense ones, at one token and many."""
    width, rows = (64, 128) if small else (4096, 11008)
    dense = torch.nn.Linear(width, rows, bias=False, device=device, dtype=torch.bfloat16)
    dense.weight[n_of_m(dense.weight.abs(), 2, 4)] = 0
    packed = SparseLinear.from_linear(dense)
    found: dict[str, Any] = {"2:4 kernels": packed.use_semi_structured_()}
    for tokens in (1, 16, 64 if small else 2048):
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
        off = largest_off(packed(x).double(), x.double() @ dense.weight.double().T)
        assert off < 0.02, f"{tokens} tokens: off by {off:.2g}"
        spent = medians({"dense": lambda x=x: dense(x), "packed": lambda x=x: packed(x)}, device, 5)
        found |= {f"us, {name}, {tokens} tokens": 1e6 * s for name, s in spent.items()}
    return found


class Runs:
    """Runs of main.py in this process, on a LLaMA of random weights, in a folder of their own."""

    def __init__(self, device: torch.device, small: bool, folder: Path) -> None:
        self.folder, self.number = folder, 0
        hidden, seqlen, windows = (64, 32, 6) if small else (2048, 2048, 64)
        blocks, vocabulary = (3, 320) if small else (12, 32_000)
        model = random_llama(hidden, 3 * hidden, blocks, vocabulary, seqlen, bos_token_id=0)
        tiny.write_model(folder / "dense", model.bfloat16())
        texts = (tiny.sentences(count, seed, max(40, seqlen)) for count, seed in ((72, 0), (8, 1)))
        tiny.write_texts(folder / "text", *texts)
        self.flags = ["--device", str(device), "--seqlen", str(seqlen), "--nsamples", str(windows)]
        self.flags += ["--calibration_data", str(folder / "text"), "--prompts", "0"]

    def run(self, *flags: str) -> dict[str, Any]:
        """Return results.json; a run with --model is of that one and saves nothing."""
        flags = tuple(str(self.folder / "away") if word == "@away" else word for word in flags)
        self.number += 1
        out = self.folder / f"run-{self.number}"
        model = ["--model", str(self.folder / "dense"), "--save_model", str(out / "model")]
        given = [] if "--model" in flags else model
        command_line.main([*self.flags, *given, *flags, "--save", str(out / "out")])
        return json.loads((out / "out/results.json").read_text("utf-8"))

    def digest(self) -> str:
        """Return the digest of the tensors that the last run saved, in whatever files."""
        tensors, total = {}, hashlib.sha256()
        for file in (self.folder / f"run-{self.number}/model").glob("*.safetensors"):
            tensors |= load_file(file)
        for name, tensor in sorted(tensors.items()):
            total.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def loaded_again(self, *flags: str) -> dict[str, Any]:
        """Run, and compare perplexity with that of the saved model."""
        results = self.run(*flags)
        own = next(iter(results["perplexity"].values()))
        saved = str(self.folder / f"run-{self.number}/model")
        again = next(iter(self.run("--model", saved, "--eval_only")["perplexity"].values()))
        assert abs(own - again) < SAME * own, f"perplexity {own}, loaded again {again}"
        return {"perplexity": own, "s": results["seconds"], "bytes": results["peak_memory"]}


def of_runs(check: Callable[[Runs], dict[str, Any]]) -> Callable:
    def checked(device: torch.device, small: bool) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return check(Runs(device, small, Path(folder)))

    return checked


def method_flags(method: str) -> list[str]:
    return ["--prune_method", method, "--sparsity_type", "2:4"]


def same_bytes(*ways: list[str]) -> Callable:
    """Make a check that each of the ways, done twice or one after another, saves the same."""

    def check(runs: Runs) -> dict[str, Any]:
        spent = [runs.run(*way)["seconds"] | {"digest": runs.digest()} for way in ways]
        assert len({one.pop("digest") for one in spent}) == 1, "the runs have saved other weights"
        return {f"s, {number}": one for number, one in enumerate(spent)}

    return of_runs(check)


def check_load_bit(runs: Runs) -> dict[str, Any]:
    if not find_spec("bitsandbytes"):
        raise NotHere("bitsandbytes is not installed")
    ways = {bits: ["--load_bit", bits, "--prune_method", "wanda"] for bits in "48"}
    return {f"{bits} bits": runs.loaded_again(*way) for bits, way in ways.items()}


def check_two(device: torch.device, small: bool) -> dict[str, Any]:
    """Two processes on two GPUs save the bytes of one."""
    if device.type == "cpu" or torch.cuda.device_count() < 2:
        raise NotHere("needs two GPUs")

    def check(runs: Runs) -> dict[str, Any]:
        runs.run(*method_flags("wanda"))
        alone, target = runs.digest(), runs.folder / "run-2"
        runs.number = 2
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", "2", str(ROOT / "main.py"), *runs.flags]
        command += ["--model", str(runs.folder / "dense"), *method_flags("wanda")]
        command += ["--save", str(target / "out"), "--save_model", str(target / "model")]
        subprocess.run(command, check=True)
        assert runs.digest() == alone, "two processes save other weights than one"
        return {}

    return of_runs(check)(device, small)


def check_tests(device: torch.device, small: bool) -> dict[str, Any]:
    """The files with tests that a GPU is needed for."""
    if device.type == "cpu":
        raise NotHere("needs a GPU")
    files = [
        file for file in (ROOT / "tests").rglob("test_*.py") if "is_available" in file.read_text()
    ]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *files]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout.splitlines()[-1]
    return {"pytest": done.stdout.splitlines()[-1]}


RECOVERED = [*method_flags("sparsegpt"), "--recover", "2048"]
BY_ERROR = ["--prune_method", "sparsegpt", "--allocation", "error"]
PACKED = [*method_flags("wanda"), "--replace_sparse_layers", "--pack_bits"]
CHECKS: dict[str, Callable[[torch.device, bool], dict[str, Any]]] = {
    "machine": check_machine,
    "sums": check_sums,
    "factors": check_factors,
    "masks": check_masks,
    "2:4 products": check_products,
    **{
        f"model: {name}": of_runs(lambda runs, name=name: runs.loaded_again("--prune_method", name))
        for name in ("wanda", "sparsegpt", "admm")
    },
    "packed, 16 bits": of_runs(lambda runs: runs.loaded_again(*PACKED, "16")),
    "packed, 4 bits": of_runs(lambda runs: runs.loaded_again(*PACKED, "4")),
    "fetched blocks": same_bytes(
        method_flags("admm"), [*method_flags("admm"), "--offload", "@away"]
    ),
    "recovery, twice": same_bytes(RECOVERED, RECOVERED),
    "allocation, twice": same_bytes(BY_ERROR, BY_ERROR),
    "load_bit": of_runs(check_load_bit),
    "two processes": check_two,
    "tests": check_tests,
}


def report_of(name: str, device: torch.device, small: bool) -> dict[str, Any]:
    """Do a check in this process; whatever it raises is in the report."""
    start = time.perf_counter()
    try:
        report = {"result": "ok", "figures": CHECKS[name](device, small)}
    except NotHere as why:
        report = {"result": "skipped", "reason": str(why)}
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        report = {"result": "failed", "reason": reason, "traceback": traceback.format_exc()}
    return report | {"seconds": round(time.perf_counter() - start, 1)}


def in_own_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.json")
        command = [sys.executable, __file__, "--device", args.device, "--report", name, str(file)]
        command += ["--small"] if args.small else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return {"result": "failed", "reason": f"not done after {LIMIT} s", "seconds": LIMIT}
        if file.is_file():
            return json.loads(file.read_text("utf-8"))
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        reason = f"its process ended with status {done.returncode}: {last}"
        return {"result": "failed", "reason": reason, "seconds": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(prog="launch.sh gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda:0", help="cuda:N or cpu (default: cuda:0)")
    parser.add_argument("--small", action="store_true", help="small sizes, as a CPU can do them")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="NAME")
    parser.add_argument("--resume", action="store_true", help="leave out what was done well before")
    parser.add_argument("--save", default="out/gpu", help="folder for gpu.json (default: out/gpu)")
    parser.add_argument("--report", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device was found; what a CPU can do: --device cpu --small")
    if args.report:
        report = report_of(args.report[0], device, args.small)
        Path(args.report[1]).write_text(json.dumps(report, default=str), "utf-8")
        return
    file = Path(args.save, "gpu.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(file.read_text("utf-8"))["steps"] if args.resume and file.exists() else {}
    print("| check | result | s | figures, or why not |\n|---|---|---|---|")
    for name in args.only:
        if known.get(name, {}).get("result") != "ok":
            known[name] = report = in_own_process(name, args)
            file.write_text(json.dumps({"steps": known}, indent=1), "utf-8")
            figures = json.dumps(report.get("figures", report.get("reason"))).replace("|", "/")
            print(f"| {name} | {report['result']} | {report['seconds']} | {figures} |", flush=True)
    failed = [name for name, report in known.items() if report["result"] == "failed"]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; tracebacks are in {file}")


if __name__ == "__main__":
    main()
