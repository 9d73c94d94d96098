"""torch's own 2:4 tensor on CUDA, by cuSPARSELt: which matrices it takes, and how it is built.

cuSPARSELt multiplies by a 2:4 matrix on the tensor cores of Ampere and later. Float32 is left out:
its products would be rounded to TF32.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .errors import one_line


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch's kernels don't take a matrix on `device`; None where they may."""
    if device.type != "cuda":
        return f"torch's 2:4 kernels run on CUDA, not on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no 2:4 tensor cores"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype}: torch's 2:4 kernels compute in float16 and bfloat16"
    if not torch.backends.cusparselt.is_available():
        return "this torch comes without cuSPARSELt"
    return None


def build(dense: Tensor) -> tuple[Tensor | None, str]:
    """Torch's 2:4 tensor of a 2:4 matrix (out, in) on CUDA and "cusparselt"; or None and the
    reason. It is only handed out if it gives the same matrix back, bit by bit, because it will be
    the one copy in memory."""
    try:  # libraries and drivers raise exceptions of all classes, and none must end a run
        with warnings.catch_warnings():  # torch calls the class a prototype, once
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.sparse.to_sparse_semi_structured(dense.detach())
        same = torch.equal(tensor.to_dense(), dense)
    except Exception as error:
        return None, f"cusparselt: {one_line(error)}"
    return (tensor, "cusparselt") if same else (None, "cusparselt: its results are wrong here")
