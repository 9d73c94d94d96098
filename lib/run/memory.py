"""The memory of a run as one table, before any weight is read: bytes by stage and term, of a rank.

    memory = Memory.of(job)
    memory.stages["train"]      # {"weights": ..., "teacher": ..., "masters": ..., ...}
    memory.fits()               # whether all sums are within what is free
    memory_of(config, "--prune_method admm", free=24e9).table()  # of a machine that is elsewhere

Terms of `stages` and `on_host` are resident: they stand there for a stage, or at one moment of it
for certain. They decide whether blocks are fetched, where hidden states are and what else is kept,
and where their sum is more than is free the run is refused. Terms of `passing` are an estimate of
what comes and goes with a batch, and refuse nothing.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from operator import mul
from os.path import getsize
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.samples import as_windows
from ..methods.registry import METHODS, method_of
from ..model import pretrained
from ..model.access import Checkpoint
from ..model.blocks import GPU_LOGIT_BYTES, LOGIT_BYTES
from ..model.linears import find_linears
from ..model.matrix import PrunableLinear, SaveDtypes
from ..model.parts import find_parts
from ..model.reference import compared_windows, local_windows
from ..packed.formats import FORMATS
from ..pruning.allocation import WINDOWS as ALLOCATION_WINDOWS
from ..pruning.errors import TOKENS
from ..recover import TrainSchedule
from ..remove import experts_left, neurons_left
from ..sharded import can_share
from ..util.errors import UserError
from ..util.host import available, gib
from .flags import build_parser, shown
from .job import Job
from .plan import Plan

BITS = {"4": 4.5, "8": 8.1}  # for each weight of --load_bit, scales included (formula)
FLOAT = 4  # bytes of a float32, in which sums, masters, gradients and averages are
# Averages of a trained number: two of float32, or two of a byte and their scale, a float32 for
# every 256, but of small tensors as adamw's (bitsandbytes' formulas).
AVERAGES, AVERAGES_8BIT, SMALL_TENSOR = 8, 2 + 2 * 4 / 256, 4096
# What solving a group of linears holds besides its sums and its matrices, in float32 numbers: the
# most of a * in^2 + b * in * out + c * out. Measured of each method on the pretended device at
# inputs and outputs from 32 to 3,072, with N:M masks: unstructured ones take a fifth more.
SOLVING = {
    "magnitude": [(0, 1.3, 0)],
    "wanda": [(0, 1.3, 0)],
    "sparsegpt": [(2, 0, 0), (1, 2, 0), (1, 1, 640)],
    "admm": [(3, 3.4, 0), (2, 8.1, 0)],
    "quantize": [(3, 3.4, 0), (1, 9.4, 0)],
    "sparsegpt neurons": [(2, 2.7, 0)],
    "admm neurons": [(2, 0, 0), (1, 3.7, 0)],
}
# Activations of a batch in units of its hidden states, measured of LLaMA's blocks, whose MLP is
# three to four times as wide: of a forward pass, and what a block keeps for its backward pass.
COMPUTED, KEPT = 11, 40
LOGITS = 4  # copies of a chunk of logits: logits, log-probabilities, the teacher's, a gradient
CACHED = 8  # inputs of a block's linears, in hidden states (formula, for LLaMA's)
SHARD = 5 * 10**9  # bytes of a file of a saved model, at most
ROOM = 2  # weights that take more than this part of what is free are fetched, block by block
HIDDEN_ROOM = 4  # and of what is left of it, hidden states that take more are on the host
FLAGS = {  # by stage: the flag that asks for it, and its name in messages
    "allocate": ("allocation", "measuring errors"),
    "prune": ("prune_method", "pruning"),
    "quantize": ("quantize", "quantizing"),
    "train": ("recover", "training"),
}
WAYS = {  # by stage: flags by which it takes less
    "allocate": [("allocation", "uniform")],
    "prune": [("prune_method", "sparsegpt"), ("prune_method", "wanda")],
    "train": [("recover_optimizer", "adamw8bit"), ("recover_rank", 16)],
}
CARDS = 2, 4, 8, 16, 32, 64  # that may share out what is trained
Table = dict[str, dict[str, int]]  # {stage: {term: bytes}}


@dataclass(frozen=True, eq=False)
class Memory:
    """A run's memory in one rank; `fetched` says whether blocks are on the device one at a time."""

    model: nn.Module  # without weights
    small: nn.Module  # the same once neurons or experts are removed
    blocks_name: str
    args: argparse.Namespace
    dtype: torch.dtype
    save_dtype: torch.dtype
    gpu: bool
    free: int  # bytes, on the device
    host: int  # on the host
    seqlen: int
    batch_size: int
    schedule: TrainSchedule | None = None
    windows: int = 0  # to calibrate on, of this rank
    tests: int = 0  # of all test sets, of this rank
    compared: int = 0  # of them, whose hidden states in the dense model are kept
    held_out: int = 0  # of the training text
    masked: bool = False  # windows of several documents have masks of their own
    teacher: nn.Module | None = None  # of --teacher
    rows: int | None = None  # of the vocabulary that stay
    quantized: bool = False  # as it is loaded
    files: int | None = None  # bytes of the weights of a model that is stored quantized or packed
    ranks: int = 1
    fetched: bool = False

    @classmethod
    def of(cls, job: Job) -> Memory:
        """Return the memory of a run, by what is free; every rank must call this."""
        args, dist, texts, small = job.args, job.dist, job.texts, None
        gpu = job.device.type != "cpu"
        host = free = available() // dist.local_size
        if gpu:  # torch's own cache is free too
            free = torch.get_device_module(job.device).mem_get_info(job.device)[0]
            free += torch.accelerator.memory_reserved(job.device)
            free -= torch.accelerator.memory_allocated(job.device)
        if job.layout:
            field = job.layout.field
            small = pretrained.skeleton_with(job.config, field, job.left, job.checkpoint)
        teacher = job.teacher and pretrained.skeleton(job.teacher_config, job.teacher)
        stored = getattr(job.config, "quantization_config", None)
        windows = [] if texts.windows is None else texts.windows
        tests = [test.windows for test in texts.tests]
        held_out = len(texts.training.held_out) if texts.training else 0
        memory = cls(
            model=job.skeleton,
            small=small or job.skeleton,
            blocks_name=job.blocks_name,
            args=args,
            dtype=job.dtype,
            save_dtype=job.save_dtype,
            gpu=gpu,
            free=free,
            host=host,
            seqlen=job.seqlen,
            batch_size=job.batch_size,
            schedule=job.schedule,
            windows=len(range(len(windows))[dist.share(len(windows))]),
            tests=sum(len(range(len(test))[dist.share(len(test))]) for test in tests),
            compared=sum(len(local_windows(len(test), dist)) for test in tests),
            held_out=len(local_windows(held_out, dist)),
            masked=any(len(w) and as_windows(w).positions is not None for w in [windows, *tests]),
            teacher=teacher or None,
            rows=len(job.vocabulary.rows) if job.vocabulary else None,
            quantized=bool(args.load_bit or stored),
            files=sum(map(getsize, Path(args.model).glob("*.safetensors"))) if stored else None,
            ranks=dist.size,
        )
        if args.offload_folder and not memory.separable:
            raise UserError(
                f"--offload_folder {args.offload_folder}: the model's blocks share weights, or are "
                "quantized. Leave the flag out."
            )
        many = memory.too_many if gpu else dist.local_size > 1
        many = many or (job.schedule and dist.size > 1)  # ranks share out what is trained
        wanted = bool(args.offload_folder or (memory.separable and many))
        return replace(memory, fetched=any(dist.all_gather_object(wanted)))

    @cached_property
    def plan(self) -> Plan:
        return Plan.of(self.args)

    @property
    def separable(self) -> bool:
        """Whether one block can be fetched without another; none is while one rank trains."""
        alone = self.schedule and self.ranks == 1
        blocks = self.model.get_submodule(self.blocks_name)
        return not self.quantized and not alone and can_share(blocks)

    def _part(self, size: int) -> int:
        """What a rank has of what is trained."""
        return -(-size // self.ranks) if self.schedule and self.fetched else size

    @property
    def too_many(self) -> bool:
        """Whether the device has no room for all weights, or not for what else a stage needs."""
        resident = replace(self, fetched=False)
        return not resident.fits() or ROOM * resident.weights + self._teacher > self.free

    @cached_property
    def weights(self) -> int:
        """Bytes of all weights on the device, or of the tables and one block."""
        if self.files is not None:  # those of the Hub are not known to this
            return max(self.files, self._tables if self.files else 0)
        bits = BITS[self.args.load_bit] if self.args.load_bit else 8 * self.dtype.itemsize
        inside = int(sum(self._inside) * bits / 8)
        return self._tables + (self._block if self.fetched else inside)

    @cached_property
    def _inside(self) -> list[int]:
        """Weights of each block, those that several share in the first."""
        return self._sizes(self.model)

    def _sizes(self, model: nn.Module) -> list[int]:
        seen: set[int] = set()
        sizes = []
        for block in model.get_submodule(self.blocks_name):
            own = {id(one): one.numel() for one in block.parameters() if id(one) not in seen}
            seen |= own.keys()
            sizes.append(sum(own.values()))
        return sizes

    @property
    def _block(self) -> int:
        """Bytes of the largest block."""
        return max(self._inside) * self.dtype.itemsize

    @cached_property
    def _tables(self) -> int:
        """Bytes of what is outside the blocks: embedding, head, norms, other towers, buffers."""
        return self._outside(self.model, None)

    def _outside(self, model: nn.Module, rows: int | None) -> int:
        """And with so many `rows` of the vocabulary alone."""
        inside = {id(one) for one in model.get_submodule(self.blocks_name).parameters()}
        every = model.get_input_embeddings().num_embeddings
        size = sum(one.nbytes for one in model.buffers())
        for one in model.parameters():
            if id(one) not in inside:
                cut = rows is not None and one.shape[:1] == (every,)
                count = one.numel() // every * rows if cut else one.numel()
                size += count * self.dtype.itemsize
        return size

    @cached_property
    def _teacher(self) -> int:
        """Bytes of the teacher: a model of its own, or a copy of the blocks."""
        if self.teacher:
            inside = self._sizes(self.teacher)
            return self._outside(self.teacher, self.rows) + sum(inside) * self.dtype.itemsize
        return sum(self._inside) * self.dtype.itemsize if self.schedule else 0

    def _teacher_at(self, stage: str) -> int:
        """Bytes of it in a stage: where blocks are fetched it is on the disk until training."""
        if not self._teacher or stage in ("load", "save"):
            return 0
        if not self.fetched or self.ranks == 1:
            return self._teacher
        inside = sum(self._sizes(self.teacher or self.model)) * self.dtype.itemsize
        size = self._outside(self.teacher, self.rows) if self.teacher else 0
        return size + (self._part(inside) + self._block if stage == "train" else 0)

    def stream(self, windows: int) -> int:
        """Bytes of the hidden states of so many windows."""
        width = self.model.config.get_text_config(decoder=True).hidden_size
        return windows * self.seqlen * width * self.dtype.itemsize

    @cached_property
    def _streams(self) -> dict[str, int]:
        """Bytes of the hidden states that a stage holds between blocks, besides a batch's."""
        plan, streams = self.plan, {}
        if plan.method and plan.allocation != "uniform":  # before every block, and the gradient
            # most of --nsamples has a rank; the backward pass takes the first few of all windows
            few = min(-(-ALLOCATION_WINDOWS // self.ranks), max(1, self.windows))
            streams["allocate"] = self.stream(few) * (len(self._inside) + 1)
        if plan.method and method_of(plan.method).observes:
            both = 1 + method_of(plan.method).dense_stream
            streams["prune"] = self.stream(max(1, self.windows)) * both
        if plan.quantizes:
            streams["quantize"] = 2 * self.stream(max(1, self.windows))
        return streams

    @cached_property
    def masks(self) -> int:
        """Bytes of attention masks, one of bools for each window of several documents."""
        return self.masked * self.windows * self.seqlen**2

    @cached_property
    def left(self) -> int:
        """Bytes on the device for hidden states, beside all else that pruning or rounding holds."""
        # where blocks are fetched the next one comes before this one goes
        weights = self.weights + self._block * self.fetched
        solver = max(map(self._solving, self._solved), default=0)
        return self.free - self._teacher_at("measure") - weights - solver - self.masks

    @cached_property
    def hidden_on_device(self) -> bool:
        """Whether hidden states are on the device between two blocks, or else on the host."""
        hidden = max(self._streams.get("allocate", 0), 2 * self.stream(self.windows))
        return not self.gpu or HIDDEN_ROOM * hidden < self.left

    @cached_property
    def tests_at_once(self) -> int | None:
        """How many test windows are taken through fetched blocks at a time: whole batches."""
        if not self.fetched:
            return None
        room = (self.left if self.hidden_on_device else self.host) // HIDDEN_ROOM
        batches = max(1, room // self.stream(self.batch_size))
        return batches * self.batch_size

    @cached_property
    def cache_inputs(self) -> bool:
        """Whether there is memory for inputs of a block's linears, which save passes through it."""
        hidden = 2 * self.stream(self.windows)
        return self.left - hidden > CACHED * hidden

    @cached_property
    def checkpointed(self) -> bool:
        """Whether a block's activations are computed again in training."""
        if not self.schedule:
            return False
        kept = KEPT * len(self._inside) * self.stream(self.batch_size)
        return self.total("train") + kept > self.free

    @property
    def _solved(self) -> list[str]:
        """The stages that solve a problem for each linear."""
        by_method = self.plan.method in METHODS
        return ["prune"] * bool(by_method) + ["quantize"] * self.plan.quantizes

    def _solving(self, stage: str) -> int:
        return sum(self._solver(stage).values())

    def _solver(self, stage: str) -> dict[str, int]:
        """Terms of solving a block's linears: sums over tokens, and what the solver makes of them.

        Linears that share an input share its sums; those of a method that takes inputs in order
        are of one input at a time, but for experts, all of which are reached at once.
        """
        name = "quantize" if stage == "quantize" else self.plan.method
        method, neurons = method_of(name if name in METHODS else "admm"), ""
        if stage == "prune" and self.plan.removes:
            neurons = " neurons"
        solving = SOLVING.get(name + neurons, SOLVING["wanda"])
        worst, at_most = 0, {"statistics": 0, "solver": 0}
        for groups in self._groups:
            if neurons:  # the down projection alone
                groups = sorted(group for group in groups if group[3])[-1:]
            for inputs in [[group] for group in groups] if method.dense_stream else [groups]:
                sums = most = 0
                for width, outputs, experts, ends in inputs:
                    sums += 2 * FLOAT * experts * TOKENS * width  # a sample, for the layers' errors
                    if method.inverts_gram:
                        sums += FLOAT * experts * width**2
                    if method.dense_stream:  # a projection's error, or an input's
                        sums += FLOAT * experts * width * (min(outputs, width) if ends else width)
                    parts = width**2, width * outputs, outputs
                    numbers = (sum(map(mul, parts, factors)) for factors in solving)
                    most = max(most, int(FLOAT * (max(numbers) + width * outputs)))
                if sums + most > worst:
                    worst, at_most = sums + most, {"statistics": sums, "solver": most}
        if method.dense_stream:
            at_most["dense block"] = self._block
        return at_most

    @cached_property
    def _groups(self) -> list[list[tuple[int, int, int, bool]]]:
        """Of each kind of block its inputs: width, outputs, experts, and whether they end a module.

        Linears of a module that are as wide receive one input, but for the last, which receives
        what the others make.
        """
        kinds: dict[tuple, list[tuple[int, int, int, bool]]] = {}
        for block in self.model.get_submodule(self.blocks_name):
            linears, _ = find_linears(block, "")
            kind = tuple((linear.name, linear.shape) for linear in linears)
            if kind in kinds:
                continue
            last = {linear.name.rpartition(".")[0]: linear for linear in linears}
            groups: dict[tuple, tuple[int, int, int, bool]] = {}
            for linear in linears:
                (rows, columns), module = linear.shape, linear.name.rpartition(".")[0]
                if linear.expert is not None:
                    count = len(getattr(linear.module, linear.parameter))
                    groups[(linear.stage,)] = columns, rows, count, False
                    continue
                key = module, columns, linear is last[module]
                outputs = groups.get(key, (0, 0))[1]
                groups[key] = columns, outputs + rows, 1, key[2]
            kinds[kind] = list(groups.values())
        return list(kinds.values())

    @cached_property
    def _training(self) -> dict[str, int]:
        """Terms of the training of what lib/recover.py's `trained_parts` trains."""
        schedule, rank = self.schedule, self.schedule.rank
        outside = {id(one) for one in self.small.parameters()}
        blocks = self.small.get_submodule(self.blocks_name)
        outside -= {id(one) for one in blocks.parameters()}
        linears = {id(getattr(one.module, one.parameter)) for one in self._linears}
        saved = SaveDtypes(self.small, self.save_dtype)
        terms = dict.fromkeys(("masters", "gradients", "averages"), 0)
        for path, one in blocks.named_parameters():
            matrix, size = id(one) in linears, one.numel()
            vector = one.dim() == 1 or path.endswith("bias")
            if id(one) in outside or not (matrix or vector):
                continue
            on_grid, trained = matrix and self.plan.quantizes, self._part(size)
            dtype = saved.of(f"{self.blocks_name}.{path}", one)
            if matrix and rank:  # beside a copy of it B and A
                *stack, rows, columns = one.shape
                alike = 0 if stack else rank * columns  # A, in every rank
                trained = self._part(prod(stack) * rank * (rows + columns) - alike) + alike
                terms["masters"] += self._part(size) * dtype.itemsize
            if matrix and not rank and schedule.optimizer == "adamw8bit":
                terms["averages"] += self._part(size)  # where zeros are, which are set again
            # what is saved in float32 is its own master
            exact = dtype == self.dtype == torch.float32 and not on_grid and not (matrix and rank)
            terms["masters"] += 0 if exact else FLOAT * trained
            terms["gradients"] += FLOAT * trained
            narrow = schedule.optimizer == "adamw8bit" and trained >= SMALL_TENSOR
            terms["averages"] += int((AVERAGES_8BIT if narrow else AVERAGES) * trained)
        return terms

    @cached_property
    def stages(self) -> Table:
        """{stage: {term: bytes}} of what is resident on the device; on a CPU, of all."""
        return self._table(True)

    @cached_property
    def on_host(self) -> Table:
        """The same on the host, beside a device of its own."""
        return self._table(False)

    def _table(self, on_device: bool) -> Table:
        return {
            stage: {name: size for name, size, where in self._terms(stage) if where == on_device}
            for stage in self._taken
        }

    @property
    def _taken(self) -> list[str]:
        """The stages of this run."""
        plan = self.plan
        taken = {
            "load": True,
            "measure": True,
            "allocate": plan.method and plan.allocation != "uniform",
            "prune": plan.method,
            "quantize": plan.quantizes,
            "train": self.schedule,
            "save": self.args.save_model,
        }
        return [stage for stage, takes in taken.items() if takes]

    def _terms(self, stage: str) -> Iterator[tuple[str, int, bool]]:
        """Yield term, bytes, and whether it is on the device."""
        yield "weights", self._weights_at(stage), True
        if teacher := self._teacher_at(stage):
            yield "teacher", teacher, True
        size = self._streams.get(stage, 0)
        if stage == "measure" and self.fetched:  # otherwise each batch goes through all blocks
            size = self.stream(min(self.tests, self.tests_at_once))
        if size:
            yield "hidden states", size, self.hidden_on_device
        if stage in self._solved:
            for name, size in self._solver(stage).items():
                yield name, size, True
        if stage == "prune" and "allocate" in self._taken:  # float64, by output
            yield "output costs", 8 * sum(linear.shape[0] for linear in self._linears), True
        if self.plan.quantizes and self.schedule:  # what training begins with
            numbers, each = self._rounded, self.save_dtype.itemsize if self.schedule.rank else FLOAT
            if stage == "quantize":
                yield "masters", each * self._part(numbers), True
            if stage in ("quantize", "train", "save"):
                size = FLOAT * numbers // FORMATS[self.plan.format].group
                yield "scales", size if stage == "save" else self._part(size), True
        if stage == "train":
            for name, size in self._training.items():
                yield name, size, True
            best = self._part(sum(self._sizes(self.small)) * self.dtype.itemsize)
            yield "best weights", best, not self.gpu
            yield "held-out states", self.stream(self.held_out), not self.gpu
        if stage != "load" and self.compared and self.plan.has_dense:
            yield "dense states", self.stream(self.compared), not self.gpu
        if stage == "save":  # a file of it
            size = min(SHARD, self._weights_at("save"))
            yield "copies for the disk", size, not self.gpu

    def _weights_at(self, stage: str) -> int:
        """Weights on the device in a stage: fewer once tokens, neurons or experts are removed."""
        size = self.weights
        if stage != "load":
            size += self._outside(self.model, self.rows) - self._tables
        if stage in ("train", "save") and not self.fetched:
            gone = sum(self._inside) - sum(self._sizes(self.small))
            size -= gone * self.dtype.itemsize
        if stage == "train" and self.fetched:  # and a block is gathered whole
            size += self._part(sum(self._sizes(self.small)) * self.dtype.itemsize)
        return size

    @cached_property
    def _linears(self) -> list[PrunableLinear]:
        """The linears of all blocks in the end."""
        blocks = self.small.get_submodule(self.blocks_name)
        return [linear for block in blocks for linear in find_linears(block, "")[0]]

    @cached_property
    def _rounded(self) -> int:
        """How many weights are rounded."""
        form, numbers = FORMATS[self.plan.format], 0
        for linear in self._linears:
            takes = linear.expert is None if form.packs else form.takes(linear.shape[1])
            numbers += takes * prod(linear.shape)
        return numbers

    @cached_property
    def passing(self) -> Table:
        """Estimates of what comes and goes with a batch, on the device."""
        batch, blocks = self.stream(self.batch_size), len(self._inside)
        vocabulary = self.rows or self.model.get_input_embeddings().num_embeddings
        most = GPU_LOGIT_BYTES if self.gpu else LOGIT_BYTES
        logits = LOGITS * min(most, FLOAT * self.batch_size * self.seqlen * vocabulary)
        again = self.checkpointed  # then hidden states before every block are kept, and one's graph
        graph = {"allocate": KEPT, "train": KEPT + blocks if again else KEPT * blocks}
        table: Table = {}
        for stage in self._taken:
            table[stage] = {"activations": graph.get(stage, COMPUTED) * batch}
            if stage in ("measure", "allocate", "train"):
                table[stage]["logits"] = logits
            elif stage in ("prune", "quantize"):
                table[stage]["masks"] = self.masks
                if self.cache_inputs:  # at most: by methods that take inputs in order
                    table[stage]["inputs"] = CACHED * self.stream(self.windows)
        return table

    def total(self, stage: str) -> int:
        """Bytes that are resident on the device in a stage; 0 where the run has no such stage."""
        return sum(self.stages.get(stage, {}).values())

    def fits(self, stage: str | None = None) -> bool:
        """Whether what is resident on the device, in a stage or in all, is within what is free."""
        return all(self.total(each) <= self.free for each in ([stage] if stage else self.stages))

    def check(self) -> None:
        """Raise UserError where a stage can't fit, with flags by which it would.

        On a CPU training alone is refused: the system takes weights that were read from a file out
        of memory and reads them again.
        """
        for stage in sorted(self.stages, key=lambda stage: stage != "train"):  # the first to blame
            if self.fits(stage) or not (self.gpu or stage == "train"):
                continue
            flag, doing = FLAGS.get(stage, ("model", "the model"))
            device, given = "card" if self.gpu else "machine", shown(self.args, flag)
            problem = (
                f"{given}: {doing} needs {gib(self.total(stage))} of memory, and the {device} "
            )
            problem += f"has {gib(self.free)} free"
            if ways := [*self._ways(stage)]:
                raise UserError(f"{problem}. Use {' or '.join(ways)}.")
            fix = f"Leave {given} out" if stage == "train" else "Use --device cpu"
            problem += ", even with one block at a time" * self.fetched
            raise UserError(f"{problem}. {fix}, or use a smaller model.")

    def _ways(self, stage: str) -> Iterator[str]:
        """Yield flags by which a stage would fit, and what it would need."""
        others = {"": self} if stage == "train" else {}
        for name, value in WAYS.get(stage, ()):
            args, schedule = copy.copy(self.args), self.schedule
            if getattr(args, name) == value or (stage == "prune" and self.plan.removes):
                continue
            setattr(args, name, value)
            if stage == "train":
                schedule = replace(schedule, **{name.removeprefix("recover_"): value})
            other = replace(self, args=args, schedule=schedule)
            if other.fits() if stage == "train" else other.fits(stage):
                yield f"--{name} {value}" + f" ({gib(other.total(stage))})" * (stage != "allocate")
            elif stage == "train":
                others[f" with --{name} {value}"] = other
        fewest = CARDS[-1] + 1
        for how, other in others.items() if self.gpu else ():
            for ranks in [each for each in CARDS if self.ranks < each < fewest]:
                many = replace(other, ranks=ranks, fetched=True)
                if many.separable and many.fits(stage):
                    yield f"{ranks} such cards with torchrun{how} ({gib(many.total(stage))} each)"
                    fewest = ranks
                    break

    def line(self) -> str:
        """What is resident, where hidden states are, and of how much, in one line for a user."""
        weights = replace(self, fetched=False).weights
        parts = [f"weights {gib(weights)}" + ", one block at a time" * self.fetched]
        if self._teacher:
            stage = "train" if self.schedule else "measure"
            parts.append(f"teacher {gib(self._teacher_at(stage))}")
        where = f" on the {'card' if self.hidden_on_device else 'host'}" * self.gpu
        every = [term for stage in self._taken for term in self._terms(stage)]
        hidden = max((size for name, size, _ in every if name == "hidden states"), default=0)
        parts.append(f"hidden states {gib(hidden)}{where}")
        if self._solved:
            parts.append(f"solver {gib(max(map(self._solving, self._solved)))}")
        if self.schedule:
            parts.append(f"training {gib(sum(self._training.values()))}")
        again = "; training recomputes activations" * self.checkpointed
        return f"memory: {', '.join(parts)}, of {gib(self.free)} free{again}"

    def table(self) -> str:
        """Resident bytes by stage and term, with their sums, as a table in Markdown."""
        rows = ["| stage | resident | terms |", "|---|---|---|"]
        for stage, terms in self.stages.items():
            parts = ", ".join(f"{name} {gib(size)}" for name, size in terms.items() if size)
            rows.append(f"| {stage} | {gib(self.total(stage))} | {parts} |")
        return "\n".join(rows)


def memory_of(
    config: Any,
    flags: str = "",
    *,
    free: float,
    host: float = 2**50,
    ranks: int = 1,
    seqlen: int = 4096,
    tests: int = 256,
) -> Memory:
    """Return the memory of a run on GPUs with `free` bytes each, without weights, texts or GPU.

    `config` is transformers' own; `flags` are those of main.py, without texts; `tests` are the test
    windows. Each of `ranks` has its share of these and of --nsamples.
    """
    args = build_parser().parse_args(["--model", "model", *flags.split()])
    plan, checkpoint, small = Plan.of(args), Checkpoint(args.model), None
    model = pretrained.skeleton(config, checkpoint)
    name, _ = pretrained.decoder_blocks(model)
    if plan.removes:
        layout = find_parts(plan.removes, config, checkpoint, model, name)
        count_left = experts_left if plan.removes == "experts" else neurons_left
        left = count_left(layout, plan.sparsity.ratio)
        small = pretrained.skeleton_with(config, layout.field, left, checkpoint)
    schedule = args.recover and TrainSchedule(
        tokens=args.recover,
        seqlen=seqlen,
        rank=args.recover_rank,
        optimizer=args.recover_optimizer,
    )
    width = config.get_text_config(decoder=True).hidden_size
    dtype = pretrained.checkpoint_dtype(config)
    batch_size = pretrained.default_batch_size(torch.device("cuda"), seqlen, width)
    memory = Memory(
        model=model,
        small=small or model,
        blocks_name=name,
        args=args,
        dtype=dtype if args.dtype == "auto" else getattr(torch, args.dtype),
        save_dtype=pretrained.saved_dtype(args.dtype, config, plan.fake_quantizes),
        gpu=True,
        free=int(free),
        host=int(host),
        seqlen=seqlen,
        batch_size=args.batch_size or batch_size,
        schedule=schedule or None,
        windows=-(-args.nsamples // ranks) if plan.calibrated else 0,
        tests=-(-tests // ranks),
        compared=-(-len(compared_windows(tests)) // ranks),
        held_out=16 if schedule else 0,
        quantized=bool(args.load_bit),
        ranks=ranks,
    )
    many = memory.too_many or (schedule and ranks > 1)
    fetched = bool(args.offload_folder or (memory.separable and many))
    return replace(memory, fetched=fetched)
