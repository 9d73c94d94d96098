"""The packed linear on CPUs: kernels.cpp, built on first use and kept for the runs that follow.

Building takes a C++ compiler and a quarter to one minute. What is built lies in torch's folder for
extensions (TORCH_EXTENSIONS_DIR, by default ~/.cache/torch_extensions), named after source and
version of torch. Which instructions run is decided by the processor that runs them, so that one
built file serves them all. Where nothing can be built, one line says why, and the caller unpacks.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lib.util.errors import RunWarning

SOURCE = Path(__file__).with_name("kernels.cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=1)
def ready() -> bool:
    """Whether the kernels can be called; builds them on the first call on this machine."""
    try:
        _load()
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        line = f"packed linears run unpacked, slowly: their kernels can't be built ({reason[0]})"
        warnings.warn(line, RunWarning, stacklevel=2)
        return False
    return True


def linear(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    offsets: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    path: str | None = None,
) -> Tensor:
    """x (tokens, in) times the packed weight (out, in), transposed -> (tokens, out) as x's dtype.

    mask uint8 (out, ceil(in / 8)), weight (kept,) of x's dtype or int8 with scale float32 (out,),
    offsets int64 (out + 1,), bias (out,). x is float32, bfloat16 or float16, on a CPU. Sums are
    float32. `path` is one of `paths()`, else the best of them; `ready()` must be true.
    """
    return torch.ops.packed.linear(x, mask, weight, offsets, scale, bias, path)


def paths() -> list[str]:
    """The sets of instructions that this processor has a kernel for, the best one last."""
    return list(torch.ops.packed.paths())


def _load() -> None:
    """Register the operators with torch."""
    built = _built_file()
    if not built.exists():
        _build(built)
    else:
        torch.ops.load_library(built)

    @torch.library.register_fake("packed::linear")
    def _(x, mask, weight, offsets, scale, bias, path=None):
        return x.new_empty(x.shape[0], mask.shape[0])


def _built_file() -> Path:
    text = SOURCE.read_bytes() + f"{torch.__version__} {platform.machine()}".encode()
    name = hashlib.sha256(text).hexdigest()[:16]
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(folder) / f"packed_{name}.so"


def _build(built: Path) -> None:
    """Build, load, and keep the file. It is put in place whole, so that runs that build at the
    same time, or are killed meanwhile, harm none."""
    from torch.utils.cpp_extension import load

    print("building the kernels of packed linears, once (a quarter to one minute)", file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="packed-"))
    bin_folder = os.path.dirname(sys.executable)  # ninja of a virtual environment not activated
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{path}{os.pathsep}{bin_folder}"
    try:
        load(
            "packed_kernels",
            [str(SOURCE)],
            extra_cflags=["-O2", "-fopenmp"],  # not for the linker: torch has its OpenMP loaded
            build_directory=str(folder),
            is_python_module=False,
        )
        try:
            built.parent.mkdir(parents=True, exist_ok=True)
            staged = built.with_name(f"{built.name}.{os.getpid()}")
            shutil.copyfile(folder / "packed_kernels.so", staged)
            staged.replace(built)
        except OSError as error:
            line = f"{built}: can't be kept ({error.strerror}); the next run builds it again"
            warnings.warn(line, RunWarning, stacklevel=2)
    finally:
        os.environ["PATH"] = path
        shutil.rmtree(folder, ignore_errors=True)
