"""The packed linear on x86-64 CPUs: kernels.cpp, built on first use and kept for later runs.

Building takes a C++ compiler and a quarter to one minute. The library lies in a folder of the
user's own inside torch's folder for extensions (TORCH_EXTENSIONS_DIR, by default
~/.cache/torch_extensions), named after the source and the version of torch. Which instructions run,
AVX2 or AVX-512, is decided by the processor that runs them. Where nothing can be built, one line
says why, and the caller unpacks.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .errors import PackedWarning

SOURCE = Path(__file__).with_name("kernels.cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
operator: Callable[..., Tensor]  # what `linear` calls, once `ready()`; without any lookup by name


def supported() -> bool:
    """Whether there are kernels for this processor, x86-64 with AVX2, and its compiler (not
    Windows')."""
    return os.name == "posix" and torch.backends.cpu.get_cpu_capability().startswith("AVX")


@torch.compiler.assume_constant_result
def ready() -> bool:
    """Whether the kernels can be called; builds them on the first call on this machine."""
    return _load()


def linear(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    offsets: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    path: str | None = None,
) -> Tensor:
    """x (..., in) times the packed weight (out, in), transposed -> (..., out) as x's dtype.

    `mask`, `weight` and `scale` as in formats.py, weight of x's dtype or 4-bit integers; or int8
    (out * in,) of which every one is kept, with one row of `mask` and float32 `scale` (out,).
    offsets int64 (out + 1,), bias (out,). x is float32, bfloat16 or float16, on a CPU. Sums are
    float32. `path` is one of `torch.ops.packed_bitmask.paths()`, the sets of instructions that this
    processor has a kernel for, else the best of them; `ready()` must be true.
    """
    return operator(x, mask, weight, offsets, scale, bias, path)


@cache
def _load() -> bool:
    """Register the operators with torch; whether they are there."""
    global operator
    if not supported():
        return False
    try:  # compilers and loaders raise exceptions of all classes, and none must end a run
        if not hasattr(torch.ops.packed_bitmask, "linear"):  # by this package under another name
            _load_or_build()

            @torch.library.register_fake("packed_bitmask::linear")
            def _(x, mask, weight, offsets, scale, bias, path=None):
                return x.new_empty(*x.shape[:-1], offsets.shape[0] - 1)

        operator = torch.ops.packed_bitmask.linear.default
    except Exception as error:
        line = "packed linears run unpacked, slowly: their kernels can't be built: "
        warnings.warn(line + _compiler_error(error), PackedWarning, stacklevel=3)
        return False
    return True


def _load_or_build() -> None:
    """Built in a folder of its own and moved as a whole: who is cut off leaves no lock behind."""
    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    base = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    folder = Path(base) / f"packed_bitmask-{os.geteuid()}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid() or folder.stat().st_mode & 0o022:
        raise PermissionError(f"{folder} is not your own, or others may write there")
    library = folder / f"packed_{digest}.so"
    try:
        return torch.ops.load_library(library)
    except OSError:  # it is not there, or not whole
        from torch.utils.cpp_extension import load

    print("building the kernels of packed linears, once (up to a minute)", file=sys.stderr)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "not g++", at length
    # with ninja of a virtual environment that is not activated
    os.environ["PATH"] = os.pathsep.join(
        [os.environ.get("PATH", ""), str(Path(sys.executable).parent)]
    )
    # not for the linker: torch has its OpenMP loaded; Apple's compiler has none
    flags = ["-O2", *([] if sys.platform == "darwin" else ["-fopenmp"])]
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as work:
        options = {"extra_cflags": flags, "build_directory": work, "is_python_module": False}
        load(library.stem, str(SOURCE), **options)
        os.replace(Path(work, library.name), library)


def _compiler_error(error: Exception) -> str:
    """What is wrong, in one line, of a compiler's output without its command."""
    first, *output = str(error).strip().splitlines() or [""]
    wrong = [line.strip() for line in output if "error:" in line or "not found" in line]
    if first.startswith("Error building extension") and wrong:
        return f"{wrong[0]}; install a C++ compiler (g++)"
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
