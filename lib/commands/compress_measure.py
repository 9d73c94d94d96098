"""What a saved model, or a GGUF file, takes on disk, and its tokens a second.

    python -m lib.commands.compress_measure MODEL FILE.json '{"device": "cpu", "dtype": "bfloat16"}'

The last argument has device and dtype, and what from_pretrained needs to find and load the model.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lib.util.command import run

PROMPT, STEPS = 16, 48  # tokens
ROUNDS = 3  # of decoding, after one that does not count
FILES = ("*.safetensors", "tokenizer*.json", "tokenizer.model")


def disk_size(folder: Path) -> int:
    """Return the bytes of a model's weights and tokenizer."""
    return sum(file.stat().st_size for kind in FILES for file in folder.glob(kind))


def decoding_speed(model: Any) -> float:
    """Return the tokens a second of a causal language model that generates one after another."""
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


def llama_cpp_speed(file: str) -> float:
    """Return the tokens a second of a GGUF file in llama.cpp, on this CPU."""
    from urllib.request import Request

    from lib.commands.gguf.llama_cpp import DIRECT, start

    server, speeds = start(file, 2 * (PROMPT + STEPS)), []
    prompt = list(range(1, 1 + PROMPT))
    fields = {"prompt": prompt, "n_predict": STEPS, "ignore_eos": True, "temperature": 0}
    for _ in range(ROUNDS + 1):
        body, headers = json.dumps(fields).encode(), {"Content-Type": "application/json"}
        request = Request(f"{server.listening_address}/completion", body, headers)
        with DIRECT.open(request) as answer:
            speeds.append(json.load(answer)["timings"]["predicted_per_second"])
    return statistics.median(speeds[1:])


def main(argv: list[str]) -> None:
    name, file, options = argv
    source = json.loads(options)
    device, dtype = source.pop("device"), source.pop("dtype")
    if name.endswith(".gguf"):
        figures = {"bytes": Path(name).stat().st_size}
        figures |= {"tokens_per_second": llama_cpp_speed(name)} if find_spec("xllamacpp") else {}
    else:
        from transformers import AutoConfig
        from transformers.utils import cached_file

        import lib.packed.checkpoint  # noqa: F401  transformers then loads the packed form
        from lib.model.pretrained import auto_class
        from lib.util.progress import quiet

        quiet()
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, which changes names
        kind = auto_class(AutoConfig.from_pretrained(name, **source))
        model = kind.from_pretrained(name, dtype=dtype, **source).to(device).eval()
        speeds = [decoding_speed(model) for _ in range(ROUNDS + 1)]
        figures = {"bytes": disk_size(Path(cached_file(name, "config.json", **source)).parent)}
        figures |= {"tokens_per_second": statistics.median(speeds[1:])}
    Path(file).write_text(json.dumps(figures), "utf-8")


if __name__ == "__main__":
    sys.exit(run(main))
