"""What to drop, and how: a score or a solver for the linears that share an input."""
