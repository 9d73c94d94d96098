"""Products of bfloat16 operands: where the processor has them, for passes alone, and said."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, call, results, weights

from lib.methods.gram import add_cross_, add_upper_gram_
from lib.methods.wanda import Wanda
from lib.run import products
from lib.util.products import bfloat16_products, exact_products, has_bfloat16

needs_bfloat16 = pytest.mark.skipif(not has_bfloat16(), reason="the CPU has no bfloat16")


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(96, 320, generator=generator), torch.randn(320, 64, generator=generator)


@needs_bfloat16
def test_operands_are_rounded_inside_and_no_longer_outside() -> None:
    a, b = operands()
    exact = a.double() @ b.double()
    with pytest.raises(KeyError), bfloat16_products():
        rounded = a @ b
        raise KeyError
    assert 1e-4 < ((rounded - exact).norm() / exact.norm()).item() < 1e-2
    assert ((a @ b - exact).norm() / exact.norm()).item() < 1e-6
    assert rounded.dtype == torch.float32


@needs_bfloat16
def test_statistics_and_solvers_are_exact_inside() -> None:
    x, _ = operands()
    sums = {}
    for name in ("outside", "inside"):
        with bfloat16_products() if name == "inside" else exact_products():
            gram, cross = torch.zeros(320, 320), torch.zeros(320, 320)
            add_upper_gram_(gram, x)
            add_cross_(cross, x, x)
        sums[name] = gram, cross
    assert all(map(torch.equal, sums["outside"], sums["inside"]))


@pytest.fixture
def wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model as wide as those whose products are worth rounding."""
    monkeypatch.chdir(tmp_path)
    sizes = dict(hidden_size=products.LEAST_WIDTH, intermediate_size=320)
    model = tiny.tiny_llama(**sizes, initializer_range=0.02)  # larger ones predict at random
    return tiny.write_model(Path("wide"), model)


FLAGS = [*QUICK, "--prune_method", "sparsegpt", "--recover", "256"]


@needs_bfloat16
def test_passes_round_and_say_so_and_float32_does_not(wide: Path) -> None:
    uk = tiny.write_texts("uk", 40, 8)
    flags = ["--model", wide, *FLAGS, "--calibration_data", uk]
    said = call(*flags, "--save", "auto", "--save_model", "model")
    assert said.status == 0, said.err
    assert "products: bfloat16 (loss " in said.out
    exact = call(*flags, "--dtype", "float32", "--save", "exact", "--save_model", "exact-model")
    assert exact.status == 0 and "products:" not in exact.out
    auto, by_float32 = results("auto"), results("exact")
    assert auto["products"] == "bfloat16" and "products" not in by_float32
    [one], [other] = auto["perplexity"].values(), by_float32["perplexity"].values()
    assert one != other and one == pytest.approx(other, rel=5e-3)
    dropped = {name: weight == 0 for name, weight in weights("model").items()}
    same = torch.cat(
        [(dropped[n] == (w == 0)).flatten() for n, w in weights("exact-model").items()]
    )
    assert 0.98 < same.double().mean().item() < 1  # the inputs differ a little, the sums do not


@needs_bfloat16
def test_a_model_that_predicts_otherwise_stays_in_float32(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "MOST_KL", 0.0)
    uk = tiny.write_texts("uk", 40, 8)
    flags = ["--model", wide, *QUICK, "--eval_only", "--eval_data", uk]
    done = call(*flags)
    assert "products: float32 (loss " in done.out and "products" not in results("out")
    perplexity = results("out")["perplexity"]
    call(*flags, "--dtype", "float32")
    assert perplexity == results("out")["perplexity"]


def test_narrow_models_and_processors_without_it_are_not_tried(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uk = tiny.write_texts("uk", 40, 8)
    narrow = tiny.write_model(Path("narrow"), tiny.tiny_llama())
    assert "products:" not in call("--model", narrow, *QUICK, "--eval_only", "--eval_data", uk).out
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    done = call("--model", wide, *QUICK, "--eval_only", "--eval_data", uk)
    assert done.status == 0 and "products:" not in done.out


@needs_bfloat16
@pytest.mark.parametrize("kind", ["unstructured", "neurons"])
def test_solvers_multiply_in_float32(
    kind: str, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = {"unstructured": "prune_", "neurons": "remove_neurons_"}[kind]
    original, seen = getattr(Wanda, solve), []
    a, b = operands()

    def watched(*args: object, **options: object) -> object:
        seen.append(((a @ b - a.double() @ b.double()).norm() / (a @ b).norm()).item())
        return original(*args, **options)

    monkeypatch.setattr(Wanda, solve, watched)
    uk = tiny.write_texts("uk", 40, 8)
    flags = ["--prune_method", "wanda", "--sparsity_type", kind, "--calibration_data", uk]
    done = call("--model", wide, *QUICK, *flags)
    assert "products: bfloat16" in done.out, done.err
    assert seen and max(seen) < 1e-6
