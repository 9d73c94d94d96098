"""Verify that a GGUF file is the folder's model: its tensors, its tokens and its predictions.

llama.cpp must split every test document into the same tokens as the folder's tokenizer. After
beginnings of several windows, the log-probabilities of the most likely tokens must agree. The
32-bit file is compared strictly, which shows whether llama.cpp computes the model as transformers
does. Files of other types have the same weights, rounded. They are compared loosely, which shows
whether llama.cpp's code for the type works.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from ...data.chats import Dialogue
from ...data.documents import Corpus
from ...data.lines import LINES
from ...data.sentencepiece import begins_with_blank
from ...data.sources import Source
from ...data.templates import EXAMPLES, document_text, examples, sample_of_dialogue
from ...data.windows import test_documents
from ...formats.registry import GRIDS
from ...model.checkpoint import weight_bytes
from ...model.pretrained import window_length
from ...model.skeleton import auto_class
from ...util.errors import UserError
from ...util.host import available, gib
from ...util.progress import progress
from ..model_folder import ModelFolder
from . import INSTALL, limit_of, llama_cpp
from .llama_cpp import QUIET_SECONDS, run_child

RUNNER = "xllamacpp"
RUNS = "llama.cpp does not run the file"
SHORT = 256  # tokens of the shorter window
PLACES = 8  # beginnings of each window
TOP = 256  # most likely tokens compared after each beginning


def verify(
    source: ModelFolder, weights: Path, files: Mapping[str, Path], texts: Sequence[Source]
) -> dict[str, Any]:
    """Verify the last of `files` {type: path}, print a line on each part, and return the record.

    `weights` is the folder with dense weights; the first of `files` has 32 bits. Raises UserError
    at the first difference.
    """
    file, missing = list(files.values())[-1], []
    tensors = verify_tensors(file, files["f32"], weights)
    types = ", ".join(f"{count} in {name.lower()}" for name, count in tensors["types"].items())
    changed = sum(count for count, _ in tensors["changed"].values())
    print(f"tensors are the checkpoint's: {types}; rounding changed {changed:,} values", flush=True)
    for name in GRIDS:
        if counts := tensors["changed"].get(name.upper()):
            rounded = "" if GRIDS[name].ggml_rule_agrees else " once rounded to bfloat16"
            print(f"{name}: {counts[0]:,} of {counts[1]:,} values change{rounded}", flush=True)
    proof: dict[str, Any] = {"tensors": tensors}
    needed = 2 * weight_bytes(weights)
    if find_spec(RUNNER) is None:
        missing.append(f"tokens and predictions ({RUNNER} is not installed: {INSTALL})")
    else:
        documents = documents_of(texts, source)
        proof["tokens"] = verify_tokens(file, source.tokenizer, documents)
        for cut in proof["tokens"]:
            print(
                f"{cut['name']}: llama.cpp has the same tokens in all {cut['documents']} documents"
            )
        missing += verify_chat(file, source.tokenizer)
        if needed > available():
            missing.append(f"predictions (comparing them needs {gib(needed)} of memory)")
        else:
            windows = windows_of(source.tokenizer, documents, source.config)
            compared = verify_predictions(weights, files, windows, letter_of(source.tokenizer))
            distances = compared["distances"].items()
            by = ", ".join(f"{value:.2g} in {name}" for name, value in distances)
            what = f"predictions after {compared['places']} beginnings differ by {by}"
            print(f"{what}, relative to the spread of log-probabilities", flush=True)
            proof["predictions"] = compared
            longest = max(max(lengths) for lengths in compared["windows"].values())
            missing.append(f"texts past {longest} tokens")
    missing += [] if texts else ["languages of the model (no --data)"]
    print(f"not verified: {', '.join(missing)}", flush=True)
    return proof | {"not_proven": missing}


def _run(file: Path, passes: float = 1, **arguments: Any) -> dict[str, Any]:
    """Run llama.cpp on a file; the time limit allows for reading it `passes` times."""
    size = passes * file.stat().st_size
    return run_child(RUNS, llama_cpp.run, size=size, model=str(file), **arguments)


def verify_tensors(file: Path, exact: Path, weights: Path) -> dict[str, Any]:
    """Compare all tensors and fields; see llama_cpp.compare. UserError at the first difference."""
    paths = dict(file=str(file), exact=str(exact), weights=str(weights))
    return run_child("tensors", llama_cpp.compare, size=exact.stat().st_size, **paths)


def changed_linears(changed: Mapping[str, Sequence[int]], kind: str) -> str:
    """Return in words what conversion has changed; `changed` is that of llama_cpp.compare."""
    count, of = changed.get(kind, (0, 0))
    rest = "its embedding and head"
    linears = f"{count:,} of {of:,} values of its linear layers"
    return f"{linears}, and {rest}" if count else f"only {rest}"


def documents_of(corpora: Sequence[Corpus], model: ModelFolder) -> dict[str, list[str]]:
    """Return the test documents of each corpus, and built-in lines in many scripts.

    If the tokenizer puts a blank before a text, leading blanks are removed: before them llama.cpp
    adds one more as SentencePiece does, and tokenizers adds none.
    """
    texts = {"built-in lines": LINES}
    for corpus in corpora:
        chosen = test_documents(corpus)
        texts[corpus.source.name] = [document_text(model.tokenizer, each) for each in chosen]
    blanks = " " if begins_with_blank(model.tokenizer_data) else ""
    return {name: [text.lstrip(blanks) for text in texts[name]] for name in texts}


def verify_tokens(
    file: Path, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Compare the tokens of all `texts`, with the special tokens that are added to them.

    Raises UserError at the first difference, and if llama.cpp does not read the file.
    """
    answer = _run(file, context=64, texts=[text for its in texts.values() for text in its])
    tokens, records = iter(answer["tokens"]), []
    for name, documents in texts.items():
        count = 0
        for number, text in enumerate(documents, start=1):
            ids, theirs = tokenizer(text).input_ids, next(tokens)
            if ids != theirs:
                difference = _difference(tokenizer, ids, theirs)
                raise UserError(f"document {number} of {name}", difference, "Please report this")
            count += len(ids)
        records.append({"name": name, "documents": len(documents), "tokens": count})
    return records


def verify_chat(file: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Compare how llama.cpp renders dialogues, and whether it stops at an answer's end.

    Returns the checks that failed or were left out. Raises UserError for a difference, except in
    tool calls. llama.cpp adds the tokenizer's BOS if the template has not.
    """
    if not tokenizer.chat_template:
        return []
    kinds, asked, texts = zip(*examples(tokenizer, True), strict=True)
    said = sample_of_dialogue(tokenizer, Dialogue(json.dumps(EXAMPLES["several turns"])))
    end = int(said.ids[said.mask][-1])
    answer = _run(file, context=64, chats=asked, end=end, letter=letter_of(tokenizer))
    proven, missing = [], []
    for kind, text, theirs in zip(kinds, texts, answer["chats"], strict=True):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        same = theirs in (ids, [tokenizer.bos_token_id, *ids])
        if not same and kind != "tool call":
            difference = _difference(tokenizer, ids, theirs)
            raise UserError(f"chat template, {kind}", difference, "Please report this")
        (proven if same else missing).append(kind)
    print(f"dialogues ({', '.join(proven)}): llama.cpp renders the same text", flush=True)
    missing = [f"the chat template of a {kind}" for kind in missing]
    if not answer["stops"]:
        end_token = tokenizer.decode([end])
        missing.append(f"the end of an answer (llama.cpp does not stop at {end_token!r})")
    return missing


def _difference(tokenizer: PreTrainedTokenizerBase, ids: list[int], theirs: list[int]) -> str:
    pairs = enumerate(zip(ids, theirs, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(theirs)))
    ours, other = (
        f"{part} {tokenizer.convert_ids_to_tokens(part)}"
        for part in (ids[place : place + 3], theirs[place : place + 3])
    )
    return f"at token {place + 1} llama.cpp has {other}, the folder's tokenizer {ours}"


def windows_of(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, Sequence[str]], config: Any
) -> dict[str, list[Tensor]]:
    """Return two windows (tokens,) of each source.

    One begins with the first document and has the model's full length, if the documents suffice;
    the other begins with the last and is short. Full is one token less than the model's limit,
    since llama.cpp generates one more.
    """
    full = window_length(config, None) - 1
    windows: dict[str, list[Tensor]] = {}
    for name, documents in texts.items():
        for ordered, most in ((documents, full), (documents[::-1], min(SHORT, full))):
            ids: list[int] = []
            for text in ordered:
                ids += tokenizer(text, add_special_tokens=not ids).input_ids
                if len(ids) >= most:
                    break
            if ids:
                windows.setdefault(name, []).append(torch.tensor(ids[:most]))
    return windows


def letter_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a token that has only letters."""
    special = set(tokenizer.all_special_ids)
    ids = (index for index in range(len(tokenizer)) if index not in special)
    return next(index for index in ids if tokenizer.decode([index]).isalpha())


def verify_predictions(
    weights: Path, files: Mapping[str, Path], windows: Mapping[str, Sequence[Tensor]], letter: int
) -> dict[str, Any]:
    """Compare the predictions of `files` {type: file} with the model in the folder `weights`.

    `windows` {name: each (tokens,)} are its input; `letter` is the id of a token of letters.
    Returns the windows' lengths, the number of places and the distances by type. Raises UserError
    if llama.cpp differs by more than the type's limit.
    """
    prompts, expected = [], []
    local = dict(local_files_only=True, trust_remote_code=False)
    kind = auto_class(AutoConfig.from_pretrained(weights, **local))
    model = kind.from_pretrained(weights, dtype=torch.float32, **local).eval()
    every = [window for its in windows.values() for window in its]
    with progress(len(every), "predicting in transformers", "window", delay=QUIET_SECONDS) as bar:
        for window in every:
            length = len(window)
            ends = sorted({max(1, length * place // PLACES) for place in range(1, PLACES + 1)})
            prompts += [window[:end].tolist() for end in ends]
            with torch.no_grad():
                last = torch.tensor(ends) - 1
                logits = model(window[None], use_cache=False, logits_to_keep=last).logits[0]
            expected.append(logits.double().log_softmax(-1))
            bar(1)
    del model
    dense = torch.cat(expected)  # (places, rows)
    distances = {}
    for weight_type, file in files.items():
        distances[weight_type] = distance = _distance(dense, file, prompts, letter)
        if not distance <= limit_of(weight_type):
            problem = f"they differ by {distance:.2g}, more than {limit_of(weight_type)}"
            fix = "It does not compute this model correctly"
            raise UserError(f"llama.cpp's predictions in {weight_type}", problem, fix)
    lengths = {name: [len(window) for window in its] for name, its in windows.items()}
    return {"windows": lengths, "places": len(prompts), "distances": distances}


def _distance(dense: Tensor, file: Path, prompts: list[list[int]], letter: int) -> float:
    """Return the distance of log-probabilities relative to their spread, over all places.

    `dense` (places, rows) is compared at the most likely tokens of llama.cpp.
    """
    rows = dense.shape[-1]
    options = dict(context=max(map(len, prompts)) + 32, top=min(TOP, rows), letter=letter)
    passes = 1 + sum(map(len, prompts)) / 300  # the file is read once, and multiplied by all
    answer = _run(file, passes, prompts=prompts, **options)
    distances = []
    for expected, pairs in zip(dense, answer["logprobs"], strict=True):
        ids, values = zip(*(pair for pair in pairs if pair[0] < rows), strict=True)
        theirs, ours = torch.tensor(values, dtype=torch.float64), expected[list(ids)]
        distances.append((theirs - ours).norm() / (ours - ours.mean()).norm())
    return float(torch.stack(distances).square().mean().sqrt())
