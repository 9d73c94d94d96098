"""Pruning methods: a score or a solver for the linear layers that share an input."""
