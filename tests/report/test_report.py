"""The report over runs: what is averaged, kept apart, drawn and refused."""

import csv
import json
import statistics
from pathlib import Path

import pytest
from support import content

from lib.report.__main__ import main
from lib.report.plots import style
from lib.report.plots.cost import saving
from lib.report.results import load_runs
from lib.report.tables import comparable_tables
from lib.report.write import report_csv, report_text, write_report
from lib.util import command
from lib.util.errors import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")

DENSE = {"uk": 20.0, "en": 40.0}
LINEARS = [f"model.layers.{b}.{k}" for b in (0, 1) for k in ("self_attn.q_proj", "mlp.up_proj")]


def evaluation(perplexity, digest="d0"):
    return [
        {
            "name": name,
            "source": name,
            "revision": None,
            "windows": 9,
            "seqlen": 64,
            "tokens": 576,
            "bytes": 2000,
            "digest": f"{name}-{digest}",
            "perplexity": value,
            "standard_error": value / 10,
            "bits_per_byte": value / 100,
        }
        for name, value in perplexity.items()
    ]


def write_run(folder, method, perplexity, *, kind="unstructured", ratio=0.5, on=None, **more):
    dense = method == "dense"
    digest = more.pop("digest", "d0")
    sources = [{"source": on, "share": 1.0}]
    made = {
        "model": "models/tiny",
        "method": method,
        "sparsity_type": None if dense else kind,
        "sparsity_ratio": None if dense else ratio,
        "flags": {"use_variant": False},
        "settings": {"nsamples": 8},
        "seed": 0,
        "calibration": {"name": on, "sources": sources} if on else None,
        "evaluation": evaluation(perplexity, digest),
        "sparsity": {"overall": 0.0 if dense else ratio, "linears": dict.fromkeys(LINEARS, ratio)},
        "perplexity": perplexity,
    } | more
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(made), encoding="utf-8")
    return folder


@pytest.fixture
def sweep(tmp_path):
    """Calibrated on the language: always 10% lower. Wanda twice over seeds, N:M and a variant."""
    root = tmp_path / "sweep"
    write_run(root / "dense", "dense", DENSE)
    for seed, wobble in enumerate((0.0, 1.0, 2.0)):
        for on in DENSE:
            values = {name: (27.0 if name == on else 30.0) + wobble for name in DENSE}
            write_run(root / f"wanda-{on}-{seed}", "wanda", values, on=on, seed=seed)
    for on in DENSE:
        values = {name: 45.0 if name == on else 50.0 for name in DENSE}
        write_run(root / f"two-of-four-{on}", "wanda", values, kind="2:4", on=on)
    write_run(root / "magnitude", "magnitude", {"uk": 60.0, "en": 80.0})
    sparsity = {"overall": 0.5, "linears": dict(zip(LINEARS, (0.4, 0.5, 0.5, 0.6), strict=True))}
    values = {"uk": 26.0, "en": 33.0}
    flags = {"use_variant": True}
    write_run(root / "variant", "wanda", values, on="uk", flags=flags, sparsity=sparsity)
    return root


def cells(text, *start):
    """The cells of the one Markdown line whose first cells are `start`."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.split("\n")]
    (found,) = [line for line in lines if line[: len(start)] == list(start)]
    return found


def test_seeds_are_averaged_and_the_rise_is_over_dense(sweep):
    text = report_text(load_runs([sweep]))
    row = cells(text, "wanda", "50%", "uk")
    assert row[4] == "3"  # seeds
    assert row[5:9] == ["28.00 ± 1.00", "2.80", "+40%", "0.280 ± 0.010"]
    assert row[9:11] == ["31.00 ± 1.00", "3.10"]
    assert cells(text, "dense", "–", "none")[5] == "20.00"
    assert cells(text, "magnitude", "50%", "none")[7] == "+200%"
    assert cells(text, "wanda variant", "50%", "uk")[5] == "26.00"
    assert "not to be compared" not in text


def test_bytes_of_saved_models_are_a_column_where_there_are_any(sweep):
    assert "saved" not in report_text(load_runs([sweep]))
    for seed, size in ((0, 1_000_000), (1, 2_000_000)):
        more = {"kind": "neurons", "on": "uk", "seed": seed, "saved_bytes": size}
        write_run(sweep / f"small{seed}", "wanda", {"uk": 22.0, "en": 23.0}, **more)
    text = report_text(load_runs([sweep]))
    assert cells(text, "wanda", "50% neurons", "uk")[5] == "1.5 MB"
    assert cells(text, "wanda", "50%", "uk")[5] == "–"
    assert "- saved: bytes of the saved model's files, in millions." in text


def test_csv_holds_the_same_figures_unrounded(sweep, tmp_path):
    paths = write_report(load_runs([sweep]), tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "report.csv").open(encoding="utf-8")))
    (row,) = [
        r
        for r in rows
        if (r["method"], r["type"], r["calibrated_on"], r["measured_on"])
        == ("wanda", "50%", "en", "uk")
    ]
    assert float(row["perplexity"]) == pytest.approx(31.0)
    assert float(row["perplexity_deviation"]) == pytest.approx(statistics.stdev([30, 31, 32]))
    assert float(row["rise"]) == pytest.approx(31 / 20 - 1)
    assert row["digest"] == "uk-d0"
    assert len(row["folders"].split()) == 3
    drawn = {path.name for path in paths if path.suffix == ".png"}
    assert drawn == {"perplexity.png", "pruning_cost.png", "languages.png", "sparsity.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths if path.suffix == ".png")
    assert "pruning_cost.png" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_the_same_runs_give_the_same_bytes(sweep, tmp_path):
    for out in ("a", "b"):
        write_report(load_runs([sweep]), tmp_path / out)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def savings(table, target, test):
    """Of the wanda rows of one target."""
    rows = [row for row in table.pruned if (row.method, row.target) == ("wanda", target)]
    return saving(table, test, {row: row.mean(test) for row in rows})


def test_what_the_own_language_saves(sweep):
    (found,) = comparable_tables(load_runs([sweep]))
    for language in DENSE:
        assert savings(found, "2:4", language) == pytest.approx(1 - 45 / 50)
        assert savings(found, "50%", language) == pytest.approx(1 - 28 / 31)  # means over seeds
    write_run(sweep / "half", "wanda", {"uk": 1.0, "en": 1.0}, kind="2:4", on="uk+en")
    (found,) = comparable_tables(load_runs([sweep]))
    assert savings(found, "2:4", "uk") == pytest.approx(1 - 45 / 50)  # a mixture is no other test
    assert savings(found, "2:4", "de") is None
    more = {"kind": "2:4", "settings": {"nsamples": 16}}
    write_run(sweep / "more", "wanda", {"uk": 1.0, "en": 1.0}, on="en", **more)
    (found,) = comparable_tables(load_runs([sweep]))
    assert savings(found, "2:4", "uk") is None  # they differ in more than the calibration


def test_the_order_of_targets_and_of_calibration_sets(sweep):
    write_run(sweep / "loose", "wanda", DENSE, ratio=0.1, on="de")
    write_run(sweep / "four-of-eight", "wanda", DENSE, kind="4:8", on="ar")
    write_run(sweep / "strict", "wanda", DENSE, ratio=0.6, on="uk")
    (found,) = comparable_tables(load_runs([sweep]))
    assert found.targets == ["10%", "50%", "4:8", "2:4", "60%"]
    assert set(found.calibrations[:2]) == {"uk", "en"}
    assert found.calibrations[2:] == ["ar", "de", "none"]
    assert found.short_model == "tiny"


@pytest.mark.parametrize("other", [{"digest": "d1"}, {"model": "models/other"}])
def test_what_cant_be_compared_stands_in_tables_of_its_own(sweep, tmp_path, other):
    values = {"uk": 1.0, "en": 2.0}
    foreign = write_run(tmp_path / "foreign", "wanda", values, on="uk", **other)
    runs = load_runs([sweep, foreign])
    text = report_text(runs)
    assert "2 tables, not to be compared" in text
    first, second = comparable_tables(runs)
    assert second.rows[0].runs[0].folder == foreign
    assert second.rise(second.rows[0], "uk") is None  # never against the other table's dense run


def test_every_table_has_pictures_of_its_own(tmp_path):
    for model in ("a/tiny", "b/tiny"):
        write_run(tmp_path / model, "wanda", {"uk": 9.0}, on="uk", model=model)
    names = {path.name for path in write_report(load_runs([tmp_path]), tmp_path / "out")}
    assert {"perplexity-1.png", "perplexity-2.png"} <= names


def test_runs_that_differ_in_a_flag_are_not_averaged(tmp_path):
    for samples in (8, 16):
        folder = tmp_path / str(samples)
        write_run(folder, "wanda", {"uk": samples}, on="uk", settings={"nsamples": samples})
    text = report_text(load_runs([tmp_path]))
    assert "nsamples" in text
    assert cells(text, "wanda", "50%", "uk", "50.00%", "1", "16")[6] == "16.00"


def test_one_name_for_two_texts_is_told_apart(tmp_path):
    for place in ("a", "b"):
        calibration = {"name": "uk", "sources": [{"source": f"{place}/uk", "share": 1.0}]}
        write_run(tmp_path / place, "wanda", {"uk": 9.0}, on="uk", calibration=calibration)
    text = report_text(load_runs([tmp_path]))
    assert "uk (a/uk)" in text and "uk (b/uk)" in text


def test_without_matplotlib_only_the_pictures_are_missing(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(style, "find_spec", lambda name: None)
    paths = write_report(load_runs([sweep]), tmp_path / "out")
    assert {path.suffix for path in paths} == {".md", ".csv"}
    assert "![" not in (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "no pictures: matplotlib" in capsys.readouterr().err


def test_agreement_with_the_dense_model_has_columns_where_it_was_measured(sweep, tmp_path):
    assert "KL" not in report_text(load_runs([sweep])) and "kl" not in report_csv(
        load_runs([sweep])
    )
    for seed, kl in enumerate((0.1, 0.3)):
        tests = evaluation({"uk": 25.0, "en": 45.0})
        tests[0] |= {"kl": kl, "kl_standard_error": 0.01, "top1_agreement": 0.75 + kl}
        write_run(tmp_path / str(seed), "admm", {}, on="uk", seed=seed, evaluation=tests)
    runs = load_runs([sweep, tmp_path / "0", tmp_path / "1"])
    text = report_text(runs)
    head, row = cells(text, "method"), cells(text, "admm", "50%", "uk")
    figures = dict(zip(head, row, strict=True))
    assert figures["uk KL"] == "0.200 ± 0.141" and figures["uk agreement"] == "95.0 ± 14.1%"
    assert "en KL" not in figures and "- KL: " in text and "- agreement: " in text
    rows = list(csv.DictReader(report_csv(runs).splitlines()))
    (line,) = [r for r in rows if (r["method"], r["measured_on"]) == ("admm", "uk")]
    assert float(line["kl"]) == pytest.approx(0.2)
    assert float(line["kl_standard_error"]) == pytest.approx(0.01)
    assert float(line["top1_agreement"]) == pytest.approx(0.95)


def test_tasks_become_columns(tmp_path):
    write_run(tmp_path / "a", "wanda", {"uk": 9.0}, on="uk", tasks={"belebele": {"acc": 0.25}})
    text = report_text(load_runs([tmp_path]))
    assert "belebele acc" in text and "0.2500" in text


def test_a_failed_run_is_listed_with_its_reason(sweep):
    failed = sweep / "failed"
    failed.mkdir()
    (failed / "error.json").write_text(json.dumps({"error": "out of\nmemory"}))
    assert "failed: out of memory" in report_text(load_runs([sweep]))


def test_infinite_perplexity_is_shown_and_not_drawn(sweep, tmp_path):
    write_run(sweep / "burst", "wanda", {"uk": float("inf"), "en": 99.0}, ratio=0.9, on="uk")
    runs = load_runs([sweep])
    assert cells(report_text(runs), "wanda", "90%", "uk")[5] == "inf"
    assert len(write_report(runs, tmp_path / "out")) == 6


def test_runs_of_one_set_without_dense_still_make_a_report(tmp_path):
    write_run(tmp_path / "a", "sparsegpt", {"ubertext": 9.0}, on="c4")
    paths = write_report(load_runs([tmp_path / "a"]), tmp_path / "out")
    assert {path.name for path in paths if path.suffix == ".png"} == {
        "perplexity.png",
        "pruning_cost.png",
    }


def test_the_command(sweep, capsys):
    main([str(sweep)])
    assert "| wanda" in capsys.readouterr().out
    assert Path("report/report.md").read_text(encoding="utf-8").startswith("### models/tiny")


def test_a_mistake_is_one_line(capsys):
    assert command.run(main, ["nowhere"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no such folder" in err


def test_bad_input_is_one_line(tmp_path):
    for text, said in (("{", "not valid JSON"), ("[]", "not a run's results"), ("{}", "lacks")):
        folder = tmp_path / said.replace(" ", "_")
        folder.mkdir()
        (folder / "results.json").write_text(text)
        with pytest.raises(UserError, match=said):
            load_runs([folder])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no results.json"):
        load_runs([tmp_path / "empty"])
    with pytest.raises(UserError, match="no such folder"):
        load_runs([tmp_path / "nowhere"])
    with pytest.raises(SystemExit):
        main([])


def test_an_output_that_is_a_file_is_refused(sweep, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        main([str(sweep), "--out", str(tmp_path / "file")])
