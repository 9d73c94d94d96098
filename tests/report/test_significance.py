"""Whether a difference could be chance: the statistics, and what the report makes of them."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
from made_up import write_run
from matplotlib.container import ErrorbarContainer
from scipy import stats
from support import call

from lib.commands.report.__main__ import main, write_report
from lib.commands.report.pictures import curves
from lib.commands.report.statistics import differences, holm, mean_interval
from lib.commands.report.table import load_runs, tables
from lib.commands.report.table import row_keys as keys
from lib.commands.report.writing import _tex as tex
from lib.run.results import read_losses

pytestmark = pytest.mark.usefixtures("elsewhere")
DOCUMENTS = numpy.repeat(range(6), 3)


def test_documents_of_one_length_are_the_sample() -> None:
    """The published t test over their means, whatever the windows in them."""
    values = numpy.random.default_rng(0).normal(0.1, 0.3, 18)
    found = mean_interval(values[None], DOCUMENTS[::-1])
    slow = stats.ttest_1samp(values.reshape(6, 3).mean(1), 0)
    assert found.p == pytest.approx(slow.pvalue) and found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(slow.confidence_interval()))
    assert (found.documents, found.seeds) == (6, 1)


def test_variances_of_documents_and_seeds_are_added() -> None:
    """A slow reference: loops over documents of several lengths, and Welch's degrees of freedom."""
    values = numpy.random.default_rng(1).normal(0.2, 0.3, (3, 9))
    documents = [0, 0, 0, 0, 1, 1, 2, 3, 3]
    averaged, mean = values.mean(0), values.mean()
    lengths = [documents.count(each) for each in range(4)]
    effective = 81 / sum(length**2 for length in lengths)
    squares = 0.0
    for document in range(4):
        squares += (
            sum(a - mean for a, d in zip(averaged, documents, strict=True) if d == document) ** 2
        )
    over_documents = effective / (effective - 1) * squares / 81
    over_seeds = stats.sem(values.mean(1)) ** 2
    total = over_documents + over_seeds
    freedom = total**2 / (over_documents**2 / (effective - 1) + over_seeds**2 / 2)
    found = mean_interval(values, numpy.array(documents))
    expected = stats.t.interval(0.95, freedom, mean, math.sqrt(total))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(mean) / math.sqrt(total), freedom))


def test_what_cannot_be_told() -> None:
    one_document = mean_interval(numpy.ones((3, 4)), numpy.zeros(4))
    assert one_document.mean == 1 and math.isnan(one_document.p) and math.isnan(one_document.low)
    one_window = mean_interval(numpy.ones((1, 1)), numpy.zeros(1))
    assert one_window.mean == 1 and math.isnan(one_window.high)
    same = mean_interval(numpy.zeros((2, 4)), numpy.arange(4))
    assert (same.low, same.high, same.p) == (0, 0, 1)
    book = mean_interval(numpy.array([[0.1] * 60 + [0.2, 0.3]]), numpy.array([0] * 60 + [1, 2]))
    assert book.p > 0.5  # nearly all of the text is one document
    noise = numpy.random.default_rng(2).normal(0, 0.1, (3, 18))
    shifted = noise + [[0.0], [1.0], [2.0]]  # seeds differ by more than documents do
    assert mean_interval(shifted, DOCUMENTS).p > 0.1 > mean_interval(shifted[2:], DOCUMENTS).p


def test_all_tests_together() -> None:
    found = holm([0.01, 0.04, math.nan, 0.03, 0.005])
    assert found[[0, 1, 3, 4]] == pytest.approx([0.03, 0.06, 0.06, 0.02]) and math.isnan(found[2])
    assert list(holm([0.6, 0.7])) == [1, 1] and not len(holm([]))


# --- in the report


def losses(by_test: Sequence[Sequence[float]], **more: Sequence[float]) -> dict[str, object]:
    named = {f"{number}.loss": list(values) for number, values in enumerate(by_test)}
    return named | {f"{number}.document": DOCUMENTS for number in range(len(by_test))} | more


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """On uk the texts are alike but for noise; on en the English one is better by 0.1 nats."""
    rng, root = numpy.random.default_rng(0), tmp_path / "sweep"
    text = rng.normal(3, 0.5, (2, 18))  # what is hard is hard for each model
    names = {"uk": 20.0, "en": 20.0}
    write_run(root / "dense", "dense", names, losses=losses(text))
    for on in names:
        for seed in range(3):
            loss = text + 0.2 + rng.normal(0, 0.02, text.shape)
            loss[1] -= 0.1 * (on == "en")
            own = dict(zip(names, map(float, numpy.exp(loss.mean(1))), strict=True))
            kl = {"0.kl": [*loss[0, :9] - text[0, :9], *[math.nan] * 9]}  # half were compared
            run = write_run(
                root / f"{on}-{seed}", "wanda", own, on=on, seed=seed, losses=losses(loss, **kl)
            )
            text_of = (run / "results.json").read_text()
            (run / "results.json").write_text(
                text_of.replace('"digest"', '"compared_windows": 9, "digest"')
            )
    return root


def line(lines, **named: str):
    for name, value in named.items():
        lines = lines[lines[name] == value]
    (found,) = lines.itertuples()
    return found


def test_calibration_texts_are_paired_by_window_and_seed(sweep: Path) -> None:
    runs = load_runs([sweep])
    kept = {folder: read_losses(folder, each) for folder, each in runs.items()}
    (table,) = tables(runs)
    found, problems = differences(table, kept, "dense")
    assert not problems and len(found) == 7  # two tests by text, one KL, four against dense
    uk = line(found, calibrated_on="en", minus="uk", measured_on="uk", figure="loss")
    en = line(found, calibrated_on="en", minus="uk", measured_on="en", figure="loss")
    assert not uk.significant and en.significant and en.difference == pytest.approx(-0.1, abs=0.02)
    by_seed = [
        kept[sweep / f"en-{seed}"]["en-d0"]["loss"].astype(float)
        - kept[sweep / f"uk-{seed}"]["en-d0"]["loss"]
        for seed in range(3)
    ]
    slow = mean_interval(numpy.stack(by_seed), DOCUMENTS)
    assert (en.difference, en.low, en.high) == pytest.approx((slow.mean, slow.low, slow.high))
    assert (en.seeds, en.documents) == (3, 6) and en.p > slow.p  # by Holm's rule
    over = line(found, calibrated_on="uk", minus="dense", measured_on="en")
    assert over.significant and over.difference == pytest.approx(0.2, abs=0.02) and over.seeds == 3
    assert line(found, figure="kl").documents == 3


def test_bold_and_marks_in_every_form_of_the_table(sweep: Path) -> None:
    settings = Path("all.csv")
    shown = write_report(load_runs([sweep]), Path("out"), None, "table.tex", str(settings))
    text = Path("out/report.md").read_text("utf-8")
    main_table, _, compared = text.partition("Differences:")
    assert main_table.count("**") == 2 and "(n.s.)" in shown
    assert re.search(r"\n\| wanda +\| 50% +\| en .*\| \*\*\d\d\.\d\d ± ", main_table)
    assert compared.count("(n.s.)") == 3  # the legend, loss and KL on uk
    assert "18 windows, 576 tokens (KL and agreement on 9 of these windows)" in text
    tex = Path("table.tex").read_text("utf-8")
    assert tex.count("\\begin{table}") == tex.count("\\bottomrule") == 2
    assert tex.count("\\textbf{") == 2 and "95\\% interval" in tex and "**" not in tex
    assert " & uk & en \\\\\n\\cmidrule(lr){4-4}\n\\cmidrule(lr){5-5}\n" in tex
    assert tex.count("\\resizebox") == tex.count("\\end{tabular}}") == 2  # as wide as the page
    rows = [each for each in tex.splitlines() if " & wanda & " in each or each.startswith("wanda")]
    assert {each.count(" & ") for each in rows} == {4, 10}
    lines = list(csv.DictReader(settings.open(encoding="utf-8")))
    assert len(lines) == 7 and {each["seed"] for each in lines} == {"0", "1", "2"}
    assert lines[1]["evaluation.uk.tokens"] == "576" and lines[1]["calibration.name"] == "en"


def test_any_text_is_plain_words_in_latex() -> None:
    """Compiled once with pdflatex; this is the text that it took."""
    assert tex(r"a_b & 5% $x$ #1 {c} <g> |h| ~d ^e \f") == (
        r"a\_b \& 5\% \$x\$ \#1 \{c\} \textless{}g\textgreater{} \textbar{}h\textbar{} "
        r"\textasciitilde{}d \textasciicircum{}e \textbackslash{}f"
    )
    assert tex("**-0.5** ± 8.3e-06 – x-1") == r"\textbf{$-$0.5} $\pm$ 8.3$\times10^{-6}$ -- x-1"


def test_other_windows_are_never_paired(sweep: Path, tmp_path: Path) -> None:
    other = write_run(
        tmp_path / "other", "admm", {"uk": 9.0}, on="uk", digest="d1", losses=losses([[3.0] * 18])
    )
    done = call(sweep, "--against", other, program=main)
    assert done.status == 0
    names = [f"wanda 50% {on} minus admm 50% uk" for on in ("en", "uk")]
    names.insert(0, "dense minus admm 50% uk")
    assert f"- not compared, no common test windows: {', '.join(names)}" in done.out
    old = write_run(tmp_path / "old", "admm", {"uk": 9.0}, on="uk")
    done = call(sweep, "--against", old, program=main)
    assert "no losses by window with a common seed: dense minus admm 50% uk, wanda" in done.out
    one = sorted(sweep.glob("uk-*"))
    done = call(sweep / "dense", *one, "--against", "dense", program=main)  # no pair of texts
    assert (
        done.status == 0 and len(re.findall(r"\| wanda +\| 50% .*\| dense +\| [+*]", done.out)) == 2
    )
    for wrong in ([sweep / "uk-0", "--against", "dense"], [old, "--against", sweep]):
        done = call(*wrong, program=main)
        assert done.status == 1 and done.complaints[-1].startswith("error: --against ")


def test_a_file_of_losses_that_is_damaged(sweep: Path) -> None:
    (sweep / "dense" / "losses.npz").write_text("x")
    done = call(sweep, program=main)
    assert done.status == 1 and "losses.npz: it cannot be read" in done.complaints[0]


def test_curves_over_a_flag_that_has_several_numbers(tmp_path: Path) -> None:
    for count, value in ((8, 30.0), (128, 20.0), (32, 25.0)):
        for on in ("uk", "en"):
            made = {"--nsamples": count, "--dtype": "float32"}
            more = {"fingerprint": {"pruning": made}, "ratio": 0.5}
            kept = losses([math.log(value) + 0.01 * DOCUMENTS])
            name = tmp_path / f"{on}{count}"
            write_run(name, "wanda", {"test": value}, on=on, losses=kept, **more)
    write_report(load_runs([tmp_path]), tmp_path / "out")
    assert {"nsamples.png", "nsamples.pdf"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert "![nsamples](nsamples.png)" in (tmp_path / "out/report.md").read_text("utf-8")
    (table,) = tables(load_runs([tmp_path]))
    table = table.assign(perplexity_low=table["perplexity"] - 1, perplexity_high=math.nan)
    figure = curves(table, keys(table))["nsamples"]
    (axes,) = figure.axes
    drawn = {each.get_label(): each for each in axes.containers}
    assert drawn.keys() == {"en", "uk"} and isinstance(drawn["uk"], ErrorbarContainer)
    points = drawn["uk"].lines[0].get_xydata().tolist()
    assert points == [[8, 30], [32, 25], [128, 20]] and axes.get_xscale() == "log"
    bars = drawn["uk"].lines[2][0].get_segments()
    assert [list(bar[:, 1]) for bar in bars] == [[29, 30], [24, 25], [19, 20]]
    assert not curves(table[table["setting nsamples"] == "8"], keys(table))
