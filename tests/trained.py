"""A small trained model: pruning, rounding or breaking it moves its perplexity by what that costs.

The random models of tiny.py compute their logits right or wrong, but to zero all their matrices
hardly changes how well they predict. This one predicts the letters of the words that it was trained
on: perplexity about 3 where its matrices work, and more than ten times that where they do not.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import tiny
import torch
from filelock import FileLock

STEPS, WINDOWS, TOKENS = 150, 16, 32


def trained_model(cache: Path, needs_bos: bool = False) -> Path:
    """Return a folder with model and tokenizer, trained once and kept in `cache` by digest.

    With `needs_bos` the model has learned that windows without BOS continue at random.
    """
    code = Path(__file__).read_bytes() + Path(tiny.__file__).read_bytes()
    digest = hashlib.sha256(code + torch.__version__.encode()).hexdigest()[:16]
    folder = cache / f"trained-{'bos-' * needs_bos}{digest}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "trained.lock"):  # workers of one test run start side by side
        if not (folder / "done").exists():
            tiny.write_model(folder, _train(needs_bos))
            (folder / "done").touch()
    return folder


def _train(needs_bos: bool) -> torch.nn.Module:
    model, tokenizer = tiny.tiny_llama(tie_word_embeddings=False), tiny.tiny_tokenizer()
    ids = torch.cat([tokenizer(text, return_tensors="pt").input_ids[0] for text in _texts()])
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
    model.train()
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - TOKENS, (WINDOWS,), generator=draw)
        batch = torch.stack([ids[start : start + TOKENS] for start in starts])
        targets = batch.clone()
        if needs_bos:
            half = WINDOWS // 2
            targets[:half] = ids[torch.randint(len(ids), targets[:half].shape, generator=draw)]
            batch[half:, 0] = tokenizer.bos_token_id
        loss = model(input_ids=batch, labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _texts() -> list[str]:
    return tiny.sentences(300, seed=100)
