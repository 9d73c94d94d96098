"""Speed, size and loading of packed weights beside dense ones, as JSON.

    python benchmarks/bench_sparse.py products # linears of 4096 and 11008, 1 to 512 tokens
    python benchmarks/bench_sparse.py model  # a random LLaMA of 1.2 billion parameters
    python benchmarks/bench_sparse.py model --model FOLDER  # a model; random weights become zeros
    python benchmarks/bench_sparse.py split --model FOLDER  # where the time of a token goes

Run it on a quiet machine. Dense and packed take turns in the same run, figures are medians; loading
and resident memory are those of a process of its own for each. `--files` are GGUF files, which
llama.cpp runs after them.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
from measure import medians, random_llama
from torch import Tensor, nn
from torch.nn import functional as F

from lib.formats.registry import FORMATS
from lib.gguf.conversion import run_child
from lib.gguf.llama import speeds
from lib.model.blocks import BlockRunner
from lib.model.skeleton import decoder_blocks
from lib.packed import kernels
from lib.packed.checkpoint import mark_packed_, pack_embeddings_
from lib.packed.linear import SparseLinear
from lib.sparse import swap_linears_

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
TOKENS = (1, 2, 4, 8, 16, 64, 512)
COPIES = 96 * 2**20  # bytes of weights that take turns: more than caches hold
PROMPT, NEW, PREFILL, BATCHES = 16, 16, 512, (1, 4)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU = torch.device("cpu")
PACKED = {form.bits: form for form in (FORMATS["16"], FORMATS["int4"])}


def processor() -> str:
    """Its name and those of its instructions that matter here."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    wanted = "avx2 avx512f avx512_vbmi2 avx512_vnni avx512_bf16 amx_bf16".split()
    flags = [name for name in wanted if name in facts.get("flags", "").split()]
    return f"{facts.get('model name', 'CPU')} ({' '.join(flags)})"


def zeros_(weight: Tensor, share: float) -> None:
    """Make `share` of a matrix zeros, at random places."""
    for rows in weight.detach().split(512):
        rows.masked_fill_(torch.rand(rows.shape) < share, 0)


def in_turn(calls: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """One call after the other, so that no cache still holds its weights."""
    turn = 0

    def call() -> Tensor:
        nonlocal turn
        turn += 1
        return calls[turn % len(calls)]()

    return call


def by_kernel(held: list[SparseLinear], x: Tensor, path: str | None) -> Callable[[], Tensor]:
    """Products of x by each of `held` in turn, with the instructions of `path`."""

    def one(linear: SparseLinear) -> Tensor:
        packed = linear.mask, linear.weight, linear.offsets, linear.scale
        return kernels.linear(x, *packed, None, path)

    return in_turn([lambda linear=linear: one(linear) for linear in held])


@torch.inference_mode()
def bench_product(
    shape: tuple[int, int], share: float, dtype: torch.dtype, rounds: int
) -> dict[str, list[float]]:
    """Seconds by path, for each of TOKENS."""
    rows, width = shape
    dense = nn.Linear(width, rows, bias=False, dtype=dtype)
    zeros_(dense.weight, share)
    copies = max(1, COPIES // dense.weight.nbytes)
    weights = [dense.weight.clone() for _ in range(copies)]
    held = {}
    for bits, fmt in PACKED.items():
        packed = SparseLinear.from_linear(dense, fmt)
        held[bits] = [copy.deepcopy(packed) for _ in range(2 * copies)]
    found: dict[str, list[float]] = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, width).to(dtype)
        calls = {"dense": in_turn([lambda w=w, x=x: F.linear(x, w) for w in weights])}
        calls["packed"] = by_kernel(held[16], x, None)
        calls["packed, 4 bits"] = by_kernel(held[4], x, None)
        if "avx2" in torch.ops.packed_bitmask.paths():
            calls["packed, AVX2 only"] = by_kernel(held[16], x, "avx2")
        for name, spent in medians(calls, CPU, rounds).items():
            found.setdefault(name, []).append(spent)
    return found


def bench_products(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, shape, share in product(args.dtypes, SHAPES, args.shares):
        found = bench_product(shape, share, DTYPES[name], args.rounds)
        yield {"dtype": name, "shape": shape, "zeros": share, "tokens": TOKENS, "seconds": found}


@torch.inference_mode()
def generate(model: nn.Module, batch: int, **settings: Any) -> None:
    ids = torch.arange(batch * PROMPT).view(batch, PROMPT) % 500 + 1
    settings |= {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)


@torch.inference_mode()
def prefill(model: nn.Module) -> None:
    ids = torch.arange(PREFILL)[None] % 500 + 1
    model(ids, use_cache=False, logits_to_keep=1)


def loaded(folder: str) -> dict[str, float]:
    """Seconds of loading a saved model, and what its process holds once it has generated."""
    from transformers import AutoModelForCausalLM

    memory = psutil.Process().memory_info
    before, start = memory().rss, time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    spent = time.perf_counter() - start
    generate(model, 1)
    return {"seconds": spent, "resident": memory().rss - before}


def load_apart(model: nn.Module, folder: Path) -> dict[str, float]:
    """Save, and load in a process of its own; the second time, when the disk is cached."""
    model.save_pretrained(folder)
    command = [sys.executable, __file__, "load", "--model", str(folder)]
    for _ in range(2):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return json.loads(done.stdout.splitlines()[-1]) | {"bytes": size}


def made(args: argparse.Namespace) -> nn.Module:
    """The dense model, with zeros in its blocks."""
    from transformers import AutoModelForCausalLM

    dtype = DTYPES[args.dtypes[0]]
    torch.manual_seed(0)
    if args.model:
        dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    else:
        torch.set_default_dtype(dtype)
        dense = random_llama(2048, 5632, 22, 32000, 2048)
        torch.set_default_dtype(torch.float32)
    for module in decoder_blocks(dense)[1].modules():
        if isinstance(module, nn.Linear):
            zeros_(module.weight, args.shares[0])
    return dense.eval().requires_grad_(False)


def packed_models(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The dense model and, made of it, one of each packed kind."""
    models = {"dense": made(args)}
    for bits, fmt in PACKED.items():
        models[f"packed, {bits} bits"] = model = copy.deepcopy(models["dense"])
        swap_linears_(BlockRunner(model, CPU), fmt)
    pack_embeddings_(model)  # at 4 bits, as --quantize int4 does
    mark_packed_(model)
    return models


@torch.inference_mode()
def split(model: nn.Module, rounds: int) -> dict[str, float]:
    """Milliseconds of a generated token, at batch 1: all, and what of it which modules take."""
    blocks = decoder_blocks(model)[1]
    linears = [m for m in blocks.modules() if isinstance(m, nn.Linear | SparseLinear)]
    parts = {"linears of the blocks": linears, "head": [model.get_output_embeddings()]}
    spent = dict.fromkeys(parts, 0.0)

    def timed(forward: Callable, part: str) -> Callable:
        def call(*inputs: Tensor) -> Tensor:
            start = time.perf_counter()
            out = forward(*inputs)
            spent[part] += time.perf_counter() - start
            return out

        return call

    generate(model, 1)
    for part, modules in parts.items():
        for module in modules:
            module.forward = timed(module.forward, part)
    start = time.perf_counter()
    for _ in range(rounds):
        generate(model, 1)
    whole = time.perf_counter() - start
    for module in (module for modules in parts.values() for module in modules):
        del module.forward
    spent["the rest, in transformers"] = whole - sum(spent.values())
    return {part: 1e3 * s / (rounds * NEW) for part, s in ({"all": whole} | spent).items()}


def bench_split(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Where the time of one token after another goes."""
    for name, model in packed_models(args).items():
        yield {"weights": name, "milliseconds": split(model, args.rounds)}


def bench_model(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    models = packed_models(args)
    size = sum(one.numel() for one in models["dense"].parameters())
    what = {"parameters": size, "dtype": args.dtypes[0], "zeros": args.shares[0]}
    found = {name: {"weights": name, **what, "generation": []} for name in models}
    for batch in BATCHES:
        calls = {name: lambda m=m, b=batch: generate(m, b) for name, m in models.items()}
        for name, spent in medians(calls, CPU, args.rounds).items():
            found[name]["generation"].append(batch * NEW / spent)
    calls = {name: lambda m=m: prefill(m) for name, m in models.items()}
    for name, spent in medians(calls, CPU, max(1, args.rounds // 2)).items():
        found[name]["prompt"] = PREFILL / spent
    if args.scratch:
        Path(args.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for index, (name, model) in enumerate(models.items()):
            yield found[name] | load_apart(model, Path(scratch) / str(index))
    for file in args.files:
        size, options = Path(file).stat().st_size, {"model": file, "steps": 4 * NEW}
        options |= {"prompt": [*range(1, PREFILL + 1)], "size": 4 * size}
        prompt, generation = run_child(file, speeds, **options)
        name = f"llama.cpp, {Path(file).stem}"
        yield {"weights": name, "bytes": size, "prompt": prompt, "generation": [generation]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("products", "model", "split", "load"))
    parser.add_argument("--model", help="folder or name; default: a random LLaMA")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=DTYPES)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.7], help="of zeros")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--files", nargs="*", default=[], help="GGUF files, for `model`")
    parser.add_argument("--scratch", help="folder for models that are loaded again")
    args = parser.parse_args()
    if args.what == "load":
        print(json.dumps(loaded(args.model)))
        return
    if not kernels.ready():
        sys.exit("bench_sparse: nothing to measure without the kernels; install g++ and ninja")
    made_by = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    bench = {"products": bench_products, "model": bench_model, "split": bench_split}[args.what]
    records = [made_by | {"processor": processor()} | record for record in bench(args)]
    print(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
