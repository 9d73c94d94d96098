"""Write tasks for lm-eval from your own documents, to run on a model before and after pruning.

    bash launch.sh tasks DATA OUT [--language uk] [--pairs FILE] [--model MODEL]
    python main.py --tasks uk_last_word,uk_last_word_said --include_path OUT ...

Of the test documents of DATA it asks for the last word of a sentence, after the text before it (as
LAMBADA, arXiv 1606.06031): `last_word` offers four words of the same text that are as long and
about as frequent; for `last_word_said` the model writes the word itself, which a pruned model
often no longer does although it still finds the right word the likeliest (arXiv 2606.17609).
With `--model` they are dialogues, by that model's chat template: what is asked for are words of
the assistant, after all that was said before. `--pairs` makes `pairs` of a file of rows with `good`
and `bad`, two texts of which the first is right (as BLiMP, arXiv 1912.00582). The same documents
and seed give the same questions.

A task is a YAML file and its questions in JSON lines, which the YAML names by their absolute path:
run the command again where the folder moves.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.chats import Document
from ..data.documents import are_dialogues, read_documents
from ..data.languages import script
from ..data.sources import parse_source
from ..util import command
from ..util.errors import UserError
from ..util.files import check_writable, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTIONS = 300  # where the text has so many
CHOICES = 4
CONTEXT = 200  # characters before the last word, at most
LEAST_CONTEXT = 60
LEAST_LETTERS = 4  # of a last word
CHARACTERS = 4_000_000  # of the documents that questions are made from

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
# without a context and the blank after it; the likelier text is the answer
PAIRS = CHOOSE | {"doc_to_text": "", "target_delimiter": ""}


def last_words(
    texts: Iterable[Document], seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[dict[str, Any]]:
    """Make at most QUESTIONS questions for the last word of a sentence, among CHOICES words.

    All are of one script, have the same number of letters and occur about as often: their counts
    have the same logarithm of base 2, rounded down. The place of the right one is drawn. Dialogues
    are rendered by the template of `tokenizer`.
    """
    from ..data.templates import rendered
    from ..vocabulary import batches

    documents = chain.from_iterable(batches(texts, CHARACTERS))
    # each with where in it words are asked for
    asked = [
        (each, [(0, len(each))]) if isinstance(each, str) else rendered(tokenizer, each.messages)
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
            before = before.partition(" ")[2]  # from the beginning of a word on
        context, others = before.strip(), [other for other in alike[kind(word)] if other != word]
        if len(context) >= LEAST_CONTEXT and len(others) >= CHOICES - 1:
            wrong = draw.sample(others, CHOICES - 1)
            questions.append({"context": context} | _options(word, wrong, draw))
        if len(questions) == QUESTIONS:
            break
    return questions


def read_pairs(path: str, seed: int) -> list[dict[str, Any]]:
    """Read the pairs of a file as questions. Raises UserError for what is no pair.

    Every text ends with a line break, without which a truncated text would be likelier.
    """
    draw, form = random.Random(seed), "give every row two different texts, good and bad"
    sources = [replace(parse_source(path, "--pairs", key), as_text=True) for key in ("good", "bad")]
    try:
        columns = [read_documents(source, "train")[0] for source in sources]
    except UserError as error:
        raise UserError(f"{str(error).partition('; name one')[0]}; {form}") from None
    pairs = [[text.strip() + "\n" for text in pair] for pair in zip(*columns, strict=False)]
    if len({*map(len, columns)}) > 1 or any(a == b or "\n" in (a, b) for a, b in pairs):
        raise sources[0].error(f"a text is missing or empty, or both are the same; {form}")
    return [_options(good, [bad], draw) for good, bad in pairs]


def _options(right: str, wrong: Sequence[str], draw: random.Random) -> dict[str, Any]:
    """Return the options with the right one at a place drawn: in a tie the first is chosen."""
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


def main(argv: list[str]) -> None:
    parser = command.make_parser("tasks", __doc__)
    add = parser.add_argument
    add("data", metavar="DATA", help="folder with test*.jsonl, or another source")
    add("out", metavar="OUT", help="folder for the tasks")
    add("--language", metavar="NAME", help="begins the tasks' names (default: DATA's)")
    add("--column", default="text", help="of the texts in DATA (default: text)")
    add("--seed", type=int, default=0, help="of the questions (default: 0)")
    add("--pairs", metavar="FILE", help="file of rows with `good` and `bad`")
    add("--model", metavar="MODEL", help="whose chat template renders dialogues")
    args = parser.parse_args(argv)
    from ..model.access import Checkpoint
    from ..model.pretrained import load_tokenizer

    check_writable("OUT", args.out)
    source = replace(parse_source(args.data, "DATA", args.column), as_text=not args.model)
    tokenizer = load_tokenizer(Checkpoint(args.model)) if args.model else None
    documents = read_documents(source, "test")[0]
    if args.model and not are_dialogues(documents):
        raise UserError(f"--model {args.model}: DATA {args.data} holds no dialogues; leave it out")
    questions = last_words(documents, args.seed, tokenizer)
    if not questions:
        raise source.error(
            "holds no sentence whose last word can be asked for; give more text, of a language "
            "that separates its words by blanks"
        )
    name = args.language or re.sub(r"\W+", "_", source.name)
    tasks = {f"{name}_last_word": (questions, CHOOSE), f"{name}_last_word_said": (questions, SAY)}
    if args.pairs:
        tasks[f"{name}_pairs"] = (read_pairs(args.pairs, args.seed), PAIRS)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for task, (its, form) in tasks.items():
        write_task(folder, task, its, form)
    print(f"run them: python main.py --tasks {','.join(tasks)} --include_path {args.out} ...")
