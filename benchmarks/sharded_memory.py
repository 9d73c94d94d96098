"""Memory of each rank that shares in a training: python benchmarks/sharded_memory.py [RANKS ...]

Trains a random LLaMA with 308 million weights in its blocks, pruned 2:4, for three steps, by 1, 2
and 4 processes on this machine's CPU, in some minutes. For the main rank it writes to
results/sharded_memory.json the bytes of all tensors that stand after a step without the tables, the
memory that is no file's before weights are read and at its peak, and the sum that lib/run/memory.py
plans with for training. It fails if peak and sum differ by more than 10%.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SIZE = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24)
SIZE |= dict(num_attention_heads=16, num_key_value_heads=16)
FLAGS = ["--device", "cpu", "--dtype", "float32", "--seqlen", "32", "--completions", "0"]
FLAGS += ["--prune_method", "magnitude", "--sparsity_type", "2:4", "--batch_size", "1"]
FLAGS += ["--recover", "768", "--recover_lr", "1e-5"]
RESULTS = ROOT / "benchmarks/results/sharded_memory.json"


def anonymous() -> int:
    """Bytes of this process that are no file's, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def tensors() -> int:
    """Bytes of all tensors in memory, those of one storage once."""
    import torch

    storages = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and not one.is_meta:
            one = one.to_local() if hasattr(one, "to_local") else one
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def child(folder: str) -> None:
    """Train as one of the ranks, and write what it takes."""
    import main
    from lib.run.memory import Memory
    from lib.stages.recover import Recoverer
    from lib.util import cli

    seen, trained, plain, check = {"peak": 0}, threading.Event(), Recoverer.run, Memory.check

    def sample() -> None:
        while not trained.wait(0.005):
            seen["peak"] = max(seen["peak"], anonymous())

    def run(recoverer: Recoverer, on_progress=lambda tokens, note="": None) -> None:
        def after(tokens: int, note: str = "") -> None:
            if note:
                weights = recoverer.runner.model
                tables = sum(one.nbytes for one in weights.get_input_embeddings().parameters())
                tables += sum(one.nbytes for one in weights.get_output_embeddings().parameters())
                seen["tensors"] = tensors() - tables
            on_progress(tokens, note)

        plain(recoverer, after)
        trained.set()

    def checked(memory: Memory) -> None:
        seen.update(planned=memory.needed("train"), before=anonymous())
        check(memory)

    Recoverer.run, Memory.check = run, checked
    threading.Thread(target=sample, daemon=True).start()
    os.chdir(folder)
    argv = ["--model", "model", "--calibration_data", "uk", "--eval_data", "uk", *FLAGS]
    argv += ["--save", f"out-{os.environ.get('WORLD_SIZE', 1)}"]
    status = cli.run(main.main, argv)
    Path(f"seen-{os.environ.get('RANK', 0)}").write_text(json.dumps(seen))
    sys.exit(status)


def measure(ranks: int, folder: str) -> dict[str, int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = dict(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_PORT=str(port))
    place |= dict(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", folder],
            env=os.environ | place | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    assert [each.wait() for each in children] == [0] * ranks
    return json.loads(Path(folder, "seen-0").read_text())


def main(counts: list[int]) -> None:
    import tiny

    with tempfile.TemporaryDirectory() as folder:
        tiny.write_model(Path(folder, "model"), tiny.tiny_llama(**SIZE))
        tiny.write_texts(Path(folder, "uk"), test=1)
        found = []
        for ranks in counts:
            seen = measure(ranks, folder)
            found.append(json.dumps({"ranks": ranks} | seen))
            print(found[-1], flush=True)
            used = (seen["peak"] - seen["before"]) / seen["planned"]
            assert 0.9 <= used <= 1.1, f"{ranks} ranks: {used:.2f} of the plan"
    RESULTS.write_text("[{}]\n".format(",\n ".join(found)), "utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        main([int(each) for each in sys.argv[1:]] or [1, 2, 4])
