"""Ranks share out what is trained (lib/sharded.py), and do what one process would have done."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import chats
import pytest
import support
import tiny
import torch
import torch.distributed as torch_dist
from processes import case_flags, ended, kept_port, together
from support import CPU, QUICK, call, content, reloaded, results, succeed, weights, windows
from torch.testing._internal.distributed.fake_pg import FakeStore

from lib.data.training import TrainingText
from lib.distributed.context import DistContext
from lib.model.blocks import BlockRunner
from lib.model.pretrained import fresh_copy
from lib.model.run_folder import RunFolder
from lib.model.store import BlockStore
from lib.recover import Recoverer, TrainSchedule
from lib.run.check import _check_seen
from lib.util.command import FAILED
from lib.util.errors import UserError

TERMINATED = 128 + signal.SIGTERM
BASE = [*QUICK, "--eval_data", "uk", "--calibration_data", "uk", "--batch_size", "1"]
TRAIN = "--recover 512"  # two steps of eight windows
CASES = {
    "dense": f"llama --prune_method wanda {TRAIN}",
    "tied": f"tied --prune_method wanda --trim_vocabulary --recover_ce_weight 0.3 {TRAIN}",
    "2:4": f"llama --prune_method wanda --sparsity_type 2:4 --recover_optimizer adamw8bit {TRAIN}",
    "mixture": f"mixtral --prune_method wanda --quantize q4_0 {TRAIN}",
    # of one window all ranks have the same sums: codes are the same before they are trained
    "Conv1D": f"gpt2 --prune_method wanda --quantize q4_0 --nsamples 1 {TRAIN}",
    "q4_0": f"llama --quantize q4_0 {TRAIN}",
    "iq4_nl": f"llama --quantize iq4_nl {TRAIN}",
    "int4": "llama --prune_method wanda --sparsity_type 2:4 --replace_sparse_layers --quantize "
    f"int4 {TRAIN}",
    "rank": f"llama --prune_method wanda --recover_rank 4 {TRAIN}",
    "rank, Conv1D": f"gpt2 --prune_method wanda --recover_rank 4 {TRAIN}",
    "rank, experts": f"mixtral --prune_method wanda --recover_rank 4 {TRAIN}",
    "neurons": f"llama --prune_method wanda --sparsity_type neurons {TRAIN}",
    "saved in bfloat16": f"bfloat16 --prune_method wanda --sparsity_type 4:8 {TRAIN}",
    "in bfloat16": f"bfloat16 --dtype bfloat16 --quantize q4_0 --recover_rank 4 {TRAIN}",
    "teacher": f"pruned --teacher llama {TRAIN}",
    "one window": "llama --prune_method wanda --recover 32",  # and a rank that has none
    "dialogues": "chat --prune_method wanda --calibration_data chats --recover 96",
}
flags = partial(case_flags, CASES, BASE)
TWICE = ("q4_0", "rank, experts")
# for three ranks: four experts, rows in parts that are padded, outputs that can't be padded
UNEVEN = ("mixture", "Conv1D", "rank", "rank, Conv1D")
pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "llama", tiny.tiny_llama(num_hidden_layers=3))
    tiny.write_model(folder / "bfloat16", tiny.tiny_llama(num_hidden_layers=3).bfloat16())
    tiny.write_model(folder / "tied", tiny.tiny_llama(tie_word_embeddings=True))
    wide = tiny.EXPERTS | dict(intermediate_size=32)
    tiny.write_model(folder / "mixtral", tiny.build("mixtral", 0, **wide))
    tiny.write_model(folder / "gpt2", tiny.ARCHITECTURES["GPT-2"]())
    tiny.write_model(folder / "chat", tiny.tiny_llama(), chats.tokenizer_with(chats.QWEN_3))
    tiny.write_texts(folder / "uk", test=3)
    chats.write(folder / "chats", chats.some(50), chats.some(8, seed=1))
    saved = ["--save", folder / "pruning", "--save_model", folder / "pruned"]
    data = ["--calibration_data", folder / "uk", "--eval_data", folder / "uk"]
    succeed("--model", folder / "llama", *QUICK, *data, "--prune_method", "wanda", *saved)
    return folder


def left_by(size: int, cases: tuple[str, ...], place: Path, where: str) -> str:
    done = ended(together(size, [flags(case, where) for case in cases], place))
    assert [one.status for one in done] == [0] * size, [one.err for one in done]
    assert done[0].out.count(f"recovery: {size} ranks share the trained weights") == len(cases)
    assert [(one.out, one.err) for one in done[1:]] == [("", "")] * (size - 1)
    return where


@pytest.fixture(scope="module")
def two(place: Path) -> str:
    return left_by(2, tuple(CASES), place, "two")


def check_alike(case: str, shared: str) -> None:
    """What ranks have left, against what one process leaves."""
    if not Path(f"one/{case}").exists():
        succeed(*flags(case, "one"))
    one, many = (results(f"{where}/{case}/run") for where in ("one", shared))
    curves = [
        [(each["tokens"], each["loss"]) for each in found["recovery"]["curve"]]
        for found in (one, many)
    ]
    assert len(curves[0]) > 1 and curves[0][-1][1] != curves[0][0][1]
    for (tokens, loss), (own_tokens, own) in zip(*curves, strict=True):
        assert tokens == own_tokens and own == pytest.approx(loss, rel=1e-3)
    for key in ("rate", "weights", "steps", "windows"):
        assert many["recovery"][key] == pytest.approx(one["recovery"][key], rel=1e-6)
    for found in (one, many):
        found["quantized"] = {**found.get("quantized", {}), "difference": 0}
    assert many["quantized"] == one["quantized"]  # that codes are on their grid is checked there
    before, after = (weights(f"{where}/{case}/model") for where in ("one", shared))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if case == "int4" and name.endswith(("weight", "mask", "scale")):
            continue  # packed: codes that are rounded another way
        differ = int(((tensor == 0) != (after[name] == 0)).sum())
        on_grid = "4_" in CASES[case]  # where a kept weight may round to 0 too
        assert differ <= (0.02 * tensor.numel() if on_grid else 0), name
        assert after[name].shape == tensor.shape and after[name].dtype == tensor.dtype
    if case != "int4":
        flags_again = ["--eval_data", "uk"]
        reloaded(f"{shared}/{case}/model", f"{shared}/{case}/run", *flags_again)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_do_as_one_process(case: str, two: str) -> None:
    check_alike(case, two)


@pytest.fixture(scope="module")
def three(place: Path) -> str:
    return left_by(3, UNEVEN, place, "three")


@pytest.mark.parametrize("case", UNEVEN)
def test_so_do_three_whose_parts_differ_in_size(case: str, three: str) -> None:
    check_alike(case, three)


def test_so_do_four(place: Path) -> None:
    check_alike("dense", left_by(4, ("dense",), place, "four"))


def test_so_do_two_launchers_as_on_two_machines(place: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2]
    with kept_port() as port:
        torchrun += ["--master_addr", "127.0.0.1", "--master_port", port.getsockname()[1]]
        job = [support.ROOT / "main.py", *flags("one window", "launched")]
        ranks = [[*torchrun, "--node_rank", rank, *job] for rank in range(2)]
        launched = [support.start(command, place) for command in ranks]
        done = [support.ended(one) for one in launched]
    assert [one.status for one in done] == [0, 0], [one.err for one in done]
    said = ["recovery: 2 ranks share the trained weights" in one.out for one in done]
    assert said == [True, False]
    check_alike("one window", "launched")


def test_the_same_ranks_leave_the_same_bytes(place: Path, two: str) -> None:
    again = left_by(2, TWICE, place, "again")
    for case in TWICE:
        first, second = (content(f"{where}/{case}/model") for where in (two, again))
        assert {name: digest for name, digest in first.items() if name != "README.md"} == {
            name: digest for name, digest in second.items() if name != "README.md"
        }


def test_a_rank_that_dies_ends_all_and_the_training_goes_on(place: Path, two: str) -> None:
    argv = [*flags("dense", "killed"), "--resume", "kept"]
    done = ended(together(2, [argv], place, {1: "save training 0:SIGKILL"}))
    assert done[1].status == -signal.SIGKILL and done[0].status == FAILED
    assert "rank 0 of 2: rank 1 has ended or does not answer" in done[0].complaints[-1]
    done = ended(together(2, [argv], place, {1: "save training 1:SIGKILL"}))
    assert done[1].status == -signal.SIGKILL
    assert len(list(Path("kept").glob("recovery-*-of-00002-1.safetensors"))) == 2
    for size in (1, 3):
        done = ended(together(size, [argv], place)) if size > 1 else [call(*argv)]
        [line] = [line for one in done for line in one.complaints]
        assert f"training was begun with WORLD_SIZE 2, not {size}. Start as many" in line
    done = ended(together(2, [argv], place))
    assert [one.status for one in done] == [0, 0], [one.err for one in done]
    assert "a training checkpoint" in done[0].out and not Path("kept").exists()
    first, second = (weights(f"{where}/dense/model") for where in ("two", "killed"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


REFUSED = {
    "--seed 5": "--seed: rank ",
    "--recover_rank 2": "--recover_rank: rank ",
}


@pytest.mark.parametrize("more", REFUSED)
def test_ranks_with_other_flags_are_refused(more: str, place: Path) -> None:
    own = {1: more.split()}
    done = ended(together(2, [flags("dense", "refused")], place, own=own))
    assert [one.status for one in done] == [FAILED, TERMINATED]
    [line] = [line for one in done for line in one.complaints]
    assert line.startswith(f"error: {REFUSED[more]}")


def test_more_ranks_than_experts_are_refused(place: Path) -> None:
    done = ended(together(5, [flags("mixture", "refused")], place))
    lines = {line for one in done for line in one.complaints}
    assert lines == {
        "error: WORLD_SIZE 5: model.layers.0.mlp.experts.gate_up_proj has 4 experts, fewer than "
        "the ranks that would share them out for --recover. Start at most 4."
    }


# --- in this process


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


def test_a_folder_that_a_rank_does_not_see_is_refused(tmp_path: Path) -> None:
    folder = RunFolder("--resume", tmp_path / "kept")
    folder.begin({})
    dist = SimpleNamespace(all_gather_object=lambda one: [one, one])
    _check_seen(dist, "--resume", folder)
    dist.all_gather_object = lambda one: [one, False]  # what the second rank says
    with pytest.raises(UserError, match="kept: rank 1 cannot see this folder"):
        _check_seen(dist, "--resume", folder)
