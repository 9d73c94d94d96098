"""Flags do what they say: each run here differs from the run without the flag as is claimed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from support import QUICK, Done, call, results

from lib.model.pretrained import window_length

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def uk() -> Path:
    return tiny.write_texts("uk", 40, 8)


def run(model: Path, *flags: object, save: str = "out", saved: str | None = "new") -> Done:
    target = ["--save_model", saved] if saved else []
    done = call("--model", model, "--save", save, *target, *QUICK, *flags)
    assert done.status == 0, done.err
    return done


def zeros_by_row(folder: str) -> dict[str, torch.Tensor]:
    weights = load_file(f"{folder}/model.safetensors")
    return {n: (w == 0).sum(1) for n, w in weights.items() if "layers" in n and w.dim() == 2}


def test_the_variant_gives_rows_shares_of_their_own_and_is_named(trained: Path, uk: Path) -> None:
    wanda = ["--prune_method", "wanda", "--calibration_data", uk]
    run(trained, *wanda, saved="plain")
    done = run(trained, *wanda, "--use_variant", saved="variant", save="variant-out")
    assert all(rows.unique().numel() == 1 for rows in zeros_by_row("plain").values())
    assert all(rows.unique().numel() > 1 for rows in zeros_by_row("variant").values())
    overall = results("variant-out")["sparsity"]["overall"]
    assert overall == pytest.approx(0.5, abs=0.02) and overall != 0.5
    assert "variant" in done.out and "variant" in Path("variant/README.md").read_text("utf-8")


def test_the_share_of_cross_entropy_changes_what_is_learned(trained: Path, uk: Path) -> None:
    flags = ["--prune_method", "wanda", "--calibration_data", uk, "--recover", "512"]
    run(trained, *flags, saved="default")
    run(trained, *flags, "--recover_ce", "0.2", saved="same")
    run(trained, *flags, "--recover_ce", "0.9", saved="text", save="text-out")
    assert results("text-out")["recovery"]["cross_entropy"] == 0.9
    assert same("default", "same") and not same("default", "text")


def test_bos_is_put_before_windows_where_the_model_needs_it(
    needs_bos: Path, trained: Path, uk: Path
) -> None:
    flags = ["--eval_only", "--eval_data", uk]
    digests, perplexities = {}, {}
    for name, model in (("needs", needs_bos), ("does not", trained)):
        for bos in ("auto", "always", "never"):
            run(model, *flags, "--bos", bos, save=f"{name}-{bos}", saved=None)
            [test] = results(f"{name}-{bos}")["evaluation"]
            digests[name, bos], perplexities[name, bos] = test["digest"], test["perplexity"]
    assert digests["needs", "auto"] == digests["needs", "always"] != digests["needs", "never"]
    assert perplexities["needs", "never"] > 1.5 * perplexities["needs", "auto"]
    assert digests["does not", "auto"] == digests["does not", "never"]


def test_a_run_without_seqlen_takes_the_models_window_up_to_4096(trained: Path, uk: Path) -> None:
    for limit, window in ((131_072, 4096), (4096, 4096), (2048, 2048)):
        config = SimpleNamespace(max_position_embeddings=limit)
        config.get_text_config = lambda config=config, **_: config
        assert window_length(config, None) == window
    done = call("--model", trained, "--device", "cpu", "--eval_only", "--eval_data", uk)
    assert done.status == 0, done.err
    assert results()["evaluation"][0]["seqlen"] == 128  # max_position_embeddings of tiny models


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm", "magnitude"])
def test_another_share_of_zeros_is_reached_and_costs_more(
    method: str, trained: Path, uk: Path
) -> None:
    flags = ["--prune_method", method, "--calibration_data", uk]
    run(trained, *flags, save="half", saved=None)
    run(trained, *flags, "--sparsity_ratio", "0.75", save="more", saved=None)
    half, more = results("half"), results("more")
    assert half["sparsity"]["overall"] == 0.5
    assert more["sparsity"]["overall"] == 0.75
    assert more["perplexity"]["uk"] > 1.1 * half["perplexity"]["uk"]


def test_as_many_windows_are_drawn_as_are_asked_for(trained: Path, uk: Path) -> None:
    flags = ["--prune_method", "wanda", "--calibration_data", uk]
    for count in (3, 8):
        run(trained, *flags, "--nsamples", count, save=f"{count}-out", saved=str(count))
        assert results(f"{count}-out")["calibration"]["windows"] == count
    assert not same("3", "8")


def test_larger_batches_need_more_memory(trained: Path, uk: Path) -> None:
    works = []
    for size in (1, 64):
        done = run(trained, "--eval_only", "--eval_data", uk, "--batch_size", size, saved=None)
        [line] = [line for line in done.out.splitlines() if line.startswith("memory: about")]
        works.append(line.partition("work ")[2])
    assert works[0] != works[1]


def test_the_blend_decides_how_much_of_earlier_errors_is_repaired(trained: Path, uk: Path) -> None:
    flags = ["--prune_method", "admm", "--calibration_data", uk]
    for name, more in (("whole", []), ("one", ["--blend", "1"]), ("none", ["--blend", "0"])):
        run(trained, *flags, *more, saved=name)
    assert same("whole", "one") and not same("whole", "none")


def test_a_higher_rate_moves_weights_further(trained: Path, uk: Path) -> None:
    flags = ["--prune_method", "wanda", "--calibration_data", uk]
    run(trained, *flags, saved="pruned")
    start, moved = load_file("pruned/model.safetensors"), []
    for rate in ("0.0001", "0.001"):
        run(trained, *flags, "--recover", "512", "--recover_rate", rate, saved=rate)
        assert results()["recovery"]["rate"] == float(rate)
        end = load_file(f"{rate}/model.safetensors")
        moved.append(sum((end[name] - start[name]).norm().item() for name in start))
    assert 5 < moved[1] / moved[0] < 15  # AdamW's steps are of about the rate


def test_neurons_left_are_a_multiple(trained: Path, uk: Path) -> None:
    flags = ["--prune_method", "wanda", "--calibration_data", uk, "--sparsity_type", "neurons"]
    for multiple, left in ((8, 40), (16, 32)):  # of 64, near 0.6 of them
        run(trained, *flags, "--sparsity_ratio", "0.4", "--neurons_multiple", multiple)
        assert json.loads(Path("new/config.json").read_text())["intermediate_size"] == left


def same(one: str, other: str) -> bool:
    """Whether two saved models have the same weights, bit for bit."""
    tensors = (load_file(f"{name}/model.safetensors") for name in (one, other))
    return all(map(torch.equal, *(found.values() for found in tensors)))


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out
"""


@pytest.fixture
def remote(trained: Path, tmp_path: Path) -> Path:
    """The trained model with code of its own beside it, which doubles the logits."""
    folder = tmp_path / "odd"
    shutil.copytree(trained, folder)
    (folder / "modeling_odd.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "odd", "architectures": ["OddForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "modeling_odd.OddConfig",
        "AutoModelForCausalLM": "modeling_odd.OddForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_remote_code_runs_only_where_it_is_trusted(remote: Path, trained: Path, uk: Path) -> None:
    flags = ["--eval_only", "--eval_data", uk]
    refused = call("--model", remote, *QUICK, *flags)
    assert refused.status == 1
    [line] = refused.complaints
    assert "--trust_remote_code" in line and str(remote) in line
    run(trained, *flags, save="plain", saved=None)
    run(remote, *flags, "--trust_remote_code", save="trusted", saved=None)
    assert results("trusted")["perplexity"]["uk"] > 1.01 * results("plain")["perplexity"]["uk"]
