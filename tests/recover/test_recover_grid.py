"""Recovery on the grid: what is trained, measured and saved are the integers that are packed."""

from __future__ import annotations

import signal
from pathlib import Path

import processes
import pytest
import tiny
import torch
from support import ALONE, QUICK, call, prune_, results, runner_of, windows
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lib import recover
from lib.data.training import TrainingText
from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.model.pretrained import fresh_copy
from lib.model.work_folder import WorkFolder
from lib.packed.linear import SparseLinear
from lib.recover import Grid, Recoverer, TrainSchedule
from lib.sparse import packed_weights, swap_linears_
from lib.util.errors import UserError

SEQLEN, STEPS = 24, 40
MODELS = {
    "Llama": tiny.tiny_llama,
    "GPT-2": tiny.ARCHITECTURES["GPT-2"],
    "Mixtral": tiny.ARCHITECTURES["Mixtral"],
    "shared blocks": tiny.HYBRIDS["Zamba2"],
}


@torch.no_grad()
def divergence(teacher: BlockRunner, runner: BlockRunner, ids: Tensor) -> float:
    """KL(teacher || model), nats a token."""
    model, dense = (
        one.model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        for one in (runner, teacher)
    )
    return F.kl_div(model, dense, log_target=True, reduction="none").sum(-1).mean().item()


def trainer(
    bits: int,
    name: str = "Llama",
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    finished: WorkFolder | None = None,
    clip: float = 1.0,
) -> Recoverer:
    """Of a pruned model, on windows that it is also measured on."""
    model = MODELS[name]().to(dtype)
    teacher = runner_of(fresh_copy(model).requires_grad_(False))
    runner = runner_of(model.requires_grad_(False))
    prune_(runner, "wanda", Sparsity(0.5, 2, 4))
    ids = windows(4, SEQLEN)
    weights = packed_weights(runner.blocks, runner.name)
    return Recoverer(
        runner=runner,
        teacher=teacher,
        schedule=TrainSchedule(STEPS * SEQLEN, SEQLEN, 5e-3, rank, least=SEQLEN, clip=clip),
        text=TrainingText(ids, torch.arange(STEPS) % 4, ids[:2], {"sources": []}),
        batch_size=2,
        measure=lambda runner, ids: divergence(teacher, runner, ids),
        rounding=torch.bfloat16,
        dist=ALONE,
        finished=finished,
        grids={name: Grid(bits, transposed) for name, transposed in weights.items()},
    )


def assert_on_grid(weight: Tensor, grid: Grid) -> None:
    """Every weight is an integer of its bits times the scale of its group, by plain division."""
    matrix = weight.T if grid.transposed else weight
    group = grid.group or matrix.shape[1]
    for start in range(0, matrix.shape[1], group):
        scale = grid.scales[:, start // group, None].float()
        part = matrix[:, start : start + group].float()
        codes = (part / scale).round()
        low, high = {8: (-127, 127), 4: (-8, 7)}[grid.bits]
        assert low <= codes.min() and codes.max() <= high
        assert torch.equal((codes * scale).to(weight.dtype).float(), part)


@pytest.mark.parametrize(
    "name, rank", [(name, None) for name in MODELS] + [("Llama", 4), ("GPT-2", 4)]
)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_step_is_on_the_grid_and_the_best_one_is_packed(
    name: str, bits: int, rank: int | None
) -> None:
    one = trainer(bits, name, rank)
    model, blocks = one.runner.model, one.runner.blocks
    zeros = {key: model.get_parameter(key) == 0 for key in one.grids}
    assert one.grids
    scales, step = [], one._step

    def checked(number: int) -> float:
        loss = step(number)
        for key, grid in one.grids.items():
            assert_on_grid(model.get_parameter(key), grid)
            assert bool((model.get_parameter(key)[zeros[key]] == 0).all())
        scales.append(next(iter(one.grids.values())).scales.clone())
        return loss

    one._step = checked
    done = one.run()
    assert done.curve[done.best]["perplexity"] < done.curve[0]["perplexity"]
    changes = [not torch.equal(*pair) for pair in zip(scales[:-1], scales[1:], strict=True)]
    assert sum(changes) == STEPS // recover.REFIT  # kept for some steps, then fitted again
    shared = {id(model.get_parameter(key)) for key in one.grids}
    names = [key for key, p in model.named_parameters(remove_duplicate=False) if id(p) in shared]
    held = {key: model.get_parameter(key).clone() for key in names}
    measured = one.measure(one.runner, one.text.held_out)
    assert measured == done.curve[done.best]["perplexity"]
    dense = {key for key, _ in model.named_parameters()} - set(held)
    before = {key: model.get_parameter(key).clone() for key in dense}
    swap_linears_(model, blocks, bits=bits, scales=one.scales)
    packed = {f"{key}.weight": m for key, m in model.named_modules() if isinstance(m, SparseLinear)}
    assert packed.keys() == held.keys()
    for key, module in packed.items():
        weight = module.dense(torch.float32)
        assert torch.equal(weight.T if module.transposed else weight, held[key])
    after = dict(model.named_parameters())
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("bits", [8, 4])
def test_in_16_bits_the_packed_codes_are_those_that_were_held(bits: int) -> None:
    """At 8 bits the model's dtype rounds code times scale, and the scales say which code it was."""
    one = trainer(bits, dtype=torch.bfloat16)
    one.run()
    model = one.runner.model
    held = {key: model.get_parameter(key).clone() for key in one.grids}
    swap_linears_(model, one.runner.blocks, bits=bits, scales=one.scales)
    for key, weight in held.items():
        module = model.get_submodule(key.removesuffix(".weight"))
        assert torch.equal(module.dense(torch.bfloat16), weight)
        assert torch.equal(module.scale.view_as(one.best_scales[key]), one.best_scales[key])


@pytest.mark.parametrize("bits, stop", [(8, 21), (4, 4), (4, 21)])
def test_taken_up_again_it_ends_with_the_same_values_and_scales(
    bits: int, stop: int, tmp_path: Path
) -> None:
    whole = trainer(bits)
    whole.run()
    folder = WorkFolder("--resume", tmp_path / "kept")
    folder.begin({})
    broken = trainer(bits, finished=folder)
    step = broken._step

    def interrupted(number: int) -> float:
        if number == stop:
            raise KeyboardInterrupt
        return step(number)

    broken._step = interrupted
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    again = trainer(bits, finished=folder)
    again.run()
    for key, tensor in whole.runner.model.state_dict().items():
        assert torch.equal(again.runner.model.state_dict()[key], tensor)
    for key, scales in whole.best_scales.items():
        assert torch.equal(again.best_scales[key], scales)


def test_weights_that_are_not_finite_are_told_as_a_rate_too_high() -> None:
    with pytest.raises(UserError, match="--recover_rate 0.005: in step 1 of 40 weights are not"):
        trainer(4, clip=float("nan")).run()


BASE = [*QUICK, "--calibration_data", "uk", "--eval_data", "uk"]
PRUNE = ["--prune_method", "wanda", "--sparsity_ratio", "0.5"]
RECOVER = ["--recover", 20 * 256]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_texts(folder / "uk", train=400, test=8)
    tiny.write_model(folder / "model", tiny.tiny_llama().bfloat16())
    return folder


def packing(bits: int, folder: Path) -> list[object]:
    return [
        "--replace_sparse_layers",
        *("--pack_bits", bits, "--save", folder / "out", "--save_model", folder / "model"),
    ]


def dense_weights(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the linears of a packed checkpoint stand for, by name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    linears = {key: m for key, m in model.named_modules() if isinstance(m, SparseLinear)}
    return {f"{key}.weight": module.dense(dtype) for key, module in linears.items()}


@pytest.mark.usefixtures("at_place")
@pytest.mark.parametrize("flags", [[], ["--dtype", "bfloat16"], ["--recover_rank", "4"]])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_was_measured_is_what_is_saved(
    bits: int, flags: list[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, Tensor] = {}
    run = Recoverer.run

    def noted(self: Recoverer, *args: object) -> recover.Recovered:
        done = run(self, *args)
        held.update({key: self.runner.model.get_parameter(key).clone() for key in self.grids})
        return done

    monkeypatch.setattr(Recoverer, "run", noted)
    argv = ["--model", trained, *BASE, *PRUNE, *RECOVER, *flags, *packing(bits, tmp_path)]
    found = call(*argv)
    assert found.status == 0, found.err
    assert f"recovery: 14 of 18 tensors are trained as the {bits}-bit integers" in found.out
    saved = dense_weights(tmp_path / "model", next(iter(held.values())).dtype)
    assert saved.keys() == held.keys() and len(saved) == 14
    assert all(torch.equal(saved[key], weight) for key, weight in held.items())
    record = results(tmp_path / "out")
    assert record["packed"]["bits"] == bits and record["packed"]["difference"] < 1e-2
    assert record["sparsity"]["overall"] >= 0.5
    same = flags if "--dtype" in flags else []
    again = call("--model", tmp_path / "model", *BASE, *same, "--eval_only")
    assert again.status == 0, again.err
    measured = record["perplexity"]["uk"]
    assert results()["perplexity"]["uk"] == pytest.approx(measured, rel=1e-5)


@pytest.mark.usefixtures("at_place")
def test_four_bits_trained_are_better_than_four_bits_rounded_afterwards(
    trained: Path, tmp_path: Path
) -> None:
    argv = ["--model", trained, *BASE, *PRUNE, *RECOVER]
    on_grid = call(*argv, *packing(4, tmp_path / "grid"))
    assert on_grid.status == 0, on_grid.err
    found = call(*argv, "--save", tmp_path / "out", "--save_model", tmp_path / "dense")
    assert found.status == 0, found.err
    later = ["--model", tmp_path / "dense", *BASE, "--eval_only", *packing(4, tmp_path / "later")]
    found = call(*later)
    assert found.status == 0, found.err
    before = ["--model", tmp_path / "dense", "--teacher", trained, *BASE, *RECOVER]
    found = call(*before, *packing(4, tmp_path / "again"))  # pruned before, and recovered on it
    assert found.status == 0, found.err
    trained_so, rounded = (
        results(tmp_path / name / "out")["perplexity"]["uk"] for name in ("grid", "later")
    )
    assert trained_so < rounded
    again = results(tmp_path / "again" / "out")
    held_out = [point["perplexity"] for point in again["recovery"]["curve"]]
    assert again["packed"]["bits"] == 4 and min(held_out) < held_out[0]
    model, same = tmp_path / "again" / "model", ["--eval_only", "--save", tmp_path / "saved"]
    assert call("--model", model, *BASE, *same).status == 0
    measured = again["perplexity"]["uk"]
    assert results(tmp_path / "saved")["perplexity"]["uk"] == pytest.approx(measured, rel=1e-5)


@pytest.mark.usefixtures("at_place")
def test_killed_and_the_same_bytes(place: Path, tmp_path: Path) -> None:
    argv = ["--model", "model", *BASE, *PRUNE, *RECOVER]
    assert call(*argv, *packing(4, tmp_path / "whole")).status == 0
    argv += [*packing(4, tmp_path / "again"), "--resume", tmp_path / "kept"]
    assert processes.run(argv, place, "step 17:SIGKILL").status == -signal.SIGKILL
    assert (tmp_path / "kept/recovery.safetensors").exists()
    found = call(*argv)
    assert found.status == 0, found.err
    first, second = (tmp_path / name / "model/model.safetensors" for name in ("whole", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.usefixtures("at_place")
def test_two_processes_pack_the_same_model(place: Path, tmp_path: Path) -> None:
    argv = ["--model", "model", *BASE, *PRUNE, *RECOVER, *packing(4, tmp_path)]
    ended = processes.ended(processes.together(2, [argv], place))
    assert [one.status for one in ended] == [0, 0], ended[0].err
    record = results(tmp_path / "out")
    again = call("--model", tmp_path / "model", *BASE, "--eval_only")
    assert again.status == 0, again.err
    assert results()["perplexity"]["uk"] == pytest.approx(record["perplexity"]["uk"], rel=1e-5)
