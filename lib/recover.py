"""Give back what pruning took: a short training of the kept weights, the dense model their teacher.

    python main.py --model MODEL --prune_method admm --sparsity_type 2:4 --recover 500000 ...

Trained are the weights that pruning kept, and the norms and biases of the decoder blocks; zeros
stay zeros. The loss is the Kullback-Leibler divergence from the teacher's next-token distribution
to the model's, and a share of cross-entropy with the text, taken a few positions at a time, so that
the logits of a whole batch never stand in memory. While it trains, the model holds its weights as
they would be saved, rounded: to the dtype they are saved in, or to the integers and scales that
they will be packed as (`Grid`). Float32 masters beside it keep what rounding would lose, and get
the gradients of the rounded weights, so that what is measured on the way is what is saved. Where
masters do not fit, `rank` trains updates B A of every matrix instead, masked and merged into it (as
PERP does, arXiv 2312.15230).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib.data.training import TrainingText
from lib.distributed.context import DistContext
from lib.model.blocks import BlockRunner, iter_logits, run_block
from lib.model.linears import find_linears
from lib.model.shapes import BACKWARD, FLOAT, StepBytes, Workload
from lib.model.work_folder import WorkFolder
from lib.packed.errors import PackedError
from lib.packed.grid import GROUP, dequantise, quantise
from lib.util.errors import UserError
from lib.util.products import exact_products

STEPS = 256  # about so many, while a step's size is between these:
LEAST, MOST = 2**8, 2**16  # tokens of a step
RATE = 0.6  # see `default_rate`
CROSS_ENTROPY = 0.2  # of the loss: what the teacher does not know of the language, the text does
WARM_UP = 0.1  # of the steps
LAST_RATE = 0.05  # of the peak rate, at the end
BETAS = (0.9, 0.95)
GRADIENT_NORM = 1.0  # at most; a step's gradient is clipped to it
MEASURED = 10  # times on the windows held out
REFIT = 16  # steps between two fits of a grid's scales
KEEP_SECONDS = 600  # between two states that are kept, at most


@dataclass(frozen=True)
class TrainSchedule:
    """How long, in what steps and how fast: all that the training depends on besides its text."""

    tokens: int  # at most; whole steps are made
    seqlen: int
    rate: float | None = None  # None: by default_rate
    rank: int | None = None
    share: float = 0.0  # of the text's own next tokens in the target
    seed: int = 0
    least: int = LEAST  # tokens of a step
    clip: float = GRADIENT_NORM

    @property
    def windows(self) -> int:
        """In a step."""
        wanted = min(max(self.tokens // STEPS, self.least), MOST, self.tokens)
        return max(1, wanted // self.seqlen)

    @property
    def steps(self) -> int:
        return self.tokens // (self.windows * self.seqlen)

    def rate_at(self, step: int) -> float:
        """A short rise, then half a cosine down."""
        rise = min(1.0, (step + 1) / math.ceil(WARM_UP * self.steps))
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * rise * (LAST_RATE + (1 - LAST_RATE) * fall)

    @property
    def measured(self) -> set[int]:
        """After how many steps the held-out windows are measured."""
        return {math.ceil(self.steps * part / MEASURED) for part in range(1, MEASURED + 1)}


def default_rate(matrices: Iterable[Tensor], width: int, blocks: int) -> float:
    """The peak learning rate that suits a model with these matrices, of any size.

    AdamW moves every weight by about the rate, all in step with their inputs: what a matrix gives
    changes by rate * sqrt(width) / (root mean square of its weights), relatively, and the changes
    of all blocks add up. RATE is what that may come to.
    """
    squares, count = 0.0, 0
    for matrix in matrices:
        squares += matrix.float().square().sum(dtype=torch.float64).item()
        count += matrix.numel()
    return RATE * (squares / max(count, 1)) ** 0.5 / (width**0.5 * blocks)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Inside, a GPU adds up gradients in one order, so that a seed gives the same weights.

    Where an operation has no deterministic implementation torch warns.
    """
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)


class Grid:
    """The integers of `bits` 8 or 4 and the scales that a matrix will be packed as.

    `transposed`: the matrix stands as (in, out), as in GPT-2's Conv1D.
    """

    def __init__(self, bits: int, transposed: bool = False) -> None:
        self.bits, self.transposed = bits, transposed
        self.group = GROUP if bits == 4 else None  # inputs that share a scale; None: all of a row
        self.scales: Tensor | None = None  # (out, groups)

    def fit_(self, weight: Tensor) -> None:
        """Take the scales that are nearest to a weight."""
        _, scales = quantise(self._rows(weight), bits=self.bits, group=self.group)
        self.scales = scales if self.scales is None else self.scales.copy_(scales)

    def rounded(self, weight: Tensor) -> Tensor:
        """The values that the packed form of a weight stands for, float32."""
        matrix = self._rows(weight)
        codes, _ = quantise(matrix, bits=self.bits, group=self.group, scales=self.scales)
        return self._rows(dequantise(codes, self.scales, self.group))

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight


class Rounded:
    """A parameter that holds what it would be saved as: in a dtype, or on a grid."""

    def __init__(self, parameter: nn.Parameter, rounding: torch.dtype, grid: Grid | None) -> None:
        self.parameter, self.rounding, self.grid = parameter, rounding, grid
        if grid:
            grid.fit_(parameter.data)

    @property
    def kept_dtype(self) -> torch.dtype:
        """In which nothing of what the parameter holds is lost."""
        return self.parameter.dtype if self.grid else self.rounding

    def put_(self, values: Tensor, refit: bool) -> None:
        """Write float32 values into the parameter, rounded; `refit`: by new scales of a grid."""
        if not self.grid:
            self.parameter.data.copy_(values.to(self.rounding))
            return
        if refit:
            self.grid.fit_(values)
        self.parameter.data.copy_(self.grid.rounded(values))


class Whole(Rounded):
    """A parameter of which every weight that is not zero is trained."""

    def __init__(
        self,
        parameter: nn.Parameter,
        sparse: bool,
        rounding: torch.dtype,
        grid: Grid | None = None,
    ) -> None:
        super().__init__(parameter, rounding, grid)
        self.sparse = sparse
        exact = parameter.dtype == rounding == torch.float32 and not grid
        self.master = parameter.data if exact else parameter.data.to(torch.float32, copy=True)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What is trained, float32."""
        return {"master": self.master}

    def take_gradient_(self) -> None:
        """Add the parameter's gradient to that of what is trained. A zero gets none, and AdamW
        without decay leaves what never had a gradient as it is, bit for bit."""
        gradient = self.parameter.grad
        if self.sparse:
            gradient = gradient.masked_fill_(self.master == 0, 0)
        self.master.grad += gradient
        self.parameter.grad = None

    def write_(self, refit: bool) -> None:
        """Put what was trained into the parameter, rounded."""
        if self.master.data_ptr() != self.parameter.data_ptr():
            self.put_(self.master, refit)


class LowRank(Rounded):
    """A sparse parameter (..., rows, columns) to which B A is added where it is not zero.

    A is drawn and scaled such that a step moves a weight about as far as if it were trained whole.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        rank: int,
        rounding: torch.dtype,
        generator: torch.Generator,
        grid: Grid | None = None,
    ) -> None:
        super().__init__(parameter, rounding, grid)
        self.base = parameter.data.to(rounding, copy=True)
        *stack, rows, columns = parameter.shape
        down = torch.randn(*stack, rank, columns, generator=generator) / rank**0.5
        self.down = down.to(parameter.device)  # A
        self.up = torch.zeros(*stack, rows, rank, device=parameter.device)  # B

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"up": self.up, "down": self.down}

    def take_gradient_(self) -> None:
        gradient = self.parameter.grad.masked_fill_(self.base == 0, 0).float()
        with exact_products():
            self.up.grad += gradient @ self.down.mT
            self.down.grad += self.up.mT @ gradient
        self.parameter.grad = None

    def write_(self, refit: bool) -> None:
        with exact_products():
            change = self.up @ self.down
        change.masked_fill_(self.base == 0, -0.0)  # which changes no zero
        self.put_(self.base.float() + change, refit)


def trained_parameters(
    model: nn.Module, blocks_name: str, whole: bool = False
) -> dict[str, tuple[nn.Parameter, bool]]:
    """{name: (parameter, whether it is a linear's)}: what recovery trains, shared ones once.

    These are the pruned linears, all of them if `whole`, and the norms and biases of the blocks;
    what the blocks share with embeddings or head is left alone.
    """
    blocks = model.get_submodule(blocks_name)
    inside, linears = f"{blocks_name}.", set()
    for block in blocks:
        for linear in find_linears(block, "")[0]:
            if whole or bool((linear.raw_weight == 0).any()):
                linears.add(id(getattr(linear.module, linear.parameter)))
    parameters = list(model.named_parameters(remove_duplicate=False))
    outside = {id(parameter) for name, parameter in parameters if not name.startswith(inside)}
    trained = {}
    for name, parameter in blocks.named_parameters():
        vector = parameter.dim() == 1 or name.endswith("bias")
        if id(parameter) in outside or not parameter.is_floating_point():
            continue
        if id(parameter) in linears or vector:
            trained[inside + name] = parameter, id(parameter) in linears
    return trained


@dataclass
class Recovered:
    """How it went: (tokens seen, perplexity of what was held out) and losses; what was kept."""

    curve: list[dict[str, float]] = field(default_factory=list)
    best: int = 0  # of the curve
    trained: int = 0  # weights
    tokens: int = 0
    seconds: float = 0.0
    bits: int = 16  # of the grid that was trained on

    def line(self) -> str:
        """What a user should know at the end."""
        first, best = self.curve[0]["perplexity"], self.curve[self.best]
        if not self.best:
            stay = "stay as they were" if self.bits == 16 else f"are rounded to {self.bits} bits"
            return f"recovery: nothing was better than the pruned weights, which {stay}"
        return (
            f"recovery: perplexity {first:.4f} to {best['perplexity']:.4f} on what was held out, "
            f"after {best['tokens']} of {self.tokens} tokens"
        )


class Recoverer:
    """Trains the model of `runner` in place to do as `teacher` does.

    `rounding`: the dtype in which the model will be saved. `measure(runner, windows)` gives
    perplexity, the same in every process of `dist`. `finished`, of the main process: keeps
    where the training stands, and gives it back after an interruption. `checkpointed`: a block's
    activations are computed again when they are needed, for less memory. `whole`: all linears of
    the blocks are trained, not only those with zeros. `grids`, by the parameters' names: of those
    that will be packed as integers.
    """

    def __init__(
        self,
        runner: BlockRunner,
        teacher: BlockRunner,
        schedule: TrainSchedule,
        text: TrainingText,
        batch_size: int,
        measure: Callable[[BlockRunner, Tensor], float],
        rounding: torch.dtype,
        *,
        dist: DistContext,
        finished: WorkFolder | None = None,
        checkpointed: bool = False,
        whole: bool = False,
        grids: Mapping[str, Grid] | None = None,
    ) -> None:
        self.runner, self.teacher = runner, teacher
        self.text, self.batch_size = text, batch_size
        self.measure = measure
        self.dist = dist
        self.finished = finished
        self.checkpointed = checkpointed
        self.parts: dict[str, Whole | LowRank] = {}
        strict = set(runner.model._keep_in_fp32_modules_strict or ())
        generator = torch.Generator().manual_seed(schedule.seed)
        trained = trained_parameters(runner.model, runner.name, whole)
        if schedule.rate is None:
            width = runner.model.config.get_text_config(decoder=True).hidden_size
            matrices = (parameter for parameter, sparse in trained.values() if sparse)
            schedule = replace(schedule, rate=default_rate(matrices, width, len(runner.blocks)))
        self.schedule = schedule
        for name, (parameter, sparse) in trained.items():
            dtype = torch.float32 if strict.intersection(name.split(".")) else rounding
            grid = (grids or {}).get(name)
            if sparse and schedule.rank:
                self.parts[name] = LowRank(parameter, schedule.rank, dtype, generator, grid)
            else:
                self.parts[name] = Whole(parameter, sparse, dtype, grid)
        self.grids = {name: part.grid for name, part in self.parts.items() if part.grid}
        self.best_scales: dict[str, Tensor] = {}
        self.done = Recovered(
            trained=sum(part.parameter.numel() for part in self.parts.values()),
            bits=min((grid.bits for grid in self.grids.values()), default=16),
        )

    def summary(self) -> list[str]:
        """What is going to be done, a line each."""
        schedule, weights = self.schedule, self.done.trained
        how = f"updates of rank {schedule.rank} to" if schedule.rank else "training"
        lines = [
            f"recovery: {how} {weights:,} weights in {schedule.steps} steps of "
            f"{schedule.windows * schedule.seqlen:,} tokens, learning rate {schedule.rate:.3g}"
        ]
        if self.grids:
            lines.append(
                f"recovery: {len(self.grids)} of {len(self.parts)} tensors are trained as the "
                f"{self.done.bits}-bit integers that will be packed"
            )
        if self.dist.size > schedule.windows:
            lines.append(
                f"recovery: a step of {schedule.windows} windows keeps no more processes at work; "
                "fewer would be as fast"
            )
        for source in self.text.facts["sources"]:
            if source["passes"] > 1:
                lines.append(
                    f"recovery: {source['name']} has {source['windows']} windows of train text, "
                    f"which are read {source['passes']} times"
                )
        return lines

    @property
    def scales(self) -> dict[str, Tensor]:
        """The scales of the grids of the best weights, by every name of a parameter."""
        scales = {id(self.parts[name].parameter): one for name, one in self.best_scales.items()}
        parameters = self.runner.model.named_parameters(remove_duplicate=False)
        return {name: scales[id(one)] for name, one in parameters if id(one) in scales}

    def run(self, on_progress: Callable[..., None] | None = None) -> Recovered:
        """Train, and leave the model with its best weights, rounded.

        `on_progress(tokens, note)` is called after each step. UserError where the loss is not
        finite.
        """
        on_progress = on_progress or (lambda tokens, note="": None)
        self.began = time.perf_counter()
        self._set_up()
        steps, tokens = self.schedule.steps, self.schedule.windows * self.schedule.seqlen
        if not self._resumed():
            self._write_(refit=False)
            self._note(0, None)
        on_progress(self.step * tokens)
        kept = time.monotonic()
        with self._gradients(), deterministic(self.runner.device):
            for step in range(self.step, steps):
                loss = self._step(step)
                self.losses.append(loss)
                self.step = step + 1
                measured = self.step in self.schedule.measured
                if measured:
                    self._note(self.step * tokens, sum(self.losses) / len(self.losses))
                    self.losses = []
                if self.finished and (measured or time.monotonic() - kept > KEEP_SECONDS):
                    self._keep()
                    kept = time.monotonic()
                on_progress(tokens, f"loss {loss:.4f}")
        for part, best in zip(self.parts.values(), self.best, strict=True):
            part.parameter.data.copy_(best)
        self.done.tokens = steps * tokens
        self.done.seconds = round(self.before + time.perf_counter() - self.began, 3)
        return self.done

    def _set_up(self) -> None:
        leaves = [leaf for part in self.parts.values() for leaf in part.leaves.values()]
        device = self.runner.device
        # all gradients stand in one row, for one sum over processes
        self.gradient = torch.zeros(sum(leaf.numel() for leaf in leaves), device=device)
        start = 0
        for leaf in leaves:
            leaf.grad = self.gradient[start : start + leaf.numel()].view_as(leaf)
            start += leaf.numel()
        self.leaves = leaves
        self.optimizer = torch.optim.AdamW(leaves, betas=BETAS, weight_decay=0.0, fused=True)
        self.step, self.losses, self.before = 0, [], 0.0
        self.best: list[Tensor] = []

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        """Inside, gradients of the model's parameters go to what is trained, one after another."""
        handles = []
        try:
            for part in self.parts.values():
                parameter = part.parameter.requires_grad_(True)
                hook = parameter.register_post_accumulate_grad_hook(
                    lambda _, part=part: part.take_gradient_()
                )
                handles.append(hook)
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
        """One step of the optimizer; its loss, in nats a token."""
        schedule, windows = self.schedule, self.schedule.windows
        places = self.text.order[step * windows : (step + 1) * windows]
        own = self.text.windows[places[self.dist.share(len(places))]]
        self.gradient.zero_()
        loss = torch.zeros(1, dtype=torch.float64, device=self.runner.device)
        for ids in own.split(self.batch_size) if len(own) else ():
            loss += self._backward(ids.to(self.runner.device), len(places) * schedule.seqlen)
        self.dist.barrier()
        for handle in self.dist.all_reduce_([self.gradient, loss]):
            handle.wait()
        if not math.isfinite(loss.item()):
            raise self._diverged(step, "the loss is")
        norm = self.gradient.norm()
        self.gradient *= (schedule.clip / (norm + 1e-6)).clamp(max=1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        self.optimizer.step()
        try:
            self._write_(refit=(step + 1) % REFIT == 0)
        except PackedError:  # integers hold no nan
            raise self._diverged(step, "weights are") from None
        return loss.item()

    def _diverged(self, step: int, what: str) -> UserError:
        rate, steps = self.schedule.rate, self.schedule.steps
        return UserError(
            f"--recover_rate {rate:.2g}: in step {step + 1} of {steps} {what} not finite; try a "
            "smaller one, or --dtype float32"
        )

    def _write_(self, refit: bool) -> None:
        for part in self.parts.values():
            part.write_(refit)

    def _backward(self, ids: Tensor, tokens: int) -> Tensor:
        """Gradients of windows (n, seqlen), one of a step's batches, and their part of its loss."""
        runner, teacher = self.runner, self.teacher
        teacher_states = teacher.capture(ids, len(ids), runner.device)
        for index in range(len(teacher.blocks)):
            teacher.advance_(teacher_states, index)
        states = runner.capture(ids, len(ids), runner.device)
        hidden = states.hidden  # (n, tokens, hidden)
        for block, ((args, kwargs),) in zip(runner.blocks, states.block_args, strict=True):
            if self.checkpointed:
                hidden = checkpoint(run_block, block, hidden, args, kwargs, use_reentrant=False)
            else:
                hidden = run_block(block, hidden, args, kwargs)
        last = hidden.detach().requires_grad_()
        loss = divergence_(
            logits=lambda positions: runner.logits_from_hidden(ids, lambda: last, positions),
            teacher_logits=teacher.logits(teacher_states, slice(0, len(ids))),
            ids=ids,
            tokens=tokens,
            share=self.schedule.share,
        )
        hidden.backward(last.grad)
        return loss

    def _note(self, tokens: int, loss: float | None) -> None:
        """Measure the windows held out, and keep the weights if they are the best so far."""
        perplexity = self.measure(self.runner, self.text.held_out)
        curve = self.done.curve
        curve.append({"tokens": tokens, "perplexity": perplexity, "loss": loss})
        if len(curve) == 1 or perplexity < curve[self.done.best]["perplexity"]:
            self.done.best = len(curve) - 1
            self._take_best()

    def _take_best(self) -> None:
        self.best = self._rounded()
        self.best_scales = {name: grid.scales.clone() for name, grid in self.grids.items()}

    def _rounded(self) -> list[Tensor]:
        """The trained parameters as they would be saved, on the host."""
        parts = self.parts.values()
        return [part.parameter.detach().to("cpu", part.kept_dtype, copy=True) for part in parts]

    def _state(self) -> dict[str, Tensor]:
        """All that the next step depends on, besides facts, and the best weights so far."""
        state = {}
        for (name, part), best in zip(self.parts.items(), self.best, strict=True):
            for kind, leaf in part.leaves.items():
                state[f"{kind} of {name}"] = leaf
                for key, value in self.optimizer.state[leaf].items():
                    state[f"{key} of {kind} of {name}"] = value
            state[f"best of {name}"] = best
        for name, grid in self.grids.items():
            state[f"scales of {name}"] = grid.scales
            state[f"best scales of {name}"] = self.best_scales[name]
        return state

    def _keep(self) -> None:
        seconds = self.before + time.perf_counter() - self.began
        facts = {"step": self.step, "losses": self.losses, "curve": self.done.curve}
        facts |= {"best": self.done.best, "seconds": seconds}
        self.finished.write("recovery", self._state(), facts, "the recovery's state")

    def _resumed(self) -> bool:
        """Take the state of an interrupted run; whether there is one."""
        kept = None
        if self.finished:
            kept = self.finished.read("recovery", "the recovery begins again")
        facts = self.dist.all_gather_object(kept and kept[1])[0]
        if facts is None:
            return False
        for leaf in self.leaves:  # as the optimizer would have it after a step
            zeros = {"exp_avg": torch.zeros_like(leaf), "exp_avg_sq": torch.zeros_like(leaf)}
            self.optimizer.state[leaf] = {"step": torch.zeros((), device=leaf.device)} | zeros
        self._take_best()
        for name, tensor in self._state().items():
            stored = kept[0][name] if kept else torch.empty_like(tensor)
            tensor.copy_(self.dist.broadcast_(stored, 0))
        self._write_(refit=False)
        self.step, self.losses, self.before = facts["step"], facts["losses"], facts["seconds"]
        self.done.curve, self.done.best = facts["curve"], facts["best"]
        return True


def recovery_bytes(
    load: Workload, rank: int | None, batch_size: int, checkpointed: bool, on_grid: bool = False
) -> StepBytes:
    """Memory of training, besides the model and its teacher: what is trained, its gradient and
    AdamW's two averages, with a batch on its way there and back. `on_grid`: see `Grid`."""
    shapes, saved = load.shapes, load.saved.itemsize
    if rank:
        state = shapes.in_blocks * saved + 4 * FLOAT * rank * shapes.edges
    else:
        masters = on_grid or not load.working == load.saved == torch.float32
        state = shapes.in_blocks * FLOAT * (4 if masters else 3)
    # the best so far
    state += shapes.in_blocks * (load.working.itemsize if on_grid else saved)
    graph = int(BACKWARD * load.activations(batch=batch_size))
    if checkpointed:  # of one block, and the states before each
        graph += shapes.count * load.hidden_states(batch_size)
    else:
        graph *= shapes.count
    logits = 5 * load.logits(batch_size)  # the teacher's, two distributions, the loss's gradient
    return StepBytes(0, state + FLOAT * shapes.largest_group + graph + logits)


def divergence_(
    logits: Callable[[Tensor], Tensor],
    teacher_logits: Callable[[Tensor], Tensor],
    ids: Tensor,
    tokens: int,
    share: float = 0.0,
) -> Tensor:
    """KL(teacher || model) summed over all positions of windows `ids` (n, seqlen), over `tokens`.

    `logits(positions)` and `teacher_logits(positions)` give (n, positions, vocabulary). The loss
    is `share` times cross-entropy with the text's own next tokens, and the rest divergence. What
    `logits` is computed from gets its gradient here, a chunk of positions at a time: of either
    loss, d / d logits is the difference of the model's distribution and what it should be.
    """
    total, length = 0, ids.shape[1]
    for positions, chunk in iter_logits(logits, length, ids.device):
        with torch.no_grad():
            log_p = chunk.float().log_softmax(-1)
            log_q = teacher_logits(positions).float().log_softmax(-1)
            q = log_q.exp()
            loss = (q * log_q.sub_(log_p)).sum(-1, dtype=torch.float64)  # (n, positions)
            count = (positions + 1 < length).sum() if share else 0  # the last has no next token
            if count:
                following = ids[:, positions[:count] + 1].unsqueeze(-1)
                text = -log_p[:, :count].gather(-1, following).squeeze(-1)
                loss[:, :count] += share * (text - loss[:, :count])
                q[:, :count] *= 1 - share
                q[:, :count].scatter_add_(-1, following, torch.full_like(text, share)[..., None])
            total += loss.sum() / tokens
            gradient = log_p.exp_().sub_(q).div_(tokens).to(chunk.dtype)
        chunk.backward(gradient)
    return total
