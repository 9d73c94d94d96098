"""Estimate the memory of a run in one rank, in bytes by stage and term, before weights are read.

    memory = local_memory(run)
    memory.stages["train"]      # {"weights": ..., "teacher": ..., "masters": ..., ...}
    memory.fits()               # whether every stage fits into the free memory
    memory_of(config, "--prune_method admm", free=24e9).table()  # for another machine

Each step states its bytes beside its code (`solver_bytes`, `quantized_numbers`, `training_bytes`);
`Memory` adds them up. Terms of `stages` and `on_host` are resident for a stage, or certainly at
some moment of it. They decide whether blocks are offloaded, and where hidden states are. If their
sum exceeds the free memory, of the device or of the host, the run is refused. Terms of `passing`
are estimates for a batch; they count in training alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import nn

from ..calibration.allocation import WINDOWS as ALLOCATION_WINDOWS
from ..calibration.planned_inputs import solver_bytes
from ..data.samples import Windows
from ..data.training import HELD_OUT, TrainingText
from ..data.windows import TestSet
from ..formats.grids import Types
from ..formats.registry import FORMATS
from ..methods.base import PruningMethod
from ..methods.gptq import GPTQ
from ..methods.registry import method_of
from ..methods.sparsity import EXPERTS, SORTED, Passes
from ..model.blocks import GPU_LOGIT_BYTES, LOGIT_BYTES
from ..model.checkpoint import Checkpoint, weight_bytes
from ..model.device import checkpoint_dtype, default_batch_size, saved_dtype
from ..model.linears import linears_of
from ..model.matrix import FLOAT, PrunableLinear
from ..model.pretrained import LONGEST_WINDOW
from ..model.reference import local_windows
from ..model.skeleton import build_skeleton, decoder_blocks
from ..offload.sharded import can_share
from ..stages.quantize import quantized_numbers
from ..stages.recover import TrainSchedule, training_bytes
from ..util import progress
from ..util.errors import UserError
from ..util.host import available, gib
from ..util.ranks import DistContext
from .flags import FLAGS, Flag, build_parser, shown
from .plan import Flags
from .run import Model, RunPlan, kept_parts
from .windows import RunWindows

BITS = {"4": 4.5, "8": 8.1}  # per weight with --load_bit, including scales (formula)
# activations of a batch in units of its hidden states, measured on LLaMA, whose MLP is 3 to 4 times
# as wide: in a forward pass, and kept in a block for its backward pass
COMPUTED, KEPT = 11, 40
LOGITS = 4  # copies of a chunk of logits: logits, log-probabilities, the teacher's, a gradient
CACHED = 8  # inputs of a block's linear layers, in hidden states (formula for LLaMA)
SHARD = 5 * 10**9  # largest file of a saved model, in bytes
ROOM = 2  # blocks are offloaded if this many times the weights exceed the free memory
HIDDEN_ROOM = 4  # hidden states are on the host if this many times their size exceeds the rest
TESTS = 256  # test windows of `memory_of`
GPUS = 2, 4, 8, 16, 32, 64  # numbers of GPUs that can share the trained weights
Table = dict[str, dict[str, int]]  # {stage: {term: bytes}}


def flags_of(stage: str) -> list[Flag]:
    """Return the flags of a stage's step of the run, the cheapest way to less memory first."""
    step = "recover" if stage == "train" else stage
    return [flag for flag in reversed(FLAGS) if flag.step == step]


@dataclass(frozen=True, eq=False)
class Memory:
    """A run's memory in one rank; `offloaded`: blocks are on the device one at a time."""

    run: RunPlan
    free: int  # bytes on the device
    host: int  # bytes on the host
    ranks: int = 1
    offloaded: bool = False

    @property
    def flags(self) -> Flags:
        return self.run.flags

    @property
    def model(self) -> Model:
        return self.run.model

    @property
    def gpu(self) -> bool:
        return self.run.device.type != "cpu"

    @property
    def is_stored(self) -> bool:
        """Whether the model's files are quantized or packed."""
        return bool(getattr(self.model.config, "quantization_config", None))

    @property
    def windows(self) -> int:
        """This rank's calibration windows."""
        return self.run.dist.count(len(self.run.windows.calibration or ()))

    @property
    def separable(self) -> bool:
        """Whether blocks can be offloaded."""
        quantized = self.flags.load_bit or self.is_stored
        return not quantized and can_share(self.model.blocks)

    @property
    def on_host_alone(self) -> bool:
        """Whether a single rank trains blocks that are fetched from the host one at a time."""
        return bool(self.offloaded and self.run.schedule and self.ranks == 1)

    def wants_offloading(self, local_size: int = 1) -> bool:
        """Whether blocks should be offloaded: if asked for, shared by ranks, or short of memory."""
        needed = (self.run.schedule and self.ranks > 1) or (not self.gpu and local_size > 1)
        if self.gpu and not needed:
            most = ROOM * self.weights + self._teacher_at("measure")
            needed = any(self.needed(stage) > self.free for stage in self.stages)
            needed |= most > self.free and not self.run.schedule  # training them is slow
        return bool(self.flags.offload_folder or (self.separable and needed))

    def _shard(self, size: int) -> int:
        """Return a rank's shard of trained numbers or bytes."""
        return -(-size // self.ranks) if self.run.schedule and self.offloaded else size

    @cached_property
    def weights(self) -> int:
        """Bytes of all weights on the device, or of the tables and one block."""
        if self.is_stored:
            files = weight_bytes(self.flags.model)  # 0 for a model on the Hub
            return max(files, self._tables if files else 0)
        inside = sum(self._inside)
        if self.flags.load_bit:
            inside = int(inside // self.model.dtype.itemsize * BITS[self.flags.load_bit] / 8)
        return self._tables + (self._block if self.offloaded else inside)

    @cached_property
    def _inside(self) -> list[int]:
        """Bytes of each block."""
        return self._sizes(self.model.skeleton)

    def _sizes(self, model: nn.Module) -> list[int]:
        """Return the bytes of each block; a weight that several share counts in the first."""
        seen: set[int] = set()
        sizes = []
        for block in model.get_submodule(self.model.blocks_name):
            new = {id(one): one.numel() for one in block.parameters() if id(one) not in seen}
            seen |= new.keys()
            sizes.append(sum(new.values()) * self.model.dtype.itemsize)
        return sizes

    @property
    def _block(self) -> int:
        """Bytes of the largest block."""
        return max(self._inside)

    @cached_property
    def _tables(self) -> int:
        """Bytes outside the blocks: embedding, head, norms, other towers, buffers."""
        return self._outside(self.model.skeleton)

    def _outside(self, model: nn.Module) -> int:
        """Return the bytes outside the blocks."""
        inside = {id(one) for one in model.get_submodule(self.model.blocks_name).parameters()}
        outside = (one.numel() for one in model.parameters() if id(one) not in inside)
        buffers = sum(one.nbytes for one in model.buffers())
        return buffers + sum(outside) * self.model.dtype.itemsize

    def _teacher_at(self, stage: str) -> int:
        """Return the teacher's bytes: a separate model, or a copy of the blocks.

        If its blocks are fetched, they are on the disk until training, and then shared by ranks.
        """
        teacher = self.run.teacher
        if stage in ("load", "save") or not (teacher or self.run.schedule):
            return 0
        inside = sum(self._sizes(teacher.skeleton) if teacher else self._inside)
        if self.offloaded and self.run.fetches_teacher:
            inside = self._shard(inside) if stage == "train" and self.ranks > 1 else 0
        if not teacher:
            return inside
        head = len(teacher.rows or ()) * self.model.width  # a trimmed model's part of it, beside it
        return inside + self._outside(teacher.skeleton) + head * self.model.dtype.itemsize

    def stream(self, windows: int) -> int:
        """Return the bytes of the hidden states of windows."""
        numbers = windows * self.run.windows.seqlen * self.model.width
        return numbers * self.model.dtype.itemsize

    @cached_property
    def _streams(self) -> dict[str, int]:
        """Bytes of the hidden states that a stage holds between blocks, besides a batch's."""
        streams, windows = {}, max(1, self.windows)
        if self._passes.gradients:  # before every block, and the gradient
            few = min(-(-ALLOCATION_WINDOWS // self.ranks), windows)
            streams["allocate"] = self.stream(few) * (len(self._inside) + 1)
        elif self._passes.outliers:
            streams["allocate"] = self.stream(windows)
        for stage, method in self._methods.items():
            if method.observes:
                streams[stage] = self.stream(windows) * (1 + method.dense_stream)
        return streams

    @property
    def _passes(self) -> Passes:
        """What is measured in the dense model: for pruning, or the cost of a tensor's types."""
        flags, passes = self.flags, Passes(False, False)
        if "prune" in self._solved:
            passes = Passes.of(flags.allocation, flags.method_class)
        return Passes(passes.outliers, passes.gradients or bool(flags.megabytes))

    @cached_property
    def masks(self) -> int:
        """Bytes of attention masks, bools, of windows with several documents."""
        windows = self.run.windows
        sets = [windows.calibration, *(test.windows for test in windows.tests)]
        masked = any(each and each.positions is not None for each in sets)
        return masked * self.windows * windows.seqlen**2

    @cached_property
    def left(self) -> int:
        """Bytes that pruning and quantization leave on the device for hidden states."""
        # an offloaded block arrives before the one before it is freed
        weights = self.weights + self._block * self.offloaded
        solver = max(map(self._solving, self._solved), default=0)
        return self.free - self._teacher_at("measure") - weights - solver - self.masks

    @cached_property
    def hidden_on_device(self) -> bool:
        """Whether hidden states between blocks are on the device; else they are on the host."""
        hidden = max(self._streams.get("allocate", 0), 2 * self.stream(self.windows))
        return not self.gpu or HIDDEN_ROOM * hidden < self.left

    @cached_property
    def tests_at_once(self) -> int | None:
        """Test windows that pass through offloaded blocks at a time, in whole batches."""
        if not self.offloaded:
            return None
        room = (self.left if self.hidden_on_device else self.host) // HIDDEN_ROOM
        batches = max(1, room // self.stream(self.run.batch_size))
        return batches * self.run.batch_size

    @cached_property
    def cache_inputs(self) -> bool:
        """Whether memory suffices to cache a block's inputs, which saves passes through it."""
        hidden = 2 * self.stream(self.windows)
        return self.left - hidden > CACHED * hidden

    @cached_property
    def checkpointed(self) -> bool:
        """Whether training recomputes a block's activations."""
        if not self.run.schedule or self.on_host_alone:
            return self.on_host_alone
        kept = KEPT * len(self._inside) * self.stream(self.run.batch_size)
        return self.total("train") + kept + self._logits > self.free

    @property
    def _logits(self) -> int:
        """Bytes of a batch's logits, in as many chunks as needed."""
        vocabulary = self.model.skeleton.get_input_embeddings().num_embeddings
        most = GPU_LOGIT_BYTES if self.gpu else LOGIT_BYTES
        tokens = self.run.batch_size * self.run.windows.seqlen
        return LOGITS * min(most, FLOAT * tokens * vocabulary)

    @property
    def _methods(self) -> dict[str, type[PruningMethod]]:
        """The method of each stage that has one."""
        methods = {"prune": method_of(self.flags.prune_method)} if self.flags.prune_method else {}
        return methods | ({"quantize": GPTQ} if self.flags.quantizes else {})

    @property
    def _solved(self) -> list[str]:
        """The stages with a solver for each linear layer."""
        whole = {"prune"} if self.flags.removes == EXPERTS else set()
        return [stage for stage in self._methods if stage not in whole]

    def _solving(self, stage: str) -> int:
        return sum(self._solver(stage).values())

    def _solver(self, stage: str) -> dict[str, int]:
        """Return the terms of solving a block's linear layers: sums over tokens, and the solver."""
        method, neurons = self._methods[stage], stage == "prune" and bool(self.flags.removes)
        at_most = solver_bytes(method, self.model.inputs, neurons)
        if method.dense_stream:
            at_most["dense block"] = self._block
        masks_of_rows = method.workspace is not PruningMethod.workspace or self.flags.sparsity.m
        if self.gpu and not masks_of_rows and not neurons:
            largest = max(prod(linear.shape) for linear in self._linears)
            at_most["solver"] = max(at_most["solver"], SORTED * largest)
        return at_most

    @cached_property
    def _training(self) -> dict[str, int]:
        """Terms of training."""
        return training_bytes(
            self.model.small,
            self.model.blocks_name,
            self.run.schedule,
            dtype=self.model.dtype,
            save_dtype=self.model.save_dtype,
            quantized=self.flags.quantizes,
            shard=self._shard,
        )

    @cached_property
    def stages(self) -> Table:
        """{stage: {term: bytes}}, resident on the device; on a CPU, all terms."""
        return self._table(True)

    @cached_property
    def on_host(self) -> Table:
        """{stage: {term: bytes}}, resident on the host, if the device is another."""
        return self._table(False)

    def _table(self, on_device: bool) -> Table:
        return {
            stage: {name: size for name, size, where in self._terms(stage) if where == on_device}
            for stage in self._active
        }

    @property
    def _active(self) -> list[str]:
        """The stages of this run."""
        flags = self.flags
        taken = {
            "load": True,
            "measure": True,
            "allocate": any(self._passes),
            "prune": flags.prune_method,
            "quantize": flags.quantizes,
            "train": self.run.schedule,
            "save": flags.save_model,
        }
        return [stage for stage, takes in taken.items() if takes]

    def _terms(self, stage: str) -> Iterator[tuple[str, int, bool]]:
        """Yield term, bytes, and whether it is on the device."""
        dist, tests = self.run.dist, self.run.windows.tests
        yield "weights", self._weights_at(stage), True
        if teacher := self._teacher_at(stage):
            yield "teacher", teacher, True
        size = self._streams.get(stage, 0)
        if stage == "measure" and self.offloaded:  # otherwise each batch goes through all blocks
            windows = sum(dist.count(len(each.windows)) for each in tests)
            size = self.stream(min(windows, self.tests_at_once))
        if size:
            yield "hidden states", size, self.hidden_on_device
        if stage in self._solved:
            for name, size in self._solver(stage).items():
                yield name, size, True
        if stage == "prune" and self._passes.gradients:  # float64, by output
            yield "output costs", 8 * sum(linear.shape[0] for linear in self._linears), True
        if self.flags.quantizes and self.run.schedule:  # the start of training
            numbers = quantized_numbers(self.run.form, self._linears)
            each = self.run.schedule.master_dtype(self.model.save_dtype).itemsize
            if stage == "quantize":
                yield "masters", each * self._shard(numbers), not self.on_host_alone
            if stage in ("quantize", "train", "save"):
                size = FLOAT * numbers // self.run.form.group
                where = stage == "save" or not self.on_host_alone
                yield "scales", size if stage == "save" else self._shard(size), where
        if stage == "train":
            for name, size in self._training.items():
                yield name, size, not self.on_host_alone
            sizes, each = self._sizes(self.model.small), self.model.dtype.itemsize
            if self.on_host_alone:
                teacher = self.run.teacher
                read = sum(self._sizes(teacher.skeleton) if teacher else self._inside)
                yield "blocks", sum(sizes) + read, False
                yield "gradient of a block", max(sizes), True
            elif self.offloaded:  # the block that is gathered next, a gradient, its float32 sum
                yield "passing blocks", (2 * each + FLOAT) * max(sizes) // each, True
            yield "best weights", self._shard(sum(self._sizes(self.model.small))), not self.gpu
            held_out = local_windows(len(self.run.windows.training.held_out), dist)
            yield "held-out states", self.stream(len(held_out)), not self.gpu
        if stage != "load" and self.flags.has_dense:
            compared = sum(len(local_windows(len(each.windows), dist)) for each in tests)
            yield "dense states", self.stream(compared), not self.gpu
        if stage == "save":  # one file at a time
            size = min(SHARD, self._weights_at("save"))
            yield "copies for the disk", size, not self.gpu

    def _weights_at(self, stage: str) -> int:
        """Return the bytes of weights on the device, fewer after removals."""
        size = self.weights
        if stage in ("quantize", "train", "save") and isinstance(self.run.form, Types):
            size += self._tables  # the dense model keeps its own
        if stage in ("train", "save") and not self.offloaded:
            size -= sum(self._inside) - sum(self._sizes(self.model.small))
        if stage == "train" and self.offloaded and self.ranks > 1:  # beside a gathered block
            size += self._shard(sum(self._sizes(self.model.small)))
        return size

    @cached_property
    def _linears(self) -> list[PrunableLinear]:
        """The linear layers of all blocks, after removals."""
        return linears_of(self.model.small_blocks)

    @cached_property
    def passing(self) -> Table:
        """Estimates of a batch's memory on the device."""
        batch, blocks = self.stream(self.run.batch_size), len(self._inside)
        # with checkpoints, the inputs of all blocks are kept, and the graph of one
        train = KEPT + blocks if self.checkpointed else KEPT * blocks
        graph = {"allocate": KEPT, "train": train}
        table: Table = {}
        for stage in self._active:
            table[stage] = {"activations": graph.get(stage, COMPUTED) * batch}
            if stage in ("measure", "allocate", "train"):
                table[stage]["logits"] = self._logits
            elif stage in ("prune", "quantize"):
                table[stage]["masks"] = self.masks
                if self.cache_inputs:  # upper limit, for methods that take inputs in order
                    table[stage]["inputs"] = CACHED * self.stream(self.windows)
        return table

    def total(self, stage: str) -> int:
        """Return the resident bytes on the device in a stage; 0 if the run lacks the stage."""
        return sum(self.stages.get(stage, {}).values())

    def needed(self, stage: str) -> int:
        """Return `total`, in training with the activations of a batch."""
        return self.total(stage) + (sum(self.passing[stage].values()) if stage == "train" else 0)

    def needed_of_host(self, stage: str) -> int:
        """Return the bytes of a stage that are on the host, if the device is another."""
        return sum(self.on_host.get(stage, {}).values())

    def fits(self, stage: str | None = None) -> bool:
        """Return whether a stage, or all, fit into the free memory of the device and the host."""
        return all(
            self.needed(each) <= self.free and self.needed_of_host(each) <= self.host
            for each in ([stage] if stage else self.stages)
        )

    def check(self) -> None:
        """Raise UserError if a stage does not fit, with flags that would make it fit.

        On a CPU only training is refused, since the system can drop weights that were read from a
        file, and read them again.
        """
        progress.on_step("check memory", 0)
        for stage in sorted(self.stages, key=lambda stage: stage != "train"):  # training first
            if self.fits(stage) or not (self.gpu or stage == "train"):
                continue
            begun_by = {flag.name: flag.doing for flag in flags_of(stage) if flag.doing}
            flag, doing = next(iter(begun_by.items()), ("model", "the model"))
            device, given = "GPU" if self.gpu else "machine", shown(self.flags, flag)
            short = self.needed_of_host(stage) > self.host
            whole = replace(self, offloaded=self.offloaded and not (short and self.on_host_alone))
            problem = f"{doing} needs {gib(whole.needed(stage))} of memory, and the {device} "
            problem += f"has {gib(self.free)} free"
            if short:
                host = f"needs {gib(self.needed_of_host(stage))} of the host's memory, of which "
                host += f"{gib(self.host)} are free"
                alone = f"{problem}; with one block at a time it {host}"
                problem = alone if self.on_host_alone else f"{doing} {host}"
            if ways := [*self._ways(stage)]:
                raise UserError(given, problem, f"Use {' or '.join(ways)}")
            fix = f"Leave {given} out" if stage == "train" else "Use --device cpu"
            if short and stage != "train":
                fix = "Use fewer windows (--nsamples, --seqlen)"
            problem += ", even with one block at a time" * (self.offloaded and not short)
            raise UserError(given, problem, f"{fix}, or use a smaller model")

    def _ways(self, stage: str) -> Iterator[str]:
        """Yield flags with which a stage would fit, and the memory that it would need."""
        others = {"": self} if stage == "train" else {}
        alone = replace(self, run=replace(self.run, batch_size=1))
        if stage == "train" and self.run.batch_size > 1 and alone.fits():
            yield "--batch_size 1" + f" ({gib(alone.needed(stage))})" * (not self.on_host_alone)
        for name, value in ((flag.name, each) for flag in flags_of(stage) for each in flag.smaller):
            flags, schedule = copy.copy(self.flags), self.run.schedule
            if getattr(flags, name) == value or (stage == "prune" and flags.removes):
                continue
            setattr(flags, name, value)
            if stage == "train":
                schedule = replace(schedule, **{name.removeprefix("recover_"): value})
            other = replace(self, run=replace(self.run, flags=flags, schedule=schedule))
            if self.gpu:
                other = replace(other, offloaded=False)
                other = replace(other, offloaded=other.wants_offloading())
            if other.fits() if stage == "train" else other.fits(stage):
                size = gib(other.needed(stage))
                short = self.needed_of_host(stage) > self.host and not self.on_host_alone
                if other.on_host_alone or short:
                    size = f"{gib(other.needed_of_host(stage))} of the host's"
                yield f"--{name} {value}" + f" ({size})" * (stage != "allocate")
            elif stage == "train":
                others[f" with --{name} {value}"] = other
        fewest = GPUS[-1] + 1
        for how, other in others.items() if self.gpu else ():
            for ranks in [each for each in GPUS if self.ranks < each < fewest]:
                many = replace(other, ranks=ranks, offloaded=True)
                if many.separable and many.fits(stage):
                    yield f"{ranks} such GPUs with torchrun{how} ({gib(many.needed(stage))} each)"
                    fewest = ranks
                    break

    def line(self) -> str:
        """Return one line for the user: the largest terms, and where hidden states are."""
        weights = replace(self, offloaded=False).weights
        parts = [f"weights {gib(weights)}" + ", one block at a time" * self.offloaded]
        if teacher := self._teacher_at("train" if self.run.schedule else "measure"):
            parts.append(f"teacher {gib(teacher)}")
        host = " on the host" * self.on_host_alone
        where = f" on the {'GPU' if self.hidden_on_device else 'host'}" * self.gpu
        every = [term for stage in self._active for term in self._terms(stage)]
        hidden = max((size for name, size, _ in every if name == "hidden states"), default=0)
        parts.append(f"hidden states {gib(hidden)}{where}")
        if self._solved:
            parts.append(f"solver {gib(max(map(self._solving, self._solved)))}")
        if self.run.schedule:
            parts.append(f"training {gib(sum(self._training.values()))}{host}")
        note = "; training recomputes activations" * self.checkpointed
        return f"memory: {', '.join(parts)}, of {gib(self.free)} free{note}"

    def table(self) -> str:
        """Return resident bytes by stage and term, with their sums, as a Markdown table."""
        rows = ["| stage | resident | terms |", "|---|---|---|"]
        for stage, terms in self.stages.items():
            parts = ", ".join(f"{name} {gib(size)}" for name, size in terms.items() if size)
            rows.append(f"| {stage} | {gib(self.total(stage))} | {parts} |")
        return "\n".join(rows)


def local_memory(run: RunPlan) -> Memory:
    """Return the memory of a run on this machine; every rank must call this."""
    dist, device = run.dist, run.device
    host = free = available() // dist.local_size
    if device.type != "cpu":  # torch's own cache is free too
        free = torch.get_device_module(device).mem_get_info(device)[0]
        free += torch.accelerator.memory_reserved(device)
        free -= torch.accelerator.memory_allocated(device)
    memory = Memory(run, free, host, dist.size)
    if run.flags.offload_folder and not memory.separable:
        raise UserError(
            f"--offload_folder {run.flags.offload_folder}",
            "the model's blocks share weights, or are quantized",
            "Leave the flag out",
        )
    wanted = memory.wants_offloading(dist.local_size)
    return replace(memory, offloaded=any(dist.all_gather_object(wanted)))


def memory_of(
    config: Any, flags: str = "", *, free: float, ranks: int = 1, host: float = 2**50
) -> Memory:
    """Return the memory of a run on GPUs with `free` bytes each; needs no weights, texts or GPU.

    `host`: free bytes of the host for each of them.

    `config` is a config of transformers, and `flags` are those of main.py without texts. Each of
    `ranks` has its share of --nsamples and of 256 test windows.
    """
    flags = build_parser().parse_args(["--model", "model", *flags.split()])
    checkpoint, device = Checkpoint(flags.model), torch.device("cuda")
    skeleton = build_skeleton(config, checkpoint)
    name, _ = decoder_blocks(skeleton)
    parts = kept_parts(flags, config, checkpoint, skeleton, name) if flags.removes else ()
    dtype = checkpoint_dtype(config)
    dtype = dtype if flags.dtype == "auto" else getattr(torch, flags.dtype)
    save_dtype = saved_dtype(flags.dtype, config, flags.fake_quantizes)
    seqlen, schedule, training = flags.seqlen or LONGEST_WINDOW, None, None
    model = Model(checkpoint, config, skeleton, name, dtype, save_dtype, seqlen, *parts)
    dist = DistContext(device, alone=True)
    dist.size, dist.rank = ranks, ranks - 1  # the last rank has the largest share

    def windows(count: int) -> Windows:
        return Windows(torch.empty(count, seqlen, dtype=torch.long, device="meta"))

    if flags.recover:
        how = dict(rank=flags.recover_rank, optimizer=flags.recover_optimizer)
        schedule = TrainSchedule(flags.recover, seqlen, **how)
        training = TrainingText(windows(1), torch.zeros(1), windows(HELD_OUT[1]), {})
    calibration = windows(flags.nsamples) if flags.calibrated else None
    tests = [TestSet("", windows(TESTS), {})]
    drawn = RunWindows(seqlen, calibration=calibration, tests=tests, training=training)
    plan = RunPlan(
        flags=flags,
        dist=dist,
        model=model,
        windows=drawn,
        batch_size=flags.batch_size or default_batch_size(device, seqlen, model.width),
        schedule=schedule,
        form=FORMATS.get(flags.format),
    )
    memory = Memory(plan, int(free), int(host), ranks)
    return replace(memory, offloaded=memory.wants_offloading())
