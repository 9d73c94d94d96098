"""What goes with the loss in languages that a model was not calibrated on.

    python -m lib.commands.likeness RUN RUN RUN [RUN ...] [--out FOLDER]

A RUN is the `--save` folder of a run that saved its pruned model, calibrated on one language and
measured on all of them, as by `sweep --save_models`. For each two languages it shows the bits per
byte beyond those after calibration on the measured language itself, and how alike the two are.
"""

from __future__ import annotations

import sys
from collections import Counter
from itertools import islice, permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.commands.overlap import compare_masks, shares
from lib.commands.report import Runs, load_runs
from lib.data.languages import script
from lib.run import plots
from lib.util import command
from lib.util.errors import UserError
from lib.util.files import check_writable

if TYPE_CHECKING:
    from pandas import DataFrame

PAIR = ["calibrated_on", "measured_on"]
DOCUMENTS = 10  # of a language, by which its script is known


def likeness(runs: Runs) -> DataFrame:
    """Return a line for each two languages.

    Columns: those of PAIR; `beyond`, bits per byte; `tokens`, the share of the measured language's
    train text in tokens that the other's has; `script`, 1 where most letters of both are of one;
    `masks`, the share of the kept weights that both masks keep, and the same of each block.
    """
    import pandas

    from lib.model.access import Checkpoint
    from lib.model.pretrained import load_tokenizer

    measured = {run["calibration"]["name"]: run["evaluation"] for run in runs.values()}
    bits = {on: {one["name"]: one["bits_per_byte"] for one in measured[on]} for on in measured}
    if len(bits) < 3 or any(on not in tests for on in bits for tests in bits.values()):
        raise UserError("RUN: give three or more, each measured on the languages of all of them")
    tokenizer = load_tokenizer(Checkpoint(next(iter(runs.values()))["model"]))  # of all RUNs
    texts = {
        run["calibration"]["name"]: _tokens_and_script(run, tokenizer) for run in runs.values()
    }
    lines = []
    for on, test in permutations(bits, 2):
        (others, its_script), (own, own_script) = texts[on], texts[test]
        line = {PAIR[0]: on, PAIR[1]: test, "beyond": bits[on][test] - bits[test][test]}
        line |= {"tokens": float(own[others > 0].sum() / own.sum())}
        lines.append(line | {"script": float(its_script == own_script)})
    counts = compare_masks(list(runs))
    a, b = (counts[run].str.replace(r" \(seed \d+\)$", "", regex=True) for run in "ab")
    both_ways = [counts.assign(**{PAIR[0]: x, PAIR[1]: y}) for x, y in ((a, b), (b, a))]
    counts = pandas.concat(both_ways)
    blocks = shares(counts, ["block", *PAIR])["both keep"].unstack("block")
    blocks.insert(0, "masks", shares(counts, PAIR)["both keep"])
    return pandas.DataFrame(lines).join(blocks, on=PAIR)


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


def correlations(found: DataFrame) -> dict[str, float]:
    """Return Spearman's correlation of `beyond` with each likeness.

    It is within each measured language, since these differ in what they lose, and the mean of them.
    """
    groups = found.drop(columns=PAIR[0]).groupby(PAIR[1])
    return groups.corr("spearman")["beyond"].unstack().mean().drop("beyond").to_dict()


def main(argv: list[str]) -> None:
    parser = command.make_parser("likeness", __doc__, out=True)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run that saved a pruned model")
    args = parser.parse_args(argv)
    check_writable("--out", args.out)
    out, found = Path(args.out), likeness(load_runs(args.runs))
    out.mkdir(parents=True, exist_ok=True)
    found.to_csv(out / "likeness.csv", index=False)
    for name, value in (ranks := correlations(found)).items():
        what = name if isinstance(name, str) else f"masks of block {name}"
        print(f"rank correlation of the loss with {what}: {value:+.2f}")
    if plots.can_draw():
        plots.save(plots.likeness(found, ranks), out / "likeness.png")


if __name__ == "__main__":
    sys.exit(command.run(main))
