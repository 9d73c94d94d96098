"""What a run tells of itself: a log and a summary."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lib.methods.registry import MethodSpec
from lib.run.record import print_summary, write_log


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
