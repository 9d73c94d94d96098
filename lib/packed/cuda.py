"""torch's own 2:4 tensor on CUDA: which matrices it takes, and the faster of its two libraries.

cuSPARSELt and CUTLASS multiply by a 2:4 matrix on the tensor cores of Ampere and later. Float32
is left out: its products would be rounded to TF32.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

Library = type[SparseSemiStructuredTensor]
TRIAL_TOKENS = 1024
TRIALS = 7


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch's kernels don't take an (out, in) matrix on `device`; None where they may."""
    if device.type != "cuda":
        return f"torch's 2:4 kernels run on CUDA, not on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no 2:4 tensor cores"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype}: torch's 2:4 kernels compute in float16 and bfloat16"
    if not any(_takes(library, shape, dtype) for library in _libraries()):
        return f"{shape[0]} x {shape[1]}: not the multiples that torch's 2:4 kernels take"
    return None


def build(dense: Tensor) -> tuple[Tensor | None, str]:
    """Torch's 2:4 tensor of a 2:4 matrix (out, in) on CUDA, and the library that multiplies by it;
    or None and the reason. It is only handed out if it gives the same matrix back, bit by bit,
    because it will be the one copy in memory."""
    reason = why_not(tuple(dense.shape), dense.dtype, dense.device)
    if reason:
        return None, reason
    library, reason = _fastest(tuple(dense.shape), dense.dtype, dense.device)
    if library is None:
        return None, reason
    tensor = _from_dense(library, dense)
    if not torch.equal(tensor.to_dense(), dense):
        return None, f"{library.BACKEND} does not give the weight back unchanged"
    return tensor, library.BACKEND


def _libraries() -> list[Library]:
    found: list[Library] = []
    if torch.backends.cusparselt.is_available():
        found.append(SparseSemiStructuredTensorCUSPARSELT)
    found.append(SparseSemiStructuredTensorCUTLASS)
    return found


def _takes(library: Library, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    limits = library._DTYPE_SHAPE_CONSTRAINTS.get(dtype)
    if limits is None:
        return False
    rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
    return shape[0] % rows == 0 and shape[1] % columns == 0


def _from_dense(library: Library, dense: Tensor) -> Tensor:
    with warnings.catch_warnings():  # torch calls the class a prototype, once
        warnings.simplefilter("ignore", UserWarning)
        return library.from_dense(dense.detach())


@lru_cache(maxsize=256)
def _fastest(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Library | None, str]:
    """Timed once for a shape; a library that fails on this GPU is passed over."""
    trial = torch.zeros(shape, dtype=dtype, device=device)
    trial[:, ::2] = 1
    x = torch.ones(TRIAL_TOKENS, shape[1], dtype=dtype, device=device)
    times, reasons = {}, []
    for library in _libraries():
        if _takes(library, shape, dtype):
            try:
                times[library] = _median_ms(x, _from_dense(library, trial))
            except RuntimeError as error:
                reasons.append(f"{library.BACKEND}: {str(error).splitlines()[0]}")
    return (min(times, key=times.get), "") if times else (None, "; ".join(reasons))


def _median_ms(x: Tensor, weight: Tensor) -> float:
    F.linear(x, weight)
    times = []
    for _ in range(TRIALS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        F.linear(x, weight)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[TRIALS // 2]
