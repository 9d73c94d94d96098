"""What there is: card, driver, compilers, libraries, room, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from sizes import Size

from lib.util.host import available, gib

PACKAGES = "transformers accelerate safetensors tokenizers numpy triton".split()
MAYBE = "datasets bitsandbytes matplotlib pyarrow pytest psutil sentencepiece".split()


def check_machine(device: str, size: Size) -> dict[str, Any]:
    """Fails nowhere but where the device itself does."""
    there = torch.device(device)
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    found |= {name: version(name) for name in PACKAGES}
    found["missing"] = " ".join(name for name in MAYBE if not find_spec(name)) or "nothing"
    found["C compiler"] = said("cc", "--version") or said("gcc", "--version") or "none"
    found["compute-sanitizer"] = sanitizer() or "none"
    found["host"] = f"{os.cpu_count()} cores, {gib(available())} free"
    found["disk"] = f"{gib(shutil.disk_usage(size.work).free)} free"
    if there.type != "cuda":
        return found
    card = torch.cuda.get_device_properties(there)
    free, total = torch.cuda.mem_get_info(there)
    found["card"] = f"{torch.cuda.device_count()} x {card.name}, {card.major}.{card.minor}"
    found["multiprocessors"] = card.multi_processor_count
    found["its memory"] = f"{gib(total)}, {gib(free)} free"
    query = "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"
    found["driver, clock, power"] = said("nvidia-smi", *query) or "no nvidia-smi"
    found["CUDA"] = torch.version.cuda
    found["cuDNN"] = torch.backends.cudnn.version()
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    sparse = torch.backends.cusparselt
    found["cuSPARSELt"] = sparse.version() if sparse.is_available() else "none"
    x = torch.randn(1024, 1024, device=there)
    assert (x @ x.inverse() - torch.eye(1024, device=there)).abs().max() < 0.1
    return found


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def said(*command: str) -> str | None:
    """The first line that a command prints, or None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [""])[0]


def sanitizer() -> str | None:
    """Path of compute-sanitizer, which comes with CUDA's toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:{home}/bin")
