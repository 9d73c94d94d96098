"""Likelihoods of options, against whole forward passes; what a model says, against generation."""

from __future__ import annotations

import pytest
import tiny
import torch
from support import runner_of
from torch import nn
from transformers import PreTrainedTokenizerBase

from lib.quality.abilities import Ability, ability_record
from lib.quality.questions import Question
from lib.quality.scoring import Scores, options_of, score

BASE = [
    Question("сонце тихо пливе", (" над", " старим містом", " the", " ліс")),
    Question("the old river", (" runs past", " quiet", " town", " runs a quiet town")),
    Question("", ("ріка ліс\n", "ріка the\n", "ріка\n", "ліс\n")),
    Question("past a quiet", (" town", " river", " ліс", " runs")),
]
QUESTIONS = [  # so that of each four one is right
    Question(one.context, one.options[turn:] + one.options[:turn])
    for one in BASE
    for turn in range(4)
]


@torch.no_grad()
def slow(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, question: Question, bos: int | None
) -> list[tuple[float, int]]:
    """Summed log-likelihood and bytes of each option, by a forward pass for each, in float64."""
    begun = [] if bos is None else [bos]

    def ids_of(text: str) -> list[int]:
        return begun + tokenizer(text, add_special_tokens=False).input_ids

    found = []
    every = [ids_of(question.context + option) for option in question.options]
    same = [len(set(column)) == 1 for column in zip(*every, strict=False)]
    shared = same.index(False) if False in same else len(same)
    if question.context:
        shared = min(shared, len(ids_of(question.context)))
    for ids, option in zip(every, question.options, strict=True):
        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total = sum(log_p[at - 1, ids[at]].item() for at in range(max(shared, 1), len(ids)))
        found.append((total, len(option.encode())))
    return found


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("per_byte", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-2", "Mixtral", "BLOOM", "Mamba"])
def test_the_likeliest_option_is_chosen(name: str, per_byte: bool, bos: int | None) -> None:
    tokenizer = tiny.tiny_tokenizer()
    model = tiny.ALL[name]()
    found = score(
        runner_of(model), tokenizer, QUESTIONS, bos=bos, batch_tokens=64, per_byte=per_byte
    )
    for place, question in enumerate(QUESTIONS):
        values = [
            nats / (size if per_byte else 1) for nats, size in slow(model, tokenizer, question, bos)
        ]
        assert bool(found.chosen[place]) == (values[0] > max(values[1:]))
    assert found.chosen.sum() == len(BASE)


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_batches_change_nothing(batch_tokens: int) -> None:
    runner, tokenizer = runner_of(tiny.tiny_llama()), tiny.tiny_tokenizer()
    one = score(runner, tokenizer, QUESTIONS, bos=0, batch_tokens=200)
    done: list[int] = []
    two = score(
        runner,
        tokenizer,
        QUESTIONS,
        bos=0,
        batch_tokens=batch_tokens,
        on_progress=done.append,
    )
    assert torch.equal(one.chosen, two.chosen) and torch.equal(one.said, two.said)
    assert sum(done) == len(QUESTIONS)


def test_the_context_is_not_scored() -> None:
    tokenizer = tiny.tiny_tokenizer()
    question = Question("the old", (" river runs", " river past"))
    options = options_of(question, tokenizer, 0)
    context = [0, *tokenizer("the old", add_special_tokens=False).input_ids]
    for option, text in zip(options, question.options, strict=True):
        assert option.ids[: option.start] == context
        assert tokenizer.decode(option.ids[option.start :]) == text
    assert [option.bytes for option in options] == [11, 11]


def test_said_is_what_greedy_decoding_gives() -> None:
    """Options are made of the model's own greedy continuation, whole or cut within a word."""
    model, tokenizer = tiny.tiny_llama(), tiny.tiny_tokenizer()
    contexts = ["сонце тихо пливе", "the old river", "past a", "ліс", "quiet town over", "a the"]
    questions, expected = [], []
    for context in contexts:
        ids = torch.tensor([[0, *tokenizer(context, add_special_tokens=False).input_ids]])
        with torch.no_grad():
            whole = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        for length in (1, 2, 3):
            following = tokenizer.decode(whole[0, ids.shape[1] :][:length])
            more = tokenizer.decode(whole[0, ids.shape[1] :][: length + 1])
            option = Question(context, (following, " zzz"))
            again = options_of(option, tokenizer, 0)[0].ids
            if again != whole[0, : ids.shape[1] + length].tolist() or "\ufffd" in more:
                continue
            questions.append(option)
            expected.append(not more[len(following) :][:1].isalpha())
    found = score(runner_of(model), tokenizer, questions, bos=0, batch_tokens=40)
    assert found.said.tolist() == expected and len(expected) > 2
    wrong = [Question(one.context, (" zzz", *one.options[:1])) for one in questions]
    assert not score(runner_of(model), tokenizer, wrong, bos=0, batch_tokens=40).said.any()


def test_flips_are_counted() -> None:
    ability = Ability("uk", "last word", [Question("a", (" b", " c", " d", " e"))] * 5, says=True)

    def scores(chosen: str, said: str) -> Scores:
        return Scores(*(torch.tensor([one == "1" for one in each]) for each in (chosen, said)))

    record = ability_record(ability, scores("10010", "10000"), scores("11100", "11000"))
    assert record["model"]["accuracy"] == 0.4 and record["dense"]["accuracy"] == 0.6
    assert record["flips"] == {"lost": 2, "gained": 1, "p": 1.0}
    assert record["said_flips"] == {"lost": 1, "gained": 0, "p": 1.0}
    assert record["chance"] == 0.25 and record["questions"] == 5
    alone = ability_record(ability, scores("10010", "10000"), None)
    assert "dense" not in alone and "flips" not in alone
