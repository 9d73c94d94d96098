"""Recovery: a short fine-tuning of the kept weights, with the dense model as teacher.

    python main.py --model MODEL --prune_method admm --sparsity_type 2:4 --recover 500000 ...

It trains the weights that pruning kept, and the norms and biases of the decoder blocks; zeros stay
zeros. The loss is the KL divergence of the model's next-token distribution from the teacher's, with
a share of cross-entropy with the text. It is computed a few positions at a time, so that the logits
of a whole batch are never in memory. During training the model holds its weights as they will be
saved: rounded to the save dtype, or to a 4-bit grid (`Grid`). Float32 master weights keep what
rounding would lose. They receive the gradients of the rounded weights (straight-through), so the
model that is measured is the one that is saved. A quantized model (quantize.py) is trained from its
quantized weights: the masters are the values before rounding, the scales stay fixed, and the
untrained model is the first candidate. If masters do not fit, `rank` trains updates B A of every
matrix instead, masked and merged into it (PERP, arXiv 2312.15230).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..data.samples import Windows, as_windows, join_rows
from ..data.training import TrainingText
from ..eval import perplexities
from ..formats.grids import Grid
from ..model.blocks import BlockRunner, iter_logits
from ..model.linears import linears_of
from ..model.matrix import FLOAT, SaveDtypes
from ..model.reference import DenseReference, dense_states, tail_of
from ..offload.fetched import FetchedWeights
from ..offload.sharded import ShardedWeights, WholeWeights, answered, is_sharded, local, shard_of
from ..packed.errors import PackedError
from ..util import progress
from ..util.deterministic import deterministic
from ..util.errors import UserError
from ..util.ranks import DistContext

TARGET_STEPS = 256  # optimizer steps, subject to the limits of a step below
LEAST, MOST = 2**8, 2**16  # tokens per step
RATE = 0.6  # see `default_rate`
QUANTIZED_RATE = 0.25  # factor if nothing was pruned: quantization costs little, more adds noise
CROSS_ENTROPY = 0.2  # default weight of the cross-entropy term
WARM_UP = 0.1  # share of the steps
LAST_RATE = 0.05  # learning rate at the end, as a share of the peak
BETAS = (0.9, 0.95)
GRADIENT_NORM = 1.0  # a step's gradient is clipped to it
MEASURED = 10  # evaluations on the held-out windows
# bytes of an optimizer's averages per trained number: two float32, or two bytes with a float32
# scale per 256; small tensors have float32 (bitsandbytes' formulas)
AVERAGES, SMALL_TENSOR = {"adamw": 8, "adamw8bit": 2 + 2 * 4 / 256}, 4096
CHECKPOINT_SECONDS = 600  # maximum time between two training checkpoints


@dataclass(frozen=True)
class TrainSchedule:
    """Length, steps and learning rate: the training depends on these and its text alone."""

    tokens: int  # upper limit; only whole steps are made
    seqlen: int
    rate: float | None = None  # peak learning rate; None: default_rate
    rank: int | None = None
    optimizer: str = "adamw"  # or adamw8bit
    ce_weight: float = 0.0  # weight of cross-entropy in the loss; the rest is KL
    seed: int = 0
    least: int = LEAST  # tokens per step
    clip: float = GRADIENT_NORM
    cosine_decay: bool = True  # off where weights stay on a grid (constant after warm-up)
    pruned: bool = True  # False: the model was only quantized
    ranks: int = 1  # each has at least one window per step

    @property
    def windows(self) -> int:
        """Windows per step."""
        return max(self.windows_alone, min(self.ranks, self.tokens // self.seqlen))

    @property
    def windows_alone(self) -> int:
        """Windows per step of a single rank."""
        wanted = min(max(self.tokens // TARGET_STEPS, self.least), MOST, self.tokens)
        return max(1, wanted // self.seqlen)

    @property
    def steps(self) -> int:
        return self.tokens // (self.windows * self.seqlen)

    def master_dtype(self, save_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of quantized weights' masters; low rank has no memory for float32."""
        return save_dtype if self.rank else torch.float32

    def rate_at(self, step: int) -> float:
        """Learning rate: linear warm-up, then cosine decay if `cosine_decay`."""
        rise = min(1.0, (step + 1) / math.ceil(WARM_UP * self.steps))
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.cosine_decay else 1.0
        return self.rate * rise * (LAST_RATE + (1 - LAST_RATE) * fall)

    @property
    def measured(self) -> set[int]:
        """Numbers of steps after which the held-out windows are measured."""
        return {math.ceil(self.steps * part / MEASURED) for part in range(1, MEASURED + 1)}


def default_rate(
    matrices: Iterable[Tensor], width: int, blocks: int, dist: DistContext | None = None
) -> float:
    """Return the peak learning rate for a model with these matrices, of any size.

    AdamW moves every weight by about the rate, in step with its input. So a matrix's outputs change
    by rate * sqrt(width) / (root mean square of its weights), relatively, and the changes of all
    blocks add up. RATE bounds this total relative change. With `dist`, each rank gives its part.
    """
    squares, count = 0.0, 0
    for matrix in matrices:
        squares += matrix.float().square().sum(dtype=torch.float64).item()
        count += matrix.numel()
    if dist:
        squares, count = map(sum, zip(*dist.all_gather_object((squares, count)), strict=True))
    return RATE * (squares / max(count, 1)) ** 0.5 / (width**0.5 * blocks)


class FullRank:
    """Trains every weight of a parameter; in a matrix only the weights that are not zero.

    If the parameter is sharded along `dim`, all tensors here are this rank's shard, except leaves
    that are `replicated`. `dtype` is the save dtype. For a quantized parameter, `quantized` is
    (master weights, grid), and the parameter holds the masters rounded to the grid. The masters are
    not copied, since memory would not suffice.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        is_matrix: bool,
        dtype: torch.dtype,
        quantized: tuple[Tensor, Grid] | None = None,
        dim: int | None = None,
    ) -> None:
        self.parameter, self.is_matrix, self.dtype, self.grid = parameter, is_matrix, dtype, None
        self.dim = dim
        masters = held = local(parameter)
        if quantized:
            masters, self.grid = quantized
            rounded = self.grid.rounded(masters)
            masters.copy_(torch.where(rounded == held, masters, held.to(masters.dtype)))
        self.leaves = self.begin(masters)  # trained tensors, float32

    @property
    def replicated(self) -> set[str]:
        return {"master"} if self.dim is None else set()

    def begin(self, masters: Tensor) -> dict[str, Tensor]:
        exact = self.parameter.dtype == self.dtype == torch.float32 or self.grid
        self.master = masters if exact else masters.to(torch.float32, copy=True)
        return {"master": self.master}

    def take_gradient_(self, parameter: Tensor) -> None:
        """Add the parameter's gradient to that of the leaves. A zero gets none, and AdamW without
        decay leaves a weight that never had a gradient as it is, bit for bit."""
        gradient = local(parameter.grad)
        if self.is_matrix:
            gradient = gradient.masked_fill_(self.master == 0, 0)
        self.master.grad += gradient
        parameter.grad = None

    def values(self) -> Tensor:
        """Return the trained values, float32, before rounding."""
        return self.master

    def write_(self) -> None:
        """Write the trained values into the parameter, rounded."""
        values, held = self.values(), local(self.parameter)
        if self.grid:
            held.copy_(self.grid.rounded(values))
        elif values.data_ptr() != held.data_ptr():
            held.copy_(values.to(self.dtype))


class LowRank(FullRank):
    """Adds a trained update B A to a matrix (..., rows, columns) where it is not zero.

    A is drawn and scaled so that a step moves a weight about as far as in `FullRank`.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        dtype: torch.dtype,
        quantized: tuple[Tensor, Grid] | None,
        rank: int,
        generator: torch.Generator,
        dim: int | None,
        dist: DistContext,
    ) -> None:
        self.rank, self.generator, self.dist = rank, generator, dist
        super().__init__(parameter, True, dtype, quantized, dim)

    @property
    def replicated(self) -> set[str]:
        """Ranks that share the rows of a matrix have one A; of a stack each has A and B."""
        if self.dim is None:
            return {"up", "down"}
        return set() if self.base.dim() > 2 else {"down" if self.dim == 0 else "up"}

    def begin(self, masters: Tensor) -> dict[str, Tensor]:
        rank, device, shape = self.rank, masters.device, self.parameter.shape
        self.base = masters.to(self.dtype, copy=not self.grid)
        *stack, rows, columns = masters.shape
        down = torch.randn(*shape[:-2], rank, shape[-1], generator=self.generator) / rank**0.5
        if len(shape) > 2 or self.dim == 1:
            down = shard_of(down, self.dim, self.dist).clone()
        self.down = down.to(device)  # A
        self.up = torch.zeros(*stack, rows, rank, device=device)  # B
        return {"up": self.up, "down": self.down}

    def take_gradient_(self, parameter: Tensor) -> None:
        gradient = local(parameter.grad).masked_fill_(self.base == 0, 0).float()
        self.up.grad += gradient @ self.down.mT
        self.down.grad += self.up.mT @ gradient
        parameter.grad = None

    def values(self) -> Tensor:
        change = (self.up @ self.down).masked_fill_(self.base == 0, -0.0)  # keeps zeros as they are
        return self.base.float() + change


def trained_parameters(
    blocks: nn.Module, blocks_name: str, linears: set[str], outside: set[int]
) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Yield the path in the blocks of each trained parameter, it, and whether it is a matrix.

    `linears` names the trained linear layers' parameters. Norms and biases are trained too, and
    nothing whose id is in `outside`: those of parameters that other parts of the model have.
    """
    for path, parameter in blocks.named_parameters():
        is_matrix = f"{blocks_name}.{path}" in linears
        vector = parameter.dim() == 1 or path.endswith("bias")
        if id(parameter) not in outside and parameter.is_floating_point() and (is_matrix or vector):
            yield path, parameter, is_matrix


def outside_of(model: nn.Module, blocks_name: str) -> set[int]:
    """Return the ids of the parameters that a model has outside its blocks."""
    every = model.named_parameters(remove_duplicate=False)
    return {id(each) for name, each in every if not name.startswith(f"{blocks_name}.")}


def trained_parts(
    runner: BlockRunner,
    whole: bool = False,
    master_weights: dict[str, tuple[Tensor, Grid]] | None = None,
    rank: int | None = None,
    seed: int = 0,
    weights: WholeWeights | ShardedWeights | None = None,
) -> dict[str, FullRank]:
    """Return the trained parts by the parameters' names; parameters with two names once.

    These are the linear layers with zeros, all of them if `whole`, and the norms and biases of the
    blocks. Parameters shared with embeddings or head are not trained. Quantized weights are trained
    from their `master_weights` (see `Recoverer`), which are taken out. With `rank`, matrices get
    updates of this rank. `weights`: if not those of the model itself.
    """
    linears = set()
    weights = weights or WholeWeights(runner)
    for linear in runner.each_linear():
        if whole or bool((linear.raw_weight == 0).any()):
            linears.add(linear.parameter_name)
    outside = outside_of(runner.model, runner.name)
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for path, parameter, is_matrix in trained_parameters(
        weights.blocks, runner.name, linears, outside
    ):
        name, dim = f"{runner.name}.{path}", weights.dims.get(path)
        dtype = runner.weights.saved.of(name, parameter)
        quantized = master_weights.pop(name, None) if master_weights else None
        if is_matrix and rank:
            more = rank, generator, dim, runner.dist
            parts[name] = LowRank(parameter, dtype, quantized, *more)
        else:
            parts[name] = FullRank(parameter, is_matrix, dtype, quantized, dim)
    return parts


def training_bytes(
    model: nn.Module,
    blocks_name: str,
    schedule: TrainSchedule,
    *,
    dtype: torch.dtype,
    save_dtype: torch.dtype,
    quantized: bool,
    shard: Callable[[int], int],
) -> dict[str, int]:
    """Return what training holds beside the model, before weights are read: bytes by term.

    All linear layers count as trained; `quantized`: on a grid. The model, which may be a skeleton
    of another dtype, computes in `dtype`. `shard` returns a rank's part of a number.
    """
    rank, eight_bits = schedule.rank, schedule.optimizer == "adamw8bit"
    saved = SaveDtypes(model, save_dtype)
    blocks = model.get_submodule(blocks_name)
    linears = {linear.parameter_name for linear in linears_of(blocks, blocks_name)}
    terms = dict.fromkeys(("masters", "gradients", "averages"), 0)
    for path, one, is_matrix in trained_parameters(
        blocks, blocks_name, linears, outside_of(model, blocks_name)
    ):
        size, trained = one.numel(), shard(one.numel())
        saved_as, low_rank = saved.of(f"{blocks_name}.{path}", one), is_matrix and rank
        if low_rank:  # B and A, beside a copy of the matrix
            *stack, rows, columns = one.shape
            replicated = 0 if stack else rank * columns  # A
            trained = math.prod(stack) * rank * (rows + columns) - replicated
            trained = shard(trained) + replicated
            terms["masters"] += shard(size) * saved_as.itemsize
        elif is_matrix and eight_bits:
            terms["averages"] += shard(size)  # mask of zeros, which are set again
        # a parameter that is saved in float32 is its own master
        is_float32 = saved_as == dtype == torch.float32 and not (is_matrix and quantized)
        terms["masters"] += 0 if is_float32 and not low_rank else FLOAT * trained
        terms["gradients"] += FLOAT * trained
        small = trained < SMALL_TENSOR
        terms["averages"] += int(AVERAGES["adamw" if small else schedule.optimizer] * trained)
    return terms


def state_bytes(schedule: TrainSchedule) -> int:
    """Return the bytes per trained weight of a checkpoint, beside the best value of each."""
    return 0 if schedule.rank else FLOAT + int(AVERAGES[schedule.optimizer])


class Recoverer:
    """Trains the model of `runner` in place to predict as `teacher` does.

    `whole`: all linear layers of the blocks are trained, not only those with zeros.
    `master_weights`: masters and grids of the quantized ones, by their parameters' names, emptied
    as they are taken over. Keeps the weights with the lowest held-out loss. `curve` holds all
    measurements, `best` the index of the lowest; `scales` those of the grids, after a run, by every
    name of a parameter.
    """

    def __init__(
        self,
        runner: BlockRunner,
        teacher: BlockRunner,
        schedule: TrainSchedule,
        text: TrainingText,
        *,
        whole: bool = False,
        master_weights: dict[str, tuple[Tensor, Grid]] | None = None,
    ) -> None:
        self.runner, self.teacher, self.text = runner, teacher, text
        self.reference = DenseReference(tail_of(teacher), dense_states(teacher, [text.held_out]))
        kind = WholeWeights if runner.weights.resident else FetchedWeights
        self.weights = (ShardedWeights if is_sharded(runner) else kind)(runner, teacher)
        self.parts = trained_parts(
            runner, whole, master_weights, schedule.rank, schedule.seed, self.weights
        )
        self.grids = {name: part.grid for name, part in self.parts.items() if part.grid}
        rate = schedule.rate
        if rate is None:
            width = runner.model.config.get_text_config(decoder=True).hidden_size
            matrices = (
                local(part.parameter)
                for part in self.parts.values()
                # what each rank has whole counts in the main rank
                if part.is_matrix and (part.dim is not None or runner.dist.is_main)
            )
            rate = default_rate(matrices, width, len(runner.blocks), runner.dist)
            rate *= 1 if schedule.pruned else QUANTIZED_RATE
        # the weights decide these two
        self.schedule = schedule = replace(schedule, cosine_decay=not self.grids, rate=rate)
        self.trained = sum(part.parameter.numel() for part in self.parts.values())
        # off once an operation is not deterministic; ranks in step cannot repeat one
        self.strict = not self.weights.in_step
        # a power of two, exact in sums: in float16 the gradient of a mean over many tokens is 0
        half = any(one.dtype == torch.float16 for one in self.weights.blocks.parameters())
        self.scale = 2.0 ** (schedule.windows * schedule.seqlen).bit_length() if half else 1.0
        self.curve: list[dict[str, float]] = []  # tokens, held-out figures, mean loss of the steps
        self.best = 0  # index in the curve
        self.tokens, self.seconds = 0, 0.0  # set by `run`
        self.step_seconds = 0.0  # of the optimizer steps, without measuring and saving
        self.scales: dict[str, Tensor] = {}

    def summary(self) -> list[str]:
        """Return lines on what will be trained, and on each text that is read several times."""
        schedule = self.schedule
        how = f"updates of rank {schedule.rank} to" if schedule.rank else "training"
        alone = "" if schedule.ce_weight else ", distillation only"
        count = f"{len(self.grids)} of {len(self.parts)} tensors"
        titles = {grid.form.label for grid in self.grids.values()}
        grids = f", {count} as {' and '.join(sorted(titles))}," if titles else ""
        return [
            f"recovery: {how} {self.trained:,} weights{grids} in {schedule.steps} steps of "
            f"{schedule.windows * schedule.seqlen:,} tokens, "
            f"learning rate {schedule.rate:.3g}{alone}",
            *(
                f"recovery: a step has {schedule.windows} windows, not {schedule.windows_alone}, "
                f"since {schedule.ranks} ranks share it; the learning rate stays the same"
                for _ in range(schedule.windows > schedule.windows_alone)
            ),
            *self.weights.summary(
                [part.parameter.numel() for part in self.parts.values() if part.dim is None]
            ),
            *(
                f"recovery: {source['passes']} passes over {source['windows']} windows of "
                f"{source['name']}"
                for source in self.text.record["sources"]
                if source["passes"] > 1
            ),
        ]

    def line(self) -> str:
        """Return the line that reports the training."""
        first, best = self.curve[0], self.curve[self.best]
        if not self.best:
            return "recovery: training did not help; the model before it is kept"
        return (
            f"recovery: held-out loss {first['loss']:.4f} -> {best['loss']:.4f}, "
            f"perplexity {first['perplexity']:.4f} -> {best['perplexity']:.4f}, after "
            f"{best['tokens']} of {self.tokens} tokens"
        )

    def record(self) -> dict[str, Any]:
        """Return the record of the training for results.json, without its text and teacher."""
        schedule = self.schedule
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "step_seconds": round(self.step_seconds, 3),
            "steps": schedule.steps,
            "windows": schedule.windows,
            "rate": schedule.rate,
            "rank": schedule.rank,
            "optimizer": schedule.optimizer,
            "cross_entropy": schedule.ce_weight,
            "weights": self.trained,
            "curve": self.curve,
            "kept": self.curve[self.best],
        }

    def run(self, on_progress: Callable[..., None] = lambda tokens, note="": None) -> None:
        """Train, and leave the model with its best weights, rounded.

        Calls `on_progress(tokens, note)` after each step. Raises UserError if the loss is not
        finite.
        """
        began = time.perf_counter()
        steps, tokens = self.schedule.steps, self.schedule.windows * self.schedule.seqlen
        with self.weights:
            self._begin()
            state = self._resumed()
            if not state:
                self._write_()
                self._note(0, None)
                state = {"step": 0, "losses": [], "seconds": 0.0, "step_seconds": 0.0}
            first, losses, before = state["step"], state["losses"], state["seconds"]
            self.step_seconds = state["step_seconds"]
            on_progress(first * tokens)
            kept = time.monotonic()
            with self._gradients(), deterministic(self.runner.device, strict=False):
                for step in range(first, steps):
                    started = time.perf_counter()
                    loss = self._step(step)
                    self.step_seconds += time.perf_counter() - started
                    losses.append(loss)
                    measured = step + 1 in self.schedule.measured
                    if measured:
                        self._note((step + 1) * tokens, sum(losses) / len(losses))
                        losses = []
                    late = time.monotonic() - kept > CHECKPOINT_SECONDS
                    if self.weights.in_step:  # by the main rank's clock
                        late = self.runner.dist.all_gather_object(late)[0]
                    if self.weights.folder and (measured or late):
                        seconds = before + time.perf_counter() - began
                        state = {"step": step + 1, "losses": losses, "seconds": seconds}
                        state |= {"step_seconds": self.step_seconds}
                        state |= {"curve": self.curve, "best": self.best, "scale": self.scale}
                        self._save(state)
                        kept = time.monotonic()
                    on_progress(tokens, f"loss {loss:.4f}")
            for part, best in zip(self.parts.values(), self.best_values, strict=True):
                local(part.parameter).copy_(best)
            self.scales = self.weights.scales(self.grids)
        self.tokens = steps * tokens
        self.seconds = round(before + time.perf_counter() - began, 3)

    def _begin(self) -> None:
        """Make the optimizer, and one buffer for the gradients of all leaves."""
        every = [
            (kind in part.replicated, leaf)
            for part in self.parts.values()
            for kind, leaf in part.leaves.items()
        ]
        self.leaves = [leaf for _, leaf in sorted(every, key=itemgetter(0))]
        self.n_sharded = sum(leaf.numel() for replicated, leaf in every if not replicated)
        sizes = [leaf.numel() for leaf in self.leaves]
        # with one buffer, one sum over ranks serves all replicated leaves
        self.gradient = torch.zeros(sum(sizes), device=self.leaves[0].device)
        for leaf, gradient in zip(self.leaves, self.gradient.split(sizes), strict=True):
            leaf.grad = gradient.view_as(leaf)
        kind = partial(torch.optim.AdamW, fused=True)
        if self.schedule.optimizer == "adamw8bit":  # Dettmers et al., arXiv 2110.02861
            from bitsandbytes.optim import AdamW8bit as kind
        held = [leaf for leaf in self.leaves if leaf.numel()]  # a rank's part may be empty
        self.optimizer = kind(held, betas=BETAS, weight_decay=0.0)

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        """Within this context, gradients of the parameters are added to those of the leaves."""
        handles = []
        try:
            for part in self.parts.values():
                parameter = part.parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(part.take_gradient_))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for part in self.parts.values():
                part.parameter.requires_grad_(False)
                part.parameter.grad = None
            for leaf in self.leaves:
                leaf.grad = None

    def _step(self, step: int) -> float:
        """Take one optimizer step; return its loss in nats per token."""
        schedule = self.schedule
        loss, norm = self._scaled_gradient(step)
        while math.isfinite(loss.item()) and self.scale > 1 and not norm.isfinite():
            self.scale /= 16  # some number exceeds those of float16
            loss, norm = self._scaled_gradient(step)
        if not math.isfinite(loss.item()):
            raise self._diverged(step, "the loss is")
        self.gradient *= (schedule.clip / (norm + 1e-6)).clamp(max=1.0) / self.scale
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        # in 8-bit AdamW a zero moves with its quantization block
        strays = schedule.optimizer == "adamw8bit" and not schedule.rank
        masters = [part.master for part in self.parts.values() if strays and part.is_matrix]
        zeros = [(master, master == 0) for master in masters]
        self.optimizer.step()
        for master, zero in zeros:
            master.masked_fill_(zero, 0)
        try:
            self._write_()
        except PackedError:  # integers cannot hold nan
            raise self._diverged(step, "weights are") from None
        return loss.item()

    def _scaled_gradient(self, step: int) -> tuple[Tensor, Tensor]:
        """Fill the buffer with a step's gradient times `scale`; return the loss and its norm."""
        try:
            with answered(self.runner.dist):
                loss = self._accumulate_(step)
        except RuntimeError as error:
            if not self.strict or "deterministic" not in str(error):
                raise
            self.strict = False
            reason = str(error).partition(",")[0]
            print(f"recovery: it is not reproducible, since {reason}", flush=True)
            loss = self._accumulate_(step)
        norm = self.weights.sum_gradients_(self.gradient, self.n_sharded, loss)
        return loss, norm / self.scale

    def _diverged(self, step: int, what: str) -> UserError:
        problem = f"in step {step + 1} of {self.schedule.steps} {what} not finite"
        fix = "Use a smaller rate, or --dtype float32"
        return UserError(f"--recover_lr {self.schedule.rate:.2g}", problem, fix)

    def _write_(self) -> None:
        for part in self.parts.values():
            part.write_()

    def _accumulate_(self, step: int) -> Tensor:
        """Add up gradients of this rank's windows of a step; return its part of the loss (1,)."""
        runner, windows = self.runner, self.schedule.windows
        places = self.text.order[step * windows : (step + 1) * windows]
        every = as_windows(self.text.windows)[places]
        local_windows, tokens = every[runner.dist.shard(len(places))], int(every.counted.sum())
        idle = len(local_windows) < -(-len(places) // runner.dist.size)
        if idle and self.weights.in_step:  # runs a masked window that does not count
            mask = torch.zeros_like(every.ids[:1]).bool()
            local_windows = join_rows(local_windows, replace(every[:1], mask=mask))
        for part in self.parts.values():
            part.parameter.grad = None
        self.gradient.zero_()
        loss = torch.zeros(1, dtype=torch.float64, device=runner.device)
        for start in range(0, len(local_windows), runner.batch_size):
            loss += self._backward(local_windows[start : start + runner.batch_size], tokens)
        return loss

    def _backward(self, windows: Windows, tokens: int) -> Tensor:
        """Back-propagate one batch; return its part of the step's loss, a mean over `tokens`."""
        runner, teacher, ids = self.runner, self.teacher, windows.ids.to(self.runner.device)
        (teacher_states,) = teacher.run_blocks([windows], state_device=runner.device)
        states = runner.capture(windows, len(ids), runner.device)
        hidden = self.weights.forward(states)
        last = hidden.detach().requires_grad_()
        loss = divergence_(
            logits=lambda positions: runner.logits_from_hidden(ids, last, positions),
            teacher_logits=teacher.logits(teacher_states, slice(0, len(ids))),
            ids=ids,
            tokens=tokens,
            counted=windows.counted.to(ids.device),
            ce_weight=self.schedule.ce_weight,
            scale=self.scale,
        )
        with deterministic(runner.device, self.strict):
            hidden.backward(last.grad)
        return loss

    def measure(self) -> dict[str, float]:
        """Return the training loss and other figures on the held-out windows, in every rank."""
        held_out, weight = [self.text.held_out], self.schedule.ce_weight
        (figures,) = perplexities(self.runner, held_out, reference=self.reference)
        text, kl = figures["model_nats"], figures["kl"]
        return {"loss": kl + weight * (text - kl), "perplexity": figures["perplexity"], "kl": kl}

    def _note(self, tokens: int, trained: float | None) -> None:
        """Measure the held-out windows, and keep the weights if they are the best so far."""
        self.curve.append({"tokens": tokens, "trained": trained} | self.measure())
        if len(self.curve) == 1 or self.curve[-1]["loss"] < self.curve[self.best]["loss"]:
            self.best = len(self.curve) - 1
            self._take_best()

    def _take_best(self) -> None:
        """Copy the trained parameters to the host."""
        parameters = (local(part.parameter) for part in self.parts.values())
        self.best_values = []  # the last ones are freed before the next are made
        self.best_values = [parameter.to("cpu", copy=True) for parameter in parameters]

    def _state(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint: trained values, optimizer state, best weights."""
        state = {}
        for (name, part), best in zip(self.parts.items(), self.best_values, strict=True):
            for kind, leaf in part.leaves.items():
                state[f"{kind} of {name}"] = leaf
                for key, value in self.optimizer.state[leaf].items():
                    if isinstance(value, Tensor) and "qmap" not in key:  # a constant
                        state[f"{key} of {kind} of {name}"] = value
            state[f"best of {name}"] = best
        return state

    def _save(self, facts: dict[str, Any]) -> None:
        """Write a checkpoint."""
        progress.on_step("save training", 0)
        self.weights.write_state(self._state(), facts)
        progress.on_step("save training", 1)

    def _resumed(self) -> dict[str, Any] | None:
        """Load the state of an interrupted run, and return its facts; None if there is none."""
        kept = self.weights.read_state()
        if kept is None:
            return None
        tensors, facts = kept
        self.optimizer.step()  # zero gradients: allocates the state and changes no weight
        for its in self.optimizer.state.values():
            its["step"] += facts["step"] - 1
        self._take_best()
        state = self._state()
        for name, tensor in tensors:
            state[name].copy_(tensor)
        self._write_()
        self.curve, self.best, self.scale = facts["curve"], facts["best"], facts["scale"]
        return facts


def divergence_(
    logits: Callable[[Tensor], Tensor],
    teacher_logits: Callable[[Tensor], Tensor],
    ids: Tensor,
    tokens: int,
    counted: Tensor,
    ce_weight: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """KL(teacher || model) summed over `counted` positions of windows (n, seqlen), over `tokens`.

    `logits(positions)` and `teacher_logits(positions)` return (n, positions, vocabulary). The loss
    is `ce_weight` times cross-entropy with the text's next tokens, plus the rest times the KL
    divergence. The inputs of `logits` get their gradients here, times `scale`, a chunk of positions
    at a time: for both terms, d / d logits is the model's distribution minus the target's.
    """
    total, start, length = 0, 0, ids.shape[1]
    for positions, chunk in iter_logits(logits, length, ids.device):
        # positions with a next token: a Python number, which needs no synchronization
        count = min(len(positions), length - 1 - start) if ce_weight else 0
        with torch.no_grad():
            log_p = chunk.float().log_softmax(-1)
            log_q = teacher_logits(positions).float().log_softmax(-1)
            q = log_q.exp()
            loss = (q * log_q.sub_(log_p)).sum(-1, dtype=torch.float64)  # (n, positions)
            if count:
                labels = ids[:, start + 1 : start + 1 + count].unsqueeze(-1)
                text = -log_p[:, :count].gather(-1, labels).squeeze(-1)
                loss[:, :count] += ce_weight * (text - loss[:, :count])
                q[:, :count] *= 1 - ce_weight
                q[:, :count].scatter_add_(-1, labels, torch.full_like(text, ce_weight)[..., None])
            counts = counted[:, start : start + len(positions)]
            total += (loss * counts).sum() / tokens
            gradient = log_p.exp_().sub_(q).mul_(counts.unsqueeze(-1) / (tokens / scale))
            gradient = gradient.to(chunk.dtype)
        start += len(positions)
        chunk.backward(gradient)
    return total
