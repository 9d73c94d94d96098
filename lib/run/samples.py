"""What a model says: beginnings of test documents, gone on with by the dense and by the pruned one.

    samples = Samples(job, loaded)
    samples.take("dense", loaded.model)     # before pruning changes it
    samples.take("model", loaded.model)     # what the run has made of it
    samples.told()                           # side by side, for results.json

Greedy, so that the same model says the same; nothing of the model or its settings is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lib.model.access import first_line
from lib.model.pretrained import window_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lib.run.job import Job, LoadedModel

TOKENS = 40  # that a beginning is gone on with
BROKEN = "\ufffd"  # what a tokenizer makes of half a character


class Samples:
    """`--samples` of every test set, by one model after another.

    Every process of a job takes them all, so that none waits for another. What can't be had is told
    in one line, and the run goes on without.
    """

    def __init__(self, job: Job, loaded: LoadedModel) -> None:
        self.job = job
        self.said: dict[str, list[str]] = {}  # by whom, in the order of the beginnings
        self.beginnings = [
            (test.name, ids)
            for test in job.texts.tests
            for ids in test.openings
            if job.args.samples
        ]
        placement = loaded.runner.placement
        if self.beginnings and placement and not placement.zero_copy:
            self._do_without(f"each of {TOKENS} tokens would fetch every block again")

    def take(self, who: str, model: nn.Module) -> None:
        """What `model` says; `who`: `dense` for the dense model, which is the same in every run of
        a sweep, or `model` for what this run has made of it."""
        if not self.beginnings:
            return
        args = self.job.args
        key = (args.teacher or args.model, args.dtype, args.load_bit, args.cache_dir, args.device)
        key += ([ids.tolist() for _, ids in self.beginnings],)
        key += (self.job.vocabulary and self.job.vocabulary.digest,)

        def generate() -> list[str]:
            with self.job.timed("samples"):
                return self._generate(model)

        try:
            same = who == "dense"
            self.said[who] = self.job.cache.samples(key, generate) if same else generate()
        except Exception as error:  # of any model's own code; what was pruned must not be lost
            self._do_without(f"{type(model).__name__} can't generate ({first_line(error)})")

    def told(self) -> list[dict[str, str]]:
        """One entry for each beginning: `test`, `beginning`, and what each model says after it."""
        tokenizer = self.job.tokenizer
        return [
            {"test": name, "beginning": text_of(tokenizer, ids)}
            | {who: said[index] for who, said in self.said.items()}
            for index, (name, ids) in enumerate(self.beginnings)
        ]

    def _generate(self, model: nn.Module) -> list[str]:
        job = self.job
        ids = torch.stack([ids for _, ids in self.beginnings])  # (beginnings, tokens)
        tokens = min(TOKENS, window_length(job.config, None) - ids.shape[1])
        at_once = max(1, job.batch_size * job.seqlen // (ids.shape[1] + tokens))
        found = [
            row
            for some in ids.split(at_once)
            for row in continuations(model, some.to(job.device), tokens)
        ]
        return [continued(job.tokenizer, *both) for both in zip(ids.tolist(), found, strict=True)]

    def _do_without(self, why: str) -> None:
        self.beginnings = []
        if self.job.dist.is_main:
            print(f"samples: none, {why}", flush=True)


def continuations(model: nn.Module, ids: Tensor, tokens: int) -> list[list[int]]:
    """The `tokens` most likely ids after each of `ids` (n, tokens), fewer where the text ends."""
    with _plain_generation(model) as ends:
        options = {"eos_token_id": ends, "pad_token_id": ends[0]} if ends else {}
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            **options,
        )
    rows = whole[:, ids.shape[1] :].tolist()
    return [row[: next((i for i, one in enumerate(row) if one in ends), None)] for row in rows]


@contextmanager
def _plain_generation(model: nn.Module) -> Iterator[list[int]]:
    """Inside, the model's own settings of generation (penalties, temperatures) do not count.

    Gives the ids with which it ends a text.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    ends = own.eos_token_id
    model.generation_config = GenerationConfig()
    try:
        yield [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    finally:
        model.generation_config = own


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Tensor | list[int]) -> str:
    """The text of ids (tokens,), without special tokens and without half a character at its end."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip(BROKEN)


def continued(tokenizer: PreTrainedTokenizerBase, ids: list[int], more: list[int]) -> str:
    """What `more` adds to the text of `ids`: some tokenizers drop a blank before a first token, and
    a character may begin in `ids` and end in `more`."""
    before, whole = text_of(tokenizer, ids), text_of(tokenizer, [*ids, *more])
    return whole.removeprefix(before) if whole.startswith(before) else text_of(tokenizer, more)
