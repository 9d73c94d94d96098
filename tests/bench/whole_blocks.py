"""Whole decoder blocks or neurons of as many bytes, trained alike: the table of blocks.md.

    python -m tests.bench.whole_blocks remove MODEL DATA OUT COUNT ...  # OUT/blocks-COUNT
    python -m tests.bench.whole_blocks measure MODEL DATA FOLDER ...
    python -m tests.bench.whole_blocks main FLAGS                       # of main.py

Blocks go one by one, always that without which the model is nearest to the dense one. Then the
projection before each gap is solved for (ReplaceMe, arXiv 2505.02819).
"""

import math
import sys
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import main
from lib.data.sources import parse_source
from lib.data.windows import calibration_windows, test_set
from lib.eval import compare_logits, cross_entropy
from lib.methods.admm import Admm
from lib.model.blocks import BlockRunner, run_block
from lib.pruning import neurons
from lib.pruning.residual import stream_at
from lib.run import teacher

SEQLEN, CHOOSING, REPAIRING, MEASURED = 512, 4, 64, 60  # tokens; windows
EVERY = 4  # tokens of the choosing windows, where the divergence is taken
neurons.MULTIPLE = 32  # which q8_0 needs
teacher._is_smaller = lambda *args: True  # also where it has more blocks


def load(folder: str) -> BlockRunner:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return BlockRunner(model.eval().requires_grad_(False), torch.device("cpu"))


@torch.no_grad()
def choose(runner: BlockRunner, windows: torch.Tensor, most: int) -> list[int]:
    """The blocks that go, in order. A score only rises as others go: an old one is a bound."""
    states, kept, gone = runner.capture(windows, len(windows)), list(range(len(runner.blocks))), []
    scores, inputs = dict.fromkeys(kept, 0.0), [states.hidden]  # inputs: of the kept blocks

    def run(hidden: torch.Tensor, indices: list[int]) -> torch.Tensor:
        for index in indices:
            hidden = run_block(runner.blocks[index], hidden, *states.block_args[index][0])
        return hidden

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(0, SEQLEN, EVERY)
        return runner.logits_from_hidden(windows, lambda: hidden, positions).flatten(0, 1)

    dense = logits(run(states.hidden, kept))
    while len(gone) < most:
        for index in kept[len(inputs) - 1 : -1]:
            inputs.append(run(inputs[-1], [index]))
        scored = set()
        while (best := min(scores, key=scores.get)) not in scored:
            place = kept.index(best)
            without = logits(run(inputs[place], kept[place + 1 :]))
            scores[best] = compare_logits(dense, without)[0].mean().item()
            scored.add(best)
        print(f"block {best} goes, of {len(scored)}: KL {scores.pop(best):.4f}", flush=True)
        del inputs[kept.index(best) + 1 :]
        kept.remove(best)
        gone.append(best)
    return gone


@torch.no_grad()
def remove_blocks_(runner: BlockRunner, gone: list[int], windows: torch.Tensor) -> None:
    """Remove blocks, and solve for the down projection before each gap; the config follows."""
    config, own = runner.model.config, runner.capture(windows, 2)
    dense = replace(own, hidden=own.hidden.clone())
    kept = [index for index in range(len(runner.blocks)) if index not in gone]
    for index, following in zip(kept, [*kept[1:], len(runner.blocks)], strict=True):
        for each in range(index, following):
            runner.advance_(dense, each)
        if following > index + 1:
            down = runner.linears(index)[-1]
            method = Admm(down.shape[1], runner.device)
            for batch, run in runner.iter_batches(own, index):
                x, stream = stream_at(run, down)
                error = dense.hidden[batch] - (stream + down.module(x))
                method.observe(x.flatten(0, 1), residual_error=error.flatten(0, 1))
            problem = method.problem([down.matrix()])
            solution = torch.linalg.solve(problem.hessian, problem.target).div_(problem.scale)
            down.module.weight.data.copy_(solution.T)
        runner.advance_(own, index)
    runner.model.model.layers = torch.nn.ModuleList(runner.blocks[index] for index in kept)
    config.num_hidden_layers = len(kept)
    if types := getattr(config, "layer_types", None):
        config.layer_types = [types[index] for index in kept]


def remove(model: str, data: str, out: str, *counts: str) -> None:
    source, tokenizer = parse_source(data, "DATA"), AutoTokenizer.from_pretrained(model)
    windows, _ = calibration_windows([source], tokenizer, REPAIRING, SEQLEN, seed=0)
    order = choose(load(model), windows[:CHOOSING], max(map(int, counts)))
    for count in counts:
        runner = load(model)
        remove_blocks_(runner, order[: int(count)], windows)
        for part in (runner.model, tokenizer):
            part.save_pretrained(f"{out}/blocks-{count}")


@torch.no_grad()
def measure(model: str, data: str, *folders: str) -> None:
    """Print loss and divergence of each model, and how much more they are than the one before."""
    test = test_set(parse_source(data, "DATA"), AutoTokenizer.from_pretrained(model), SEQLEN)
    models, rows = [load(folder).model for folder in (model, *folders)], []
    count = len(test.windows)
    for ids in (test.windows[i * count // MEASURED][None] for i in range(MEASURED)):
        dense, *others = (each(ids).logits[0, :-1] for each in models)
        losses = [cross_entropy(each, ids[0, 1:]).mean() for each in (dense, *others)]
        kl = [compare_logits(dense, each)[0].mean() for each in (dense, *others)]
        rows.append(torch.tensor([losses, kl], dtype=torch.float64))
    figures = torch.stack(rows)  # (windows, 2, models)
    bits = count * (SEQLEN - 1) / math.log(2) / test.bytes  # per byte, of a nat per token
    for index, folder in enumerate((model, *folders)):
        for values in (figures[..., index], figures[..., index] - figures[..., index - 1]):
            (loss, kl), errors = values.mean(0).tolist(), (values.std(0) / MEASURED**0.5).tolist()
            print(f"{folder}: loss {loss:.4f} ± {errors[0]:.4f}, {loss * bits:.4f} bits per byte,")
            print(f"    perplexity {math.exp(loss):.2f}, KL {kl:.4f} ± {errors[1]:.4f}", flush=True)


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    {"remove": remove, "measure": measure, "main": lambda *flags: main.main(flags)}[verb](*rest)
