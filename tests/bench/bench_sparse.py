"""Speed of the packed form, as Markdown tables: not a test, run it by hand on a quiet machine.

    python tests/bench/bench_sparse.py                   # a random 2:4 LLaMA
    python tests/bench/bench_sparse.py --model FOLDER    # a model; its linears are made 2:4

Dense and packed take turns in the same run, figures are medians. `packed, compiled` is the kernel
that torch.compile generates for a few tokens on CPU.
"""

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from measure import medians, random_llama, table
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

import lib.sparse
from lib.methods.sparsity import n_of_m
from lib.model.pretrained import decoder_blocks
from lib.packed.few_tokens import can_compile
from lib.packed.layout import pack, unpack

PREFILL, PROMPT, STEPS, BATCHES = 2048, 16, 8, (1, 8, 64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def two_of_four_(weight: torch.Tensor) -> None:
    weight[n_of_m(weight.abs(), 2, 4)] = 0


def bench_packing(device: torch.device, dtypes: list[str], size: int, rounds: int) -> None:
    rows = []
    for name in dtypes:
        weight = torch.randn(size, size, dtype=DTYPES[name], device=device)
        two_of_four_(weight)
        values, positions = pack(weight)
        target = torch.empty_like(weight)
        calls = {
            "copy": lambda target=target, weight=weight: target.copy_(weight),
            "pack": lambda weight=weight: pack(weight),
            "unpack": lambda v=values, p=positions, target=target: unpack(v, p, target),
        }
        spent = medians(calls, device, rounds)
        rows.append([name, *(f"{weight.nbytes / spent[c] / 1e9:.2f}" for c in calls)])
    print(f"Dense bytes of a {size} x {size} matrix per second, GB/s, on {device}:\n")
    table(["dtype", "memory copy", "pack", "unpack"], rows)


@torch.inference_mode()
def decode(model: nn.Module, batch: int, cache: DynamicCache) -> None:
    """One token after another, STEPS times, for every sequence of the batch."""
    ids = torch.ones(batch, 1, dtype=torch.int64, device=model.device)
    for _ in range(STEPS):
        model(ids, past_key_values=cache, use_cache=True)
    cache.crop(-STEPS)


@torch.inference_mode()
def prefill(model: nn.Module) -> None:
    ids = torch.arange(PREFILL, device=model.device)[None] % model.config.vocab_size
    model(ids, use_cache=False, logits_to_keep=1)


@torch.inference_mode()
def started_cache(model: nn.Module, batch: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    ids = torch.ones(batch, PROMPT, dtype=torch.int64, device=model.device)
    model(ids, past_key_values=cache, use_cache=True)
    return cache


def bench_model(dense: nn.Module, device: torch.device, dtype: str, rounds: int) -> list[list[str]]:
    models = {"dense": dense, "packed": copy.deepcopy(dense)}
    report = lib.sparse.swap_linears_(models["packed"], decoder_blocks(models["packed"])[1])
    print(f"{dtype}: {report}\n")
    if device.type == "cpu" and can_compile():
        models["packed, compiled"] = copy.deepcopy(models["packed"])
        lib.sparse.compile_decoding_(models["packed, compiled"])
    spent = medians({n: lambda m=m: prefill(m) for n, m in models.items()}, device, rounds)
    figures = {name: [PREFILL / spent[name]] for name in models}
    for batch in BATCHES:
        caches = {name: started_cache(m, batch) for name, m in models.items()}
        calls = {
            name: lambda m=m, b=batch, c=caches[name]: decode(m, b, c) for name, m in models.items()
        }
        spent = medians(calls, device, rounds)
        for name in models:
            figures[name].append(batch * STEPS / spent[name])
    base = figures["dense"]
    return [
        [dtype, name, *(f"{f:.1f} ({f / b:.2f}x)" for f, b in zip(row, base, strict=True))]
        for name, row in figures.items()
    ]


def random_model(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    inner = args.width * 11 // 4 // 64 * 64
    return random_llama(args.width, inner, args.layers, 512, PREFILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or name; default: a random LLaMA")
    parser.add_argument("--width", type=int, default=2048, help="hidden size of the random LLaMA")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the random LLaMA")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--matrix", type=int, default=4096, help="rows and columns to pack")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = torch.device(args.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads\n")
    bench_packing(device, args.dtypes, args.matrix, args.rounds)
    model = AutoModelForCausalLM.from_pretrained(args.model) if args.model else random_model(args)
    for module in decoder_blocks(model)[1].modules():
        if isinstance(module, nn.Linear):
            two_of_four_(module.weight.data)
    rows = []
    for dtype in args.dtypes:
        dense = copy.deepcopy(model).to(device, DTYPES[dtype]).eval()
        rows += bench_model(dense, device, dtype, args.rounds)
    print(f"Tokens per second on {device} (relative to dense), {args.model or 'a random LLaMA'}:\n")
    header = ["dtype", "weights", f"prefill {PREFILL}", *(f"decode, batch {b}" for b in BATCHES)]
    table(header, rows)


if __name__ == "__main__":
    main()
