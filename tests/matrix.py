"""Whole runs: KINDS (run_kinds.py), the WAYS in which each is done again, one comparison.

A run that nothing disturbs is made once of each kind (`Place.plain`), and whatever is done again is
compared with it by `compare`. The tests of the default run are chosen so that every flag of a kind,
and every model, meets every way once (`chosen`); all others are marked `full`. The pretended CUDA
device (tests/cuda/test_matrix.py) has ways of its own on the same kinds.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import chats
import pytest
import run_kinds
import tiny
from run_kinds import PACK, TRAIN, spelled  # noqa: F401  for tests
from support import program_of, results, succeed, trimmed, weights, whole
from torch import Tensor, equal
from transformers import PreTrainedModel
from vocabulary import kinds as tokenizers

KINDS = {name: spelled(name, new=True)[0] for name in run_kinds.KINDS}
TYPES = {"model.layers.0.self_attn.q_proj.weight": "q5_0", "model.embed_tokens.weight": "iq4_nl"}
TYPES |= {"model.layers.0.self_attn.v_proj.weight": "q4_0", "lm_head.weight": "q5_0"}
TYPES |= {f"model.layers.{place}.mlp.down_proj.weight": "q3_k" for place in range(2)}
BASE = run_kinds.BASE.split()
ALIKE = 0.999  # of all weights, where sums are rounded otherwise
ALIKE_ROUNDED = 0.9  # in 8 bits and bfloat16
ALIKE_ON_GRID = 0.7  # 0.84 and more were seen
STEPS = {"prune": "--prune_method", "quantize": "--quantize", "recover": "--recover"}
REPORTED = "sparsity", "errors", "notes", "allocation", "quantized", "packed", "footprint"
AGAIN = "loaded again"
POINTS = (  # what a kind is there for
    ("by error", "killed to prune"),
    ("in 8 bits", "killed to prune"),
    ("trained in vain", "killed to recover"),
    ("trained in 8 bits", "killed to recover"),  # whose count of steps is no tensor
    ("trained", AGAIN),  # in float32, saved in bfloat16
    ("q4_0, odd rows", AGAIN),
    ("one window", "by 3 ranks"),
    ("int4, trained", "by 2 ranks"),
)
GRIDS = "q4_0", "iq4_nl", "q5_0", "q3_k"  # with few values in each block of 32 inputs


def has(kind: str, *flags: str) -> bool:
    """Whether a kind has one of these flags, or words."""
    return bool(set(flags) & set(KINDS[kind].split()))


def features(kind: str) -> set[str]:
    """A kind's model, and each of its flags with its value."""
    model, *flags = KINDS[kind].split(" --")
    return {model, *flags}


def chosen(ways: Mapping[str, Iterable[str]], count: int) -> set[tuple[str, str]]:
    """So many (kind, way), of these {way: its kinds}, in which most features of a kind meet most
    ways; every kind is once among them, before one comes a second time. POINTS come first."""
    cases = [(kind, way) for way, kinds in ways.items() for kind in KINDS if kind in kinds]
    met: set[tuple[str, str]] = set()
    times: Counter[str] = Counter()  # of kinds and of ways

    def gain(case: tuple[str, str]) -> tuple[int, int, int]:
        kind, way = case
        new = {(feature, way) for feature in features(kind)} - met
        return -times[kind], len(new), -times[way]

    points = [case for case in POINTS if case in cases]
    for place in range(count):
        kind, way = best = points[place] if place < len(points) else max(cases, key=gain)
        cases.remove(best)
        met |= {(feature, way) for feature in features(kind)}
        times.update(best)
    return {(kind, way) for way, kinds in ways.items() for kind in kinds} - set(cases)


def parameters(
    ways: Mapping[str, Iterable[str]], count: int, rest: Any = pytest.mark.full
) -> Iterator[Any]:
    """Every (kind, way) as parameters of a test, a kind's ways side by side; all but `count` of
    them, which `chosen` names, have the mark `rest`."""
    default = chosen(ways, count)
    for kind in KINDS:
        for way in (way for way, kinds in ways.items() if kind in kinds):
            marks = [] if (kind, way) in default else [pytest.mark.full]
            yield pytest.param(kind, way, marks=marks, id=f"{kind}: {way}".replace(" ", "-"))


MODELS = {
    "llama": partial(tiny.tiny_llama, num_hidden_layers=3),
    "bfloat16": lambda: tiny.tiny_llama(num_hidden_layers=3, vocab_size=tiny.ROWS).bfloat16(),
    "odd": partial(tiny.tiny_llama, num_hidden_layers=3, intermediate_size=48),
    "wide": partial(tiny.tiny_llama, num_hidden_layers=3, intermediate_size=512),
    "tied": partial(tiny.tiny_llama, tie_word_embeddings=True, vocab_size=tiny.ROWS),
    "mixture": partial(tiny.build, "mixtral", **tiny.EXPERTS | dict(intermediate_size=32)),
    "transposed": tiny.ARCHITECTURES["GPT-2"],
    "mamba": tiny.HYBRIDS["Mamba"],
    "phi3": lambda: tiny.build("phi3", vocab_size=462).bfloat16(),
    "chat": partial(tiny.tiny_llama, vocab_size=tiny.ROWS),
    "mixed": lambda: _with_exact_norms(tiny.tiny_llama().half()),
    "sharded": partial(tiny.tiny_llama, vocab_size=tiny.ROWS),
}
TOKENIZERS = {
    "phi3": tokenizers.byte_fallback,
    "chat": lambda: chats.tokenizer_with(chats.QWEN_3),
}


def _with_exact_norms(model: PreTrainedModel) -> PreTrainedModel:
    for block in model.model.layers:
        block.input_layernorm.float().weight.data.fill_(1.0001)
    return model


class Place:
    """A folder with the models and texts that all runs read, and what undisturbed runs left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tiny.write_texts(folder / "uk", train=200, test=4)
        (folder / "types.json").write_text(json.dumps(TYPES), "utf-8")
        chats.write(folder / "chats", chats.some(50), chats.some(8, seed=1))

    def argv(self, kind: str, folder: Path) -> list[object]:
        """A run's command line; its results and its model are left in `folder`."""
        model, *flags = KINDS[kind].split()
        self.make(model)
        if "--teacher" in flags:
            self.make(flags[flags.index("--teacher") + 1])
        saved = ["--save", folder / "out", "--save_model", folder / "model"]
        return ["--model", model, *BASE, *flags, *saved]

    def make(self, name: str) -> None:
        """Make a model, once."""
        folder = self.folder / name
        if folder.exists():
            return
        if name == "pruned":
            shutil.copytree(self.plain("wanda") / "model", folder)
            return
        whole, is_trimmed, _ = name.partition("-trimmed")
        if is_trimmed:
            self.make(whole)
            trimmed(self.folder / whole, folder, self.folder / "uk")
            return
        model = MODELS[name]()
        tiny.write_model(folder, model, TOKENIZERS[name]() if name in TOKENIZERS else None)
        if name == "sharded":
            folder.joinpath("model.safetensors").unlink()
            model.save_pretrained(folder, max_shard_size="60KB")

    def plain(self, kind: str, *flags: str) -> Path:
        """Where the run that nothing disturbs has left its model and results, made once."""
        folder = self.folder / "plain" / " ".join([kind, *flags])
        if not folder.exists():
            succeed(*self.argv(kind, folder), *flags)
        return folder

    def precise(self, kind: str) -> list[str]:
        """The flags with which adding in another order leaves the same model on any processor.

        With products in bfloat16, which some have, now and then an output is rounded otherwise, and
        what SparseGPT carries on from there has it drop other weights.
        """
        config = self.folder / KINDS[kind].split()[0] / "config.json"
        in_bfloat16 = json.loads(config.read_text("utf-8"))["dtype"] == "bfloat16"
        return ["--dtype", "float32"] if in_bfloat16 and not has(kind, "--dtype") else []


def on_grid(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices whose blocks of 32 inputs have few values each."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            continue
        rows = tensor.mT if ".h." in name else tensor  # GPT-2's are (in, out)
        if rows.shape[-1] % 32 == 0:
            blocks = rows.float().reshape(-1, 32).sort().values
            if bool(((blocks.diff() != 0).sum(1) < 28).all()):
                found[name] = tensor
    return found


def curve(found: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Tokens and held-out loss of a training, wherever it was measured."""
    return [(each["tokens"], each["loss"]) for each in found["recovery"]["curve"]]


def figures(found: Mapping[str, Any]) -> list[float]:
    """Bits per byte, and divergence from the dense model; these see every logit."""
    (test,) = found["evaluation"]
    return [test["bits_per_byte"], test.get("kl", 0.0)]


def alike(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Share of weights that are zero in both or in none, and nearly equal; integers are equal."""
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


def unpacked(folder: Path) -> dict[str, Tensor]:
    """The weights of a packed model."""
    if not (folder / "dense").exists():
        succeed(folder / "model", folder / "dense", program=program_of("unpack"))
    return weights(folder / "dense")


def compare(kind: str, plain: Path, other: Path, exact: bool = True) -> None:
    """Two runs of a kind left the same model, one that transformers loads, and the same figures.

    `exact`: bit for bit. Otherwise the same numbers were added in another order, and a share of the
    weights must be alike.
    """
    one, two = weights(plain / "model"), whole(other / "model")
    if has(kind, PACK) and not exact:  # how many codes are not 0 is rounded otherwise too
        one, two = (unpacked(folder) for folder in (plain, other))
    kinds = [{name: (t.shape, t.dtype) for name, t in each.items()} for each in (one, two)]
    assert kinds[0] == kinds[1]
    before, after = (results(folder / "out") for folder in (plain, other))
    assert after["calibration"] == before["calibration"]
    trained, on_grid = has(kind, "--recover"), has(kind, "--quantize")
    if exact:
        assert figures(after) == figures(before)
        assert [key for key in REPORTED if after.get(key) != before.get(key)] == []
        assert [name for name in one if not equal(one[name], two[name])] == []
        assert not trained or curve(after) == curve(before)
        return
    rounded = on_grid or has(kind, "--load_bit", "--dtype")  # products, by the batch
    rel = 3e-2 if on_grid and trained else 1e-2 if rounded else 1e-3
    assert figures(after) == pytest.approx(figures(before), rel=rel, abs=2e-2 if rounded else 2e-3)
    if trained:
        assert [tokens for tokens, _ in curve(after)] == [tokens for tokens, _ in curve(before)]
        losses = [[loss for _, loss in curve(found)] for found in (before, after)]
        assert losses[1] == pytest.approx(losses[0], rel=rel)
        for key in ("rate", "weights", "steps", "windows"):
            assert after["recovery"][key] == pytest.approx(before["recovery"][key], rel=rel)
    if on_grid:  # a code that is rounded otherwise changes those after it
        assert trained or alike(one, two) >= ALIKE_ON_GRID
        return
    if not (trained or has(kind, "--dtype")):
        first = {name: tensor for name, tensor in one.items() if ".0." in name}
        assert alike(first, two) >= ALIKE  # where nothing has changed before
    assert alike(one, two) >= (ALIKE_ROUNDED if rounded else ALIKE)
