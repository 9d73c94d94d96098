"""What a run tells of itself: a log, results.json, a summary, and a card that the hub can read."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from lib.methods.registry import MethodSpec
from lib.report.markdown import escape
from lib.report.results import write_results
from lib.run.card import languages_of, model_card, shows_prompts
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
        "sparsity": {"overall": 0.61},
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


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("wanda", {"variant": False}, "wanda"),
        ("wanda", {"variant": True}, "wanda (variant)"),
        ("admm", MethodSpec("admm").settings, "admm"),
        ("admm", MethodSpec("admm", {"blend": 0.5}).settings, "admm (blend 0.5)"),
        ("pruned before", {}, "pruned before"),
    ],
)
def test_only_options_that_were_changed_are_named(
    method: str, options: dict, words: str, capsys: pytest.CaptureFixture
) -> None:
    made = results(method=method, options=options)
    print_summary(made)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"{words}: 0.6100 of the blocks' weights are zero"
    text = model_card(made, [])
    options = re.findall(r"\| (\w+) option \| (\w.*) \|", text)
    known = {"wanda (variant)": [("variant", "yes")], "admm (blend 0.5)": [("blend", "0.5")]}
    assert options == known.get(words, [])


def test_names_of_test_sets_do_not_steer_the_terminal(capsys: pytest.CaptureFixture) -> None:
    test = results()["evaluation"][0] | {"name": "uk\x1b[2J\u202e"}
    print_summary(results(evaluation=[test], perplexity={test["name"]: 2.0}))
    out = capsys.readouterr().out
    assert "uk[2J: 20 windows" in out and out.endswith("perplexity uk[2J: 2.0000\n")


def test_agreement_with_the_dense_model_is_shown_where_it_was_measured(
    capsys: pytest.CaptureFixture,
) -> None:
    figures = {"kl": 0.12345, "kl_standard_error": 0.00456}
    figures |= {"top1_agreement": 0.87654, "top1_agreement_standard_error": math.nan}
    figures |= {"compared_windows": 20}
    made = results(evaluation=[results()["evaluation"][0] | figures])
    print_summary(made)
    out = capsys.readouterr().out
    assert "uk: KL 0.1235 ± 0.0046 nats a token from the dense model, the same most likely" in out
    assert "token at 87.65% of the positions of 20 windows\n" in out
    _, text = parsed(model_card(made, []))
    assert "| uk | 12.3457 | 0.1235 ± 0.0046 | 87.65% | 640 |" in text
    _, without = parsed(model_card(results(), []))
    assert "KL" not in without and "| test text | perplexity | tokens |" in without


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
    assert "| uk | 12.3457 | 640 |" in text and "0.6100" in text


def test_a_card_tells_how_packed_linears_are_loaded() -> None:
    flags = {"replace_sparse_layers": True, "save_model": "small"}
    packed = {"bits": 16, "linears": 14, "left_dense": 0, "bytes": 9, "dense_bytes": 16}
    _, text = parsed(model_card(results(flags=flags, packed=packed | {"difference": 0.0}), []))
    assert text.index("from_pretrained('small')") < text.index("## Engines")
    assert "launch.sh unpack small small-dense" in text and "vllm serve small-dense" in text
    assert "import packed_bitmask" in text
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


def recovery(**changes: object) -> dict:
    return {
        "text": {"name": "uk"},
        "tokens": 512,
        "teacher": "owner/dense",
        "cross_entropy": 0.2,
        "seconds": 3.0,
        "dense": {"uk": 10.0},
        "before": {"uk": 20.0},
        "curve": [{"tokens": 0, "perplexity": 21.0}, {"tokens": 512, "perplexity": 13.0}],
    } | changes


def test_a_card_shows_the_dense_the_pruned_and_the_recovered_model_in_this_order() -> None:
    _, text = parsed(model_card(results(recovery=recovery()), []))
    assert text.startswith("# owner/name, pruned by wanda to 62.5% zeros and recovered\n")
    assert "| uk | 10.0000 | 20.0000 | 12.3457 |" in text and "| 512 | 13.0000 |" in text


def test_a_card_holds_names_and_no_paths(tmp_path: Path) -> None:
    for name in ("dense", "small", "pruned"):
        (tmp_path / name).mkdir()
    private = f"{tmp_path}/"
    vocabulary = {"note": "Trimmed.", "rows": 3, "rows_before": 9, "sources": [f"{private}uk"]}
    for packed in (True, False):
        flags = {"replace_sparse_layers": packed, "save_model": f"{private}small"}
        made = results(model=f"{private}pruned", flags=flags, vocabulary=vocabulary)
        made |= {"recovery": recovery(teacher=f"{private}dense"), "bits_per_byte": {"uk": 1.5}}
        text = model_card(made, [f"{private}uk"])
        assert private not in text and tmp_path.name not in text
        for part in ("# pruned, ", "| teacher | dense |", "('small')", "the texts of uk use"):
            assert part in text, part


def test_a_card_says_how_a_plain_checkpoint_is_loaded() -> None:
    flags = {"replace_sparse_layers": False, "save_model": "out/small"}
    _, text = parsed(model_card(results(flags=flags), []))
    assert "from_pretrained('small')" in text and "lib" not in text.split("```")[1]


def test_names_in_a_card_are_plain_words() -> None:
    nasty = "u|k <img src=x> [a](b)\u200b"
    calibration = results()["calibration"] | {"name": nasty}
    test = results()["evaluation"][0] | {"name": nasty}
    made = results(calibration=calibration, evaluation=[test], perplexity={nasty: 12.34567})
    text = model_card(made | {"recovery": recovery(dense={nasty: 1.0}, before={nasty: 2.0})}, [])
    assert text.count(escape(nasty)) == 3
    assert "<img" not in text and "[a]" not in text and "\u200b" not in text


def test_the_card_alone_can_be_had_without_prompts() -> None:
    completions = [{"test": "uk", "prompt": "Private words", "dense": " a", "model": " b"}]
    made = results(completions=completions)
    assert "| uk | Private words | a | b |" in model_card(made, [])
    assert shows_prompts(made)
    made["flags"] = made["flags"] | {"card_without_prompts": True}
    text = model_card(made, [])
    assert "Private" not in text and "Beginnings" not in text and not shows_prompts(made)


def test_a_card_shows_abilities_and_fidelity_where_they_were_measured() -> None:
    shares = {"accuracy": 0.6, "said": 0.1}
    ability = {"text": "uk", "name": "last word", "questions": 300, "chance": 0.25, "model": shares}
    fidelity = {"text": "uk", "model": {"language": 0.5}, "reference": {"language": 0.9}}
    _, text = parsed(model_card(results(abilities=[ability], fidelity=[fidelity]), []))
    assert "| uk | 300 last word | 25% | 60.0% | 10.0% |" in text
    assert "| uk | the text itself | 90.0% |" in text and "| uk | this model | 50.0% |" in text


def test_a_card_says_what_was_pruned_otherwise() -> None:
    note = "pruned by magnitude, too few tokens were routed to them: model.layers.0.experts.3"
    _, text = parsed(model_card(results(notes=[note]), []))
    assert f"- {note}" in text.splitlines()


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
