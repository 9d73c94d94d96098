"""Measure the size on disk and the tokens per second of a saved model or a GGUF file.

    python -m lib.util.cli commands.compress.measure MODEL FILE.json OPTIONS

OPTIONS, such as '["cpu", "bfloat16", {}]', are device, dtype, and arguments of from_pretrained.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROMPT, STEPS = 16, 48  # tokens
ROUNDS = 3  # repeated decodings, after one to warm up
ROWS = ("on disk, MB", "tokens/s")
FILES = ("*.safetensors", "tokenizer*.json", "tokenizer.model")


def disk_size(folder: Path) -> int:
    """Return the bytes of a model's weights and tokenizer."""
    return sum(file.stat().st_size for kind in FILES for file in folder.glob(kind))


def decoding_speed(model: Any) -> float:
    """Return the tokens per second of a causal language model that decodes one by one."""
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


def main(argv: list[str]) -> None:
    name, file, options = argv
    device, dtype, source = json.loads(options)
    if name.endswith(".gguf"):
        from ...gguf.llama import speeds

        size, speed = Path(name).stat().st_size, None
        if find_spec("xllamacpp"):
            _, speed = speeds(name, range(1, 1 + PROMPT), STEPS)
    else:
        from transformers import AutoConfig
        from transformers.utils import cached_file

        from ...model.skeleton import auto_class
        from ...packed import checkpoint  # noqa: F401  registers the packed form with transformers
        from ...util.progress import quiet

        quiet()
        warnings.simplefilter("ignore", FutureWarning)  # names that transformers renames
        size = disk_size(Path(cached_file(name, "config.json", **source)).parent)
        kind = auto_class(AutoConfig.from_pretrained(name, **source))
        model = kind.from_pretrained(name, dtype=dtype, **source).to(device).eval()
        speed = statistics.median([decoding_speed(model) for _ in range(ROUNDS + 1)][1:])
    figures = {ROWS[0]: size / 1e6} | ({ROWS[1]: speed} if speed else {})
    Path(file).write_text(json.dumps(figures), "utf-8")
