"""The packed linear layer on x86-64 CPUs: kernels.cpp, built on first use and kept for later runs.

Building needs a C++ compiler and 15 to 60 seconds. The library is in a folder of the user inside
torch's folder for extensions (TORCH_EXTENSIONS_DIR, by default ~/.cache/torch_extensions). Its name
depends on the source and the version of torch. The processor selects AVX2 or AVX-512 at run time.
Without the library the caller unpacks; `why_not` gives the reason, and a warning does if building
failed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .errors import PackedError, PackedWarning

SOURCE = Path(__file__).with_name("kernels.cpp")
NO_PROCESSOR = "they are for x86-64 processors with AVX2"
NO_COMPILER = "not found. Install a C++ compiler (g++)"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
operator: Callable[..., Tensor]  # called by `linear`, once `ready()`, without any lookup by name


def supported() -> bool:
    """Return whether there are kernels for this processor, x86-64 with AVX2, and its compiler
    (not Windows')."""
    return os.name == "posix" and torch.backends.cpu.get_cpu_capability().startswith("AVX")


@torch.compiler.assume_constant_result
def ready() -> bool:
    """Return whether the kernels can be called; builds them on the first call on this machine."""
    return not why_not()


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
def why_not() -> str:
    """Register the operators with torch; return why they do not exist, or "" if they do.

    The reason is NO_PROCESSOR, ends with NO_COMPILER, or is that of a build that failed.
    """
    global operator
    if not supported():
        return NO_PROCESSOR
    try:  # compilers and loaders raise exceptions of all classes, none of which may end a run
        if not hasattr(torch.ops.packed_bitmask, "linear"):  # by this package under another name
            _load_or_build()

            @torch.library.register_fake("packed_bitmask::linear")
            def _(x, mask, weight, offsets, scale, bias, path=None):
                return x.new_empty(*x.shape[:-1], offsets.shape[0] - 1)

        operator = torch.ops.packed_bitmask.linear.default
    except Exception as error:
        first = [*str(error).splitlines(), ""][0]
        why = first if isinstance(error, PackedError) else f"{type(error).__name__}: {first}"
        line = "packed linear layers run unpacked, slowly, since their kernels cannot be built: "
        warnings.warn(f"{line}{why}.", PackedWarning, stacklevel=3)
        return why
    return ""


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
        compiler = (os.environ.get("CXX") or "c++").split()[0]
    if not shutil.which(compiler):
        raise PackedError(f"{compiler}: {NO_COMPILER}")
    print("building the kernels for packed weights, once (up to a minute)", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as work:
        _build(library.stem, work)
        os.replace(Path(work, library.name), library)
    torch.ops.load_library(library)


def _build(name: str, folder: str) -> None:
    """Compile SOURCE to FOLDER/NAME.so, in a process of its own. Raises PackedError."""
    # the torch that is loaded here, wherever this program has found it
    path = [str(Path(torch.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-P", SOURCE.with_name("build_kernels.py"), name, SOURCE, folder],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the compiler ended with {done.returncode}"]
        raise PackedError(lines[-1])
