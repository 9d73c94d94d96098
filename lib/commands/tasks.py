"""Write tasks for lm-eval from your own documents, to test a model before and after pruning.
For languages that have no benchmark.

    bash launch.sh tasks DATA OUT [--language uk] [--pairs FILE] [--model MODEL]
    python main.py --tasks uk_last_word,uk_last_word_said --include_path OUT ...

Questions ask for the last word of a sentence in the test documents of DATA, given the text before
it (as LAMBADA, arXiv 1606.06031). `last_word` offers four words of the text that are equally long
and about as frequent. In `last_word_said` the model writes the word itself, which a pruned model
often fails to do although it still ranks the right word first (arXiv 2606.17609). With `--model`,
DATA has dialogues, rendered with that model's chat template; questions ask for words of the
assistant, given the dialogue before them. Where the package babel is installed and `--language` is
a tag that it knows, `currencies` asks what is known: the currency of a country, among four, after
three other pairs, by the tables of CLDR. `--pairs` writes a task `pairs` from rows with `good` and
`bad`, two texts of which the first is right (as BLiMP, arXiv 1912.00582). The same documents and
seed give the same questions.

A task is a YAML file that names a file of questions by its absolute path: run the command again if
the folder moves.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.chats import Document
from ..data.documents import Corpus, are_dialogues
from ..data.languages import script
from ..data.sources import parse_source
from ..util.cli import make_parser
from ..util.errors import UserError, fields_named
from ..util.files import check_writable, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTIONS = 300  # upper limit
CHOICES = 4
CONTEXT = 200  # maximum number of characters before the last word
LEAST_CONTEXT = 60
LEAST_LETTERS = 4  # shortest last word
CHARACTERS = 4_000_000  # length of the documents that are read

KNOWN, SHOWN, ALIKE = 100, 3, 6  # questions for currencies, pairs before each, of one currency
FIXED = date(2024, 1, 1)  # of the currencies

WORD = r"[^\W\d_]+(?:[-'’ʼ][^\W\d_]+)*"
LAST_WORD = re.compile(rf"(?<=\s)({WORD})[.!?…]+(?=\s|$)")
FIRST_WORD = {"function": "regex", "regex_pattern": rf"^\s*({WORD})"}

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
    "generation_kwargs": {"until": list("\n.,!?"), "max_gen_toks": 32, "do_sample": False},
    "filter_list": [{"name": "first_word", "filter": [FIRST_WORD, {"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
# no context and no space after it; the likelier text is the answer
PAIRS = CHOOSE | {"doc_to_text": "", "target_delimiter": ""}


def last_words(
    texts: Iterable[Document], seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[dict[str, Any]]:
    """Return at most QUESTIONS questions for the last word of a sentence, with CHOICES words each.

    The words of a question have the same script, length and rounded-down log2 of their counts. The
    place of the right one is drawn. Dialogues are rendered with the template of `tokenizer`.
    """
    from ..data.documents import batches
    from ..data.templates import rendered

    documents = chain.from_iterable(batches(texts, CHARACTERS))
    # each with the spans whose words are asked for
    asked = [
        (each, [(0, len(each))])
        if isinstance(each, str)
        else rendered(tokenizer, each.messages, tools=each.tools)
        for each in documents
    ]
    words = (
        word for text, spans in asked for a, b in spans for word in re.findall(WORD, text[a:b])
    )
    counts = Counter(word for word in words if word.islower())

    def kind(word: str) -> tuple[str, int, int]:
        return script(word[0]), len(word), counts[word].bit_length()

    alike = defaultdict(list)
    for word in sorted(counts):
        alike[kind(word)].append(word)
    places = [
        (text, match.start(1), match[1])
        for text, spans in asked
        for start, end in spans
        for match in LAST_WORD.finditer(text, start, end)
        if match[1].islower() and len(match[1]) >= LEAST_LETTERS
    ]
    draw = random.Random(seed)
    draw.shuffle(places)
    questions = []
    for text, end, word in places:
        most = end if tokenizer else CONTEXT
        before = text[max(0, end - most) : end]
        if end > most:
            before = before.partition(" ")[2]  # start at a word
        context, others = before.strip(), [other for other in alike[kind(word)] if other != word]
        if len(context) >= LEAST_CONTEXT and len(others) >= CHOICES - 1:
            wrong = draw.sample(others, CHOICES - 1)
            questions.append({"context": context} | _options(word, wrong, draw))
        if len(questions) == QUESTIONS:
            break
    return questions


def currencies(tag: str, seed: int) -> list[dict[str, Any]]:
    """Return at most KNOWN questions for the currency of a territory, after SHOWN other pairs.

    By the tables of CLDR in the language `tag` at FIXED; [] where they lack it, or its names. A
    currency is one word, that which is no form of the territory's name. No word is asked for more
    than ALIKE times, and wrong ones are drawn from all.
    """
    from babel import Locale, localedata
    from babel.numbers import get_territory_currencies

    tag = tag.replace("-", "_")
    if not localedata.exists(tag):
        return []
    locale, draw = Locale.parse(tag), random.Random(seed)
    found, times = [], Counter()
    places = sorted(code for code in locale.territories if re.fullmatch("[A-Z]{2}", code))
    draw.shuffle(places)
    for code in places:
        name, used = locale.territories[code], get_territory_currencies(code, FIXED)
        starts = {word[:3] for word in re.split(r"[\s-]", name.lower())}
        words = re.split(r"[\s-]", locale.currencies.get(used[0], "").lower()) if used else []
        words = [word for word in words if word and word[:3] not in starts]
        if len(used) == len(words) == 1 and times[words[0]] < ALIKE:
            times.update(words)
            found.append((name, words[0]))
    questions, enough = [], len(times) > max(SHOWN, CHOICES)  # words for any draw
    for name, word in found[:KNOWN] if enough else ():
        others = draw.sample([pair for pair in found if pair[1] != word], SHOWN)
        context = "; ".join(f"{place} — {its}" for place, its in others)
        wrong = draw.sample([each for each in sorted(times) if each != word], CHOICES - 1)
        questions.append({"context": f"{context}; {name} —"} | _options(word, wrong, draw))
    return questions


def read_pairs(path: str, seed: int) -> list[dict[str, Any]]:
    """Read the pairs of a file as questions. Raises UserError for rows that are not pairs.

    Every text gets a line break at its end; otherwise a truncated text would be likelier.
    """
    draw, form = random.Random(seed), "Give every row two different texts, good and bad"
    sources = [parse_source(path, "--pairs", key, as_text=True) for key in ("good", "bad")]
    try:
        columns = [Corpus(source).documents("train") for source in sources]
    except UserError as error:
        raise UserError(error.what, error.problem, form) from None
    pairs = [[text.strip() + "\n" for text in pair] for pair in zip(*columns, strict=False)]
    if len({*map(len, columns)}) > 1 or any(a == b or "\n" in (a, b) for a, b in pairs):
        raise sources[0].error("a text is missing or empty, or both are equal", form)
    return [_options(good, [bad], draw) for good, bad in pairs]


def _options(right: str, wrong: Sequence[str], draw: random.Random) -> dict[str, Any]:
    """Return the options, with the right one at a random place, as ties go to the first."""
    options, answer = list(wrong), draw.randrange(len(wrong) + 1)
    options.insert(answer, right)
    return {"options": options, "answer": answer}


def write_task(folder: Path, name: str, questions: Sequence[Any], form: dict[str, Any]) -> None:
    """Write NAME.yaml, a task of lm-eval in the `form` above, and NAME.jsonl, its questions."""
    import yaml

    data = folder.resolve() / f"{name}.jsonl"
    lines = (json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    write_text(data, "".join(lines))
    task = {"task": name, "dataset_path": "json", "test_split": "test"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(data)}}, "metadata": {"version": 1.0}}
    text = yaml.safe_dump(task | form, allow_unicode=True, sort_keys=False)
    write_text(folder / f"{name}.yaml", text)
    print(f"{name}: {len(questions)} questions")


@fields_named(eval_data=None, no_chat_template=None)
def main(argv: list[str]) -> None:
    parser = make_parser("tasks", __doc__)
    add = parser.add_argument
    add("data", metavar="DATA", help="folder with test*.jsonl, or another source of text")
    add("out", metavar="OUT", help="folder for the tasks")
    text = "prefix of the tasks (default: the name of DATA); the tag of a language for currencies"
    add("--language", metavar="TAG", help=text)
    add("--column", default="text", help="column of the texts in DATA (default: text)")
    add("--seed", type=int, default=0, help="seed of the questions (default: 0)")
    add("--pairs", metavar="FILE", help="file of rows with columns good and bad (default: none)")
    add("--model", metavar="MODEL", help="its chat template renders DATA; requires dialogues")
    args = parser.parse_args(argv)
    from ..model.checkpoint import Checkpoint
    from ..model.pretrained import load_tokenizer

    check_writable("OUT", args.out)
    source = parse_source(args.data, "DATA", args.column, as_text=not args.model)
    tokenizer = load_tokenizer(Checkpoint(args.model)) if args.model else None
    documents = Corpus(source).documents("test")
    if args.model and not are_dialogues(documents):
        problem = f"DATA {args.data} has no dialogues"
        raise UserError(f"--model {args.model}", problem, "Leave it out")
    questions = last_words(documents, args.seed, tokenizer)
    if not questions:
        raise source.error(
            "it has no sentence whose last word can be asked for",
            "Give more text, in a language that separates words by spaces",
        )
    name = args.language or re.sub(r"\W+", "_", source.name)
    tasks = {f"{name}_last_word": (questions, CHOOSE), f"{name}_last_word_said": (questions, SAY)}
    known = args.language and find_spec("babel") and currencies(args.language, args.seed)
    tasks |= {f"{name}_currencies": (known, CHOOSE)} if known else {}
    if args.pairs:
        tasks[f"{name}_pairs"] = (read_pairs(args.pairs, args.seed), PAIRS)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for task, (its, form) in tasks.items():
        write_task(folder, task, its, form)
    print(f"run them: python main.py --tasks {','.join(tasks)} --include_path {args.out} ...")
