"""A block that ranks share is gathered as seldom as can be, and little of it is held at a time.

tests/test_matrix.py and tests/distributed compare what ranks leave.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from unittest import mock

import pytest
import tiny
import torch
import torch.distributed as torch_dist
from support import CPU, windows
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from lib.data.training import TrainingText
from lib.model.blocks import BlockRunner
from lib.model.pretrained import fresh_copy
from lib.model.store import BlockStore
from lib.offload.sharded import ShardedWeights, WholeWeights
from lib.stages.recover import Recoverer, TrainSchedule
from lib.util.errors import UserError
from lib.util.ranks import DistContext

pytestmark = pytest.mark.full


class Pair(DistContext):
    """The first of two ranks, of which the second does nothing."""

    def __init__(self) -> None:
        super().__init__(CPU, alone=True)
        self.size = 2

    def barrier(self) -> None:
        pass

    def all_gather_object(self, value: object) -> list:
        return [value, value]


@pytest.fixture
def pair() -> Iterator[DistContext]:
    torch_dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield Pair()
    torch_dist.destroy_process_group()


class Files(BlockStore):
    """Blocks that could be fetched from files, but lie in memory."""

    resident = False

    def __init__(self, *given: object, **more: object) -> None:
        super().__init__(*given, **more)
        self.folder, self.places = None, [{} for _ in self.blocks]
        self.read = 0  # weights

    def each(self, index: int, part: Callable) -> Iterator[tuple]:
        for path, one in self.blocks[index].named_parameters():
            own = part(path, one.data)
            self.read += own.numel()
            yield path, one, own


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gathers_of_a_step(checkpointed: bool, pair: DistContext) -> None:
    """A student's block is gathered for its forward and its backward pass, a teacher's once.

    Two gathered blocks are held at most, and one whole gradient.
    """
    model, stores, runners = tiny.tiny_llama(num_hidden_layers=4).requires_grad_(False), [], []
    for one in (model, fresh_copy(model)):
        stores.append(Files(one, CPU, dist=pair))
        runners.append(BlockRunner(one, CPU, stores[-1], dist=pair, batch_size=8))
    runners[0].checkpointed = checkpointed
    ids, seen, gathered, most = windows(4), [], Counter(), Counter()
    buffers = {"gathers": [], "sums": []}  # of each call, while they live
    schedule = TrainSchedule(tokens=96, seqlen=24, rate=1e-3, least=96)
    text = TrainingText(ids, torch.arange(4), ids[:2], {"sources": []})
    recoverer = Recoverer(*runners, schedule, text, whole=True)
    recoverer.measure = lambda: {"loss": 1.0}
    step = recoverer._accumulate_

    def counted(number: int) -> torch.Tensor:
        gathered.clear(), most.clear()
        loss = step(number)
        seen.append((dict(gathered), dict(most)))
        return loss

    def whole() -> int:  # blocks
        twins = (one for store in runners for one in getattr(store.weights, "twins", ()))
        return sum(not hasattr(one.mlp.up_proj.weight, "to_local") for one in twins)

    def count(what: str, *names: str):  # which torch names in one way or another
        name = next(name for name in names if hasattr(torch_dist, name))
        plain = getattr(torch_dist, name)

        def call(*args: object, **more: object) -> object:
            gathered.update([what])
            tensors = [one for one in (*args, *more.values()) if isinstance(one, torch.Tensor)]
            buffers[what].append(weakref.ref(max(tensors, key=torch.Tensor.numel)))
            held = sum(one() is not None for one in buffers[what])
            most[what] = max(most[what], held + whole() * (what == "gathers"))
            return plain(*args, **more)

        return mock.patch.object(torch_dist, name, call)

    gathers = count("gathers", "all_gather_single", "all_gather_into_tensor")
    sums = count("sums", "reduce_scatter_single", "reduce_scatter_tensor")
    recoverer._accumulate_ = counted
    with gathers, sums, suppress(UserError):
        recoverer.run()
    assert seen == [({"gathers": 4 * (2 + 1), "sums": 4}, {"gathers": 2, "sums": 1})]
    half = sum(one.numel() for block in model.model.layers for one in block.parameters()) / 2
    assert [one.read for one in stores] == [half, half]


@pytest.mark.parametrize("kind", [WholeWeights, ShardedWeights])
def test_the_norm_of_a_large_gradient(kind: type) -> None:
    """Summed without a copy of it, and to more digits than one float32 sum has."""
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, call: Callable, types, args=(), kwargs=None) -> object:
            nonlocal largest
            made = call(*args, **(kwargs or {}))
            own = gradient.untyped_storage().data_ptr()
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() != own:
                largest = max(largest, made.numel())
            return made

    gradient, loss = torch.full((2**25,), 0.1), torch.zeros(1)
    alone = SimpleNamespace(dist=DistContext(CPU, alone=True))
    with Largest():
        norm = kind.sum_gradients_(alone, gradient, len(gradient) // 2, loss)
    assert norm.item() == pytest.approx(0.1 * 2**12.5, rel=1e-6) and 8 * largest <= len(gradient)
