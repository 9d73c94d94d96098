"""The passages on which files are compared, equal for all: beginnings of test documents, and of the
last answers of dialogues."""

from __future__ import annotations

import argparse
import hashlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from ...data.chats import Dialogue, Document
from ...data.documents import Corpus
from ...data.hub import TEST_DOCUMENTS
from ...data.languages import REQUESTS, script_of
from ...gguf.conversion import run_child
from ...gguf.llama import rendered
from ...util.errors import counted
from ...vocabulary.proof import FEW
from ..trim import choosing
from .measure import File, Passage

PASSAGES = 32  # of each text
LONGEST = 512  # tokens of the reference, with the one that begins a text


def corpora_of(args: argparse.Namespace) -> dict[str, Corpus]:
    """Return the test texts of --language and --data by name."""
    corpora = choosing.corpora_of(args, needed=(), splits=["test"])
    names = [*args.language, *(corpus.source.name for corpus in corpora[len(args.language) :])]
    for name, corpus in zip(names, corpora, strict=True):
        if names.count(name) > 1:
            raise corpus.source.error("it is named twice", "Name it once")
    return dict(zip(names, corpora, strict=True))


def passages_of(
    corpora: Mapping[str, Corpus], files: Sequence[File], count: int
) -> dict[str, list[Passage]]:
    """Return passages by text, each the beginning of a document, spread over all.

    It has up to LONGEST tokens of the first file, and fits into the context of each. Raises
    UserError for a text with fewer than two.
    """
    texts = {}
    for name, corpus in corpora.items():
        read = islice(corpus.documents("test"), TEST_DOCUMENTS)
        documents = [each for each in read if each.strip()]
        n_passages = min(count, len(documents))
        chosen = [documents[n * len(documents) // n_passages] for n in range(n_passages)]
        found = _passages(chosen, files)
        if (n_passages := len(found)) < 2:
            problem = (
                f"--passages {count} gives {n_passages} of its {len(documents)} test documents"
            )
            raise corpus.source.error(problem, "Give at least 2, for an interval over documents")
        if left_out := len(chosen) - n_passages:
            which = "the template rejects them or ends prompts otherwise, or prompts are too long"
            print(f"{name}: {left_out} of {len(chosen)} dialogues are left out ({which})")
        if n_passages < min(FEW, count):
            held_out = ", a tenth of its documents" * corpus.is_parted("test")
            few = counted(n_passages, "test document")
            print(f"{name}: only {few}{held_out}, so intervals are wide", flush=True)
        expected = script_of(REQUESTS.get(name.partition("-")[0], ""))
        if expected and (letters := script_of("".join(each.text for each in found))) != expected:
            print(f"{name}: most letters are {letters}, and those of {name} are {expected}")
        texts[name] = found
    return texts


def _passages(documents: Sequence[Document], files: Sequence[File]) -> list[Passage]:
    """Return the passages of documents that the context of each file can hold."""
    answers = iter(_answers([each for each in documents if isinstance(each, Dialogue)], files[0]))
    every = [Passage("", each) if isinstance(each, str) else next(answers) for each in documents]
    every = [_beginning(passage, files) for passage in every]
    starts = [[(file.window(each), file.prompt(each)) for file in files] for each in every]
    return [
        each
        for each, pairs in zip(every, starts, strict=True)
        if each.text and all(window[: len(start)] == start for window, start in pairs if start)
    ]


def _answers(dialogues: Sequence[Dialogue], file: File) -> list[Passage]:
    """Return the last answers of dialogues with their prompts, as llama.cpp's server renders them.

    One has no text if the template of the file rejects it, or renders a prompt with an answer
    otherwise than alone.
    """
    if dialogues and not file.file.value("tokenizer.chat_template"):
        raise file.refused("it has no chat template, and the texts are dialogues")
    chats, found = [], []
    for each in dialogues:
        more = {"tools": each.tools, "chat_template_kwargs": {"enable_thinking": False}}
        messages = each.messages
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        chats.append({"messages": messages[:-1]} | more)
        chats.append({"messages": messages, "add_generation_prompt": False} | more)
    options = dict(size=4 * file.file.size, model=str(file.path), chats=chats)
    texts = run_child(file.what, rendered, **options) if chats else ()
    for prompt, whole in zip(texts[::2], texts[1::2], strict=True):
        fits = 0 < len(prompt) < len(whole) and whole.startswith(prompt)
        found.append(Passage(prompt, whole[len(prompt) :] if fits else ""))
    return found


def _beginning(passage: Passage, files: Sequence[File]) -> Passage:
    """Return the longest beginning whose window is short enough for all files."""
    limits = [each.context for each in files]
    limits[0] = min(limits[0], LONGEST)

    def exceeds(letters: int) -> bool:
        window = Passage(passage.prompt, text[:letters])
        return any(len(f.window(window)) > limit for f, limit in zip(files, limits, strict=True))

    text = passage.text[: 8 * LONGEST]  # tokens are shorter on average
    letters = bisect_left(range(1, len(text) + 1), True, key=exceeds)
    return passage._replace(text=text[: letters if passage.prompt else max(1, letters)])


def digest_of(passages: Sequence[Passage]) -> dict[str, Any]:
    """Return the number of passages, their bytes, and a digest of them."""
    digest = hashlib.sha256("\0".join(part for each in passages for part in each).encode())
    n_bytes = [len(each.text.encode()) for each in passages]
    return {"documents": len(n_bytes), "bytes": n_bytes, "sha256": digest.hexdigest()}
