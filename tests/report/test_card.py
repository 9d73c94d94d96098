"""The model card, as the hub reads it: names and figures, no paths, no texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from made_up import results

from lib.commands.gguf.verify import changed_linears
from lib.run.card import converted_card, model_card
from lib.util.markdown import escape

pytestmark = pytest.mark.usefixtures("elsewhere")


def made(**changes: Any) -> dict[str, Any]:
    flags = {"model": "owner/name", "prune_method": "wanda", "save_model": "out/small", "seed": 3}
    found = results("wanda", {"uk": 12.34567}, on="uk", model="owner/name", seed=3)
    return found | {"flags": flags, "sparsity": {"overall": 0.4996}} | changes


def parsed(results: dict[str, Any], *sources: str) -> tuple[dict[str, Any], str]:
    found = ModelCard(model_card(results, sources))
    return found.data.to_dict(), found.text.lstrip()


def gguf_card(folder: Path, kind: str) -> str:
    about = dict(what=f"GGUF ({kind})", tag="gguf", kind=kind, changed="the head")
    return converted_card(str(folder), how="llama-cli -m Small.gguf", **about)


def test_a_card() -> None:
    head, text = parsed(made(), "ubertext", "c4:no", "fineweb2:deu_Latn")
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/name",
        "base_model_relation": "finetune",
        "datasets": [
            "mshamrai/lang-pruning-uk-uber-text-2",
            "allenai/c4",
            "HuggingFaceFW/fineweb-2",
        ],
        "language": ["uk", "no", "de"],  # not the truth value that YAML makes of it
        "tags": ["langprune", "pruned", "wanda"],
        "model-index": head["model-index"],
    }
    ((result,),) = (index["results"] for index in head["model-index"])
    assert result["dataset"]["name"] == "uk"
    assert [each["value"] for each in result["metrics"]] == [12.3457, 0.1235]
    assert text.startswith("# owner/name, pruned by wanda to 50%\n")
    assert "python main.py --model owner/name --prune_method wanda" in text and "--seed 3" in text
    assert "- Share of zeros in the blocks' weights: 0.4996.\n" in text
    assert text.endswith("model = AutoModelForCausalLM.from_pretrained('small')\n```\n")


def test_the_command_has_flags_of_value_zero() -> None:
    """Without them it would train or prune by their defaults."""
    flags = {
        "recover": 9,
        "recover_ce_weight": 0.0,
        "sparsity_ratio": 0.0,
        "seed": 0,
        "batch_size": 2,
    }
    flags |= {"use_variant": False, "recover_rank": None}
    _, text = parsed(made(flags=made()["flags"] | flags))
    assert (
        "--recover 9 --recover_ce_weight 0.0 --sparsity_ratio 0.0 --batch_size 2\n"
        in text.replace(" --save_model small --seed 3", "").replace(" --save_model small", "")
    )


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]


def test_figures_stand_beside_the_dense_models_where_those_are_known() -> None:
    (test,) = made()["evaluation"]
    test |= {"kl": 0.12345, "kl_standard_error": 0.01, "top1_agreement": 0.87654}
    test |= {"loss_change": 0.2, "loss_change_standard_error": float("nan")}
    test["dense"] = {"perplexity": 10.0}
    recovery = {"before": {"uk": {"perplexity": 20.0}}, "text": {"name": "uk"}}
    found = made(evaluation=[test], recovery=recovery, saved_bytes=5e6, dense_bytes=9e6)
    _, text = parsed(found)
    assert text.startswith("# owner/name, pruned by wanda to 50%, recovered\n")
    assert cells(text) == [
        ["uk, bits per byte", "", "", "0.1235"],
        ["uk, perplexity", "10.0000", "20.0000", "12.3457 ± 2.0000"],
        ["uk, KL from dense, nats per token", "", "", "0.1235 ± 0.0100"],
        ["uk, top-1 agreement", "", "", "87.65%"],
        ["uk, loss over dense, nats per token", "", "", "+0.2000"],
        ["MB", "9.0", "", "5.0"],
    ]
    del found["recovery"]
    test["dense"] = {"perplexity": 9.0, "bits_per_byte": 0.1}
    assert [line[1] for line in cells(parsed(found)[1])[:2]] == ["0.1000", "9.0000"]
    test |= {"dense": {"perplexity": 9.0}, "compared_perplexity": 13.0, "compared_windows": 2}
    assert ["uk, perplexity on 2 windows", "9.0000", "13.0000"] in cells(parsed(found)[1])


def test_a_packed_folder_tells_how_it_is_loaded_and_unpacked() -> None:
    found = made(packed={"bits": 4})
    found["flags"] = found["flags"] | {"replace_sparse_layers": True, "quantize": "int4"}
    head, text = parsed(found)
    assert "library_name" not in head and head["base_model_relation"] == "quantized"
    assert "kept weights as 4-bit integers" in text
    assert "import packed_bitmask" in text and "from_pretrained('small')" in text
    assert "langprune unpack small small-dense" in text and "--quantize int4" in text


def test_what_was_trained_as_q4_0_is_not_called_pruned(tmp_path: Path) -> None:
    recovery = {"teacher": "owner/name", "before": {}}
    found = made(sparsity_type=None, recovery=recovery, quantized={"format": "q4_0"})
    head, text = parsed(found)
    assert head["tags"] == ["langprune", "q4_0"]
    assert text.startswith(
        "# owner/name, trained on the texts, its linear layers as llama.cpp's q4_0\n"
    )
    nothing = recovery | {"kept": {"tokens": 0, "loss": 1.0}}
    left = {"format": "q4_0", "left": ["model.layers.0.mlp.down_proj.weight"]}
    _, text = parsed(found | {"recovery": nothing, "quantized": left})
    assert text.startswith("# owner/name, its linear layers except 1 as llama.cpp's q4_0\n")
    assert "- Training did not help" in text
    assert "at 16 bits (rows are not a multiple of 32): model.layers.0.mlp.down" in text
    (tmp_path / "README.md").write_text(model_card(found, ["c4:de"]))
    for kind in ("q4_0", "q8_0"):
        text = gguf_card(tmp_path, kind)
        assert ("changed the head" in text) == (kind == "q4_0")


def test_what_conversion_has_changed_is_counted() -> None:
    """Of a folder that was trained on elsewhere it is most values."""
    assert (
        changed_linears({"Q4_0": [0, 99], "Q8_0": [9, 9]}, "Q4_0") == "only its embedding and head"
    )
    changed = "3,200 of 3,300 values of its linear layers, and its embedding and head"
    assert changed_linears({"Q4_0": [3200, 3300]}, "Q4_0") == changed


def test_a_gguf_file_has_the_card_of_the_model_it_was_made_from(tmp_path: Path) -> None:
    base = "---\nlicense: gemma\nbase_model: google/gemma\n---\n# Base\n\nTheir words.\n"
    for folder, card in (("small", model_card(made(), ["c4:de"])), ("base", base), ("bare", None)):
        (tmp_path / folder).mkdir()
        if card:
            (tmp_path / folder / "README.md").write_text(card)
        found = ModelCard(gguf_card(tmp_path / folder, "q8_0"))
        head, text = found.data.to_dict(), found.text
        assert (
            head["tags"][-1] == "gguf" and "library_name" not in head and "model-index" not in head
        )
        assert "llama-cli -m Small.gguf" in text and "from_pretrained" not in text
        assert "Their words" not in text and "as GGUF (q8_0)" in text
        assert ("| uk, perplexity" in text) == (folder == "small")
        assert head.get("base_model_relation") == (None if folder == "bare" else "quantized")
        assert head.get("license") == ("gemma" if folder == "base" else None)
        assert head.get("language") == (["de"] if folder == "small" else None)


def test_what_was_removed_is_said() -> None:
    neurons = {"before": 64, "after": 48, "weights_before": 8, "weights_after": 7}
    vocabulary = {"rows": 3000, "rows_before": 9000, "note": "Fewer tokens."}
    found = made(sparsity_type="neurons", neurons=neurons, vocabulary=vocabulary, notes=["a|b"])
    head, text = parsed(found)
    assert head["tags"] == ["langprune", "pruned", "wanda", "trimmed"]
    assert "wanda to 50% fewer neurons, its vocabulary trimmed" in text
    assert "48 of its 64 neurons" in text and "that is left: 0.8750" in text
    assert "3,000 of 9,000 rows of the vocabulary" in text and "- a&#124;b\n" in text


def test_a_local_model_hands_on_licence_and_base(tmp_path: Path) -> None:
    card = "---\nlicense: gemma\nbase_model: google/gemma\n---\n# Base\n"
    (tmp_path / "README.md").write_text(card)
    head, text = parsed(made(model=str(tmp_path)))
    assert head["license"] == "gemma" and head["base_model"] == "google/gemma"
    assert text.startswith(f"# {escape(tmp_path.name)}, pruned")
    (tmp_path / "README.md").write_text("---\n[\n---\n")
    head, _ = parsed(made(model=str(tmp_path)))
    assert "license" not in head and "base_model" not in head


def test_a_card_holds_names_and_no_paths_and_no_texts(tmp_path: Path) -> None:
    for name in ("uk", "pruned", "dense"):
        (tmp_path / name).mkdir()
    private = f"{tmp_path}/"
    flags = {"model": f"{private}pruned", "teacher": f"{private}dense", "resume": f"{private}r"}
    flags |= {"calibration_data": [f"{private}uk=0.5", "c4=0.5"], "save_model": f"{private}small"}
    found = made(model=f"{private}pruned", flags=flags)
    found["completions"] = [{"test": "uk", "prompt": "Private words", "model": "here"}]
    text = model_card(found, [f"{private}uk", f"{private}gone"])
    assert private not in text and tmp_path.name not in text and "Private" not in text
    for part in ("# pruned, ", "--teacher dense", "uk=0.5 c4=0.5", "('small')", "of uk, gone"):
        assert part in text, part


def test_names_in_a_card_are_plain_words() -> None:
    nasty = "u|k <img src=x> [a](b)\u200b\n```"
    (test,) = made()["evaluation"]
    found = made(evaluation=[test | {"name": nasty}], notes=[nasty])
    found["flags"] = found["flags"] | {"eval_data": [nasty]}
    text = model_card(found, [nasty])
    before, _, after = text.partition("```bash\n")
    command, _, after = after.partition("\n```\n")
    assert "\n" not in command and after.count("```") == 2
    assert "<img" not in before + after and "[a]" not in before + after and "\u200b" not in text
