"""What goes with the loss in languages that a model was not calibrated on.

For each two languages: the bits per byte beyond those after calibration on the measured language
itself, and how alike the two are in script, tokens and masks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice, permutations
from typing import TYPE_CHECKING, Any

from lib.data.languages import script

if TYPE_CHECKING:
    from pandas import DataFrame

PAIR = ["calibrated_on", "measured_on"]
DOCUMENTS = 10  # of a language, by which its script is known


def likeness(runs: Iterable[dict[str, Any]], masks: DataFrame) -> DataFrame | None:
    """Return a line for each two languages of runs that were calibrated on one language each.

    `masks`: what each two masks share, with columns PAIR, `both keep`, and one of each block.
    Columns: those of PAIR; `beyond`, bits per byte; `tokens`, the share of the measured language's
    train text in tokens that the other's has; `script`, 1 where most letters of both are of one;
    then those of `masks`. None for fewer than three languages, or where a run was not measured on
    all of them.
    """
    import pandas

    from lib.model.access import Checkpoint
    from lib.model.pretrained import load_tokenizer

    of_one = {
        run["calibration"]["name"]: run
        for run in runs
        if len((run.get("calibration") or {}).get("sources", ())) == 1
    }
    bits = {
        on: {test["name"]: test["bits_per_byte"] for test in run["evaluation"]}
        for on, run in of_one.items()
    }
    if len(bits) < 3 or any(not bits.keys() <= tests.keys() for tests in bits.values()):
        return None
    tokenizer = load_tokenizer(Checkpoint(next(iter(of_one.values()))["model"]))  # of all runs
    texts = {on: _tokens_and_script(run, tokenizer) for on, run in of_one.items()}
    lines = []
    for on, test in permutations(bits, 2):
        (others, its_script), (own, own_script) = texts[on], texts[test]
        line = {PAIR[0]: on, PAIR[1]: test, "beyond": bits[on][test] - bits[test][test]}
        line |= {"tokens": float(own[others > 0].sum() / own.sum())}
        lines.append(line | {"script": float(its_script == own_script)})
    return pandas.DataFrame(lines).join(masks, on=PAIR)


def _tokens_and_script(run: dict[str, Any], tokenizer: Any) -> tuple[Any, str]:
    """Return how often each token occurs in the text of a run, and the script of most letters."""
    from lib.data.counts import count_tokens
    from lib.data.documents import read_documents
    from lib.data.sources import parse_sources

    sources = parse_sources([each["source"] for each in run["calibration"]["sources"]], "RUN")
    tokens = count_tokens(sources, tokenizer)
    texts = "".join(islice(read_documents(sources[0], "train")[0], DOCUMENTS))
    scripts = Counter(script(one) for one in texts if one.isalpha())
    return tokens, scripts.most_common(1)[0][0]


def correlations(pairs: DataFrame) -> dict[str, float]:
    """Return Spearman's correlation of `beyond` with each likeness.

    It is within each measured language, since these differ in what they lose, and the mean of them.
    """
    groups = pairs.drop(columns=PAIR[0]).groupby(PAIR[1])
    return groups.corr("spearman")["beyond"].unstack().mean().drop("beyond").to_dict()
