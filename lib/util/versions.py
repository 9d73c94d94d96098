"""Versions of Python and of the packages that decide a result."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

PACKAGES = "torch transformers tokenizers datasets accelerate numpy bitsandbytes".split()


def versions() -> dict[str, str | None]:
    """{package: version}, with `python`; None for what is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
