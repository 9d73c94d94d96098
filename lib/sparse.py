"""Swaps the linears of a pruned model for packed ones, which save and load packed.

What is stored is described in lib/packed/formats.py, the module in lib/packed/linear.py: on CUDA it
multiplies by torch's 2:4 kernels (`to_sparse_semi_structured`) where torch takes the weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .eval import some_logits
from .model.blocks import BlockRunner
from .model.linears import find_linears
from .model.pretrained import footprint
from .packed import kernels
from .packed.checkpoint import mark_packed_, pack_embeddings_
from .packed.errors import PackedError
from .packed.formats import PACKED, Int4, Values
from .packed.linear import FORWARDS, OWN_FORWARD, SparseLinear, multiplying, why_dense
from .quantize import NOTHING
from .util.errors import UserError
from .util.host import gib


def check_packable(skeleton: PreTrainedModel, blocks_name: str) -> None:
    """Raise UserError if no linear of the blocks of a model, which may be on the meta device, is of
    a class that can be packed."""
    modules = skeleton.get_submodule(blocks_name).modules()
    classes = {type(module) for module in modules if isinstance(module, nn.Linear | Conv1D)}
    if not any(cls.forward in FORWARDS for cls in classes):
        names = " and ".join(sorted(cls.__name__ for cls in classes)) or "none"
        raise UserError(
            f"--replace_sparse_layers: no linear of {type(skeleton).__name__} can be packed, "
            f"their class ({names}) {OWN_FORWARD}; remove the flag"
        )


@torch.no_grad()
def pack_(
    runner: BlockRunner,
    fmt: Values,
    window: Tensor,
    scales: Mapping[str, Tensor] | None = None,
    unrounded: Tensor | None = None,
) -> dict[str, Any]:
    """Pack every sparse linear in place, and check on a window (1, tokens) that outputs are equal.

    The model then saves itself packed. Linears with too few zeros to become smaller stay dense, and
    a line says so. At 4 bits embedding and output head become int8 where they can be packed.
    `scales` has those of weights that are on the grid of `fmt` already, by the weights' names;
    `unrounded` are the logits before they were: with them the packed model is compared in the
    record. Returns the records `packed` and, where it applies, `packed_embeddings`.

    Raises UserError if no linear becomes smaller, a matrix is not what was packed, or outputs
    differ by more than rounding. After an error some of the linears may be packed: the model is not
    to be saved.
    """
    model, window = runner.model, window.to(runner.device)

    def logits() -> list[Tensor]:
        """Of the whole window, and of its start computed as in decoding."""
        whole = some_logits(model, window)
        with multiplying(model, "decoding"):
            return [whole, some_logits(model, window[:, : whole.shape[1]])]

    before, size = logits(), footprint(model)
    paths = swap_linears_(runner, fmt, scales)
    runner.dist.barrier()  # all are packed
    after, reference = logits(), before
    record = _record(runner)
    if record["bits"] < 16:  # rounded to integers it is another model, whose dense outputs count
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
            lines.append(f"embedding and output head stay as they are: {error}")
    if runner.dist.is_main:
        lines.append(f"footprint: {gib(size)} dense, {gib(footprint(model))} packed")
        print(*lines, sep="\n")
    return figures


def swap_linears_(
    runner: BlockRunner, fmt: Values = PACKED[16], scales: Mapping[str, Tensor] | None = None
) -> dict[str, str]:
    """Replace every sparse linear of the blocks by a `SparseLinear`; {linear's name: how it runs}.

    Arguments and errors as those of `pack_`.
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
        raise UserError(NOTHING)
    mark_packed_(runner.model)
    return paths


def relative_difference(before: Tensor, after: Tensor) -> float:
    """Return |after - before| / |before| for the same logits or hidden states of two models."""
    assert before.shape == after.shape
    reference, difference = before.double(), (after.double() - before.double())
    return float(difference.norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny))


def check_same_outputs(
    before: Tensor,
    after: Tensor,
    what: str = "--replace_sparse_layers: packed and dense",
    least: float = 1e-4,
) -> float:
    """Return the relative difference of the outputs of a model before and after a change.

    Raises UserError, beginning with `what`, if it is beyond rounding: over eight roundings of the
    dtype, or over `least`.
    """
    ratio = relative_difference(before, after)
    limit = max(8 * torch.finfo(before.dtype).eps, least)
    if not ratio <= limit:
        raise UserError(
            f"{what} outputs differ by {ratio:.2g} (rounding explains {limit:.2g}); run without "
            "the flag"
        )
    return ratio


def _record(runner: BlockRunner) -> dict[str, Any]:
    """Sizes of a model's packed linear layers, and of the same layers dense, as they are saved."""
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
    """Round embedding and output head to int8 in place; return the record of that."""
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
    """How a packed linear on its device multiplies there."""
    if device.type == "cpu":
        by_kernels = packed.dtype in kernels.DTYPES and kernels.ready()
        return "by the kernels for packed weights" if by_kernels else "unpacked at each forward"
    if packed.semi_structure_():
        return "by torch's 2:4 kernels"
    return f"unpacked at each forward ({packed.refused})"


def _packed(name: str, linear: nn.Module, fmt: Values, scales: Tensor | None) -> SparseLinear:
    """Pack a linear. Raises UserError if what is packed is not its weight on the grid nearest to
    it, or its very weight where its scales are given."""
    try:
        sparse = SparseLinear.from_linear(linear, fmt, scales)
    except PackedError as error:
        raise UserError(f"--quantize {fmt.name}: {name}: {error}") from None
    if isinstance(fmt, Int4):
        weight = (linear.weight.T if isinstance(linear, Conv1D) else linear.weight).float()
        expected = fmt.round_to(weight, sparse.scale) if scales is None else weight
        if not torch.equal(sparse.dense(torch.float32), expected):
            flag = f"--quantize {fmt.name}"
            raise UserError(f"{flag}: {name} is not what was packed; run without the flag")
    return sparse
