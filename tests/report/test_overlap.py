"""Overlap of masks: against counting by hand, streaming, the noise floor, and refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import tiny
import torch
from made_up import write_run
from safetensors.torch import save_file
from support import QUICK, call, results, succeed, weights

from lib.commands.overlap import block_and_linear, compare_masks, draw, main, shares
from lib.packed.checkpoint import PackedConfig
from lib.packed.formats import PACKED
from lib.util.errors import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")

Q, UP = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.up_proj.weight"


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


def test_a_case_by_hand(tmp_path: Path) -> None:
    a = torch.tensor([[1.0, 0, 2, 0], [3, 4, 0, 0]])  # keeps 4 of 8
    b = torch.tensor([[5.0, 6, 7, 0], [8, 9, 1, 0]])  # keeps 6 of 8, among them all 4
    counts = compare_masks([save(tmp_path / n, {Q.format(0): x}) for n, x in (("a", a), ("b", b))])
    (line,) = counts.to_dict("records")
    assert line == {
        "seeds": False, "a": "a", "b": "b", "block": 0, "linear": "self_attn.q_proj",
        "weights": 8, "kept_a": 4, "kept_b": 6, "both": 4, "chance": 4 * 6 / 8,
    }  # fmt: skip
    found = shares(counts, "block").loc[0]
    assert found.to_dict() == pytest.approx({"kept": 5 / 8, "both keep": 4 / 5, "chance": 3 / 5})


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


def test_the_noise_floor_singles_out_the_specific_block(languages: dict) -> None:
    counts = compare_masks(
        [languages["uk", 0], languages["en", 0]], [languages["uk", 1], languages["en", 1]]
    )
    found = shares(counts, "block")
    assert found["excess"].idxmax() == 1 and found.loc[1, "excess"] > 0.3
    assert found.loc[0, "both keep"] == 1.0 and found.loc[0, "excess"] < 0
    heat = 100 * shares(counts, "block", "linear")["excess"].unstack(sort=False)
    assert draw(counts).axes[0].images[0].get_array().data == pytest.approx(heat.to_numpy())


def test_run_folders_lead_to_their_saved_models(languages: dict, tmp_path: Path) -> None:
    runs = []
    for on in ("uk", "en"):
        flags = {"save_model": str(languages[on, 0])}
        runs.append(write_run(tmp_path / f"run-{on}", "wanda", {}, on=on, flags=flags))
    languages["en", 0].rename(runs[1] / "en0")  # as where a run that holds its model was moved
    counts = compare_masks(runs)
    assert {*counts["a"], *counts["b"]} == {"uk (seed 0)", "en (seed 0)"}
    refused("calibrated on en, but", *runs, noise=(runs[1],))
    refused("its seed is that of", *runs, noise=(runs[0],))
    refused("--save_model", write_run(tmp_path / "none", "wanda", {}, on="uk"), runs[1])


def test_places() -> None:
    assert block_and_linear("transformer.h.11.attn.c_attn") == (11, "attn.c_attn")
    assert block_and_linear("model.layers.0.mlp.experts.7.w1.weight") == (0, "mlp.experts.*.w1")
    assert block_and_linear("model.layers.0.experts.gate_up_proj.5") == (0, "experts.gate_up_proj")
    assert block_and_linear("lm_head.weight") is None


def test_fused_experts_count_and_single_ones_are_added_up(tmp_path: Path) -> None:
    keep = (torch.arange(4 * 6 * 8).view(4, 6, 8) % 2).float()
    first = {"model.layers.0.mlp.experts.gate_up_proj": keep}
    first |= {f"model.layers.0.mlp.experts.{i}.w1.weight": keep[i].clone() for i in range(4)}
    second = {name: 1 - tensor for name, tensor in first.items()}
    counts = compare_masks([save(tmp_path / "a", first), save(tmp_path / "b", second)])
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
    numbers = ["weights", "kept_a", "kept_b", "both"]
    expected = compare_masks(plain)[numbers].to_dict()
    assert compare_masks(packed)[numbers].to_dict() == expected
    assert compare_masks([plain[0], packed[1]])[numbers].to_dict() == expected


def refused(match: str, *runs: Path, noise: tuple = ()) -> None:
    with pytest.raises(UserError, match=match):
        compare_masks(runs, noise)


def test_refusals(languages: dict, tmp_path: Path) -> None:
    a = languages["uk", 0]
    wide = save(tmp_path / "wide", random_model(3, width=32))
    refused(r"up_proj\.weight is \(24, 32\) here but \(24, 16\)", a, wide)
    deep = save(tmp_path / "deep", random_model(3, blocks=4))
    refused(r"model\.layers\.3\.\S+ is \(24, 16\) here but missing", a, deep)
    dense = save(tmp_path / "dense", {k: v + 1 for k, v in random_model(1).items()})
    refused("no matrix has zeros in all", a, dense)
    refused("3 folders for 2 RUNs", a, a, noise=(a, a, a))
    refused("no such folder", a, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(r"no \*.safetensors are there", a, tmp_path / "empty")
    (shard,) = dense.iterdir()
    shard.write_bytes(shard.read_bytes()[:-100])
    refused("it cannot be read", a, dense)


def test_the_command(languages: dict, capsys: pytest.CaptureFixture) -> None:
    uk, en = str(languages["uk", 0]), str(languages["en", 0])
    main([uk, en, "--noise", str(languages["uk", 1])])
    said = capsys.readouterr().out
    assert said.startswith("### Weights that the masks of uk0 and en0 share\n")
    assert "| uk0 and uk1 (seeds)" in said and "| self_attn.q_proj" in said
    assert said.strip() in Path("overlap/overlap.md").read_text("utf-8")
    assert len(list(csv.DictReader(Path("overlap/overlap.csv").open()))) == 2 * 6
    assert Path("overlap/overlap.png").stat().st_size > 10_000
    done = call(uk, program=main)
    assert done.status == 1 and len(done.complaints) == 1 and "Name two or more" in done.err


def test_neurons_that_runs_share_by_block(tmp_path: Path) -> None:
    runs = []
    for name, removed in {
        "uk": [[0, 1, 2], [5, 6, 7]],
        "en": [[0, 1, 3], [0, 1, 2]],
        "half": [[0, 1, 2], [0, 1, 2]],
    }.items():
        neurons = {"before": 8, "after": 5, "removed": removed}
        more = {"kind": "neurons", "on": name, "neurons": neurons}
        runs.append(write_run(tmp_path / name, "wanda", {}, **more))
    counts = compare_masks(runs)
    by_pair = counts.set_index(["a", "b", "block"]).sort_index()["both"]
    uk, en, half = (f"{name} (seed 0)" for name in ("uk", "en", "half"))
    assert by_pair[uk, en].tolist() == [4, 2]  # of five each
    assert by_pair[uk, half].tolist() == [5, 2] and by_pair[en, half].tolist() == [4, 5]
    assert counts["chance"].tolist() == [25 / 8] * 6
    main([*map(str, runs), "--out", str(tmp_path / "overlap")])
    text = (tmp_path / "overlap" / "overlap.md").read_text("utf-8")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n")]
    assert ["uk (seed 0) and half (seed 0)", "62.5%", "70.0%", "62.5%"] in lines
    figure = draw(counts)
    assert figure.axes[0].images[0].get_array().tolist() == [[80, 100, 80], [40, 40, 100]]
    assert figure.get_suptitle().startswith("Neurons that the masks of")


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


@pytest.mark.parametrize("kind", ["unstructured", "packed", "experts", "neurons"])
def test_whole_runs(kind: str, tmp_path: Path) -> None:
    """Prunings by main.py, from their `--save` folders, against sets counted here."""
    argv = dict(unstructured=["wanda"], packed=["wanda", "--replace_sparse_layers"])
    argv |= dict(experts=["reap"], neurons=["admm"])
    small = kind in ("experts", "neurons")
    name = "Mixtral" if kind == "experts" else "Llama"
    flags = ["--model", tiny.write_model(tmp_path / "model", tiny.ARCHITECTURES[name]())]
    flags += ["--prune_method", *argv[kind], "--sparsity_type", kind if small else "unstructured"]
    texts = {"uk": tiny.sentences(20, 1), "en": [text[::-1] for text in tiny.sentences(20, 2)]}
    runs = []
    for seed in (0, 1) if kind == "unstructured" else (0,):
        for language, train in texts.items():
            data = tiny.write_texts(tmp_path / language, train, 2)
            run = tmp_path / f"{language}{seed}"
            given = ["--calibration_data", data, "--seed", seed, "--save", run, *QUICK]
            succeed(*flags, *given, "--save_model", run / "model")
            runs.append(run)
    counts = compare_masks(runs[:2], runs[2:])
    kept = [kept_by(run, kind) for run in runs]
    between = counts[~counts["seeds"]]
    assert between["weights"].sum() == len(kept[0])
    assert between[["kept_a", "kept_b"]].sum().tolist() == [mask.sum() for mask in kept[:2]]
    assert between["both"].sum() == (kept[0] & kept[1]).sum()
    assert between["chance"].sum() == len(kept[0]) / 4  # half of all stay
    again = sum((one & other).sum() for one, other in zip(kept, kept[2:], strict=False))
    assert counts[counts["seeds"]]["both"].sum() == again
    done = call(*runs[:2], "--out", "shown", program=main)
    assert done.status == 0 and "| uk (seed 0) and en (seed 0)" in done.out
    assert f"### {kind.capitalize() if small else 'Weights'} that" in done.out


@pytest.mark.usefixtures("elsewhere")
def test_files_of_masks_are_compared_as_the_models_are() -> None:
    tiny.write_model("model")
    tiny.write_texts("uk")
    run = ["--model", "model", "--calibration_data", "uk", *QUICK, "--prune_method"]
    for method in ("wanda", "magnitude"):
        kept = ["--save_model", method, "--save_masks", f"{method}.safetensors"]
        succeed(*run, method, *kept, "--save", f"{method}-run")
    of_models = compare_masks(["wanda", "magnitude"])
    of_files = compare_masks(["wanda.safetensors", "magnitude.safetensors"])
    figures = ["block", "linear", "weights", "kept_a", "kept_b", "both"]
    assert of_files[figures].equals(of_models[figures])
    with pytest.raises(UserError) as refused:
        compare_masks(["wanda.safetensors", "uk/train.jsonl"])
    assert refused.value.what == "uk/train.jsonl"
