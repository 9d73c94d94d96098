"""The packed linear on x86-64 CPUs: kernels.cpp, built on first use and kept for later runs.

Building takes a C++ compiler and a quarter to one minute. The library lies in a folder of the
user's own inside torch's folder for extensions (TORCH_EXTENSIONS_DIR, by default
~/.cache/torch_extensions), named after the source and the version of torch. Which instructions run,
AVX2 or AVX-512, is decided by the processor that runs them. Where nothing can be built, one line
says why, and the caller unpacks.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .errors import PackedWarning, one_line
from .formats import FORMATS
from .layout import row_offsets

SOURCE = Path(__file__).with_name("kernels.cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
operator: Callable[..., Tensor]  # what `linear` calls, once `ready()`; without any lookup by name


def supported() -> bool:
    """Whether there are kernels for this processor, x86-64 with AVX2, and its compiler (not
    Windows')."""
    return os.name == "posix" and torch.backends.cpu.get_cpu_capability().startswith("AVX")


@lru_cache(maxsize=1)
def ready() -> bool:
    """Whether the kernels can be called; builds them on the first call on this machine."""
    global operator
    if not supported():
        return False
    try:  # compilers and loaders raise exceptions of all classes, and none must end a run
        _load()
        operator = torch.ops.packed_bitmask.linear.default
        reason = "" if _multiplies_right() else "their results are wrong here"
    except Exception as error:
        reason = _compiler_error(error)
    if reason:
        line = f"packed linears run unpacked, slowly: their kernels can't be built: {reason}"
        warnings.warn(line, PackedWarning, stacklevel=2)
    return not reason


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
    float32. `path` is one of `paths()`, else the best of them; `ready()` must be true.
    """
    return operator(x, mask, weight, offsets, scale, bias, path)


def paths() -> list[str]:
    """The sets of instructions that this processor has a kernel for, the best one last."""
    return list(torch.ops.packed_bitmask.paths())


def _multiplies_right() -> bool:
    """Whether the best path agrees with the dense product on a small problem."""
    weight = torch.arange(-99, 99, dtype=torch.float32).view(3, 66)
    weight[:, ::3] = 0
    packed, x = FORMATS[16].encode(weight), torch.arange(66.0)[None] / 64
    y = linear(x, packed.mask, packed.weight, row_offsets(packed.mask))
    return torch.allclose(y, x @ weight.T, rtol=1e-5)


def _load() -> None:
    """Register the operators with torch, once in a process."""
    if hasattr(torch.ops.packed_bitmask, "linear"):  # by this package under another name
        return
    folder, name = _own_folder(), f"packed_{_digest()}"
    try:
        if folder is None:
            raise OSError
        torch.ops.load_library(folder / f"{name}.so")
    except OSError:  # it is not there, or not whole
        _build(name, folder)

    @torch.library.register_fake("packed_bitmask::linear")
    def _(x, mask, weight, offsets, scale, bias, path=None):
        return x.new_empty(*x.shape[:-1], offsets.shape[0] - 1)


def _digest() -> str:
    return hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]


def _own_folder() -> Path | None:
    """The user's folder for built libraries; None where it can't be written, or others can."""
    base = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    folder = Path(base) / f"packed_bitmask-{os.geteuid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        there = folder.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(there.st_mode) and there.st_uid == os.geteuid()
    return folder if own and not there.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


def _build(name: str, folder: Path | None) -> None:
    """Build in a temporary folder and load; what was built is moved to `folder` as a whole."""
    from torch.utils.cpp_extension import load

    kept = "once" if folder else "for this run: there is no folder of your own to keep them in"
    print(f"building the kernels of packed linears, {kept} (up to a minute)", file=sys.stderr)
    path = os.environ.get("PATH", "")  # with ninja of a virtual environment that is not activated
    os.environ["PATH"] = f"{path}{os.pathsep}{os.path.dirname(sys.executable)}"
    try:
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as work:
            load(
                name=name,
                sources=[str(SOURCE)],
                # not for the linker: torch has its OpenMP loaded; Apple's compiler has none
                extra_cflags=["-O2", *([] if sys.platform == "darwin" else ["-fopenmp"])],
                build_directory=work,
                is_python_module=False,
            )
            if folder:
                os.replace(Path(work) / f"{name}.so", folder / f"{name}.so")
    finally:
        os.environ["PATH"] = path


def _compiler_error(error: Exception) -> str:
    """What is wrong, in one line, of a compiler's output without its command."""
    if not str(error).startswith("Error building extension"):
        return one_line(error)
    lines = [line.strip() for line in str(error).splitlines()[1:]]
    lines = [line for line in lines if "error:" in line or "not found" in line]
    line = lines[0] if lines else "the compiler failed"
    return f"{line}; install a C++ compiler (g++)" if "not found" in line else line
