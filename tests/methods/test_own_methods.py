"""A method in a file of the user's: its parameters, what it may see, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, ROOT, refused, results, runner_of, succeed, weights, windows

from lib.calibration.allocation import by_error
from lib.methods.registry import method_of, parameters
from lib.model.linears import watch_outputs
from lib.prune import prune

MINE = """
from langprune.methods.base import PruningMethod
from langprune.methods.wanda import Wanda


class Mine(Wanda):
    power = 1.0
    rounds = 2
    eager = False

    def prune_(self, weights, sparsities):
        for weight, sparsity in zip(weights, sparsities, strict=True):
            score = weight.abs() * self.square_sum.sqrt().float() ** self.power
            weight.masked_fill_(sparsity.mask(score), 0)


class Seeing(PruningMethod):
    needs_gradients = True
    needs_outputs = True
    seen = []

    def prune_(self, weights, sparsities):
        self.seen.append((self.output_costs, self.output_squares))
        for weight, sparsity in zip(weights, sparsities, strict=True):
            weight[sparsity.mask(weight.abs())] = 0
"""


@pytest.fixture
def files(elsewhere: None) -> None:
    Path("mine.py").write_text(MINE)
    tiny.write_model("model")
    tiny.write_texts("uk")


GIVEN = ["--model", "model", "--calibration_data", "uk", *QUICK, "--prune_method"]


@pytest.mark.usefixtures("files")
def test_a_run_by_ones_own_method_is_one_by_wanda_where_the_score_is() -> None:
    """An edited method is another run: no sweep skips it, its blocks are not mixed with others."""
    for name, method in (("mine", "./mine.py:Mine"), ("wanda", "wanda")):
        succeed(*GIVEN, method, "--save", name, "--save_model", f"{name}-model")
    ours, wanda = weights("mine-model"), weights("wanda-model")
    assert all(torch.equal(ours[name], wanda[name]) for name in wanda)
    found = results("mine")
    assert found["method"] == "Mine" and Path("mine/log_Mine.txt").exists()
    before = found["fingerprint"]["pruning"]
    assert before["--prune_method"] == "Mine" and "./" not in json.dumps(before)
    assert before["revision of --prune_method"] == 1
    Path("mine.py").write_text(MINE.replace("self.power\n", "(0 * self.power)\n", 1))
    succeed(*GIVEN, "mine.py:Mine", "--save_model", "other")
    changed = weights("other")
    assert any(not torch.equal(changed[name] == 0, wanda[name] == 0) for name in wanda)
    [folder] = Path("out").iterdir()  # the default of --save has the class in its name
    assert folder.name == "model-Mine-unstructured-0.5"
    after = results(folder)["fingerprint"]["pruning"]
    assert {name for name in before if before[name] != after[name]} == {"file of --prune_method"}


@pytest.mark.usefixtures("files")
def test_the_example_of_contributing_runs_as_it_is_printed() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    Path("file.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    succeed(*GIVEN, "file.py:Mine", "--method_args", "power=1", "--save_model", "example")
    succeed(*GIVEN, "wanda", "--save_model", "wanda-model")
    ours, wanda = weights("example"), weights("wanda-model")
    assert all(torch.equal(ours[name], wanda[name]) for name in wanda)


@pytest.mark.usefixtures("files")
def test_arguments() -> None:
    succeed(*GIVEN, "mine.py:Mine", "--method_args", "power=0", "rounds=3", "--save_model", "new")
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = weights("model")[name], weights("new")[name]  # by magnitude, in each row
    assert torch.equal(after, before.scatter(1, before.abs().argsort()[:, :16], 0))
    assert parameters(method_of("sparsegpt")) == {"damping": 0.01, "block_size": 128}
    changed = method_of("sparsegpt", arguments={"damping": 0.1})
    assert (changed.damping, changed.block_size) == (0.1, 128)
    assert method_of("sparsegpt").damping == 0.01
    assert parameters(method_of("ria")) == {"alpha": 0.5}
    assert "wanda, " in refused(method_of, "nosuch")


@pytest.mark.usefixtures("files")
def test_gradients_and_outputs_are_seen() -> None:
    """Mean squares of gradients, as allocation by error has them; sums of squares of outputs."""
    model, ids = tiny.tiny_llama(num_hidden_layers=1), windows(3)
    runner = runner_of(model.requires_grad_(False))
    linears, sums = runner.linears(0), {}

    def see(linear, x, out) -> None:
        sums[linear.name] = out.double().square().sum((0, 1))

    with watch_outputs(linears, see), torch.no_grad():
        model(input_ids=ids)
    costs = by_error(runner, ids, 0.5).output_costs
    method = method_of("mine.py:Seeing")
    method.seen.clear()
    prune(model, ids, method, 0.5)
    found_costs = [one for each, _ in method.seen for one in each]
    found_squares = torch.cat([one for _, each in method.seen for one in each])
    assert len(found_costs) == len(linears) == 7
    expected = torch.cat([costs[one.name] for one in linears])
    torch.testing.assert_close(torch.cat(found_costs), expected)
    expected = torch.cat([sums[one.name] for one in linears])
    torch.testing.assert_close(found_squares, expected, rtol=1e-4, atol=1e-6)
