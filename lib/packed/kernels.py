"""The packed linear layer on x86-64 CPUs: kernels.cpp, built on first use and kept for later runs.

Building needs a C++ compiler and 15 to 60 seconds. The library is in a folder of the user inside
torch's folder for extensions (TORCH_EXTENSIONS_DIR, by default ~/.cache/torch_extensions). Its name
depends on the source and the version of torch. The processor selects AVX2 or AVX-512 at run time.
If building fails, one line gives the reason, and the caller unpacks.
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
operator: Callable[..., Tensor]  # called by `linear`, once `ready()`, without any lookup by name


def supported() -> bool:
    """Return whether there are kernels for this processor, x86-64 with AVX2, and its compiler
    (not Windows')."""
    return os.name == "posix" and torch.backends.cpu.get_cpu_capability().startswith("AVX")


@torch.compiler.assume_constant_result
def ready() -> bool:
    """Return whether the kernels can be called; builds them on the first call on this machine."""
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
    """Multiply x (..., in) by the packed weight (out, in), transposed -> (..., out) in x's dtype.

    `mask`, `weight` and `scale` are as in formats.py, `weight` in x's dtype or as 4-bit integers.
    Or `weight` is int8 (out * in,), all kept, with one row of `mask` and float32 `scale` (out,).
    `offsets` is int64 (out + 1,), `bias` (out,). x is float32, bfloat16 or float16, on a CPU. Sums
    are float32. `path` is an instruction set from `torch.ops.packed_bitmask.paths()`, those with a
    kernel for this processor; by default the best. `ready()` must be true.
    """
    return operator(x, mask, weight, offsets, scale, bias, path)


@cache
def _load() -> bool:
    """Register the operators with torch; return whether they exist."""
    global operator
    if not supported():
        return False
    try:  # compilers and loaders raise exceptions of all classes, none of which may end a run
        if not hasattr(torch.ops.packed_bitmask, "linear"):  # by this package under another name
            _load_or_build()

            @torch.library.register_fake("packed_bitmask::linear")
            def _(x, mask, weight, offsets, scale, bias, path=None):
                return x.new_empty(*x.shape[:-1], offsets.shape[0] - 1)

        operator = torch.ops.packed_bitmask.linear.default
    except Exception as error:
        line = "packed linear layers run unpacked, slowly, since their kernels cannot be built: "
        warnings.warn(line + _compiler_error(error), PackedWarning, stacklevel=3)
        return False
    return True


def _load_or_build() -> None:
    """Build in a temporary directory and rename: an interrupted build leaves no stale lock."""
    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    base = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    folder = Path(base) / f"packed_bitmask-{os.geteuid()}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid() or folder.stat().st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to another user, or others can write there")
    library = folder / f"packed_{digest}.so"
    try:
        return torch.ops.load_library(library)
    except OSError:  # missing or incomplete
        from torch.utils.cpp_extension import load

    print("building the kernels for packed weights, once (up to a minute)", file=sys.stderr)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # hides a long "not g++"
    # finds the ninja of a virtual environment that is not activated
    os.environ["PATH"] = os.pathsep.join(
        [os.environ.get("PATH", ""), str(Path(sys.executable).parent)]
    )
    # only for the compiler: torch has OpenMP loaded; Apple's compiler has none
    flags = ["-O2", *([] if sys.platform == "darwin" else ["-fopenmp"])]
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as work:
        options = {"extra_cflags": flags, "build_directory": work, "is_python_module": False}
        load(library.stem, str(SOURCE), **options)
        os.replace(Path(work, library.name), library)


def _compiler_error(error: Exception) -> str:
    """Return the cause, in one line, from a compiler's output without its command."""
    first, *output = str(error).strip().splitlines() or [""]
    wrong = [line.strip() for line in output if "error:" in line or "not found" in line]
    if first.startswith("Error building extension") and wrong:
        return f"{wrong[0]}. Install a C++ compiler (g++)."
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
