"""ADMM: choose mask and weights together, by the alternating direction method of multipliers."""
