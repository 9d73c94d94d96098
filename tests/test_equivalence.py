"""The same job done in another way leaves the same model: killed and resumed, offloaded, reloaded.

Every kind of run in KINDS is done in every way of WAYS, by processes that get nothing but a command
line, and compared with the run that nothing disturbs. Several processes and other batches add the
same numbers in another order: there a share of the weights must be alike. Tried by hand: where
statistics are not summed over two processes, 0.967 of wanda's weights are alike, 0.946 of packed
ones, 0.705 of sparsegpt's and 0.354 of those without neurons.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests/bench"))

from compare_commits import child, settings_of_ranks  # noqa: E402

LIMIT = 300  # seconds after which a process hangs
ALIKE = 0.999  # of all weights, where sums are rounded otherwise
BLOCKS = 3
BASE = ["--device", "cpu", "--seqlen", "32", "--nsamples", "8", "--prompts", "0"]
BASE += ["--eval_data", "uk", "--calibration_data", "uk", "--save", "out"]
WANDA, SPARSEGPT, ADMM = (["--prune_method", name] for name in ("wanda", "sparsegpt", "admm"))
HALF = ["--sparsity_type", "2:4"]
FEWER = ["--sparsity_type", "experts", "--sparsity_ratio", "0.25"]
KINDS = {
    "wanda": ["--model", "deep", *WANDA],
    "sparsegpt": ["--model", "bfloat16", *SPARSEGPT, *HALF],
    "by error": ["--model", "deep", *ADMM, "--allocation", "error", "--sparsity_ratio", "0.6"],
    "experts": ["--model", "mixture", *SPARSEGPT],
    "fewer experts": ["--model", "mixture", "--prune_method", "reap", *FEWER],
    "neurons": ["--model", "wide", *SPARSEGPT, "--sparsity_type", "neurons"],
    "recovered": ["--model", "bfloat16", *WANDA, *HALF, "--recover", "2600"],
    "packed": ["--model", "bfloat16", *WANDA, *HALF, "--replace_sparse_layers"],
    "4 bits": ["--model", "bfloat16", *WANDA, *HALF, "--replace_sparse_layers", "--pack_bits", "4"],
    "trimmed": ["--model", "bfloat16", *WANDA, "--trim_vocabulary"],
    "quantised": ["--model", "deep", *WANDA, "--load_bit", "8"],
}
WAYS = ("killed", "offloaded", "two processes", "batch size", "loaded again")
REFUSED = {("recovered", "offloaded"), ("quantised", "offloaded")}
CASES = [(kind, way) for kind in KINDS for way in WAYS if (kind, way) not in REFUSED]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models and texts that all runs read, and what undisturbed ones left."""
    folder = tmp_path_factory.mktemp("place")
    deep = dict(num_hidden_layers=BLOCKS)
    tiny.write_model(folder / "deep", tiny.tiny_llama(**deep))
    tiny.write_model(folder / "bfloat16", tiny.tiny_llama(**deep).bfloat16())
    tiny.write_model(folder / "wide", tiny.tiny_llama(**deep, intermediate_size=512))
    tiny.write_model(folder / "mixture", tiny.ARCHITECTURES["Mixtral"]())
    tiny.write_texts(folder / "uk", train=200, test=4)
    return folder


@pytest.fixture
def plain(request: pytest.FixtureRequest, place: Path) -> Path:
    """Where the run that nothing disturbs has left its model and results."""
    kind = request.node.callspec.params["kind"]
    folder = place / "plain" / kind
    if not folder.exists():
        assert run(KINDS[kind], place, folder) == [0], said(folder)
    return folder


def run(flags: list[str], place: Path, folder: Path, size: int = 1, kill_at: int | None = None):
    """Run main.py in `size` processes, as torchrun starts them; return their exit statuses."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in place.iterdir()}
    argv = [*BASE, *flags] if "--eval_only" in flags else [*BASE, *flags, "--save_model", "model"]
    argv = [str(place / word) if word in names else word for word in argv]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["datasets", "transformers.models.llama.modeling_llama"])
    cache = {"XDG_CACHE_HOME": str(place / "cache")}
    processes = [
        context.Process(target=child, args=(argv, ROOT, folder, kill_at, cache | settings))
        for settings in settings_of_ranks(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        process.kill()
    return [process.exitcode for process in processes]


def said(folder: Path) -> str:
    return (folder / "said").read_text("utf-8")


def saved(folder: Path) -> dict[str, Tensor]:
    """The tensors of the saved model."""
    files = sorted((folder / "model").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def figures(folder: Path) -> list[float]:
    """Perplexity and divergence from the dense model; these see every logit."""
    (test,) = json.loads((folder / "out/results.json").read_text("utf-8"))["evaluation"]
    return [test["perplexity"], test["bits_per_byte"], test.get("kl", 0.0)]


def alike(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Share of weights that are zero in both or in none, and nearly equal; integers are equal."""
    assert {name: (t.shape, t.dtype) for name, t in one.items()} == {
        name: (t.shape, t.dtype) for name, t in two.items()
    }
    same = 0
    for name, tensor in one.items():
        other = two[name]
        if tensor.is_floating_point():
            distance = (tensor.float() - other.float()).abs()
            near = distance <= 0.02 * tensor.float().square().mean().sqrt()
            same += int((near & ((tensor == 0) == (other == 0))).sum())
        else:
            same += int((tensor == other).sum())
    return same / sum(tensor.numel() for tensor in one.values())


@pytest.mark.parametrize(("kind", "way"), CASES, ids=lambda name: name.replace(" ", "-"))
def test_the_same_model(kind: str, way: str, plain: Path, place: Path, tmp_path: Path) -> None:
    flags, size, exact = KINDS[kind], 1, way in ("killed", "offloaded")
    if way == "killed":
        flags = [*flags, "--resume", "kept"]
        at = BLOCKS + 1 if kind == "recovered" else 1
        assert run(flags, place, tmp_path, kill_at=at) == [-signal.SIGKILL]
        assert not (tmp_path / "model").exists()
        assert len(list((tmp_path / "kept").glob("*.safetensors"))) == at
    elif way == "offloaded":
        flags = [*flags, "--offload", "away"]
    elif way == "batch size":
        flags = [*flags, "--batch_size", "1"]
    elif way == "two processes":
        size = 2
    else:
        flags = ["--model", str(plain / "model"), "--eval_only"]
    assert run(flags, place, tmp_path, size) == [0] * size, said(tmp_path)
    if way == "loaded again":
        assert figures(tmp_path)[:2] == pytest.approx(figures(plain)[:2], rel=1e-6)
        return
    assert not [name for name in ("kept", "away") if (tmp_path / name).exists()]
    one, two = saved(plain), saved(tmp_path)
    if exact:
        assert figures(tmp_path) == figures(plain)
        assert one.keys() == two.keys()
        assert not [name for name in one if not torch.equal(one[name], two[name])]
    else:
        assert alike(one, two) >= ALIKE
        assert figures(tmp_path) == pytest.approx(figures(plain), rel=5e-3, abs=2e-3)
