"""Remove whole MLP neurons or whole experts, block by block, which leaves a smaller model.

Each block is observed after the blocks before it became smaller. For neurons, a method sums
statistics of the down projection's input. It chooses the remaining neurons and may adjust their
columns of the down projection (`PruningMethod.remove_neurons_`); the rows of gate and up stay
unchanged. For experts, every block that has experts loses the same number, and the router's gates
apply to the remaining ones.
Run: `python main.py --model MODEL --prune_method sparsegpt --sparsity_type neurons ...`, or
`--prune_method reap --sparsity_type experts`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.changes import UNREACHED
from ..calibration.inputs import Group
from ..methods.base import PruningMethod
from ..methods.sparsity import NEURONS
from ..model.blocks import BlockRunner, Stop, run_block
from ..model.matrix import PrunableLinear
from ..model.parts import StructureLayout, get_tensor, keep_parts_
from ..prune import BlockWalker
from ..util.errors import UserError
from ..util.host import malloc_trim

CHECKED = 16  # tokens on which a block is checked without calibration text
MULTIPLE = 256  # granularity of neurons, for fast kernels
STEPS = 8  # least number of multiples in the width
TOLERANCE = 1e-3  # relative change of a block's outputs that rounding may cause


def remove(
    runner: BlockRunner,
    windows: Tensor | None,
    method: type[PruningMethod],
    layout: StructureLayout,
    left: int,
    seed: int = 0,
    on_progress: Callable[[int], Any] = lambda blocks: None,
) -> PartRemover:
    """Remove neurons or experts in place until `left` remain in each block; return the remover.

    Arguments are as for `prune` (lib/prune.py); `layout` locates the parts, and `seed` is for
    random choices. Raises UserError also if none can be removed without other changes.
    """
    kind = NeuronRemover if layout.kind == NEURONS else ExpertRemover
    remover = kind(runner, method, layout, left, seed).run(windows, on_progress)
    remover.set_config_()
    return remover


class PartRemover(BlockWalker):
    """Removes neurons or experts, until `left` remain in each block.

    `layout` locates them; `seed` is for random choices. `solve` of a subclass notes the remaining
    parts of a block, and `finish_` cuts the others off.
    """

    caches_inputs = False  # they would have the wrong width once neurons are removed

    def __init__(
        self,
        runner: BlockRunner,
        method: type[PruningMethod],
        layout: StructureLayout,
        left: int,
        seed: int = 0,
    ) -> None:
        super().__init__(runner, method)
        self.layout, self.left, self.seed = layout, left, seed
        self.shared.clear()  # once it is smaller, a shared weight is another parameter
        self.weights_before = self._count_weights()

    def set_config_(self) -> None:
        """Set the config's field, and the modules' own numbers, to those of the smaller model."""
        text = self.runner.model.config.get_text_config(decoder=True)
        setattr(text, self.layout.field, self.left)
        for path, attribute, entries in self.layout.counters:  # those inside blocks are set already
            setattr(self.runner.model.get_submodule(path), attribute, entries * self.left)
        self.weights_after = self._count_weights()

    def restore_(self) -> bool:
        restored = super().restore_()
        if restored:
            PartRemover.finish_(self)
        return restored

    def finish_(self) -> None:
        """Make the block smaller, in all ranks."""
        if kept := self.notes[-1].kept:
            block, name = self.runner.blocks[self.index], f"{self.runner.name}.{self.index}"
            keep_parts_(block, self.layout, self.index, name, torch.tensor(kept))
            malloc_trim()  # freed weights are in heaps of reader threads, which nothing else reuses

    def summary(self) -> list[str]:
        """Return lines for the user."""
        count, cut = self.layout.count, sum(bool(notes.kept) for notes in self.notes)
        share = 1 - self.weights_after / self.weights_before
        return [
            f"removed {count - self.left} of {count} {self.layout.kind} in each of {cut} blocks, "
            f"{share:.1%} of the blocks' weights",
            *self.warnings(),
        ]

    def record(self) -> dict[str, Any]:
        """Return the record for results.json."""
        every = set(range(self.layout.count))
        return {
            "before": self.layout.count,
            "after": self.left,
            "weights_before": self.weights_before,
            "weights_after": self.weights_after,
            "removed": [sorted(every.difference(notes.kept or every)) for notes in self.notes],
            "routed": [notes.routed for notes in self.notes],
        }

    def _count_weights(self) -> int:
        return sum(p.numel() for block in self.runner.blocks for p in block.parameters())

    @property
    def _module_name(self) -> str:
        """Full name of the down projection, or of the module of experts, of the current block."""
        return f"{self.runner.name}.{self.index}.{self.layout.modules[self.index]}"


def multiple_of(width: int) -> int:
    """Return the granularity of the kept width: a power of two, at most width/8 and MULTIPLE."""
    return min(MULTIPLE, 2 ** max(0, (width // STEPS).bit_length() - 1))


def neurons_left(layout: StructureLayout, ratio: float) -> int:
    """Return the number of neurons to keep: about 1 - `ratio`, a multiple of `multiple_of`.

    Raises UserError if that removes none.
    """
    width, multiple = layout.count, multiple_of(layout.count)
    left = max(1, round((1 - ratio) * width / multiple)) * multiple
    if left >= width:
        must = f"must stay a multiple of {multiple}"
        problem = f"it removes none of the {width} neurons per block, which {must}"
        raise UserError(f"--sparsity_ratio {ratio:g}", problem, "Use a higher ratio")
    return left


class NeuronRemover(PartRemover):
    """Makes the MLPs of a runner's model narrower, in place."""

    def takes(self, linear: PrunableLinear) -> bool:
        return linear.name == self._module_name

    def solve(self, group: Group, matrices: list[Tensor]) -> None:
        """Choose neurons, also by gains: the product of the norms of the rows that make each."""
        gains: Tensor | float = 1.0
        down = f"{self.layout.modules[self.index]}.weight"
        for path, (dim, entries) in self.layout.tensors[self.index].items():
            weight = get_tensor(self.runner.blocks[self.index], path)
            if path != down and weight.dim() > 1:
                for part in (weight.data.T if dim else weight.data).chunk(entries):  # (width, in)
                    gains = gains * torch.linalg.vector_norm(part, dim=1, dtype=torch.float32)
        kept = group.method.remove_neurons_(matrices[0], gains, self.left)
        self.notes[-1].kept = kept.tolist()

    def finish_(self) -> None:
        """Make the block smaller in all ranks, and check that a batch's outputs do not change."""
        runner, states = self.runner, self.inputs.states
        if states is None:  # no calibration text
            ids = torch.arange(CHECKED, device=runner.device)[None]
            states = runner.capture(ids, 1, runner.device)
        _, run = next(runner.iter_batches(states, self.index))
        expected = run().float()  # removed neurons have zero columns in down
        super().finish_()
        if not self.notes[-1].kept:
            raise UserError(self._module_name, UNREACHED, "Use --sparsity_type unstructured")
        tolerance = max(TOLERANCE, 4 * torch.finfo(runner.model.dtype).eps)
        if (run().float() - expected).norm() > tolerance * expected.norm():
            raise UserError(
                f"--sparsity_type neurons: {runner.name}.{self.index}",
                "its MLP does not only multiply by neurons, so none can be removed",
                "Use --sparsity_type unstructured",
            )


def fewest(layout: StructureLayout) -> int:
    """Return the least number of experts: the router's choice, two per group that is scored."""
    least = max(math.ceil(layout.chosen / layout.open_groups), 2 if layout.groups > 1 else 1)
    return least * layout.groups


def possible_counts(layout: StructureLayout) -> list[int]:
    """Return the possible numbers of neurons or experts in a block, in descending order."""
    step = least = multiple_of(layout.count)
    if layout.kind != NEURONS:
        step, least = layout.groups, fewest(layout)
    return [layout.count, *range((layout.count - 1) // step * step, least - 1, -step)]


def experts_left(layout: StructureLayout, ratio: float) -> int:
    """Return the number of experts to keep per block: about 1 - `ratio`, equal in each group.

    Raises UserError if none is removed, or if fewer remain than the router chooses.
    """
    each = layout.count // layout.groups
    removed, most = round(ratio * each), each - fewest(layout) // layout.groups  # per group
    if 1 <= removed <= most:
        return (each - removed) * layout.groups
    experts = f"of the {layout.count} experts per block"
    if most < 1:
        problem = f"none {experts} can be removed, since the router chooses {layout.chosen}"
        fix = "--sparsity_type unstructured"
    else:
        problem = f"it would remove {removed * layout.groups} {experts}"
        fix = f"{1 / each:.3g} to {most / each:.3g}"
    raise UserError(f"--sparsity_ratio {ratio:g}", problem, f"Use {fix}")


class ExpertRemover(PartRemover):
    """Removes experts of a runner's model, in place."""

    checked: frozenset[type] = frozenset()  # checked classes of blocks

    def takes(self, linear: PrunableLinear) -> bool:
        return False  # no layer is changed by itself

    def groups(self) -> Iterator[list[Group]]:
        """Yield one group without layers: all experts of the block."""
        if self.layout.modules[self.index]:
            self._check_once()
            method = self.method(self.layout.count, self.runner.device)
            self._observe(method.observe)
            self.dist.sum_(method.statistics(), self.inputs.idle)
            yield [Group([], method, name=self._module_name)]

    def solve(self, group: Group, matrices: list[Tensor]) -> None:
        """Score the block's experts, and note which of them remain."""
        notes, method, groups = self.notes[-1], group.method, self.layout.groups
        scores = method.scores(self.seed + self.index).cpu().view(groups, -1)
        best = scores.sort(dim=1, descending=True, stable=True).indices
        best = best[:, : self.left // groups].sort(dim=1).values
        kept = best + torch.arange(groups)[:, None] * scores.shape[1]
        notes.kept = kept.flatten().tolist()
        shares = method.counts / method.counts.sum().clamp(min=1)
        notes.routed = [round(share, 6) for share in shares.tolist()]

    def _observe(self, observe: Callable[[int, Tensor, Tensor], None]) -> None:
        """Call `observe(expert, gates, outputs)` for the tokens that are routed to each expert."""
        name = self._module_name
        experts = self.runner.blocks[self.index].get_submodule(self.layout.modules[self.index])

        def see(_: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden, chosen, gates = _routing([*args, *kwargs.values()], name)
            for expert in range(self.layout.count):
                tokens, places = (chosen == expert).nonzero(as_tuple=True)
                if len(tokens):
                    only = torch.full((len(tokens), 1), expert, device=hidden.device)
                    one = torch.ones_like(only, dtype=gates.dtype)
                    outputs = experts.forward(hidden[tokens], only, one)  # bypasses this hook
                    observe(expert, gates[tokens, places], outputs)
            raise Stop

        with experts.register_forward_pre_hook(see, with_kwargs=True):
            for _, run in self.runner.iter_batches(self.inputs.states, self.index):
                with suppress(Stop):
                    run()

    def _check_once(self) -> None:
        """Check for each class of blocks that the order of its experts does not change outputs."""
        index, groups, states = self.index, self.layout.groups, self.inputs.states
        block = self.runner.blocks[index]
        if type(block) in self.checked:
            return
        self.checked |= {type(block)}
        hidden = states.hidden[states.batches[0]].to(self.runner.device)
        args, kwargs = states.block_args[index][0]
        run = partial(run_block, hidden=hidden, args=args, kwargs=kwargs)
        order = torch.arange(self.layout.count).view(groups, -1).flip(1).flatten()
        turned, name = copy.deepcopy(block), f"{self.runner.name}.{index}"
        keep_parts_(turned, self.layout, index, name, order)
        expected, out = run(block).float(), run(turned).float()
        dtype = next(block.parameters()).dtype
        tolerance = max(TOLERANCE, 4 * torch.finfo(dtype).eps)
        if not (out - expected).norm() <= tolerance * expected.norm():
            raise UserError(
                f"--sparsity_type experts: {name}",
                "its outputs depend on the order of its experts, so none can be removed",
                "Use --sparsity_type unstructured",
            )


def _routing(values: list[Any], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens (n, hidden), chosen experts (n, k) and gates (n, k) from experts' arguments."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) == 3:
        hidden, chosen, gates = tensors
        is_routing = chosen.dim() == 2 and not chosen.is_floating_point()
        if is_routing and chosen.shape == gates.shape and len(hidden) == len(chosen):
            return hidden, chosen, gates
    raise UserError(
        "--sparsity_type experts",
        f"{name} is not called with tokens, chosen experts and gates",
        "Use --sparsity_type unstructured",
    )
