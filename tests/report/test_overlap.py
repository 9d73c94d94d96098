"""Overlap of masks: against counting by hand, streaming, the noise floor, and whole runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas
import pytest
import tiny
import torch
from approval import Words
from made_up import write_run
from matplotlib.figure import Figure
from safetensors.torch import save_file
from support import PACKED, QUICK, mistake, program_of, results, succeed, weights

from lib.packed.checkpoint import PackedConfig

pytestmark = pytest.mark.usefixtures("elsewhere", "figures")

Q, UP = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.up_proj.weight"
NUMBERS = ["weights", "kept_a", "kept_b", "both"]
main = program_of("overlap")


def overlap(runs: Sequence[Path], noise: Sequence[Path] = ()) -> pandas.DataFrame:
    """The counts that the command writes."""
    succeed(*runs, *(["--noise", *noise] if noise else []), program=main)
    return pandas.read_csv("overlap/overlap.csv")


def text() -> str:
    return Path("overlap/overlap.md").read_text("utf-8")


def save(folder: Path, tensors: dict, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    names = sorted(tensors)
    for shard in range(shards):
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / f"model-{shard + 1:05}-of-{shards:05}.safetensors")
    return folder


def random_model(seed: int, blocks: int = 3, width: int = 16) -> dict:
    """Half the weights of every linear are zero, at random; norms and embeddings are dense."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.ones(9, width)}
    for block in range(blocks):
        tensors[f"model.layers.{block}.norm.weight"] = torch.zeros(width)
        for name in (Q, UP):
            tensors[name.format(block)] = (torch.rand(24, width, generator=generator) < 0.5).float()
    return tensors


def test_a_case_by_hand(tmp_path: Path, words: Words) -> None:
    a = torch.tensor([[1.0, 0, 2, 0], [3, 4, 0, 0]])  # keeps 4 of 8
    b = torch.tensor([[5.0, 6, 7, 0], [8, 9, 1, 0]])  # keeps 6 of 8, among them all 4
    counts = overlap([save(tmp_path / n, {Q.format(0): x}) for n, x in (("a", a), ("b", b))])
    (line,) = counts.to_dict("records")
    assert line == {
        "seeds": False, "a": "a", "b": "b", "block": 0, "linear": "self_attn.q_proj",
        "weights": 8, "kept_a": 4, "kept_b": 6, "both": 4, "chance": 4 * 6 / 8,
    }  # fmt: skip
    words("report.txt", text(), "overlap by hand")  # kept 5/8, both keep 4/5, chance 3/5


@pytest.fixture
def languages(tmp_path: Path) -> dict[tuple[str, int], Path]:
    """Two languages whose masks differ in block 1 only, and a second seed of each."""
    folders, base, other = {}, random_model(1), random_model(2)
    for language in ("uk", "en"):
        special = {n: other[n] for n in base if ".1." in n} if language == "en" else {}
        for seed in (0, 1):
            tensors = {name: tensor.clone() for name, tensor in (base | special).items()}
            for name in tensors if seed else ():  # a little noise: one row keeps something else
                if "proj" in name:
                    tensors[name][0] = 1 - tensors[name][0]
            folders[language, seed] = save(tmp_path / f"{language}{seed}", tensors, shards=2)
    return folders


def test_the_noise_floor_singles_out_the_specific_block(
    languages: dict, words: Words, figures: dict[str, Figure]
) -> None:
    runs, noise = ([languages[on, seed] for on in ("uk", "en")] for seed in (0, 1))
    counts = overlap(runs, noise)
    sums = counts.groupby(["seeds", "block", "linear"], sort=False)[NUMBERS].sum()
    both = 2 * sums["both"] / (sums["kept_a"] + sums["kept_b"])
    excess = (both[True] - both[False]).unstack(sort=False)
    assert excess.mean(axis=1).idxmax() == 1 and excess.loc[1].min() > 0.3
    assert (both[False].unstack().loc[0] == 1).all() and (excess.loc[0] < 0).all()
    heat = figures["overlap"].axes[0].images[0].get_array().data
    assert heat == pytest.approx(100 * excess.to_numpy())
    words("report.txt", text(), "overlap with a noise floor")


def test_run_folders_lead_to_their_saved_models(languages: dict, tmp_path: Path) -> None:
    runs = []
    for on in ("uk", "en"):
        flags = {"save_model": str(languages[on, 0])}
        runs.append(write_run(tmp_path / f"run-{on}", "wanda", {}, on=on, flags=flags))
    languages["en", 0].rename(runs[1] / "en0")  # as where a run that holds its model was moved
    counts = overlap(runs)
    assert {*counts["a"], *counts["b"]} == {"uk (seed 0)", "en (seed 0)"}
    none = write_run(tmp_path / "none", "wanda", {}, on="uk")
    for wrong, argv in {
        f"--noise {runs[1]}": [*runs, "--noise", runs[1]],  # calibrated on another text
        f"--noise {runs[0]}": [*runs, "--noise", runs[0]],  # of the same seed
        f"RUN {none}": [none, runs[1]],  # saved no model
    }.items():
        assert str(mistake(*argv, program=main)).startswith(f"{wrong}: ")


def test_fused_experts_count_and_single_ones_are_added_up(tmp_path: Path) -> None:
    keep = (torch.arange(4 * 6 * 8).view(4, 6, 8) % 2).float()
    first = {"model.layers.0.mlp.experts.gate_up_proj": keep}
    first |= {f"transformer.h.11.mlp.experts.{i}.w1.weight": keep[i].clone() for i in range(4)}
    second = {name: 1 - tensor for name, tensor in first.items()}
    counts = overlap([save(tmp_path / "a", first), save(tmp_path / "b", second)])
    places = sorted(zip(counts["block"], counts["linear"], strict=True))
    assert places == [(0, "mlp.experts.gate_up_proj"), (11, "mlp.experts.*.w1")]
    assert counts["weights"].tolist() == [192, 192] and counts["both"].sum() == 0


def test_packed_checkpoints_count_like_dense_ones(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    plain, packed, name = [], [], Q.format(0).removesuffix(".weight")
    for index in range(2):
        score = torch.rand(6, 13, generator=generator)
        weight = score.masked_fill(score < 0.4, 0)
        plain.append(save(tmp_path / f"{index}" / "plain", {Q.format(0): weight}))
        mask, values, _ = PACKED[16].encode(weight)
        tensors = {f"{name}.weight": values, f"{name}.mask": mask}
        packed.append(save(tmp_path / f"{index}" / "packed", tensors))
        config = PackedConfig({name: [6, 13, len(values)]}, 16).to_dict()
        (packed[-1] / "config.json").write_text(json.dumps({"quantization_config": config}))
    expected = overlap(plain)[NUMBERS].to_dict()
    assert overlap(packed)[NUMBERS].to_dict() == expected
    assert overlap([plain[0], packed[1]])[NUMBERS].to_dict() == expected


def test_neurons_that_runs_share_by_block(
    tmp_path: Path, words: Words, figures: dict[str, Figure]
) -> None:
    runs = []
    for name, removed in {
        "uk": [[0, 1, 2], [5, 6, 7]],
        "en": [[0, 1, 3], [0, 1, 2]],
        "half": [[0, 1, 2], [0, 1, 2]],
    }.items():
        neurons = {"before": 8, "after": 5, "removed": removed}
        more = {"kind": "neurons", "on": name, "neurons": neurons}
        runs.append(write_run(tmp_path / name, "wanda", {}, **more))
    counts = overlap(runs)
    by_pair = counts.set_index(["a", "b", "block"]).sort_index()["both"]
    uk, en, half = (f"{name} (seed 0)" for name in ("uk", "en", "half"))
    assert by_pair[uk, en].tolist() == [4, 2]  # of five each
    assert by_pair[uk, half].tolist() == [5, 2] and by_pair[en, half].tolist() == [4, 5]
    assert counts["chance"].tolist() == [25 / 8] * 6
    heat = figures["overlap"].axes[0].images[0].get_array()
    assert heat.tolist() == [[80, 100, 80], [40, 40, 100]]
    words("report.txt", text(), "overlap of neurons")


def kept_by(run: Path, kind: str) -> torch.Tensor:
    """What a run has kept of everything that is pruned, side by side."""
    if kind in ("experts", "neurons"):
        removed = results(run)[kind]["removed"]
        kept = torch.ones(len(removed), results(run)[kind]["before"], dtype=torch.bool)
        for row, gone in zip(kept, removed, strict=True):
            row[gone] = False
        return kept.flatten()
    held = sorted(weights(run / "model").items())
    parts = [t[..., None] >> torch.arange(8) & 1 for name, t in held if name.endswith(".mask")]
    parts = parts or [t for name, t in held if "_proj." in name]
    return torch.cat([part.flatten() for part in parts]) != 0


KINDS = {
    "packed": "wanda --replace_sparse_layers",
    "unstructured": "wanda",
    "experts": "reap --sparsity_type experts",
    "neurons": "admm --sparsity_type neurons",
}
WHOLE = [pytest.param(kind, marks=[pytest.mark.full] * (kind != "packed")) for kind in KINDS]


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_runs(kind: str, tmp_path: Path) -> None:
    """Prunings by main.py, from their `--save` folders, against sets counted here."""
    name = "Mixtral" if kind == "experts" else "Llama"
    model = tiny.write_model(tmp_path / "model", tiny.ARCHITECTURES[name]())
    texts = {"uk": tiny.sentences(20, 1), "en": [text[::-1] for text in tiny.sentences(20, 2)]}
    runs = []
    for seed in (0, 1) if kind == "unstructured" else (0,):
        for language, train in texts.items():
            data = tiny.write_texts(tmp_path / language, train, 2)
            run = tmp_path / f"{language}{seed}"
            given = ["--calibration_data", data, "--seed", seed, "--save", run, *QUICK]
            given += ["--save_model", run / "model"]
            if kind == "unstructured":  # in the folder, as a sweep leaves them
                given += ["--save_masks", run / "masks.safetensors"]
            succeed("--model", model, "--prune_method", *KINDS[kind].split(), *given)
            runs.append(run)
    counts, kept = overlap(runs[:2], runs[2:]), [kept_by(run, kind) for run in runs]
    between = counts[~counts["seeds"]]
    assert between["weights"].sum() == len(kept[0])
    assert between[["kept_a", "kept_b"]].sum().tolist() == [mask.sum() for mask in kept[:2]]
    assert between["both"].sum() == (kept[0] & kept[1]).sum()
    assert between["chance"].sum() == len(kept[0]) / 4  # half of all stay
    again = sum((one & other).sum() for one, other in zip(kept, kept[2:], strict=False))
    assert counts[counts["seeds"]]["both"].sum() == again
    if kind == "unstructured":
        for run in runs:
            shutil.rmtree(run / "model")
        assert overlap(runs[:2], runs[2:]).equals(counts)
