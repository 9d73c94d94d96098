"""A method in a file of the user's: its parameters, what it may see, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, call, results, runner_of, succeed, weights, windows

from lib.methods.registry import method_of, parameters
from lib.model.linears import watch_outputs
from lib.prune import prune
from lib.pruning.allocation import by_error
from lib.util.errors import UserError

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


GIVEN = ["--model", "model", "--calibration_data", "uk", *QUICK]


@pytest.mark.usefixtures("files")
def test_a_run_by_ones_own_method_is_one_by_wanda_where_the_score_is() -> None:
    for name, method in (("mine", "./mine.py:Mine"), ("wanda", "wanda")):
        succeed(*GIVEN, "--prune_method", method, "--save", name, "--save_model", f"{name}-model")
    ours, wanda = weights("mine-model"), weights("wanda-model")
    assert all(torch.equal(ours[name], wanda[name]) for name in wanda)
    found = results("mine")
    assert found["method"] == "Mine" and Path("mine/log_Mine.txt").exists()
    other = ["--prune_method", "mine.py:Mine", "--method_args", "power=0", "rounds=3"]
    succeed(*GIVEN, *other, "--save_model", "other")
    changed = weights("other")
    assert any(not torch.equal(changed[name] == 0, wanda[name] == 0) for name in wanda)
    assert Path("out").is_dir()  # the default of --save has the class in its name
    [folder] = Path("out").iterdir()
    assert folder.name == "model-Mine-unstructured-0.5"
    succeed(*GIVEN, "--prune_method", "ria", "--method_args", "alpha=1", "--save", "ria")


@pytest.mark.usefixtures("files")
def test_an_edited_method_is_another_run() -> None:
    """A sweep would run it again, and its blocks are not mixed with others."""
    run = [*GIVEN, "--prune_method", "mine.py:Mine"]
    succeed(*run, "--save", "first")
    before = results("first")["fingerprint"]["pruning"]
    assert before["--prune_method"] == "Mine" and "./" not in json.dumps(before)
    assert before["revision of --prune_method"] == 1
    Path("mine.py").write_text(MINE.replace("self.power\n", "(2 * self.power)\n", 1))
    succeed(*run, "--save", "second")
    after = results("second")["fingerprint"]["pruning"]
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"file of --prune_method"}


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
    assert sum(len(each) for each, _ in method.seen) == len(linears) == 7
    found_costs = torch.cat([one for each, _ in method.seen for one in each])
    found_squares = torch.cat([one for _, each in method.seen for one in each])
    torch.testing.assert_close(found_costs, torch.cat([costs[one.name] for one in linears]))
    expected = torch.cat([sums[one.name] for one in linears])
    torch.testing.assert_close(found_squares, expected, rtol=1e-4, atol=1e-6)


WRONG = [
    ("none.py:Mine", "", "none.py:Mine: no such file"),
    ("mine.py:Other", "", "no such class", "Mine, Seeing"),
    ("broken.py:Mine", "", "cannot be imported", "ZeroDivisionError"),
    ("syntax.py:Mine", "", "cannot be imported", "SyntaxError"),
    ("mine.py:Mine", "--method_args nosuch=1", "nosuch=1", "power=1.0, rounds=2, eager=False"),
    ("mine.py:Mine", "--method_args power", "--method_args power", "NAME=VALUE"),
    ("mine.py:Mine", "--method_args rounds=1.5", "rounds=1.5", "is not int"),
    ("wanda", "--method_args alpha=1", "alpha=1", "of these: none"),
    ("mine.py:Mine", "--sparsity_type neurons", "neurons", "remove_neurons_"),
    ("mine.py:Seeing", "--sparsity_type neurons", "neurons", "remove_neurons_"),
    ("mine.py:Mine", "--sparsity_type experts", "experts", "scores"),
    ("ria", "--sparsity_type neurons", "ria", "does not define remove_neurons_", "unstructured"),
    ("empty.py:Empty", "", "prune_"),
]


@pytest.mark.usefixtures("files", "no_weights")
def test_what_is_refused_in_a_line() -> None:
    Path("broken.py").write_text("1 / 0\n")
    Path("syntax.py").write_text("class Mine(:\n")
    base = "from langprune.methods.base import PruningMethod\n"
    Path("empty.py").write_text(base + "class Empty(PruningMethod):\n    pass\n")
    for method, flags, *words in WRONG:
        done = call(*GIVEN, "--prune_method", method, *flags.split())
        assert done.status == 1 and len(done.complaints) == 1, (method, flags, done.err)
        assert all(word in done.complaints[0] for word in words), done.complaints


def test_parameters() -> None:
    found = parameters(method_of("sparsegpt"))
    assert found == {"damping": 0.01, "block_size": 128}
    changed = method_of("sparsegpt", arguments={"damping": 0.1})
    assert (changed.damping, changed.block_size) == (0.1, 128)
    assert method_of("sparsegpt").damping == 0.01
    assert parameters(method_of("ria")) == {"alpha": 0.5}
    with pytest.raises(UserError, match="Name wanda, "):
        method_of("nosuch")
