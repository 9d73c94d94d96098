"""What a saved model takes: bytes on disk, tokens a second, memory.

    python -m lib.compress.measure FOLDER [--device cpu]     # one line of JSON

Each model is measured in a process of its own, so that its memory is what a user would see.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import psutil

from lib.util.errors import UserError

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).resolve().parents[2]
PROMPT, STEPS = 16, 48  # tokens
ROUNDS = 3  # of decoding, after one that does not count
FILES = ("*.safetensors", "tokenizer*.json", "tokenizer.model")


class Figures(TypedDict):
    bytes: int  # on disk
    tokens_per_second: float  # one after another, the median of some rounds
    memory: int  # bytes, resident, once the model has generated; on CUDA those of its tensors


def disk_size(folder: Path) -> int:
    """Return the bytes of a model's weights and tokenizer."""
    return sum(file.stat().st_size for kind in FILES for file in folder.glob(kind))


def decoding_speed(model: nn.Module) -> float:
    """Return the tokens a second of `model` that generates one token after another."""
    import torch

    with torch.inference_mode():
        ids = torch.arange(1, 1 + PROMPT, device=model.device)[None]
        cache = model(ids, use_cache=True).past_key_values
        last = ids[:, -1:]
        start = time.perf_counter()
        for _ in range(STEPS):
            logits = model(last, past_key_values=cache, use_cache=True).logits
            last = logits[:, -1:].argmax(-1)
        last.cpu()  # waits for the device
        return STEPS / (time.perf_counter() - start)


def measured(folders: Sequence[Path], device: str) -> list[Figures]:
    """Measure each model in a process of its own, one after another.

    Raises UserError with the last line of a process that fails.
    """
    figures = []
    for folder in folders:
        command = [sys.executable, "-P", "-m", "lib.compress.measure", str(folder)]
        done = subprocess.run(
            [*command, "--device", device],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{folder}: its speed can't be measured ({reason})")
        figures.append(json.loads(done.stdout.splitlines()[-1]))
    return figures


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a saved model")
    parser.add_argument("--device", default="cpu", help="where it generates")
    args = parser.parse_args(argv)
    if not (args.folder / "config.json").is_file():
        parser.error(f"{args.folder}: holds no model (there is no config.json)")
    import torch
    from transformers import AutoModelForCausalLM

    import lib.sparse  # noqa: F401  transformers then loads the packed form
    from lib.util.host import malloc_trim
    from lib.util.progress import quiet

    quiet()
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype="auto").to(args.device).eval()
    speeds = [decoding_speed(model) for _ in range(ROUNDS + 1)][1:]
    malloc_trim()
    on_gpu = args.device.startswith("cuda")
    memory = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    figures: Figures = {
        "bytes": disk_size(args.folder),
        "tokens_per_second": statistics.median(speeds),
        "memory": memory,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
