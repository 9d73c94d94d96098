"""How much memory a run takes, told before it begins: from shapes and flags, within a quarter.

The model on the meta device gives the shapes of its blocks, the flags give the plan; together they
give the bytes of the worst moment, of calibration or of evaluation. Refuses what can't fit,
instead of dying after hours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import psutil
import torch
from torch import Tensor, nn

from lib.methods.registry import MethodSpec
from lib.model.blocks import HEAD_POSITIONS, LOGIT_BYTES
from lib.model.linears import find_linears, watch_inputs
from lib.model.matrix import PrunableLinear
from lib.packed.layout import LARGE_TILE, packed_bytes
from lib.util.errors import UserError
from lib.util.host import available, gib

LATER = 24 * 2**20  # bytes of code that is imported after the estimate
SPARE = 0.9  # share of a GPU's free memory that is planned with; the rest is lost in gaps
BITS = {"4": 4.5, "8": 8.1}  # for each weight, scales included
FLOAT = 4  # bytes
PACKING, UNPACKING = 4, 16  # bytes for each weight of a tile
GRAPH = 1.2  # what a block's activations take for the way back, of what they are on the way
META = torch.device("meta")
FAILURES = (RuntimeError, ValueError, TypeError, IndexError)  # of a forward pass without weights


@dataclass
class Inputs:
    """Linears that share an input: its width, and the outputs of each linear."""

    width: int
    outputs: list[int]
    experts: int = 0  # how many experts share the tokens that are routed


@dataclass
class BlockShape:
    """A decoder block: its weights, and the inputs of its linears."""

    weights: int
    inputs: list[Inputs]

    @property
    def pruned(self) -> int:
        """Weights of its linears."""
        return sum(each.width * sum(each.outputs) for each in self.inputs)


@dataclass
class Shapes:
    """The blocks that differ in shape, and how many weights there are, shared ones once."""

    blocks: list[BlockShape]
    in_blocks: int
    outside: int
    hidden: int
    vocabulary: int
    routed: int  # experts that each token goes to
    count: int  # of blocks
    edges: int  # rows and columns of all linears


def shapes(skeleton: nn.Module, blocks_name: str) -> Shapes:
    """Of a model on the meta device."""
    blocks = skeleton.get_submodule(blocks_name)
    inside = sum(parameter.numel() for parameter in blocks.parameters())
    whole = sum(parameter.numel() for parameter in skeleton.parameters())
    sharing = _sharing(skeleton, blocks)
    config = skeleton.config.get_text_config(decoder=True)
    kinds: dict[tuple, BlockShape] = {}
    linears = {}
    for block in blocks:
        for one in find_linears(block, "")[0]:
            linears[one.module, one.parameter, one.expert] = sum(one.shape)
        key = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        if key not in kinds:
            kinds[key] = BlockShape(sum(prod(shape) for _, shape in key), _inputs(block, sharing))
    return Shapes(
        list(kinds.values()),
        inside,
        whole - inside,
        config.hidden_size,
        config.vocab_size,
        getattr(config, "num_experts_per_tok", None) or 1,
        len(blocks),
        sum(linears.values()),
    )


@torch.no_grad()
def _sharing(skeleton: nn.Module, blocks: nn.ModuleList) -> dict[nn.Module, int]:
    """{module of a linear: which input it receives}, as far as tokens without values come."""
    linears = [one for block in blocks for one in find_linears(block, "")[0] if one.expert is None]
    inputs: list[Tensor] = []  # alive, so that none is taken for another
    received: dict[nn.Module, int] = {}

    def see(linear: PrunableLinear, x: Tensor) -> None:
        known = next((i for i, other in enumerate(inputs) if other is x), None)
        if known is None:
            inputs.append(x)
        received[linear.module] = len(inputs) - 1 if known is None else known

    with watch_inputs(linears, see):
        try:
            skeleton.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=META))
        except FAILURES:  # routing needs values: what was not reached counts by itself
            return received
    return received


def _inputs(block: nn.Module, sharing: dict[nn.Module, int]) -> list[Inputs]:
    """Of a block's linears; every expert's has statistics of its own."""
    linears, _ = find_linears(block, "")
    experts = Counter(one.stage for one in linears if one.expert is not None)
    found: dict[object, Inputs] = {}
    for linear in linears:
        rows, width = linear.shape
        key = sharing.get(linear.module, linear) if linear.expert is None else linear
        found.setdefault(key, Inputs(width, [], experts[linear.stage])).outputs.append(rows)
    return list(found.values())


@dataclass(frozen=True)
class PackedLinears:
    """Of a checkpoint that is packed: what its packed linears hold."""

    weights: int  # that they stand for
    kept: int
    bits: int  # of a kept value; 16: in the dtype of the model
    rest: int  # bytes of masks, scales and offsets

    @classmethod
    def of(cls, linears: Sequence[Sequence[int]], bits: int) -> PackedLinears | None:
        """Of (out, in, kept) of each linear; None where there are none."""
        if not linears:
            return None
        outs, widths, kept = zip(*linears, strict=True)
        rest = sum(packed_bytes(*size, nnz=0, bits=bits) for size in zip(outs, widths, strict=True))
        offsets = 8 * sum(out + 1 for out in outs)
        weights = sum(map(prod, zip(outs, widths, strict=True)))
        return cls(weights, sum(kept), bits, rest + offsets)

    def nbytes(self, size: int) -> int:
        """With values of `size` bytes, where they are not integers."""
        return self.rest + self.kept * (size * 8 if self.bits == 16 else self.bits) // 8


@dataclass(frozen=True)
class Training:
    """What of the recovery counts for memory."""

    rank: int | None
    batch_size: int
    beside: bool  # the teacher is a whole model of its own
    checkpointed: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run is going to do, as far as memory is concerned."""

    shapes: Shapes
    method_spec: MethodSpec | None
    windows: int  # of calibration, in this process
    tests: int  # windows of all test sets, in this process
    seqlen: int
    batch_size: int
    working: torch.dtype
    saved: torch.dtype
    load_bit: str | None = None
    stored: torch.dtype | None = None  # of the weight files, if these are cast on reading
    on_disk: bool = False  # blocks stay there
    fetched: bool = False  # blocks come to the device one at a time
    training: Training | None = None
    device: str = "cpu"  # kind of it
    processes: int = 1  # on this machine
    shared: bool = False  # they have one copy of blocks that are fetched
    packed: PackedLinears | None = None  # as the weight files are
    pack_bits: int | None = None  # packs what it has pruned, at so many bits
    probed: int = 0  # windows that go through the dense model and back, in this process
    keeps: bool = True  # inputs within a block, which saves passes through it
    compared: int = 0  # bytes of the dense model's hidden states, which stay on the host

    @property
    def once(self) -> int:
        """Bytes of host memory in which blocks that are fetched stand for all processes; on a CPU
        also what is outside the blocks."""
        if not self.fetched:
            return 0
        size = self.working.itemsize
        inside = 0 if self.on_disk else _inside(self, size)
        return inside + (self.shapes.outside * size if self.shared and self.device == "cpu" else 0)

    @property
    def follows(self) -> bool:
        """Whether the untouched model is taken along beside the pruned one."""
        return self.method_spec is not None and self.method_spec.cls.dense_stream

    @property
    def window(self) -> int:
        """Bytes of a window's hidden states."""
        return self.seqlen * self.shapes.hidden * self.working.itemsize


@dataclass(frozen=True)
class Need:
    """Bytes at the worst moment: of what is there all the time, and of what comes and goes."""

    weights: int
    hidden: int
    work: int
    loading: int = 0

    @property
    def total(self) -> int:
        return self.weights + max(self.hidden + self.work, self.loading)

    def told(self, base: int = 0) -> str:
        """For the user; `base` are the libraries' bytes."""
        named = {"weights": self.weights, "hidden states": self.hidden, "work": self.work}
        if self.loading > self.hidden + self.work:
            named = {"weights": self.weights, "reading them": self.loading}
        listed = ", ".join(f"{name} {gib(size)}" for name, size in named.items() if size)
        start = f"libraries {gib(base)}, " if base else ""
        return f"about {gib(base + self.total)} ({start}{listed})"


def needed(plan: Plan) -> Need:
    """Where everything stands in the same memory; `check_memory` splits it over two."""
    moments = _calibration(plan), _evaluation(plan), _recovery(plan), (0, _packing(plan))
    hidden, work = max(*moments, _allocation(plan), key=sum)
    hidden += plan.compared if plan.device == "cpu" else 0
    reading = plan.stored and not plan.fetched  # the files are mapped beside what is made of them
    mapped = 0
    if reading:
        mapped = _inside(plan, plan.stored.itemsize) + plan.shapes.outside * plan.stored.itemsize
    return Need(_weights(plan), hidden, work, mapped)


def _inside(plan: Plan, size: int) -> int:
    """Bytes of the blocks, with weights of `size` bytes."""
    if plan.packed is None:
        return plan.shapes.in_blocks * size
    return (plan.shapes.in_blocks - plan.packed.weights) * size + plan.packed.nbytes(size)


def _weights(plan: Plan) -> int:
    """The model, or what of it stands on the device at a time."""
    shapes, size = plan.shapes, plan.working.itemsize
    inside = _inside(plan, size)
    if plan.load_bit:
        inside = int(shapes.in_blocks * BITS[plan.load_bit] / 8)
    if plan.fetched:
        largest = max(block.weights for block in shapes.blocks)
        # to a GPU the next one comes while the current one computes
        inside = largest * size * (2 if plan.device == "cuda" and not plan.on_disk else 1)
    if plan.training:  # the teacher
        inside += shapes.in_blocks * size
        inside += shapes.outside * size if plan.training.beside else 0
    outside = 0 if plan.shared and plan.fetched and plan.device == "cpu" else shapes.outside
    return outside * size + inside


def _recovery(plan: Plan) -> tuple[int, int]:
    """What is trained, its gradient and AdamW's two averages, with a batch on its way and back."""
    training, shapes = plan.training, plan.shapes
    if training is None:
        return 0, 0
    inside = shapes.in_blocks
    largest = max(each.width * sum(each.outputs) for b in shapes.blocks for each in b.inputs)
    if training.rank:
        kept = inside * plan.saved.itemsize + 4 * FLOAT * training.rank * shapes.edges
    else:
        masters = not plan.working == plan.saved == torch.float32
        kept = inside * FLOAT * (4 if masters else 3)
    kept += inside * plan.saved.itemsize  # the best so far
    small = replace(plan, batch_size=training.batch_size, windows=training.batch_size)
    passing = max(_activations(small, block) for block in shapes.blocks)
    tokens = training.batch_size * plan.seqlen
    through = GRAPH * passing * (1 if training.checkpointed else shapes.count)
    if training.checkpointed:
        through += shapes.count * tokens * shapes.hidden * plan.working.itemsize
    logits = 5 * _logits(plan, training.batch_size)  # the teacher's, distributions, the gradient
    return 0, int(kept + largest * FLOAT + through + logits)


def _largest(plan: Plan) -> int:
    """Weights of the largest matrix."""
    inputs = [each for block in plan.shapes.blocks for each in block.inputs]
    return max((each.width * max(each.outputs) for each in inputs), default=0)


def _packing(plan: Plan) -> int:
    """The largest matrix as it is packed: beside it what becomes of it, and at 8 and 4 bits a look
    at every weight."""
    if plan.pack_bits is None:
        return 0
    largest = _largest(plan)
    tile, packed = min(largest, LARGE_TILE), largest * plan.working.itemsize
    looked_at = 3 * FLOAT * largest + UNPACKING * tile if plan.pack_bits < 16 else 0
    return packed + PACKING * tile + looked_at


def _allocation(plan: Plan) -> tuple[int, int]:
    """A few windows before every block, with one batch on its way back or a matrix in order."""
    if not plan.probed:
        return 0, 0
    hidden = plan.probed * (plan.shapes.count + 1) * plan.window
    batch = min(plan.batch_size, plan.probed)
    small = replace(plan, batch_size=batch, windows=plan.probed)
    passing = GRAPH * max(_activations(small, block) for block in plan.shapes.blocks)
    # logits, probabilities and their sums; what each weight costs, in order, and float64 sums
    ends, ordered = 3 * _logits(plan, batch), (2 + 2) * FLOAT * _largest(plan)
    return hidden, int(max(passing, ends, ordered))


def _logits(plan: Plan, batch: int) -> int:
    """Those of a batch that stand at a time, float32."""
    return min(LOGIT_BYTES[plan.device], FLOAT * plan.shapes.vocabulary * batch * plan.seqlen)


def _calibration(plan: Plan) -> tuple[int, int]:
    """Hidden states of all calibration windows, and the work on the block that takes most."""
    if plan.method_spec is None:
        return 0, 0
    windows = plan.windows if plan.method_spec.cls.observes else 0
    hidden = (2 if plan.follows else 1) * windows * plan.window
    if plan.follows and plan.keeps:
        channels = max(_kept(block) for block in plan.shapes.blocks)
        hidden += windows * plan.seqlen * channels * plan.working.itemsize
    return hidden, max(_pruning(plan, block) for block in plan.shapes.blocks)


def _kept(block: BlockShape) -> int:
    """Channels of each token that are kept of a block's inputs: its middle ones, or the last."""
    widths = [each.width for each in block.inputs if not each.experts]
    last = 0 if len(widths) < len(block.inputs) else widths.pop()  # of experts nothing is kept
    return max(sum(widths[1:]), last)


def _pruning(plan: Plan, block: BlockShape) -> int:
    """Statistics of a block, with the larger of a batch on its way and the solver's needs."""
    statistics = solving = passing = 0
    for each in block.inputs:
        sums, work = plan.method_spec(each.width, META).bytes_needed(each.outputs)
        # inputs that are taken in order are forgotten one by one
        statistics = max(statistics, sums) if plan.method_spec.cls.in_order else statistics + sums
        solving = max(solving, FLOAT * each.width * sum(each.outputs) + work)
    if plan.follows:
        statistics += block.weights * plan.working.itemsize  # the untouched block
    if plan.method_spec.cls.observes:
        passing = (2 if plan.follows else 1) * _activations(plan, block)
    return statistics + max(passing, solving + block.pruned * plan.saved.itemsize)


def _activations(plan: Plan, block: BlockShape) -> int:
    """One batch in a block: every linear's input and output, and the stream before and after."""
    channels = 4 * plan.shapes.hidden
    for each in block.inputs:
        share = min(1.0, plan.shapes.routed / each.experts) if each.experts else 1.0
        channels += int(share * (each.width + sum(each.outputs)))
    tokens = plan.seqlen * min(plan.batch_size, max(plan.windows, plan.tests))
    return tokens * channels * plan.working.itemsize


def _evaluation(plan: Plan) -> tuple[int, int]:
    """Hidden states, and logits with pieces of their softmax, or one batch in a block."""
    batch = min(plan.batch_size, plan.tests)
    once = plan.fetched and (plan.on_disk or plan.device == "cuda")  # each block comes once
    kept = plan.tests if once else batch
    row, tokens = FLOAT * plan.shapes.vocabulary, batch * plan.seqlen
    rows = min(max(batch, HEAD_POSITIONS, LOGIT_BYTES[plan.device] // row), tokens)
    pieces = min(max(row, LOGIT_BYTES[plan.device]), row * rows)  # in float32, and their softmax
    logits = rows * row * plan.working.itemsize // FLOAT + 2 * pieces
    if plan.compared:  # with those of the dense model
        logits += rows * row * plan.working.itemsize // FLOAT + pieces
    passing = max(_activations(plan, block) for block in plan.shapes.blocks)
    if plan.packed or plan.pack_bits:  # one weight at a time is dense, where no kernel takes it
        largest = _largest(plan)
        passing += largest * plan.working.itemsize + UNPACKING * min(largest, LARGE_TILE)
    return kept * plan.window, max(logits, passing)


@dataclass(frozen=True)
class Stand:
    """Where what a process needs will stand: on its device, unless that is the CPU, and the host.

    `once`: bytes on the host that are there for all processes of the machine together.
    """

    plan: Plan
    device: Need
    host: Need
    once: int = 0
    kept: bool = True  # hidden states, on the device

    @property
    def machine(self) -> int:
        """Bytes of host memory that all processes of this machine take, without the libraries."""
        several = self.plan.processes
        return several * self.host.total + self.once * (1 if self.plan.shared else several)

    def describe_host(self, base: int) -> str:
        """As a line for the user; `base` are the libraries' bytes."""
        plan, host = self.plan, self.host
        if self.once and not plan.shared:
            host = replace(host, weights=host.weights + self.once)
        line = host.told(base)
        if plan.processes > 1:
            line += f" for each of {plan.processes} processes"
            line += (
                f", and once for all weights {gib(self.once)}" if plan.shared and self.once else ""
            )
        return line


def stand(plan: Plan, free: int = 0) -> Stand:
    """Of a CPU, or of a GPU with `free` bytes: blocks stay on the host where they do not fit."""
    nothing = Need(0, 0, 0)
    if plan.device == "cpu":
        plan = replace(plan, fetched=plan.on_disk or plan.shared)
        return Stand(plan, nothing, needed(plan), plan.once)
    plan = replace(plan, fetched=plan.on_disk or plan.fetched)
    need = needed(plan)
    if not (plan.fetched or plan.load_bit or plan.training) and need.weights + need.work > free:
        plan = replace(plan, fetched=True)
        need = needed(plan)
    if need.total > free:
        plan = replace(plan, keeps=False)
        need = needed(plan)
    kept = need.weights + need.hidden + need.work <= free
    device = Need(need.weights, need.hidden if kept else 0, need.work)
    host = Need(0, plan.compared + (0 if kept else need.hidden), 0)
    return Stand(plan, device, host, plan.once, kept)


@dataclass(frozen=True)
class Room:
    """Whether blocks are fetched, where hidden states are kept; a line for users."""

    fetched: bool
    state_device: torch.device
    line: str
    checkpointed: bool = False  # activations are computed again in training
    cache_inputs: bool = True  # of a block, which saves passes through it


def check_memory(
    plan: Plan, device: torch.device, any_of: Callable[[bool], bool] = lambda fetched: fetched
) -> Room:
    """Where blocks and hidden states will stand. UserError where there is not enough memory.

    `any_of` tells whether any process fetches blocks: then all do.
    """
    if plan.training:
        plan = _trained(plan, device)
    checkpointed = bool(plan.training and plan.training.checkpointed)
    if device.type == "cpu":
        found = stand(plan)
        if found.machine > available():
            found = stand(replace(plan, keeps=False))
        line = f"memory: {_see_host(found)}"
        return Room(found.plan.fetched, device, line, checkpointed, found.plan.keeps)
    free = int(SPARE * free_on(device))
    found = stand(plan, free)
    if any_of(found.plan.fetched) and not found.plan.fetched:
        found = stand(replace(plan, fetched=True), free)
    if found.device.total > free:
        way = f", {_less(plan.training)}" if plan.training else ""
        raise UserError(
            f"--device {device}: the run needs {found.device.told()}, but only {gib(free)} are "
            f"free; try a smaller --batch_size or --seqlen{way}, or --device cpu"
        )
    line = f"memory: device {found.device.told()}; host {_see_host(found)}"
    state_device = device if found.kept else torch.device("cpu")
    return Room(found.plan.fetched, state_device, line, checkpointed, found.plan.keeps)


def free_on(device: torch.device) -> int:
    """Bytes that this process can still get on a GPU; what torch keeps of what was freed is one."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _trained(plan: Plan, device: torch.device) -> Plan:
    """With activations computed again where they would not fit otherwise."""
    on_host = available() // plan.processes
    gpu = device.type == "cuda"
    free = SPARE * free_on(device) if gpu else on_host
    if needed(plan).total <= free:
        return plan
    return replace(plan, training=replace(plan.training, checkpointed=True))


def _less(training: Training) -> str:
    """How the recovery takes less memory."""
    if training.rank:
        return "a smaller --recover_rank"
    return "--recover_rank 16, which trains fewer numbers"


def _see_host(found: Stand) -> str:
    """What is told of host memory. UserError where it is too little."""
    plan, free = found.plan, available()
    line = found.describe_host(psutil.Process().memory_info().rss + LATER)
    if found.machine > free:
        way = "" if plan.on_disk else ", or --offload FOLDER"
        way = f", or {_less(plan.training)}" if plan.training else way
        raise UserError(
            f"--model: the run needs {line} of host memory, of which {gib(free)} are still free; "
            f"try a smaller --nsamples, --seqlen or --batch_size{way}"
        )
    return line
