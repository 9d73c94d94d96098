"""--replace_sparse_layers and --bos through main.py: packed, saved, loaded, saved again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from support import QUICK, call, results

import lib.eval
from lib.model import pretrained

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write_model(tmp_path / "model")


@pytest.fixture
def uk(tmp_path: Path) -> Path:
    return tiny.write_texts(tmp_path / "uk")


def perplexity(out: str) -> float:
    line = [line for line in out.splitlines() if "perplexity" in line][-1]
    return float(line.split()[-1])


def prune(model: Path, uk: Path, *more: object):
    flags = ["--prune_method", "wanda", "--sparsity_type", "2:4", "--calibration_data", uk]
    done = call("--model", model, *QUICK, *flags, *more)
    assert done.status == 0, done.err
    return done


def evaluate(model: Path | str, uk: Path, *more: object):
    done = call("--model", model, *QUICK, "--eval_only", "--eval_data", uk, *more)
    assert done.status == 0, done.err
    return done


def test_packed_is_smaller_and_measures_the_same(model: Path, uk: Path) -> None:
    dense = prune(model, uk, "--save_model", "dense")
    packed = prune(model, uk, "--replace_sparse_layers", "--save_model", "packed", "--save", "out2")
    assert perplexity(packed.out) == pytest.approx(perplexity(dense.out), rel=1e-5)
    assert "unpacked at each forward" in packed.out and "footprint:" in packed.out
    sizes = [sum(t.nbytes for t in load_file(f"{f}/model.safetensors").values()) for f in
             ("dense", "packed")]  # fmt: skip
    assert sizes[1] < sizes[0]
    results = json.loads(Path("out2/results.json").read_text())
    assert results["footprint"]["after"] < results["footprint"]["before"]
    assert results["sparsity"]["overall"] == pytest.approx(0.5)
    assert perplexity(evaluate("packed", uk).out) == pytest.approx(perplexity(packed.out), rel=1e-6)
    assert "import lib.sparse" in Path("packed/README.md").read_text()


def test_a_model_saved_dense_can_be_packed_later(model: Path, uk: Path) -> None:
    prune(model, uk, "--save_model", "dense")
    prune(model, uk, "--replace_sparse_layers", "--save_model", "packed")
    evaluate("dense", uk, "--replace_sparse_layers", "--save_model", "later")
    first, second = (Path(f, "model.safetensors").read_bytes() for f in ("packed", "later"))
    assert first == second


def test_what_can_not_be_packed(model: Path, uk: Path) -> None:
    done = call("--model", model, *QUICK, "--prune_method", "wanda", "--sparsity_type", "2:4",
                "--replace_sparse_layers", "--calibration_data", uk, "--load_bit", "8")  # fmt: skip
    assert done.status == 2 and "--load_bit" in done.complaints[-1]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bfloat16"])
def test_packed_block_by_block_from_disk(kind: str, tmp_path: Path, uk: Path) -> None:
    """The same bytes as in memory, whether pruned in this run or before; nothing is left behind."""
    makes = {"llama": tiny.tiny_llama, "gpt2": tiny.ARCHITECTURES["GPT-2"]}
    makes["bfloat16"] = lambda: tiny.tiny_llama().bfloat16()
    model = tiny.write_model(tmp_path / kind, makes[kind]())
    packing = ["--replace_sparse_layers", "--save_model"]
    plain = prune(model, uk, *packing, "plain")
    fetched = prune(model, uk, *packing, "fetched", "--offload", "away")
    prune(model, uk, "--save_model", "dense")
    evaluate("dense", uk, *packing, "later", "--offload", "away")
    one, *others = (Path(name, "model.safetensors") for name in ("plain", "fetched", "later"))
    assert [load_file(path).keys() for path in others] == [load_file(one).keys()] * 2
    for path in others:
        for name, tensor in load_file(one).items():
            again = load_file(path)[name]
            assert torch.equal(tensor, again) and tensor.dtype == again.dtype, name
    assert perplexity(fetched.out) == pytest.approx(perplexity(plain.out), rel=1e-5)
    told = "2:4 linears", "footprint"
    lines = [[line for line in done.out.splitlines() if line.startswith(told)]
             for done in (plain, fetched)]  # fmt: skip
    assert lines[0] == lines[1] and len(lines[0]) == 2
    assert not Path("away").exists()


def test_nothing_is_2_4(model: Path, uk: Path) -> None:
    done = call("--model", model, *QUICK, "--eval_only", "--eval_data", uk,
                "--replace_sparse_layers")  # fmt: skip
    assert done.status == 1
    assert (
        "no linear is 2:4" in done.complaints[-1] and "--sparsity_type 2:4" in done.complaints[-1]
    )


def test_a_packed_model_is_not_pruned_again(model: Path, uk: Path) -> None:
    prune(model, uk, "--replace_sparse_layers", "--save_model", "packed")
    done = call("--model", "packed", *QUICK, "--prune_method", "magnitude", "--eval_data", uk)
    assert done.status == 1 and "unpack" in done.complaints[-1]


def test_bos_never_and_always(model: Path, uk: Path) -> None:
    """With BOS every window, of calibration and test, begins with it."""
    prune(model, uk, "--bos", "never", "--save", "never")
    prune(model, uk, "--bos", "always", "--save", "always")
    never, always = (json.loads(Path(f, "results.json").read_text()) for f in ("never", "always"))
    assert never["bos"] is None and always["bos"] == 0
    assert never["calibration"]["digest"] != always["calibration"]["digest"]
    assert never["evaluation"][0]["digest"] != always["evaluation"][0]["digest"]


@pytest.mark.parametrize("collapses", [True, False])
def test_bos_auto_asks_the_model(
    model: Path, uk: Path, monkeypatch: pytest.MonkeyPatch, collapses: bool
) -> None:
    """The windows get the token where perplexity without it is much worse, and only there."""

    def perplexity(runner, windows, batch_size, *_) -> lib.eval.Perplexity:
        begun = bool((windows[:, 0] == 0).all())
        return lib.eval.Perplexity(20.0 if begun or not collapses else 118.0, 1.0, 1.0)

    monkeypatch.setattr(lib.eval, "perplexity", perplexity)
    done = prune(model, uk)
    record = results()
    assert record["bos"] == (0 if collapses else None)
    assert ("BOS" in done.out) == collapses


def test_bos_always_without_such_a_token(model: Path, uk: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(add_bos=False)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(model)
    done = call("--model", model, *QUICK, "--eval_only", "--eval_data", uk, "--bos", "always")
    assert done.status == 1 and "--bos always" in done.complaints[-1]
    assert "--bos never" in done.complaints[-1]


def test_own_bos_is_what_the_tokenizer_adds() -> None:
    assert pretrained.own_bos(tiny.tiny_tokenizer(add_bos=True)) == 0
    assert pretrained.own_bos(tiny.tiny_tokenizer(add_bos=False)) is None
