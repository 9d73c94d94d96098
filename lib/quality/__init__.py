"""How well a pruned model keeps what the dense one can do: divergence, abilities, fidelity."""
