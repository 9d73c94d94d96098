"""What benchmarks share: medians of calls that take turns, tables, LLaMAs of random weights.

Importing this file imports torch, and transformers only where a model is made.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Of one call, where the device has nothing else to do; the mean over `repeats` in a row."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait_for(device)
    return (time.perf_counter() - start) / repeats


def medians(
    calls: dict[str, Callable[[], object]], device: torch.device, rounds: int, repeats: int = 1
) -> dict[str, float]:
    """Median seconds of each call; they take turns, after one round that doesn't count."""
    times = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            spent = seconds(call, device, repeats)
            if turn:
                times[name].append(spent)
    return {name: statistics.median(spent) for name, spent in times.items()}


def decoding_speeds(folders: Sequence[Path], device: str, rounds: int) -> list[float]:
    """Return the median tokens a second of saved models, in the dtype that each was saved in.

    They take turns, after one round that doesn't count.
    """
    from transformers import AutoModelForCausalLM

    import lib.formats.packed.checkpoint  # noqa: F401  the packed form is known to transformers
    from lib.commands.compress.measure import decoding_speed

    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
        for folder in folders
    ]
    speeds: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 1):
        for times, model in zip(speeds, models, strict=True):
            speed = decoding_speed(model)
            if turn:
                times.append(speed)
    return [statistics.median(times) for times in speeds]


def table(header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    for cells in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(cells) + " |", flush=True)
    print(flush=True)


def random_llama(
    hidden: int,
    inner: int,
    blocks: int,
    vocabulary: int,
    seqlen: int,
    head: int = 64,
    tied: bool = False,
    **tokens: int,
) -> LlamaForCausalLM:
    """With heads of `head` channels and a window of `seqlen`; `tokens`: its `bos_token_id`, ..."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, hidden // head)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=seqlen,
        tie_word_embeddings=tied,
        **tokens,
    )
    return LlamaForCausalLM(config)
