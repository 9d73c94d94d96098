"""Write the tables of README.md and docs/ from the raw figures in benchmarks/results/.

    python benchmarks/tables.py            # rewrite the tables, draw .github/images/*.png
    python benchmarks/tables.py --check    # write nothing; fail if a table is stale

A page has a table between two lines, `<!-- table: NAME (file: fields) -->` and `<!-- end -->`.
tables.txt specifies each table: its raw files, rows, columns and formats. `made` makes it. Here are
also the rows that are more than the records of a file.
"""

from __future__ import annotations

import csv
import json
import re
import string
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from math import exp, log
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_gguf_pairs import summary
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from pandas import DataFrame, read_csv
from scipy.optimize import nnls

from lib.commands import overlap
from lib.commands.compare.table import Figures
from lib.commands.report.pictures import heat_map
from lib.run.lm_eval import mcnemar
from lib.util.cli import make_parser, run
from lib.util.errors import UserError
from lib.util.markdown import padded_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
IMAGES = ROOT / ".github/images"
LOOP = re.compile(r"for ([\w, ]+) in (.+?): (.*)")
ENTRY = re.compile(r"(?m)^=== (.+?) \((.+)\)(?:, references: (\d+))?\n(.+)\n((?:.+\n)*)")
MARKED = re.compile(r"<!-- table: ([\w-]+)[^>]* -->\n(.*?)<!-- end -->", re.DOTALL)

Cell = str | float | tuple[float, float] | None
NAMES = {
    **{"uk": "Ukrainian", "en": "English", "de": "German", "pl": "Polish", "cs": "Czech"},
    **{"fr": "French", "el": "Greek", "tr": "Turkish", "ru": "Russian", "ja": "Japanese"},
    **{"zh-cn": "Chinese"},
}
TESTED = NAMES | {"hi": "Hindi"}
MIX = "+".join(f"{name}=0.1" for name in NAMES if name != "uk")
BOTH = "uk=0.5+en=0.5"
TABLES_OF = "tables_before", "tables"  # of a computed file
FILES_OF = {"llama": "llama.cpp", "ours": "langprune", "trimmed": "trimmed, llama.cpp"}
FILES_OF["compress"] = "trimmed and quantized by compress,"
FILES_OF["autoround"] = "AutoRound"


class Record(dict):
    """A record of a raw file; its fields are attributes, None where it has no such field."""

    __getattr__ = dict.get


class Table(NamedTuple):
    """An entry of tables.txt, which explains the parts."""

    name: str
    source: str
    references: int
    rows: str
    columns: str


def specified() -> dict[str, Table]:
    """Return the tables that tables.txt specifies, by name."""
    text = Path(__file__).with_suffix(".txt").read_text("utf-8")
    tables = (Table(*match.groups("0")) for match in ENTRY.finditer(text))
    return {table.name: table._replace(references=int(table.references)) for table in tables}


@cache
def raw(name: str) -> Any:
    """The content of a file of results; a row of a CSV file is a record, its numbers floats."""
    text = (RESULTS / name).read_text("utf-8")
    if name.endswith(".json"):
        return json.loads(text, object_hook=Record)

    def value(cell: str) -> str | float:
        try:
            return float(cell)
        except ValueError:
            return cell

    lines = csv.DictReader([*text.splitlines()])
    return [Record({key: value(cell) for key, cell in row.items()}) for row in lines]


def made(table: Table) -> str:
    """Return a table as Markdown."""
    records, head, columns = [*eval(table.rows)], {}, []
    for title, template, fields in columns_of(table.columns):
        (before, expression, form, _), *others = string.Formatter().parse(template)
        is_text = before or others
        head[title] = "" if is_text else form
        expression = f"f{template!r}" if is_text else expression
        columns.append([value(expression, Record(record, **fields)) for record in records])
        assert any(cell is not None for cell in columns[-1]), f"no figure for {title}"
    return grid(head, [*zip(*columns, strict=True)], table.references)


def columns_of(text: str, fields: Mapping[str, Any] = {}) -> Iterator[tuple[str, str, dict]]:
    """Yield title and cell of each column, and the fields that a loop gives it."""
    for line in text.splitlines():
        if loop := LOOP.fullmatch(line):
            names = loop[1].split(", ")
            for item in eval(loop[2]):
                items = item if len(names) > 1 else [item]
                yield from columns_of(loop[3], dict(zip(names, items, strict=True)))
            continue
        for part in filter(None, map(str.strip, line.split("|"))):
            title, _, cell = part.partition(" = ")
            title = eval(f"f{title!r}", globals(), fields) if fields else title
            yield from [(title, cell, fields)] if cell else columns_of(eval(part))


def value(expression: str, record: Record) -> Cell:
    """Return the value of an expression of the record's fields, None if it lacks one of them."""
    try:
        found = eval(expression, globals(), record)
    except (NameError, TypeError, IndexError):
        return None
    return None if callable(found) else found  # a function of the missing field's name


def grid(head: dict[str, str], rows: Sequence[Sequence[Cell]], references: int = 0) -> str:
    """Return a Markdown table; `head` has the format of each column's numbers.

    A pair is a value and its standard error. In a column whose header ends in an arrow the best
    value is bold; the first `references` rows, and texts, do not take part.
    """

    def text(cell: Cell, form: str) -> str:
        if isinstance(cell, tuple):
            return f"{text(cell[0], form)} ± {text(cell[1], form.lstrip('+'))}"
        if cell is None or isinstance(cell, str):
            return cell or ""
        return format(cell, ",.0f" if abs(cell) >= 1000 else form)

    lines = [[text(c, form) for c, form in zip(row, head.values(), strict=True)] for row in rows]
    for index, (title, form) in enumerate(head.items()):
        values = [row[index] for row in rows[references:]]
        values = [v[0] if isinstance(v, tuple) else v for v in values if v is not None]
        values = [value for value in values if not isinstance(value, str)]
        if title[-1] not in "↓↑" or not values:
            continue
        best = text((min if title.endswith("↓") else max)(values), form)
        for line in lines[references:]:
            if line[index].split(" ± ")[0] == best:
                line[index] = f"**{line[index]}**"
    return padded_table([*head], lines, left=2 if "Calibration text" in head else 1)


def product_of(**fields: Iterable[Any]) -> Iterator[Record]:
    """Yield a record for each combination of the values of several fields."""
    for values in product(*fields.values()):
        yield Record(zip(fields, values, strict=True))


def one(records: Iterable[Record], **fields: Any) -> Record:
    """The one record with these values."""
    (found,) = (record for record in records if fields.items() <= record.items())
    return found


def kl(test: Record) -> Cell:
    """KL with its standard error; None if it was not measured."""
    return (test.kl, test.kl_standard_error) if "kl" in test else None


def of_rounds(runs: list[list[float]]) -> tuple[float, float]:
    """The median seconds and the highest peak of some runs."""
    seconds, peaks = zip(*runs, strict=True)
    return median(seconds), max(peaks)


def packed_products() -> Iterator[Record]:
    """One product by each kind of packed weights, beside the dense one."""
    for each in raw("packed.json").products:
        dense, *others = each.seconds.items()
        for form, seconds in others:
            yield Record(each, form=form, dense=dense[1], packed=seconds)


def knowledge() -> Iterator[Record]:
    """Questions that each model answers right, and those won and lost beside the dense one."""
    models = raw("quality/knowledge.json")
    for model in models:
        pairs = {t: (models[0].right[t], right) for t, right in model.right.items()}
        changes = {t: "" if model is models[0] else mcnemar(*pair) for t, pair in pairs.items()}
        yield Record(model, changes=changes)


# rows of quantization and recovery

SHOWN = (  # by README: model, text, record of compare, type of langprune's
    ("SmolLM2-135M", "en", "types/compared-smollm2.json", "q5_0"),
    *(("Gemma 3 270M", text, "compare/gemma3.json", "q5_0") for text in ("uk", "pl", "hi", "en")),
)


def models() -> Iterator[Record]:
    """Files before and after trimming for Ukrainian, alone and with English."""
    english = {file.model: file.bytes for file in trimmed("uk+en")}
    speed = {(r["model"], r["name"]): r["generations"][1] for r in speeds("gguf-trim/speed.json")}
    for file in trimmed("uk"):
        fields = {"made": "measured", "before": file.bytes_before, "after": file.bytes}
        both = [speed.get((f"{file.model}, uk", name)) for name in ("trimmed", "whole")]
        faster = f"{both[0] / both[1]:.1f} times" if all(both) else ""
        fields |= {"english": english.get(file.model), "gpu": ""}
        yield Record(fields, model=file.model, rises=file.rises, faster=faster)
    for file in computed_sizes():
        if file.model not in ("Gemma 3 4B", "Gemma 4 E4B", "Qwen3 4B", "Qwen3 8B"):
            yield Record(file, made="computed", gpu=f"{file.card / 1e6:.0f}")


def best_files() -> Iterator[Record]:
    """A file of ours by model and text, and llama.cpp's of the lowest KL, at most 1% larger."""
    for model, text, name, kind in SHOWN:
        files = raw(name) if isinstance(raw(name), list) else [*files_of(name, text)]
        ours = one(files, label=kind)
        alike = [each for each in files if each.bytes < 1.01 * ours.bytes]
        best = min(theirs(alike), key=lambda each: each.tests[0].kl)
        same = [each for each in theirs(files) if each.tests[0].kl <= ours.tests[0].kl]
        least = min(same, key=lambda each: each.bytes, default=Record(bytes=None))
        yield Record(model=model, text=TESTED[text], type=kind, theirs=best, ours=ours, same=least)


def files_of(name: str, text: str) -> Iterator[Record]:
    """Files that `compare` measured on a text, calibrated on it or on none."""
    figures = Figures(raw(name))
    for label in figures.others:
        maker, kind, its = label.split("-")
        if its in (text, "none") and (maker, its) != ("ours", "none"):
            found, nats = figures.compared(label, text), figures.losses(label, text).sum()
            test = Record(kl=found["kl"]["mean"], perplexity=exp(nats / sum(found["tokens"])))
            shown = kind if maker == "ours" else f"{FILES_OF[maker]} {kind}"
            yield Record(label=shown, bytes=1e6 * figures.megabytes[label], tests=[test])


def theirs(files: Iterable[Record]) -> list[Record]:
    """Those of llama.cpp's types."""
    return [each for each in files if each.label.startswith("llama.cpp")]


def forms() -> Iterator[Record]:
    """Forms of SmolLM2 by size: llama.cpp's types, and what pruning and quantization give."""
    llama = [one(raw("types/feedback.json"), label=f"llama.cpp {k}") for k in ("q4_0", "q3_k_m")]
    files = [*llama, *raw("types/forms.json")]
    yield Record(name="16-bit", bytes=None, tests=[files[0].tests[0].dense])
    for each in sorted(files, key=lambda each: -each.bytes):
        yield Record(each, name=each.label)


def dialogues() -> list[Record]:
    records = raw("dialogues.json")
    dense = [test.dense for test in records[0].evaluation]
    return [Record(form="original, 16-bit", text="", evaluation=dense), *records]


def compared(name: str) -> Iterator[Record]:
    """Files beside their reference, by text: loss over it, KL, equal first tokens."""
    figures = Figures(raw(name))
    for label in figures.others:
        maker, kind, text = label.split("-")
        by = "no text" if text == "none" else text
        row = {"file": f"{FILES_OF[maker]} {kind}, {by}"}
        overs = {t: figures.over(label, figures.reference, t) for t in figures.texts}
        row["over"] = {t: points(interval) for t, interval in overs.items()}
        found = {t: figures.compared(label, t) for t in figures.texts}
        row |= {"kl": {t: each["kl"]["mean"] for t, each in found.items()}, "found": found}
        yield Record(row, megabytes=figures.megabytes[label])


def own_text(name: str) -> Iterator[Record]:
    """Files that were calibrated on text of the test language."""
    figures = Figures(raw(name))
    for test, label in product(figures.texts, figures.others):
        maker, kind, text = label.split("-")
        if text == test:
            over = points(figures.over(label, figures.reference, test))
            row = {"file": f"{FILES_OF[maker]} {kind}", "test": TESTED[test], "over": over}
            yield Record(row, found=figures.compared(label, test))


def of_texts(name: str) -> Iterator[Record]:
    """Files by type and test language, by the text on which they were calibrated."""
    figures = Figures(raw(name))
    kinds = dict.fromkeys(label.rpartition("-")[0] for label in figures.others)
    for kind, test in product(kinds, figures.texts):
        its = {by: f"{kind}-{by}" for by in ("none", "en", "mix")} | {"own": f"{kind}-{test}"}
        if {*its.values()} <= {*figures.others}:
            over = {by: figures.over(label, figures.reference, test) for by, label in its.items()}
            apart = {
                f"{one_} {other}": points(figures.over(its[one_], its[other], test))
                for one_, other in (("own", "en"), ("own", "mix"), ("en", "none"))
                if its[one_] != its[other]
            }
            maker, _, type_ = kind.partition("-")
            yield Record(
                file=f"{FILES_OF[maker]} {type_}",
                megabytes=figures.megabytes[its["own"]],
                test=TESTED[test],
                over={by: points(interval) for by, interval in over.items()},
                kl={by: figures.compared(label, test)["kl"]["mean"] for by, label in its.items()},
                apart=Record(apart),
            )


def no_grid() -> Iterator[Record]:
    for made_ in raw("types/no_grid.json"):
        if held := made_.held_out:
            yield Record(made_, **held, text="held-out", kl=held.kl_trained)
        yield Record(
            {"text": "test"} | made_, file=made_.dense.perplexity, trained=made_.perplexity
        )


def quantized(name: str) -> list[Record]:
    """Files of one model that were quantized and not trained, by size; without those of compress,
    which has its own windows."""
    every = sorted(raw(f"types/{name}.json"), key=lambda each: each.bytes)
    return [each for each in every if not re.search("--recover|^compress", each.label)]


def of_types(name: str) -> Iterator[Record]:
    files = quantized(name)
    yield Record(file="16-bit", bits=16.0, tests=[files[0].tests[0].dense])
    for file in files:
        types = sorted(file.types.items(), key=lambda each: -each[1][1])
        _, weights, size = map(sum, zip(*file.types.values(), strict=True))
        counts = ", ".join(f"{count} {kind}" for kind, (count, *_) in types)
        label = file.label.replace("auto --megabytes", "auto, MB:")
        yield Record(file, file=by_maker(label), bits=8 * size / weights, counts=counts)


def compared_types() -> Iterator[Record]:
    for each in sorted(raw("types/compared-smollm2.json"), key=lambda each: each.bytes):
        (test,) = each.tests
        more = test.bits_per_byte / test.dense.bits_per_byte - 1
        over = points([more, *test.over], digits=2)
        yield Record(each, file=by_maker(each.label), test=test, over=over, tail=test.kl_of_tokens)


def feedback() -> Iterator[Record]:
    """Files of one type by llama.cpp, by our solver without feedback of errors, and with it."""
    files = {each.label: each for each in raw("types/feedback.json")}
    for kind, its in (("q4_0", "q4_0"), ("iq4_nl",) * 2, ("q5_0",) * 2, ("q3_k", "q3_k_m")):
        rows = {f"llama.cpp {its}": "llama.cpp", f"{kind} no_feedback": "none", kind: "langprune"}
        for label, how in rows.items():
            yield Record(files[label], type=kind, how=how, test=files[label].tests[0])


def points(interval: Sequence[float], digits: int = 1) -> str:
    """A difference and its interval, in percent or percentage points."""
    mean_, low, high = (f"{100 * end:+.{digits}f}" for end in interval[:3])
    return f"{mean_} ({low} to {high})"


def by_maker(label: str) -> str:
    """The label of a file with its maker."""
    return label if label.startswith("llama.cpp") else f"langprune {label}"


def types_trained() -> Iterator[Record]:
    """Each file that was trained, beside the same before training."""
    names = {"smollm2": "SmolLM2-135M", "gemma3": "Gemma 3 270M", "bilingual": "bilingual model"}
    for name, model in names.items():
        files = {each.label: each.tests[0] for each in raw(f"types/{name}.json")}
        for label, trained in files.items():
            words, _, tokens = label.partition(" --recover ")
            if tokens:
                kind = words.replace("auto --megabytes", "auto, MB:")
                pair = {"before": files[words], "after": trained}
                yield Record(pair, model=model, type=kind, tokens=f"{int(tokens):,}")


def cpu_time() -> Iterator[Record]:
    """Seconds of a step with 16 windows; those of larger models grow as the measured ones do.

    A window costs in proportion to the weights, solving to the weights times the width of inputs.
    """

    def terms(model: Record, windows: int = 16) -> list[float]:
        return [model.weights * windows, model.weights * model.width]

    models = raw("cpu_time.json")
    measured, seconds = [model for model in models if model.steps], defaultdict(dict)
    for step in measured[0].steps:
        steps = [(model, model.steps[step]) for model in measured]
        relative = [[t / s.seconds for t in terms(m, s.windows)] for m, s in steps]
        factors, _ = nnls(relative, [1.0] * len(relative))
        for model in models:
            of_step = model.steps[step].seconds if model.steps else factors @ terms(model)
            seconds[model.model][step] = of_step
    for model in models:
        yield Record(
            model, made="measured" if model.steps else "computed", seconds=seconds[model.model]
        )


def cpu_pruned() -> Iterator[Record]:
    """Pruning to 50% on a CPU: seconds of the step, memory beside its plan, and the loss."""
    for model in raw("cpu_time.json"):
        steps = {name: s for name, s in (model.steps or {}).items() if s.evaluation}
        for dense in [step.evaluation.dense for step in steps.values()][:1]:
            yield Record(model=model.model, method="dense", evaluation=dense)
        for name, step in steps.items():
            yield Record(step, model=model.model, method=name)


def recovered(run: str, kind: str) -> Record:
    """Return a run on the bilingual model, `METHOD` or `METHOD, recovered`."""
    method, comma, _ = run.partition(", ")
    records = raw(f"quality/bilingual-{'recovered' if comma else 'methods'}.csv")
    fields = {"sparsity_type": "2:4" if kind == "2:4" else "unstructured"}
    fields |= {"sparsity_ratio": 0.7 if kind == "70%" else 0.5, "flags.allocation": "uniform"}
    return one(records, method=method, **fields if method != "dense" else {})


# rows of languages

METHODS = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "admm": "ADMM", "q4_0": "q4_0"}


@cache
def draws(name: str = "eleven") -> dict[str, dict[tuple[str, str], list[float]]]:
    """Increase in bits per byte, by method, then by calibration text and test language: a value for
    each seed. `name`: that of the test texts."""
    more: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    pruned = raw(f"languages/gemma3-270m-{name}.csv")
    dense = {row.measured_on: row.bits_per_byte for row in pruned if row.method == "dense"}
    for row in pruned:
        change = row.bits_per_byte - dense[row.measured_on]
        more[row.method][row.calibrated_on, row.measured_on].append(change)
    for row in raw("languages/gemma3-270m-q4_0.csv") if name == "eleven" else ():
        text = MIX if row.calibrated_on == "ten mixed" else row.calibrated_on
        change = row.bits_per_byte - row.dense_bits_per_byte
        more["q4_0"][text, row.measured_on].append(change)
    return more


def losses(name: str = "eleven") -> dict[str, dict[tuple[str, str], float]]:
    """The first draw of each."""
    return {
        method: {key: all_[0] for key, all_ in more.items()} for method, more in draws(name).items()
    }


def spread(method: str, text: str, language: str) -> str:
    """The mean of several draws, and their standard deviation."""
    values = draws()[method][text, language]
    assert len(values) > 1, "one draw has no deviation"
    return f"{mean(values):+.3f} ± {stdev(values):.3f}"


def beside_own(method: str, text: str, language: str) -> float:
    more = losses()[method]
    return more[text, language] / more[language, language]


def languages_first() -> Iterator[Record]:
    """What English text costs Ukrainian, and ten languages, by method."""
    for method, name in METHODS.items():
        form = "four bits (`q4_0`)" if method == "q4_0" else f"{name}, 50%"
        more = losses()[method]
        factors = [beside_own(method, "en", name) for name in NAMES if name != "en"]
        fields = {"own": more["uk", "uk"], "english": more["en", "uk"]}
        yield Record(fields, form=form, least=min(factors), most=max(factors))


def best_other(method: str, language: str) -> str:
    others = (name for name in NAMES if name != language)
    return min(others, key=lambda name: losses()[method][name, language])


def windows() -> Iterator[Record]:
    """Figures by the number of windows, from the least to the greatest of several draws."""
    runs = [run_ for run_ in raw("languages/bilingual-windows.csv") if run_.method != "dense"]
    for count in sorted({run_["flags.nsamples"] for run_ in runs}):
        ends: dict[str, Record] = defaultdict(Record)
        for method, (key, form) in product(
            ("wanda", "admm"), {"perplexity": ".2f", "kl": ".4f"}.items()
        ):
            same = [r for r in runs if (r.method, r["flags.nsamples"]) == (method, count)]
            found = [of_test(r, "uk")[key] for r in same]
            ends[method][key] = " to ".join(
                format(end, form) for end in sorted({min(found), max(found)})
            )
        yield Record(windows=count, ends=ends)


def overlaps(name: str) -> Iterator[Record]:
    lines = raw(name)
    for pair in dict.fromkeys((line.a, line.b) for line in lines):
        found = [line for line in lines if (line.a, line.b) == pair]
        yield Record(name=" and ".join(pair), lines=found, counted="both")
    yield Record(name="chance", lines=found, counted="chance")


def share(lines: Sequence[Record], counted: str, **part: Any) -> float:
    """The share of the weights kept by one mask, mean of two, that `counted` counts."""
    found = [line for line in lines if part.items() <= line.items()]
    return sum(each[counted] for each in found) / sum((x.kept_a + x.kept_b) / 2 for x in found)


# rows of pruning


RUNS = {  # (method, allocation): how a table names it, if not by its method
    ("wanda", "owl"): "wanda, OWL",
    ("MWanda", "uniform"): "M-Wanda, its score",
    ("MWanda", "owl"): "M-Wanda, score and ratios",
    ("MWanda", "reversed"): "M-Wanda, score and reversed ratios",
}


def two_languages(name: str) -> Iterator[Record]:
    """Runs by method and calibration text, measured on two languages."""
    runs: dict[tuple, Record] = defaultdict(Record)
    for each in raw(f"quality/{name}-seeds.csv"):
        text = each.calibrated_on.replace("none", "").replace("uk=0.5+en=0.5", "half of each")
        run = runs[text, RUNS.get((each.method, each.allocation), each.method)]
        several = (each.perplexity, each.perplexity_deviation)
        run[each.measured_on] = several if several[1] != "" else each.perplexity
    for (text, method), run in runs.items():
        yield Record(run, method=method, text=text)


def beside_wanda(model: str, text: str, form: str) -> Iterator[Record]:
    """A row for each method and pattern, with the paired difference of its loss to Wanda's.

    A figure has the standard error over windows, or the standard deviation of several seeds.
    """
    runs = raw(f"quality/{model}-baselines.csv")
    differences = raw(f"quality/{model}-baselines-differences.csv")
    methods = [("wanda", "uniform"), ("wanda", "owl")]
    methods += [(name, "uniform") for name in ("ria", "sparsegpt", "admm")]
    kinds = {"unstructured": "50%", "2:4": "2:4"}
    cases = [("dense", "uniform", "")]
    cases += [(*method, "unstructured") for method in methods]
    cases += [(method, rule, "2:4") for method, rule in methods if rule != "owl"]
    for method, rule, kind in cases:
        fields = {"method": method, "flags.allocation": rule, "sparsity_type": kind}
        tests = [of_test(run_, text) for run_ in runs if fields.items() <= run_.items()]
        row = Record(method=method + ", OWL" * (rule == "owl"), kind=kinds.get(kind, ""))
        row["perplexity"] = over_seeds([test.perplexity for test in tests])
        if kind:
            several = over_seeds([test.kl for test in tests])
            row["loss"] = several if len(tests) > 1 else kl(tests[0])
        same = {"method": method, "type": kinds.get(kind), "figure": "loss", "allocation": rule}
        for line in differences:
            if same.items() <= line.items():
                by, *ends = (format(line[n], f"+{form}") for n in ("difference", "low", "high"))
                mark = "" if line.significant == "True" else " (n.s.)"
                row["difference"] = f"{by} [{', '.join(ends)}]{mark}"
        yield row


def over_seeds(figures: Sequence[float]) -> Cell:
    """The figure of one run, or the mean of several with their standard deviation."""
    return (mean(figures), stdev(figures)) if len(figures) > 1 else figures[0]


def of_test(run: Record, name: str) -> Record:
    """The figures of one test text in a row of a report's CSV file."""
    return Record({k.removeprefix(f"evaluation.{name}."): value for k, value in run.items()})


def allocated(method: str, ratio: float, rule: str) -> Record:
    runs = raw("quality/bilingual-methods.csv")
    return one(runs, method=method, sparsity_ratio=ratio, **{"flags.allocation": rule})


def loaded(method: str, bits: str | float) -> Record:
    return one(raw("quality/bilingual-loaded.csv"), method=method, **{"flags.load_bit": bits})


# rows of neurons, experts, vocabularies, files


def by_text(name: str) -> Iterator[Record]:
    """Runs of a report's CSV file, with the text they were calibrated on."""
    for each in raw(name):
        text = (each["calibration.name"] or "").replace(BOTH, "half of each")
        tests = {t: of_test(each, t) for t in ("uk", "en")}
        yield Record(each, text="" if each.method in ("dense", "magnitude") else text, **tests)


def rise(test: Record) -> Cell:
    """Increase in bits per byte over the whole model, with its standard error."""
    bits = test.tokens / test.bytes / log(2)
    return test.loss_change * bits, test.loss_change_standard_error * bits


def experts_chosen() -> Iterator[Record]:
    runs: dict[tuple, Record] = defaultdict(Record)
    for each in by_text("experts.csv"):
        name = f"seed {each.seed:.0f}" if each.method == "random" else each.text
        runs[each.method, name][each.sparsity_ratio] = each
    del runs["dense", ""]
    for (method, name), shares in runs.items():
        yield Record(method=method, name=name, runs=shares)


def bits_cost(file: Record) -> str:
    """What longer tokens cost the original in percent, with an interval; "" by old measures."""
    if not file.excluded:
        return ""
    between = " ({:+.1f} to {:+.1f})".format(*(100 * end for end in file.cost_interval or (0, 0)))
    cost = 100 * (file.bits_per_byte_trimmed / file.bits_per_byte_original - 1)
    return f"{cost:+.1f}" + between * bool(file.cost_interval)


def gain(file: Record) -> str:
    """By how much excluding tokens lowers bits per byte, in percent."""
    return f"{100 * file.excluded:+.1f}" if file.excluded else ""


def computed_sizes() -> Iterator[Record]:
    """Files that were computed, without those that were measured too, as a check."""
    names = {file.model for file in raw("gguf-trim/measured.json")}
    for file in raw("gguf-trim/computed.json"):
        if file.model not in names:
            before, after = file.tables_before + file.blocks, file.tables + file.blocks
            yield Record(file, before=before, after=after)


def trimmed(text: str = "", name: str = "measured") -> list[Record]:
    """Files that were trimmed, for one text or for all, by size."""
    files = [file for file in raw(f"gguf-trim/{name}.json") if text in ("", file.text)]
    for file in files:
        texts = [test for test in file.tests if test.name in file.text.split("+")]
        file["rises"] = ", ".join(f"{100 * test.rise:+.2f}" for test in texts)
    return sorted(files, key=lambda file: (file.bytes_before, file.rows))


def embedder_sizes() -> Iterator[Record]:
    seen = set()
    for each in raw("embedders.json"):
        if each.tool == "langprune":
            before, after = each.sentences_per_second or (None, None)
            if each.model not in seen:
                yield Record(each.before, model=each.model, kept="original", speed=before)
            seen.add(each.model)
            kept = f"{' + '.join(each.data)}, {each.tool}"
            yield Record(each.after, model=each.model, kept=kept, speed=after)


def stays(retrieval: Record, name: str, count: str) -> str:
    """The share of results that stay, in percent with its interval."""
    share, low, high = (100 * value for value in retrieval[name][count])
    return f"{share:.1f} ({low:.1f} to {high:.1f})"


def speeds(file: str) -> Iterator[Record]:
    """Tokens/s of files in llama.cpp, by text and threads."""
    runs = raw(file)
    for model, name in dict.fromkeys((r.model, r.name) for r in runs):
        mine = [r for r in runs if (r.model, r.name) == (model, name)]
        for text in mine[0].timings:
            found = [summary([r for r in mine if r.threads == n], text) for n in ("1", "2")]
            prompts, generations, (taken, *_), (drafted, *_), memory = zip(*found, strict=True)
            accepted = f"{taken} of {drafted}" if drafted else ""
            row = Record(model=model, name=name, text=text, accepted=accepted, memory=max(memory))
            yield row | {"prompts": prompts, "generations": generations}


def language_confusion() -> Iterator[Record]:
    names = {"line": "all lines", "word": "no English word", "native": "no foreign letter"}
    for language, figures in raw("language-confusion.json").languages.items():
        for name, right in names.items():
            if figures[name].pairs:
                yield Record(figures[name], language=language, right=right)


# columns that several tables share

TOP1 = "Top-1 agreement ↑ = {tests[0].top1_agreement:.1%}"
BARS = {
    "wanda": "Gemma 3 270M pruned to 50% by Wanda; lower is better",
    "admm": "Pruned to 50% by ADMM",
    "q4_0": "In four bits (q4_0)",
}
TYPES = """
File = {file} | Size (MB) = {bytes / 1e6:.1f} | Bits per weight = {bits:.2f} | Tensors = {counts}
measured(error=True, form=".4f") | TOP1"""

SPEEDS = """
for n in (1, 2): Prompt, {n} thread{"s" * (n > 1)} = {prompts[n - 1]:.1f}
for n in (1, 2): Generation, {n} thread{"s" * (n > 1)} = {generations[n - 1]:.1f}"""


def measured(text: str = "", arrow: str = " ↓", error: bool = False, form: str = ".3f") -> str:
    """Columns for bits per byte and KL of the first test text, or of the second, named `text`."""
    test, comma = ("tests[1]", ", ") if text else ("tests[0]", "")
    bits, value = "bits" if text else "Bits", f"kl({test})" if error else f"{test}.kl"
    columns = f"{text}{comma}{bits} per byte{arrow} = {{{test}.bits_per_byte:.4f}}"
    return f"{columns} | {text}{comma}KL (nats/token){arrow} = {{{value}:{form}}}"


def answers(text: str, place: int) -> str:
    """Columns for a test text of dialogues."""
    test = f"evaluation[{place}]"
    return f"""
{text}, bits per byte ↓ = {{{test}.bits_per_byte:.4f}} | {text}, KL ↓ = {{kl({test}):.4f}}
{text}, loss increase ↓ = {{{test}.loss_change:+.3f}}
{text}, top-1 ↑ = {{{test}.top1_agreement:.1%}}"""


# pictures

BLUE, ORANGE, GRAY = "#1b6ca8", "#c8551b", "#555555"
KL_TITLE = "KL from the 16-bit model (nats/token)\nlower is better"
MAKERS = {"langprune": (BLUE, "o"), "llama.cpp": (ORANGE, "s")}
# text of a label, and its place beside the point, in points
TYPE_LABELS = {
    "smollm2": {
        "llama.cpp iq3_xxs": ("iq3_xxs", (-9, 0), "right"),
        "llama.cpp iq4_xs": ("iq4_xs", (-9, 0), "right"),
        "llama.cpp iq4_nl": ("iq4_nl", (0, -11), "center"),
        "q4_0": ("q4_0", (9, 0), "left"),
        "auto --megabytes 92": ("auto, 92 MB", (-9, 0), "right"),
        "auto --megabytes 97.5": ("auto, 97.5 MB", (7, 5), "left"),
        "q5_0_embedding_q5_0": ("q5_0, embedding too", (-7, -7), "right"),
        "iq4_nl_embedding_q5_0": ("iq4_nl, embedding q5_0", (0, 10), "center"),
    },
    "gemma3": {
        "llama.cpp iq3_xxs": ("iq3_xxs", (-9, 0), "right"),
        "llama.cpp iq4_xs": ("iq4_xs", (-9, 0), "right"),
        "llama.cpp q4_k_m": ("q4_k_m", (0, 10), "center"),
        "q4_0": ("q4_0", (9, 2), "left"),
        "auto --megabytes 70": ("auto, 70 MB", (-9, 5), "right"),
        "iq4_nl": ("iq4_nl", (-9, -6), "right"),
        "auto --megabytes 76": ("auto, 76 MB", (-9, 0), "right"),
        "q5_0_embedding_q5_0": ("q5_0, embedding too", (9, -2), "left"),
        "iq4_nl_embedding_q5_0": ("iq4_nl, embedding q5_0", (-9, 0), "right"),
    },
}


def axes_of(*size: float) -> Axes:
    """Return the axes of a new picture, width and height in inches."""
    return Figure(figsize=size, layout="constrained").add_subplot()


def finish(axes: Axes, title: str, legend: str = "", grid: bool = True, **settings: Any) -> Figure:
    """Set what all pictures share, and return the picture."""
    axes.set(**settings)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(alpha=0.25)
    if legend:
        axes.legend(loc=legend, frameon=False)
    return axes.figure


def label(axes: Axes, point: tuple, text: str, place: tuple, side: str, **look: Any) -> None:
    axes.annotate(text, point, place, textcoords="offset points", ha=side, **look)


def draw_types() -> Figure:
    """Size against KL of models on no grid, on a logarithmic scale."""
    titles = {
        "smollm2": ("SmolLM2-135M, English (16-bit: 270 MB)", (71, 151)),
        "gemma3": ("Gemma 3 270M, Ukrainian, trimmed (16-bit: 224 MB)", (41, 126)),
    }
    figure = Figure(figsize=(7.2, 8.0), layout="constrained")
    for axes, (model, (title, ends)) in zip(figure.subplots(2, 1), titles.items(), strict=True):
        for file in quantized(model):
            is_theirs = file.label.startswith("llama.cpp")
            color, marker = MAKERS["llama.cpp" if is_theirs else "langprune"]
            point = file.bytes / 1e6, file.tests[0].kl
            axes.plot(*point, marker, color=color)
            beside = ((9, 0), "left") if is_theirs else ((-9, 0), "right")
            words = TYPE_LABELS[model].get(file.label, (file.label.split()[-1], *beside))
            label(axes, point, *words, color=color, va="center", fontsize=9)
        for name, (color, marker) in MAKERS.items():
            axes.plot([], [], marker, color=color, label=name)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        words = {"xlabel": "Size of the GGUF file (MB)", "ylabel": KL_TITLE}
        finish(axes, title, "upper right", xlim=ends, **words)
    return figure


def draw_bars() -> Figure:
    """Loss by pruning and 4 bits in each language, calibrated on English and on its own text."""
    others = [name for name in NAMES if name != "en"]
    figure = Figure(figsize=(8.4, 7.2), layout="constrained")
    panels = zip(figure.subplots(len(BARS), 1, sharex=True), BARS.items(), strict=True)
    looks = {"en": ("calibrated on English", "#b0b0b0", -0.2)}
    looks["own"] = "calibrated on the language itself", BLUE, 0.2
    for axes, (method, title) in panels:
        more = losses()[method]
        for text, (words, color, side) in looks.items():
            heights = [more[text if text == "en" else name, name] for name in others]
            places = [place + side for place in range(len(others))]
            axes.bar(places, heights, 0.38, 0, color=color, label=words)
        for place, name in enumerate(others):
            high = more["en", name]
            words = f"{high / more[name, name]:.1f}×"
            axes.annotate(words, (place - 0.2, high), (0, 2), "data", "offset points", ha="center")
        axes.set_xticks(range(len(others)), [NAMES[name] for name in others], fontsize=9)
        axes.tick_params(axis="x", length=0)
        axes.margins(y=0.15)
        finish(axes, title, grid=False, ylabel="More bits per byte")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, ncols=2, loc="outside lower center")
    return figure


def draw_parts() -> Figure:
    """What GGUF files are made of before and after trimming for Ukrainian, in shares of before."""
    measured = [(file.model, file.parts_before, file.parts) for file in trimmed("uk")]
    computed = [
        (f"{file.model}*", *({"tables": file[name], "blocks": file.blocks} for name in TABLES_OF))
        for file in computed_sizes()
    ]
    files = [*measured, *computed]
    axes = axes_of(7.2, 0.9 + 0.5 * len(files))
    looks = {"tables": (ORANGE, "embedding matrices and head"), "blocks": (BLUE, "blocks")}
    looks["rest"] = "#8a8a8a", "rest"
    for place, (_, *both) in enumerate(files):
        for sizes, at, solid in zip(both, (place - 0.19, place + 0.19), (0.5, 1), strict=True):
            left, whole = 0.0, sum(both[0].get(part, 0) for part in looks)
            for part, (color, _) in looks.items():
                share = 100 * sizes.get(part, 0) / whole
                axes.barh(at, share, 0.36, left, color=color, alpha=solid)
                left += share
            size = sum(sizes.get(part, 0) for part in looks) / 1e6
            text = f"{size:,.0f} MB" if size < 1000 else f"{size / 1000:.2f} GB"
            axes.text(left + 1, at, text, va="center", fontsize=8)
    handles = [axes.barh(0, 0, color=color, label=words) for color, words in looks.values()]
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    axes.set_yticks(range(len(files)), [name for name, *_ in files])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    words = {"xlabel": "Share of the whole file (%), before (pale) and after", "xlim": (0, 112)}
    return finish(axes, "q4_k_m files trimmed for Ukrainian (* computed)", grid=False, **words)


def draw_experts() -> Figure:
    """Of the tokens that reach each expert, those in Ukrainian, if both languages have as many."""
    blocks = zip(*(raw("experts.json")[text] for text in ("uk", "en")), strict=True)
    shares = [
        sorted((100 * uk / (uk + en) for uk, en in zip(*both, strict=True)), reverse=True)
        for both in blocks
    ]
    axes = axes_of(7.6, 4.0)
    cells = DataFrame(shares, columns=range(1, len(shares[0]) + 1))
    heat_map(axes, cells, Normalize(0, 100), ".0f")
    axes.set(xlabel="Expert, sorted in each block", ylabel="Block")
    title = "Ukrainian tokens of each expert (%), of equal numbers of Ukrainian and English tokens"
    axes.set_title(title, loc="left", fontsize=9.5)
    return axes.figure


def draw_map(method: str, title: str) -> Figure:
    """Losses by calibration text (rows) and test language (columns), on a logarithmic scale."""
    more, texts = losses()[method], NAMES | {MIX: "mix of ten"}
    cells = [[more[text, language] for language in NAMES] for text in texts]
    frame = DataFrame(cells, index=[*texts.values()], columns=[*NAMES])
    axes = axes_of(7.6, 5.0)
    norm = LogNorm(frame.min(axis=None) / 1.3, frame.max(axis=None))
    heat_map(axes, frame, norm, ".3f" if method == "q4_0" else ".2f", "YlOrRd")
    axes.set(xlabel="Test language", ylabel="Calibration text")
    axes.set_title(f"Increase in bits per byte after {title}\nlower is better", fontsize=11)
    return axes.figure


def pictures() -> Iterator[tuple[str, Figure]]:
    yield "size-types", draw_types()
    yield "gguf-parts", draw_parts()
    yield "own-language", draw_bars()
    yield "experts", draw_experts()
    yield "overlap", overlap.draw(read_csv(RESULTS / "languages/bilingual-overlap.csv"))
    yield "eleven-languages", draw_map("wanda", "pruning to 50% by Wanda")
    yield "eleven-languages-admm", draw_map("admm", "pruning to 50% by ADMM")
    yield "eleven-languages-rounded", draw_map("q4_0", "4-bit quantization (q4_0)")


def filled(text: str) -> str:
    """Return the text of a page with all its tables made again."""

    tables = specified()

    def again(found: re.Match[str]) -> str:
        if found[1] not in tables:
            raise UserError(f"table {found[1]}", "benchmarks/tables.py does not specify it", "")
        table = tables[found[1]]
        return f"<!-- table: {found[1]} ({table.source}) -->\n{made(table)}\n<!-- end -->"

    return MARKED.sub(again, text)


def main(argv: list[str]) -> None:
    parser = make_parser("tables", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one is stale")
    check = parser.parse_args(argv).check
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    stale = [page for page in pages if filled(text := page.read_text("utf-8")) != text]
    names = " ".join(str(page.relative_to(ROOT)) for page in stale)
    if check and stale:
        raise UserError(names, "a table is stale", "Run python benchmarks/tables.py")
    if not check:
        for page in stale:
            page.write_text(filled(page.read_text("utf-8")), "utf-8")
        for name, figure in pictures():
            figure.savefig(IMAGES / f"{name}.png", dpi=150, metadata={"Software": None})
        print(f"written: {names or 'no page'}, and the pictures in .github/images")


if __name__ == "__main__":
    sys.exit(run(main))
