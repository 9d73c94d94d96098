"""Make a small dense LLaMA a mixture of 8 experts, 2 used, and train it on two languages.

    python benchmarks/mixture.py DENSE TEXTS OUT [--languages uk en] [--steps 260]

Every expert gets another random half of the MLP's neurons, with scaled outputs, so that they differ
at once (compare Drop-Upcycling, Nakamura et al., ICLR 2025). Only experts and routers are trained,
with a loss that keeps all in use. TEXTS has a folder of train.jsonl and test.jsonl for a language.
The same command continues, and draws at the end which expert serves which language
(docs/results/neurons.md).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


EXPERTS, LENGTH, WIDTH = 8, 512, 352  # tokens of a window; neurons of an expert: 32 times a number
BATCH, RATE, BALANCE = 2, 2e-3, 0.01  # windows of each language; peak; weight of the balance
KEPT = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
KEPT += " rms_norm_eps rope_parameters max_position_embeddings bos_token_id eos_token_id"
KEPT += " tie_word_embeddings"
NEW = dict(num_local_experts=EXPERTS, intermediate_size=WIDTH, router_aux_loss_coef=0.0)


@torch.no_grad()
def mixture_of(dense: nn.Module) -> MixtralForCausalLM:
    """The dense model, with experts of random neurons in place of every MLP."""
    fields = {name: getattr(dense.config, name) for name in KEPT.split()}
    model = MixtralForCausalLM(MixtralConfig(**fields, **NEW))
    model.load_state_dict(dense.state_dict(), strict=False)  # all but the MLPs
    for block, old in zip(model.model.layers, dense.model.layers, strict=True):
        gate, up, down = (part.weight for part in list(old.mlp.children())[:3])
        for expert in range(EXPERTS):
            picked = torch.randperm(len(gate))[:WIDTH]
            block.mlp.experts.gate_up_proj[expert] = torch.cat([gate[picked], up[picked]])
            block.mlp.experts.down_proj[expert] = down[:, picked] * (len(gate) / WIDTH)
    return model


def use(logits: Tensor) -> Tensor:
    """The share of the tokens that each expert gets, of router logits (tokens, experts)."""
    return logits.topk(2).indices.flatten().bincount(minlength=EXPERTS) / (2 * len(logits))


@torch.no_grad()
def draw(model: nn.Module, texts: dict[str, Tensor], path: Path) -> None:
    """Draw the first language's share of what each expert gets, of as many tokens of both."""
    uses = []
    for ids in texts.values():
        batch = ids[: 24 * LENGTH].view(24, LENGTH)
        routers = model.model(input_ids=batch, output_router_logits=True).router_logits
        uses.append(torch.stack([use(logits) for logits in routers]))  # (blocks, experts)
    shares = (100 * uses[0] / sum(uses).clamp(min=1e-9)).sort(descending=True).values
    figure = Figure(figsize=(7, 2 + 0.3 * len(shares)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), aspect="auto", cmap="cividis")
    axes.set(xlabel="expert", ylabel="block")
    title = "Share of {0} in the tokens of each expert, as many {0} as {1} tokens read"
    figure.suptitle(title.format(*texts))
    figure.colorbar(image, label="%; sorted in each block")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("dense", "texts", "out"):
        parser.add_argument(name, metavar=name.upper(), type=Path)
    parser.add_argument("--languages", nargs=2, default=["uk", "en"])
    parser.add_argument("--steps", type=int, default=260)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    model = mixture_of(AutoModelForCausalLM.from_pretrained(args.dense, dtype=torch.float32))

    def tokens(language: str, name: str) -> Tensor:
        with (args.texts / language / f"{name}.jsonl").open(encoding="utf-8") as rows:
            ids = tokenizer([json.loads(row)["text"] for row in rows]).input_ids
        return torch.tensor([token for document in ids for token in document])

    streams = [tokens(language, "train") for language in args.languages]
    model.requires_grad_(False)
    trained = [p.requires_grad_() for name, p in model.named_parameters() if ".mlp." in name]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.0)
    state, first = args.out / "state.pt", 0
    if state.exists():
        first, weights, moments = torch.load(state)
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    for step in range(first, args.steps):
        left = 1 - step / args.steps
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 30, 0.03 + 2 * left)
        draws = torch.Generator().manual_seed(step)
        starts = [torch.randint(len(s) - LENGTH, (BATCH,), generator=draws) for s in streams]
        pairs = zip(streams, starts, strict=True)
        batch = torch.stack([s[i : i + LENGTH] for s, at in pairs for i in at.tolist()])
        out = model(input_ids=batch, labels=batch, output_router_logits=True)
        even = [EXPERTS * use(r) @ r.softmax(-1).mean(0) for r in out.router_logits]  # 1: evenly
        (out.loss + BALANCE * sum(even) / len(even)).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"{step + 1} loss {out.loss:.3f}, worst balance {max(even):.2f}", flush=True)
        if step % 50 == 49 or step + 1 == args.steps:
            for part in (model, tokenizer):
                part.save_pretrained(args.out / "model")
            torch.save((step + 1, model.state_dict(), optimizer.state_dict()), f"{state}.partial")
            os.replace(f"{state}.partial", state)
    tests = {language: tokens(language, "test") for language in args.languages}
    draw(model.eval(), tests, args.out / "use.png")


if __name__ == "__main__":
    main()
