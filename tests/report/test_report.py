"""The report over runs: what is averaged, what is kept apart, what old files may hold."""

from __future__ import annotations

import csv
import html
import json
import re
import statistics
from pathlib import Path

import pytest
from made_up import LANGUAGES, results, write_run
from support import call, content

from lib.commands.report.__main__ import main, write_report
from lib.commands.report.table import load_runs
from lib.run.results import read_results, write_results
from lib.util.command import one_line
from lib.util.markdown import escape

pytestmark = pytest.mark.usefixtures("elsewhere")


def text_of(*paths: Path) -> str:
    return write_report(load_runs(paths), Path("out"))


def csv_of(*paths: Path) -> list[dict[str, str]]:
    write_report(load_runs(paths), Path("out"))
    return list(csv.DictReader(Path("out/report.csv").open(encoding="utf-8")))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A model calibrated on its test's language loses less. Wanda has three seeds."""
    root = tmp_path / "sweep"
    write_run(root / "dense", "dense", LANGUAGES)
    for on in LANGUAGES:
        for seed in range(3):
            values = {name: (27.0 if name == on else 30.0) + seed for name in LANGUAGES}
            write_run(root / f"wanda-{on}-{seed}", "wanda", values, on=on, seed=seed)
        write_run(root / f"wanda-24-{on}", "wanda", {"uk": 45.0, "en": 50.0}, kind="2:4", on=on)
    write_run(root / "magnitude", "magnitude", {"uk": 60.0, "en": 1234.5})
    values, flags = {"uk": 26.0, "en": 33.0}, {"use_variant": True}
    write_run(root / "variant", "wanda", values, on="uk", flags=flags)
    return root


def rows(text: str) -> list[dict[str, str]]:
    """The lines of the Markdown tables by their columns' titles."""
    found: list[dict[str, str]] = []
    for line in (line for line in text.splitlines() if line.startswith("| ")):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "method":
            head = cells
        elif not cells[0].startswith("---"):
            found.append(dict(zip(head, cells, strict=True)))
    return found


def row(text: str, *start: str) -> dict[str, str]:
    (found,) = [line for line in rows(text) if tuple(line.values())[: len(start)] == start]
    return found


def test_seeds_are_averaged_and_the_rise_is_over_dense(sweep: Path) -> None:
    text = text_of(sweep)
    wanda = row(text, "wanda", "50%", "uk")
    assert wanda["seeds"] == "3" and wanda["uk perplexity"] == "28.00 ± 1.00"
    assert wanda["uk rise"] == "+40.0%" and wanda["en perplexity"] == "31.00 ± 1.00"
    assert wanda["uk bits/byte"] == "0.280 ± 0.010" and wanda["uk s.e."] == "2.00"
    dense = row(text, "dense", "dense", "none")
    assert dense["uk perplexity"] == "20.00" and dense["uk rise"] == "–"
    magnitude = row(text, "magnitude", "50%", "none")
    assert magnitude["uk rise"] == "+200.0%" and magnitude["en perplexity"] == "1,234.50"
    assert row(text, "wanda variant", "50%", "uk")["uk perplexity"] == "26.00"
    assert [line["type"] for line in rows(text)] == ["dense", *["50%"] * 3, *["2:4"] * 2, "50%"]
    assert "not to be compared" not in text and "MB" not in text and "KL" not in text


def test_csv_holds_the_same_figures_unrounded(sweep: Path) -> None:
    lines = csv_of(sweep)
    key = ("method", "type", "calibrated_on", "measured_on")
    (line,) = [x for x in lines if tuple(map(x.get, key)) == ("wanda", "50%", "en", "uk")]
    assert float(line["perplexity"]) == pytest.approx(31.0)
    assert float(line["perplexity_deviation"]) == pytest.approx(statistics.stdev([30, 31, 32]))
    assert float(line["rise"]) == pytest.approx(31 / 20 - 1)
    assert line["digest"] == "uk-d0" and len(line["folders"].split()) == 3
    assert len(lines) == 14  # seven rows, two test sets


def test_the_same_runs_give_the_same_files(sweep: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        write_report(load_runs([sweep]), tmp_path / out)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"report.md", "report.csv", "languages.png", "languages.pdf"}
    assert "![languages](languages.png)" in (tmp_path / "a" / "report.md").read_text("utf-8")


@pytest.mark.parametrize(
    "other",
    [
        {"model": "models/other"},
        {"vocabulary": {"note": "Trimmed.", "rows": 3, "rows_before": 9, "digest": "x"}},
    ],
)
def test_other_models_and_vocabularies_stand_in_tables_of_their_own(
    sweep: Path, tmp_path: Path, other: dict
) -> None:
    foreign = write_run(tmp_path / "foreign", "admm", {"uk": 1.0, "en": 2.0}, on="uk", **other)
    write_report(load_runs([sweep, foreign]), tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text("utf-8")
    assert "2 tables, not to be compared" in text and text.count("### ") == 2
    admm = row(text, "admm", "50%", "uk")
    assert "uk rise" not in admm  # never against the other table's dense run
    first = "uk bits/byte" if "vocabulary" in other else "uk perplexity"
    assert list(admm)[5] == first
    if "model" in other:
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert "languages-1.png" in names


def test_runs_that_differ_in_a_flag_are_not_averaged(tmp_path: Path) -> None:
    for samples in (8, 16):
        made = results("wanda", {"uk": samples}, on="uk", seed=samples)
        flags = {"--nsamples": samples, "--same": 1, "--seed": samples, "weights": samples}
        (tmp_path / str(samples)).mkdir()
        write_results(tmp_path / str(samples), made | {"fingerprint": {"pruning": flags}})
    lines = rows(text_of(tmp_path))
    assert [(x["nsamples"], x["uk perplexity"]) for x in lines] == [("8", "8.00"), ("16", "16.00")]
    assert not {"same", "seed", "weights"} & lines[0].keys()


def test_one_name_for_two_texts_is_told_apart(tmp_path: Path) -> None:
    for place in ("a", "b"):
        calibration = {"name": "uk", "sources": [{"source": f"{place}/uk", "share": 1.0}]}
        more = {"calibration": calibration, "digest": place}
        write_run(tmp_path / place, "wanda", {"uk": 9.0}, **more)
    found = rows(text_of(tmp_path))
    assert [line["calibrated on"] for line in found] == ["uk (a/uk)", "uk (b/uk)"]
    assert [line["uk (uk-b) perplexity"] for line in found] == ["–", "9.00"]


def test_further_figures_have_columns_where_they_were_measured(tmp_path: Path) -> None:
    for seed, kl in enumerate((0.1, 0.3)):
        made = results("admm", {"uk": 25.0, "en": 45.0}, on="uk", seed=seed)
        made["evaluation"][0] |= {"kl": kl, "top1_agreement": 0.75 + kl}
        made |= {"tasks": {"words": {"acc,none": kl, "alias": "words"}}, "saved_bytes": 3e6}
        (tmp_path / str(seed)).mkdir()
        write_results(tmp_path / str(seed), made)
    text = text_of(tmp_path)
    admm = row(text, "admm", "50%", "uk")
    assert admm["uk KL"] == "0.200 ± 0.141" and admm["uk agreement"] == "95.0% ± 14.1%"
    assert admm["words acc,none"] == "0.2000 ± 0.1414"
    assert admm["MB"] == "3.0" and "en KL" not in admm
    (line, _) = csv_of(tmp_path)
    assert float(line["top1_agreement"]) == pytest.approx(0.95)
    assert float(line["words acc,none"]) == pytest.approx(0.2)


def test_files_of_earlier_versions_and_burst_models_are_read(tmp_path: Path) -> None:
    """Keys that are retired are ignored; a perplexity that is not finite is null in the file."""
    old = {"abilities": [{"name": "last word"}], "fidelity": [{}], "depth": [], "products": "x"}
    write_run(tmp_path / "a", "wanda", {"uk": None, "en": 9.0}, on="uk", **old)
    write_run(tmp_path / "b", "pruned before", {"uk": float("inf")}, kind=None, ratio=None)
    text = text_of(tmp_path)
    assert row(text, "wanda", "50%", "uk")["en perplexity"] == "9.00"
    assert "uk perplexity" in text and rows(text)[0]["uk perplexity"] == "inf"
    assert len(csv_of(tmp_path)) == 3


NASTY = "a|b `c` <script>x</script>\n\n# d\t*e* _f_ [g](http://h.i) &amp; \\| $j$ ~~k~~ \x1b[31m l"


@pytest.mark.parametrize(
    "text", [NASTY, "\n|\n", "```\n", "<!-- ", "\\", "a\\", "|", "\r\n\u2028x"]
)
def test_any_text_is_plain_words(text: str) -> None:
    cell = escape(text)
    assert cell and len(cell.splitlines()) == 1
    plain = re.sub(r"\\.", "", cell).replace("&#124;", "")  # what a reader gives a meaning
    assert not re.search(r"[`*_\[\]~#$|<>\\\x1b]|://", plain)
    assert html.unescape(re.sub(r"\\(.)", r"\1", cell)).replace("–", "") == one_line(text)
    assert escape('It\'s (so) 5 % "q_proj"; می‌خواهم') == 'It\'s (so) 5 % "q_proj"; می‌خواهم'


def test_the_command(sweep: Path, capsys: pytest.CaptureFixture) -> None:
    main([str(sweep), str(sweep / "variant")])
    assert capsys.readouterr().out.startswith("### models/tiny")
    written = Path("report/report.md").read_text("utf-8")
    assert written.startswith("### models/tiny") and written.count("\n| wanda variant |") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such folder"),
        ("{", "not valid JSON"),
        ("[]", "it does not hold results"),
        ("{}", "lacks model"),
        ("", "no results.json is there"),
        ("{}", "--out report: it is a file"),
    ],
)
def test_bad_paths_and_files_are_one_line(text: str | None, words: str) -> None:
    if text is not None:
        Path("run").mkdir()
        Path("run", "results.json" if text else "other.json").write_text(text or "{}")
    if "--out" in words:
        Path("report").touch()
    done = call("run", program=main)
    assert done.status == 1 and len(done.complaints) == 1 and words in done.complaints[0]


def test_results_are_json_whatever_was_measured(tmp_path: Path) -> None:
    made = {"model": "m", "method": "wanda", "evaluation": [], "текст": Path("x")}
    made |= {"a": float("nan"), "b": [float("-inf"), 1.5], "c": [[3, 17], []], "d": "[1,  2]"}
    text = write_results(tmp_path, made).read_text("utf-8")
    assert "[3,17]" in text and "NaN" not in text and "текст" in text
    expected = made | {"a": None, "b": [None, 1.5], "текст": "x"}
    assert read_results(tmp_path) == json.loads(text) == expected
