"""--replace_sparse_layers and --bos through main.py: packed, saved, loaded, saved again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from support import QUICK, call, results, weights

from lib.model import pretrained
from lib.commands.unpack import unpack_folder

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """Zeros in all its matrices multiply its perplexity by 200."""
    return shutil.copytree(trained, tmp_path / "model")


@pytest.fixture
def uk(tmp_path: Path) -> Path:
    return tiny.write_texts(tmp_path / "uk")


def perplexity(out: str) -> float:
    line = [line for line in out.splitlines() if "perplexity" in line][-1]
    return float(line.split()[-1])


def prune(model: Path, uk: Path, *more: object, kind: str = "2:4"):
    flags = ["--prune_method", "wanda", "--sparsity_type", kind, "--calibration_data", uk]
    done = call("--model", model, *QUICK, *flags, *more)
    assert done.status == 0, done.err
    return done


def evaluate(model: Path | str, uk: Path, *more: object):
    done = call("--model", model, *QUICK, "--eval_only", "--eval_data", uk, *more)
    assert done.status == 0, done.err
    return done


def size_of(folder: str) -> int:
    return sum(tensor.nbytes for tensor in weights(folder).values())


@pytest.mark.parametrize("kind", ["2:4", "4:8", "unstructured"])
def test_packed_is_smaller_and_measures_the_same(model: Path, uk: Path, kind: str) -> None:
    dense = prune(model, uk, "--save_model", "dense", kind=kind)
    more = ["--replace_sparse_layers", "--save_model", "packed", "--save", "out2"]
    packed = prune(model, uk, *more, kind=kind)
    assert perplexity(packed.out) == pytest.approx(perplexity(dense.out), rel=1e-5)
    assert "packed linears: 14 " in packed.out and "footprint:" in packed.out
    assert size_of("packed") < size_of("dense")
    found = results("out2")
    assert found["footprint"]["after"] < found["footprint"]["before"]
    assert found["sparsity"]["overall"] == pytest.approx(0.5)
    told = found["packed"]
    assert (told["bits"], told["linears"], told["left_dense"]) == (16, 14, 0)
    assert told["bytes"] * 32 == told["dense_bytes"] * 17  # float32: half, and a bit for each
    assert told["difference"] < 1e-4
    assert "packed" not in results()
    again = evaluate("packed", uk)
    assert perplexity(again.out) == pytest.approx(perplexity(packed.out), rel=1e-6)
    assert results()["sparsity"]["overall"] == found["sparsity"]["overall"]
    assert "import packed_bitmask" in Path("packed/README.md").read_text()
    unpack_folder("packed", "plain")
    one, two = weights("dense"), weights("plain")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("kind", ["2:4", "unstructured"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_model_saved_dense_can_be_packed_later(
    model: Path, uk: Path, kind: str, bits: int
) -> None:
    flags = ["--replace_sparse_layers", "--pack_bits", bits, "--save_model"]
    nearest = ["--rounding", "nearest"] if bits < 16 else []  # as with --eval_only
    prune(model, uk, "--save_model", "dense", kind=kind)
    prune(model, uk, *flags, "packed", *nearest, kind=kind)
    evaluate("dense", uk, *flags, "later")
    first, second = (Path(f, "model.safetensors").read_bytes() for f in ("packed", "later"))
    assert first == second


def test_eight_bits(model: Path, uk: Path) -> None:
    """Smaller again, near the dense model, and what was measured is what is saved."""
    at_16 = prune(model, uk, "--replace_sparse_layers", "--save_model", "packed16")
    flags = ["--replace_sparse_layers", "--pack_bits", "8", "--save_model", "packed8"]
    at_8 = prune(model, uk, *flags, "--rounding", "nearest")
    assert size_of("packed8") < size_of("packed16")
    told = results()["packed"]
    assert told["bits"] == 8 and 0 < told["difference"] < 0.05
    assert f"8 bits change the logits by {told['difference']:.2%}" in at_8.out
    assert "8-bit integers" in Path("packed8/README.md").read_text()
    assert perplexity(at_8.out) == pytest.approx(perplexity(at_16.out), rel=0.01)
    again = evaluate("packed8", uk)
    assert perplexity(again.out) == pytest.approx(perplexity(at_8.out), rel=1e-6)
    evaluate("packed16", uk, *flags[:-1], "from16")
    one, two = (Path(f, "model.safetensors").read_bytes() for f in ("packed8", "from16"))
    assert one == two
    kept = evaluate("packed8", uk, "--replace_sparse_layers")  # 16 bits would bring nothing back
    assert "packed linears at 8 bits: 14 " in kept.out


def test_four_bits(model: Path, uk: Path) -> None:
    """Smaller again, and what was measured is what is saved, also unpacked, in every dtype."""
    prune(model, uk, "--replace_sparse_layers", "--pack_bits", "8", "--save_model", "packed8")
    flags = ["--replace_sparse_layers", "--pack_bits", "4", "--save_model", "packed4"]
    at_4 = prune(model, uk, *flags)
    assert size_of("packed4") < size_of("packed8")
    record = results()["packed"]
    assert record["bits"] == 4 and 0 < record["difference"] < 0.5
    assert f"4 bits change the logits by {record['difference']:.2%}" in at_4.out
    assert "4-bit integers" in Path("packed4/README.md").read_text()
    again = evaluate("packed4", uk)
    assert perplexity(again.out) == pytest.approx(perplexity(at_4.out), rel=1e-6)
    unpack_folder("packed4", "plain")
    assert "rounded to 4-bit integers" in Path("plain/README.md").read_text()
    assert "packed_bitmask" not in Path("plain/README.md").read_text()
    plain = evaluate("plain", uk)
    assert perplexity(plain.out) == pytest.approx(perplexity(at_4.out), rel=1e-5)
    kept = evaluate("packed4", uk, "--replace_sparse_layers", "--pack_bits", "8")
    assert "packed linears at 4 bits: 14 " in kept.out


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_at_eight_bits(tied: bool, tmp_path: Path, uk: Path) -> None:
    """Smaller again, told with its cost, and what was measured is what is saved."""
    kind = "Gemma 3" if tied else "Llama"
    model = tiny.write_model(tmp_path / "model", tiny.ARCHITECTURES[kind]())
    flags = ["--replace_sparse_layers", "--pack_bits", "4", "--save_model"]
    dense_rows = prune(model, uk, *flags, "linears")
    packed = prune(model, uk, *flags, "all", "--pack_embeddings", "8")
    assert size_of("all") < size_of("linears")
    record = results()["packed_embeddings"]
    assert record["bits"] == 8 and 0 < record["difference"] < 0.05
    assert len(record["modules"]) == 2 and record["bytes"] < 0.32 * record["dense_bytes"]
    assert f"8 bits change the logits by {record['difference']:.2%}" in packed.out
    assert "8-bit integers with a scale for each row" in Path("all/README.md").read_text()
    assert perplexity(packed.out) == pytest.approx(perplexity(dense_rows.out), rel=0.02)
    again = evaluate("all", uk, *flags, "again", "--pack_embeddings", "8")
    assert perplexity(again.out) == pytest.approx(perplexity(packed.out), rel=1e-6)
    one, two = (Path(f, "model.safetensors").read_bytes() for f in ("all", "again"))
    assert one == two
    unpack_folder("all", "plain")
    plain = evaluate("plain", uk)
    assert perplexity(plain.out) == pytest.approx(perplexity(packed.out), rel=1e-5)


def test_what_has_no_zeros_stays_dense(model: Path, uk: Path) -> None:
    prune(model, uk, "--save_model", "dense")
    dense, name = weights("dense"), "model.layers.0.mlp.up_proj.weight"
    dense[name] = weights(model)[name]
    save_file(dense, "dense/model.safetensors", {"format": "pt"})
    done = evaluate("dense", uk, "--replace_sparse_layers", "--save_model", "packed")
    assert "1 left dense (too few zeros to be smaller packed)" in done.out
    assert torch.equal(weights("packed")[name], dense[name])
    assert results()["packed"]["left_dense"] == 1
    assert perplexity(evaluate("packed", uk).out) == pytest.approx(perplexity(done.out), rel=1e-6)


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
    told = "packed linears:", "footprint"
    lines = [[line for line in done.out.splitlines() if line.startswith(told)]
             for done in (plain, fetched)]  # fmt: skip
    assert lines[0] == lines[1] and len(lines[0]) == 2
    assert not Path("away").exists()


def test_nothing_is_sparse(model: Path, uk: Path) -> None:
    done = call("--model", model, *QUICK, "--eval_only", "--eval_data", uk,
                "--replace_sparse_layers")  # fmt: skip
    assert done.status == 1 and "no linear is smaller packed" in done.complaints[-1]


def test_packed_blocks_can_be_fetched(model: Path, uk: Path) -> None:
    flags = ["--replace_sparse_layers", "--pack_bits", "8", "--save_model", "packed"]
    done = prune(model, uk, *flags, kind="unstructured")
    away = evaluate("packed", uk, "--offload", "away")
    assert perplexity(away.out) == pytest.approx(perplexity(done.out), rel=1e-6)


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


def test_bos_always_without_such_a_token(model: Path, uk: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(add_bos=False)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(model)
    done = call("--model", model, *QUICK, "--eval_only", "--eval_data", uk, "--bos", "always")
    assert done.status == 1 and "--bos always" in done.complaints[-1]
    assert "--bos never" in done.complaints[-1]


def test_own_bos_is_what_the_tokenizer_adds() -> None:
    assert pretrained.default_bos_id(tiny.tiny_tokenizer(add_bos=True)) == 0
    assert pretrained.default_bos_id(tiny.tiny_tokenizer(add_bos=False)) is None
