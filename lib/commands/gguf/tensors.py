"""Proves that a GGUF file holds the checkpoint's weights, in a child process (see child.py).

A request names the `file`, the file `exact` that the converter wrote in 32 bits, and the folder
`weights` of the checkpoint. llama.cpp's Python reader reads both files. Every row of embedding and
head in `exact` must be the checkpoint's, every tensor of `file` must be that of `exact` as the
tensor's type rounds it, to the last bit, and all fields but the type must be the same. That `exact`
means the same model as the folder is proven by running it (predictions.py).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lib.commands.gguf.child import ChildError, run_child, serve
from lib.util.errors import UserError

BY_TYPE = {"general.file_type", "general.quantization_version"}
OUTER = ("token_embd.weight", "output.weight")


def prove_tensors(file: Path, exact: Path, weights: Path) -> dict[str, dict[str, int]]:
    """Compare all tensors and fields; raises UserError at the first that differs.

    Returns how many tensors have which type (`types`), how many `rows` of embedding and head are
    the checkpoint's, how many values of each tensor its type has rounded (`changed`), and how many
    these are, and of how many values, in all tensors of q4_0 (`q4_0`).
    """
    request = {"file": str(file), "exact": str(exact), "weights": str(weights)}
    try:
        return run_child("lib.commands.gguf.tensors", request)
    except ChildError as error:
        raise UserError(str(error)) from error


def work(request: dict[str, Any]) -> dict[str, Any]:
    from gguf import GGUFReader

    exact = file = GGUFReader(request["exact"])
    if request["file"] != request["exact"]:
        file = GGUFReader(request["file"])
    _compare_fields(file, exact)
    changed = changed_values(file, exact)
    types = Counter(tensor.tensor_type.name for tensor in file.tensors)
    sizes = {each.name: int(each.n_elements) for each in file.tensors if is_q4_0(each)}
    q4_0 = sum(changed[name] for name in sizes), sum(sizes.values())
    rows = _compare_rows(exact, Path(request["weights"]))
    return {"types": dict(types.most_common()), "rows": rows, "changed": changed, "q4_0": q4_0}


def is_q4_0(tensor: Any) -> bool:
    return tensor.tensor_type.name == "Q4_0"


def changed_values(file: Any, exact: Any) -> dict[str, int]:
    """Return how many values of each tensor in `file` differ from those in `exact`.

    Both are open GGUFReaders. Raises ValueError at a tensor whose bits are not what its type's
    quantiser makes of the values in `exact`.
    """
    import numpy as np
    from gguf import quants

    originals = {tensor.name: tensor for tensor in exact.tensors}
    if originals.keys() != {tensor.name for tensor in file.tensors}:
        raise ValueError("the file has other tensors than the one in f32")
    changed = {}
    for tensor in file.tensors:
        original, kind = originals[tensor.name], tensor.tensor_type
        values = quants.dequantize(original.data, original.tensor_type)
        expected = quants.quantize(values, kind)
        if expected.tobytes() != tensor.data.tobytes():
            raise ValueError(f"{tensor.name} is not the checkpoint's, rounded to {kind.name}")
        rounded = quants.dequantize(tensor.data, kind)
        changed[tensor.name] = int(np.count_nonzero(rounded != values))
    return changed


def _compare_fields(file: Any, exact: Any) -> None:
    fields = [
        {name: field.contents() for name, field in reader.fields.items() if name not in BY_TYPE}
        for reader in (file, exact)
    ]
    for name in fields[0].keys() | fields[1].keys():
        if fields[0].get(name) != fields[1].get(name):
            raise ValueError(f"the field {name} is not as in f32")


def _compare_rows(exact: Any, weights: Path) -> dict[str, int]:
    """Compare embedding and head with the checkpoint's; return how many rows each has.

    Rows past the vocabulary, which some converters leave out, are not compared.
    """
    import numpy as np
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from safetensors import safe_open

    architecture = exact.fields["general.architecture"].contents()
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, 0)
    tensors = {tensor.name: tensor for tensor in exact.tensors if tensor.name in OUTER}
    rows = {}
    for part in sorted(weights.glob("*.safetensors")):
        with safe_open(part, "pt") as checkpoint:
            for name in checkpoint.keys():
                plain = name.replace("language_model.", "")
                tensor = tensors.get(names.get_name(plain, try_suffixes=(".weight",)))
                if tensor is None:
                    continue
                own, values = checkpoint.get_tensor(name).float().numpy(), tensor.data
                count = min(len(own), len(values))
                differs = (own[:count] != values[:count]).any(-1)
                if differs.any():
                    row = int(np.argmax(differs))
                    raise ValueError(f"row {row} of {tensor.name} is not the checkpoint's")
                rows[tensor.name] = count
    return rows


if __name__ == "__main__":
    serve(work)
