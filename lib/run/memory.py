"""How much memory a run takes, told before it begins: from shapes and flags, within a quarter.

Refuses what can't fit, instead of dying after hours.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from math import prod

import psutil
import torch
from torch import Tensor, nn

from lib.eval import LOGIT_BYTES
from lib.methods.registry import Recipe
from lib.model.linears import find_linears, watch_inputs
from lib.model.matrix import PrunableLinear
from lib.util.errors import UserError
from lib.util.host import available, gib

LATER = 24 * 2**20  # bytes of code that is imported after the estimate
SPARE = 0.9  # share of a GPU's free memory that is planned with; the rest is lost in gaps
BITS = {"4": 4.5, "8": 8.1}  # for each weight, scales included
FLOAT = 4


@dataclass(frozen=True)
class Plan:
    """What a run is going to do, as far as memory is concerned."""

    shapes: Shapes
    recipe: Recipe | None
    windows: int  # of calibration, in this process
    tests: int  # windows of all test sets, in this process
    seqlen: int
    batch_size: int
    working: torch.dtype
    saved: torch.dtype
    load_bit: str | None = None
    stored: torch.dtype | None = None  # of the weight files, if these are cast on reading
    fetched: bool = False  # blocks come to the device one at a time
    ahead: bool = False  # and the next one while the current one computes


@dataclass(frozen=True)
class Parts:
    """Bytes at the worst moment: of what is there all the time, and of what comes and goes."""

    weights: int
    hidden: int
    work: int
    loading: int = 0

    @property
    def total(self) -> int:
        return self.weights + max(self.hidden + self.work, self.loading)


@dataclass(frozen=True)
class Room:
    """Whether blocks are fetched from the host, where hidden states are kept; a line for users."""

    fetched: bool
    keep_on: torch.device
    line: str


def parts(plan: Plan) -> Parts:
    """Where everything stands in the same memory; `check_memory` splits it over two."""
    shapes, size = plan.shapes, plan.working.itemsize
    largest = max(block.weights for block in shapes.blocks)
    inside = shapes.in_blocks * size
    if plan.load_bit:
        inside = int(shapes.in_blocks * BITS[plan.load_bit] / 8)
    if plan.fetched:
        inside = largest * size * (2 if plan.ahead else 1)
    weights = shapes.outside * size + inside
    calibration = _calibration(plan), max(map(lambda b: _pruning(plan, b), shapes.blocks))
    hidden, work = max(calibration, _evaluation(plan), key=sum)
    reading = plan.stored and not plan.fetched  # the files are mapped beside what is made of them
    mapped = (shapes.in_blocks + shapes.outside) * plan.stored.itemsize if reading else 0
    return Parts(weights, hidden, work, mapped)


def _calibration(plan: Plan) -> int:
    """Hidden states of all calibration windows, twice for a method that follows the dense model."""
    if plan.recipe is None or not plan.recipe.observes:
        return 0
    copies = 2 if plan.recipe.dense_stream else 1
    return copies * plan.windows * _window(plan)


def _window(plan: Plan) -> int:
    return plan.seqlen * plan.shapes.hidden * plan.working.itemsize


def _pruning(plan: Plan, block: Block) -> int:
    """Statistics of a block, with the larger of a batch on its way and the solver's needs."""
    if plan.recipe is None:
        return 0
    statistics, solving, written = 0, 0, block.pruned * plan.saved.itemsize
    for each in block.inputs:
        method = plan.recipe(each.width, torch.device("meta"))
        own = sum(statistic.nbytes for statistic in method.statistics())
        if plan.recipe.dense_stream and len(each.outputs) == 1:  # it may add to the stream
            own += FLOAT * each.width * each.outputs[0]
        square = own if any(one.dim() == 2 for one in method.statistics()) else 0
        matrices = FLOAT * each.width * sum(each.outputs)
        score = (2 * FLOAT + 2) * each.width * max(each.outputs)
        # inputs that are taken in order are forgotten one by one
        statistics = max(statistics, own) if plan.recipe.in_order else statistics + own
        # a factorisation and its copy, then the matrices as a whole, those of ADMM in five states;
        # or scores and masks
        states = 5 if plan.recipe.in_order else 1
        second_order = max(2 * square, square + states * matrices)
        solving = max(solving, matrices + (second_order if square else score))
    if plan.recipe.dense_stream:
        statistics += block.weights * plan.working.itemsize  # the untouched block
    passing = _activations(plan, block) * (2 if plan.recipe.dense_stream else 1)
    return statistics + max(passing if plan.recipe.observes else 0, solving + written)


def _activations(plan: Plan, block: Block) -> int:
    """One batch in a block: every linear's input and output, and the stream before and after."""
    channels = 4 * plan.shapes.hidden
    for each in block.inputs:
        share = min(1.0, plan.shapes.routed / each.experts) if each.experts else 1.0
        channels += int(share * (each.width + sum(each.outputs)))
    tokens = plan.seqlen * min(plan.batch_size, max(plan.windows, plan.tests))
    return tokens * channels * plan.working.itemsize


def _evaluation(plan: Plan) -> tuple[int, int]:
    """Hidden states, and logits as they come and as probabilities or one batch in a block."""
    batch = min(plan.batch_size, plan.tests)
    kept = plan.tests if plan.fetched else batch
    position = FLOAT * plan.shapes.vocabulary * batch
    logits = 2 * min(max(position, LOGIT_BYTES), position * plan.seqlen)
    if plan.working.itemsize < FLOAT:
        logits += logits // 4
    passing = max(_activations(plan, block) for block in plan.shapes.blocks)
    return kept * _window(plan), max(logits, passing)


def described(need: Parts, base: int = 0) -> str:
    """As a line for the user."""
    named = {"weights": need.weights, "hidden states": need.hidden, "work": need.work}
    if need.loading > need.hidden + need.work:
        named = {"weights": need.weights, "reading them": need.loading}
    listed = ", ".join(f"{name} {gib(size)}" for name, size in named.items() if size)
    start = f"libraries {gib(base)}, " if base else ""
    return f"about {gib(base + need.total)} ({start}{listed})"


def check_memory(plan: Plan, device: torch.device, offloaded: bool) -> Room:
    """Where blocks and hidden states will stand. UserError where there is not enough memory."""
    need = parts(plan)
    if device.type == "cpu":
        return Room(False, device, f"memory: {_checked(need, offloaded)}")
    free = int(SPARE * torch.cuda.mem_get_info(device)[0])
    fetched = not (plan.fetched or plan.load_bit) and need.weights + need.work > free
    if fetched:
        plan = replace(plan, fetched=True, ahead=True)
        need = parts(plan)
    kept = need.weights + need.hidden + need.work <= free
    here = Parts(need.weights, need.hidden if kept else 0, need.work)
    if here.total > free:
        raise UserError(
            f"--device {device}: the run needs {described(here)}, but only {gib(free)} are free; "
            "try a smaller --batch_size or --seqlen, or --device cpu"
        )
    away = plan.shapes.in_blocks * plan.working.itemsize if fetched else 0
    host = Parts(away, 0 if kept else need.hidden, 0)
    line = f"memory: device {described(here)}; host {_checked(host, offloaded)}"
    return Room(fetched, device if kept else torch.device("cpu"), line)


def _checked(need: Parts, offloaded: bool) -> str:
    """The line on host memory."""
    base = psutil.Process().memory_info().rss + LATER
    line, free = described(need, base), available() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if need.total > free:
        way = "" if offloaded else ", or --offload FOLDER"
        raise UserError(
            f"--model: the run needs {line} of host memory, of which {gib(free)} are still free; "
            f"try a smaller --nsamples, --seqlen or --batch_size{way}"
        )
    return line


FAILURES = (RuntimeError, ValueError, TypeError, IndexError)  # of a forward pass without weights


@dataclass
class Inputs:
    """Linears that share an input: its width, and the outputs of each linear."""

    width: int
    outputs: list[int]
    experts: int = 0  # how many experts share the tokens that are routed


@dataclass
class Block:
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

    blocks: list[Block]
    in_blocks: int
    outside: int
    hidden: int
    vocabulary: int
    routed: int  # experts that each token goes to


def shapes(skeleton: nn.Module, blocks_name: str) -> Shapes:
    """Of a model on the meta device."""
    blocks = skeleton.get_submodule(blocks_name)
    inside = {parameter: parameter.numel() for parameter in blocks.parameters()}
    whole = sum(parameter.numel() for parameter in set(skeleton.parameters()))
    sharing = _sharing(skeleton, blocks)
    config = skeleton.config.get_text_config(decoder=True)
    kinds: dict[tuple, Block] = {}
    for block in blocks:
        key = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        kinds.setdefault(key, Block(sum(map(prod, (k[1] for k in key))), _inputs(block, sharing)))
    return Shapes(
        list(kinds.values()),
        sum(inside.values()),
        whole - sum(inside.values()),
        config.hidden_size,
        config.vocab_size,
        getattr(config, "num_experts_per_tok", None) or 1,
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
            skeleton.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"))
        except FAILURES:  # routing needs values: what was not reached counts by itself
            return received
    return received


def _inputs(block: nn.Module, sharing: dict[nn.Module, int]) -> list[Inputs]:
    linears, _ = find_linears(block, "")
    experts = {one.stage: 0 for one in linears if one.expert is not None}
    found: dict[object, Inputs] = {}
    for linear in linears:
        if linear.expert is not None:
            experts[linear.stage] += 1
    for linear in linears:
        rows, width = linear.shape
        key = sharing.get(linear.module, linear) if linear.expert is None else linear
        found.setdefault(key, Inputs(width, [], experts.get(linear.stage, 0))).outputs.append(rows)
    return list(found.values())
