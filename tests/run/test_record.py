"""What a run tells of itself: a log, results.json, a summary, and a card that the hub can read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from lib.report.results import write_results
from lib.run.card import languages_of, model_card
from lib.run.record import packed_line, print_summary, write_log


def results(**changes: object) -> dict:
    calibration = {"name": "uk", "windows": 8, "seqlen": 32, "digest": "abc123"}
    test = {"name": "uk", "perplexity": 12.34567, "tokens": 640, "windows": 20}
    test |= {"standard_error": math.nan, "bits_per_byte": 1.5}
    return {
        "model": "owner/name",
        "method": "wanda",
        "sparsity_type": "unstructured",
        "sparsity_ratio": 0.625,
        "options": {},
        "flags": {"replace_sparse_layers": False},
        "seed": 3,
        "sparsity": {"overall": 0.62499},
        "calibration": calibration,
        "evaluation": [test],
        "perplexity": {"uk": 12.34567},
        "seconds": {"load": 1.0, "eval": 2.0},
        "peak_memory": {"host": 2**30, "device": None},
    } | changes


def test_the_log_in_wandas_form(tmp_path: Path) -> None:
    file = write_log(tmp_path, results(sparsity={"overall": 0.49996}))
    assert file.name == "log_wanda.txt"
    text = "method\tactual_sparsity\tppl_test\nwanda\t0.5000\t12.3457\n"
    assert file.read_text() == text
    write_log(tmp_path, results(sparsity={"overall": 0.5}, perplexity={"uk": 1.0, "en": 2.0}))
    assert file.read_text().splitlines() == [
        "method\tactual_sparsity\tppl_test\tppl_uk\tppl_en",
        "wanda\t0.5000\t1.0000\t1.0000\t2.0000",
    ]


def test_results_are_json_whatever_was_measured(tmp_path: Path) -> None:
    found = {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf}, "текст": Path("x")}
    text = write_results(tmp_path, found).read_text("utf-8")
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": {"d": None}, "текст": "x"}
    assert "NaN" not in text and "текст" in text


def test_the_summary_ends_with_the_perplexity(capsys: pytest.CaptureFixture) -> None:
    print_summary(results())
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "perplexity uk: 12.3457"
    assert "nan" not in out and "host 1.00 GiB" in out


def parsed(card: str) -> tuple[dict, str]:
    """The card's head and its text, as the hub reads them."""
    found = ModelCard(card)
    return found.data.to_dict(), found.text.lstrip()


def test_a_card() -> None:
    head, text = parsed(model_card(results(), ["ubertext", "c4:no"]))
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/name",
        "language": ["uk", "no"],  # not the truth value that YAML makes of it
        "tags": ["pruned", "sparse", "wanda"],
    }
    assert text.startswith("# owner/name, pruned by wanda to 62.5% zeros\n")
    for part in ("| calibrated on | uk, 8 windows of 32 tokens |", "`abc123`", "| seed | 3 |"):
        assert part in text
    assert "| uk | 12.3457 | 640 |" in text and "0.6250" in text


def test_a_card_tells_how_packed_linears_are_loaded() -> None:
    flags = {"replace_sparse_layers": True, "save_model": "small"}
    packed = {"bits": 16, "linears": 14, "left_dense": 0, "bytes": 9, "dense_bytes": 16}
    _, text = parsed(model_card(results(flags=flags, packed=packed | {"difference": 0.0}), []))
    assert "from_pretrained('small')" in text and text.rstrip().endswith("```")
    assert "kept weights as they were, in 0.562 of their dense size" in text
    packed |= {"bits": 8, "bytes": 5, "difference": 0.0123}
    _, text = parsed(model_card(results(flags=flags, packed=packed), []))
    assert "kept weights as 8-bit integers, in 0.312 of their dense size" in text
    assert "0.312 of their dense size; 8 bits change the logits by 1.23%" in packed_line(packed)


def test_a_card_of_a_local_model_without_calibration(tmp_path: Path) -> None:
    made = results(model=str(tmp_path), calibration=None, sparsity_type="2:4", method="magnitude")
    head, text = parsed(model_card(made, []))
    assert "base_model" not in head and "language" not in head
    assert text.startswith(f"# {tmp_path.name}, pruned by magnitude to 2:4\n")
    assert "calibrated" not in text and str(tmp_path.parent) not in text


@pytest.mark.parametrize(
    ("names", "languages"),
    [
        (["ubertext"], ["uk"]),
        (["c4"], ["en"]),
        (["c4:de", "wikipedia:uk", "c4:de"], ["de", "uk"]),
        (["fineweb2:ukr_Cyrl", "c4:zh-Latn"], ["ukr", "zh"]),
        (["my", "io", "texts/en"], []),
        (["out", "data", "set:raw", "lang-pruning-uk-uber-text-2"], []),
    ],
)
def test_languages(names: list[str], languages: list[str]) -> None:
    assert languages_of(names) == languages
