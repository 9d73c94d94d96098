"""The device of a run, the dtypes for it, and the batch size that keeps it busy."""

from __future__ import annotations

import os

import torch

from ..util.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 8192  # per forward pass, roughly
NARROW = 4096  # below this width that many tokens do not keep a GPU busy


def pick_device(name: str | None) -> torch.device:
    """Return the device of `--device`, by default the first GPU if there is one, else the CPU.

    Raises UserError if this machine does not have it.
    """
    if name is None:
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}", "the device is unknown", "Use cuda:0 or cpu") from None
    if device.type == "cpu":
        return device
    if device.type == "mps":
        raise UserError(f"--device {name}", "it lacks float64, which sums need", "Use --device cpu")
    here, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    if here is None or here.type != device.type or (device.index or 0) >= count:
        problem = f"no such device was found (accelerators: {count})"
        raise UserError(f"--device {name}", problem, "Use --device cpu")
    return torch.device(device.type, device.index or 0)


def set_current_device(device: torch.device) -> None:
    """Make `device` the default for calls without a device, and float32 products on it exact."""
    if device.type != "cpu":
        # read when cuBLAS starts: without it sums in products may have another order each time
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.fp32_precision = "ieee"  # an environment may ask for TF32
        torch.accelerator.set_device_index(device.index)


def default_batch_size(device: torch.device, seqlen: int, width: int) -> int:
    """Return the windows per forward pass that keep the device busy with moderate memory."""
    tokens = BATCH_TOKENS
    if device.type != "cpu":
        tokens = GPU_BATCH_TOKENS * max(1, NARROW / width)  # as many activations as at that width
    return max(1, int(tokens) // seqlen)


def checkpoint_dtype(config) -> torch.dtype:
    """Return the dtype that the checkpoint's config names; float32 if it names none."""
    return config.dtype or config.get_text_config(decoder=True).dtype or torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, `float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def pick_dtype(name: str, config, device: torch.device) -> torch.dtype:
    """Return the compute dtype.

    `auto` is the checkpoint's if the device supports it natively, else float32. A GPU may only
    emulate bfloat16; a CPU supports only bfloat16, with AMX or AVX-512 instructions.
    """
    if name != "auto":
        return DTYPES[name]
    dtype, fast = checkpoint_dtype(config), True
    if device.type == "cpu":
        able = getattr(torch.cpu, "get_capabilities", dict)()  # missing in the oldest torch
        fast = dtype == torch.bfloat16 and (able.get("amx_bf16") or able.get("avx512_bf16"))
    elif device.type == "cuda" and dtype == torch.bfloat16:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype if fast else torch.float32


def saved_dtype(name: str, config, fake_quantizes: bool = False) -> torch.dtype:
    """Return the dtype in which a changed model is saved; `auto` is the checkpoint's.

    `fake_quantizes`: bfloat16 instead of float32.
    """
    dtype = checkpoint_dtype(config) if name == "auto" else DTYPES[name]
    return torch.bfloat16 if fake_quantizes and dtype == torch.float32 else dtype
