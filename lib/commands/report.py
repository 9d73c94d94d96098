"""One table over many runs, and the pictures that go with it.

    python -m lib.commands.report RUN [RUN ...] [--out FOLDER]

A RUN is a run's `--save` folder, or a folder that holds such folders. The table goes to the
terminal and to report.md, with unrounded figures to report.csv; the pictures are beside them.
Completions are in report.md alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.commands.plots import STRICTNESS
from lib.run.results import ERROR, NONE, RESULTS, read_results
from lib.util import command
from lib.util.command import one_line
from lib.util.errors import UserError
from lib.util.files import check_output_folder
from lib.util.markdown import EMPTY, escape, padded_table

if TYPE_CHECKING:
    from pandas import DataFrame, Series

Runs = Mapping[Path, Mapping[str, Any]]  # {folder: results}
DENSE = "dense"  # the method and the type of a model that was not pruned
ROW = ["method", "type", "calibrated_on"]  # what names a row, with the settings that vary
MEASURES = ["perplexity", "standard_error", "bits_per_byte", "kl", "kl_standard_error"]
MEASURES += ["top1_agreement", "top1_agreement_standard_error"]
SPREAD = ["perplexity", "bits_per_byte", "kl", "top1_agreement"]  # with a deviation over seeds
SETTING, TASK = "setting ", "task "  # what the columns of settings and of tasks begin with
NOTES = {  # by what a column's title ends with
    "saved": "saved: bytes of the saved model's files, in millions.",
    "perplexity": "Perplexity: lower is better; ± is the standard deviation over seeds.",
    "s.e.": "s.e.: standard error of the perplexity over the test windows, mean over seeds.",
    "rise": "rise: perplexity over the dense model's.",
    "KL": "KL: divergence from the dense model's predictions, in nats a token.",
    "agreement": "agreement: share of positions with the dense model's most likely token.",
    "bits/byte": "Bits per byte compare models of different tokenizers; perplexities do not.",
}


def load_runs(paths: Iterable[str | Path]) -> dict[Path, dict[str, Any]]:
    """Read the results of every run in the folders, or below them, in the order of their names.

    Raises UserError for a path that is no folder or holds no run, and for a results.json that
    can't be read.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"RUN {path}: no such folder; name a run's --save folder or its parent")
        inside = [path] if (path / RESULTS).is_file() else _below(path, RESULTS)
        if not inside:
            raise UserError(f"RUN {path}: holds no {RESULTS}; name a run's --save folder")
        folders.update((folder.resolve(), folder) for folder in inside)
    return {folder: read_results(folder) for folder in folders.values()}


def _below(path: Path, name: str) -> list[Path]:
    return sorted(file.parent for file in path.rglob(name))


def tables(runs: Runs) -> list[DataFrame]:
    """Return the tables of runs that may be compared: those of one model and vocabulary.

    A table has a line for each row and test set. Runs that differ in nothing but the seed are one
    row, with the means of their figures; of one seed twice, the first run counts. `rise` is the
    perplexity over the dense model's on the same test text, less one.
    """
    import pandas

    lines = [
        _run_columns(folder, results) | _test_columns(test)
        for folder, results in runs.items()
        for test in results["evaluation"]
    ]
    if not lines:
        return []
    frame = pandas.DataFrame(lines).astype(dict.fromkeys([*MEASURES, "saved_bytes"], float))
    models = frame.groupby(["model", "vocabulary"], sort=False)
    return [_summarised(model) for _, model in models]


def _run_columns(folder: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that all lines of a run have in common."""
    kind, share = results.get("sparsity_type"), results.get("sparsity_ratio") or 0.0
    zeros = (results.get("sparsity") or {}).get("overall")
    is_dense = results["method"] == DENSE
    if kind is None and not is_dense:  # pruned before
        share = zeros or 0.0
    names = {None: f"{share:.0%}", "unstructured": f"{100 * share:g}%"}
    names["neurons"] = f"{100 * share:g}% neurons"
    vocabulary = results.get("vocabulary") or {}
    text = results.get("calibration") or results.get("recovery", {}).get("text") or {}
    variant = " variant" if results.get("flags", {}).get("use_variant") else ""
    columns = {
        "folder": folder,
        "model": results["model"].rstrip("/"),
        "vocabulary": f"{vocabulary.get('rows', '')} {vocabulary.get('digest', '')}".strip(),
        "vocabulary_note": vocabulary.get("note"),
        "rows": f"{vocabulary['rows']:,} of {vocabulary['rows_before']:,}" if vocabulary else None,
        "method": results["method"] + variant + (" + recovery" if "recovery" in results else ""),
        "kind": kind,
        "type": DENSE if is_dense else names.get(kind, kind),
        "ratio": share,
        "calibrated_on": text.get("name") or NONE,
        "sources": ", ".join(source["source"] for source in text.get("sources", [])),
        "seed": results.get("seed") or 0,
        "zeros": zeros,
        "saved_bytes": results.get("saved_bytes"),
        "bits": results.get("packed", {}).get("bits"),
    }
    for name, value in results.get("settings", {}).items():
        columns[SETTING + name] = None if value is None else str(value)
    for task, metrics in results.get("tasks", {}).items():
        numbers = {name: v for name, v in metrics.items() if isinstance(v, int | float)}
        columns |= {f"{TASK}{task} {name}": float(value) for name, value in numbers.items()}
    return columns


def _test_columns(test: Mapping[str, Any]) -> dict[str, Any]:
    identity = test.get("digest") or f"{test.get('source')} {test.get('tokens')}"
    columns = {"test": test["name"], "measured_on": test["name"], "digest": identity}
    return columns | {"tokens": test.get("tokens")} | {name: test.get(name) for name in MEASURES}


def _summarised(lines: DataFrame) -> DataFrame:
    """Average the runs of one model that differ in nothing but the seed."""
    lines = lines.drop(
        columns=[name for name in lines if lines[name].isna().all() and name != "kind"]
    )
    digests = lines["digest"].str[:8]
    lines["measured_on"] = _unique_names(lines["measured_on"], lines["digest"], digests)
    lines["calibrated_on"] = _unique_names(lines["calibrated_on"], lines["sources"])
    pruned = lines[lines["type"] != DENSE]
    counts = (lines if pruned.empty else pruned).nunique()
    lines = lines.drop(columns=[n for n in lines if n.startswith(SETTING) and counts[n] < 2])
    settings = [name for name in lines if name.startswith(SETTING)]
    keys = [*ROW, *sorted(settings), "measured_on"]
    groups = lines.drop_duplicates([*keys, "seed"]).groupby(keys, sort=False, dropna=False)
    means = [name for name in lines if name in MEASURES or name.startswith(TASK)]
    means += [name for name in ("zeros", "saved_bytes") if name in lines]
    first = lines.columns.difference([*keys, *means], sort=False)
    table = groups.agg(
        **{name: (name, "first") for name in first},
        **{name: (name, "mean") for name in means},
        **{f"{name}_deviation": (name, "std") for name in SPREAD if name in lines},
        seeds=("seed", "nunique"),
        folders=("folder", lambda folders: " ".join(map(str, folders))),
    ).reset_index()
    dense = table[table["type"] == DENSE].drop_duplicates("measured_on").set_index("measured_on")
    if "perplexity" in lines:
        table["rise"] = table["perplexity"] / table["measured_on"].map(dense["perplexity"]) - 1
    tests = {name: place for place, name in enumerate(lines["measured_on"].unique())}
    order = {
        "is pruned": table["type"] != DENSE,
        "strictness": table["kind"].map({kind: place for place, kind in enumerate(STRICTNESS)}),
        "place": table["measured_on"].map(tests),
    }
    by = ["is pruned", "method", "ratio", "strictness", "calibrated_on", *settings, "place"]
    table = table.assign(**order).sort_values(by, kind="stable", ignore_index=True)
    return table.drop(columns=list(order))


def _unique_names(names: Series, identities: Series, shown: Series | None = None) -> Series:
    """Return the names, with what tells them apart where one name is of several things."""
    several = identities.groupby(names).transform("nunique") > 1
    shown = identities if shown is None else shown
    return names.where(~several, names + " (" + shown + ")")


def report_text(runs: Runs) -> str:
    """Return all runs as Markdown: one table, or one for each model and vocabulary."""
    all_tables = tables(runs)
    parts = []
    if len(all_tables) > 1:
        parts.append(
            f"**{len(all_tables)} tables, not to be compared with each other:** "
            "their runs are of different models or vocabularies."
        )
    ends: set[str] = set()
    for table in all_tables:
        columns = _cells(table)
        ends |= {title.rpartition(" ")[2] for title in columns}
        parts.append(_heading(table))
        parts += [table["vocabulary_note"][0]] if "vocabulary_note" in table else []
        parts.append(padded_table(list(columns), list(zip(*columns.values(), strict=True)), left=3))
    parts.append("\n".join(f"- {note}" for end, note in NOTES.items() if end in ends))
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(table: DataFrame) -> str:
    """Return a table's heading: the model, what is left of its vocabulary, and the test sets."""
    tests = []
    for _, line in table.drop_duplicates("measured_on").iterrows():
        size = line.get("tokens")
        about = f" ({size:,.0f} tokens, digest {line['digest'][:8]})" if size and size > 0 else ""
        tests.append(line["measured_on"] + about)
    left = f", {table['rows'][0]} rows of its vocabulary" if "rows" in table else ""
    return f"### {one_line(table['model'][0])}{left}, measured on {one_line(', '.join(tests))}"


def _cells(table: DataFrame) -> dict[str, list[str]]:
    """Return {title: a cell for each row}; beyond the first three columns, only those with text."""
    settings = [name for name in table if name.startswith(SETTING)]
    keys = [*ROW, *settings]
    lines = []
    for _, row in table.groupby(keys, sort=False, dropna=False):
        first = row.iloc[0]
        is_dense = first["type"] == DENSE
        cells = {
            "method": first["method"],
            "type": EMPTY if is_dense else first["type"],
            "calibrated on": first["calibrated_on"],
            "zeros": _number(first.get("zeros"), 2, scale=100, unit="%"),
            "seeds": EMPTY if is_dense else str(first["seeds"]),
            "saved": _number(first.get("saved_bytes"), 1, scale=1e-6, unit=" MB"),
        }
        for name in settings:
            value = first[name]
            cells[name.removeprefix(SETTING)] = value if isinstance(value, str) else EMPTY
        for _, line in row.iterrows():
            cells |= _test_cells(line, bits_first="vocabulary_note" in table)
        tasks = [name for name in table if name.startswith(TASK)]
        cells |= {name.removeprefix(TASK): _number(first[name], 4) for name in tasks}
        lines.append(cells)
    titles = dict.fromkeys(title for line in lines for title in line)
    columns = {title: [line.get(title, EMPTY) for line in lines] for title in titles}
    return {
        title: cells
        for index, (title, cells) in enumerate(columns.items())
        if index < 3 or any(cell != EMPTY for cell in cells)
    }


def _test_cells(line: Series, bits_first: bool) -> dict[str, str]:
    test, is_dense = line["measured_on"], line["type"] == DENSE
    bits = {f"{test} bits/byte": _mean(line, "bits_per_byte", 3)}
    perplexity = {
        f"{test} perplexity": _mean(line, "perplexity", 2),
        f"{test} s.e.": _number(line.get("standard_error"), 2),
        f"{test} rise": EMPTY if is_dense else _percent(line.get("rise")),
    }
    cells = bits | perplexity if bits_first else perplexity | bits
    cells[f"{test} KL"] = _mean(line, "kl", 3)
    return cells | {f"{test} agreement": _mean(line, "top1_agreement", 1, scale=100, unit="%")}


def _is_missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _number(value: float | None, places: int, scale: float = 1.0, unit: str = "") -> str:
    """Return a figure as the tables print it: `12.34`, `1,234`, `inf`, or `–` for none."""
    if _is_missing(value):
        return EMPTY
    value *= scale
    text = f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.{places}f}"
    return text + unit


def _percent(value: float | None) -> str:
    """Return `+12%`, `+1.2%`, or `–` for none."""
    if _is_missing(value):
        return EMPTY
    return f"{value:+.1%}" if abs(value) < 0.0995 else f"{value:+,.0%}"


def _mean(line: Series, name: str, places: int, scale: float = 1.0, unit: str = "") -> str:
    """Return a mean, `±` its deviation over seeds where there is one."""
    mean, spread = line.get(name), line.get(f"{name}_deviation")
    more = "" if _is_missing(spread) or not spread else f" ± {_number(spread, places, scale)}"
    text = _number(mean, places, scale)
    return text if text == EMPTY else text + more + unit


def report_csv(runs: Runs) -> str:
    """Return the same figures as CSV, unrounded: a line for each row and test set."""
    import pandas

    numbered = [table.assign(table=number) for number, table in enumerate(tables(runs), 1)]
    frame = pandas.concat(numbered) if numbered else pandas.DataFrame()
    columns = "table model method type ratio calibrated_on zeros seeds saved_bytes".split()
    columns += ["measured_on", "digest", "rise"]
    columns += [name + more for name in MEASURES for more in ("", "_deviation")]
    columns += [name for name in frame if name.startswith((SETTING, TASK))]
    columns = [name for name in [*columns, "vocabulary", "folders"] if name in frame]
    short = {name: name.removeprefix(SETTING).removeprefix(TASK) for name in columns}
    return frame[columns].rename(columns=short).to_csv(index=False, lineterminator="\n")


def completions(runs: Runs) -> str:
    """Return what models have made of the prompts, as Markdown; of several seeds, the first's."""
    parts = []
    for table in tables(runs):
        settings = [name for name in table if name.startswith(SETTING)]
        texts: dict[tuple[str, str], dict[str, str]] = {}  # {(test, prompt): {model: text}}
        for _, line in table.iterrows():
            parts_of_name = [line["method"], line["type"], line["calibrated_on"]]
            parts_of_name += [
                f"{name.removeprefix(SETTING)} {line[name]}"
                for name in settings
                if isinstance(line[name], str)
            ]
            name = DENSE if line["type"] == DENSE else ", ".join(parts_of_name)
            for entry in runs[line["folder"]].get("completions") or []:
                if entry["test"] == line["test"]:
                    by_model = texts.setdefault((line["measured_on"], entry["prompt"]), {})
                    if "dense" in entry:
                        by_model.setdefault(DENSE, entry["dense"])
                    if "model" in entry:
                        by_model.setdefault(name, entry["model"])
        for test in dict.fromkeys(test for test, _ in texts):
            parts.append(f"### Completions: {escape(Path(table['model'][0]).name)}, {escape(test)}")
            for prompt in (prompt for name, prompt in texts if name == test):
                by_model = sorted(texts[test, prompt].items(), key=lambda item: item[0] != DENSE)
                lines = (f"- {escape(name)}: {escape(text)}" for name, text in by_model)
                parts += [f"> {escape(prompt)} …", "\n".join(lines)]
    return "\n\n".join(parts)


def _failures(paths: Iterable[str | Path]) -> str:
    """Return the runs whose last try failed, below the paths, and why."""
    files = [file for path in paths for file in sorted(Path(path).rglob(ERROR))]
    reasons = (json.loads(file.read_text("utf-8")).get("error") for file in files)
    lines = [
        f"- {file.parent}: {one_line(str(reason))}"
        for file, reason in zip(files, reasons, strict=True)
    ]
    return "\n".join([f"**Failed runs: {len(lines)}**", "", *lines, ""]) if lines else ""


def pictures(runs: Runs) -> Iterator[tuple[str, Any]]:
    """Yield (file name, figure) of every picture that the tables have figures for."""
    from lib.commands import plots

    all_tables = tables(runs)
    draw = {
        "perplexity": plots.perplexity_by_sparsity,
        "languages": plots.cross_language,
        "bytes": plots.bytes_against_bits,
    }
    for number, table in enumerate(all_tables, 1):
        suffix = f"-{number}" if len(all_tables) > 1 else ""
        for name, picture in draw.items():
            if figure := picture(table):
                yield f"{name}{suffix}.png", figure


def write_report(runs: Runs, out: str | Path, failures: str = "") -> list[Path]:
    """Write report.md, report.csv and the pictures into folder `out`; return their paths."""
    from lib.commands import plots

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    drawn = []
    if plots.can_draw():
        drawn = [plots.save(figure, out / name) for name, figure in pictures(runs)]
    parts = [report_text(runs), failures, completions(runs)]
    parts += [f"![{path.stem}]({path.name})" for path in drawn]
    text = "\n\n".join(part.strip() for part in parts if part) + "\n"
    for name, content in {"report.md": text, "report.csv": report_csv(runs)}.items():
        (out / name).write_text(content, encoding="utf-8")
    return [out / "report.md", out / "report.csv", *drawn]


def report(paths: Sequence[str | Path], out: str | Path) -> None:
    """Print the table of all runs in or below the paths, and write it with its pictures."""
    runs, failures = load_runs(paths), _failures(paths)
    for path in write_report(runs, out, failures):
        print(f"wrote {path}", file=sys.stderr)
    print(report_text(runs) + (f"\n{failures}" if failures else ""))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lib.commands.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a folder of them")
    parser.add_argument("--out", default="report", help="folder for the files (default: report)")
    command.add_debug_flag(parser)
    args = parser.parse_args(argv)
    check_output_folder("--out", args.out)
    report(args.runs, args.out)


if __name__ == "__main__":
    sys.exit(command.run(main))
