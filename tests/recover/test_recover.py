"""The training itself: what moves and what does not, the loss, the grid, and what is kept."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from support import PACKED, prune_, refused, representative, runner_of, windows
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lib.data.samples import Windows, as_windows
from lib.data.training import TrainingText
from lib.formats.grids import Grid
from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.model.matrix import SaveDtypes
from lib.model.pretrained import fresh_copy
from lib.stages import recover
from lib.stages.recover import Recoverer, TrainSchedule, default_rate, divergence_, trained_parts

SEQLEN, STEPS = 24, 20
PATTERN = Sparsity(0.5, 2, 4)
BFLOAT16 = torch.bfloat16
MODELS = {
    "Llama": tiny.tiny_llama,
    "GPT-2": tiny.ARCHITECTURES["GPT-2"],
    "Gemma 2": tiny.ARCHITECTURES["Gemma 2"],
    "Mixtral": tiny.ARCHITECTURES["Mixtral"],
    "GPT-OSS": tiny.HYBRIDS["GPT-OSS"],
    "shared blocks": tiny.HYBRIDS["Zamba2"],
    "Mamba": tiny.HYBRIDS["Mamba"],
}
WAYS = {"whole": {}, "rank 4": dict(rank=4), "grid": dict(grid=True)}
WAYS |= {"grid, rank 4": dict(grid=True, rank=4)}


def schedule(rank: int | None = None, **changed) -> TrainSchedule:
    known = dict(tokens=STEPS * SEQLEN, seqlen=SEQLEN, rate=1e-2, rank=rank, least=SEQLEN)
    return TrainSchedule(**known | changed)


@torch.no_grad()
def divergence(teacher: BlockRunner, runner: BlockRunner, ids: Tensor) -> float:
    """KL(teacher || model), nats a token, in plain float64."""
    p, q = (
        one.model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        for one in (runner, teacher)
    )
    return F.kl_div(p, q, log_target=True, reduction="none").sum(-1).mean().item()


def pruned(name: str = "Llama") -> tuple[BlockRunner, BlockRunner]:
    """A pruned model and its teacher."""
    model = MODELS[name]()
    teacher = runner_of(fresh_copy(model).requires_grad_(False))
    runner = runner_of(model.requires_grad_(False))
    prune_(runner, "wanda", PATTERN)
    for parameter in runner.blocks.parameters():
        if parameter.dim() > 1:  # some of the zeros are negative ones
            parameter.data[0].masked_fill_(parameter.data[0] == 0, -0.0)
    return runner, teacher


def trainer(
    name: str = "Llama",
    rank: int | None = None,
    grid: bool = False,
    dtype: torch.dtype | None = None,
    batch_size: int = 2,
    models: tuple[BlockRunner, BlockRunner] | None = None,
    **more,
) -> Recoverer:
    """Of a pruned model, on random windows that it is also measured on."""
    runner, teacher = models or pruned(name)
    runner.batch_size = teacher.batch_size = batch_size
    runner.weights.saved = SaveDtypes(runner.model, dtype)
    ids = windows(4, SEQLEN)
    starts = {}
    for path, module in runner.blocks.named_modules() if grid else ():  # linears that are modules
        if isinstance(module, nn.Linear | Conv1D):
            masters, transposed = module.weight.data.clone(), isinstance(module, Conv1D)
            scales = PACKED[4].fit_scales(masters.T if transposed else masters)
            one = Grid(PACKED[4], transposed, scales)
            module.weight.data.copy_(one.rounded(masters))
            start = masters.to(dtype or masters.dtype) if rank else masters
            starts[f"{runner.name}.{path}.weight"] = start, one
    own = more.pop("measure", lambda: {"loss": divergence(teacher, runner, ids[:2])})
    one = Recoverer(
        runner=runner,
        teacher=teacher,
        schedule=more.pop("schedule", schedule(rank)),
        text=TrainingText(ids, torch.arange(2 * STEPS) % 4, ids[:2], {"sources": []}),
        master_weights=starts,
        **more,
    )
    one.measure = own
    return one


def in_dtype(dtype: torch.dtype, tokens: int) -> Recoverer:
    """Of a model in this dtype, which begins a training with so many tokens per step."""
    models = pruned()
    for runner in models:
        runner.model.to(dtype)
    count = tokens // SEQLEN
    one = trainer(models=models, schedule=schedule(tokens=count * SEQLEN, least=tokens))
    one.text = dataclasses.replace(one.text, order=torch.arange(count) % 4)
    one._begin()
    return one


@pytest.mark.parametrize("tokens", [96, 2**16])
def test_gradients_in_float16(tokens: int) -> None:
    """They are those of float32, however many tokens a step has."""
    gradients = []
    for dtype in (torch.float32, torch.float16):
        one = in_dtype(dtype, tokens)
        with one._gradients():
            one._backward(as_windows(one.text.windows), tokens)
        gradients.append(one.gradient / getattr(one, "scale", 1))
    plain, half = gradients
    assert half.norm().item() == pytest.approx(plain.norm().item(), rel=0.02)
    assert F.cosine_similarity(plain, half, dim=0) > 0.999


def test_gradients_that_exceed_float16() -> None:
    """The step is made again with smaller ones, and leaves the weights that it leaves otherwise."""
    trained = []
    for scale in (2**7, 2**39):
        one = in_dtype(torch.float16, 96)
        one.scale = scale
        one.run()
        assert one.scale < 2**20
        trained.append(state(one.runner.model))
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=0.02, atol=1e-3)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in model.state_dict().items()}


def assert_on_grids(one: Recoverer, scales: dict[str, Tensor]) -> None:
    """Every weight is an integer of 4 bits times the scale of its group, by plain division."""
    assert set(one.grids) <= scales.keys() or not one.grids
    for key, grid in one.grids.items():
        weight = one.runner.model.get_parameter(key)
        matrix = (weight.T if grid.transposed else weight).float()
        steps = scales[key].float().repeat_interleave(64, 1)[:, : matrix.shape[1]]
        codes = (matrix / steps).round()
        assert codes.min() >= -8 and codes.max() <= 7
        assert torch.equal(codes * steps, matrix)


CASES = [(name, "whole") for name in MODELS if name != "Llama"]
CASES += [(name, "rank 4") for name in ("Llama", "GPT-OSS")]
CASES += [(name, "grid") for name in ("Llama", "Mixtral", "shared blocks")]
CASES += [("GPT-2", "grid, rank 4")]


QUICK = CASES[0], CASES[4], CASES[7], CASES[8], CASES[-1]


@pytest.mark.parametrize("name, way", representative(CASES, QUICK))
def test_learns_and_keeps_every_zero(name: str, way: str) -> None:
    one = trainer(name, **WAYS[way])
    model, dense = one.runner.model, state(one.teacher.model)
    before = state(model)
    pruned_of = {key: part.values() == 0 for key, part in one.parts.items() if part.is_matrix}
    plain = one.measure

    def measure() -> dict[str, float]:
        assert_on_grids(one, one.weights.scales(one.grids))
        return plain()

    one.measure = measure
    one.run()
    after = state(model)
    best, first = one.curve[one.best]["loss"], one.curve[0]["loss"]
    assert best < (first if "grid" in way else 0.9 * first)
    assert best == plain()["loss"]
    assert len(one.curve) == 1 + recover.MEASURED
    assert pruned_of
    for key, zero in pruned_of.items():
        assert zero.any() and (after[key][zero] == 0).all()
        if "grid" not in way:  # the sign of a zero is kept too
            assert torch.equal(
                after[key][zero].view(torch.int32), before[key][zero].view(torch.int32)
            )
    trained = {id(part.parameter) for part in one.parts.values()}
    for key, parameter in model.named_parameters():
        moved = not torch.equal(after[key], before[key])
        assert not moved or id(parameter) in trained, key
        assert moved or key not in pruned_of, key
    assert all(torch.equal(now, dense[key]) for key, now in state(one.teacher.model).items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert_on_grids(one, one.scales)


def test_trained_are_pruned_linears_norms_and_biases_once() -> None:
    runner, _ = pruned("GPT-2")
    found = trained_parts(runner)
    matrices = {name for name, part in found.items() if part.is_matrix}
    assert len(matrices) == 2 * 4 and all(name.endswith("weight") for name in matrices)
    assert len(found) == len(matrices) + 2 * (4 + 4)  # two norms, and a bias for each linear
    found = trained_parts(pruned("shared blocks")[0])
    assert len({id(part.parameter) for part in found.values()}) == len(found)
    assert not any("gate.weight" in name for name in trained_parts(pruned("Mixtral")[0]))
    assert any(name.endswith("up_proj_bias") for name in trained_parts(pruned("GPT-OSS")[0]))
    dense = runner_of(tiny.tiny_llama())
    assert not any(part.is_matrix for part in trained_parts(dense).values())
    assert sum(part.is_matrix for part in trained_parts(dense, whole=True).values()) == 2 * 7


@pytest.mark.parametrize(("best", "way"), [(0, "grid"), (5, "grid"), (2, "rank 4")])
def test_the_best_is_kept(best: int, way: str) -> None:
    figures, states = [9.0] * 11, []
    figures[best], figures[1] = 3.0, 4.0 if best else 9.0

    def measure() -> dict[str, float]:
        states.append(state(one.runner.model))
        held = (part.parameter.data for part in one.parts.values() if not part.grid)
        assert all(torch.equal(values, values.to(BFLOAT16).float()) for values in held)
        return {"loss": figures[len(states) - 1], "perplexity": 1.0}

    one = trainer(**WAYS[way], dtype=BFLOAT16, measure=measure)
    one.run()
    kept = states[best]
    assert one.best == best and ("training did not help" in one.line()) == (best == 0)
    assert all(torch.equal(now, kept[key]) for key, now in state(one.runner.model).items())
    assert one.record()["kept"] == one.curve[best]


def test_batches_and_checkpoints_change_nothing_but_rounding() -> None:
    found = []
    two = schedule(least=2 * SEQLEN)
    for batch_size, checkpointed in ((1, False), (2, False), (2, True)):
        one = trainer(batch_size=batch_size, schedule=two)
        one.runner.checkpointed = checkpointed
        one.run()
        found.append(one.curve[-1]["loss"])
    assert found[1] == found[2]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def plain_adamw(one: Recoverer, clip: float) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train a copy by the whole model's own logits, autograd's gradient, a mask and torch's AdamW.

    Returns losses, norms of the gradients, and the trained parameters by name.
    """
    plain, teacher, steps = fresh_copy(one.runner.model), one.teacher, one.schedule
    parts = trained_parts(runner_of(plain))
    zeros = {name: part.parameter == 0 for name, part in parts.items() if part.is_matrix}
    leaves = {name: part.parameter.requires_grad_(True) for name, part in parts.items()}
    optimizer = torch.optim.AdamW(leaves.values(), betas=(0.9, 0.95), weight_decay=0.0)
    losses, norms = [], []
    for step in range(steps.steps):
        ids = one.text.windows[one.text.order[2 * step : 2 * step + 2]]
        with torch.no_grad():
            wanted = teacher.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        optimizer.zero_grad()
        log_p = plain(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        loss = F.kl_div(log_p, wanted, log_target=True, reduction="sum") / ids.numel()
        loss.backward()
        for name, zero in zeros.items():
            leaves[name].grad[zero] = 0
        norms.append(nn.utils.clip_grad_norm_(leaves.values(), clip).item())
        for group in optimizer.param_groups:
            group["lr"] = steps.rate_at(step)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: leaf.detach() for name, leaf in leaves.items()}


def test_steps_are_plain_adamw_on_the_plain_loss() -> None:
    three = schedule(tokens=3 * 2 * SEQLEN, least=2 * SEQLEN, rate=1e-2)
    assert three.steps == 3
    models = pruned("Gemma 2")
    one = trainer(models=models, schedule=three)
    _, norms, unclipped = plain_adamw(one, clip=1e9)
    clip = sorted(norms)[1]  # so that some steps are clipped and others are not
    losses, _, expected = plain_adamw(one, clip=clip)
    falling = iter(range(100, 0, -1))
    three = dataclasses.replace(three, clip=clip)
    one = trainer(models=models, schedule=three, measure=lambda: {"loss": next(falling)})
    one.run()
    assert one.curve[-1]["trained"] == pytest.approx(losses[-1], rel=1e-4)
    off = clipping = 0.0
    for name, parameter in models[0].model.named_parameters():
        if name in expected:
            off += (parameter.data - expected[name]).norm().item() ** 2
            clipping += (unclipped[name] - expected[name]).norm().item() ** 2
    assert off < 1e-4 * clipping  # gradients that are not clipped would show


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("chunk", "share"), [(1, 0.3), (3, 0.0), (3, 0.3), (100, 0.3)])
def test_loss_in_chunks(
    chunk: int, share: float, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss and its gradient, against float64 and all logits at once."""
    ids = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 7, 5, generator=draw), torch.randn(11, 5, generator=draw)
    taught = torch.randn(2, 7, 11, generator=draw)
    monkeypatch.setattr("lib.model.blocks.LOGIT_BYTES", chunk * 4 * 11 * 2)
    exact = hidden.double().requires_grad_()
    log_p = (exact @ head.double().T).log_softmax(-1)
    log_q = taught.double().log_softmax(-1)
    each = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    text = F.cross_entropy(log_p[:, :-1].mT, ids[:, 1:], reduction="none")
    mask = torch.rand(2, 7, generator=draw) < 0.6 if masked else None
    counted = Windows(ids, mask).counted
    assert masked or counted.all()
    each = torch.cat([(1 - share) * each[:, :-1] + share * text, each[:, -1:]], 1)
    loss = (each * counted).sum() / counted.sum()
    loss.backward()
    last, asked = hidden.clone().requires_grad_(), []

    def logits(positions: Tensor) -> Tensor:
        asked.append(len(positions))
        return last[:, positions] @ head.T

    tokens = int(counted.sum())
    found = divergence_(logits, lambda at: taught[:, at], ids, tokens, counted, share)
    assert sum(asked) == 7 and max(asked) <= max(1, min(chunk, 6))
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(last.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


ERRORS = [
    (dict(schedule=schedule(rate=1e30)), "--recover_lr 1e+30: in step "),
    (dict(schedule=schedule(clip=float("nan")), grid=True), "--recover_lr 0.01: in step 1 of 20"),
]


@pytest.mark.parametrize(("given", "words"), ERRORS)
def test_what_went_wrong_ends_the_run(given: dict, words: str) -> None:
    one = trainer(**given)
    assert refused(one.run).startswith(words)
    assert not any(p.requires_grad for p in one.runner.model.parameters())


def test_the_schedule() -> None:
    one = TrainSchedule(250_000, 512, 1e-3)
    assert (one.windows, one.steps) == (1, 488)
    assert len(one.measured) == recover.MEASURED and max(one.measured) == one.steps
    rates = [one.rate_at(step) for step in range(one.steps)]
    assert max(rates) == pytest.approx(1e-3, rel=0.03)
    assert 0 < rates[0] < 1e-4 and rates[-1] < 6e-5
    assert rates[244] == pytest.approx(0.525e-3)  # of half a cosine down to a twentieth
    assert TrainSchedule(600, 512, 1e-3).steps == 1  # whole windows, and never more than asked
    assert TrainSchedule(10**9, 4096, 1e-3).windows == recover.MOST // 4096


def test_the_default_rate_follows_weights_width_and_depth() -> None:
    matrices = [torch.full((8, 4), 0.2), torch.zeros(8, 4)]
    rate = recover.RATE * (0.2 / 2**0.5) / (4 * 3)
    assert default_rate(matrices, 16, 3) == pytest.approx(rate)
    one = trainer(schedule=schedule(rate=None))
    known = [part.parameter for part in one.parts.values() if part.is_matrix]
    rate = default_rate(known, 32, 2)
    one.run()
    assert one.schedule.rate == one.record()["rate"] == rate
    for pruned, share in ((True, 1), (False, recover.QUANTIZED_RATE)):
        one = trainer(schedule=schedule(rate=None, pruned=pruned), grid=True)
        known = [part.parameter for part in one.parts.values() if part.is_matrix]
        assert one.schedule.rate == share * default_rate(known, 32, 2)
        assert one.schedule.rate_at(STEPS - 1) == one.schedule.rate


@pytest.mark.parametrize("rank", [None, 4])
def test_masters_of_what_is_rounded_exist_once(rank: int | None) -> None:
    """Those that rounding has left are trained themselves: there is no memory for a copy."""
    runner, _ = pruned()
    starts = {}
    for path, module in runner.blocks.named_modules():
        if isinstance(module, nn.Linear):
            masters = module.weight.data + 1e-3 * (module.weight.data != 0)
            grid = Grid(PACKED[4], False, PACKED[4].fit_scales(masters))
            starts[f"{runner.name}.{path}.weight"] = masters, grid
            module.weight.data.copy_(grid.rounded(masters))
            module.weight.data[0, 0] += 1.0  # as --resume finds it: it is trained from there
    given = {key: masters for key, (masters, _) in starts.items()}
    parts = trained_parts(runner, True, starts, rank)
    assert given and not starts
    for name, part in parts.items():
        if part.grid:
            held = part.base if rank else part.master
            assert held.data_ptr() == given[name].data_ptr()
            assert held[0, 0] == part.parameter[0, 0]


@pytest.mark.parametrize(("tokens", "seqlen"), [(131_072, 512), (500_000, 4096), (10**8, 4096)])
def test_a_step_has_a_window_for_every_rank(tokens: int, seqlen: int) -> None:
    alone = TrainSchedule(tokens, seqlen, 1e-3)
    eight = dataclasses.replace(alone, ranks=8)
    assert eight.windows == max(8, alone.windows) and eight.windows_alone == alone.windows
    assert alone.steps * alone.windows * seqlen <= tokens
    assert 1 <= eight.steps and eight.steps * eight.windows * seqlen <= tokens
    assert dataclasses.replace(alone, tokens=3 * seqlen, ranks=8).windows == 3  # there are no more
