"""How much memory models of any size take: by the estimate, and of several processes together.

    python tests/bench/bench_memory.py                      # 7B, 70B and 405B on 1, 8, 64 GPUs
    python tests/bench/bench_memory.py --measure 1 2 4      # processes on this machine's CPU

The first needs neither a GPU nor weights: the same code that tells a run's memory beforehand is
given the shapes of a LLaMA. The second makes a random model, prunes it by so many processes, and
adds up what is resident of all of them, a page that several have counted once (Linux). Not a test:
run it by hand.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import psutil
import torch
from transformers import LlamaConfig

from lib.methods.registry import MethodSpec
from lib.model.pretrained import decoder_blocks, default_batch_size, skeleton
from lib.model.shapes import Workload, shapes
from lib.run.memory import SPARE, MemoryLayout, Plan, lay_out
from lib.util.command import add_debug_flag, run
from lib.util.host import gib

ROOT = Path(__file__).resolve().parent.parent.parent
# width, inner width, blocks, heads of keys and values, vocabulary
SIZES = {
    "7B": (4096, 11008, 32, 32, 32000),
    "70B": (8192, 28672, 80, 8, 32000),
    "405B": (16384, 53248, 126, 8, 128256),
}
EACH_MACHINE = 8  # GPUs
GPUS = (1, 8, 64)
CUDA = torch.device("cuda", 0)
# a line with addresses and a file, if any, then lines of sizes
MAPPING = re.compile(r"^[0-9a-f]+-.*?([^ \n]*)\n(?:.*\n)*?Pss: +(\d+) kB", re.M)
MEASURED = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, vocab_size=8000)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt", "admm"])
    parser.add_argument("--nsamples", type=int, default=128, help="windows (default: 128)")
    parser.add_argument("--tests", type=int, default=64, help="test windows (default: 64)")
    parser.add_argument("--seqlen", type=int, default=4096, help="window in tokens (default: 4096)")
    parser.add_argument("--gib", type=float, default=79.0, help="free on a GPU (default: 79 GiB)")
    parser.add_argument("--measure", nargs="+", type=int, metavar="N", help="processes, on CPU")
    add_debug_flag(parser)
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    if args.measure:
        measure(args.measure)
    else:
        estimate(args)


def estimate(args: argparse.Namespace) -> None:
    """A row for each size and number of GPUs: what each GPU takes, and the host of a machine."""
    print(f"| model | GPUs | blocks | {' | '.join(args.methods)} |")
    print("|---|---|---|" + "---|" * len(args.methods))
    for size in SIZES:
        for gpus in GPUS:
            layouts = [layout(args, size, method, gpus) for method in args.methods]
            fetched = any(one.plan.fetched for one in layouts)
            cells = [size, gpus, "from the host" if fetched else "on the GPU"]
            cells += [_gib(one, args.gib) for one in layouts]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def layout(args: argparse.Namespace, size: str, method: str, gpus: int) -> MemoryLayout:
    """Where everything stands of a LLaMA of that size on so many GPUs."""
    width, inner, depth, kept_heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=width // 128,
        num_key_value_heads=kept_heads,
    )
    model = skeleton(config)
    processes = min(gpus, EACH_MACHINE)
    load = Workload(
        shapes=shapes(model, decoder_blocks(model)[0]),
        seqlen=args.seqlen,
        batch_size=default_batch_size(CUDA, args.seqlen, width),
        windows=-(-args.nsamples // gpus),
        tests=-(-args.tests // gpus),
        working=torch.bfloat16,
        saved=torch.bfloat16,
        device="cuda",
    )
    plan = Plan(
        load=load,
        method_spec=MethodSpec(method),
        processes=processes,
        shared=processes > 1,
    )
    return lay_out(plan, int(SPARE * args.gib * 2**30))


def _gib(found: MemoryLayout, free: float) -> str:
    """GiB on the device and on the host."""
    more = "" if found.device.total <= SPARE * free * 2**30 else " (too much)"
    return f"{found.device.total / 2**30:.1f}{more}, {found.machine / 2**30:.1f}"


def measure(counts: list[int]) -> None:
    """A row for each number of processes, on one random model."""
    import tiny

    with tempfile.TemporaryDirectory() as place:
        heads = dict(num_attention_heads=8, num_key_value_heads=8)
        model = tiny.tiny_llama(**MEASURED, **heads)
        weights = sum(one.nbytes for one in model.parameters())
        tiny.write_model(f"{place}/model", model)
        del model
        tiny.write_texts(f"{place}/text", train=100, test=8)
        print(f"weights: {gib(weights)}\n")
        print("| processes | all together, peak | of it shared weights | the rest, for each |")
        print("|---|---|---|---|")
        for count in counts:
            everything, shared, said = peak_of(place, count)
            rest = (everything - shared) / count
            print(f"| {count} | {gib(everything)} | {gib(shared)} | {gib(rest)} |", flush=True)
            print(f"<!-- {said} -->")


def peak_of(place: str, count: int) -> tuple[int, int, str]:
    """Of `count` processes that prune: all bytes at their peak, those of them that are files of
    weights, and what was said beforehand."""
    flags = ["--model", "model", "--calibration_data", "text", "--device", "cpu", "--seqlen", "64"]
    flags += ["--prune_method", "sparsegpt", "--nsamples", "16", "--save_model", f"by-{count}"]
    launcher = [] if count == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    process = subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "main.py"), *flags],
        cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = (0, 0)
    while process.poll() is None:
        peak = max(peak, _resident(process.pid))
        time.sleep(0.05)
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(err)
    return *peak, next(line for line in out.splitlines() if line.startswith("memory: "))


def _resident(launcher: int) -> tuple[int, int]:
    """Bytes of all processes that run main.py: shared pages once, and those of them that are files
    of weights."""
    everything = shared = 0
    for one in [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]:
        try:
            if "torch.distributed.run" in one.cmdline():
                continue
            text = Path(f"/proc/{one.pid}/smaps").read_text()
        except (OSError, psutil.Error):  # it has just ended
            continue
        for file, size in re.findall(
            r"^[0-9a-f]+-.*?([^ \n]*)\n(?:.*\n)*?Pss: +(\d+) kB", text, re.M
        ):
            everything += int(size) * 1024
            shared += int(size) * 1024 if file.endswith(".safetensors") else 0
    return everything, shared


if __name__ == "__main__":
    sys.exit(run(main))
