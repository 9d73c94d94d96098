"""The demo's model: a tiny bilingual LLaMA with a tokenizer of its own, trained in about a minute.

It is small on purpose: a model without spare capacity loses by every pruned weight, and which
weights can be pruned differs between its two languages.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from lib.util.progress import progress

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SETTINGS = "training.json"  # beside the weights: all that they depend on
BEGIN, END = "<s>", "</s>"  # ids 0 and 1


@dataclass(frozen=True)
class DemoTraining:
    """All settings that the trained weights depend on, beside the text."""

    vocabulary: int = 1024  # tokens
    window: int = 128  # tokens
    width: int = 96
    inner: int = 256
    blocks: int = 3
    heads: int = 4
    spread: float = 0.05  # standard deviation of new weights
    batch: int = 16  # windows a step, half of them in either language
    steps: int = 600
    warm_up: int = 20  # steps
    rate: float = 6e-3  # peak learning rate; in the second half it falls to a twentieth
    decay: float = 0.1  # of matrices
    seed: int = 0


def train_model(
    folder: Path, texts: Mapping[str, Sequence[str]], training: DemoTraining, fresh: bool = False
) -> bool:
    """Train model and tokenizer on `texts`, documents by language, and save them in `folder`.

    Unless `fresh`, a model that was trained with the same settings and texts is kept; anything else
    in `folder` is removed. Returns whether it trained.
    """
    content = json.dumps(list(texts.items()), ensure_ascii=False, default=list)
    digest = hashlib.sha256(content.encode()).hexdigest()
    settings = json.dumps(asdict(training) | {"text": digest}, indent=1)
    file = folder / SETTINGS
    if not fresh and file.is_file() and file.read_text(encoding="utf-8") == settings:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = train_tokenizer(texts, training)
    model = train(tokenizer, texts, training)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    file.write_text(settings, encoding="utf-8")  # the last file: with it the model is whole
    return True


def train_tokenizer(
    texts: Mapping[str, Sequence[str]], training: DemoTraining
) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on all texts; like LLaMA's, it puts `<s>` before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=training.vocabulary,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(chain.from_iterable(texts.values()), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BEGIN, eos_token=END, model_max_length=training.window
    )


def train(
    tokenizer: PreTrainedTokenizerFast, texts: Mapping[str, Sequence[str]], training: DemoTraining
) -> LlamaForCausalLM:
    """Train from scratch on windows drawn in turn from every language; float32, on the CPU."""
    import torch

    rng = random.Random(training.seed)
    streams = []  # all documents of a language as one row of ids (tokens,)
    for documents in texts.values():
        ids = tokenizer(list(documents), verbose=False).input_ids
        streams.append(torch.tensor(list(chain.from_iterable(ids))))
    model = _new_model(tokenizer, training).train()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": training.decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    with progress(training.steps, "training", "step") as on_progress:
        for step in range(training.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, training)
            windows = draw(rng, streams, training)  # (batch, window)
            model(input_ids=windows, labels=windows).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            on_progress(1)
    return model.eval()


def rate(step: int, training: DemoTraining) -> float:
    """Return the rate of a step: short warm-up, level first half, linear decay."""
    done = step / training.steps
    warm = min(1.0, (step + 1) / training.warm_up)
    return training.rate * warm * (1.0 if done < 0.5 else 0.05 + 1.9 * (1 - done))


def draw(rng: random.Random, streams: Sequence[Tensor], training: DemoTraining) -> Tensor:
    """Return windows (batch, window) drawn in turn from every stream."""
    import torch

    windows = []
    for i in range(training.batch):
        stream = streams[i % len(streams)]
        start = rng.randint(0, len(stream) - training.window)
        windows.append(stream[start : start + training.window])
    return torch.stack(windows)


def _new_model(tokenizer: PreTrainedTokenizerFast, training: DemoTraining) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=training.width,
        intermediate_size=training.inner,
        num_hidden_layers=training.blocks,
        num_attention_heads=training.heads,
        num_key_value_heads=training.heads,
        max_position_embeddings=training.window,
        initializer_range=training.spread,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        return LlamaForCausalLM(config)
