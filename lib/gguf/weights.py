"""Proves that a file of llama-quantize holds the weights of the 16-bit file that it was made of.

Both are read in a child process (see child.py) by llama.cpp's Python reader, which dequantises by
code of its own. Each tensor may differ by the error of its type, no more. Then the 16-bit file gets
the dequantised weights, so that llama.cpp can run them without its kernels for that type.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.gguf.child import ChildError, import_from, run_child, serve
from lib.util.errors import UserError

BITS = re.compile(r"I?Q(\d)")  # in the name of a tensor's type
EXACT = 0.005  # error of tensors that stay in 16 or 32 bits
LARGEST = 0.7  # of 2-bit types; zeros in place of weights are 1, other weights about 1.4


@dataclass(frozen=True)
class Weights:
    """How many tensors have which type, and the largest relative error of a quantised one."""

    types: dict[str, int]
    largest_error: float

    def line(self) -> str:
        kinds = ", ".join(f"{count} {name.lower()}" for name, count in self.types.items())
        return f"tensors: {kinds}; rounding moves one by {self.largest_error:.2g} at most"


def prove_weights(file: Path, before: Path, llama: str | None) -> Weights:
    """Compare `file` with the 16-bit file `before`, which gets the weights of `file`.

    Raises UserError at a tensor that differs by more than its type can explain.
    """
    request = {"file": str(file), "before": str(before), "llama": llama}
    try:
        return Weights(**run_child("lib.gguf.weights", request))
    except ChildError as error:
        raise UserError(f"llama-quantize: {error}") from error


def error_limit(type_name: str) -> float:
    """Return the largest relative error of a tensor, about four times what the type makes.

    With b bits that is about 1 / 2^b for normally distributed weights.
    """
    bits = BITS.match(type_name)
    return min(LARGEST, 4 / 2 ** int(bits[1])) if bits else EXACT


def work(request: dict[str, Any]) -> dict[str, Any]:
    import_from(request["llama"])
    import numpy as np
    from gguf import GGUFReader, quants

    exact = {tensor.name: tensor for tensor in GGUFReader(request["before"], "r+").tensors}
    tensors = GGUFReader(request["file"]).tensors
    if exact.keys() != {tensor.name for tensor in tensors}:
        raise ValueError("its file has other tensors than the one it was made of")
    types, largest = Counter(), 0.0
    for tensor in tensors:
        before, name = exact[tensor.name], tensor.tensor_type.name
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        original = quants.dequantize(before.data, before.tensor_type)
        if values.shape != original.shape:
            raise ValueError(f"{tensor.name} has another shape than in 16 bits")
        scale = float(np.linalg.norm(original)) or 1.0
        error = float(np.linalg.norm(values - original)) / scale
        if not error <= error_limit(name):
            raise ValueError(f"{tensor.name} differs by {error:.2g}, more than {name} can explain")
        before.data[...] = quants.quantize(values, before.tensor_type).reshape(before.data.shape)
        types[name] += 1
        largest = max(largest, error)
    return {"types": dict(types.most_common()), "largest_error": largest}


if __name__ == "__main__":
    serve(work)
