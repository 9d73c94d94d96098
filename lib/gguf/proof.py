"""Verify that a GGUF file is the folder's model: its tensors, its tokens and its predictions.

llama.cpp must split every test document into the same tokens as the folder's tokenizer. At every
position of several windows, the log-probabilities of the most likely tokens must agree. The 32-bit
file is compared strictly, which shows whether llama.cpp computes the model as transformers does.
Files of other types have the same weights, rounded. They are compared loosely, which shows whether
llama.cpp's code for the type works.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..data.chats import Dialogue
from ..data.documents import Corpus
from ..data.lines import LINES
from ..data.templates import EXAMPLES, document_text, examples, sample_of_dialogue
from ..data.windows import test_documents
from ..formats.registry import GRIDS
from ..model.checkpoint import weight_bytes
from ..model.folder import ModelFolder
from ..model.pretrained import LONGEST_WINDOW, window_length
from ..model.skeleton import auto_class
from ..util.errors import UserError
from ..util.host import available, gib
from ..util.progress import progress
from ..vocabulary.tokenizer_model import begins_with_blank
from . import INSTALL, conversion, limit_of, llama
from .conversion import OUTER, QUIET_SECONDS, run_child
from .file import GgufFile

RUNNER = "xllamacpp"
RUNS = "llama.cpp does not run the file"
SHORT = 256  # tokens of the shorter window, and past a sliding window
TOP = 256  # most likely tokens compared at each position
# of f32, by activation: other ones than SiLU are read from a table of 16 bits (GELU)
EXACT, SILU = 1e-3, ("silu", "swish")


def verify(
    source: ModelFolder,
    weights: Path,
    files: Mapping[str, Path],
    texts: Sequence[Corpus],
    thorough: bool,
) -> dict[str, Any]:
    """Verify the last of `files` {type: path}, print a line on each part, and return the record.

    `weights` is the folder with dense weights; the first of `files` has 32 bits. `thorough` also
    compares a window of the model's full length. Raises UserError at the first difference.
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
    if find_spec(RUNNER):
        unavailable = run_child(RUNS, llama.unavailable)
    else:
        unavailable = {"tokens and predictions": f"{RUNNER} is not installed: {INSTALL}"}
    missing += [f"{what} ({reason})" for what, reason in unavailable.items()]
    if "tokens and predictions" not in unavailable:
        documents = documents_of(texts, source)
        proof["tokens"] = verify_tokens(file, source.tokenizer, documents)
        for cut in proof["tokens"]:
            print(
                f"{cut['name']}: llama.cpp has the same tokens in all {cut['documents']} documents"
            )
        missing += verify_chat(file, source.tokenizer)
        windows = windows_of(source.tokenizer, documents, source.config, thorough)
        longest = max(len(window) for its in windows.values() for window in its)
        needed = 2 * weight_bytes(weights) + 4 * longest * len(source.tokenizer)
        if not unavailable and needed > available():
            missing.append(f"predictions (comparing them needs {gib(needed)} of memory)")
        elif not unavailable:
            compared = verify_predictions(weights, files, windows)
            distances = compared["distances"].items()
            by = ", ".join(f"{value:.2g} in {name}" for name, value in distances)
            what = f"predictions at {compared['places']} positions differ by {by}"
            print(f"{what}, relative to the spread of log-probabilities", flush=True)
            proof["predictions"] = compared
            missing.append(f"texts past {longest} tokens")
    missing += [] if texts else ["languages of the model (no --data)"]
    print(f"not verified: {', '.join(missing)}", flush=True)
    return proof | {"not_proven": missing}


def _run(function: Callable[..., Any], file: Path, passes: float = 1, **arguments: Any) -> Any:
    """Run llama.cpp on a file; the time limit allows for reading it `passes` times."""
    size = passes * file.stat().st_size
    return run_child(RUNS, function, size=size, model=str(file), **arguments)


def verify_tensors(file: Path, exact: Path, weights: Path) -> dict[str, Any]:
    """Compare all tensors and fields; see conversion.compare. UserError at the first difference."""
    paths = dict(file=str(file), exact=str(exact), weights=str(weights))
    return run_child("tensors", conversion.compare, size=exact.stat().st_size, **paths)


def changed_linears(changed: Mapping[str, Sequence[int]], kind: str) -> str:
    """Return in words what conversion has changed; `changed` is that of conversion.compare."""
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
    every = [text for its in texts.values() for text in its]
    tokens, records = iter(_run(llama.tokens, file, texts=every)), []
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
    answer = _run(llama.dialogues, file, chats=asked, end=end)
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
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    config: Any,
    thorough: bool = False,
) -> dict[str, list[Tensor]]:
    """Return two windows (tokens,) of each source, and perhaps a longer one of all.

    One begins with the first document, the other with the last and is shorter. The longer one
    exceeds the model's sliding window, if it has one; if `thorough`, it has the full length. Each
    ends earlier where the documents do.
    """
    full = window_length(config, None)
    sliding = getattr(config.get_text_config(decoder=True), "sliding_window", None) or 0
    past = window_length(config, None, sliding + SHORT)
    exceeds = llama.PART <= sliding < past and sliding <= LONGEST_WINDOW
    longer = max(past if exceeds else 0, full if thorough else 0)
    wanted = [(name, its, min(llama.PART, full)) for name, its in texts.items()]
    wanted += [(name, its[::-1], min(SHORT, full)) for name, its in texts.items()]
    wanted += [("all", [text for its in reversed(texts.values()) for text in its], longer)]
    windows: dict[str, list[Tensor]] = {}
    for name, documents, most in wanted:
        ids: list[int] = []
        for text in documents:
            if len(ids) >= most:
                break
            ids += tokenizer(text, add_special_tokens=not ids).input_ids
        if ids:
            windows.setdefault(name, []).append(torch.tensor(ids[:most]))
    return windows


def verify_predictions(
    weights: Path, files: Mapping[str, Path], windows: Mapping[str, Sequence[Tensor]]
) -> dict[str, Any]:
    """Compare the predictions of `files` {type: file} with the model in the folder `weights`.

    `windows` {name: each (tokens,)} are its input. Returns the windows' lengths, the number of
    positions and the distances by type. Raises UserError if llama.cpp differs by more than the
    type's limit.
    """
    every, distances = [window for its in windows.values() for window in its], {}
    config = AutoConfig.from_pretrained(weights, local_files_only=True, trust_remote_code=False)
    fields = [*config.get_text_config(decoder=True).to_dict().values()]
    exact = {"f32": EXACT} if any(name in fields for name in SILU) else {}
    n_positions = sum(map(len, every))
    passes = 1 + n_positions / 300  # the file is read once, and multiplied by all
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "expected.npz"
        tables = GgufFile(next(iter(files.values())), "the file").tensors
        rows = next(table.shape[-1] for table in tables if table.name == OUTER[0])
        np.savez(expected, **predictions(weights, config, every, rows))
        asked = dict(windows=[window.tolist() for window in every], expected=str(expected))
        for weight_type, file in files.items():
            distances[weight_type] = distance = _run(llama.distance, file, passes, **asked)
            limit = exact.get(weight_type, limit_of(weight_type))
            if not distance <= limit:
                problem = f"they differ by {distance:.2g}, more than {limit}"
                fix = "It does not compute this model correctly"
                raise UserError(f"llama.cpp's predictions in {weight_type}", problem, fix)
    lengths = {name: [len(window) for window in its] for name, its in windows.items()}
    return {"windows": lengths, "places": n_positions, "distances": distances}


def predictions(
    weights: Path, config: Any, windows: Sequence[Tensor], rows: int
) -> dict[str, np.ndarray]:
    """Return the most likely tokens of the first `rows` at each position, by transformers.

    `ids` (positions, TOP) and `values`, their log-probabilities, of all `windows`.
    """
    local = dict(local_files_only=True, trust_remote_code=False)
    model = auto_class(config).from_pretrained(weights, dtype=torch.float32, **local).eval()
    ids, values = [], []
    with progress(len(windows), "predicting in transformers", "window", delay=QUIET_SECONDS) as bar:
        for window in windows:
            with torch.no_grad():
                logits = model(window[None], use_cache=False).logits[0, :, :rows]
            top = logits.topk(min(TOP, logits.shape[-1]))
            parts = logits.split(64)  # in float64, a whole window takes gigabytes
            constants = torch.cat([part.double().logsumexp(-1) for part in parts])
            ids.append(top.indices.numpy())
            values.append((top.values.double() - constants[:, None]).numpy())
            bar(1)
    return {"ids": np.concatenate(ids), "values": np.concatenate(values)}
