"""Blocks that come from disk or host memory one at a time: the same bytes, and no traces left."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import dispatch_model
from late import Gpu
from support import CPU, QUICK, Done, call, prune_, results, runner_of, weights, windows
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, modeling_utils

from lib.distributed.context import DistContext
from lib.eval import perplexities, perplexity, some_logits
from lib.methods.sparsity import Sparsity
from lib.model.access import Checkpoint
from lib.model.blocks import BlockRunner
from lib.model.fetched import check_offload_room, fetched_model, own_folder, unmapped
from lib.model.placement import BlockPlacement, device_map
from lib.model.pretrained import decoder_blocks, footprint, load_model, skeleton
from lib.model.store import end_of
from lib.prune import Pruner
from lib.pruning import check
from lib.sparse import check_same_outputs, swap_linears_

Disk = namedtuple("Disk", "total used free")
MODELS = ("sharded", "tied", "mixtral", "bfloat16", "gpt2")
pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    sharded = tiny.write_model(folder / "sharded", tiny.tiny_llama(num_hidden_layers=3))
    tiny.tiny_llama(num_hidden_layers=3).save_pretrained(sharded, max_shard_size="60KB")
    (sharded / "model.safetensors").unlink()
    tiny.write_model(folder / "tied", tiny.tiny_llama(tie_word_embeddings=True))
    tiny.write_model(folder / "mixtral", tiny.ARCHITECTURES["Mixtral"]())
    tiny.write_model(folder / "bfloat16", tiny.tiny_llama().bfloat16())
    tiny.write_model(folder / "gpt2", tiny.ARCHITECTURES["GPT-2"]())
    tiny.write_texts(folder / "uk", test=3)
    return folder


def prune(model: str | Path, folder: Path, *more: object, method: str = "wanda") -> Done:
    data = ["--calibration_data", "uk", "--eval_data", "uk", "--save", folder / "run"]
    flags = [*QUICK, *data, "--prune_method", method, "--save_model", folder / "model"]
    return call("--model", model, *flags, *more)


def perplexity_of(folder: Path) -> float:
    return results(folder / "run")["perplexity"]["uk"]


@pytest.mark.parametrize("model", MODELS)
def test_the_same_weights_as_without(model: str, tmp_path: Path) -> None:
    method = "sparsegpt" if model == "sharded" else "wanda"
    for where, flags in (("plain", []), ("offloaded", ["--offload", tmp_path / "away"])):
        done = prune(model, tmp_path / where, *flags, method=method)
        assert done.status == 0, done.err
        assert done.complaints == []
    plain, offloaded = (weights(tmp_path / where / "model") for where in ("plain", "offloaded"))
    assert plain.keys() == offloaded.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, offloaded[name]) and tensor.dtype == offloaded[name].dtype, name
    same = pytest.approx(perplexity_of(tmp_path / "plain"), rel=1e-5)
    assert perplexity_of(tmp_path / "offloaded") == same
    assert not (tmp_path / "away").exists()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "offloaded" / "model")
    tied = reloaded.lm_head.weight is reloaded.get_input_embeddings().weight
    assert tied == (model in ("tied", "gpt2"))


def test_the_folder_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    away = tmp_path / "away"
    (away / "process-0").mkdir(parents=True)
    (away / "process-0" / "block-7.safetensors").write_bytes(b"of a killed run")
    (away / "letter.txt").write_text("dear")
    assert prune("tied", tmp_path, "--offload", away).status == 0
    assert [path.name for path in away.iterdir()] == ["letter.txt"]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    away = str(tmp_path / "away")
    with own_folder(away, DistContext(CPU, alone=True)) as own:
        (Path(own) / "block-0.safetensors").write_bytes(b"in use")
        done = prune("tied", tmp_path, "--offload", away)
        assert done.complaints == [
            f"error: --offload {away}: another run uses it; name another folder"
        ]
        assert (Path(own) / "block-0.safetensors").read_bytes() == b"in use"
    assert not Path(away).exists()


def test_a_folder_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**6, 10**6 - 1000, 1000))
    monkeypatch.setattr("lib.model.pretrained.load_model", lambda *_, **__: pytest.fail("loaded"))
    done = prune("tied", tmp_path, "--offload", tmp_path / "away")
    (line,) = done.complaints
    assert line.startswith(f"error: --offload {tmp_path / 'away'}: needs about ")
    assert not (tmp_path / "away").exists()


def test_experts_that_are_fused_need_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("lib.model.fetched.check_room", lambda _, __, needed: asked.append(needed))
    for name in ("tied", "mixtral"):
        model = AutoModelForCausalLM.from_pretrained(name)
        path, blocks = decoder_blocks(model)
        check_offload_room("away", name, model, path, torch.float32, torch.bfloat16)
        asked.append(2 * sum(weight.numel() for weight in blocks.parameters()))
    tied, plain, mixtral, blocks = asked
    assert tied == plain
    assert blocks < mixtral <= 3 * blocks


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_, file: str) -> None:
        raise OSError(28, "No space left on device", file)

    monkeypatch.setattr("lib.model.store.save_file", full)
    done = prune("sharded", tmp_path, "--offload", tmp_path / "away")
    (line,) = done.complaints
    assert "error: --offload" in line and "block 0 can't be written" in line
    assert not (tmp_path / "away").exists() and not (tmp_path / "model").exists()


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_shard_that_is_damaged_in_the_middle_of_the_run(
    damage: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "sharded", tmp_path / "sharded")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    name = index["weight_map"]["model.layers.2.mlp.up_proj.weight"]
    file, own = tmp_path / "sharded" / name, Pruner._block_

    def damaging(self: Pruner, index: int, *streams) -> None:
        own(self, index, *streams)
        if index == 0 and damage == "cut":
            file.write_bytes(file.read_bytes()[:2000])
        elif index == 0:
            file.unlink()

    monkeypatch.setattr(Pruner, "_block_", damaging)
    done = prune(tmp_path / "sharded", tmp_path, "--offload", tmp_path / "away")
    assert done.status == 1
    (line,) = done.complaints
    assert name in line and "can't be read from" in line
    assert not (tmp_path / "model").exists() and not (tmp_path / "away").exists()


def test_quantising_is_not_offloaded(tmp_path: Path) -> None:
    done = prune("tied", tmp_path, "--offload", tmp_path / "away", "--load_bit", "4")
    (line,) = done.complaints
    assert done.status == 2 and f"--offload {tmp_path / 'away'}" in line and "--load_bit 4" in line


def dispatched(model: PreTrainedModel) -> PreTrainedModel:
    """As transformers leaves it where blocks are on the host and all else is on `a device`."""
    where = device_map(model, decoder_blocks(model)[0], CPU, "away")
    where = {part: "cpu" if place == "away" else CPU for part, place in where.items()}
    return dispatch_model(model, where, main_device=CPU, force_hooks=True)


def on_host(model: PreTrainedModel) -> BlockRunner:
    """The model with its blocks in host memory and everything else on `a device`: the CPU again."""
    model, placement = fetched_model(lambda: dispatched(model), lambda: None, CPU)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    runner = BlockRunner(model, CPU, placement)
    assert all(parameter.is_meta for parameter in runner.blocks.parameters())
    return runner


@pytest.mark.parametrize("architecture", ["Llama", "Gemma 2", "Mixtral"])
def test_blocks_in_host_memory(architecture: str, tmp_path: Path) -> None:
    found = []
    for make in (runner_of, on_host):
        model = tiny.ARCHITECTURES[architecture]()
        runner = make(model)
        runner.verify()
        prune_(runner, "sparsegpt")
        value = perplexity(runner, windows(5), 2).value
        folder = tmp_path / make.__name__
        with runner.materialized():
            model.save_pretrained(folder)
        fetched = all(parameter.is_meta for parameter in runner.blocks.parameters())
        assert fetched == (make is on_host)
        found.append((value, weights(folder)))
    (value, plain), (again, fetched) = found
    assert again == pytest.approx(value, rel=1e-6)
    assert plain.keys() == fetched.keys()
    assert all(torch.equal(plain[name], fetched[name]) for name in plain)


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2"])
def test_blocks_in_host_memory_are_packed(architecture: str, tmp_path: Path) -> None:
    """Block by block, in the room they had; measured, evaluated and saved like that."""
    found = []
    for make in (runner_of, on_host):
        runner = make(tiny.ARCHITECTURES[architecture]())
        prune_(runner, "wanda", Sparsity(0.5, 2, 4))
        model = runner.model
        before = some_logits(model, windows(1))
        report = swap_linears_(
            model,
            runner.blocks,
            CPU,
            lambda index, runner=runner: runner.on_device(index, write_back=True),
        )
        check_same_outputs(before, some_logits(model, windows(1)))
        value = perplexity(runner, windows(5), 2).value
        zeros = check.measure(runner).shares()
        folder = tmp_path / make.__name__
        with runner.materialized():
            model.save_pretrained(folder)
        found.append((str(report), value, zeros, weights(folder), footprint(model)))
        if make is on_host:
            assert all(parameter.is_meta for parameter in runner.blocks.parameters())
            ends = [end_of(slots) for slots in runner.placement.store.slots]
            size = len(runner.placement.store.memory) / len(ends)
            assert max(ends) < size
    (line, value, zeros, plain, size), (line_, value_, zeros_, fetched, size_) = found
    assert (line, zeros, size) == (line_, zeros_, size_) and line.startswith("packed linears: ")
    assert value_ == pytest.approx(value, rel=1e-6)
    assert plain.keys() == fetched.keys() and any(name.endswith(".mask") for name in plain)
    assert all(torch.equal(plain[name], fetched[name]) for name in plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm"])
def test_fetched_to_a_gpu(method: str) -> None:
    """The same weights and perplexity as where all of the model is on it, and packed too."""
    gpu, found = torch.device("cuda", 0), []
    config = AutoConfig.from_pretrained("bfloat16")
    model = skeleton(config)
    name, _ = decoder_blocks(model)
    for where in ({"": gpu}, device_map(model, name, gpu, "cpu")):
        known = dict(dtype=torch.bfloat16, device_map=where)

        def read(known: dict = known) -> PreTrainedModel:
            return load_model(Checkpoint("bfloat16"), config, **known)

        one, placement = (read(), None) if len(where) == 1 else fetched_model(read, read, gpu)
        runner = BlockRunner(one, gpu, placement)
        runner.verify()
        prune_(runner, method, Sparsity(0.5, 2, 4))
        values = [perplexity(runner, windows(5), 2).value]
        swap_linears_(
            one,
            runner.blocks,
            gpu,
            lambda index, runner=runner: runner.on_device(index, write_back=True),
        )
        values.append(perplexity(runner, windows(5), 2).value)
        kept = [one.state_dict()] if placement is None else []
        kept = kept or [{f"{name}.{i}.{path}": tensor for i in range(len(runner.blocks))
                         for path, tensor in placement.store.tensors(i).items()}]  # fmt: skip
        found.append((values, kept[0]))
    (values, plain), (values_, fetched) = found
    assert values_ == pytest.approx(values, rel=1e-3)
    assert all(torch.equal(tensor, plain[key].cpu()) for key, tensor in fetched.items())


@pytest.mark.usefixtures("dear")
def test_states_are_kept_where_the_run_says(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = on_host(tiny.tiny_llama())
    asked, own = [], runner.capture
    monkeypatch.setattr(
        runner, "capture", lambda ids, size, where: asked.append(where) or own(ids, size, CPU)
    )
    perplexities(runner, [windows(3), windows(2)], 2, state_device="somewhere")
    assert asked == ["somewhere"] * 2


@pytest.mark.parametrize("writers", [1, 4])
def test_room_for_all_that_write(writers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("lib.model.fetched.check_room", lambda _, __, needed: asked.append(needed))
    model = AutoModelForCausalLM.from_pretrained("tied")
    path, blocks = decoder_blocks(model)
    known = "away", "tied", model, path, torch.float32, torch.bfloat16
    check_offload_room(*known, writers)
    assert asked == [writers * 2 * sum(weight.numel() for weight in blocks.parameters())]


@pytest.fixture
def dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that cost something to bring, as to a GPU."""
    monkeypatch.setattr(BlockPlacement, "zero_copy", False)


@pytest.mark.usefixtures("dear")
def test_the_next_block_comes_while_one_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is waited for: by a stream that copies no sooner than it must."""
    expected = perplexity(runner_of(tiny.tiny_llama(num_hidden_layers=3)), windows(5), 2)
    runner = on_host(tiny.tiny_llama(num_hidden_layers=3))
    Gpu(monkeypatch, eager=True, eager_side=False)
    runner.placement.side = torch.cuda.Stream()
    assert perplexity(runner, windows(5), 2) == expected
    assert runner.placement.side.done == len(runner.placement.side.work) > 0


@pytest.mark.usefixtures("dear")
@pytest.mark.parametrize("make", [runner_of, on_host])
def test_several_sets_are_measured_at_once(
    make: Callable[[PreTrainedModel], BlockRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as if alone; where blocks are fetched, each of them once."""
    runner = make(tiny.tiny_llama())
    sets = [windows(count, seed=count) for count in (5, 2, 3)]
    alone = [perplexity(runner, one, 2) for one in sets]
    on_device, told, original = [], [], runner.on_device
    monkeypatch.setattr(
        runner, "on_device", lambda index: on_device.append(index) or original(index)
    )
    assert perplexities(runner, sets, 2, on_progress=told.append) == alone
    assert on_device == [0, 1] * (1 if make is on_host else 3 + 1 + 2)
    assert sum(told) == 10 and min(told) >= 0


def test_blocks_that_stand_in_the_hosts_memory_are_used_there() -> None:
    """Each batch goes through all of them, so that no hidden states pile up."""
    runner = on_host(tiny.tiny_llama())
    memory = runner.placement.store.memory
    start, end = memory.data_ptr(), memory.data_ptr() + len(memory)
    with runner.on_device(0):
        assert all(start <= one.data_ptr() < end for one in runner.blocks[0].parameters())
    with runner.on_device(0, write_back=True):
        assert not any(start <= one.data_ptr() < end for one in runner.blocks[0].parameters())
    assert runner.placement.zero_copy


def test_sparsity_is_measured_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting zeros reads every block again, here from the disk."""
    calls, own = [], check.measure
    monkeypatch.setattr(check, "measure", lambda *given: calls.append(1) or own(*given))
    wanda = ["--prune_method", "wanda", "--calibration_data", "uk", "--offload", "away"]
    done = call("--model", "tied", *QUICK, *wanda)
    assert done.status == 0, done.err
    assert len(calls) == 1 and results()["sparsity"]["overall"] == 0.5


def test_how_transformers_reads_is_as_before_afterwards() -> None:
    before = modeling_utils.safe_open
    with pytest.raises(KeyboardInterrupt), unmapped():
        assert modeling_utils.safe_open is not before
        raise KeyboardInterrupt
    assert modeling_utils.safe_open is before
