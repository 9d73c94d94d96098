"""Versions of Python and of the packages that decide a result."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = "torch transformers tokenizers datasets accelerate numpy bitsandbytes".split()


def versions() -> dict[str, str | None]:
    """{package: version}, with `python`; None for what is not installed."""
    by_package: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            by_package[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            by_package[package] = None
    return by_package
