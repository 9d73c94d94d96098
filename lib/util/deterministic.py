"""Reproducible gradients on accelerators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(device: torch.device, strict: bool) -> Iterator[None]:
    """Make accelerator reductions deterministic, so that a seed reproduces the weights.

    If an operation has no deterministic implementation, torch raises RuntimeError if `strict`, and
    warns otherwise. Attention's backward is deterministic only if `strict`. cuDNN's backward, which
    some GPUs prefer and the forward pass selects, never is.
    """
    settings, attention = torch.utils.deterministic, torch.backends.cuda
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills, cudnn = settings.fill_uninitialized_memory, attention.cudnn_sdp_enabled()
    if device.type != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=not strict)
        settings.fill_uninitialized_memory = False  # no code here reads unwritten memory
        attention.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fills
        attention.enable_cudnn_sdp(cudnn)
