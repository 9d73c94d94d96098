"""Gradients that an accelerator adds up in one order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(device: torch.device, strict: bool) -> Iterator[None]:
    """Inside, an accelerator adds up in one order, so that a seed gives the same weights.

    Where an operation has no deterministic implementation torch raises RuntimeError if `strict`,
    and warns otherwise. Attention's backward is deterministic under `strict` alone, and cuDNN's,
    which is preferred on some GPUs and chosen in the forward pass, never is.
    """
    settings, attention = torch.utils.deterministic, torch.backends.cuda
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills, cudnn = settings.fill_uninitialized_memory, attention.cudnn_sdp_enabled()
    if device.type != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=not strict)
        settings.fill_uninitialized_memory = False  # nothing here reads what it has not written
        attention.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fills
        attention.enable_cudnn_sdp(cudnn)
