"""The demo's model: a tiny bilingual LLaMA with a tokenizer of its own, trained in about a minute.

It is small on purpose: a model without spare capacity loses by every pruned weight, and which
weights can be pruned differs between its two languages.
"""

from __future__ import annotations

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
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Texts = Mapping[str, Sequence[str]]  # documents by language
SETTINGS = "training.json"  # beside the weights, which depend on it
BEGIN, END = "<s>", "</s>"  # ids 0 and 1
SEED = 0
SPREAD = 0.05  # standard deviation of new weights
WARM_UP = 20  # steps
RATE = 6e-3  # peak learning rate; in the second half it falls to a twentieth
DECAY = 0.1  # of matrices


@dataclass(frozen=True)
class DemoTraining:
    """The size of the demo's model and of its training."""

    vocabulary: int = 1024  # tokens
    window: int = 128  # tokens
    width: int = 96
    inner: int = 256
    blocks: int = 3
    heads: int = 4
    batch: int = 16  # windows a step, half of them in either language
    steps: int = 600


def train_model(folder: Path, texts: Texts, training: DemoTraining) -> bool:
    """Train model and tokenizer and save them in `folder`, unless that holds them already.

    Anything else in `folder` is removed. Returns whether it trained.
    """
    settings, file = json.dumps(asdict(training)), folder / SETTINGS
    if file.is_file() and file.read_text("utf-8") == settings:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = train_tokenizer(texts, training)
    train(tokenizer, texts, training).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file.write_text(settings, "utf-8")  # the last file: with it the model is whole
    return True


def train_tokenizer(texts: Texts, training: DemoTraining) -> PreTrainedTokenizerFast:
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
    tokenizer: PreTrainedTokenizerFast, texts: Texts, training: DemoTraining
) -> LlamaForCausalLM:
    """Train from scratch on windows drawn in turn from every language; float32, on the CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=training.width,
        intermediate_size=training.inner,
        num_hidden_layers=training.blocks,
        num_attention_heads=training.heads,
        max_position_embeddings=training.window,
        initializer_range=SPREAD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config).train()
    tokenized = [tokenizer(list(each), verbose=False).input_ids for each in texts.values()]
    # all documents of a language as one row of ids (tokens,)
    streams = [torch.tensor(list(chain.from_iterable(ids))) for ids in tokenized]
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    rng = random.Random(SEED)
    with progress(training.steps, "training", "step") as on_progress:
        for step in range(training.steps):
            done = step / training.steps
            rate = RATE * min(1.0, (step + 1) / WARM_UP)
            for group in optimizer.param_groups:
                group["lr"] = rate * (1.0 if done < 0.5 else 0.05 + 1.9 * (1 - done))
            windows = []
            for i in range(training.batch):
                stream = streams[i % len(streams)]
                start = rng.randint(0, len(stream) - training.window)
                windows.append(stream[start : start + training.window])
            batch = torch.stack(windows)  # (batch, window)
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            on_progress(1)
    return model.eval()
