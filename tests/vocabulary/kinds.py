"""Tiny tokenizers of every kind that can be trimmed, trained on two languages and some symbols."""

from __future__ import annotations

import random
from collections.abc import Callable

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

UK = "сонце ріка ліс тихо пливе над старим містом вітер гойдає верби дорога веде до моря".split()
EN = "the old river runs past a quiet town where children play under tall green trees".split()
UK += [word + end for word in UK for end in ("ами", "ого", "еш", "ють")]
EN += [word + end for word in EN for end in ("ing", "less", "ward", "ship")]
BOS, EOS, PAD, USER = "<s>", "</s>", "<pad>", "<|user|>"
SPECIAL = ["<unk>", BOS, EOS, PAD]
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "{{ '<|user|>Q: ' + m['content'] + '\\n' }}{% endfor %}{{ eos_token }}"
)


def texts(words: list[str], count: int, seed: int = 0) -> list[str]:
    """`count` texts of these words, with numbers and signs between them."""
    draw = random.Random(seed)
    signs = ["", "", "", ",", ".", "\n", " 12", "!"]
    return [
        " ".join(draw.choice(words) + draw.choice(signs) for _ in range(30)) for _ in range(count)
    ]


BOTH = texts(UK, 60) + texts(EN, 60)


def _fast(tokenizer: Tokenizer, **names) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    names = dict(bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token="<unk>") | names
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.add_tokens([AddedToken(USER, special=True)])
    fast.chat_template = TEMPLATE
    return fast


def byte_level(size: int = 520, regex: bool = True, whole: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2 has it; without its `regex` as Llama 3, Qwen and DeepSeek. `whole`: words that
    are tokens are taken as they are, whatever merges would make of them."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = level if regex else pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(BOTH, trainer)
    return _fast(tokenizer)


def byte_fallback(size: int = 420, special: list[str] = SPECIAL) -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma have it: blanks as a sign, every pair that makes a token among
    the merges, letters that are no token as bytes."""
    pieces = [piece for piece, _ in _pieces(size, special)]
    vocab = {token: number for number, token in enumerate(pieces)}
    pairs = [
        (vocab[piece], len(piece[:cut]), piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[0] != "<" and piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges = [(first, second) for *_, first, second in sorted(pairs)]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = _read_back()
    tokenizer.add_special_tokens(special)
    return _fast(tokenizer)


def unigram(
    size: int = 420, fallback: bool = True, special: list[str] = SPECIAL
) -> PreTrainedTokenizerFast:
    """With bytes for letters that are no token, or without."""
    pieces = [p for p in _pieces(size, special) if fallback or not p[0].startswith("<0x")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = _read_back() if fallback else decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    return _fast(tokenizer)


def _read_back() -> decoders.Decoder:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])


def _pieces(size: int, special: list[str]) -> list[tuple[str, float]]:
    """Special tokens, bytes, and pieces with their scores, by falling score."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, show_progress=False, unk_token="<unk>")
    tokenizer.train_from_iterator(BOTH, trainer)
    found = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    scores = -1.0
    pieces = [(token, 0.0) for token in (*special, *(f"<0x{n:02X}>" for n in range(256)))]
    for piece in found:
        if piece != "<unk>":
            scores -= 0.01
            pieces.append((piece, scores * len(piece) ** 0.5))
    return pieces


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "byte-level, split by a pattern": lambda: byte_level(regex=False),
    "byte-level, words taken whole": lambda: byte_level(regex=False, whole=True),
    "byte fallback": byte_fallback,
    "unigram": unigram,
    "unigram without bytes": lambda: unigram(fallback=False),
}


RESERVED = [f"<unused{number}>" for number in range(70)]


def _added(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedToken(token, special=True) for token in RESERVED])
    return tokenizer


# after all other tokens, as Llama 3 has them, or among those of the model, as Gemma has them
WITH_RESERVED: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": lambda: _added(byte_level(regex=False)),
    "byte fallback": lambda: byte_fallback(special=[*SPECIAL, *RESERVED]),
    "unigram": lambda: unigram(special=[*SPECIAL, *RESERVED]),
    "unigram, added": lambda: _added(unigram()),
}
