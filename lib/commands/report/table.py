"""Tables of finished runs: a line for each row and test set, means over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...methods.sparsity import SMALLER
from ...run.flags import named
from ...run.plan import PRUNED_BEFORE
from ...run.results import NONE, RESULTS, is_trained, read_results
from ...util.errors import UserError, one_line
from ...util.markdown import EMPTY

if TYPE_CHECKING:
    from pandas import DataFrame, Series

Runs = Mapping[Path, Mapping[str, Any]]  # {folder: results}
PLANNED = "runs.txt"  # file in a sweep's --out: the folders of its runs, one in each line
DENSE = "dense"  # the method and the type of a model that was not pruned
SETTING = "setting "  # prefix of the columns of settings
TASK = "task "  # prefix of the columns of tasks
STRICTNESS = ("unstructured", "4:8", "2:4", *SMALLER)  # the order of sparsity types
MEASURES = "perplexity standard_error bits_per_byte kl kl_99 top1_agreement".split()
SIZES = "windows", "tokens", "compared_windows"  # sizes of a test set


def load_runs(paths: Iterable[str | Path]) -> dict[Path, dict[str, Any]]:
    """Read the results of every run in the folders, or below them, in the order of their names.

    Raises UserError for a path that is not a folder or has no run, for an unreadable results.json,
    and for one whose figures on dialogues are means over windows, not over tokens.
    """
    folders: dict[Path, Path] = {}
    fix = "Name the --save folder of a run"
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"RUN {path}", "no such folder exists", fix)
        files = [path / RESULTS] if (path / RESULTS).is_file() else sorted(path.rglob(RESULTS))
        if not files:
            raise UserError(f"RUN {path}", f"no {RESULTS} is there", fix)
        folders |= {file.parent.resolve(): file.parent for file in files}
    runs = {folder: read_results(folder) for folder in folders.values()}
    for folder, results in runs.items():
        by_token = "revision of figures" in results.get("fingerprint", {}).get("measuring", {})
        if not by_token and any("dialogues" in test for test in results["evaluation"]):
            problem = "an earlier version has averaged its figures on dialogues over windows"
            raise UserError(f"RUN {folder}", problem, "Run it again, or name other folders")
    return runs


class Unfinished(NamedTuple):
    """The folders of a sweep's runs that have no results, and a sentence that names them."""

    folders: list[Path]
    line: str


def unfinished(paths: Iterable[str | Path]) -> Unfinished:
    """Find the unfinished runs in or below `paths`; only a sweep plans its runs."""
    planned: dict[Path, Path] = {}
    for path in (path for path in map(Path, paths) if not (path / RESULTS).is_file()):
        for file in [*path.rglob(PLANNED), *path.resolve().parent.glob(PLANNED)]:
            folders = (file.parent / name for name in file.read_text("utf-8").splitlines())
            whole = ((each.resolve(), each) for each in folders)
            planned |= {full: each for full, each in whole if path.resolve() in full.parents}
    left = [each for each in planned.values() if not (each / RESULTS).is_file()]
    names = one_line(", ".join(map(str, left)))
    line = f"{len(left)} of {len(planned)} runs are not finished: {names}."
    return Unfinished(left, line if left else "")


def tables(runs: Runs) -> list[DataFrame]:
    """Return the tables of comparable runs: those of one model and vocabulary.

    A table has a line for each row and test set. Runs that differ only in the seed are one row,
    with the means of their figures; if a seed occurs twice, the first run counts. `rise` is the
    perplexity over the dense model's on the same test text and with the same settings, minus one.
    """
    import pandas

    lines = [
        _run_columns(folder, results)
        | {"measured_on": test["name"]}
        | {"digest": test.get("digest") or f"{test.get('source')} {test.get('tokens')}"}
        | {name: test.get(name) for name in (*MEASURES, *SIZES)}
        | {"kl_99": test.get("kl_of_tokens", {}).get("99%")}
        for folder, results in runs.items()
        for test in results["evaluation"]
    ]
    if not lines:
        return []
    frame = pandas.DataFrame(lines).astype(dict.fromkeys([*MEASURES, "saved_bytes"], float))
    return [_summarised(model) for _, model in frame.groupby(["model", "vocabulary"], sort=False)]


def _run_columns(folder: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that all lines of a run have in common."""
    kind, share = results.get("sparsity_type"), results.get("sparsity_ratio")
    zeros = (results.get("sparsity") or {}).get("overall")
    if share is None:
        share = (zeros or 0.0) if results["method"] == PRUNED_BEFORE else 0.0  # rounding adds some
    names = {None: f"{share:.0%}" if share else "whole", "unstructured": f"{100 * share:g}%"}
    names |= {kind: f"{100 * share:g}% {kind}" for kind in SMALLER}
    vocabulary, rows = results.get("vocabulary") or {}, ""
    if vocabulary:
        rows = f"{vocabulary['rows']:,} of {vocabulary['rows_before']:,} rows of its vocabulary"
        rows += f" ({vocabulary.get('digest')})"
    text = results.get("calibration") or results.get("recovery", {}).get("text") or {}
    variant = " variant" if results.get("flags", {}).get("use_variant") else ""
    trained = is_trained(results) and results["method"] != "recovered"
    columns = {
        "folder": folder,
        "model": results["model"].rstrip("/"),
        "vocabulary": rows,
        "note": vocabulary.get("note"),
        "method": results["method"] + variant + (" + recovery" if trained else ""),
        "strictness": STRICTNESS.index(kind) if kind in STRICTNESS else -1,
        "type": DENSE if results["method"] == DENSE else names.get(kind, kind),
        "ratio": share,
        "calibrated_on": text.get("name") or NONE,
        "sources": ", ".join(source["source"] for source in text.get("sources", [])),
        "seed": results.get("seed") or 0,
        "zeros": zeros,
        "saved_bytes": results.get("saved_bytes"),
    }
    in_columns = named(has_column=True)
    for name, value in results.get("fingerprint", {}).get("pruning", {}).items():
        if name.startswith("--") and name[2:] not in in_columns and value is not None:
            columns[SETTING + name[2:]] = str(value)
    for task, metrics in results.get("tasks", {}).items():
        numbers = {name: v for name, v in metrics.items() if isinstance(v, int | float)}
        columns |= {f"{TASK}{task} {name}": float(value) for name, value in numbers.items()}
    return columns


def row_keys(names: Iterable[str]) -> list[str]:
    return ["method", "type", "calibrated_on", *(n for n in names if n.startswith(SETTING))]


def _summarised(lines: DataFrame) -> DataFrame:
    """Average the runs of one model that differ only in the seed."""
    import pandas

    pruned = lines[lines["type"] != DENSE]
    counts = (lines if pruned.empty else pruned).nunique()
    same = [name for name in lines if name.startswith(SETTING) and counts[name] < 2]
    lines = lines.drop(columns=same).dropna(axis="columns", how="all")
    keys = [*row_keys(lines), "measured_on"]
    lines = lines.fillna(dict.fromkeys(keys, EMPTY))
    lines["measured_on"] = _unique_names(lines["measured_on"], lines["digest"].str[:8])
    lines["calibrated_on"] = _unique_names(lines["calibrated_on"], lines["sources"])
    sizes = "zeros", "saved_bytes"
    means = [name for name in lines if name in (*MEASURES, *sizes) or name.startswith(TASK)]
    groups = lines.drop_duplicates([*keys, "seed"]).groupby(keys, sort=False)
    table = groups.first()
    table[means] = groups[means].mean()
    spread = [name for name in means if name not in (*sizes, "standard_error")]
    table = table.join(groups[spread].std().add_suffix("_deviation"))
    table["seed"] = groups["seed"].agg(lambda seeds: ", ".join(map(str, sorted(seeds))))
    table["folders"] = groups["folder"].agg(lambda folders: " ".join(map(str, folders)))
    table["runs"] = groups[["seed", "folder"]].apply(lambda run: dict(run.values.tolist()))
    table = table.reset_index()
    is_dense = table["type"] == DENSE
    if "perplexity" in table:
        dense = dense_lines(table)
        before = pandas.DataFrame(dense.values(), [*dense], table.columns).reindex(table.index)
        before = before[["perplexity", "bits_per_byte"]].astype(float)
        table["rise"] = (table["perplexity"] / before["perplexity"] - 1).mask(is_dense)
        table["more_bits"] = (table["bits_per_byte"] - before["bits_per_byte"]).mask(is_dense)
    tests = list(lines["measured_on"].unique())
    table = table.assign(pruned=~is_dense, test=table["measured_on"].map(tests.index))
    order = ["pruned", "method", "strictness", "ratio", *keys[1:-1], "test"]

    def numbers(column: Series) -> Series:
        found = pandas.to_numeric(column, errors="coerce")
        return found if column.name in keys and found.notna().any() else column

    table = table.sort_values(order, ignore_index=True, key=numbers)
    return table.drop(columns=["pruned", "test"])


def dense_lines(table: DataFrame) -> dict[int, Series]:
    """Return {label of a line: the dense model's line on the same test, with the same settings}.

    A setting that a dense model does not have, such as nsamples, does not count.
    """
    settings, found = [name for name in table if name.startswith(SETTING)], {}
    for _, dense in table[table["type"] == DENSE].iterrows():
        alike = table["measured_on"] == dense["measured_on"]
        for name in settings:
            alike &= (table[name] == dense[name]) | (dense[name] == EMPTY)
        found = dict.fromkeys(table.index[alike], dense) | found
    return found


def _unique_names(names: Series, identities: Series) -> Series:
    """Return the names, with the identity added where several things have one name."""
    several = identities.groupby(names).transform("nunique") > 1
    return names.where(~several, names + " (" + identities + ")")
