"""Trim the vocabulary of a GGUF file; other tensors and fields are copied by bytes.

Its tokens are cut by llama.cpp's own tokenizer, and its cost and proof are llama.cpp's logits.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.chats import Document
from ...data.documents import Corpus
from ...data.lines import LINES
from ...gguf.file import Field, GgufFile, Tensor, contents, header, write
from ...gguf.llama import Llama
from ...gguf.predictions import NOT_CAUSAL, Predictions
from ...gguf.vocabulary import TOKENIZER, GgufVocabulary, tokenizer_model
from ...util.errors import UserError
from ...util.files import partial_of, sync, temporary_folder, write_text
from ...util.progress import progress
from ...vocabulary.counts import count_tokens
from ...vocabulary.proof import compare_texts, held_out, texts_to_compare
from . import choosing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HEADS = "output.weight", "token_embd.weight"  # where both are one, on a GPU and beside it
# names of special tokens in a file, and in a chat template
SPECIAL = dict(bos="bos", eos="eos", unknown="unk", seperator="sep", padding="pad", mask="mask")


def trim_file(args: argparse.Namespace) -> None:
    """Trim the file `args.source` to the new file `args.out`, or prove a file that is there."""
    out = Path(args.out).absolute()
    if args.verify:
        args.keep = _check_made(args.out, out)
    else:
        _check_new(args.out, out)
    corpora = choosing.corpora_of(args)
    file = GgufFile(Path(args.source), f"IN {args.source}")
    vocabulary = GgufVocabulary(file, frozenset(args.drop))
    with temporary_folder() as folder:
        before = tokenizer_of(folder / "before.gguf", vocabulary, range(vocabulary.rows))
        text_of = reader_of(vocabulary)
        kept, record = choose_tokens(args, corpora, vocabulary, before, text_of)
        vocabulary.check_count(len(kept))
        fields, tensors = vocabulary.trimmed(kept)
        record |= {"digest": vocabulary.digest(kept), "sources": [str(c.source) for c in corpora]}
        record |= {"bytes_before": file.size, "bytes": (size := _size(file, fields, tensors))}
        record["saved_on_gpu"] = _head_size(file.tensors) - _head_size(tensors)
        _print_sizes(record)
        if dropped := [name for name in file.fields if name not in fields]:
            print(f"fields left out: {', '.join(dropped)}")
        after = tokenizer_of(folder / "after.gguf", vocabulary, kept)
        tests = texts_to_compare(corpora, text_of)
        lossy = vocabulary.kind in NOT_CAUSAL
        record["tests"], removed = compare_texts(tests, before, after, kept, lossy)
        if args.dry_run:
            print(removed)
            print("nothing is written (--dry_run)")
            return
        if args.verify:
            print(_same_bytes(out, fields, tensors, file.alignment))
        else:
            choosing.check_disk(args, out.parent, size)
        proof = Predictions(file, (before, after), kept, held_out(tests), folder)
        record |= (found := proof.measure())
        choosing.check_cost(args, found)
        if args.verify:
            record |= proof.verify(out)
        else:
            with _partial(args.out, out) as partial:
                record["seconds_written"] = _write(partial, fields, tensors, file.alignment)
                record |= proof.verify(partial)
            tokens = [vocabulary.tokens[index] for index in kept]
            content = {"ids": kept, "tokens": tokens, "rows": kept, "record": record}
            _put_in_place(args.out, partial, out, json.dumps(content, ensure_ascii=False))
    for projector in Path(args.source).absolute().parent.glob("*mmproj*.gguf"):
        print(f"{projector.name} beside IN: unchanged, not run")
    print(removed)
    if missing := proof.missing(record):
        print(f"not verified: {missing}", flush=True)


def list_of(out: Path) -> Path:
    """Return the file for the list of the tokens of a trimmed file."""
    return out.with_name(f"{out.name}.vocabulary.json")


def _check_new(name: str, out: Path) -> None:
    if out.suffix != ".gguf":
        raise UserError(f"OUT {name}", "the name does not end with .gguf", "Give one that does")
    for path in (out, partial_of(out), list_of(out)):
        if path.exists() or path.is_symlink():
            fix = "Name a new file, or remove it"
            raise UserError(f"OUT {name}", f"{path.name} exists", fix)


def _check_made(name: str, out: Path) -> str:
    """Return the list beside a trimmed file. Raises UserError if one of both is missing."""
    for path in (out, list_of(out)):
        if not path.is_file():
            problem = f"--verify proves a trimmed file by its list, and there is no {path.name}"
            raise UserError(f"OUT {name}", problem, "Leave --verify out to trim IN")
    return str(path)


def tokenizer_of(path: Path, vocabulary: GgufVocabulary, kept: Sequence[int]) -> Llama:
    """Return llama.cpp's tokenizer with the tokens `kept`, from a file of a few megabytes."""
    for _ in write(path, *tokenizer_model(vocabulary.trimmed(kept)[0])):
        pass
    try:
        return Llama(path)
    except ValueError as error:
        fix = "Only a vocabulary that llama.cpp reads can be trimmed"
        raise UserError(vocabulary.file.what, str(error), fix) from error
    finally:
        path.unlink()


def reader_of(vocabulary: GgufVocabulary) -> Callable[[Document], str]:
    """Return a function for the text of a document, a dialogue by the file's chat template."""
    ids = {name: vocabulary.ids.get(f"{TOKENIZER}{name}_token_id") for name in SPECIAL}
    tokens = {
        f"{SPECIAL[name]}_token": vocabulary.tokens[index]
        for name, index in ids.items()
        if index is not None
    }
    template = vocabulary.file.value("tokenizer.chat_template")
    return choosing.text_reader(vocabulary.file.what, template, tokens)


def choose_tokens(
    args: argparse.Namespace,
    corpora: Sequence[Corpus],
    vocabulary: GgufVocabulary,
    llama: Llama,
    text_of: Callable[[Document], str],
) -> tuple[list[int], dict[str, Any]]:
    """Return the tokens to keep, by the train texts or a list, and a record."""
    if (end := llama.end_of_turn) >= 0:  # llama.cpp could take another for a shorter vocabulary
        vocabulary.ids.setdefault(f"{TOKENIZER}eot_token_id", end)
    template = {int(i) for ids in llama.encode_all(vocabulary.template_texts()) for i in ids}
    rules, what = vocabulary.vocabulary(template), vocabulary.file.what
    fields = (f"general.{name}" for name in ("name", "basename", "base_model.0.name"))
    names = [Path(args.source).name, *(vocabulary.file.value(field, "") for field in fields)]
    prompts = choosing.prompts_of(args, names)
    choosing.require_prompts_(rules, llama.encode_all, prompts)
    if args.keep:
        kept = choosing.read_kept(args, rules, rules.tokens, vocabulary.named, what)["ids"]
        record = {}
    else:
        encode = _fastest(args, corpora, vocabulary, llama)
        counts = count_tokens(corpora, encode, text_of, vocabulary.rows, args.price)
        choice, record = choosing.choose_by_text(args, rules, counts)
        kept = choice.ids
    choosing.check_saving(args, len(kept), vocabulary.rows, what)
    return kept, {"rows": len(kept), "rows_before": vocabulary.rows} | record


def _fastest(
    args: argparse.Namespace, corpora: Sequence[Corpus], vocabulary: GgufVocabulary, llama: Llama
) -> Callable[[list[str]], list[np.ndarray]]:
    """Return llama.cpp's tokenizer, or that of a tokenizer.json beside the file that agrees."""
    beside = Path(args.source).absolute().parent / "tokenizer.json"
    tokenizer = _read_tokenizer(beside)
    if not tokenizer or tokenizer.get_vocab_size() > vocabulary.rows:
        return llama.encode_all
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def fast(texts: list[str]) -> list[np.ndarray]:
        batch = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in batch]

    proof = [*LINES]
    for corpus in corpora:
        proof += [text for text in islice(corpus.documents("test"), 64) if isinstance(text, str)]
    if not all(map(np.array_equal, fast(proof), llama.encode_all(proof))):
        return llama.encode_all
    print(f"{beside} gives the same tokens, and counts them")  # ten times as fast
    return fast


def _read_tokenizer(file: Path) -> Tokenizer | None:
    """Return the tokenizer of a file, or None if it cannot be read, as a Git LFS pointer."""
    if not (file.is_file() and find_spec("tokenizers")):
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # noqa: BLE001  tokenizers raises no other
        return None


def _size(file: GgufFile, fields: dict[str, Field], tensors: Sequence[Tensor]) -> int:
    size = len(header(fields, tensors, file.alignment))
    return size + sum(tensor.size + -tensor.size % file.alignment for tensor in tensors)


def _head_size(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the output head. llama.cpp keeps the other tables off a GPU."""
    sizes = {tensor.name: tensor.size for tensor in tensors}
    return next((sizes[name] for name in HEADS if name in sizes), 0)


def _print_sizes(record: dict[str, Any]) -> None:
    names = "bytes_before", "bytes", "saved_on_gpu"
    megabytes = "{:,.1f} MB become {:,.1f}, {:,.1f} MB less on a GPU".format(
        *(record[name] / 1e6 for name in names)
    )
    print(f"vocabulary: {choosing.rows_line(record)}", megabytes, sep="\n", flush=True)


@contextmanager
def _partial(name: str, out: Path) -> Iterator[Path]:
    """Yield a new file beside `out`, which is deleted on error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(out)
    try:
        partial.touch(exist_ok=False)
    except FileExistsError:
        problem = "another run writes it now"
        raise UserError(f"OUT {name}", problem, "Name a new file") from None
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _put_in_place(name: str, partial: Path, out: Path, listed: str) -> None:
    """Write the list of a finished file and give it its name.

    Raises UserError if that has appeared since the start; then the file stays where it is.
    """
    taken = next((each.name for each in (out, list_of(out)) if each.exists()), "")
    write_text(list_of(partial if taken else out), listed)
    if taken:
        problem = f"{taken} has appeared since the start"
        raise UserError(f"OUT {name}", problem, f"The new file is {partial.name}: rename it")
    partial.rename(out)
    sync(out.parent)


def _write(
    partial: Path, fields: dict[str, Field], tensors: Sequence[Tensor], alignment: int
) -> float:
    """Write the file, compare its bytes with IN's, and return the seconds of writing."""
    start = time.monotonic()
    size = sum(tensor.size for tensor in tensors)
    with progress(size, f"writing {partial.stem}", "B") as on_progress:
        for step in write(partial, fields, tensors, alignment):
            on_progress(step)
    written = time.monotonic() - start
    print(f"written in {written:.1f} s", _same_bytes(partial, fields, tensors, alignment), sep="\n")
    return written


def _same_bytes(
    path: Path, fields: dict[str, Field], tensors: Sequence[Tensor], alignment: int
) -> str:
    """Compare the bytes of a trimmed file with those that IN gives, and return a sentence on them.

    Raises UserError at the first difference.
    """
    start = time.monotonic()
    with path.open("rb") as file:
        for name, part in contents(fields, tensors, alignment):
            expected = np.frombuffer(part, np.uint8)
            if not np.array_equal(np.frombuffer(file.read(expected.size), np.uint8), expected):
                fix = "Check the disk, and that IN and OUT belong together"
                raise UserError(f"OUT {path.name}", f"{name} is not IN's", fix)
    tables = sum(tensor.kept is not None for tensor in tensors)
    return (
        f"proven, rows: {tables} tensors have the kept rows of IN, and {len(tensors) - tables} are "
        f"IN's, by bytes ({time.monotonic() - start:.1f} s)"
    )
