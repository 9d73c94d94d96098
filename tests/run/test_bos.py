"""What `--bos auto` measures: perplexity that is 1.5 times as high without BOS, and not less."""

from __future__ import annotations

import math
import random
from pathlib import Path

import processes
import pytest
import tiny
import torch
from support import QUICK, results, runner_of, succeed, weights
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lib import eval as measuring

BOS = 0


def perplexity(model: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    return math.exp(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def ratio(model: nn.Module, windows: Tensor) -> float:
    """Perplexity of bare windows over that of the same ones after BOS, by whole forward passes."""
    begun = torch.cat([torch.full((4, 1), BOS), windows[:, :-1]], 1)
    return perplexity(model, windows) / perplexity(model, begun)


@pytest.mark.parametrize(("wanted", "needs"), [(1.45, False), (1.55, True)])
def test_a_model_needs_bos_from_one_and_a_half_times_the_perplexity_on(
    wanted: float, needs: bool, needs_bos: Path
) -> None:
    tokenizer = tiny.tiny_tokenizer(add_bos=False)
    ids = tokenizer(" ".join(tiny.sentences(20, seed=3)), return_tensors="pt").input_ids[0]
    windows = ids[: 4 * 33].view(4, 33).clone()
    windows[:, 0] = BOS  # as where tokenizers have put it before a text
    model = AutoModelForCausalLM.from_pretrained(needs_bos, dtype=torch.float32).eval()
    model.requires_grad_(False)
    embedding = model.get_input_embeddings().weight.data
    whole, other = embedding[BOS].clone(), embedding[3:].mean(0)
    low, high = 0.0, 1.0  # how much of BOS is left: the less, the less it helps
    for _ in range(14):
        share = (low + high) / 2
        embedding[BOS] = other + share * (whole - other)
        low, high = (share, high) if ratio(model, windows[:, 1:]) < wanted else (low, share)
    assert ratio(model, windows[:, 1:]) == pytest.approx(wanted, rel=1e-3)
    assert measuring.needs_bos(runner_of(model), windows, BOS) == needs


def test_a_run_that_is_continued_decides_as_it_did(needs_bos: Path, tmp_path: Path) -> None:
    """Though on another test text it would not; no two blocks see different windows."""
    uk = tiny.write_texts(tmp_path / "uk")
    letters = "".join(random.Random(1).choices("qzxwvjkбгґщьюя#%&@!", k=4000))
    noise = tiny.write_texts(tmp_path / "noise", test=[letters])

    def flags(name: str, test: Path) -> list:
        argv = ["--model", needs_bos, "--prune_method", "wanda", "--calibration_data", uk, *QUICK]
        argv += ["--eval_data", test, "--resume", tmp_path / f"{name}-kept"]
        return [*argv, "--save_model", tmp_path / f"{name}-m", "--save", tmp_path / f"{name}-out"]

    assert processes.run(flags("resumed", noise), tmp_path, "pruning 1:SIGKILL").status < 0
    for name, test in (("resumed", uk), ("noise", noise), ("uk", uk)):
        succeed(*flags(name, test))
    begun = {name: results(tmp_path / f"{name}-out")["bos"] for name in ("resumed", "noise", "uk")}
    assert begun == {"resumed": None, "noise": None, "uk": 0}
    whole, resumed = weights(tmp_path / "noise-m"), weights(tmp_path / "resumed-m")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())
