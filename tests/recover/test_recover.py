"""The training itself: what moves and what does not, the loss, and what is kept at the end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny
import torch
from support import ALONE, prune_, runner_of, windows
from torch import Tensor, nn
from torch.nn import functional as F

from lib import recover
from lib.data.training import TrainingText
from lib.methods.sparsity import Sparsity
from lib.model.blocks import LOGIT_BYTES, BlockRunner
from lib.model.pretrained import decoder_blocks, fresh_copy
from lib.model.work_folder import WorkFolder
from lib.pruning.allocation import uniform
from lib.pruning.check import measure
from lib.recover import (
    Recovered,
    Recoverer,
    TrainSchedule,
    default_rate,
    divergence_,
    trained_parameters,
)
from lib.util.errors import UserError

SEQLEN, STEPS = 24, 10
PATTERN = Sparsity(0.5, 2, 4)
MODELS = {
    "Llama": tiny.tiny_llama,
    "tied embeddings": lambda: tiny.tiny_llama(tie_word_embeddings=True),
    "GPT-2": tiny.ARCHITECTURES["GPT-2"],
    "Gemma 2": tiny.ARCHITECTURES["Gemma 2"],
    "Mixtral": tiny.ARCHITECTURES["Mixtral"],
    "GPT-OSS": tiny.HYBRIDS["GPT-OSS"],
    "shared blocks": tiny.HYBRIDS["Zamba2"],
    "Mamba": tiny.HYBRIDS["Mamba"],
}


def text(count: int = 2 * STEPS) -> TrainingText:
    """Random, so that nothing is learnt that carries over: measured on what is trained on."""
    ids = windows(4, SEQLEN)
    return TrainingText(ids, torch.arange(count) % 4, ids[:2], {"sources": []})


def schedule(rank: int | None = None, rate: float = 1e-2) -> TrainSchedule:
    return TrainSchedule(2 * STEPS * SEQLEN, SEQLEN, rate, rank, least=2 * SEQLEN)


def divergence(teacher: BlockRunner, runner: BlockRunner, ids: Tensor) -> float:
    """KL(teacher || model), nats a token, in plain float64."""
    with torch.no_grad():
        p, q = (
            one.model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
            for one in (runner, teacher)
        )
    return F.kl_div(p, q, log_target=True, reduction="none").sum(-1).mean().item()


def trainer(
    model: nn.Module,
    runner: BlockRunner,
    teacher: BlockRunner,
    rank: int | None = None,
    rounding: torch.dtype = torch.float32,
    **more,
) -> Recoverer:
    known = more.pop("schedule", schedule(rank)), text(), 2
    return Recoverer(
        runner,
        teacher,
        *known,
        more.pop("measure", lambda one, ids: divergence(teacher, one, ids)),
        rounding,
        dist=ALONE,
        **more,
    )


def pruned(name: str = "Llama") -> tuple[nn.Module, BlockRunner, BlockRunner]:
    model = MODELS[name]()
    teacher = runner_of(fresh_copy(model).requires_grad_(False))
    model.requires_grad_(False)
    runner = runner_of(model)
    prune_(runner, "wanda", PATTERN)
    for parameter in runner.blocks.parameters():
        if parameter.dim() > 1:  # some of the zeros are negative ones
            parameter.data[0].masked_fill_(parameter.data[0] == 0, -0.0)
    return model, runner, teacher


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in model.state_dict().items()}


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("name", MODELS)
def test_learns_and_keeps_every_zero(name: str, rank: int | None) -> None:
    model, runner, teacher = pruned(name)
    before, dense = state(model), state(teacher.model)
    trained = trained_parameters(model, runner.name)
    done = trainer(model, runner, teacher, rank).run()
    after = state(model)
    assert done.curve[done.best]["perplexity"] < 0.9 * done.curve[0]["perplexity"]
    assert done.best == len(done.curve) - 1 == recover.MEASURED
    target = uniform(runner, PATTERN).sparsity
    measure(runner, target if name not in ("Mamba", "shared blocks") else None)
    masked = {key for key, (_, sparse) in trained.items() if sparse}
    assert masked
    for key in masked:
        zero = before[key] == 0
        assert torch.equal(after[key][zero].view(torch.int32), before[key][zero].view(torch.int32))
    same = {id(model.get_parameter(key)) for key in trained}
    for key, parameter in model.named_parameters():
        moved = not torch.equal(after[key], before[key])
        if id(parameter) not in same:
            assert not moved, key
        elif key in masked:
            assert moved, key
    assert all(torch.equal(one, dense[key]) for key, one in state(teacher.model).items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_trained_are_pruned_linears_norms_and_biases_once() -> None:
    model, *_ = pruned("GPT-2")
    found = trained_parameters(model, "transformer.h")
    matrices = {name for name, (_, sparse) in found.items() if sparse}
    assert len(matrices) == 2 * 4 and all(name.endswith("weight") for name in matrices)
    assert len(found) == len(matrices) + 2 * (4 + 4)  # two norms, and a bias for each linear
    model, *_ = pruned("shared blocks")
    found = trained_parameters(model, decoder_blocks(model)[0])
    assert len({id(parameter) for parameter, _ in found.values()}) == len(found)
    model, *_ = pruned("Mixtral")
    assert not any("gate.weight" in name for name in trained_parameters(model, "model.layers"))


@pytest.mark.parametrize("rank", [None, 4])
def test_the_model_is_always_as_it_would_be_saved(rank: int | None) -> None:
    model, runner, teacher = pruned()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    half = torch.bfloat16
    seen = []

    def rounded(one: BlockRunner, ids: Tensor) -> float:
        seen.append(all(torch.equal(p, p.to(half).float()) for p in model.parameters()))
        return divergence(teacher, one, ids)

    done = trainer(model, runner, teacher, rank, half, measure=rounded).run()
    assert seen == [True] * (1 + recover.MEASURED)
    assert done.best > 0
    assert divergence(teacher, runner, text().held_out) == done.curve[done.best]["perplexity"]


def test_the_best_is_kept_and_nothing_where_nothing_is_better() -> None:
    model, runner, teacher = pruned()
    figures = iter([5.0, 4.0, 3.0, 6.0, *[9.0] * 20])
    states = []

    def told(*_) -> float:
        states.append(state(model))
        return next(figures)

    done = trainer(model, runner, teacher, measure=told).run()
    assert done.best == 2
    assert all(torch.equal(one, states[2][key]) for key, one in state(model).items())

    model, runner, teacher = pruned()
    before, figures = state(model), iter([1.0, *[9.0] * 20])
    done = trainer(model, runner, teacher, measure=told).run()
    assert done.best == 0 and "nothing was better" in done.line()
    assert all(torch.equal(one, before[key]) for key, one in state(model).items())


def test_batches_and_checkpoints_change_nothing_but_rounding() -> None:
    found = []
    for batch_size, checkpointed in ((1, False), (2, False), (2, True)):
        model, runner, teacher = pruned()
        one = trainer(model, runner, teacher, checkpointed=checkpointed)
        one.batch_size = batch_size
        one.run()
        found.append(one.done.curve[-1]["perplexity"])
    assert found[1] == found[2]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def plain_adamw(
    plain: nn.Module, teacher: BlockRunner, steps: TrainSchedule, clip: float
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train a copy by the whole model's own logits, autograd's gradient, a mask and torch's AdamW.

    Returns losses, norms of the gradients, and the trained parameters by name.
    """
    names = trained_parameters(plain, "model.layers")
    zeros = {name: parameter == 0 for name, (parameter, sparse) in names.items() if sparse}
    leaves = [parameter.requires_grad_(True) for parameter, _ in names.values()]
    optimizer = torch.optim.AdamW(leaves, betas=(0.9, 0.95), weight_decay=0.0)
    losses, norms = [], []
    for step in range(steps.steps):
        ids = text().windows[text().order[2 * step : 2 * step + 2]]
        with torch.no_grad():
            wanted = teacher.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        optimizer.zero_grad()
        log_p = plain(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        loss = F.kl_div(log_p, wanted, log_target=True, reduction="sum") / ids.numel()
        loss.backward()
        for name, zero in zeros.items():
            names[name][0].grad[zero] = 0
        norms.append(nn.utils.clip_grad_norm_(leaves, clip).item())
        for group in optimizer.param_groups:
            group["lr"] = steps.rate_at(step)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: parameter.detach() for name, (parameter, _) in names.items()}


def test_steps_are_plain_adamw_on_the_plain_loss() -> None:
    model, runner, teacher = pruned("Gemma 2")
    three = dataclasses.replace(schedule(), tokens=3 * 2 * SEQLEN)
    assert three.steps == 3
    _, norms, unclipped = plain_adamw(fresh_copy(model), teacher, three, clip=1e9)
    clip = sorted(norms)[1]  # so that some steps are clipped and others are not
    losses, _, expected = plain_adamw(fresh_copy(model), teacher, three, clip=clip)
    three = dataclasses.replace(three, clip=clip)
    one = trainer(model, runner, teacher, schedule=three, measure=lambda *_: -one.step)
    done = one.run()
    assert done.curve[-1]["loss"] == pytest.approx(losses[-1], rel=1e-4)
    off = clipping = 0.0
    for name, (parameter, _) in trained_parameters(model, "model.layers").items():
        off += (parameter.data - expected[name]).norm().item() ** 2
        clipping += (unclipped[name] - expected[name]).norm().item() ** 2
    assert off < 1e-4 * clipping  # gradients that are not clipped would show


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_loss_in_chunks(chunk: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss and its gradient, against float64 and all logits at once."""
    ids = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 7, 5, generator=draw), torch.randn(11, 5, generator=draw)
    taught = torch.randn(2, 7, 11, generator=draw)
    monkeypatch.setitem(LOGIT_BYTES, "cpu", chunk * 4 * 11 * 2)
    exact = hidden.double().requires_grad_()
    log_p = (exact @ head.double().T).log_softmax(-1)
    log_q = taught.double().log_softmax(-1)
    each = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    text = F.cross_entropy(log_p[:, :-1].mT, ids[:, 1:], reduction="none")
    loss = (each.sum() + share * (text - each[:, :-1]).sum()) / 14
    loss.backward()
    last, asked = hidden.clone().requires_grad_(), []

    def logits(positions: Tensor) -> Tensor:
        asked.append(len(positions))
        return last[:, positions] @ head.T

    found = divergence_(logits, lambda at: taught[:, at], ids, 14, share)
    assert sum(asked) == 7 and max(asked) <= max(1, min(chunk, 6))
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(last.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_finite_is_told() -> None:
    model, runner, teacher = pruned()
    with pytest.raises(UserError, match="--recover_rate 1e.30: in step . of 10 the loss is not"):
        trainer(model, runner, teacher, schedule=schedule(rate=1e30)).run()
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("last", [2, 7])
def test_taken_up_again_it_ends_the_same(rank: int | None, last: int, tmp_path: Path) -> None:
    def run(folder: WorkFolder | None, stop: int | None = None) -> tuple[dict, Recovered]:
        model, runner, teacher = pruned()
        one = trainer(model, runner, teacher, rank, torch.bfloat16, finished=folder)
        own = one._step

        def step(number: int) -> float:
            if number == stop:
                raise KeyboardInterrupt
            return own(number)

        one._step = step
        done = one.run()
        return state(model), done

    whole, done = run(None)
    folder = WorkFolder("--resume", tmp_path / "kept")
    folder.begin({})
    with pytest.raises(KeyboardInterrupt):
        run(folder, last)
    assert (tmp_path / "kept" / "recovery.safetensors").exists()
    again, more = run(folder)
    assert all(torch.equal(one, whole[key]) for key, one in again.items())
    assert (more.curve, more.best) == (done.curve, done.best)
    folder.clear()
    assert not (tmp_path / "kept").exists()


def test_the_course() -> None:
    one = TrainSchedule(250_000, 512, 1e-3)
    assert (one.windows, one.steps) == (1, 488)
    assert len(one.measured) == recover.MEASURED and max(one.measured) == one.steps
    rates = [one.rate_at(step) for step in range(one.steps)]
    assert max(rates) == pytest.approx(1e-3, rel=0.03) and rates[0] < 1e-4 and rates[-1] < 6e-5
    assert TrainSchedule(600, 512, 1e-3).steps == 1  # whole windows, and never more than asked
    assert TrainSchedule(10**9, 4096, 1e-3).windows == recover.MOST // 4096


def test_the_default_rate_follows_weights_width_and_depth() -> None:
    matrices = [torch.full((8, 4), 0.2), torch.zeros(8, 4)]
    rate = recover.RATE * (0.2 / 2**0.5) / (4 * 3)
    assert default_rate(matrices, 16, 3) == pytest.approx(rate)
    model, runner, teacher = pruned()
    one = trainer(model, runner, teacher, schedule=TrainSchedule(SEQLEN, SEQLEN))
    known = [p for p, sparse in trained_parameters(model, "model.layers").values() if sparse]
    assert one.schedule.rate == default_rate(known, 32, 2)
