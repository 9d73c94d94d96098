"""What benchmarks share: medians of calls that take turns, children, LLaMAs of random weights.

Importing this file imports torch, and transformers only where a model is made.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]


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
    turns = [
        {name: seconds(call, device, repeats) for name, call in calls.items()}
        for _ in range(rounds + 1)
    ]
    return {name: statistics.median(turn[name] for turn in turns[1:]) for name in calls}


def child(*command: object) -> str:
    """Run a command, which says itself why it failed; return what it prints."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


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
