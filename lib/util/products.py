"""Products of float32 matrices on a CPU: in float32, or from operands rounded to bfloat16.

    with bfloat16_products():  # a model's passes, several times as fast where has_bfloat16()
        ...
        with exact_products():  # statistics and solvers, inside or outside of the first
            ...

Operands are rounded to 8 bits of mantissa inside the product, which adds up in float32 and gives
float32: parameters, activations and gradients stay float32. The setting is the whole process's.
Torch is imported when it is needed, for `--help` to answer at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def has_bfloat16() -> bool:
    """Whether the processor has bfloat16 products, and torch rounds float32 operands for them.

    Without AMX torch may leave such operands as they are: nothing would be gained.
    """
    import torch

    able = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    if not (able.get("amx_bf16") or able.get("avx512_bf16")):
        return False
    tried = torch.linspace(-1, 1, 2**16).view(256, 256)
    exact = tried @ tried
    with bfloat16_products():
        return not torch.allclose(tried @ tried, exact, rtol=1e-5, atol=1e-2)


@contextmanager
def _products(precision: str) -> Iterator[None]:
    import torch

    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before


def bfloat16_products():
    """Inside, products on a CPU round their float32 operands to bfloat16."""
    return _products("bf16")


def exact_products():
    """Inside, products on a CPU are of float32; also a decorator."""
    return _products("ieee")
