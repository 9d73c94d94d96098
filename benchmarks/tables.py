"""Write the tables of README.md and docs/ from the raw figures in benchmarks/results/.

    python benchmarks/tables.py            # rewrite the tables, draw .github/images/*.png
    python benchmarks/tables.py --check    # write nothing; fail if a table is stale

A page has a table between two lines, `<!-- table: NAME (file: fields) -->` and `<!-- end -->`.
NAME is a key of TABLES: a function with `-` in place of `_`, or a name given beside it.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_gguf_pairs import summary
from pandas import read_csv
from scipy.optimize import nnls

from lib.commands import overlap
from lib.commands.report.pictures import heat_map
from lib.util.cli import make_parser, run
from lib.util.errors import UserError
from lib.util.markdown import padded_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
IMAGES = ROOT / ".github/images"
TABLES: dict[str, tuple[str, Callable[[], str]]] = {}  # source and maker, by name
MARKED = re.compile(r"<!-- table: ([\w-]+)[^>]* -->\n(.*?)<!-- end -->", re.DOTALL)

Cell = str | float | tuple[float, float] | None
MEGABYTES, BITS, KL = "Size (MB)", "Bits per byte ↓", "KL (nats/token) ↓"
PROSE = {"Other prose, bits per byte ↓": ".4f", "Other prose, KL (nats/token) ↓": ".3f"}
ESSAYS = {name.replace("Other prose", "Essays"): form for name, form in PROSE.items()}
FORMS = {"Model": "", MEGABYTES: ".0f", BITS: ".4f", KL: ".3f"}
NAMES = {
    **{"uk": "Ukrainian", "en": "English", "de": "German", "pl": "Polish", "cs": "Czech"},
    **{"fr": "French", "el": "Greek", "tr": "Turkish", "ru": "Russian", "ja": "Japanese"},
    **{"zh-cn": "Chinese"},
}
MIX = "+".join(f"{name}=0.1" for name in NAMES if name != "uk")
BOTH = "uk=0.5+en=0.5"
PARTS = "parts_before", "parts"  # of a GGUF file, before and after trimming
TABLES_OF = "tables_before", "tables"  # of a computed file
SMOLLM2, QWEN = "frontier/smollm2.json", "frontier/qwen2.5-coder-rounded.json"
OURS = {  # {model: raw file, label of the file that README shows}
    "SmolLM2-135M": ("smollm2", "q5_0"),
    "Gemma 3 270M": ("gemma3", "q5_0"),
    "Qwen2.5-Coder 0.5B": ("qwen05", "auto --megabytes 322"),
    "Qwen2.5-Coder 1.5B": ("qwen15", "auto --megabytes 861.2"),
}
QWEN_NAMES = {  # names of rows by models of the raw file
    "trimmed, 16 bits": "trimmed, 16-bit",
    "llama.cpp, q4_k_m, importance matrix": "llama.cpp q4_k_m (the source's type)",
    "llama.cpp, q4_0, importance matrix": "llama.cpp q4_0",
    "rounded to q4_0 here, 32 windows": "langprune q4_0",
}
MAPS = {  # pictures of losses by calibration text: method and title
    "eleven-languages": ("wanda", "pruning to 50% by Wanda"),
    "eleven-languages-admm": ("admm", "pruning to 50% by ADMM"),
    "eleven-languages-rounded": ("q4_0", "4-bit quantization (q4_0)"),
}


def raw(name: str) -> Any:
    """The content of a file of results; a row of a CSV file is a dict, its numbers floats."""
    text = (RESULTS / name).read_text("utf-8")
    if name.endswith(".json"):
        return json.loads(text)

    def value(cell: str) -> str | float:
        try:
            return float(cell)
        except ValueError:
            return cell

    return [
        {key: value(cell) for key, cell in row.items()}
        for row in csv.DictReader([*text.splitlines()])
    ]


def table(source: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a function that makes a table; `source` names the file and its fields."""

    def register(make: Callable[[], str]) -> Callable[[], str]:
        TABLES[make.__name__.replace("_", "-")] = source, make
        return make

    return register


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


def one(records: Sequence[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """The one record with these values."""
    (found,) = [r for r in records if fields.items() <= r.items()]
    return found


def measures(*tests: dict[str, Any], error: bool = False, agreement: bool = False) -> list[Cell]:
    """Bits per byte and KL of each test text, the latter with its standard error if asked for."""
    cells: list[Cell] = []
    for test in tests:
        pair = error and "kl" in test
        kl = (test["kl"], test["kl_standard_error"]) if pair else test.get("kl")
        cells += [test.get("bits_per_byte"), kl]
        cells += [test.get("top1_agreement")] if agreement else []
    return cells


# quantization and recovery


def gemma() -> dict[str, tuple[float, dict[str, Any], dict[str, Any]]]:
    """Every form of Gemma 3 270M for Ukrainian: MB, the records of the in-domain and other text."""
    trained = raw("frontier/gemma3-270m-trained.json")
    shapes = raw("frontier/gemma3-270m.json")
    first = raw("frontier/gemma3-270m-rounded-first.json")
    llama = raw("frontier/gemma3-270m-llama-cpp.json")
    here = raw("frontier/gemma3-270m-rounded-128.json")
    neurons = raw("frontier/gemma3-270m-neurons-rounded.json")
    zeros = one(raw("frontier/gemma3-270m-zeros-rounded.json"), of_the_rule="whole")
    size = {record["label"]: record["bytes"] / 1e6 for record in trained}
    trimmed = [one(first, label="trimmed", text=text) for text in ("test", "prose")]
    forms = {
        "original, 16-bit": (size["untouched"], one(trained, label="untouched"), {}),
        "trimmed, 16-bit": (one(shapes, stage="dense")["size"] / 1e6, *trimmed),
        "trained equally, 16-bit": (size["trained"], one(trained, label="trained"), {}),
    }
    for name in ("q4_k_m", "q3_k_m", "q4_0"):
        texts = [one(llama, label=f"trimmed {name}", name=text) for text in ("uk", "prose")]
        source = " (the source's type)" * (name == "q4_k_m")
        forms[f"llama.cpp {name}{source}"] = (one(shapes, stage=name)["size"] / 1e6, *texts)
    forms["langprune q4_0"] = (size["q4_0"], *here["rounded"])
    forms["langprune q4_0, trained"] = (size["q4_0"], *here["evaluation"])
    removed = "25% of the neurons removed, q4_0, trained"
    forms[removed] = (size["neurons 25%, q4_0"], *neurons["evaluation"])
    packed = "50% of the weights pruned, packed int4, trained"
    forms[packed] = (size["50% zeros"], *zeros["evaluation"])
    return forms


GEMMA = "frontier/gemma3-270m-{trained,llama-cpp,rounded-128,rounded-first}.json: bits_per_byte, kl"


@table("gguf-trim/{measured,computed}.json, types/{smollm2,gemma3,qwen*}.json: bytes, kl")
def models() -> str:
    """What trimming for Ukrainian, and bits chosen by text, give for each model."""
    types = {}
    for model, (name, label) in OURS.items():
        files = {each["label"]: each for each in raw(f"types/{name}.json")}
        ours = files[label]
        alike = [each for each in files.values() if each["bytes"] < 1.01 * ours["bytes"]]
        theirs = [each for each in alike if each["label"].startswith("llama.cpp")]
        best = min(theirs, key=lambda each: each["tests"][0]["kl"])
        types[model] = f"{label.split()[0]} ({best['label'].split()[1]})", best, ours

    def row(name: str, share: float | None, sizes: Sequence[float], made: str) -> list[Cell]:
        kind, *both = types.get(name, ("", None, None))
        kl = [each["tests"][0]["kl"] if each else None for each in both]
        change = sizes[1] / sizes[0] - 1 if len(sizes) == 2 else None
        trimmed = sizes[1] / 1e6 if len(sizes) == 2 else None
        return [name, made, share, sizes[0] / 1e6, trimmed, change, kind, *kl]

    size = one(raw("types/smollm2.json"), label="llama.cpp q4_k_m")["bytes"]
    rows = [row("SmolLM2-135M", None, [size], "measured")]
    files = [file for file in raw("gguf-trim/measured.json") if file["text"] == "uk"]
    for file in sorted(files, key=lambda file: file["bytes_before"]):
        share = file["parts_before"]["tables"] / file["bytes_before"]
        rows.append(row(file["model"], share, [file["bytes_before"], file["bytes"]], "measured"))
    for model in computed_sizes():
        if model["model"] in ("Gemma 3 4B", "Qwen3 8B", "Llama 3.1 8B"):
            sizes = [model[name] + model["blocks"] for name in TABLES_OF]
            rows.append(row(model["model"], model[TABLES_OF[0]] / sizes[0], sizes, "computed"))
    head = {"Model": "", "Sizes": "", "Vocabulary": ".0%", "File (MB)": ".0f"}
    head |= {"Trimmed (MB)": ".0f", "Change": ".0%", "Type": ""}
    return grid(head | dict.fromkeys(["KL, llama.cpp", "KL, langprune"], ".3f"), rows)


@table(GEMMA.replace("rounded-first", "rounded-first,neurons-rounded,zeros-rounded"))
def gemma_forms() -> str:
    rows = [[name, size, *measures(*tests)] for name, (size, *tests) in gemma().items()]
    return grid(FORMS | PROSE, rows, references=4)


@table("frontier/{gemma3-270m,smollm2}-trained.json, frontier/*-rounded*.json: bits_per_byte, kl")
def trained_first() -> str:
    """Trained in 16 bits, then quantized by llama.cpp, beside training of the quantized model."""
    files = {"Gemma 3 270M": "gemma3-270m-trained", "SmolLM2-135M": "smollm2-trained"}
    rows: list[list[Cell]] = []
    for model, ours in forms_trained().items():
        records = raw(f"frontier/{files[model]}.json")
        for name in ("", " q8_0", " q4_k_m", " q3_k_m", " q4_0"):
            record = one(records, label=f"trained{name}")
            half = 2 if not name and model == "SmolLM2-135M" else 1  # it was saved in float32
            form = f"then llama.cpp{name}" if name else "16-bit"
            size = record["bytes"] / half / 1e6
            rows.append([model, f"trained, {form}", size, *measures(record)])
        rows.append([model, "langprune q4_0, trained", *ours])
    head = {"Model": "", "Order": "", MEGABYTES: ".0f", "Bits per byte": ".4f"}
    return grid(head | {"KL (nats/token)": ".3f"}, rows)


def forms_trained() -> dict[str, list[Cell]]:
    """Size, bits per byte and KL of the models that were quantized on text and then trained."""
    size, test, _ = gemma()["langprune q4_0, trained"]
    smollm2 = one(
        raw("frontier/smollm2-rounded.json"),
        label="rounded and trained by 32,768 tokens",
        name="en",
    )
    return {"Gemma 3 270M": [size, *measures(test)], "SmolLM2-135M": ["90", *measures(smollm2)]}


@table("iq4_nl.json, frontier/gemma3-270m-rounded-128.json: perplexity, kl, top1_agreement")
def iq4_nl() -> str:
    q4_0, here = raw("frontier/gemma3-270m-rounded-128.json")["evaluation"][0], raw("iq4_nl.json")
    trained = {"form": "langprune q4_0", "windows": 128, "tokens": 131072, "tests": [q4_0]}
    untrained = trained | {"tokens": None, "tests": [q4_0["before"]]}
    return of_windows([*here["rows"], trained, untrained], "Other prose, KL (nats/token) ↓")


@table("iq4_nl.json, frontier/gemma3-270m-{llama-cpp,rounded-128}.json: perplexity, kl")
def iq4_nl_main() -> str:
    records, head = raw("iq4_nl.json")["rows"], {"Model": "", "Perplexity ↓": ".2f", KL: ".3f"}
    before = raw("frontier/gemma3-270m-rounded-128.json")["evaluation"][0]["before"]
    theirs = one(raw("frontier/gemma3-270m-llama-cpp.json"), label="trimmed q4_0", name="uk")
    ours = {"form": "langprune iq4_nl", "windows": 128}
    tests = {
        "llama.cpp q4_0": theirs,
        "llama.cpp iq4_nl": one(records, form="llama.cpp iq4_nl")["tests"][0],
        "langprune q4_0": before,
        "langprune iq4_nl": one(records, **ours, tokens=None)["tests"][0],
        "langprune iq4_nl, trained": one(records, **ours, tokens=131072)["tests"][0],
    }
    rows = [
        [name, test.get("compared_perplexity", test["perplexity"]), test["kl"]]
        + [test["top1_agreement"]]
        for name, test in tests.items()
    ]
    return grid(head | {"Top-1 agreement ↑": ".1%"}, rows)


def of_windows(records: Sequence[dict[str, Any]], *prose: str) -> str:
    """Models by windows and tokens: perplexity, KL and agreement on one text, KL on others."""
    dense = next(test for r in records for test in r["tests"][:1] if "dense_perplexity" in test)
    rows = [["trimmed, 16-bit", None, None, dense["dense_perplexity"], *(2 + len(prose)) * [None]]]
    order = "llama.cpp q4_k_m", "llama.cpp iq4_nl", "langprune q4_0", "langprune iq4_nl"
    variants = "half the rate", "twice the rate", "cross-entropy 0.25"
    order += *(f"langprune iq4_nl, {one}" for one in variants), "25% of the neurons removed, iq4_nl"

    def place(record: dict[str, Any]) -> tuple[bool, int, int, int]:
        tokens = record["tokens"] or 0
        return tokens > 0, order.index(record["form"]), record["windows"] or 0, tokens

    for record in sorted(records, key=place):
        test, *others = record["tests"]
        perplexity = test.get("compared_perplexity", test["perplexity"])
        figures = [perplexity, test["kl"], test["top1_agreement"]]
        figures += [one["kl"] for one in others] or [None] * len(prose)
        form = record["form"].replace("q4_k_m", "q4_k_m (the source's type)")
        rows.append([form, record["windows"], record["tokens"], *figures])
    head = {"Model": "", "Calibration windows": "", "Training tokens": ",", "Perplexity ↓": ".2f"}
    head |= {KL: ".4f", "Top-1 agreement ↑": ".1%"} | dict.fromkeys(prose, ".4f")
    return grid(head, rows, references=1 + ("(" in rows[1][0]))


def of_formats(model: str, dense: str, *texts: str) -> str:
    """Bits per byte and KL of a model's formats on some texts."""
    records = raw("iq4_nl.json")[model]
    rows: list[list[Cell]] = [[dense], *([record["form"]] for record in records)]
    for number in range(len(texts)):
        rows[0] += [records[0]["tests"][number]["dense_bits_per_byte"], None]
        for row, record in zip(rows[1:], records, strict=True):
            row += measures(record["tests"][number], error=True)
    head = [f"{text}, {name} ↓" for text in texts for name in ("bits per byte", "KL")]
    return grid({"Model": ""} | dict.fromkeys(head, ".4f"), rows, references=1)


@table("dialogues.json: evaluation: bits_per_byte, kl, loss_change, top1_agreement")
def dialogues() -> str:
    records = raw("dialogues.json")
    rows: list[list[Cell]] = [["original, 16-bit", ""]]
    for test in records[0]["evaluation"]:
        rows[0] += [test["dense"]["bits_per_byte"], None, None, None]
    for record in records:
        rows.append([record["form"], record["text"]])
        for test in record["evaluation"]:
            rows[-1] += [*measures(test, error=True), test["loss_change"], test["top1_agreement"]]
    head = {"Model": "", "Calibration text": ""}
    for text in ("Answers", "English"):
        head |= {f"{text}, bits per byte ↓": ".4f", f"{text}, KL ↓": ".4f"}
        head |= {f"{text}, loss increase ↓": "+.3f", f"{text}, top-1 ↑": ".1%"}
    return grid(head, rows, references=1)


@table("iq4_nl.json: qwen: bits_per_byte, kl")
def iq4_nl_qwen() -> str:
    return of_formats("qwen", "trimmed, 16-bit", "English")


@table("iq4_nl.json: speed: median of tokens_per_second")
def iq4_nl_speed() -> str:
    records, rows = raw("iq4_nl.json")["speed"], []
    for name in ("q4_0", "iq4_nl", "q4_k_m", "q8_0"):
        found = [
            one(records, type=name, of=of, threads=threads)
            for of in ("prompt", "generation")
            for threads in (1, 2)
        ]
        rows.append([name, found[0]["bytes"] / 1e6, *(record["median"] for record in found)])
    names = [f"{of}, {n} ↑" for of in ("Prompt", "Generation") for n in ("1 thread", "2 threads")]
    return grid({"Type": "", MEGABYTES: ".0f"} | dict.fromkeys(names, ".0f"), rows)


@table("iq4_nl.json: sixteen: bits_per_byte, kl, top1_agreement")
def iq4_nl_16() -> str:
    rows = [
        [one["form"], *measures(one, error=True, agreement=True)]
        for one in raw("iq4_nl.json")["sixteen"]
    ]
    return grid({"Format": "", BITS: ".4f", KL: ".4f", "Top-1 agreement ↑": ".1%"}, rows)


@table("iq4_nl.json: first_24: perplexity, kl, top1_agreement")
def iq4_nl_24() -> str:
    return of_windows(raw("iq4_nl.json")["first_24"])


@table("types/no_grid.json: tokens, held_out, perplexity, kl")
def no_grid() -> str:
    rows: list[list[Cell]] = []
    for made in raw("types/no_grid.json"):
        held, tokens = made["held_out"], f"{made['tokens']:,}"
        figures = [held[name] for name in ("file", "noise", "trained", "kl_trained")]
        rows.append([made["model"], made["source"], tokens, "held-out", *figures])
        figures = [made["dense"]["perplexity"], None, made["perplexity"], made["kl"]]
        rows.append([made["model"], made["source"], tokens, "test", *figures])
    head = dict.fromkeys(["Model", "Type of the file", "Training tokens", "Text"], "")
    head |= dict.fromkeys(["Perplexity of the file", "With noise", "Trained"], ".2f")
    return grid(head | {"KL from the file (nats/token)": ".3f"}, rows)


def quantized(name: str) -> list[dict[str, Any]]:
    """Files of one model that were quantized and not trained, by size; without those of compress,
    which has its own windows."""
    every = sorted(raw(f"types/{name}.json"), key=lambda each: each["bytes"])
    return [each for each in every if not re.search("--recover|^compress", each["label"])]


def of_types(name: str) -> str:
    rows: list[list[Cell]] = []
    for file in quantized(name):
        types = sorted(file["types"].items(), key=lambda each: -each[1][1])
        counts = ", ".join(f"{count} {kind}" for kind, (count, *_) in types)
        _, weights, size = map(sum, zip(*file["types"].values(), strict=True))
        words, (test,) = file["label"].replace("auto --megabytes", "auto, MB:"), file["tests"]
        named = words if words.startswith("llama.cpp") else f"langprune {words}"
        figures = measures(test, error=True, agreement=True)
        rows.append([named, file["bytes"] / 1e6, 8 * size / weights, counts, *figures])
    first = ["16-bit", None, 16.0, "", test["dense"]["bits_per_byte"], None, None]
    head = {"File": "", MEGABYTES: ".1f", "Bits per weight": ".2f", "Tensors": "", BITS: ".4f"}
    return grid(head | {KL: ".4f", "Top-1 agreement ↑": ".1%"}, [first, *rows], references=1)


for each in ("smollm2", "gemma3", "qwen05", "qwen15", "answers"):
    TABLES[f"types-{each}"] = f"types/{each}.json: bytes, types, tests", partial(of_types, each)


@table("types/{smollm2,gemma3,bilingual}.json: bits_per_byte, kl, kl_standard_error")
def types_trained() -> str:
    """Each file that was trained, beside the same before training."""
    names = {"smollm2": "SmolLM2-135M", "gemma3": "Gemma 3 270M", "bilingual": "bilingual model"}
    rows: list[list[Cell]] = []
    for name, model in names.items():
        files = {each["label"]: each["tests"][0] for each in raw(f"types/{name}.json")}
        for label, trained in files.items():
            words, _, tokens = label.partition(" --recover ")
            if tokens:
                pairs = [measures(test, error=True) for test in (files[words], trained)]
                figures = [each for pair in zip(*pairs, strict=True) for each in pair]
                kind = words.replace("auto --megabytes", "auto, MB:")
                rows.append([model, kind, f"{int(tokens):,}", *figures])
    head = {"Model": "", "Type": "", "Training tokens": ""}
    head |= dict.fromkeys(["Bits per byte, quantized", "Bits per byte, trained"], ".4f")
    return grid(head | dict.fromkeys(["KL, quantized", "KL, trained"], ".4f"), rows)


@table("compress.json: seconds, plan, recovery, peak; types/*.json: bytes, kl")
def compress_made() -> str:
    """What compress made in its minutes, beside llama.cpp's files of about that size."""
    rows: list[list[Cell]] = []
    by_model = defaultdict(list)
    for record in raw("compress.json"):
        by_model[record["types"]].append(record)
    for name, records in by_model.items():
        files = {each["label"]: each for each in raw(f"types/{name}.json")}
        dense = files["llama.cpp q4_k_m"]["tests"][0]["dense"]["bits_per_byte"]
        rows.append([f"{records[0]['label']}, 16-bit", *[None] * 5, dense, None])
        made: dict[str, list[Cell]] = {}
        for record in records:
            plan, tokens = record["plan"], record["recovery"].get("tokens", 0)
            figures = [record["seconds"] / 60, plan["windows"], tokens, record["peak"] / 2**30]
            made[f"compress --minutes {record['minutes']}"] = figures
        made |= {f"llama.cpp {kind}": [None] * 4 for kind in ("iq4_nl", "q4_k_m")}
        for label, figures in made.items():
            file = files[label]
            tests = measures(file["tests"][0], error=True)
            rows.append([label, *figures, file["bytes"] / 1e6, *tests])
    head = {"Model": "", "Minutes": ".1f", "Calibration windows": ".0f", "Training tokens": ",.0f"}
    head |= {"Peak (GiB)": ".1f", MEGABYTES: ".1f", "Bits per byte": ".4f"}
    return grid(head | {"KL (nats/token)": ".4f"}, rows)


@table("cpu_time.json: weights, width, windows, seconds")
def cpu_time() -> str:
    """Minutes of a step with 16 windows; those of larger models grow as the measured ones do.

    A window costs in proportion to the weights, solving to the weights times the width of inputs.
    """

    def terms(model: dict[str, Any], windows: int = 16) -> list[float]:
        return [model["weights"] * windows, model["weights"] * model["width"]]

    models, rows = raw("cpu_time.json"), []
    measured = [model for model in models if "steps" in model]
    columns = {}
    for step in measured[0]["steps"]:
        steps = [(model, model["steps"][step]) for model in measured]
        relative = [[t / s["seconds"] for t in terms(m, s["windows"])] for m, s in steps]
        factors, _ = nnls(relative, [1.0] * len(relative))
        columns[step] = [float(factors @ terms(model)) for model in models]
    for place, model in enumerate(models):
        made, seconds = "computed", [computed[place] for computed in columns.values()]
        if "steps" in model:
            made, seconds = "measured", [model["steps"][step]["seconds"] for step in columns]
        rows.append([model["model"], made, model["weights"] / 1e9, *(s / 60 for s in seconds)])
    head = {"Model": "", "Times": "", "Weights in blocks (billions)": ".2f"}
    return grid(head | {f"{step} (min)": ".1f" for step in columns}, rows)


@table("cpu_time.json: seconds, planned, peak, evaluation: perplexity, kl")
def cpu_pruned() -> str:
    """Pruning to 50% on a CPU: seconds of the step, memory beside its plan, and the loss."""
    rows: list[list[Cell]] = []
    for model in raw("cpu_time.json"):
        steps = {k: s for k, s in model.get("steps", {}).items() if "evaluation" in s}
        if not steps:
            continue
        dense = next(iter(steps.values()))["evaluation"]["dense"]["perplexity"]
        rows.append([model["model"], "dense", *[None] * 3, dense, None])
        for name, step in steps.items():
            test, memory = step["evaluation"], (step["planned"] / 2**30, step["peak"] / 2**30)
            kl = test["kl"], test["kl_standard_error"]
            rows.append([model["model"], name, step["seconds"], *memory, test["perplexity"], kl])
    head = {"Model": "", "Method": "", "Seconds": ".0f", "Planned (GiB)": ".2f"}
    return grid(head | {"Peak (GiB)": ".2f", "Perplexity": ".2f", "KL (nats/token)": ".3f"}, rows)


@table("frontier/smollm2-rounded.json, frontier/smollm2.json: size, bits_per_byte, kl")
def smollm2_forms() -> str:
    records, shapes = raw("frontier/smollm2-rounded.json"), raw(SMOLLM2)

    def tests(label: str) -> list[dict[str, Any]]:
        return [one(records, label=label, name=name) for name in ("en", "essays")]

    def size(stage: str) -> float:
        return one(shapes, stage=stage)["size"] / 1e6

    trained = tests("rounded and trained by 32,768 tokens")
    rows = [["original, 16-bit", size("dense"), *measures(*tests("untouched"))]]
    for name in ("q4_k_m", "q3_k_m", "q4_0"):
        rows.append([f"llama.cpp {name}", size(name), *measures(*tests(f"llama.cpp {name}"))])
    rows.append(["langprune q4_0", "90", *measures(*(test["before"] for test in trained))])
    rows.append(["langprune q4_0, trained", "90", *measures(*trained)])
    return grid(FORMS | ESSAYS, rows, references=1)


@table("frontier/qwen2.5-coder-rounded.json: megabytes, bits_per_byte, kl")
def qwen_forms() -> str:
    records = {record["model"]: record for record in raw(QWEN)}
    models = [(name, records[model]) for model, name in QWEN_NAMES.items()]
    rows = [[name, m["megabytes"], *measures(*m["evaluation"])] for name, m in models]
    return grid(FORMS | ESSAYS, rows, references=2)


@table("frontier/gemma3-270m-rounded-{128,first}.json: bits_per_byte, kl, top1_agreement")
def recovery_q4_0() -> str:
    here = raw("frontier/gemma3-270m-rounded-128.json")
    first = raw("frontier/gemma3-270m-rounded-first.json")

    def tests(label: str) -> list[dict[str, Any]]:
        return [one(first, label=label, text=text) for text in ("test", "prose")]

    models = {
        "trimmed, 16-bit": tests("trimmed"),
        "quantized, 128 windows": here["rounded"],
        "and trained": here["evaluation"],
        "quantized, 64 windows, damping 6": tests("rounded on 64 windows"),
        "and trained, damping 6": tests("trained from there, 131,072 tokens"),
    }
    rows = [[name, *measures(*t, error=True, agreement=True)] for name, t in models.items()]
    head = {"Model": "", BITS: ".4f", KL: ".3f", "Top-1 agreement ↑": ".1%"}
    return grid(head | PROSE | {"Other prose, top-1 agreement ↑": ".1%"}, rows, references=1)


@table("frontier/gemma3-270m-{zeros,neurons}-rounded.json: bits_per_byte, kl, kl_standard_error")
def recovery_pruned() -> str:
    quarter, whole = raw("frontier/gemma3-270m-zeros-rounded.json")
    models = {
        "50% of the weights pruned, int4; 1/4 of the rate": quarter,
        "the same; the whole rate (default)": whole,
        "25% of the neurons removed, q4_0; the whole rate": raw(
            "frontier/gemma3-270m-neurons-rounded.json"
        ),
    }
    rows = [[name, *measures(*m["evaluation"], error=True)] for name, m in models.items()]
    return grid({"Model": "", BITS: ".4f", KL: ".3f"} | PROSE, rows)


@table("quality/bilingual-{methods,recovered}.csv: perplexity")
def recovery_bilingual() -> str:
    before, after = (raw(f"quality/bilingual-{name}.csv") for name in ("methods", "recovered"))
    dense = one(before, method="dense")
    kinds = {"50%": ("unstructured", 0.5), "2:4": ("2:4", 0.5), "70%": ("unstructured", 0.7)}
    rows = []
    for text in ("uk", "en"):
        for name, (kind, ratio) in kinds.items():
            same = {"sparsity_type": kind, "sparsity_ratio": ratio, "flags.allocation": "uniform"}
            runs = [dense]
            for method in ("sparsegpt", "admm"):
                runs += [one(each, method=method, **same) for each in (before, after)]
            rows.append([f"{name}, {text}", *(of_test(run, text)["perplexity"] for run in runs)])
    head = "dense", "sparsegpt", "sparsegpt, recovered", "admm", "admm, recovered"
    return grid({"Pattern, test text": ""} | dict.fromkeys(head, ".2f"), rows)


@table("frontier/gemma3-270m-adamw8bit.json: state_bytes_per_weight, cpu_seconds, kl")
def recovery_adamw8bit() -> str:
    rows = []
    for record in raw("frontier/gemma3-270m-adamw8bit.json")[:3]:
        name = record["optimizer"].replace("rounded", "quantized, not trained")
        costs = record.get("state_bytes_per_weight"), record.get("cpu_seconds")
        rows.append([name, *measures(*record["evaluation"].values()), *costs])
    head = {"Optimizer": "", BITS: ".4f", KL: ".4f"} | dict.fromkeys(PROSE, ".4f")
    head |= {"State (bytes/weight) ↓": ".2f", "CPU time (s) ↓": ".0f"}
    return grid(head, rows, references=1)


# languages


def losses() -> dict[str, dict[tuple[str, str], float]]:
    """Increase in bits per byte, by method, then by calibration text and test language."""
    more: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
    for row in raw("languages/gemma3-270m-eleven.csv"):
        if row["more_bits"] != "":
            more[row["method"]][row["calibrated_on"], row["measured_on"]] = row["more_bits"]
    for row in raw("languages/gemma3-270m-q4_0.csv"):
        text = MIX if row["calibrated_on"] == "ten mixed" else row["calibrated_on"]
        increase = row["bits_per_byte"] - row["dense_bits_per_byte"]
        more["q4_0"][text, row["measured_on"]] = increase
    return more


ELEVEN = "languages/gemma3-270m-{eleven,q4_0}.csv: more_bits, bits_per_byte, dense_bits_per_byte"
METHODS = {"wanda": "Wanda", "admm": "ADMM", "q4_0": "q4_0"}


@table(ELEVEN)
def languages_own() -> str:
    more = losses()
    texts = ("own text", "English")
    head = {f"{name}, {text}": "+.3f" for name in METHODS.values() for text in texts}
    rows = [
        [f"{NAMES[to]} ({to})", *(more[m][text, to] for m in METHODS for text in (to, "en"))]
        for to in NAMES
    ]
    return grid({"Test language": ""} | head, rows)


@table(ELEVEN)
def languages_without() -> str:
    rows = []
    for language in NAMES:
        row: list[Cell] = [language]
        for more in map(losses().get, METHODS):
            own = more[language, language]
            best = min((n for n in NAMES if n != language), key=lambda n: more[n, language])
            row.append(f"{more[MIX, language] / own:.1f}")
            row.append(f"{more[best, language] / own:.1f} ({best})")
        rows.append(row)
    texts = ("mix of ten", "best other")
    head = {f"{name}, {text}": "" for name in METHODS.values() for text in texts}
    return grid({"Test language": ""} | head, rows)


@table("languages/gemma3-270m-{windows,eleven}.csv: windows, seed, more_bits")
def languages_windows() -> str:
    measured, more = raw("languages/gemma3-270m-windows.csv"), losses()
    columns = [("wanda", "de"), ("wanda", "ru"), ("wanda", "ja"), ("admm", "de"), ("admm", "ru")]

    def cell(method: str, language: str, windows: int) -> str:
        fields = {"method": method, "calibrated_on": language, "windows": windows}
        found = [r["more_bits"] for r in measured if fields.items() <= r.items()]
        if windows == 32:
            found = [more[method][language, language]]
        ends = sorted({min(found), max(found)}) if found else ()
        return " to ".join(f"{end:+.3f}" for end in ends)

    rows = [[f"{n}", *(cell(*column, n) for column in columns)] for n in (1, 4, 16, 32, 64)]
    for name, text in (("32 of the mix of ten", MIX), ("32 of English", "en")):
        rows.append([name, *(f"{more[method][text, test]:+.3f}" for method, test in columns)])
    head = {f"{METHODS[method]}, {test}": "" for method, test in columns}
    return grid({"Windows of its own text": ""} | head, rows)


@table("languages/gemma3-270m-tasks.csv: questions, right, lost_beside_untouched, won")
def languages_tasks() -> str:
    names = {
        "untouched": "original",
        "trimmed": "trimmed to eleven languages",
        "rounded-uk": "q4_0, Ukrainian text",
        "trained-uk": "q4_0, Ukrainian text, trained",
        "rounded-en": "q4_0, English text",
        "half-uk": "pruned to 50% by ADMM, Ukrainian text",
    }
    rows = []
    for model, name in names.items():
        records = raw("languages/gemma3-270m-tasks.csv")
        records = [r for r in records if r["model"] == model and r["task"].endswith("_last_word")]
        lost, won = (int(sum(r[key] for r in records)) for key in ("lost_beside_untouched", "won"))
        tail = sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1))
        p = f"{min(1, 2 * tail / 2 ** (lost + won)):.1g}"  # McNemar's exact test
        last = [None] * 3 if model == "untouched" else [lost, won, p]
        rows.append([name, *(r["right"] / r["questions"] for r in records), *last])
    head = {r["task"].removesuffix("_last_word"): ".1%" for r in records}
    return grid({"Model": ""} | head | {"Lost": ".0f", "Won": ".0f", "p": ""}, rows)


@table("languages/gemma3-270m.csv: method, type, calibrated_on, measured_on, perplexity")
def languages_two() -> str:
    records = raw("languages/gemma3-270m.csv")
    cells = [(kind, test) for kind in ("50%", "2:4", "70%") for test in ("uk", "en")]
    dense = [one(records, type="dense", measured_on=test)["perplexity"] for _, test in cells]
    rows = [["dense", "", *dense]]
    for method in ("wanda", "sparsegpt", "admm"):
        for text, name in (("uk", "uk"), ("en", "en"), (BOTH, "half of each")):
            runs = [r for r in records if r["method"] == method and r["calibrated_on"] == text]
            tests = [one(runs, type=kind, measured_on=test) for kind, test in cells]
            rows.append([method, name, *(test["perplexity"] for test in tests)])
    head = {"Method": "", "Calibration text": ""}
    return grid(head | {f"{kind}, {test} ↓": ".2f" for kind, test in cells}, rows, references=1)


@table("languages/bilingual-overlap.csv: both, kept_a, kept_b, chance")
def languages_overlap() -> str:
    lines, rows = raw("languages/bilingual-overlap.csv"), []
    parts = {"All": {}, "Block 0": {"block": 0}, "Block 5": {"block": 5}}
    parts |= {name: {"linear": f"mlp.{name}"} for name in ("up_proj", "down_proj")}
    pairs = dict.fromkeys((line["a"], line["b"]) for line in lines)
    for a, b in pairs:
        of_pair = [line for line in lines if (line["a"], line["b"]) == (a, b)]
        found = [[x for x in of_pair if part.items() <= x.items()] for part in parts.values()]
        rows.append([f"{a} and {b}", *(share(each, "both") for each in found)])
    rows.append(["chance", *(share(each, "chance") for each in found)])
    return grid({"Kept by both": ""} | dict.fromkeys(parts, ".1%"), rows)


def share(lines: Sequence[dict[str, Any]], kept: str) -> float:
    """The share of the weights kept by one mask, mean of two, that `kept` counts."""
    return sum(one[kept] for one in lines) / sum((x["kept_a"] + x["kept_b"]) / 2 for x in lines)


# pruning


@table("quality/smollm2.json: perplexity, kl")
def pruning_smollm2() -> str:
    models, rows = raw("quality/smollm2.json"), []
    kinds = {"50%": "50", "2:4": "2of4", "70%": "70"}
    runs = {name: f"{name}-{{}}-en-seed0" for name in ("wanda", "sparsegpt", "admm")}
    for name, run_ in {"dense": "dense", **runs}.items():
        tests = [models.get(run_.format(k), {}).get("evaluation", {}) for k in kinds.values()]
        rows.append([name, *(t.get(key) for key in ("perplexity", "kl") for t in tests)])
    head = {f"{kind}, perplexity ↓": ".2f" for kind in kinds}
    head |= {f"{kind}, KL ↓": ".3f" for kind in kinds}
    return grid({"Method": ""} | head, rows, references=1)


BASELINES = "perplexity, kl, kl_standard_error, difference, low, high, significant"


@table(f"quality/bilingual-baselines{{,-differences}}.csv: {BASELINES}")
def pruning_baselines() -> str:
    return beside_wanda("bilingual", "uk", ".4f")


@table(f"quality/smollm2-baselines{{,-differences}}.csv: {BASELINES}")
def pruning_baselines_smollm2() -> str:
    return beside_wanda("smollm2", "en", ".3f")


def beside_wanda(model: str, text: str, form: str) -> str:
    """A row for each method and pattern, with the paired difference of its loss to Wanda's.

    A figure has the standard error over windows, or the standard deviation of several seeds.
    """
    runs, rows = raw(f"quality/{model}-baselines.csv"), []
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
        perplexity = over_seeds([test["perplexity"] for test in tests])
        kl = over_seeds([test["kl"] for test in tests]) if kind else None
        if len(tests) == 1 and kind:
            kl = kl, tests[0]["kl_standard_error"]
        cell, same = "", {"method": method, "type": kinds.get(kind), "figure": "loss"}
        for line in differences:
            if same.items() <= line.items() and line["allocation"] == rule:
                low, high = format(line["low"], "+" + form), format(line["high"], "+" + form)
                cell = f"{format(line['difference'], '+' + form)} [{low}, {high}]"
                cell += "" if line["significant"] == "True" else " (n.s.)"
        name = method + ", OWL" * (rule == "owl")
        rows.append([name, kinds.get(kind, ""), perplexity, kl, cell])
    head = {"Method": "", "Sparsity": "", "Perplexity ↓": ".2f", KL: form}
    return grid(head | {"Loss over Wanda (nats/token)": ""}, rows, references=1)


def over_seeds(figures: Sequence[float]) -> Cell:
    """The figure of one run, or the mean of several with their standard deviation."""
    return (mean(figures), stdev(figures)) if len(figures) > 1 else figures[0]


def of_test(run: dict[str, Any], name: str) -> dict[str, Any]:
    """The figures of one test text in a row of a report's CSV file."""
    return {key.removeprefix(f"evaluation.{name}."): value for key, value in run.items()}


@table("quality/bilingual-methods.csv: flags.allocation, perplexity")
def pruning_allocation() -> str:
    runs, rows = raw("quality/bilingual-methods.csv"), []
    cases = [(name, ratio) for ratio in (0.6, 0.7) for name in ("sparsegpt", "admm")]
    for text in ("uk", "en"):
        for rule in ("uniform", "owl", "error"):
            found = [
                one(runs, method=name, sparsity_ratio=ratio, **{"flags.allocation": rule})
                for name, ratio in cases
            ]
            rows.append([text, f"`{rule}`", *(of_test(run, text)["perplexity"] for run in found)])
    head = {f"{name}, {ratio:.0%}": ".2f" for name, ratio in cases}
    return grid({"Test text": "", "`--allocation`": ""} | head, rows)


@table("quality/bilingual-loaded.csv: flags.load_bit, footprint.after, perplexity")
def pruning_loaded() -> str:
    runs, rows = raw("quality/bilingual-loaded.csv"), []
    for name, bits in (
        ("float32", ""),
        ("int8, `--load_bit 8`", 8.0),
        ("NF4, `--load_bit 4`", 4.0),
    ):
        found = [one(runs, method=m, **{"flags.load_bit": bits}) for m in ("dense", "sparsegpt")]
        size = found[1]["footprint.after"] / 1e6
        rows.append([name, size, *(of_test(run, "uk")["perplexity"] for run in found)])
    return grid({"Format": "", "In memory (MB)": ".1f", "dense": ".2f", "50%": ".2f"}, rows)


@table("quality/gemma3-270m.json: perplexity, kl, accuracy, said")
def pruning_quality() -> str:
    models, rows = raw("quality/gemma3-270m.json"), []
    names = [f"{m}-50-{t}-seed0" for m in ("wanda", "sparsegpt", "admm") for t in ("uk", "en")]
    for name in ("dense", *names, "admm-50-uk-recovered"):
        test, parts = models[name]["evaluation"], [*name.split("-"), "", ""]
        word, _, pairs = (ability["model"] for ability in models[name]["abilities"])
        method = parts[0] + (", recovered" if name.endswith("recovered") else "")
        cells = [word["accuracy"], word["said"], pairs["accuracy"]]
        rows.append([method, parts[2], test["perplexity"], test.get("kl"), *cells])
    head = {"Method": "", "Calibration text": "", "Perplexity ↓": ".2f", KL: ".3f"}
    shares = ["Last word chosen ↑", "Last word generated ↑", "Pairs ↑"]
    return grid(head | dict.fromkeys(shares, ".1%"), rows, references=1)


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; ties have their mean rank."""

    def ranks(values: Sequence[float]) -> list[float]:
        order, middle = sorted(values), (len(values) - 1) / 2
        return [order.index(v) + (order.count(v) - 1) / 2 - middle for v in values]

    x, y = ranks(first), ranks(second)
    return sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))


@table("quality/{gemma3-270m,smollm2}.json: perplexity, kl, top1_agreement, accuracy, said")
def pruning_ranks() -> str:
    rows = []
    for file, name in (("gemma3-270m", "Gemma 3 270M"), ("smollm2", "SmolLM2-135M")):
        models = [model for key, model in raw(f"quality/{file}.json").items() if key != "dense"]
        figures = defaultdict(list)
        for model in models:
            test, tasks = model["evaluation"], {a["name"]: a["model"] for a in model["abilities"]}
            figures["KL"].append(-test["kl"])
            figures["Top-1 agreement"].append(test["top1_agreement"])
            figures["Last word chosen"].append(tasks["last word"]["accuracy"])
            figures["Last word generated"].append(tasks["last word"]["said"])
            figures["Continuation"].append(tasks["continuation"]["accuracy"])
            figures["Pairs"] += [tasks["pairs"]["accuracy"]] if "pairs" in tasks else []
        good = [-model["evaluation"]["perplexity"] for model in models]
        cells = [correlation(good, values) if values else None for values in figures.values()]
        rows.append([f"{name}, {len(models)} models", *cells])
    return grid({"Perplexity against": ""} | dict.fromkeys(figures, ".3f"), rows)


# neurons, experts, vocabulary


@table("neurons/gemma3-270m.json: perplexity, kl")
def neurons_methods() -> str:
    models, rows, shares = raw("neurons/gemma3-270m.json"), [], ("12.5", "25", "37.5")
    runs = {name: f"{name}-{{}}-neurons-uk-seed0" for name in ("wanda", "sparsegpt", "admm")}
    runs = {"dense": "dense", "magnitude": "magnitude-{}-neurons", **runs}
    for name, run_ in (runs | {"admm, recovered": "neurons-{}"}).items():
        tests = [models.get(run_.format(share), {}).get("evaluation", {}) for share in shares]
        rows.append([name, *(test.get(key) for test in tests for key in ("perplexity", "kl"))])
    forms = {"perplexity": ".2f", "KL": ".3f"}
    head = {f"{share}%, {key} ↓": form for share in shares for key, form in forms.items()}
    return grid({"Method": ""} | head, rows, references=1)


@table("neurons/bilingual.json: perplexity, kl")
def neurons_bilingual() -> str:
    rows = []
    for run_ in raw("neurons/bilingual.json")["runs"]:
        tests, perplexity = run_["evaluation"], run_["perplexity"]
        if run_["test_documents"] != "all" and len(tests) == 2:
            text = "" if run_["method"] == "magnitude" else run_["calibrated_on"]
            pairs = zip(perplexity.values(), (test["kl"] for test in tests), strict=True)
            rows.append([run_["method"], text, *(cell for pair in pairs for cell in pair)])
    head = {"Method": "", "Calibration text": "", "uk, perplexity ↓": ".2f", "uk, KL ↓": ".4f"}
    return grid(head | {"en, perplexity ↓": ".2f", "en, KL ↓": ".4f"}, rows)


@table("neurons/languages.json: overlap")
def neurons_overlap() -> str:
    pairs = raw("neurons/languages.json")["overlap"]["pairs"]
    names = {
        "uk (seed 0) and en (seed 0)": "uk and en",
        f"uk (seed 0) and {BOTH} (seed 0)": "uk and half of each",
        f"en (seed 0) and {BOTH} (seed 0)": "en and half of each",
        "uk (seed 0) and uk (seed 1) (seeds)": "uk, two seeds",
        "en (seed 0) and en (seed 1) (seeds)": "en, two seeds",
    }
    rows = [[name, *pairs[key]["blocks"].values()] for key, name in names.items()]
    rows.append(["chance", *[pairs["uk (seed 0) and en (seed 0)"]["chance"]] * 6])
    return grid({"Kept by both": ""} | {f"Block {block}": ".1%" for block in range(6)}, rows)


@table("experts.json: rise, rise_standard_error")
def experts_chosen() -> str:
    models, rows = raw("experts.json"), []
    chosen = [(m, text, 0) for m in ("reap", "frequency", "sum") for text in ("uk", "en", BOTH)]
    for method, text, seed in chosen + [("random", "uk", seed) for seed in range(3)]:
        runs = [models.get(f"{method}-{share}-{text}-seed{seed}") for share in (25, 50)]
        tests = [run_ and run_[test] for run_ in runs for test in ("uk", "en")]
        cells = [test and (test["rise"], test["rise_standard_error"]) for test in tests]
        if any(cells):
            name = f"seed {seed}" if method == "random" else text.replace(BOTH, "half of each")
            rows.append([method.replace("sum", "contribution"), name, *cells])
    head = {f"{share}% removed, {test} ↓": "+.4f" for share in (25, 50) for test in ("uk", "en")}
    return grid({"Method": "", "Calibration text": ""} | head, rows)


@table("experts.json: rise, kl")
def experts_recovered() -> str:
    models, rows = raw("experts.json"), []
    models["whole"] = {test: {"rise": 0.0} for test in ("uk", "en")}
    runs = {"nothing": "whole", "reap on uk": "reap-50-uk-seed0"}
    for name, run_ in (
        runs | {f"random, seed {s}": f"random-50-uk-seed{s}" for s in range(3)}
    ).items():
        pair = models[run_], models[f"recovered-{run_}"]
        cells = [model[test]["rise"] for test in ("uk", "en") for model in pair]
        rows.append([name, *cells, pair[1]["uk"]["kl"]])
    head = {"Removed": "", "uk, before": "+.4f", "uk, recovered ↓": "+.4f", "en, before": "+.4f"}
    return grid(head | {"en, recovered ↓": "+.4f", "uk, KL recovered ↓": ".4f"}, rows, references=1)


@table("gguf-trim/languages.json: rows, bytes, tests, bits_per_byte_*")
def vocabulary_languages() -> str:
    rows = []
    for file in raw("gguf-trim/languages.json"):
        rise = one(file["tests"], name=file["text"])["rise"]
        rows.append([file["text"], file["rows"], file["bytes"] / 1e6, 100 * rise, bits_cost(file)])
    head = {"Language": "", "Rows": ",.0f", "File (MB)": ".1f", "More tokens (%)": "+.2f"}
    return grid(head | {"Bits per byte (%)": ""}, rows)


def bits_cost(file: dict[str, Any]) -> str:
    """Change of a trimmed file's bits per byte in percent, with its 95% interval."""
    low, high = (100 * end for end in file["cost_interval"])
    cost = 100 * (file["bits_per_byte_trimmed"] / file["bits_per_byte_original"] - 1)
    return f"{cost:+.1f} ({low:+.1f} to {high:+.1f})"


def computed_sizes() -> list[dict[str, Any]]:
    """Files that were computed, without those that were measured too, as a check."""
    names = {file["model"] for file in raw("gguf-trim/measured.json")}
    return [model for model in raw("gguf-trim/computed.json") if model["model"] not in names]


@table("embedders.json: before, after")
def embedder_sizes() -> str:
    rows: list[list[Cell]] = []
    for each in (record for record in raw("embedders.json") if record["tool"] == "langprune"):
        kept = " + ".join(each["data"])
        for name in ("before", "after"):
            part = each[name]
            if name == "after" or each["model"] not in [row[0] for row in rows]:
                tool = f"{kept}, {each['tool']}" if name == "after" else "original"
                sizes = [part[key] / 1e6 for key in ("parameters", "bytes", "tokenizer_bytes")]
                memory, speed = part["tokenizer_memory"] / 1e6, each.get("sentences_per_second")
                seconds = part.get("tokenizer_seconds")
                found = speed[name == "after"] if speed else None
                rows.append([each["model"], tool, part["rows"], *sizes, memory, seconds, found])
    head = {"Model": "", "Kept for": "", "Tokens": ",.0f", "Parameters (M)": ".1f"}
    head |= {"Folder (MB)": ".0f", "tokenizer.json (MB)": ".1f", "Its memory (MB)": ".0f"}
    return grid(head | {"Its loading (s)": ".2f", "Sentences/s": ".1f"}, rows)


@table("embedders.json: tool, held_out_tokens, held_out_unknown")
def embedder_tools() -> str:
    rows: list[list[Cell]] = []
    for each in raw("embedders.json"):
        if each["model"] == "multilingual-e5-small" and each["data"] == ["uk"]:
            before, after = each["before"], each["after"]
            alike = sum(pair[0] for pair in each["vectors"]["texts"].values())
            rise = 100 * (after["held_out_tokens"] / before["held_out_tokens"] - 1)
            unknown = after["held_out_unknown"] - before["held_out_unknown"]
            rows.append([each["tool"], after["rows"], alike, rise, unknown])
    head = {"Tool": "", "Tokens kept": ",.0f", "Cut alike, of 1,500 texts ↑": ",.0f"}
    head |= {"More held-out tokens (%) ↓": ".2f", "More unknown ones ↓": ".0f"}
    return grid(head, rows)


@table("embedders.json: vectors")
def embedder_vectors() -> str:
    rows: list[list[Cell]] = []
    for each in raw("embedders.json"):
        found = each["vectors"]
        alike, count = (sum(pair) for pair in zip(*found["texts"].values(), strict=True))
        cosine, results = found["cosine"], found["retrieval"]
        row = [each["model"], f"{' + '.join(each['data'])}, {each['tool']}"]
        row += [f"{alike:,} of {count:,}", cosine["mean"], cosine["worst"]]
        for name in ("sentences", "queries"):
            for key in ("first", "ten"):
                share, low, high = (100 * value for value in results[name][key])
                row.append(f"{share:.1f} ({low:.1f} to {high:.1f})")
        rows.append(row)
    head = {"Model": "", "Kept for": "", "Cut alike, equal vectors": "", "Cosine of others": ".4f"}
    head |= {"At worst": ".4f"}
    for name in ("Nearest sentence", "First document"):
        head |= {f"{name} stays (%)": "", f"{name}: of ten (%)": ""}
    return grid(head, rows)


@table("vocabulary.json: tokens, tests")
def vocabulary_tokenizers() -> str:
    rows = []
    for each in raw("vocabulary.json"):
        rises = {test["name"]: 100 * test["rise"] for test in each["tests"]}
        if len(rises) > 1:
            before, kept = each["tokens_before"], each["tokens"]
            rows.append([each["tokenizer"], each["text"], before, kept, *rises.values()])
    head = {"Tokenizer": "", "Kept for": "", "Tokens": ",.0f", "Tokens kept": ",.0f"}
    return grid(head | {"More on uk (%) ↓": ".2f", "More on en (%) ↓": ".2f"}, rows)


@table("vocabulary.json: training_documents, rows, tests")
def vocabulary_documents() -> str:
    rows = []
    for each in raw("vocabulary.json"):
        if len(each["tests"]) == 1:
            (test,) = each["tests"]
            alike = f"{test['alike']} of {test['documents']}"
            numbers = each["training_documents"], each["rows"], 100 * test["rise"]
            rows.append([each["tokenizer"], each["text"], *numbers, alike])
    head = {"Tokenizer": "", "Text": "", "Documents": ",.0f", "Rows": ",.0f"}
    return grid(head | {"More tokens (%) ↓": ".2f", "Documents cut alike": ""}, rows)


@table("gguf-trim/measured.json: rows, bytes, tests, bits_per_byte_*, memory")
def trimmed_files() -> str:
    rows, files = [], raw("gguf-trim/measured.json")
    for file in sorted(files, key=lambda file: (file["bytes_before"], file["rows"])):
        sizes = [file[name] / 1e6 for name in ("bytes_before", "bytes")]
        texts = [test for test in file["tests"] if test["name"] in file["text"].split("+")]
        rise = ", ".join(f"{100 * test['rise']:+.2f}" for test in texts)
        memory = [file[name] / 1e6 for name in ("memory_before", "memory")]
        name = f"{file['model']}, {file['text']}"
        rows.append([name, file["rows"], *sizes, rise, bits_cost(file), *memory])
    head = {"File, text": "", "Rows": ",.0f", "Before (MB)": ".1f", "After (MB)": ".1f"}
    head |= {"More tokens (%)": "", "Bits per byte (%)": ""}
    return grid(head | {"Memory before (MB)": ".0f", "Memory after (MB)": ".0f"}, rows)


@table("gguf-trim/computed.json: rows, tables, blocks")
def trimmed_sizes() -> str:
    rows = []
    for model in computed_sizes():
        tables, blocks = (
            [model[name] / 1e6 for name in TABLES_OF],
            model["blocks"],
        )
        whole = [each + blocks / 1e6 for each in tables]
        less = 100 * (1 - whole[1] / whole[0])
        rows.append([model["model"], model["rows_before"], model["rows"], *tables, *whole, less])
    head = {"Model": "", "Rows": ",.0f", "Rows kept": ",.0f", "Tables (MB)": ".0f"}
    head |= {"Tables kept (MB)": ".0f", "Weights (MB)": ".0f", "Weights kept (MB)": ".0f"}
    return grid(head | {"Smaller by (%)": ".0f"}, rows)


@table("gguf-trim/trimbed.json: rows, alike, rise, bits_per_byte, seconds")
def trimmed_beside_trimbed() -> str:
    rows = []
    for entry in raw("gguf-trim/trimbed.json"):
        alike = f"{entry['alike']} of {entry['of']}"
        figures = (
            entry["documents"],
            entry["rows"],
            alike,
            100 * entry["rise"],
            entry["bits_per_byte"],
        )
        rows.append([entry["tool"], *figures])
    head = {"Tool": "", "Documents": ",.0f", "Rows": ",.0f", "Documents cut alike": ""}
    return grid(head | {"More tokens (%)": ".2f", "Bits per byte": ".4f"}, rows)


@table("gguf-trim/speed.json: medians of timings, the highest memory")
def trimmed_speed() -> str:
    return speeds("gguf-trim/speed.json")


@table("types/speed.json: medians of timings, the highest memory")
def types_speed() -> str:
    return speeds("types/speed.json")


def speeds(file: str) -> str:
    """Tokens/s of files in llama.cpp, by text and threads."""
    rows, runs = [], raw(file)
    for model, name in dict.fromkeys((one["model"], one["name"]) for one in runs):
        mine = [one for one in runs if (one["model"], one["name"]) == (model, name)]
        for text in mine[0]["timings"]:
            by_threads = [
                summary([one for one in mine if one["threads"] == threads], text)
                for threads in dict.fromkeys(one["threads"] for one in runs)
            ]
            prompts, generations, (taken, *_), (drafted, *_), memory = zip(*by_threads, strict=True)
            accepted = f"{taken} of {drafted}" if drafted else ""
            rows.append([model, name, text, *prompts, *generations, accepted, max(memory)])
    parts = [f"{part}, {n}" for part in ("Prompt", "Generation") for n in ("1 thread", "2 threads")]
    head = {"Model": "", "File": "", "Text": ""} | dict.fromkeys(parts, ".1f")
    head |= {"Drafted tokens accepted": "", "Memory (MB)": ".0f"}
    if not any(row[-2] for row in rows):
        head.pop("Drafted tokens accepted")
        rows = [[*row[:-2], row[-1]] for row in rows]
    return grid(head, rows)


@table("passes.json: the least seconds")
def passes() -> str:
    rows = []
    for each in raw("passes.json"):
        least = {name: min(seconds) for name, seconds in each["seconds"].items()}
        for name, seconds in least.items():
            if name != "one pass":
                unit = 2 * least["one pass"]
                rows.append([name, each["dtype"], each["windows"], seconds, unit, seconds / unit])
    head = {"Method": "", "Type": "", "Windows": ".0f", "Seconds": ".1f"}
    return grid(head | {"Two passes (s)": ".1f", "Of two passes ↓": ".2f"}, rows)


@table("language-confusion.json: line, word, native")
def language_confusion() -> str:
    rows = []
    names = {"line": "all lines", "word": "no English word", "native": "no foreign letter"}
    for language, figures in raw("language-confusion.json")["languages"].items():
        for name, measure in names.items():
            if not (n := figures[name]["pairs"]):
                continue
            low, high = (100 * end for end in figures[name]["interval"])
            shares = [100 * figures[name][which] / n for which in ("before", "after")]
            between = f"{100 * figures[name]['difference']:+.0f} ({low:+.0f} to {high:+.0f})"
            rows.append([language, measure, n, *shares, between, f"{figures[name]['p']:.2g}"])
    head = {"Language": "", "Right": "", "Answers": ".0f", "Whole (%)": ".0f"}
    return grid(head | {"Trimmed (%)": ".0f", "Difference (points)": "", "p": ""}, rows)


@table("sharded_memory.json: tensors, peak, before, planned")
def sharded_memory() -> str:
    found, gib = raw("sharded_memory.json"), 2**30
    rows = []
    for one in found:
        share = one["tensors"] / found[0]["tensors"]
        rows.append([one["ranks"], one["tensors"] / gib, share])
        taken = one["peak"] - one["before"]
        rows[-1] += [taken / gib, one["planned"] / gib, taken / one["planned"]]
    head = {"Processes": ".0f", "Tensors after a step (GiB)": ".2f", "Share": ".1%"}
    return grid(head | {"Peak (GiB)": ".2f", "Planned (GiB)": ".2f", "Of the plan": ".1%"}, rows)


# pictures


def draw_sizes(path: Path) -> None:
    """Size against KL of every form of Gemma 3 270M, beside llama.cpp's own types."""
    from matplotlib.figure import Figure

    labels = {  # text of each label, and its place beside the point, in points
        "llama.cpp q4_k_m (the source's type)": (
            "q4_k_m (type of\nthe source file)",
            (0, 11),
            "center",
        ),
        "llama.cpp q3_k_m": ("q3_k_m", (9, -4), "left"),
        "llama.cpp q4_0": ("q4_0", (9, -4), "left"),
        "langprune q4_0": ("q4_0, quantized or\nquantized and trained", (-10, -9), "right"),
        "25% of the neurons removed, q4_0, trained": (
            "25% of neurons removed,\nq4_0, trained",
            (-4, 11),
            "center",
        ),
        "50% of the weights pruned, packed int4, trained": (
            "50% of weights pruned,\npacked int4, trained",
            (-10, -32),
            "left",
        ),
    }
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    looks = {"langprune": ("#1b6ca8", "o"), "llama.cpp": ("#c8551b", "s")}
    for name, (size, test, _) in gemma().items():
        color, marker = looks["llama.cpp" if name.startswith("llama.cpp") else "langprune"]
        if "kl" in test and size < 100:
            point = size, test["kl"]
            axes.plot(*point, marker, color=color, markersize=8, clip_on=False, zorder=3)
            if name in labels:
                text, place, side = labels[name]
                style = {"textcoords": "offset points", "color": color, "ha": side}
                axes.annotate(text, point, place, **style)
    for name, (color, marker) in looks.items():
        axes.plot([], [], marker, color=color, markersize=8, label=name)
    axes.legend(loc="upper right", frameon=False)
    axes.set(xlim=(48, 86), ylim=(0, 0.4), xlabel="Size (MB)")
    axes.set_ylabel("KL from the 16-bit model (nats/token)\nlower is better")
    axes.set_title("Gemma 3 270M for Ukrainian (16-bit: 224 MB)", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_types(path: Path) -> None:
    """Size against KL of models on no grid, on a logarithmic scale."""
    from matplotlib.figure import Figure

    labels = {  # of a model: other text of a label, and its place beside the point, in points
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
    titles = {
        "smollm2": ("SmolLM2-135M, English (16-bit: 270 MB)", (71, 151)),
        "gemma3": ("Gemma 3 270M, Ukrainian, trimmed (16-bit: 224 MB)", (41, 126)),
    }
    figure = Figure(figsize=(7.2, 8.0), layout="constrained")
    looks = {"langprune": ("#1b6ca8", "o", -9, "right"), "llama.cpp": ("#c8551b", "s", 9, "left")}
    for axes, (model, (title, ends)) in zip(figure.subplots(2, 1), titles.items(), strict=True):
        for file in quantized(model):
            label = file["label"]
            who = "llama.cpp" if label.startswith("llama.cpp") else "langprune"
            color, marker, across, side = looks[who]
            point = file["bytes"] / 1e6, file["tests"][0]["kl"]
            axes.plot(*point, marker, color=color)
            text, place, side = labels[model].get(label, (label.split()[-1], (across, 0), side))
            style = {"textcoords": "offset points", "color": color, "va": "center", "fontsize": 9}
            axes.annotate(text, point, place, ha=side, **style)
        for name, (color, marker, *_) in looks.items():
            axes.plot([], [], marker, color=color, label=name)
        axes.set_yscale("log")
        axes.set(xlabel="Size of the GGUF file (MB)", xlim=ends)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel("KL from the 16-bit model (nats/token)\nlower is better")
        axes.set_title(title, loc="left", fontsize=11)
        axes.legend(loc="upper right", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_abilities(path: Path) -> None:
    """Last words chosen against last words generated, of each pruned Gemma 3 270M."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    colors, markers = (
        {"uk": "#1b6ca8", "en": "#c8551b"},
        {"admm": "o", "sparsegpt": "s", "wanda": "^"},
    )
    crowded = {"wanda-50-en-seed0": (-8, 0, "right"), "admm-2of4-en-seed0": (0, -11, "center")}
    for name, model in raw("quality/gemma3-270m.json").items():
        word = model["abilities"][0]["model"]
        point = 100 * word["accuracy"], 100 * word["said"]
        method, share, text, *_ = [*name.split("-"), "", ""]
        if name == "dense":
            axes.plot(*point, "*", color="#555555", markersize=14)
            axes.annotate("dense", point, (-12, 0), textcoords="offset points", ha="right")
        elif share in ("50", "2of4") and name.endswith("seed0"):
            axes.plot(*point, markers[method], color=colors[text], markersize=8, clip_on=False)
            words = {"50": "50%", "2of4": "2:4"}[share]
            place = crowded.get(name, (8, 0, "left"))
            style = {"textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(words, point, place[:2], ha=place[2], color=colors[text], **style)
    for text, color in colors.items():
        axes.plot([], [], "D", color=color, label=f"calibrated on {text}")
    for method, marker in markers.items():
        axes.plot([], [], marker, color="#555555", label=method)
    axes.set(xlabel="Last word chosen (%)", ylabel="Last word generated (%)", ylim=(-1, 13))
    axes.set_title(
        "Gemma 3 270M, 210 Ukrainian passages; higher is better", loc="left", fontsize=11
    )
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_bars(path: Path) -> None:
    """Loss by 4-bit quantization in each language, calibrated on English text and on its own."""
    from matplotlib.figure import Figure

    more = losses()["q4_0"]
    others = [name for name in NAMES if name != "en"]
    figure = Figure(figsize=(8.4, 3.3), layout="constrained")
    axes = figure.add_subplot()
    looks = {"en": ("calibrated on English", "#b0b0b0", -0.2)}
    looks["own"] = "calibrated on the language itself", "#1b6ca8", 0.2
    for text, (label, color, side) in looks.items():
        heights = [more[text if text == "en" else name, name] for name in others]
        axes.bar([place + side for place in range(len(others))], heights, 0.38, 0, color=color)
        axes.bar(0, 0, color=color, label=label)
    for place, name in enumerate(others):
        high = more["en", name]
        axes.text(place, high + 0.002, f"{high / more[name, name]:.1f}×", ha="center", fontsize=9)
    axes.set_xticks(range(len(others)), [NAMES[name] for name in others], fontsize=9)
    axes.set_ylabel("Increase in bits per byte")
    axes.set_title("Gemma 3 270M in 4 bits (q4_0); lower is better", loc="left", fontsize=11)
    axes.legend(frameon=False, ncols=2, loc="upper right")
    axes.set_ylim(0, 0.175)
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_parts(path: Path) -> None:
    """What GGUF files are made of before and after trimming for Ukrainian, in shares of before."""
    from matplotlib.figure import Figure

    files = []
    for file in raw("gguf-trim/measured.json"):
        if file["text"] == "uk":
            both = [[file[name][part] for part in ("tables", "blocks", "rest")] for name in PARTS]
            files.append((file["model"], both))
    for model in computed_sizes():
        both = [[model[name], model["blocks"], 0] for name in TABLES_OF]
        files.append((f"{model['model']}*", both))
    figure = Figure(figsize=(7.2, 0.9 + 0.5 * len(files)), layout="constrained")
    axes = figure.add_subplot()
    looks = {"tables": "#c8551b", "blocks": "#1b6ca8", "rest": "#8a8a8a"}
    for place, (_, both) in enumerate(files):
        for sizes, at, solid in zip(both, (place - 0.19, place + 0.19), (0.5, 1), strict=True):
            left, whole = 0.0, sum(both[0])
            for size, color in zip(sizes, looks.values(), strict=True):
                axes.barh(at, 100 * size / whole, 0.36, left, color=color, alpha=solid)
                left += 100 * size / whole
            size = sum(sizes) / 1e6
            text = f"{size:,.0f} MB" if size < 1000 else f"{size / 1000:.2f} GB"
            axes.text(left + 1, at, text, va="center", fontsize=8)
    legend = {"tables": "embedding matrices and head", "blocks": "blocks", "rest": "rest"}
    handles = [axes.barh(0, 0, color=c, label=legend[name]) for name, c in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    axes.set_yticks(range(len(files)), [name for name, _ in files])
    axes.invert_yaxis()
    axes.set(xlim=(0, 112), xlabel="Share of the whole file (%), before (pale) and after")
    axes.set_title("q4_k_m files trimmed for Ukrainian (* computed)", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_experts(path: Path) -> None:
    """Of the tokens that reach each expert, those in Ukrainian, if both languages have as many."""
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from pandas import DataFrame

    models = raw("experts.json")
    blocks = zip(*(models[f"reap-50-{text}-seed0"]["routed"] for text in ("uk", "en")), strict=True)
    shares = [
        sorted((100 * uk / (uk + en) for uk, en in zip(*both, strict=True)), reverse=True)
        for both in blocks
    ]
    figure = Figure(figsize=(7.6, 4.0), layout="constrained")
    axes = figure.add_subplot()
    cells = DataFrame(shares, columns=range(1, len(shares[0]) + 1))
    heat_map(axes, cells, Normalize(0, 100), ".0f")
    axes.set(xlabel="Expert, sorted in each block", ylabel="Block")
    title = "Ukrainian tokens of each expert (%), of equal numbers of Ukrainian and English tokens"
    axes.set_title(title, loc="left", fontsize=9.5)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_map(path: Path, method: str, title: str) -> None:
    """Losses by calibration text (rows) and test language (columns), on a logarithmic scale."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from pandas import DataFrame

    more = losses()[method]
    texts = NAMES | {MIX: "mix of ten"}
    cells = [[more[text, language] for language in NAMES] for text in texts]
    frame = DataFrame(cells, index=[*texts.values()], columns=[*NAMES])
    figure = Figure(figsize=(7.6, 5.0), layout="constrained")
    axes = figure.add_subplot()
    norm = LogNorm(frame.min(axis=None) / 1.3, frame.max(axis=None))
    heat_map(axes, frame, norm, ".3f" if method == "q4_0" else ".2f", "YlOrRd")
    axes.set(xlabel="Test language", ylabel="Calibration text")
    axes.set_title(f"Increase in bits per byte after {title}\nlower is better", fontsize=11)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def filled(text: str) -> str:
    """Return the text of a page with all its tables made again."""

    def made(found: re.Match[str]) -> str:
        if found[1] not in TABLES:
            raise UserError(f"table {found[1]}", "no function of benchmarks/tables.py makes it", "")
        source, make = TABLES[found[1]]
        return f"<!-- table: {found[1]} ({source}) -->\n{make()}\n<!-- end -->"

    return MARKED.sub(made, text)


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
        draw_sizes(IMAGES / "size-quality.png")
        draw_types(IMAGES / "size-types.png")
        draw_parts(IMAGES / "gguf-parts.png")
        draw_abilities(IMAGES / "gemma-abilities.png")
        draw_bars(IMAGES / "own-language.png")
        draw_experts(IMAGES / "experts.png")
        shared = overlap.draw(read_csv(RESULTS / "languages/bilingual-overlap.csv"))
        shared.savefig(IMAGES / "overlap.png", dpi=150, metadata={"Software": None})
        for name, (method, title) in MAPS.items():
            draw_map(IMAGES / f"{name}.png", method, title)
        print(f"written: {names or 'no page'}, and the pictures in .github/images")


if __name__ == "__main__":
    sys.exit(run(main))
