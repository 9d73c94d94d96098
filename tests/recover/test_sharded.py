"""A block that ranks share is gathered as seldom as can be; tests/test_matrix.py and
tests/distributed compare what they leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from unittest import mock

import pytest
import tiny
import torch
import torch.distributed as torch_dist
from support import CPU, windows
from torch.testing._internal.distributed.fake_pg import FakeStore

from lib.data.training import TrainingText
from lib.model.blocks import BlockRunner
from lib.model.pretrained import fresh_copy
from lib.model.store import BlockStore
from lib.recover import Recoverer, TrainSchedule
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
    """A student's block is gathered for its forward and its backward pass, a teacher's once."""
    model, stores, runners = tiny.tiny_llama(num_hidden_layers=3).requires_grad_(False), [], []
    for one in (model, fresh_copy(model)):
        stores.append(Files(one, CPU, dist=pair))
        runners.append(BlockRunner(one, CPU, stores[-1], dist=pair, batch_size=8))
    runners[0].checkpointed = checkpointed
    ids, seen, gathered = windows(4), [], Counter()
    schedule = TrainSchedule(tokens=96, seqlen=24, rate=1e-3, least=96)
    text = TrainingText(ids, torch.arange(4), ids[:2], {"sources": []})
    recoverer = Recoverer(*runners, schedule, text, whole=True)
    recoverer.measure = lambda: {"loss": 1.0}
    step = recoverer._accumulate_

    def counted(number: int) -> torch.Tensor:
        gathered.clear()
        loss = step(number)
        seen.append(dict(gathered))
        return loss

    def count(what: str, *names: str):  # which torch names in one way or another
        name = next(name for name in names if hasattr(torch_dist, name))
        plain = getattr(torch_dist, name)
        return mock.patch.object(
            torch_dist, name, lambda *a, **k: (gathered.update([what]), plain(*a, **k))[1]
        )

    gathers = count("gathers", "all_gather_single", "all_gather_into_tensor")
    sums = count("sums", "reduce_scatter_single", "reduce_scatter_tensor")
    recoverer._accumulate_ = counted
    with gathers, sums, suppress(UserError):
        recoverer.run()
    assert seen == [{"gathers": 3 * (2 + 1), "sums": 3}]
    half = sum(one.numel() for block in model.model.layers for one in block.parameters()) / 2
    assert [one.read for one in stores] == [half, half]
