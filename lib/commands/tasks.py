"""Write tasks for lm-eval from your own documents, to run on a model before and after pruning.

    python -m lib.commands.tasks DATA OUT [--language uk] [--pairs FILE]
    python main.py --tasks uk_last_word,uk_last_word_said --include_path OUT ...

Of the test documents of DATA it asks for the last word of a sentence, after the text before it (as
LAMBADA, arXiv 1606.06031): `last_word` offers four words of the same text that are as long and
about as frequent; for `last_word_said` the model writes the word itself, which a pruned model
often no longer does although it still finds the right word the likeliest (arXiv 2606.17609).
`--pairs` makes `pairs` of a file of JSON lines with `good` and `bad`, two texts of which the first
is right (as BLiMP, arXiv 1912.00582). The same documents and seed give the same questions.

A task is a YAML file and its questions in JSON lines, which the YAML names by their absolute path:
run the command again where the folder moves.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lib.data.documents import read_documents
from lib.data.sources import parse_source
from lib.util import command
from lib.util.errors import UserError
from lib.util.files import check_writable, write_text

QUESTIONS = 300  # where the text has so many
CHOICES = 4
CONTEXT = 200  # characters before the last word, at most
LEAST_CONTEXT = 60
LEAST_LETTERS = 4  # of a last word
CHARACTERS = 4_000_000  # of the documents that questions are made from
MOST_TOKENS = 32  # that a model may write for a word

WORD = r"[^\W\d_]+(?:[-'’ʼ][^\W\d_]+)*"
LAST_WORD = re.compile(rf"(?<=\s)({WORD})[.!?…]+(?=\s|$)")

CHOOSE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
SAY = {
    "output_type": "generate_until",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{options[answer]}}",
    "generation_kwargs": {
        "until": ["\n", ".", ",", "!", "?"],
        "max_gen_toks": MOST_TOKENS,
        "do_sample": False,
    },
    "filter_list": [
        {
            "name": "first_word",
            "filter": [
                {"function": "regex", "regex_pattern": rf"^\s*({WORD})"},
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
# without a context and the blank after it; the likelier text is the answer
PAIRS = CHOOSE | {"doc_to_text": "", "target_delimiter": ""}


def last_words(texts: Iterable[str], seed: int, count: int = QUESTIONS) -> list[dict[str, Any]]:
    """Make at most `count` questions for the last word of a sentence, among CHOICES words.

    All are of one script, have the same number of letters and occur about as often: their counts
    have the same logarithm of base 2, rounded down. The place of the right one is drawn.
    """
    texts = _first(texts)
    words = (word for text in texts for word in re.findall(WORD, text))
    counts = Counter(word for word in words if word.islower())

    def kind(word: str) -> tuple[str, int, int]:
        script = unicodedata.name(word[0], "").partition(" ")[0]
        return script, len(word), counts[word].bit_length()

    alike = defaultdict(list)
    for word in sorted(counts):
        alike[kind(word)].append(word)
    places = [
        (number, match.start(1), match[1])
        for number, text in enumerate(texts)
        for match in LAST_WORD.finditer(text)
        if match[1].islower() and len(match[1]) >= LEAST_LETTERS
    ]
    draw = random.Random(seed)
    draw.shuffle(places)
    questions = []
    for number, start, word in places:
        context = _context(texts[number], start)
        others = [other for other in alike[kind(word)] if other != word]
        if len(context) >= LEAST_CONTEXT and len(others) >= CHOICES - 1:
            wrong = draw.sample(others, CHOICES - 1)
            questions.append({"context": context} | _options(word, wrong, draw))
        if len(questions) == count:
            break
    return questions


def read_pairs(path: str, seed: int) -> list[dict[str, Any]]:
    """Read the pairs of a file as questions. Raises UserError for what is no pair.

    Every text ends with a line break, without which a truncated text would be likelier.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--pairs {path}: can't be read ({error})") from None
    draw = random.Random(seed)
    pairs = [
        _pair(line, f"--pairs {path}: line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not pairs:
        raise UserError(f"--pairs {path}: holds no pair; write a line for each")
    return [_options(good, [bad], draw) for good, bad in pairs]


def _pair(line: str, place: str) -> tuple[str, str]:
    form = 'write {"good": "...", "bad": "..."}'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}); {form}") from None
    texts = [row.get(key) for key in ("good", "bad")] if isinstance(row, dict) else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{place}: needs two texts; {form}")
    good, bad = (f"{text.strip()}\n" for text in texts)
    if good == bad:
        raise UserError(f"{place}: both texts are the same; leave the pair out")
    return good, bad


def _options(right: str, wrong: Sequence[str], draw: random.Random) -> dict[str, Any]:
    """Return the options with the right one at a place drawn: in a tie the first is chosen."""
    options, answer = list(wrong), draw.randrange(len(wrong) + 1)
    options.insert(answer, right)
    return {"options": options, "answer": answer}


def _first(texts: Iterable[str]) -> list[str]:
    first, length = [], 0
    for text in texts:
        first.append(text)
        length += len(text)
        if length >= CHARACTERS:
            break
    return first


def _context(text: str, end: int) -> str:
    """Return the text before `end`, from the beginning of a word on, without outer blanks."""
    start = max(0, end - CONTEXT)
    before = text[start:end]
    return (before.partition(" ")[2] if start else before).strip()


def write_task(
    folder: Path, name: str, questions: Sequence[dict[str, Any]], form: dict[str, Any]
) -> None:
    """Write NAME.yaml, a task of lm-eval in the `form` above, and NAME.jsonl, its questions."""
    import yaml

    data = folder.resolve() / f"{name}.jsonl"
    lines = (json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    write_text(data, "".join(lines))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **form,
        "metadata": {"version": 1.0},
    }
    write_text(folder / f"{name}.yaml", yaml.safe_dump(task, allow_unicode=True, sort_keys=False))


def write_tasks(
    data: str, out: str, language: str | None, seed: int, pairs: str | None
) -> list[str]:
    """Write all tasks of a source into folder `out`, and return their names.

    Raises UserError if the documents have no question, as in a language that does not separate its
    words.
    """
    source = parse_source(data, "DATA")
    questions = last_words(read_documents(source, "test")[0], seed)
    if not questions:
        raise source.error(
            "holds no sentence whose last word can be asked for; give more text, of a language "
            "that separates its words by blanks"
        )
    name = language or re.sub(r"\W+", "_", source.name)
    forms = {"last_word": (questions, CHOOSE), "last_word_said": (questions, SAY)}
    if pairs:
        forms["pairs"] = (read_pairs(pairs, seed), PAIRS)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, (its, form) in forms.items():
        write_task(folder, f"{name}_{kind}", its, form)
        print(f"{name}_{kind}: {len(its)} questions")
    return [f"{name}_{kind}" for kind in forms]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lib.commands.tasks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("data", metavar="DATA", help="folder with test*.jsonl, or another source")
    parser.add_argument("out", metavar="OUT", help="folder for the tasks")
    parser.add_argument(
        "--language", metavar="NAME", help="begins the tasks' names (default: DATA's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default: 0)")
    parser.add_argument("--pairs", metavar="FILE", help="JSON lines with `good` and `bad`")
    command.add_debug_flag(parser)
    args = parser.parse_args(argv)
    check_writable("OUT", args.out)
    names = write_tasks(args.data, args.out, args.language, args.seed, args.pairs)
    print(f"run them: python main.py --tasks {','.join(names)} --include_path {args.out} ...")


if __name__ == "__main__":
    sys.exit(command.run(main))
