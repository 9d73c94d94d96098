"""One decoder block at a time: what its linears receive, and what becomes of them."""
