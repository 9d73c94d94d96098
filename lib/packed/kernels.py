"""The packed linear on CPUs: kernels.cpp, built on first use and kept for the runs that follow.

Building takes a C++ compiler and a quarter to one minute. The built library lies in a folder of the
user's own inside torch's folder for extensions (TORCH_EXTENSIONS_DIR, by default
~/.cache/torch_extensions), named after the source and the version of torch. It is loaded only if
nobody else can have written it and it is as long and as digested as when it was built; otherwise it
is built anew. Which instructions run is decided by the processor that runs them, so that one
library serves them all. Where nothing can be built, one line says why, and the caller unpacks.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .errors import PackedError, PackedWarning
from .layout import pack, row_offsets, unpack
from .try_kernel import try_kernel

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SOURCE = Path(__file__).with_name("kernels.cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
operator: Callable[..., Tensor]  # what `linear` calls, once `ready()`; without any lookup by name
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@lru_cache(maxsize=1)
def ready() -> bool:
    """Whether the kernels can be called; builds them on the first call on this machine."""

    def build() -> bool:
        global operator
        _load()
        operator = torch.ops.packed_bitmask.linear.default
        return True

    _, reason = try_kernel(build, check=lambda _: _multiplies_right())
    if reason:
        line = f"packed linears run unpacked, slowly: their kernels can't be built ({reason})"
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

    `mask`, `weight` and `scale` as in layout.py, weight of x's dtype or integers; offsets int64
    (out + 1,), bias (out,). x is float32, bfloat16 or float16, on a CPU. Sums are float32. `path`
    is one of `paths()`, else the best of them; `ready()` must be true.
    """
    return operator(x, mask, weight, offsets, scale, bias, path)


def paths() -> list[str]:
    """The sets of instructions that this processor has a kernel for, the best one last."""
    return list(torch.ops.packed_bitmask.paths())


def _multiplies_right() -> bool:
    """Whether the best path agrees with the dense product on a small problem."""
    weight = torch.arange(-99, 99, dtype=torch.float32).view(3, 66)
    weight[:, ::3] = 0
    packed, x = pack(weight), torch.arange(66.0)[None] / 64
    y = linear(x, packed.mask, packed.weight, row_offsets(packed.mask))
    return torch.allclose(y, x @ unpack(packed, 66).T, rtol=1e-5)


def _load() -> None:
    """Register the operators with torch, once in a process."""
    if hasattr(torch.ops.packed_bitmask, "linear"):  # by this package under another name
        return
    folder = _private_folder()
    if folder is None:  # nothing can be kept
        _compile_and_load()
    else:
        library = folder / f"{_digest_of_source()}.so"
        with _lock(folder):  # of several processes one builds, the others load
            if not (_is_whole(library) and _loads(library)):
                _compile_and_load(library)

    @torch.library.register_fake("packed_bitmask::linear")
    def _(x, mask, weight, offsets, scale, bias, path=None):
        return x.new_empty(*x.shape[:-1], offsets.shape[0] - 1)


def _digest_of_source() -> str:
    text = SOURCE.read_bytes() + f"{torch.__version__} {platform.machine()}".encode()
    return hashlib.sha256(text).hexdigest()[:16]


def _private_folder() -> Path | None:
    """The user's own folder for built libraries; None where there can't be a safe one."""
    base = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    folder = Path(base) / f"packed_bitmask-{user}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise PackedError("is no folder")
        _check_owner(folder.lstat())
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, PackedError) as error:
        reason = getattr(error, "strerror", None) or error
        line = f"{folder}: kernels can't be kept there ({reason}); the next run builds them again"
        warnings.warn(line, PackedWarning, stacklevel=2)
        return None


def _check_owner(status: os.stat_result) -> None:
    """PackedError where another user can have written a file or folder."""
    if not hasattr(os, "geteuid"):
        return
    if status.st_uid != os.geteuid():
        raise PackedError("belongs to another user")
    if status.st_mode & OTHERS_WRITE:
        raise PackedError("other users may write it")


def _is_whole(library: Path) -> bool:
    """Whether a built library is the user's own and as it was when it was built."""
    try:
        for path in (library, _sum_file(library)):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                return False
            _check_owner(status)
        return _sum_file(library).read_text("ascii") == _sum(library)
    except (OSError, ValueError):  # not there, not ours, not text
        return False


def _sum_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _sum(library: Path) -> str:
    content = library.read_bytes()
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}\n"


def _loads(library: Path) -> bool:
    """Load a built library; False where it was built for another system than this one."""
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Inside, no other process builds; where the file system has no locks, that is not ensured."""
    with open(folder / "lock", "a") as file:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile_and_load(library: Path | None = None) -> None:
    """Build in a temporary folder and load; with `library`, keep what was built there."""
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
        if library:
            try:
                _keep(folder / "packed_kernels.so", library)
            except OSError as error:
                line = f"{library}: can't be kept ({error.strerror}); the next run builds it again"
                warnings.warn(line, PackedWarning, stacklevel=2)
    finally:
        os.environ["PATH"] = path
        shutil.rmtree(folder, ignore_errors=True)


def _keep(built: Path, library: Path) -> None:
    """Put a library and its sum in place, each whole or not at all, also after a power cut."""
    for path, content in (
        (library, built.read_bytes()),
        (_sum_file(library), _sum(built).encode("ascii")),
    ):
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
