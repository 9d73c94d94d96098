"""torch's own 2:4 tensor on CUDA: which matrices it takes, and by which of its two libraries.

cuSPARSELt and CUTLASS multiply by a 2:4 matrix on the tensor cores of Ampere and later; torch's
CUTLASS kernels know capability 8.x alone. Float32 is left out: its products would be rounded to
TF32.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from .try_kernel import try_kernel

Library = type[SparseSemiStructuredTensor]


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch's kernels don't take an (out, in) matrix on `device`; None where they may."""
    if device.type != "cuda":
        return f"torch's 2:4 kernels run on CUDA, not on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no 2:4 tensor cores"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype}: torch's 2:4 kernels compute in float16 and bfloat16"
    if not _libraries(device):
        return f"this torch has no 2:4 kernels for {torch.cuda.get_device_name(device)}"
    if pick(shape, dtype, device) is None:
        return f"{shape[0]} x {shape[1]}: not the multiples that torch's 2:4 kernels take"
    return None


def pick(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Library | None:
    """The first library that takes an (out, in) matrix of `dtype` on this GPU."""
    for library in _libraries(device):
        least = library._DTYPE_SHAPE_CONSTRAINTS[dtype]
        if not (shape[0] % least.sparse_min_rows or shape[1] % least.sparse_min_cols):
            return library
    return None


def build(dense: Tensor) -> tuple[Tensor | None, str]:
    """Torch's 2:4 tensor of a 2:4 matrix (out, in) on CUDA, and the library that multiplies by it;
    or None and the reason. It is only handed out if it gives the same matrix back, bit by bit,
    because it will be the one copy in memory."""
    shape, dtype = tuple(dense.shape), dense.dtype
    reason = why_not(shape, dtype, dense.device)
    if reason:
        return None, reason
    library = pick(shape, dtype, dense.device)

    def convert() -> Tensor:
        with warnings.catch_warnings():  # torch calls the class a prototype, once
            warnings.simplefilter("ignore", UserWarning)
            return library.from_dense(dense.detach())

    tensor, reason = try_kernel(convert, check=lambda tensor: torch.equal(tensor.to_dense(), dense))
    return tensor, f"{library.BACKEND}: {reason}" if reason else library.BACKEND


def _libraries(device: torch.device) -> list[Library]:
    """Those that multiply on this GPU, the better one first."""
    libraries: list[Library] = []
    if torch.backends.cusparselt.is_available():
        libraries.append(SparseSemiStructuredTensorCUSPARSELT)
    if torch.cuda.get_device_capability(device)[0] == 8:
        libraries.append(SparseSemiStructuredTensorCUTLASS)
    return libraries
