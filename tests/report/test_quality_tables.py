"""Abilities and fidelity in report, CSV and card, where runs measured them."""

from __future__ import annotations

import csv
from pathlib import Path

from lib.report.quality_tables import abilities_of_run, fidelity_of_run, quality_of_runs
from lib.report.results import Run
from lib.report.write import report_csv, write_report


def ability(right: float, said: float | None = None, dense: float | None = 0.9) -> dict:
    record = {"text": "uk", "name": "last word", "questions": 300, "chance": 0.25}
    record["model"] = {"accuracy": right} | ({} if said is None else {"said": said})
    if dense is not None:
        record |= {"dense": {"accuracy": dense, "said": 0.5}}
        record |= {"flips": {"lost": 30, "gained": 3, "p": 0.01}}
    return record


def written(language: float | None, **more: dict) -> dict:
    figures = {"language": language, "foreign_script": 0.01, "known_words": 0.8}
    figures |= {"repeated_4grams": 0.2, "distinct_2grams": 0.7}
    return {"text": "uk", "beginnings": 100, "reference": figures, "model": figures} | more


def run(method: str, seed: int = 0, **records: object) -> Run:
    dense = method == "dense"
    results = {
        "model": "models/tiny",
        "method": method,
        "sparsity_type": None if dense else "2:4",
        "sparsity_ratio": None if dense else 0.5,
        "seed": seed,
        "calibration": None if dense else {"name": "uk", "sources": []},
        "evaluation": [{"name": "uk", "digest": "d", "perplexity": 1.0}],
    }
    return Run(Path(method), results | records)


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_one_runs_abilities_stand_beside_the_dense_models() -> None:
    head, first, second = cells(abilities_of_run([ability(0.6, 0.1), ability(0.5, dense=None)]))
    assert head == [
        "test text",
        "questions",
        "chance",
        "dense model, right",
        "this model, right",
    ] + [
        "dense model, said",
        "this model, said",
        "lost, gained",
    ]
    assert first == ["uk", "300 last word", "25%", "90.0%", "60.0%", "50.0%", "10.0%", "30, 3"]
    assert second == ["uk", "300 last word", "25%", "–", "50.0%", "–", "–", "–"]


def test_one_runs_fidelity() -> None:
    head, text, model = cells(fidelity_of_run([written(None)]))
    assert head[:3] == ["test text", "written by", "lines in the language"]
    assert text == ["uk", "the text itself", "–", "1.0%", "80.0%", "20.0%", "70.0%"]
    assert model[1] == "this model"


def test_runs_are_averaged_over_seeds_and_the_dense_model_leads() -> None:
    runs = [
        run("wanda", 0, abilities=[ability(0.6, 0.1)], fidelity=[written(0.5)]),
        run("wanda", 1, abilities=[ability(0.8, 0.3)], fidelity=[written(0.7)]),
        run("admm", 0, abilities=[ability(0.7, dense=None)]),
        run("magnitude"),
    ]
    text = quality_of_runs(runs)
    assert text.startswith("### Abilities and fidelity: uk\n")
    head, *rows = cells(text)
    assert head[:6] == ["method", "type", "calibrated on"] + [
        "last word right",
        "last word said",
        "lines in the language",
    ]
    assert [row[:6] for row in rows] == [
        ["dense", "–", "–", "90.0%", "50.0%", "–"],
        ["admm", "2:4", "uk", "70.0%", "–", "–"],
        ["wanda", "2:4", "uk", "70.0%", "20.0%", "60.0%"],
    ]
    assert quality_of_runs([run("magnitude")]) == ""


def test_report_and_csv(tmp_path: Path) -> None:
    runs = [run("dense", abilities=[ability(0.9, 0.5, dense=None)])]
    runs.append(run("wanda", abilities=[ability(0.6, 0.1)], fidelity=[written(0.5)]))
    write_report(runs, tmp_path)
    assert "### Abilities and fidelity: uk" in (tmp_path / "report.md").read_text("utf-8")
    dense, wanda = csv.DictReader(report_csv(runs).splitlines())
    assert dense["last word right"] == "0.9" and wanda["last word right"] == "0.6"
    assert dense["lines in the language"] == "" and wanda["lines in the language"] == "0.5"
    assert "last word right" not in report_csv([run("wanda")])
