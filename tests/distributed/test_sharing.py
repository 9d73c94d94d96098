"""The processes of a machine have one copy of a model's blocks, and do what they do without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
from lib.model.access import Checkpoint, stored_names
from lib.model.blocks import BlockRunner
from lib.model.offload import can_be_shared, device_map, offload_folder, read_in_files
from lib.model.pretrained import decoder_blocks, load_model, skeleton
from lib.model.weights import BlockWeights

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
    """A dist as it would be with one process after another, in one; the first one's answers count
    for the second, which asks in the same order."""

    def __init__(self, rank: int, answers: list) -> None:
        super().__init__(CPU, alone=True)
        self.local_rank = self.rank = rank
        self.local_size = self.size = 2
        self.answers, self.asked = answers, 0

    def barrier(self, seconds: float = 0) -> None:
        pass

    def all_gather_object(self, value):
        if self.is_local_main:
            self.answers.append(value)
        self.asked += 1
        return [self.answers[self.asked - 1], value]


@pytest.fixture
def runners(tmp_path: Path) -> Iterator[Callable[[nn.Module], list[BlockRunner]]]:
    """Makes the runners of two processes of a machine, on one model."""
    with ExitStack() as at_end:

        def make(model: nn.Module) -> list[BlockRunner]:
            model.save_pretrained(tmp_path / "checkpoint")
            checkpoint = Checkpoint(str(tmp_path / "checkpoint"))
            made, answers = [], []
            for rank in range(2):
                dist = Machine(rank, answers)
                own, files = read_in_files(
                    lambda converted: load_model(
                        checkpoint,
                        model.config,
                        dtype=model.dtype,
                        device_map=device_map(model, decoder_blocks(model)[0], CPU),
                        offload=converted,
                    ),
                    lambda: skeleton(model.config),
                    stored_names(checkpoint),
                    at_end.enter_context(offload_folder(str(tmp_path / "away"), dist, shared=True)),
                    dist,
                    CPU,
                    shared=True,
                    in_memory=True,
                )
                weights = BlockWeights(decoder_blocks(own)[1], CPU, files, dist=dist)
                made.append(BlockRunner(own, CPU, weights))
            return made

        yield make


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Mixtral", "GPT-2", "Bloom"])
def test_who_is_handed_a_model_computes_the_same(name: str, runners: Callable) -> None:
    if name not in tiny.ALL:
        pytest.skip("no such model here")
    model = tiny.ALL[name]()
    ids = windows(5)
    expected = perplexity(runner_of(model), ids, 2)
    empty = skeleton(model.config)
    assert can_be_shared(empty, decoder_blocks(empty)[1])
    for runner in runners(model):
        runner.verify()
        assert perplexity(runner, ids, 2) == expected
        assert runner.weights.zero_copy


def test_the_weights_are_in_memory_once(runners: Callable) -> None:
    """Blocks, and all that is outside them, are mapped from the same files."""
    mapped = []
    for runner in runners(tiny.tiny_llama()):
        with runner.on_device(0):
            weights = [*runner.blocks[0].parameters(), runner.model.get_input_embeddings().weight]
            mapped.append([file_at(weight.data_ptr()) for weight in weights])
    assert mapped[0] == mapped[1]
    assert {Path(file).name for file in mapped[0]} == {"model.safetensors", "rest.safetensors"}


def file_at(address: int) -> str:
    """The file that is mapped at an address of this process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("Linux's")
    for line in maps.read_text().splitlines():
        span, *_, file = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return file
    pytest.fail(f"{address:x} is not mapped")


def test_only_one_writes(runners: Callable, tmp_path: Path) -> None:
    """And the others know what it has written."""
    first, second = runners(tiny.tiny_llama())
    folder = tmp_path / "away" / "process-0"
    for number in range(2):
        for runner, value in ((first, 5.0 + number), (second, 7.0)):
            with runner.on_device(1, write_back=True):
                for parameter in runner.blocks[1].parameters():
                    parameter.data.fill_(value)
        names = [path.name for path in folder.glob("block-*")]
        assert names == [f"block-1-{number}.safetensors"]
        for runner in (first, second):
            with runner.on_device(1):
                assert all((one == 5.0 + number).all() for one in runner.blocks[1].parameters())
            with runner.on_device(0):
                assert not any((one == 7).all() for one in runner.blocks[0].parameters())


def test_what_is_not_all_parameters_is_not_shared() -> None:
    plain = skeleton(tiny.tiny_llama().config)
    assert can_be_shared(plain, plain.model.layers)
    plain.model.table = torch.zeros(3)
    assert not can_be_shared(plain, plain.model.layers)
    one = nn.Linear(2, 2)
    assert not can_be_shared(skeleton(tiny.tiny_llama().config), nn.ModuleList([one, one]))
