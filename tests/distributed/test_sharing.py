"""The processes of a machine have one copy of a model's blocks, and do what they do without."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
import torch
from jobs import flags
from processes import ended, together
from support import CPU, content, runner_of, windows
from torch import nn

from lib.distributed.context import DistContext
from lib.eval import perplexity
from lib.model import fetched
from lib.model.blocks import BlockRunner
from lib.model.fetched import Sharing, can_be_shared, fetched_model
from lib.model.pretrained import decoder_blocks, skeleton
from lib.model.store import DiskStore, HostStore

CASES = ("admm", "experts", "packed", "packed from disk")
pytestmark = pytest.mark.usefixtures("at_place")


def by(size: int, each: int, cases: tuple[str, ...], place: Path) -> list[str]:
    """Digests of the models that so many processes save, `each` of them on a machine."""
    where = f"{size} by {each}"
    done = ended(together(size, [flags(case, where) for case in cases], place, each=each))
    assert [one.status for one in done] == [0] * size, [one.err for one in done]
    assert ("and once for all weights" in done[0].out) == (each > 1)
    assert not Path("away").exists()
    return [content(f"{where}/{case}/model")["model.safetensors"] for case in cases]


def test_the_same_bytes_as_with_a_copy_each(place: Path) -> None:
    """On one machine, and on two: there Wanda's, where no sum's order matters."""
    shared, apart = (by(2, each, CASES, place) for each in (2, 1))
    assert dict(zip(CASES, shared, strict=True)) == dict(zip(CASES, apart, strict=True))
    assert by(4, 2, CASES[-2:], place) == shared[-2:]


class Machine(DistContext):
    """A dist as it would be with one process after another, in one."""

    told: list = []

    def __init__(self, rank: int) -> None:
        super().__init__(CPU, alone=True)
        self.local_rank = self.rank = rank
        self.local_size = self.size = 2

    def barrier(self, seconds: float = 0) -> None:
        pass

    def all_gather_object(self, value):
        if self.is_local_main:
            self.told.append(value)
        return [self.told[-1], value]


@pytest.fixture
def files() -> tuple[int, int]:
    if not hasattr(os, "memfd_create"):
        pytest.skip("Linux's")
    return fetched._new_files()


def opened(files: tuple[int, int]) -> tuple[int, int]:
    return fetched._opened(os.getpid(), files)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Mixtral", "GPT-2", "Bloom"])
def test_who_is_handed_a_model_computes_the_same(name: str, files: tuple[int, int]) -> None:
    """The blocks and all else, in the same memory."""
    if name not in tiny.ALL:
        pytest.skip("no such model here")
    model = tiny.ALL[name]()
    ids = windows(5)
    expected = perplexity(runner_of(model), ids, 2)
    config, found, others = model.config, [], opened(files)
    assert can_be_shared(skeleton(config), decoder_blocks(skeleton(config))[1])
    for rank, theirs in enumerate((files, others)):
        sharing = Sharing(Machine(rank), theirs)
        made = fetched_model(lambda: model, lambda: skeleton(config), CPU, sharing)
        runner = BlockRunner(made[0], CPU, made[1])
        runner.verify()
        assert perplexity(runner, ids, 2) == expected
        found.append(runner)
    one, other = (runner.placement.store for runner in found)
    assert one.writes and not other.writes
    one.memory.fill_(0)
    assert not any(tensor.any() for tensor in other.tensors(0).values())
    embeddings = [runner.model.get_input_embeddings().weight for runner in found]
    embeddings[0].data.fill_(7)
    assert (embeddings[1] == 7).all()


def test_only_one_writes(tmp_path: Path) -> None:
    """And the others know what it has written."""
    before, after = {"a": torch.ones(6, 4)}, {"b": torch.zeros(2), "c": torch.full((3,), 5.0)}
    size, *layout = HostStore.layout([before, before])
    memory = torch.zeros(size, dtype=torch.uint8)
    writer, reader = (
        HostStore(memory, layout[0], list(layout[1]), writes) for writes in (True, False)
    )
    reader.replace_(1, before, {})
    assert not memory.any()
    writer.replace_(1, after, {})
    assert not reader.tensor(1, "a").all()
    reader.replace_(1, after, {})
    assert reader.tensors(1).keys() == after.keys()
    assert torch.equal(reader.tensor(1, "c"), after["c"]) and not writer.tensors(0)["a"].any()

    disk = [DiskStore(str(tmp_path), [{}, {}], writes) for writes in (True, False)]
    for store in disk:
        store.replace_(1, before, {"a": torch.float32})
    assert [path.name for path in tmp_path.iterdir()] == ["block-1-0.safetensors"]
    for store in disk:
        store.replace_(1, after, {"b": torch.bfloat16, "c": torch.bfloat16})
    assert [path.name for path in tmp_path.iterdir()] == ["block-1-1.safetensors"]
    for store in disk:
        assert torch.equal(store.tensor(1, "c"), after["c"])
        assert store.tensor(1, "c").dtype == torch.float32


def test_what_is_not_all_parameters_is_not_shared() -> None:
    plain = skeleton(tiny.tiny_llama().config)
    assert can_be_shared(plain, plain.model.layers)
    plain.model.table = torch.zeros(3)
    assert not can_be_shared(plain, plain.model.layers)
    one = nn.Linear(2, 2)
    assert not can_be_shared(skeleton(tiny.tiny_llama().config), nn.ModuleList([one, one]))


def test_where_a_process_can_not_be_looked_into(files: tuple[int, int]) -> None:
    """Each reads a copy of its own."""
    assert fetched._opened(2**22 + 1, files) is None
    assert fetched._opened(os.getpid(), None) is None
