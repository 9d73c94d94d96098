"""Replace the linear layers of a pruned model by packed ones, which save and load packed.

lib/packed/formats.py describes the stored form, lib/packed/linear.py the module. On
CUDA it uses torch's 2:4 kernels (`to_sparse_semi_structured`) if torch accepts the weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .model.blocks import BlockRunner
from .model.linears import find_linears
from .model.reference import some_logits
from .model.saving import footprint
from .packed import kernels
from .packed.checkpoint import mark_packed_, pack_embeddings_
from .packed.errors import PackedError
from .packed.formats import PACKED, Values
from .packed.linear import FORWARDS, OWN_FORWARD, SparseLinear, multiplying, why_dense
from .stages.quantize import NOTHING_PACKED
from .util.errors import UserError
from .util.host import gib


def check_packable(skeleton: PreTrainedModel, blocks_name: str) -> None:
    """Raise UserError if no linear layer of the blocks, with or without weights, has a class that
    can be packed."""
    modules = skeleton.get_submodule(blocks_name).modules()
    classes = {type(module) for module in modules if isinstance(module, nn.Linear | Conv1D)}
    if not any(cls.forward in FORWARDS for cls in classes):
        names = " and ".join(sorted(cls.__name__ for cls in classes)) or "none"
        none = f"no linear layer of {type(skeleton).__name__} can be packed"
        problem = f"{none}: their class ({names}) {OWN_FORWARD}"
        raise UserError("--replace_sparse_layers", problem, "Leave the flag out")


@torch.no_grad()
def pack_(
    runner: BlockRunner,
    fmt: Values,
    window: Tensor,
    scales: Mapping[str, Tensor] | None = None,
    unrounded: Tensor | None = None,
) -> dict[str, Any]:
    """Pack every sparse linear layer in place, and compare outputs on a window (1, tokens).

    The model then saves itself packed. Layers with too few zeros to become smaller stay dense, and
    a line reports them. At 4 bits, embedding and output head become int8 if they can be packed.
    `scales`: those of weights that are already on the grid of `fmt`, by the weights' names;
    `unrounded`: the logits before quantization, with which the record compares the packed model.
    Returns the records `packed` and, if it applies, `packed_embeddings`.

    Raises UserError if no layer becomes smaller, a packed matrix differs from its weight, or
    outputs differ by more than rounding. After an error some layers may be packed: do not save the
    model.
    """
    model, window = runner.model, window.to(runner.device)

    def logits() -> list[Tensor]:
        """Logits of the whole window, and of its start computed as in decoding."""
        whole = some_logits(model, window)
        with multiplying(model, "decoding"):
            return [whole, some_logits(model, window[:, : whole.shape[1]])]

    before, size = logits(), footprint(model)
    paths = swap_linears_(runner, fmt, scales)
    runner.dist.barrier()  # all ranks have packed
    after, reference = logits(), before
    record = _record(runner)
    if record["bits"] < 16:  # compare with the dense outputs of the quantized weights
        with multiplying(model, "dense"):
            reference = logits()
    for dense, packed in zip(reference, after, strict=True):
        check_same_outputs(dense, packed)
    unrounded = before[-1] if unrounded is None else unrounded
    record["difference"] = relative_difference(unrounded, after[-1])
    bits = "" if record["bits"] == 16 else f" at {record['bits']} bits"
    counts = ", ".join(f"{n} {path}" for path, n in Counter(paths.values()).most_common())
    lines = [f"packed linear layers{bits}: {counts}", _line("linear layers", record)]
    figures = {"packed": record}
    if fmt.bits == 4:
        try:
            figures["packed_embeddings"] = embeddings = _pack_embeddings_(runner, window)
            lines.append(_line(" and ".join(embeddings["modules"]), embeddings))
        except PackedError as error:
            lines.append(f"embedding and output head stay unchanged: {error}")
    if runner.dist.is_main:
        lines.append(f"footprint: {gib(size)} dense, {gib(footprint(model))} packed")
        print(*lines, sep="\n")
    return figures


def swap_linears_(
    runner: BlockRunner, fmt: Values = PACKED[16], scales: Mapping[str, Tensor] | None = None
) -> dict[str, str]:
    """Replace every sparse linear layer of the blocks by a `SparseLinear`; {its name: how it runs}.

    Arguments and errors as in `pack_`.
    """
    paths: dict[str, str] = {}
    for index, block in enumerate(runner.blocks):
        with runner.on_device(index, write_back=True):
            name = f"{runner.name}.{index}"
            for path, module in list(block.named_modules()):
                if isinstance(module, nn.Linear | Conv1D):
                    linear = f"{name}.{path}"
                    if why := why_dense(module):
                        paths[linear] = f"left dense ({why})"
                        continue
                    packed = _packed(linear, module, fmt, (scales or {}).get(f"{linear}.weight"))
                    block.set_submodule(path, packed)
                    paths[linear] = _path(packed, runner.device)
            experts = (one for one in find_linears(block, name)[0] if one.expert is not None)
            paths |= {one.name: "left dense (experts in one tensor)" for one in experts}
    if all("left dense" in path for path in paths.values()):
        raise UserError(*NOTHING_PACKED)
    mark_packed_(runner.model)
    return paths


def relative_difference(before: Tensor, after: Tensor) -> float:
    """Return |after - before| / |before| for the same logits or hidden states of two models."""
    assert before.shape == after.shape
    reference = before.double()
    difference = after - reference  # in float64, without copies of large logits
    return float(difference.norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny))


def check_same_outputs(
    before: Tensor,
    after: Tensor,
    flag: str = "--replace_sparse_layers",
    which: str = "packed and dense",
    least: float = 1e-4,
) -> float:
    """Return the relative difference of the outputs of a model before and after a change.

    Raises UserError naming `flag` and `which` outputs if it exceeds rounding: both 8 epsilons of
    the dtype and `least`.
    """
    ratio = relative_difference(before, after)
    limit = max(8 * torch.finfo(before.dtype).eps, least)
    if not ratio <= limit:
        problem = f"{which} outputs differ by {ratio:.2g} (rounding explains {limit:.2g})"
        raise UserError(flag, problem, "Run without the flag")
    return ratio


def _record(runner: BlockRunner) -> dict[str, Any]:
    """Return the saved sizes of a model's packed linear layers, packed and dense."""
    linears = [module for module in runner.model.modules() if isinstance(module, SparseLinear)]
    itemsize = (runner.save_dtype or runner.model.dtype).itemsize
    return {
        "bits": linears[0].fmt.bits,
        "linears": len(linears),
        "bytes": sum(
            m.fmt.nbytes(m.out_features, m.in_features, m.nnz, itemsize=itemsize) for m in linears
        ),
        "dense_bytes": sum(m.out_features * m.in_features * itemsize for m in linears),
    }


def _pack_embeddings_(runner: BlockRunner, window: Tensor) -> dict[str, Any]:
    """Quantize embedding and output head to int8 in place; return their record."""
    model = runner.model
    before = some_logits(model, window)
    modules = pack_embeddings_(model)
    mark_packed_(model)
    with multiplying(model, "decoding"):
        after = some_logits(model, window)
    with multiplying(model, "dense"):
        check_same_outputs(some_logits(model, window), after)
    itemsize = (runner.save_dtype or model.dtype).itemsize
    untied = [one for one in map(model.get_submodule, modules) if not one.tied]
    return {
        "bits": 8,
        "modules": modules,
        "bytes": sum(module.weight.nbytes + module.scale.nbytes for module in untied),
        "dense_bytes": sum(module.weight.numel() * itemsize for module in untied),
        "difference": relative_difference(before, after),
    }


def _line(what: str, record: Mapping[str, Any]) -> str:
    size, share = gib(record["bytes"]), record["bytes"] / record["dense_bytes"]
    line = f"packed {what} as saved: {size}, {share:.3f} of their dense size"
    if record["bits"] < 16:
        line += f"; {record['bits']} bits change the logits by {record['difference']:.2%}"
    return line


def _path(packed: SparseLinear, device: torch.device) -> str:
    """Return how a packed linear layer multiplies on its device."""
    if device.type == "cpu":
        by_kernels = packed.dtype in kernels.DTYPES and kernels.ready()
        return "by the kernels for packed weights" if by_kernels else "unpacked at each forward"
    if packed.semi_structure_():
        return "by torch's 2:4 kernels"
    return f"unpacked at each forward ({packed.refused})"


def _packed(name: str, linear: nn.Module, fmt: Values, scales: Tensor | None) -> SparseLinear:
    """Pack a linear layer. Raises UserError if the packed values are not its weight rounded to the
    grid or, with `scales`, exactly its weight."""
    try:
        sparse = SparseLinear.from_linear(linear, fmt, scales)
    except PackedError as error:
        problem = f"{name}: {error}"
        raise UserError(f"--quantize {fmt.name}", problem, "Run without the flag") from None
    if fmt.stored:
        weight = (linear.weight.T if isinstance(linear, Conv1D) else linear.weight).float()
        expected = fmt.round_to(weight, sparse.scale) if scales is None else weight
        if not torch.equal(sparse.dense(torch.float32), expected):
            problem = f"{name} differs once it is packed"
            raise UserError(f"--quantize {fmt.name}", problem, "Run without the flag")
    return sparse
