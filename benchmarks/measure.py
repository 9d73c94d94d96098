"""What benchmarks share: medians of calls that take turns, tables, LLaMAs of random weights.

Importing this file imports torch, and transformers only where a model is made.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def in_turn(measures: dict[Any, Callable[[], float]], rounds: int) -> dict[Any, float]:
    """Return the median of each measure; they take turns, after one round that doesn't count."""
    turns = [{name: measure() for name, measure in measures.items()} for _ in range(rounds + 1)]
    return {name: statistics.median(turn[name] for turn in turns[1:]) for name in measures}


def medians(
    calls: dict[str, Callable[[], object]], device: torch.device, rounds: int, repeats: int = 1
) -> dict[str, float]:
    """Median seconds of each call, which take turns."""
    timed = {name: partial(seconds, call, device, repeats) for name, call in calls.items()}
    return in_turn(timed, rounds)


def decoding_speeds(folders: Sequence[Path], device: str, rounds: int) -> dict[Path, float]:
    """Return the median tokens a second of saved models, each in its dtype, which take turns."""
    from transformers import AutoModelForCausalLM

    import lib.packed.checkpoint  # noqa: F401  the packed form is known to transformers
    from lib.commands.compress.measure import decoding_speed

    load = partial(AutoModelForCausalLM.from_pretrained, dtype="auto")
    models = {folder: load(folder).to(device).eval() for folder in folders}
    return in_turn({each: partial(decoding_speed, model) for each, model in models.items()}, rounds)


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
