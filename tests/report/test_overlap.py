"""Overlap of masks: against counting by hand, streaming, the noise floor, and refusals."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib.packed.checkpoint import PackedConfig
from lib.packed.layout import pack
from lib.report.comparison import compare_masks
from lib.report.names import block_and_linear
from lib.report.overlap import main, write_overlap
from lib.util import command
from lib.util.bits import to_hex
from lib.util.errors import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")

Q, UP = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.up_proj.weight"


def save(folder, tensors, shards=1):
    folder.mkdir(parents=True)
    names = sorted(tensors)
    for shard in range(shards):
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / f"model-{shard + 1:05}-of-{shards:05}.safetensors")
    return folder


def random_model(seed, blocks=3, width=16):
    """Half the weights of every linear are zero, at random; norms and embeddings are dense."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.ones(9, width)}
    for block in range(blocks):
        tensors[f"model.layers.{block}.norm.weight"] = torch.zeros(width)
        for name in (Q, UP):
            keep = torch.rand(24, width, generator=generator) < 0.5
            tensors[name.format(block)] = keep.to(torch.bfloat16)
    return tensors


def test_a_case_by_hand(tmp_path):
    a = torch.tensor([[1.0, 0, 2, 0], [3, 4, 0, 0]])  # keeps 4 of 8
    b = torch.tensor([[5.0, 6, 7, 0], [8, 9, 1, 0]])  # keeps 6 of 8, among them all 4
    runs = [
        save(tmp_path / "a", {Q.format(0): a}),
        save(tmp_path / "b", {Q.format(0): b}),
    ]
    cell = compare_masks(runs).matrices[Q.format(0)]
    assert cell.between.kept == pytest.approx(5 / 8)
    assert cell.between.shared == pytest.approx(4 / 5)
    assert cell.between.chance == pytest.approx((4 * 6 / 8) / 5)
    assert cell.noise is None and cell.excess is None


def test_sums_by_block_and_linear_equal_counting_everything(tmp_path):
    first, second = random_model(1), random_model(2)
    runs = [save(tmp_path / "a", first, shards=3), save(tmp_path / "b", second)]
    found = compare_masks(runs)
    assert list(found.matrices) == [name.format(b) for b in range(3) for name in (UP, Q)]
    by_block = found.blocks
    for block in range(3):
        names = [name.format(block) for name in (Q, UP)]
        a = torch.cat([first[name] for name in names]) != 0
        b = torch.cat([second[name] for name in names]) != 0
        shared = (a & b).sum() / ((a.sum() + b.sum()) / 2)
        assert by_block[block].between.shared == pytest.approx(shared.item())
    assert found.whole.between.shared == pytest.approx(found.whole.between.chance, abs=0.05)
    assert set(found.linears) == {"self_attn.q_proj", "mlp.up_proj"}


@pytest.fixture
def languages(tmp_path):
    """Two languages whose masks differ in block 1 only, and a second seed of each."""
    folders = {}
    base, other = random_model(1), random_model(2)
    special = {name for name in base if ".1." in name}
    for language in ("uk", "en"):
        for seed in (0, 1):
            source = {n: other[n] if language == "en" and n in special else base[n] for n in base}
            tensors = {name: tensor.clone() for name, tensor in source.items()}
            if seed:  # a little noise everywhere: one row of each matrix keeps something else
                for name in tensors:
                    if "proj" in name:
                        tensors[name][0] = 1 - tensors[name][0]
            folders[language, seed] = save(tmp_path / f"{language}{seed}", tensors, shards=2)
    return folders


def test_the_noise_floor_singles_out_the_specific_block(languages):
    runs = [languages["uk", 0], languages["en", 0]]
    found = compare_masks(runs, [languages["uk", 1], languages["en", 1]])
    assert found.most_specific()[0][0] == 1
    blocks = found.blocks
    assert blocks[1].excess > 0.3
    assert blocks[0].between.shared == 1.0 and blocks[0].excess < 0
    assert len(found.pairs) == 3


def test_several_runs_are_compared_pair_by_pair(languages):
    found = compare_masks([languages["uk", 0], languages["en", 0], languages["en", 0]])
    whole = found.whole.between
    assert whole.weights == 3 * 6 * 24 * 16
    assert [round(count.shared, 3) for count in found.pairs.values()][-1] == 1.0


def test_files(languages, tmp_path):
    found = compare_masks([languages["uk", 0], languages["en", 0]], [languages["uk", 1]])
    paths = write_overlap(found, tmp_path / "out")
    assert [path.suffix for path in paths] == [".md", ".json", ".csv", ".png"]
    written = json.loads(paths[1].read_text(encoding="utf-8"))
    assert written["most_specific_blocks"][0] == 1
    assert written["blocks"]["1"]["overlap"] < written["blocks"]["0"]["overlap"] == 1.0
    assert list(written["overall"]) == "weights kept overlap chance noise excess".split()
    rows = list(csv.DictReader(paths[2].open(encoding="utf-8")))
    assert len(rows) == 6 and rows[0]["linear"] == "mlp.up_proj"
    assert paths[3].read_bytes().startswith(b"\x89PNG")


def test_run_folders_lead_to_their_saved_models(languages, tmp_path):
    for language in ("uk", "en"):
        run = tmp_path / f"run-{language}"
        run.mkdir()
        made = {
            "model": "m",
            "method": "wanda",
            "evaluation": [],
            "calibration": {"name": language},
            "flags": {"save_model": str(languages[language, 0])},
        }
        (run / "results.json").write_text(json.dumps(made))
    uk, en = tmp_path / "run-uk", tmp_path / "run-en"
    assert compare_masks([uk, en]).runs == ["uk (seed 0)", "en (seed 0)"]
    with pytest.raises(UserError, match="calibrated on en, but"):
        compare_masks([uk, en], [en])
    (uk / "results.json").write_text(json.dumps(made | {"flags": {}}))
    with pytest.raises(UserError, match="--save_model"):
        compare_masks([uk, en])


def test_places():
    assert block_and_linear("model.layers.3.self_attn.q_proj.weight") == (3, "self_attn.q_proj")
    assert block_and_linear("transformer.h.11.attn.c_attn") == (11, "attn.c_attn")
    assert block_and_linear("model.layers.0.mlp.experts.7.w1.weight") == (0, "mlp.experts.*.w1")
    assert block_and_linear("model.layers.0.mlp.experts.gate_up_proj.5") == (
        0,
        "mlp.experts.gate_up_proj",
    )
    assert block_and_linear("model.layers.0.mlp.fc1.weight") == (0, "mlp.fc1")
    assert block_and_linear("lm_head.weight") is None


def test_fused_experts_count(tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    keep = (torch.arange(4 * 6 * 8).view(4, 6, 8) % 2).float()
    found = compare_masks(
        [save(tmp_path / "a", {name: keep}), save(tmp_path / "b", {name: 1 - keep})]
    )
    assert found.matrices[name].between.shared == 0.0


def test_packed_checkpoints_count_like_dense_ones(tmp_path):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(6, 13, generator=generator) for _ in range(2)]
    dense = [score.masked_fill(score < 0.4, 0) for score in scores]
    plain, packed = [], []
    for index, weight in enumerate(dense):
        plain.append(save(tmp_path / f"plain{index}", {Q.format(0): weight}))
        mask, values, _ = pack(weight, bits=8)
        name = Q.format(0).removesuffix(".weight")
        tensors = {f"{name}.weight": values, f"{name}.mask": mask}
        packed.append(save(tmp_path / f"packed{index}", tensors))
        config = PackedConfig({name: [6, 13, len(values)]}, 8).to_dict()
        text = json.dumps({"quantization_config": config})
        (packed[-1] / "config.json").write_text(text)
    expected = compare_masks(plain).matrices
    assert compare_masks(packed).matrices == expected
    assert compare_masks([plain[0], packed[1]]).matrices == expected


def refused(match, *runs, noise=()):
    with pytest.raises(UserError, match=match):
        compare_masks(runs, noise)


def test_refusals(languages, tmp_path):
    a = languages["uk", 0]
    wide = save(tmp_path / "wide", random_model(3, width=32))
    refused(r"tensor model\.layers\.0\.mlp\.up_proj\.weight is 24 x 32 here but 24 x 16", a, wide)
    deep = save(tmp_path / "deep", random_model(3, blocks=4))
    refused(r"model\.layers\.3\.\S+ is 24 x 16 here but missing", a, deep)
    dense = save(tmp_path / "dense", {k: v + 1 for k, v in random_model(1).items()})
    refused("no matrix has zeros in all", a, dense)
    refused("name two or more", a)
    refused("3 folders for 2 RUNs", a, a, noise=(a, a, a))
    refused("no such folder", a, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("holds no", a, tmp_path / "empty")
    broken = save(tmp_path / "broken", random_model(1))
    (shard,) = broken.iterdir()
    shard.write_bytes(shard.read_bytes()[:-100])
    refused("can't be read", a, broken)


def test_the_command(languages, capsys):
    uk, en = str(languages["uk", 0]), str(languages["en", 0])
    main([uk, en, "--noise", str(languages["uk", 1])])
    said = capsys.readouterr().out
    assert said.startswith("### Weights that the masks of uk0 and en0 share\n")
    assert "| uk0 and uk1 (seeds)" in said and "| self_attn.q_proj" in said
    assert said.strip() in Path("overlap/overlap.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="--out .*uk0/model.*: is a file"):
        main([uk, en, "--out", str(next(languages["uk", 0].iterdir()))])


def test_a_mistake_is_one_line(languages, capsys):
    assert command.run(main, [str(languages["uk", 0])]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "name two or more" in err


def run_of_neurons(folder: Path, name: str, removed: list[set[int]], seed: int = 0) -> Path:
    neurons = {"before": 8, "after": 5, "removed": [to_hex(one, 8) for one in removed]}
    found = {"model": "m", "method": "wanda", "sparsity_type": "neurons", "seed": seed, "flags": {}}
    found |= {"calibration": {"name": name}, "neurons": neurons, "evaluation": []}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(found), "utf-8")
    return folder


def test_neurons_that_two_runs_share_by_block(tmp_path: Path) -> None:
    """Counted by hand; no saved model is needed."""
    first = run_of_neurons(tmp_path / "a", "uk", [{0, 1, 2}, {5, 6, 7}])
    second = run_of_neurons(tmp_path / "b", "en", [{0, 1, 3}, {0, 1, 2}])
    again = run_of_neurons(tmp_path / "c", "uk", [{0, 1, 2}, {5, 6, 4}], seed=1)
    found = compare_masks([first, second], [again])
    assert found.title == "Neurons that the masks of uk (seed 0) and en (seed 0) share"
    blocks = found.blocks
    assert blocks[0].between.shared == pytest.approx(4 / 5)  # 4, 5, 6, 7 of five each
    assert blocks[1].between.shared == pytest.approx(2 / 5)
    assert blocks[0].noise == 1 and blocks[1].noise == pytest.approx(4 / 5)
    assert blocks[0].between.chance == pytest.approx(5 / 8)
    assert found.whole.between.weights == 16


def test_neurons_of_three_runs_pair_by_pair(tmp_path: Path) -> None:
    """In words, in the table by block and in the JSON; nothing speaks of weights."""
    removed = {"uk": [{0, 1, 2}, {5, 6, 7}], "en": [{0, 1, 3}, {0, 1, 2}], "half": [{0, 1, 2}] * 2}
    runs = [run_of_neurons(tmp_path / name, name, each) for name, each in removed.items()]
    main([*map(str, runs), "--out", str(tmp_path / "overlap")])
    text = (tmp_path / "overlap" / "overlap.md").read_text("utf-8")
    assert "- kept: share of the neurons; both keep: share of the kept neurons" in text
    assert "weights" not in text and "| linear" not in text
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n")]
    assert ["0", "80.0%", "100.0%", "80.0%", "62.5%"] in lines
    assert ["1", "40.0%", "40.0%", "100.0%", "62.5%"] in lines
    found = json.loads((tmp_path / "overlap" / "overlap.json").read_text("utf-8"))["pairs"]
    assert found["uk (seed 0) and half (seed 0)"] == {
        "overlap": pytest.approx(0.7),
        "chance": pytest.approx(0.625),
        "blocks": {"0": 1.0, "1": pytest.approx(0.4)},
    }
    assert (tmp_path / "overlap" / "overlap.png").read_bytes().startswith(b"\x89PNG")
