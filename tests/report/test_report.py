"""The report over runs: what is averaged, paired and kept apart, by made-up runs."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
from approval import Words
from made_up import LANGUAGES, cells, results, write_run
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from support import content, mistake, program_of, succeed

from lib.run.results import read_losses, read_results, write_results
from lib.util.statistics import mean_interval

pytestmark = pytest.mark.usefixtures("elsewhere", "figures")
DOCUMENTS = numpy.repeat(range(6), 3)
Rows = list[dict[str, str]]


def report(*argv: object) -> str:
    """What the command prints; its files lie in `report`."""
    return succeed(*argv, program=program_of("report")).out


def text() -> str:
    return Path("report/report.md").read_text("utf-8")


def lines(name: str = "report.csv", **named: str) -> Rows:
    """Lines of a file that the command has written."""
    with Path("report", name).open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    return [each for each in found if named.items() <= each.items()]


def of_loss(**named: str) -> dict[str, str]:
    (line,) = lines("differences.csv", **named)
    return line


# --- tables


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


def test_seeds_are_averaged_and_the_rise_is_over_dense(sweep: Path, words: Words) -> None:
    """A run that is named twice counts once. Unrounded figures stand in the file of lines."""
    words("report.txt", report(sweep, sweep / "variant"), "seeds, printed")
    words("report.txt", text(), "seeds")
    (line,) = lines(method="wanda", type="50%", calibrated_on="en", measured_on="uk")
    assert float(line["perplexity"]) == pytest.approx(31.0)
    assert float(line["perplexity_deviation"]) == pytest.approx(statistics.stdev([30, 31, 32]))
    assert float(line["rise"]) == pytest.approx(31 / 20 - 1)
    assert line["digest"] == "uk-d0" and len(line["folders"].split()) == 3
    assert len(lines()) == 14  # seven rows, two test sets


def test_runs_of_a_sweep_that_are_not_finished_are_named(sweep: Path) -> None:
    """In all files; of a part of the sweep, those in it. Runs without a sweep miss nothing."""

    def reported(folder: Path) -> list[str]:
        printed = report(folder, "--latex", "table.tex", "--csv", "runs.csv")
        return [printed, text(), Path("table.tex").read_text("utf-8")]

    files = ["report/report.csv", "runs.csv"]
    assert not any("not finished" in each for each in reported(sweep))
    before = [Path(file).read_text("utf-8").splitlines() for file in files]
    names = [path.parent.relative_to(sweep) for path in sweep.rglob("results.json")]
    gone, begun, other = (sweep.parent / name for name in ("sweep/gone", "sweep/begun", "other/x"))
    begun.mkdir()
    for root, planned in ((sweep, [*names, "gone", "begun"]), (sweep.parent, ["other/x"])):
        (root / "runs.txt").write_text("".join(f"{name}\n" for name in planned), "utf-8")
    for each in reported(sweep):
        said = f"2 of {len(names) + 2} runs are not finished: {gone}, {begun}."
        assert said in each.replace("\\", "") and str(other) not in each
    for file, lines_before in zip(files, before, strict=True):
        *rest, first, second = Path(file).read_text("utf-8").splitlines()
        assert rest == lines_before
        assert (first.strip(","), second.strip(",")) == (str(gone), str(begun))
    assert "not finished" not in report(sweep / "dense")


def test_the_seeds_of_a_row_are_named(sweep: Path) -> None:
    shutil.rmtree(sweep / "wanda-uk-1")
    report(sweep, "--latex", "table.tex")
    wanda = {each["calibrated_on"]: each["seed"] for each in lines(method="wanda", type="50%")}
    assert wanda == {"uk": "0, 2", "en": "0, 1, 2"}
    assert " & 0, 2 & " in Path("table.tex").read_text("utf-8") and " 0, 2 | " in text()


@pytest.mark.full
def test_the_same_runs_give_the_same_files(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # pictures are drawn
    monkeypatch.chdir(sweep.parent)
    for out in ("a", "b"):
        report(sweep, "--out", out)
    assert content("a") == content("b")
    assert set(content("a")) == {"report.md", "report.csv", "languages.png", "languages.pdf"}


@pytest.mark.parametrize("other", ["model", "vocabulary"])
def test_other_models_and_vocabularies_stand_in_tables_of_their_own(
    other: str, sweep: Path, tmp_path: Path, words: Words, figures: dict[str, Figure]
) -> None:
    trimmed = {"note": "Trimmed.", "rows": 3, "rows_before": 9, "digest": "x"}
    more = {"model": "models/other"} if other == "model" else {"vocabulary": trimmed}
    foreign = write_run(tmp_path / "foreign", "admm", {"uk": 1.0, "en": 2.0}, on="uk", **more)
    printed = report(sweep, foreign)
    ours, _, theirs = text().partition("\n### ")[2].partition("\n### ")
    assert "admm" not in ours and "wanda" not in theirs
    assert "rise" not in theirs.splitlines()[-3]  # never against the other table's dense run
    assert set(figures) == {"languages-1"}
    words("report.txt", printed, f"another {other}, printed")


def test_rows_and_columns_are_told_apart(tmp_path: Path, words: Words) -> None:
    """By a flag, and by the place of texts that have one name."""
    for samples in (8, 16):
        made = results("wanda", {"uk": samples}, on="uk", seed=samples)
        flags = {"--nsamples": samples, "--same": 1, "--seed": samples, "weights": samples}
        (tmp_path / str(samples)).mkdir()
        write_results(tmp_path / str(samples), made | {"fingerprint": {"pruning": flags}})
    report(tmp_path)
    words("report.txt", text(), "another flag")
    for place in ("a", "b"):
        calibration = {"name": "uk", "sources": [{"source": f"{place}/uk", "share": 1.0}]}
        more = {"calibration": calibration, "digest": place}
        write_run(tmp_path / place, "wanda", {"uk": 9.0}, **more)
    report(tmp_path / "a", tmp_path / "b")
    words("report.txt", text(), "one name for two texts")


def test_further_figures_have_columns_where_they_were_measured(
    tmp_path: Path, words: Words
) -> None:
    for seed, kl in enumerate((0.1, 0.3)):
        made = results("admm", {"uk": 25.0, "en": 45.0}, on="uk", seed=seed)
        made["evaluation"][0] |= {"kl": kl, "top1_agreement": 0.75 + kl}
        made["evaluation"][0]["kl_of_tokens"] = {"99%": 10 * kl}
        made |= {"tasks": {"words": {"acc,none": kl, "alias": "words"}}, "saved_bytes": 3e6}
        (tmp_path / str(seed)).mkdir()
        write_results(tmp_path / str(seed), made)
    report(tmp_path)
    words("report.txt", text(), "further figures")
    assert float(lines()[0]["top1_agreement"]) == pytest.approx(0.95)
    assert float(lines()[0]["words acc,none"]) == pytest.approx(0.2)
    assert float(lines()[0]["kl_99"]) == pytest.approx(2.0)


def test_files_of_earlier_versions_and_burst_models_are_read(tmp_path: Path, words: Words) -> None:
    """Keys that are retired are ignored; a perplexity that is not finite is null in the file."""
    old = {"abilities": [{"name": "last word"}], "fidelity": [{}], "depth": [], "products": "x"}
    write_run(tmp_path / "a", "wanda", {"uk": None, "en": 9.0}, on="uk", **old)
    write_run(tmp_path / "b", "pruned before", {"uk": float("inf")}, kind=None, ratio=None)
    report(tmp_path)
    words("report.txt", text(), "earlier versions")
    assert len(lines()) == 3


def test_results_are_json_whatever_was_measured(tmp_path: Path) -> None:
    made = {"model": "m", "method": "wanda", "evaluation": [], "текст": Path("x")}
    made |= {"a": float("nan"), "b": [float("-inf"), 1.5], "c": [[3, 17], []], "d": "[1,  2]"}
    written = write_results(tmp_path, made).read_text("utf-8")
    assert "[3,17]" in written and "NaN" not in written and "текст" in written
    expected = made | {"a": None, "b": [None, 1.5], "текст": "x"}
    assert read_results(tmp_path) == json.loads(written) == expected


# --- differences


def losses(by_test: Sequence[Sequence[float]], **more: Sequence[float]) -> dict[str, object]:
    named = {f"{number}.loss": list(values) for number, values in enumerate(by_test)}
    return named | {f"{number}.document": DOCUMENTS for number in range(len(by_test))} | more


@pytest.fixture
def paired(tmp_path: Path) -> Path:
    """On uk the texts are alike but for noise; on en the English one is better by 0.1 nats."""
    rng, root = numpy.random.default_rng(0), tmp_path / "paired"
    windows = rng.normal(3, 0.5, (2, 18))  # what is hard is hard for each model
    names = {"uk": 20.0, "en": 20.0}
    write_run(root / "dense", "dense", names, losses=losses(windows))
    for on in names:
        for seed in range(3):
            loss = windows + 0.2 + rng.normal(0, 0.02, windows.shape)
            loss[1] -= 0.1 * (on == "en")
            own = dict(zip(names, map(float, numpy.exp(loss.mean(1))), strict=True))
            kl = {"0.kl": [*loss[0, :9] - windows[0, :9], *[math.nan] * 9]}  # half were compared
            more = dict(on=on, seed=seed, losses=losses(loss, **kl))
            file = write_run(root / f"{on}-{seed}", "wanda", own, **more) / "results.json"
            compared = file.read_text().replace('"digest"', '"compared_windows": 9, "digest"')
            file.write_text(compared)
    return root


@pytest.mark.parametrize("width", [80, 60])
def test_tables_in_a_terminal(
    width: int, paired: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    words.terminal(report(paired, "--against", "dense"), "report", (width,))


def test_calibration_texts_are_paired_by_window_and_seed(paired: Path, words: Words) -> None:
    tables = ["--latex", "report/table.tex", "--csv", "report/all.csv"]
    Path("report").mkdir()
    printed = report(paired, *tables, "--against", "dense")
    for name, said in {"printed": printed, "report": text()}.items():
        words("report.txt", said, f"differences, {name}")
    words("report.txt", Path("report/table.tex").read_text("utf-8"), "differences, LaTeX")
    assert len(lines("differences.csv")) == 7  # two tests by text, one KL, four against dense
    uk = of_loss(calibrated_on="en", minus="uk", measured_on="uk", figure="loss")
    en = of_loss(calibrated_on="en", minus="uk", measured_on="en", figure="loss")
    assert (uk["significant"], en["significant"]) == ("False", "True")
    kept = {folder: read_losses(folder, read_results(folder)) for folder in paired.iterdir()}
    slow = mean_interval(
        numpy.stack(
            [
                kept[paired / f"en-{seed}"]["en-d0"]["loss"].astype(float)
                - kept[paired / f"uk-{seed}"]["en-d0"]["loss"]
                for seed in range(3)
            ]
        ),
        DOCUMENTS,
    )
    found = [float(en[name]) for name in ("difference", "low", "high")]
    assert found == pytest.approx([slow.mean, slow.low, slow.high])
    assert slow.mean == pytest.approx(-0.1, abs=0.02)
    assert (float(en["seeds"]), float(en["documents"])) == (3, 6) and float(
        en["p"]
    ) > slow.p  # Holm's rule
    over = of_loss(calibrated_on="uk", minus="dense", measured_on="en")
    assert float(over["difference"]) == pytest.approx(0.2, abs=0.02) and float(over["seeds"]) == 3
    assert float(of_loss(figure="kl")["documents"]) == 3
    assert {each["seed"] for each in lines("all.csv")} == {"0", "1", "2"}
    assert len(lines("all.csv")) == 7 and lines("all.csv")[1]["evaluation.uk.tokens"] == "576"


def test_other_windows_are_never_paired(paired: Path, tmp_path: Path, words: Words) -> None:
    own = losses([[3.0] * 18])
    other = write_run(tmp_path / "other", "admm", {"uk": 9.0}, on="uk", digest="d1", losses=own)
    old = write_run(tmp_path / "old", "admm", {"uk": 9.0}, on="uk")
    one = sorted(paired.glob("uk-*"))
    words("report.txt", report(paired, "--against", other), "other windows")
    words("report.txt", report(paired, "--against", old), "no losses")
    report(paired / "dense", *one, "--against", "dense")  # no pair of texts
    over = lines("differences.csv", calibrated_on="uk", minus="dense", figure="loss")
    assert [each["measured_on"] for each in over] == ["uk", "en"]
    for wrong in ([paired / "uk-0", "--against", "dense"], [old, "--against", paired]):
        error = mistake(*wrong, program=program_of("report"))
        assert str(error).startswith(f"--against {wrong[-1]}: ")


def test_methods_are_compared_without_being_told(paired: Path, tmp_path: Path) -> None:
    """On the same text; magnitude, which reads none, with each."""
    rng, names = numpy.random.default_rng(1), {"uk": 20.0}
    loss = losses([rng.normal(3, 0.5, 18)])
    for method, on in (("ria", "uk"), ("ria", "en"), ("magnitude", None)):
        write_run(tmp_path / f"more/{method}-{on}", method, names, on=on, losses=loss)
    report(*paired.glob("*-0"), tmp_path / "more")
    found = {
        (each["method"], each["calibrated_on"], each["minus"])
        for each in lines("differences.csv", figure="loss", measured_on="uk")
    }
    by_text = {(method, "en", "uk") for method in ("ria", "wanda")}
    by_method = {("ria", on, "wanda") for on in ("uk", "en")}
    reads_none = {("magnitude", "none", f"{m} 50% {on}") for m in ("ria", "wanda") for on in names}
    reads_none |= {("magnitude", "none", f"{m} 50% en") for m in ("ria", "wanda")}
    assert found == by_text | by_method | reads_none


def test_the_rise_is_over_the_dense_model_of_the_same_settings(tmp_path: Path) -> None:
    for dtype, dense, own in (("float32", 20.0, 30.0), ("bfloat16", 25.0, 50.0)):
        of_run = {"fingerprint": {"pruning": {"--dtype": dtype}}}
        write_run(tmp_path / f"dense-{dtype}", "dense", {"uk": dense}, **of_run)
        more = {"fingerprint": {"pruning": {"--dtype": dtype, "--nsamples": 8}}}
        write_run(tmp_path / f"wanda-{dtype}", "wanda", {"uk": own}, on="uk", **more)
    report(tmp_path)
    rises = {each["dtype"]: each["rise"] for each in lines(method="wanda")}
    assert {name: float(rise) for name, rise in rises.items()} == {"float32": 0.5, "bfloat16": 1.0}


def test_windows_count_by_their_tokens(tmp_path: Path) -> None:
    """The rest of a cut dialogue, of four tokens, beside windows of 130."""
    counts = numpy.array([130] * 17 + [4])
    for name, shift in (("one", 0.1), ("two", 0.0)):
        loss = numpy.linspace(1, 2, 18) + shift * (DOCUMENTS + 1)
        loss[-1] += 9 * shift
        own = losses([loss]) | {"0.tokens": counts}
        write_run(tmp_path / name, "wanda", {"uk": 9.0}, on="uk", losses=own, ratio=0.4 + shift)
    report(tmp_path, "--against", tmp_path / "two")
    difference = 0.1 * (DOCUMENTS + 1) + 0.9 * (counts == 4)
    expected = (difference * counts).sum() / counts.sum()
    assert float(of_loss(measured_on="uk")["difference"]) == pytest.approx(expected, rel=1e-5)


def test_means_over_windows_of_dialogues_are_refused(tmp_path: Path) -> None:
    """As 0.3 wrote them; its figures on texts are read."""
    file = write_run(tmp_path / "old", "wanda", {"chat": 9.0}, on="uk") / "results.json"
    report(tmp_path)
    file.write_text(file.read_text().replace('"digest"', '"dialogues": 12, "digest"'))
    assert str(mistake(tmp_path, program=program_of("report"))).startswith(f"RUN {file.parent}: ")
    measuring = '"fingerprint": {"measuring": {"revision of figures": 2}}, "method"'
    file.write_text(file.read_text().replace('"method"', measuring))
    report(tmp_path)


def test_a_file_of_losses_that_is_damaged(paired: Path) -> None:
    file = paired / "dense/losses.npz"
    file.write_text("x")
    assert str(file) in str(mistake(paired, program=program_of("report")))


# --- pictures


def drawn(figure: Figure, title: str) -> object:
    (axes,) = [axes for axes in figure.axes if axes.get_title().startswith(title)]
    return axes


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """Wanda at 50% with two seeds, at 60% and 2:4 once; magnitude has burst on one text."""
    runs = [results("dense", LANGUAGES)]
    for seed, more in enumerate((0.0, 2.0)):
        errors = {
            f"model.layers.{block}.mlp.{layer}": (block + 1) / 10
            for block in range(2)
            for layer in ("up_proj", "experts.0.down_proj", "experts.1.down_proj")
        }
        own = {"errors": errors} if seed == 0 else {}
        runs.append(results("wanda", {"uk": 24 + more, "en": 60 + more}, on="uk", seed=seed, **own))
        own = {"errors": {name: 2 * each for name, each in errors.items()}} if seed == 0 else {}
        runs.append(results("wanda", {"uk": 30 + more, "en": 50 + more}, on="en", seed=seed, **own))
    runs.append(results("wanda", {"uk": 28.0, "en": 65.0}, on="uk", ratio=0.6))
    runs.append(results("wanda", {"uk": 33.0, "en": 70.0}, on="uk", kind="2:4"))
    runs.append(results("magnitude", {"uk": None, "en": 99.0}))
    for number, run in enumerate(runs):
        (tmp_path / f"{number}").mkdir()
        write_results(tmp_path / f"{number}", run)
    return tmp_path


def test_what_each_calibration_text_loses_on_each_test(pruned: Path, figures: dict) -> None:
    report(pruned)
    axes = drawn(figures["languages"], "wanda 50%")
    expected = [["+0.05", "+0.21"], ["+0.11", "+0.11"], ["", "+0.59"]]
    assert cells(axes) == expected  # uk, en, and magnitude by uk, en
    assert [label.get_text() for label in axes.get_yticklabels()] == ["uk", "en", "no text"]
    assert cells(drawn(figures["languages"], "wanda 2:4")) == [["+0.13", "+0.30"]]
    # of layers by depth: a panel for each kind and a line for each row; experts are averaged
    panels = figures["errors"].axes
    assert [axes.get_title() for axes in panels] == ["mlp.up_proj", "mlp.experts.*.down_proj"]
    for axes in panels:
        shown = {line.get_label(): [*line.get_ydata()] for line in axes.lines}
        assert shown == {"wanda 50% uk": [0.1, 0.2], "wanda 50% en": [0.2, 0.4]}
    figures.clear()
    report(pruned / "3", pruned / "4")  # no dense run
    report(pruned / "0", pruned / "3")  # a single text
    assert not figures


def test_models_that_are_only_rounded_share_a_panel(tmp_path: Path, figures: dict) -> None:
    """Each has as many zeros as rounding happened to make."""
    write_run(tmp_path / "dense", "dense", LANGUAGES)
    for language, zeros in (("uk", 0.121), ("en", 0.118)):
        none = dict(kind=None, ratio=None, sparsity={"overall": zeros})
        write_run(tmp_path / language, "q4_0", {"uk": 25.0, "en": 41.0}, on=language, **none)
    report(tmp_path)
    assert cells(drawn(figures["languages"], "q4_0 whole")) == [["+0.050", "+0.010"]] * 2


def test_curves_over_a_flag_that_has_several_numbers(tmp_path: Path, figures: dict) -> None:
    rows = {}
    for count, value in ((8, 30.0), (128, 20.0), (32, 25.0)):
        for on in ("uk", "en"):
            flags = {"--nsamples": count, "--dtype": "float32"}
            more = {"fingerprint": {"pruning": flags}, "ratio": 0.5}
            rows[count] = kept = math.log(value) + 0.01 * (DOCUMENTS - 2.5)
            name = tmp_path / f"{on}{count}"
            write_run(name, "wanda", {"test": value}, on=on, losses=losses([kept]), **more)
    report(tmp_path)
    (axes,) = figures["nsamples"].axes
    shown = {each.get_label(): each for each in axes.containers}
    assert shown.keys() == {"en", "uk"} and isinstance(shown["uk"], ErrorbarContainer)
    points = shown["uk"].lines[0].get_xydata().tolist()
    assert points == [[8, 30], [32, 25], [128, 20]] and axes.get_xscale() == "log"
    for bar, count in zip(shown["uk"].lines[2][0].get_segments(), sorted(rows), strict=True):
        found = mean_interval(rows[count][None], DOCUMENTS)
        assert list(numpy.log(bar[:, 1])) == pytest.approx([found.low, found.high])
    assert "![nsamples](nsamples.png)" in text()
    figures.clear()
    report(tmp_path / "uk8", tmp_path / "en8")
    assert "nsamples" not in figures
