"""Models, texts and runs of main.py for the checks: made where a check first needs them.

folder = model_of("large", size)         # a LLaMA of random weights with a tokenizer
said, results = pruned(folder, device, size, "--prune_method", "wanda")
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import tiny
import torch
from measure import random_llama
from sizes import Size

import main

# hidden, inner, blocks, vocabulary, window in tokens, windows of calibration
SHAPES = {
    "large": (2048, 5632, 22, 32_000, 2048, 64),  # 1.2 billion weights
    "medium": (1024, 2816, 6, 8000, 512, 32),
    "little": (256, 704, 3, 320, 128, 16),
}
SMALL = {
    "large": (128, 256, 3, 320, 32, 6),
    "medium": (64, 128, 3, 320, 32, 6),
    "little": (64, 128, 2, 320, 32, 6),
}
LEAST_WORDS = 40
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def shape_of(kind: str, size: Size) -> tuple[int, ...]:
    return size.of(SHAPES, SMALL)[kind]


@contextmanager
def whole(folder: Path) -> Iterator[Path | None]:
    """A folder to fill in, which takes its name at the end; None where it is there already."""
    if folder.is_dir():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix="part-"))
    try:
        yield part
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def model_of(kind: str, size: Size) -> Path:
    """Folder of a LLaMA of random weights in bfloat16."""
    hidden, inner, blocks, vocabulary, seqlen, _ = shape_of(kind, size)
    target = Path(size.work, f"model-{kind}")
    with whole(target) as folder:
        if folder:
            torch.manual_seed(0)
            tokens = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
            with torch.device("cuda" if torch.cuda.is_available() and not size.small else "cpu"):
                model = random_llama(hidden, inner, blocks, vocabulary, seqlen, **tokens)
            model.bfloat16().save_pretrained(folder)
            tiny.tiny_tokenizer().save_pretrained(folder)
    return target


def text_of(kind: str, size: Size) -> Path:
    """Folder of texts, more of them longer than a window than a run asks for."""
    *_, seqlen, windows = shape_of(kind, size)
    target = Path(size.work, f"text-{kind}")
    with whole(target) as folder:
        if folder:
            words = max(LEAST_WORDS, seqlen)
            train = tiny.sentences(windows + 8, seed=0, words=words)
            tiny.write_texts(folder, train, tiny.sentences(8, seed=1, words=words))
    return target


def flags_of(kind: str, size: Size, device: str, model: Path | None = None) -> list[str]:
    """Of main.py, but for what is pruned."""
    *_, seqlen, windows = shape_of(kind, size)
    given = ["--model", str(model or model_of(kind, size)), "--device", device]
    given += ["--calibration_data", str(text_of(kind, size))]
    return given + ["--seqlen", str(seqlen), "--nsamples", str(windows)]


def ran(*argv: str) -> tuple[str, dict[str, Any]]:
    """main.py in this process: what it said, and its results."""
    out = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        try:
            with redirect_stdout(out):
                main.main([*argv, "--save", folder])
        finally:
            print(out.getvalue(), flush=True)  # into the report, if it failed
        results = json.loads((Path(folder) / "results.json").read_text("utf-8"))
    return out.getvalue(), results


@contextmanager
def scratch(size: Size) -> Iterator[Path]:
    """A folder for saved models, which are large."""
    with tempfile.TemporaryDirectory(dir=size.work, prefix="saved-") as folder:
        yield Path(folder)


def digest(folder: Path) -> str:
    """Of all weights of a saved model."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def estimates(said: str) -> list[float]:
    """GiB in the line that main.py tells before the run: of the device where there is one, host."""
    line = next((one for one in said.splitlines() if one.startswith("memory:")), "")
    found = re.findall(r"about ([\d.]+) (KiB|MiB|GiB)", line)
    return [float(value) * UNITS[unit] / 2**30 for value, unit in found]


def perplexity(results: dict[str, Any]) -> float:
    return next(iter(results["perplexity"].values()))


def told(said: str, start: str) -> str:
    """The rest of the line that begins as the pattern says."""
    found = re.search(rf"(?m)^{start}(.*)$", said)
    return found[1] if found else "not told"
