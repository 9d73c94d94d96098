"""Tests on the pretended CUDA device (tests/pretended_cuda.py), by `pytest -m cuda` alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pretended_cuda
import pytest
import torch

HERE = Path(__file__).parent
SKIPPED = "the pretended CUDA device does not fit this torch or has no compiler"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("cuda")


@pytest.fixture(scope="session")
def installed() -> Any:
    try:
        return pretended_cuda.install()
    except (RuntimeError, OSError, ImportError, AttributeError, TypeError) as error:
        pytest.skip(f"{SKIPPED}: {' '.join(str(error).split())[:200]}")


@pytest.fixture(autouse=True)
def device(installed: Any) -> Iterator[Any]:
    """What controls the device."""
    torch.backends.cuda.enable_flash_sdp(False)  # the CPU's fused attention adds up otherwise
    yield installed
    torch.accelerator.set_device_index(0)
    for index in range(torch.accelerator.device_count()):
        installed.set_limit(index, 80 * 10**9)
