"""Scores of a model on questions: the likelihood of each option, and whether it says the right one.

    scores = score(runner, tokenizer, questions, bos=None, batch_tokens=1024)

Options are run whole, one after another, through the runner's blocks, so that models whose blocks
are fetched can answer too. The context is not scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.distributed.context import DistContext
from lib.model.blocks import HEAD_POSITIONS, BlockRunner, positions_at_once
from lib.quality.questions import Question

REPLACEMENT = "\ufffd"
GROUP_TOKENS = 2**16  # that go through fetched blocks together


@dataclass(frozen=True)
class Option:
    """An option as a model reads it: ids from the beginning of the context to its own end."""

    ids: list[int]
    start: int  # of the ids that are scored
    bytes: int  # of its text, UTF-8


@dataclass(frozen=True)
class Scores:
    """A model's answers to questions. A tie is not a right choice."""

    chosen: Tensor  # (questions,) of bool: whether the right option is the likeliest
    said: Tensor  # (questions,) of bool: whether greedy decoding gives the right option, and ends


def score(
    runner: BlockRunner,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    bos: int | None,
    batch_tokens: int,
    per_byte: bool = False,
    dist: DistContext | None = None,
    state_device: torch.device | str = "cpu",
    on_progress: Callable[[int], None] = lambda questions: None,
) -> Scores:
    """Choose by log-likelihood, `per_byte` where options differ in length.

    `bos` begins every text, where given. The processes of `dist` share the questions.
    `on_progress` is called with the number of questions done.
    """
    dist = dist or DistContext(runner.device, alone=True)
    share = range(len(questions))[dist.share(len(questions))]
    options = [
        (number, place, option)
        for number in share
        for place, option in enumerate(options_of(questions[number], tokenizer, bos))
    ]
    options.sort(key=lambda item: len(item[2].ids))  # little is padded
    width = max((len(question.options) for question in questions), default=1)
    likelihoods = torch.full((len(questions), width), -torch.inf, dtype=torch.float64)
    said = torch.zeros(len(questions), dtype=torch.float64)
    done = 0
    for group in _groups(runner, options, batch_tokens):
        batches = [[option for *_, option in batch] for batch in group]
        for batch, results in zip(group, _run(runner, batches, state_device), strict=True):
            for (number, place, option), (nats, guesses) in zip(batch, results, strict=True):
                likelihoods[number, place] = nats / (option.bytes if per_byte else 1)
                if place == 0:
                    said[number] = _says(tokenizer, option, guesses)
            done += len(batch)
            on_progress(done // width - (done - len(batch)) // width)
    chosen = (likelihoods[:, :1] > likelihoods[:, 1:]).all(1).double()
    sums = [figure.to(runner.device) for figure in (chosen, said)]
    dist.barrier()
    for handle in dist.all_reduce_(sums):
        handle.wait()
    chosen, said = sums
    return Scores(chosen=chosen.cpu() > 0, said=said.cpu() > 0)


def options_of(
    question: Question, tokenizer: PreTrainedTokenizerBase, bos: int | None
) -> list[Option]:
    """Return the options of a question as ids.

    The ids after the context are scored, with a token that spans its end; without a context, the
    ids after those that all options begin with.
    """
    prefix = [] if bos is None else [bos]
    texts = [question.context + option for option in question.options]
    sequences = [prefix + _ids(tokenizer, text) for text in texts]
    shared = (
        [*sequences, prefix + _ids(tokenizer, question.context)] if question.context else sequences
    )
    start = _common(shared)
    return [
        Option(ids, max(start, 1), len(text.encode()))  # nothing predicts the first id
        for ids, text in zip(sequences, question.options, strict=True)
    ]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many ids all sequences have in common at their start."""
    length = 0
    for ids in zip(*sequences, strict=False):
        if len(set(ids)) > 1:
            break
        length += 1
    return length


def _groups(runner: BlockRunner, options: list, batch_tokens: int) -> Iterator[list[list]]:
    """Yield groups of batches that go through the blocks together, of options of similar length."""
    resident = runner.weights.zero_copy
    batches: list[list] = []
    for item in options:
        longest = len(item[2].ids)
        if batches and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    group, tokens = [], 0
    for batch in batches:
        group.append(batch)
        tokens += len(batch) * len(batch[-1][2].ids)
        if resident or tokens >= GROUP_TOKENS:
            yield group
            group, tokens = [], 0
    if group:
        yield group


@torch.no_grad()
def _run(
    runner: BlockRunner, batches: list[list[Option]], state_device: torch.device | str
) -> Iterator[list[tuple[float, list[int]]]]:
    """Yield for each batch the log-likelihood and the most likely ids of every option.

    The ids are those at the scored positions and at the one after the option's end.
    """
    resident = runner.weights.zero_copy
    windows = []
    for batch in batches:
        ids = torch.zeros(len(batch), len(batch[-1].ids), dtype=torch.long)
        for row, option in zip(ids, batch, strict=True):  # what follows its end changes nothing
            row[: len(option.ids)] = torch.tensor(option.ids)
        windows.append(ids)
    where = runner.device if resident else state_device
    all_states = runner.run_blocks(windows, max(map(len, windows)), where)
    for batch, states in zip(batches, all_states, strict=True):
        places = [
            (row, position)
            for row, option in enumerate(batch)
            for position in range(option.start - 1, len(option.ids))
        ]
        rows, positions = (torch.tensor(part) for part in zip(*places, strict=True))
        hidden = states.hidden[rows.to(states.hidden.device), positions.to(states.hidden.device)]
        ids = states.windows[rows, positions]
        following = states.windows.roll(-1, 1)[rows, positions]
        likelihoods, guesses = _heads(runner, hidden.to(runner.device), ids, following)
        results, start = [], 0
        for option in batch:
            end = start + len(option.ids) - option.start
            results.append((float(likelihoods[start:end].sum()), guesses[start : end + 1].tolist()))
            start = end + 1  # past the place after its end
        yield results


def _heads(
    runner: BlockRunner, hidden: Tensor, ids: Tensor, following: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the log-likelihood of `following` (positions,) and the most likely ids, on the host.

    `hidden` are states (positions, hidden) after the last block, `ids` (positions,) their tokens.
    """
    vocabulary = runner.model.config.get_text_config(decoder=True).vocab_size
    chunk = positions_at_once(runner.device, vocabulary, 1, HEAD_POSITIONS)
    chunk = min(chunk, HEAD_POSITIONS)  # which is a short text for any model
    likelihoods, guesses = [], []
    for part, part_ids, targets in zip(
        hidden.split(chunk), ids.split(chunk), following.split(chunk), strict=True
    ):
        at = torch.arange(len(part), device=runner.device)
        logits = runner.logits_from_hidden(
            part_ids[None].to(runner.device), lambda part=part: part[None], at
        )[0].float()
        log_p = logits.log_softmax(-1).gather(-1, targets[:, None].to(runner.device))
        likelihoods.append(log_p[:, 0].double().cpu())
        guesses.append(logits.argmax(-1).cpu())
    return torch.cat(likelihoods), torch.cat(guesses)


def _says(tokenizer: PreTrainedTokenizerBase, option: Option, guesses: list[int]) -> bool:
    """Return whether greedy decoding gives the option's ids, and then ends its last word."""
    right = option.ids[option.start :]
    if not right or guesses[:-1] != right:
        return False
    before, after = (
        tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        for ids in (right, [*right, guesses[-1]])
    )
    following = after.removeprefix(before)[:1]  # half a letter is decoded to a replacement
    return not (following.isalpha() or following == REPLACEMENT)
