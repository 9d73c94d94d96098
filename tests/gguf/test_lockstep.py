"""Two files in lock-step, beside transformers and the definitions of llama-perplexity."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ggufs  # noqa: E402

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from lib.gguf.file import GgufFile  # noqa: E402
from lib.gguf.llama import Llama  # noqa: E402
from lib.gguf.lockstep import Step, lockstep, losses_of, match  # noqa: E402

Texts = list[str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files in 32 bits whose heads differ."""
    folder = tmp_path_factory.mktemp("files")
    one = ggufs.model(folder / "one.gguf", head=ggufs.F32)
    rows = len(ggufs.tokenizer("gpt2")["tokenizer.ggml.tokens"][1])
    head = (ggufs.blocks(ggufs.F32, rows, ggufs.WIDTH, seed) for seed in (9, 77))
    near, far = (each.view(np.float32) for each in head)
    head = ((ggufs.WIDTH, rows), ggufs.F32, (near + 0.2 * far).view(np.uint8))
    other = ggufs.model(folder / "other.gguf", head=ggufs.F32, more={"output.weight": head})
    return [one, other]


def both(files: list[Path], windows: list[list[int]]) -> list[Step]:
    with closing(Llama(files[0])) as one, closing(Llama(files[1])) as other:
        return [step for [step] in lockstep((one, other), [(w, w) for w in windows])]


def windows_of(file: Path, texts: Texts) -> list[list[int]]:
    with closing(Llama(file, tokenizer_alone=True)) as tokenizer:
        return [[tokenizer.first, *tokenizer.encode(text).tolist()] for text in texts]


def in_transformers(file: Path) -> LlamaForCausalLM:
    """The model of a file of `ggufs`; llama.cpp has other rows of queries and keys next to each
    other."""
    tensors = {
        each.name.removesuffix(".weight"): torch.from_numpy(np.array(each.data))
        for each in gguf.GGUFReader(file).tensors
    }
    for name, heads in (("attn_q", 4), ("attn_k", 2)):
        weight = tensors[f"blk.0.{name}"]
        parts = weight.view(heads, len(weight) // heads // 2, 2, -1)
        tensors[f"blk.0.{name}"] = parts.transpose(1, 2).reshape(weight.shape)
    sizes = dict(hidden_size=ggufs.WIDTH, intermediate_size=96, num_hidden_layers=1)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tensors["output"]), **sizes))
    names = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    block = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    block |= {f"attn_{n}": f"self_attn.{n}_proj" for n in "qkv"}
    block |= {"attn_output": "self_attn.o_proj"}
    block |= {f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    names |= {f"blk.0.{theirs}": f"model.layers.0.{ours}" for theirs, ours in block.items()}
    model.load_state_dict({f"{names[name]}.weight": each for name, each in tensors.items()})
    return model.eval()


@torch.no_grad()
def test_files_of_32_bits_agree_with_transformers(files: list[Path]) -> None:
    windows = windows_of(files[0], ggufs.sentences(ggufs.UK, 3))
    models = [in_transformers(file) for file in files]
    for window, step in zip(windows, both(files, windows), strict=True):
        ids = torch.tensor([window])
        logs = [model(ids).logits[0, :-1].double().log_softmax(-1) for model in models]
        nats = np.stack([-each.gather(1, ids.T[1:])[:, 0].numpy() for each in logs])
        kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).numpy()
        assert 0.05 < kl.mean() and np.abs(step.kl - kl).max() < 1e-4
        assert np.abs(step.losses - nats).max() < 1e-4
        assert np.array_equal(step.equal, (logs[0].argmax(-1) == logs[1].argmax(-1)).numpy())
        assert not step.left_out.any()
    with closing(Llama(files[1])) as model:
        alone = [*losses_of(model, windows)]
    assert np.allclose(alone[0], both(files, windows)[0].losses[1], atol=1e-6)


def by_perplexity(files: list[Path], ids: list[int], context: int) -> tuple[float, float]:
    """Mean KL and the logarithm of the ratio of perplexities, as `llama-perplexity` defines them.

    A slow reference of its definition: consecutive chunks of `context` tokens, the first token of
    each replaced by BOS, and only the predictions of the second half counted.
    """
    kl, apart, first = [], [], context // 2
    for begin in range(0, len(ids) - context + 1, context):
        chunk, logs = ids[begin : begin + context], []
        for file in files:
            with closing(Llama(file)) as model:
                window = [model.first, *chunk[1:]]
                logits = next(model.logits([window]))[2].astype(np.float64)
            shifted = logits - logits.max(-1, keepdims=True)
            logs.append(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
        for place in range(first, context - 1):
            base, file = (each[place] for each in logs)
            kl.append(float((np.exp(base) * (base - file)).sum()))
            apart.append(float(base[chunk[place + 1]] - file[chunk[place + 1]]))
    return float(np.mean(kl)), float(np.mean(apart))


def test_windows_of_llama_perplexity(files: list[Path]) -> None:
    context, text = 64, "\n".join(ggufs.sentences([*ggufs.UK, *ggufs.EN], 20))
    first, *ids = windows_of(files[0], [text])[0]
    expected = by_perplexity(files, ids, context)
    chunks = [ids[at : at + context] for at in range(0, len(ids) - context + 1, context)]
    steps = both(files, [[first, *chunk[1:]] for chunk in chunks])
    counted = slice(context // 2, None)
    kl = np.concatenate([step.kl[counted] for step in steps])
    one, other = np.concatenate([step.losses[:, counted] for step in steps], axis=1)
    assert len(chunks) > 4 and len(kl) == len(chunks) * (context // 2 - 1)
    assert kl.mean() == pytest.approx(expected[0], rel=1e-6)
    assert (other - one).mean() == pytest.approx(expected[1], abs=1e-6)


def tokens_changed(folder: Path, name: str, changed: dict[str, str]) -> GgufFile:
    fields = ggufs.tokenizer("gpt2")
    kind, tokens = fields["tokenizer.ggml.tokens"]
    renamed = {"tokenizer.ggml.tokens": (kind, [changed.get(token, token) for token in tokens])}
    return GgufFile(ggufs.model(folder / name, changed=renamed), name)


def test_tokens_are_matched_by_text(files: list[Path], tmp_path: Path) -> None:
    whole, padded = GgufFile(files[0], "one"), ggufs.model(tmp_path / "pad.gguf", padding=3)
    assert match(whole, whole).pair([[3, 4], [3, 4]]) == [[3, 4], [3, 4]]
    more = match(whole, GgufFile(padded, "padded"))  # rows without a token are no tokens
    assert more.smaller == 0 and more.pair([[5, 6], [5, 6]]) == [[5, 6], [5, 6]]
    assert match(whole, GgufFile(ggufs.model(tmp_path / "l.gguf", "llama"), "l")) is None
    named = ggufs.tokenizer("gpt2")["tokenizer.ggml.tokens"][1]
    first, last = named[-1], named[-2]
    one = tokens_changed(tmp_path, "a.gguf", {first: "own"})
    other = tokens_changed(tmp_path, "b.gguf", {last: "theirs"})
    apart, count = match(one, other), len(named)
    assert apart.smaller is None and apart.rows.shape == (2, count - 2)
    assert apart.pair([[7, 8], [7, 8]]) == [[7, 8], [7, 8]]
    assert apart.pair([[7, 8], [8, 7]]) is None and apart.pair([[7, count - 1]] * 2) is None
    assert match(whole, one).smaller is None
