"""What is published and stays: flags, defaults, files, recipes; whole runs against its loops.

The recipes are those of the published launch script, on a hub of the test's own.
Both loops prune block after block: all linears of a block see what the model computes with the
blocks before it pruned and this one dense. The forward passes are transformers' own; a hook on each
linear sees its input.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import tiny
import torch
from hub import Hub
from published import published_mask, published_sparsegpt, published_windows
from safetensors.torch import load_file
from support import QUICK, ROOT, ended, launched, loaded, python, results, succeed
from test_house import imports
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from lib.commands.__main__ import NAMES
from lib.methods.sparsity import Sparsity
from lib.run.flags import build_parser

SEQLEN, WINDOWS = 32, 8  # of QUICK
TYPES = ["unstructured", "2:4", "4:8"]


def wanda(weight: Tensor, x: Tensor, sparsity: Sparsity) -> Tensor:
    """The pruned weight (out, in); inputs `x` (tokens, in)."""
    return weight.masked_fill(published_mask(weight, x.double().norm(dim=0), sparsity), 0)


def sparsegpt(weight: Tensor, x: Tensor, sparsity: Sparsity) -> Tensor:
    pruned, _ = published_sparsegpt(weight, x.double().T @ x.double(), sparsity)
    return torch.from_numpy(pruned).float()


def note(inputs: dict[nn.Module, list[Tensor]], linear: nn.Module, args: tuple[Tensor]) -> None:
    inputs[linear].append(args[0].flatten(0, -2).float())


@torch.no_grad()
def published_loop(
    model: nn.Module, blocks: nn.ModuleList, windows: Tensor, solve: Callable
) -> None:
    """Prune every linear of every block in place."""
    for block in blocks:
        linears = [one for one in block.modules() if isinstance(one, nn.Linear | Conv1D)]
        inputs: dict[nn.Module, list[Tensor]] = {linear: [] for linear in linears}
        hooks = [linear.register_forward_pre_hook(partial(note, inputs)) for linear in linears]
        for window in windows:
            model(window[None])
        for hook in hooks:
            hook.remove()
        for linear in linears:
            transposed = isinstance(linear, Conv1D)  # its weight is (in, out)
            weight = linear.weight.T if transposed else linear.weight
            pruned = solve(weight.clone(), torch.cat(inputs[linear]))
            linear.weight.copy_(pruned.T if transposed else pruned)


BLOCKS = {
    "Llama": lambda model: model.model.layers,
    "GPT-2": lambda model: model.transformer.h,
    "Gemma 2": lambda model: model.model.layers,
}


CASES = [("Llama", solve, kind) for solve in (wanda, sparsegpt) for kind in TYPES]
CASES += [("GPT-2", wanda, "4:8"), ("GPT-2", sparsegpt, "unstructured")]
CASES += [("Gemma 2", wanda, "unstructured"), ("Gemma 2", sparsegpt, "2:4")]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(("architecture", "solve", "kind"), CASES)
def test_masks_and_weights_are_the_published_ones(
    architecture: str, solve: Callable, kind: str, tmp_path: Path
) -> None:
    wide = {"Llama": dict(intermediate_size=192)}  # more than one block of columns
    model = tiny.tiny_llama(**wide[architecture]) if architecture in wide else None
    folder = tiny.write_model(tmp_path / "model", model or tiny.ALL[architecture]())
    texts = tiny.write_texts(tmp_path / "uk", 20, 4)
    flags = ["--prune_method", solve.__name__, "--sparsity_type", kind, "--bos", "never", *QUICK]
    flags += ["--calibration_data", texts, "--save_model", tmp_path / "pruned"]
    succeed("--model", folder, *flags)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = (texts / "train.jsonl").read_text("utf-8").splitlines()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = [json.loads(row)["text"] for row in rows]
    windows, *_ = published_windows(documents, tokenizer, WINDOWS, SEQLEN, seed=0)
    sparsity = Sparsity.parse(kind, 0.5)
    published_loop(model, BLOCKS[architecture](model), windows, partial(solve, sparsity=sparsity))
    model.save_pretrained(tmp_path / "published")
    ours, theirs = (
        load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "published")
    )
    assert ours.keys() == theirs.keys()
    pruned = 0
    for name in theirs:
        assert torch.equal(ours[name] == 0, theirs[name] == 0), name
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
        pruned += (theirs[name] == 0).sum().item() if theirs[name].dim() == 2 else 0
    assert pruned > 5_000


# --- the four recipes of the published launch script, with its texts and the defaults

RECIPES = {
    "sparsegpt": "--prune_method sparsegpt --sparsity_ratio 0.5 --sparsity_type unstructured "
    "--nsamples 64 --seed 0",
    "sparsegpt-2:4": "--prune_method sparsegpt --sparsity_ratio 0.5 --sparsity_type 2:4 "
    "--replace_sparse_layers --nsamples 64 --seed 0",
    "dense": "--eval_only --seed 0",
    "c4": "--prune_method sparsegpt --sparsity_ratio 0.5 --sparsity_type 2:4 --prune_on_c4 "
    "--nsamples 64 --seed 0",
}
LOGS = {  # without --save
    "sparsegpt": "out/model-sparsegpt-unstructured-0.5/log_sparsegpt.txt",
    "sparsegpt-2:4": "out/model-sparsegpt-2of4/log_sparsegpt.txt",
    "dense": "out/model-dense/log_dense.txt",
    "c4": "out/model-sparsegpt-2of4/log_sparsegpt.txt",
}
LENGTH = 128  # of a window: the model's limit
IN_TURN = """
import json, shutil, sys
import main
from lib.util import cli as command
for name, log, argv in json.loads(sys.argv[1]):
    if status := command.run(main.main, argv):
        sys.exit(f"{name}: {status}")
    shutil.copytree(log.rpartition("/")[0], name)
    shutil.rmtree("out")
"""


def words_of(*argv: str) -> list[str]:
    """Return the words with which launch.sh starts `prune`."""
    words = launched(argv, ROOT, PYTHON="echo").split()
    assert words[:4] == ["-P", "-m", "lib.commands", "prune"]
    return words[4:]


@pytest.mark.parametrize("name", RECIPES)
def test_the_published_recipes_stay(name: str) -> None:
    read = build_parser().parse_args
    published = ["--model", "baffo32/decapoda-research-llama-7B-hf", *RECIPES[name].split()]
    assert read(words_of(name)) == read(published)
    assert read(words_of(name, "--model", "m", "--seed", "3")).seed == 3
    assert f"\n  {name} " in launched([], ROOT)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each recipe, of its log and results; in PRUNED/NAME what it saved."""
    place = tmp_path_factory.mktemp("recipes")
    tiny.write_model(place / "model")
    short, long = tiny.sentences(20, 1, words=20), tiny.sentences(90, 2, words=80)
    uk = tiny.write_texts(place / "uk", train=short + long, test=tiny.sentences(6, 3))
    en = tiny.write_texts(place / "en", train=tiny.sentences(30, 4, words=80))
    published = {f"{s}.jsonl": (uk / f"{s}.jsonl").read_bytes() for s in ("train", "test")}
    shard = gzip.compress((en / "train.jsonl").read_bytes())
    repositories = {
        "datasets/mshamrai/lang-pruning-uk-uber-text-2": published,
        "datasets/allenai/c4": {"en/c4-train.00000-of-01024.json.gz": shard},
    }
    runs = []
    for name in RECIPES:
        argv = ["--model", "model", "--device", "cpu"]
        argv += ["--save_model", f"pruned/{name}"] if name != "dense" else []
        runs.append((name, LOGS[name], words_of(name, *argv)))
    with Hub(repositories) as hub:
        done = ended(python(IN_TURN, json.dumps(runs), folder=place, **hub.environment(place)))
    assert done.status == 0, done.err
    return place


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_as_it_was_published(name: str, recipes: Path) -> None:
    model, tokenizer = loaded(recipes / "model"), AutoTokenizer.from_pretrained(recipes / "model")

    def texts(language: str, split: str) -> list[str]:
        rows = (recipes / language / f"{split}.jsonl").read_text("utf-8").splitlines()
        return [json.loads(row)["text"] for row in rows]

    record = results(recipes / name)
    if name != "dense":
        on, again = ("en", True) if name == "c4" else ("uk", False)
        windows, rows, _ = published_windows(texts(on, "train"), tokenizer, 64, LENGTH, 0, again)
        assert windows.shape == (64, LENGTH) and (len({*rows}) < 64) == again
        digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        assert record["calibration"]["digest"] == digest
        kind = "unstructured" if name == "sparsegpt" else "2:4"
        solve = partial(sparsegpt, sparsity=Sparsity.parse(kind, 0.5))
        published_loop(model, model.model.layers, windows, solve)
        pruned = loaded(recipes / "pruned" / name)
        if name == "sparsegpt-2:4":
            assert record["packed"]["linears"] == 14
            pruned.dequantize()
        ours, theirs = pruned.state_dict(), model.state_dict()
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert torch.equal(ours[key] == 0, theirs[key] == 0), key
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-3)
    # perplexity by the published rule, on UberText whatever was calibrated on
    ids = tokenizer("\n\n".join(texts("uk", "test")), return_tensors="pt").input_ids[0]
    tests = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        losses = [F.cross_entropy(model(test[None]).logits[0, :-1], test[1:]) for test in tests]
    perplexity = math.exp(sum(losses) / len(losses))
    assert record["perplexity"] == {"ubertext": pytest.approx(perplexity, rel=1e-3)}
    head, values, *more = (recipes / name / Path(LOGS[name]).name).read_text("utf-8").splitlines()
    method, zeros = ("dense", "0.0000") if name == "dense" else ("sparsegpt", "0.5000")
    assert head == "method\tactual_sparsity\tppl_test"
    assert values == f"{method}\t{zeros}\t{record['perplexity']['ubertext']:.4f}"
    assert all(line.startswith("# ") for line in more)


# --- names


PUBLISHED_FLAGS = {  # default, and choices that stay
    "model": (None, ()),
    "seed": (0, ()),
    "nsamples": (128, ()),
    "sparsity_ratio": (0.5, ()),
    "sparsity_type": ("unstructured", ("unstructured", "2:4", "4:8")),
    "prune_method": (None, ("wanda", "sparsegpt")),
    "cache_dir": (None, ()),
    "use_variant": (False, ()),
    "save": (None, ()),
    "save_model": (None, ()),
    "load_bit": (None, ("4", "8")),
    "replace_sparse_layers": (False, ()),
    "eval_only": (False, ()),
    "prune_on_c4": (False, ()),
    "device": (None, ()),
}
VERBS = """
prune.prune eval.perplexity sparse.pack_ stages.quantize.quantize stages.remove.remove
stages.recover.Recoverer commands.trim.__main__.main commands.ubertext.build
commands.overlap.compare_masks
""".split()


def test_the_published_flags_stay() -> None:
    flags: dict[str, argparse.Action] = {}
    for action in build_parser()._actions:
        flags |= dict.fromkeys(action.option_strings, action)
    for name, (default, choices) in PUBLISHED_FLAGS.items():
        action = flags[f"--{name}"]
        assert action.dest == name and action.default == default, name
        for choice in choices:
            args = build_parser().parse_args(["--model", "m", f"--{name}", choice])
            assert getattr(args, name) == choice
        assert (action.nargs == 0) == (default is False), name  # a switch takes no value
    args = build_parser().parse_args("--model m --seed 3 --nsamples 5 --sparsity_ratio .25".split())
    assert (args.seed, args.nsamples, args.sparsity_ratio) == (3, 5, 0.25)


@pytest.mark.parametrize("verb", VERBS)
def test_the_verbs_stay(verb: str) -> None:
    module, _, name = verb.rpartition(".")
    assert callable(getattr(import_module(f"lib.{module}"), name))
    if not module.startswith("commands."):  # a run takes it from there
        steps = {
            module for part in (ROOT / "lib/run").glob("*.py") for _, module, *_ in imports(part)
        }
        assert f"lib.{module}" in steps


def test_both_programs_and_their_commands_stay(tmp_path: Path) -> None:
    assert {"prune", "ubertext", "overlap"} <= {*NAMES}
    assert set(NAMES) <= {line.split()[0] for line in launched([], tmp_path).splitlines() if line}
    assert callable(import_module("main").main) and (ROOT / "main.py").is_file()


def test_layers_of_torchs_2_to_4_kernels_stay() -> None:
    """In code, not in words alone."""
    files = [ast.parse(file.read_text("utf-8")) for file in (ROOT / "lib").rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(file)]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.name for node in nodes if isinstance(node, ast.alias)}
    assert "to_sparse_semi_structured" in used
