"""An estimate of a run's memory, made before it begins.

The weights are in memory all the time, the steps one after another, so the largest step counts.
Each step states its bytes beside its code (see lib/model/shapes.py). The estimate is above the peak
by a quarter at most. A run that can't fit is refused, instead of failing after hours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch

from lib.eval import evaluation_bytes
from lib.methods.registry import MethodSpec
from lib.model.shapes import PackedLinears, StepBytes, Workload
from lib.prune import pruning_bytes
from lib.pruning.by_error import allocation_bytes
from lib.pruning.neurons import Removal, neuron_pruning_bytes
from lib.recover import recovery_bytes
from lib.sparse import packing_bytes, unpacking_bytes
from lib.util.errors import UserError
from lib.util.host import available, gib

LATER = 2**26  # bytes of code and of the heap's gaps that come after the estimate
SPARE = 0.9  # share of a GPU's free memory that is planned with; the rest is lost in gaps
MARGIN = 1.15  # on the work of a step, for temporaries inside operations
BITS = {"4": 4.5, "8": 8.1}  # for each weight, scales included


@dataclass(frozen=True)
class Training:
    """The settings of the recovery that its memory depends on."""

    rank: int | None
    batch_size: int
    checkpointed: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything about a run that its memory depends on."""

    load: Workload
    method_spec: MethodSpec | None
    removal: Removal | None = None  # of whole neurons, in place of weights
    rounding: MethodSpec | None = None  # of kept weights, before they are packed
    load_bit: str | None = None
    stored: torch.dtype | None = None  # dtype of the weight files, if they are cast on reading
    on_disk: bool = False  # blocks stay on disk
    fetched: bool = False  # blocks come to the device one at a time
    training: Training | None = None
    processes: int = 1  # on this machine
    shared: bool = False  # they map the same files of blocks
    packed: PackedLinears | None = None  # as the weight files are
    pack_bits: int | None = None  # bits of the packed linears, if the run packs them
    probed: int = 0  # windows that --allocation error looks at, in this process
    cache_inputs: bool = True  # of the linears of a block; saves passes through it
    teacher: int = 0  # weights of the model of --teacher
    teacher_read: int = 0  # the same before the rows are dropped that the model's vocabulary lacks
    compared: int = 0  # bytes of the dense model's hidden states, which stay on the host

    def blocks(self, size: int) -> int:
        """Return the bytes of all blocks, with weights of `size` bytes."""
        if self.packed is None:
            return self.load.shapes.in_blocks * size
        return (self.load.shapes.in_blocks - self.packed.weights) * size + self.packed.nbytes(size)

    @property
    def in_files(self) -> int:
        """Bytes of host memory for the files of fetched blocks.

        Where processes share a CPU, the weights outside the blocks are in such files too.
        """
        if not self.fetched:
            return 0
        outside = self.shared and self.load.device == "cpu"
        size = 0 if self.on_disk else self.blocks(self.load.saved.itemsize)
        return size + (self.load.shapes.outside * self.load.working.itemsize if outside else 0)


@dataclass(frozen=True)
class Need:
    """Bytes at the peak: weights, hidden states, and the work of the largest step."""

    weights: int
    hidden: int
    work: int
    loading: int = 0

    @property
    def total(self) -> int:
        return self.weights + max(self.hidden + self.work, self.loading)

    def describe(self, base: int = 0) -> str:
        """Describe the sum and its parts to the user; `base` are the libraries' bytes."""
        parts = {"weights": self.weights, "hidden states": self.hidden, "work": self.work}
        if self.loading > self.hidden + self.work:
            parts = {"weights": self.weights, "reading them": self.loading}
        listed = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
        start = f"libraries {gib(base)}, " if base else ""
        return f"about {gib(base + self.total)} ({start}{listed})"


def needed(plan: Plan) -> Need:
    """Return the bytes of a run whose weights, states and work are in the same memory."""
    compared = plan.compared if plan.load.device == "cpu" else 0
    loading = 0
    if plan.stored and not plan.fetched:  # files are mapped beside the cast weights
        outside = plan.load.shapes.outside * plan.stored.itemsize
        loading = plan.blocks(plan.stored.itemsize) + outside
    needs = []
    for step, (hidden, work) in steps(plan).items():
        weights = weight_bytes(plan, removed=step == "recovery")
        needs.append(Need(weights, hidden + compared, int(MARGIN * work), loading))
    return max(needs, key=lambda need: need.total)


def steps(plan: Plan) -> dict[str, StepBytes]:
    """Return the bytes of each step of the run, besides the weights."""
    load, training = plan.load, plan.training
    free_copies = load.device == "cpu" and not plan.on_disk and load.saved == load.working
    step_bytes = {
        "evaluation": evaluation_bytes(load, plan.fetched and not free_copies, plan.compared > 0)
    }
    if plan.teacher:
        dropped = (plan.teacher_read - plan.teacher) * load.working.itemsize
        step_bytes["reading the teacher"] = StepBytes(0, dropped)
    if plan.removal:
        step_bytes["pruning"] = neuron_pruning_bytes(load, plan.method_spec, plan.removal)
    elif plan.method_spec:
        step_bytes["pruning"] = pruning_bytes(load, plan.method_spec, plan.cache_inputs)
    if plan.rounding:
        step_bytes["rounding"] = pruning_bytes(load, plan.rounding, plan.cache_inputs)
    if plan.probed:
        step_bytes["allocation"] = allocation_bytes(load, plan.probed)
    if training:
        step_bytes["recovery"] = recovery_bytes(
            load=replace(load, shapes=plan.removal.shapes) if plan.removal else load,
            rank=training.rank,
            batch_size=training.batch_size,
            checkpointed=training.checkpointed,
            on_grid=bool(plan.pack_bits and plan.pack_bits < 16),
        )
    if plan.pack_bits:
        step_bytes["packing"] = packing_bytes(load, plan.pack_bits)
    if plan.pack_bits or plan.packed:
        hidden, work = step_bytes["evaluation"]
        unpacked = load.activations() + unpacking_bytes(load)
        step_bytes["evaluation"] = StepBytes(hidden, max(work, unpacked))
    return step_bytes


def weight_bytes(plan: Plan, removed: bool = False) -> int:
    """Return the bytes of the weights that are on the device at a time.

    `removed`: once whole neurons are gone, if the run removes any.
    """
    shapes, size = plan.load.shapes, plan.load.working.itemsize
    inside = plan.blocks(size)
    if removed and plan.removal:
        inside = plan.removal.shapes.in_blocks * size
    if plan.load_bit:
        inside = int(shapes.in_blocks * BITS[plan.load_bit] / 8)
    if plan.fetched:  # a GPU receives the next block while the current one computes
        largest = max(block.weights for block in shapes.blocks)
        inside = largest * size * (2 if plan.load.device == "cuda" else 1)
    inside += plan.teacher * size
    if plan.training and not plan.teacher:  # the teacher is a copy of the dense blocks
        inside += shapes.in_blocks * size
    mapped = plan.shared and plan.fetched and plan.load.device == "cpu"
    return inside + (0 if mapped else shapes.outside * size)


@dataclass(frozen=True)
class MemoryLayout:
    """The bytes that a process needs on its GPU, if it has one, and on the host."""

    plan: Plan
    device: Need
    host: Need
    states_on_device: bool = True

    @property
    def machine(self) -> int:
        """Bytes of host memory of all processes of this machine, without the libraries."""
        processes = self.plan.processes
        copies = 1 if self.plan.shared else processes
        return processes * self.host.total + copies * self.plan.in_files

    def describe_host(self, base: int) -> str:
        """Describe the host's need to the user; `base` are the libraries' bytes."""
        plan, host = self.plan, self.host
        if not plan.shared:
            host = replace(host, weights=host.weights + plan.in_files)
        line = host.describe(base)
        if plan.processes > 1:
            line += f" for each of {plan.processes} processes"
            if plan.shared and plan.in_files:
                line += f", and once for all weights {gib(plan.in_files)}"
        return line


def lay_out(plan: Plan, free: int = 0) -> MemoryLayout:
    """Lay out a run on a CPU, or on a GPU with `free` bytes.

    Blocks that do not fit on a GPU are fetched from the host one at a time.
    """
    if plan.load.device == "cpu":
        plan = replace(plan, fetched=plan.on_disk or plan.shared)
        return MemoryLayout(plan, Need(0, 0, 0), needed(plan))
    plan = replace(plan, fetched=plan.on_disk or plan.fetched)
    need = needed(plan)
    if not (plan.fetched or plan.load_bit or plan.training) and need.weights + need.work > free:
        plan = replace(plan, fetched=True)
        need = needed(plan)
    if need.total > free:
        plan = replace(plan, cache_inputs=False)
        need = needed(plan)
    fits = need.weights + need.hidden + need.work <= free
    device = Need(need.weights, need.hidden if fits else 0, need.work)
    host = plan.compared + (0 if fits else _pinned(need.hidden))
    if plan.fetched:  # the buffers through which blocks are copied
        largest = max(block.weights for block in plan.load.shapes.blocks)
        host += 2 * _pinned(largest * plan.load.working.itemsize)
    return MemoryLayout(plan, device, Need(0, host, 0), fits)


def _pinned(size: int) -> int:
    """Return the bytes that torch takes to pin `size` bytes of host memory: a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


@dataclass(frozen=True)
class MemoryDecision:
    """Whether blocks are fetched, where hidden states are kept, and the line for the user."""

    fetched: bool
    state_device: torch.device
    line: str
    checkpointed: bool = False  # activations are computed again in training
    cache_inputs: bool = True  # of the linears of a block; saves passes through it


def check_memory(
    plan: Plan, device: torch.device, any_of: Callable[[bool], bool] = lambda fetched: fetched
) -> MemoryDecision:
    """Decide where blocks and hidden states are kept.

    `any_of` returns whether any process fetches blocks: then all do. Raises UserError if there is
    not enough memory.
    """
    gpu = device.type == "cuda"
    free = int(SPARE * free_on(device)) if gpu else available()
    if plan.training and needed(plan).total > (free if gpu else free // plan.processes):
        plan = replace(plan, training=replace(plan.training, checkpointed=True))
    layout = lay_out(plan, free)
    if not gpu and layout.machine > free:
        layout = lay_out(replace(plan, cache_inputs=False))
    if gpu and any_of(layout.plan.fetched) and not layout.plan.fetched:
        layout = lay_out(replace(plan, fetched=True), free)
    if layout.device.total > free:
        way = f", {_less(plan.training)}" if plan.training else ""
        raise UserError(
            f"--device {device}: the run needs {layout.device.describe()}, but only {gib(free)} "
            f"are free; try a smaller --batch_size or --seqlen{way}, or --device cpu"
        )
    host = _check_host(layout)
    return MemoryDecision(
        fetched=layout.plan.fetched,
        state_device=device if layout.states_on_device else torch.device("cpu"),
        line=f"memory: device {layout.device.describe()}; host {host}"
        if gpu
        else f"memory: {host}",
        checkpointed=bool(plan.training and plan.training.checkpointed),
        cache_inputs=layout.plan.cache_inputs,
    )


def free_on(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a GPU, torch's cache included."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _less(training: Training) -> str:
    """Name a flag with which the recovery takes less memory."""
    if training.rank:
        return "a smaller --recover_rank"
    return "--recover_rank 16, which trains fewer numbers"


def _check_host(layout: MemoryLayout) -> str:
    """Return the line on host memory. Raises UserError if there is not enough."""
    plan, free = layout.plan, available()
    line = layout.describe_host(psutil.Process().memory_info().rss + LATER)
    if layout.machine > free:
        way = "" if plan.on_disk else ", or --offload FOLDER"
        way = f", or {_less(plan.training)}" if plan.training else way
        raise UserError(
            f"--model: the run needs {line} of host memory, of which {gib(free)} are still free; "
            f"try a smaller --nsamples, --seqlen or --batch_size{way}"
        )
    return line
