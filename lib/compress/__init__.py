"""One command from a dense model to a small one: a plan by device and minutes, main.py, a table."""
