"""A model, its decoder blocks and their matrices, wherever these are kept."""
