"""The command lines that one process and several run, on what conftest.py has written."""

from __future__ import annotations

from pathlib import Path

from support import QUICK

BASE = [*QUICK, "--nsamples", "7", "--eval_data", "uk"]
WANDA = ["--prune_method", "wanda", "--calibration_data", "uk"]
SPARSEGPT = ["--prune_method", "sparsegpt", "--calibration_data", "uk"]
MAGNITUDE = ["--prune_method", "magnitude"]
BY_ERROR = ["--sparsity_ratio", "0.6", "--allocation", "error"]
CASES = {
    "wanda": ["llama", *WANDA, "--prompts", "3"],
    "wanda 2:4": ["llama", *WANDA, "--sparsity_type", "2:4"],
    "sparsegpt": ["llama", *SPARSEGPT],
    "sparsegpt 4:8": ["llama", *SPARSEGPT, "--sparsity_type", "4:8"],
    "admm": ["llama", "--prune_method", "admm", "--calibration_data", "uk"],
    "admm by error": ["llama", "--prune_method", "admm", "--calibration_data", "uk", *BY_ERROR],
    "magnitude": ["llama", *MAGNITUDE],
    "experts": ["mixtral", *WANDA],
    "experts by sparsegpt": ["mixtral", *SPARSEGPT, "--sparsity_type", "2:4"],
    "experts by error": ["mixtral", *WANDA, *BY_ERROR],
    "one window": ["llama", *WANDA, "--nsamples", "1"],
    "offloaded": ["llama", *WANDA, "--offload", "away"],
    "packed": ["llama", *WANDA, "--sparsity_type", "2:4", "--replace_sparse_layers"],
    "packed from disk": [*"llama --replace_sparse_layers --offload away".split(), *WANDA]
    + ["--sparsity_type", "2:4"],
    "quantised": ["llama", *SPARSEGPT, "--load_bit", "8"],
}


def flags(case: str, where: Path | str) -> list[str]:
    """A command line that saves its run and its model in a folder of the case's own."""
    model, *rest = CASES[case]
    saved = ["--save", f"{where}/{case}/run", "--save_model", f"{where}/{case}/model"]
    return ["--model", model, *BASE, *rest, *saved]
